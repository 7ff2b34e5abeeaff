//! Carries out a planned fault.

use std::io::Write as _;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, getppid, kill_process};

use super::{Action, Rule, take};
use super::{Point, When};
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::signals::{Woken, wait};

/// Reports one side of a step and carries out the fault that is planned for it.
pub(crate) fn point(ctx: &Ctx, step: &str, when: When) -> Result {
    let point = Point {
        command: &ctx.subject.command,
        vmid: ctx.subject.vmid,
        template: ctx.subject.template,
        step,
        when,
    };
    match take(&ctx.roots.control_dir, &point) {
        Ok(None) => Ok(()),
        Ok(Some(rule)) => act(ctx, &rule),
        Err(error) => Err(Failure::new(format!("the fault plan cannot be read: {error}"))),
    }
}

fn act(ctx: &Ctx, rule: &Rule) -> Result {
    match rule.action {
        Action::Hang => pause(ctx, None),
        Action::SleepMs => {
            pause(ctx, Some(Instant::now() + Duration::from_millis(rule.ms.unwrap_or(0))))
        }
        Action::Exit => Err(Failure {
            forced: true,
            ..Failure::coded(rule.code.unwrap_or(255), rule.message.clone().unwrap_or_default())
        }),
        Action::DieBefore | Action::DieAfter => {
            kill_parent(ctx);
            kill(Some(getpid()));
            pause(ctx, None)
        }
        Action::KillWorker => {
            kill(Some(getpid()));
            pause(ctx, None)
        }
        Action::KillParent => {
            kill_parent(ctx);
            Ok(())
        }
        Action::LeaveLock => {
            ctx.leave_lock.set(true);
            Ok(())
        }
        Action::Stderr => {
            let text = rule.message.clone().unwrap_or_else(|| "fault".to_owned());
            ignore(writeln!(std::io::stderr(), "{text}"));
            Ok(())
        }
    }
}

/// Sleeps, unless a signal comes.
pub(crate) fn sleep(ctx: &Ctx, time: Duration) -> Result {
    pause(ctx, Some(Instant::now() + time))
}

fn pause(ctx: &Ctx, deadline: Option<Instant>) -> Result {
    match wait(ctx.signals(), &[], deadline) {
        Woken::Timeout | Woken::Ready(_) => Ok(()),
        Woken::Signal => Err(Failure::interrupt("received interrupt")),
    }
}

fn kill(pid: Option<Pid>) {
    if let Some(pid) = pid {
        ignore(kill_process(pid, Signal::KILL));
    }
}

/// Kills the parent, if it still is our parent: after its death we have another one.
fn kill_parent(ctx: &Ctx) {
    kill(ctx.parent.filter(|parent| getppid() == Some(*parent)));
}
