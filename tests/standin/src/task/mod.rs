//! Tasks: a parent that waits and a worker in its own session that does the work.
//!
//! ```text
//! pct clone ...             parent: reads the worker's output, prints it, writes the task log
//!   `- task UPID:...:       worker: its stdout and stderr are one pipe to the parent
//! ```
//! The worker is this program again, started with the task's name as its argument list. A parent
//! that is told to end passes this on; if a parent is killed, the worker continues.

pub(crate) mod log;
pub mod upid;
pub(crate) mod worker;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::run;
use crate::signals::{Signals, Woken, wait_or_hangup};
use upid::Upid;

/// Job that the worker gets in its environment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// Kind of task, such as `vzclone`.
    pub(crate) kind: String,
    /// Container under which the task is listed.
    pub(crate) id: String,
    /// The work.
    pub(crate) work: crate::commands::Work,
    /// Sub-command, for the fault plan.
    pub(crate) command: String,
    pub(crate) vmid: Option<u32>,
    pub(crate) template: Option<u32>,
    /// Process that waits for the worker.
    pub(crate) parent: i32,
}

/// Environment variable that holds the job.
pub(crate) const JOB: &str = "PCT_STANDIN_JOB";
/// Environment variable that holds the task's name, once it is known.
pub(crate) const NAME: &str = "PCT_STANDIN_UPID";
/// This very program, even if another one has replaced it at its path.
const SELF: &str = "/proc/self/exe";
/// First byte of the worker's notes to the parent, which are mixed with its output.
const MARK: u8 = 0;

/// Result of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Ended {
    Ok,
    Failed { message: String, code: u8, forced: bool },
}

#[derive(Debug, Serialize, Deserialize)]
enum Note {
    Begun(String),
    Ended(Ended),
}

/// Runs a job in a worker and waits for it. The error is the worker's last message.
pub(crate) fn run(ctx: &mut Ctx, job: &Job) -> Result {
    let fail = |error: io::Error| Failure::new(format!("fork failed - {error}"));
    ctx.signals = Some(Signals::block().map_err(fail)?);
    let encoded = serde_json::to_string(job).map_err(|e| fail(e.into()))?;
    let (output, input) = io::pipe().map_err(fail)?;
    let child = Command::new(SELF)
        .arg0("task")
        .env(JOB, encoded)
        .stdin(run::null().map_err(fail)?)
        .stdout(input.try_clone().map_err(fail)?)
        .stderr(input)
        .spawn()
        .map_err(fail)?;
    Parent { ctx, child, output, pending: Vec::new(), task: None, ended: None, gone: false }.wait()
}

/// A parent that reads its worker's pipe.
struct Parent<'a> {
    ctx: &'a Ctx,
    child: Child,
    output: io::PipeReader,
    /// Beginning of a line that may be a note.
    pending: Vec<u8>,
    task: Option<(Upid, File)>,
    ended: Option<Ended>,
    /// Whether the reader of our stdout is gone.
    gone: bool,
}

impl Parent<'_> {
    fn wait(mut self) -> Result {
        let raw = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = raw.ok_or_else(|| Failure::new("fork failed"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| Failure::new(format!("fork failed - {error}")))?;
        let mut told = false;
        while self.ended.is_none() {
            let fds = [self.output.as_fd(), pidfd.as_fd()];
            // No deadline here: the worker's steps have their own, as in the real `pct`.
            let stdout = io::stdout();
            let reader = (!self.gone).then(|| stdout.as_fd());
            match wait_or_hangup(self.ctx.signals.as_ref(), &fds, reader, None) {
                Woken::Signal => {
                    ignore(kill_process(pid, Signal::TERM));
                    told = true;
                }
                Woken::Ready(0) => {
                    if !self.read()? {
                        break;
                    }
                }
                Woken::Ready(2) => self.gone = true,
                Woken::Ready(_) | Woken::Timeout => break,
            }
            if self.gone && !told {
                ignore(kill_process(pid, Signal::TERM));
                told = true;
            }
        }
        ignore(self.child.wait());
        self.finish()
    }

    /// Reads the available output; returns false at its end.
    fn read(&mut self) -> Result<bool> {
        let mut buffer = [0_u8; 8192];
        let count = self
            .output
            .read(&mut buffer)
            .map_err(|error| Failure::new(format!("reading the worker failed - {error}")))?;
        for byte in &buffer[..count] {
            self.take(*byte);
        }
        if self.pending.first() != Some(&MARK) {
            self.pass_on();
        }
        Ok(count > 0)
    }

    fn take(&mut self, byte: u8) {
        self.pending.push(byte);
        if byte != b'\n' {
            return;
        }
        if self.pending.first() != Some(&MARK) {
            self.pass_on();
            return;
        }
        let line = std::mem::take(&mut self.pending);
        match serde_json::from_slice(&line[1..]) {
            Ok(Note::Begun(name)) => {
                let upid = Upid::parse(&name);
                let log_dir = &self.ctx.roots.log_dir;
                self.task = upid.and_then(|u| Some((u.clone(), log::begin(log_dir, &u).ok()?)));
            }
            Ok(Note::Ended(ended)) => self.ended = Some(ended),
            Err(_) => {}
        }
    }

    fn pass_on(&mut self) {
        let bytes = std::mem::take(&mut self.pending);
        if let Some((_, log)) = &mut self.task {
            ignore(log.write_all(&bytes));
        }
        if !self.gone {
            let written = io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush());
            self.gone = written.is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe);
        }
    }

    fn finish(mut self) -> Result {
        self.pass_on();
        let status = match &self.ended {
            None => log::UNEXPECTED,
            Some(Ended::Ok) => "OK",
            Some(Ended::Failed { message, .. }) => message,
        };
        if let Some((upid, log)) = &mut self.task {
            ignore(log::end(&self.ctx.roots.log_dir, log, upid, status));
        }
        if self.gone {
            return Err(Failure::broken_pipe());
        }
        match self.ended {
            Some(Ended::Ok) => Ok(()),
            Some(Ended::Failed { message, code, forced }) => {
                // Inside a worker every failure is 255, whatever the errno was.
                let code = if forced { code } else { 255 };
                Err(Failure { forced, ..Failure::coded(code, message) })
            }
            None => Err(Failure::new(log::UNEXPECTED)),
        }
    }
}
