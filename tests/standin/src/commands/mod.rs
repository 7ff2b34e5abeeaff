//! The sub-commands, one file each, and the table that finds them.

mod clone;
mod clone_work;
mod config;
mod create;
mod destroy;
mod exec;
mod files;
mod list;
mod power;
mod rescan;
mod resize;
mod set;
mod snapshot;
mod start;
mod status;
mod template;
mod unlock;
mod usage;

use serde::{Deserialize, Serialize};

use crate::args::{Args, Spec};
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::task::{self, Job};

/// A sub-command: its specification and the parent's part.
pub(crate) struct Entry {
    pub(crate) spec: Spec,
    pub(crate) run: fn(&mut Ctx, &Args) -> Result,
}

const ENTRIES: &[Entry] = &[
    clone::ENTRY,
    config::CONFIG,
    config::PENDING,
    create::ENTRY,
    destroy::ENTRY,
    exec::ENTRY,
    files::PULL,
    files::PUSH,
    list::ENTRY,
    power::REBOOT,
    power::RESUME,
    power::SHUTDOWN,
    power::STOP,
    power::SUSPEND,
    rescan::ENTRY,
    resize::ENTRY,
    set::ENTRY,
    snapshot::DELETE,
    snapshot::LIST,
    snapshot::ROLLBACK,
    snapshot::TAKE,
    start::ENTRY,
    status::ENTRY,
    template::ENTRY,
    unlock::ENTRY,
];

/// Job of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Work {
    Clone(clone_work::Plan),
    Create(create::Plan),
    DeleteSnapshot { vmid: u32, name: String },
    Destroy(destroy::Plan),
    Pull(files::Plan),
    Push(files::Plan),
    Reboot { vmid: u32, timeout_s: u64 },
    Resize { vmid: u32, bytes: u64 },
    Resume { vmid: u32 },
    Rollback { vmid: u32, name: String, start: bool },
    Shutdown { vmid: u32, timeout_s: u64, force: bool },
    Snapshot { vmid: u32, name: String, description: Option<String> },
    Start { vmid: u32, skip_lock: bool },
    Stop { vmid: u32, skip_lock: bool },
    Suspend { vmid: u32 },
    Template { vmid: u32 },
}

/// Runs a job inside a worker.
pub(crate) fn work(ctx: &Ctx, work: &Work) -> Result {
    match work {
        Work::Clone(plan) => clone_work::work(ctx, plan),
        Work::Create(plan) => create::work(ctx, plan),
        Work::DeleteSnapshot { vmid, name } => snapshot::delete(ctx, *vmid, name),
        Work::Destroy(plan) => destroy::work(ctx, plan),
        Work::Pull(plan) => files::pull(ctx, plan),
        Work::Push(plan) => files::push(ctx, plan),
        Work::Reboot { vmid, timeout_s } => power::reboot(ctx, *vmid, *timeout_s),
        Work::Resume { vmid } => power::resume(ctx, *vmid),
        Work::Resize { vmid, bytes } => resize::work(ctx, *vmid, *bytes),
        Work::Rollback { vmid, name, start } => snapshot::roll_back(ctx, *vmid, name, *start),
        Work::Shutdown { vmid, timeout_s, force } => {
            power::shut_down(ctx, *vmid, *timeout_s, *force)
        }
        Work::Snapshot { vmid, name, description } => {
            snapshot::take(ctx, *vmid, name, description.as_deref())
        }
        Work::Start { vmid, skip_lock } => start::work(ctx, *vmid, *skip_lock),
        Work::Stop { vmid, skip_lock } => power::stop(ctx, *vmid, *skip_lock),
        Work::Suspend { vmid } => power::suspend(ctx, *vmid),
        Work::Template { vmid } => template::work(ctx, *vmid),
    }
}

/// Runs a job in a worker, as a task of the given kind and container.
pub(crate) fn in_worker(ctx: &mut Ctx, kind: &str, id: u32, work: Work) -> Result {
    let job = Job {
        kind: kind.to_owned(),
        id: id.to_string(),
        work,
        command: ctx.subject.command.clone(),
        vmid: ctx.subject.vmid,
        template: ctx.subject.template,
        parent: i32::try_from(std::process::id()).unwrap_or(0),
    };
    task::run(ctx, &job)
}

/// Runs `pct ARGS`.
pub(crate) fn main(ctx: &mut Ctx, argv: &[String]) -> Result {
    let Some((name, rest)) = argv.split_first() else {
        return Err(Failure::new(format!("ERROR: no command specified\n{}", usage::all())));
    };
    if name == "help" {
        return help(ctx, rest);
    }
    let Some(entry) = ENTRIES.iter().find(|entry| entry.spec.name == name) else {
        if usage::is_command(name) {
            return Err(Failure::new(format!("'pct {name}' is not modelled by the stand-in")));
        }
        let text = format!("ERROR: unknown command 'pct {name}'\n{}", usage::all());
        return Err(Failure::new(text));
    };
    let args = entry.spec.parse(rest)?;
    name_subject(ctx, &entry.spec, &args);
    ctx.point("begin")?;
    (entry.run)(ctx, &args)?;
    ctx.point("end")
}

/// Records the containers for fault rules: a clone's `vmid` is the new one, `template` its source.
fn name_subject(ctx: &mut Ctx, spec: &Spec, args: &Args) {
    let first = args.at(0).parse().ok();
    if spec.name == "clone" {
        ctx.subject.vmid = Some(args.vmid(1));
        ctx.subject.template = first;
    } else {
        ctx.subject.vmid = first;
    }
}

fn help(ctx: &Ctx, rest: &[String]) -> Result {
    match rest.first().and_then(|name| ENTRIES.iter().find(|e| e.spec.name == name)) {
        Some(entry) => ctx.say(&format!("USAGE: {}", entry.spec.usage_line())),
        None => ctx.say(&usage::all()),
    }
}
