//! The worker's side of a task.

use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use rustix::process::{Pid, setsid};

use super::upid::Upid;
use super::{Ended, Job, MARK, NAME, Note, SELF};
use crate::cluster;
use crate::commands;
use crate::ctx::{Ctx, Subject};
use crate::failure::{Failure, Result, ignore};
use crate::roots::Roots;
use crate::signals::Signals;

/// Runs a worker process: first without a task name, then, after it has executed its own program
/// again, under that name. Pid and start time stay the same.
pub(crate) fn main(encoded: &str) -> ExitCode {
    let Ok(job) = serde_json::from_str::<Job>(encoded) else { return ExitCode::from(255) };
    let node = cluster::node_name();
    let Ok(name) = std::env::var(NAME) else {
        ignore(setsid());
        let name = Upid::of_this_process(&node, &job.kind, &job.id).to_string();
        return rename(&name);
    };
    let ended = match work(&job, node, &name) {
        Ok(()) => Ended::Ok,
        Err(Failure { message, code, forced, .. }) => Ended::Failed { message, code, forced },
    };
    let failed = matches!(ended, Ended::Failed { .. });
    tell(&Note::Ended(ended));
    if failed { ExitCode::from(255) } else { ExitCode::SUCCESS }
}

fn rename(name: &str) -> ExitCode {
    let error = Command::new(SELF).arg0(format!("task {name}")).env(NAME, name).exec();
    ignore(writeln!(io::stderr(), "fork failed - {error}"));
    ExitCode::from(255)
}

fn work(job: &Job, node: String, name: &str) -> Result {
    let signals = Signals::block().map_err(|e| Failure::new(format!("signals failed - {e}")))?;
    tell(&Note::Begun(name.to_owned()));
    let subject = Subject { command: job.command.clone(), vmid: job.vmid, template: job.template };
    let mut ctx = Ctx::new(Roots::from_env(), node, subject);
    ctx.signals = Some(signals);
    ctx.parent = Pid::from_raw(job.parent);
    commands::work(&ctx, &job.work)
}

/// Sends a note between the lines of output. A parent that is gone does not receive it.
fn tell(note: &Note) {
    let Ok(text) = serde_json::to_string(note) else { return };
    let mut line = vec![MARK];
    line.extend_from_slice(text.as_bytes());
    line.push(b'\n');
    ignore(io::stdout().write_all(&line).and_then(|()| io::stdout().flush()));
}
