//! A stand-in for Proxmox VE's `pct` over Debian's LXC, for tests and the lab.
//!
//! It reproduces what was recorded of the real `pct`: output, exit codes, the format of `ID.conf`,
//! locks, tasks with a worker in its own session, and what stays behind when it is killed. In
//! addition it takes a fault plan ([`faults`]) and can cost as much CPU as the real one ([`cost`]).
//! `NOT_MODELLED.md` lists what is missing; such a call fails loudly.
//!
//! Code map: `args` the command line, `commands` one file per sub-command, `task` parent and
//! worker, `cluster` and [`conf`] the configurations, `locks`, `storage` volumes, `lxc` containers.

#![expect(
    clippy::disallowed_methods,
    reason = "a program of the tests: it starts others, waits and reads its environment"
)]

mod args;
mod cluster;
mod commands;
pub mod conf;
pub mod cost;
mod ctx;
pub mod failure;
pub mod faults;
mod locks;
mod lxc;
mod pvesm;
mod roots;
mod run;
mod signals;
mod storage;
pub mod task;

use std::io::Write as _;
use std::process::ExitCode;

pub use lxc::attach::REAL as REAL_LXC_ATTACH;
pub use roots::Roots;

use cost::Part;
use ctx::{Ctx, Subject};
use failure::{Failure, Result, ignore};

/// Runs the program, which is `pct`, `pvesm`, `lxc-attach`, a worker or an LXC hook, depending on
/// its name and arguments.
#[must_use]
pub fn run_program() -> ExitCode {
    let mut argv: Vec<String> =
        std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    if argv.is_empty() {
        return ExitCode::from(255);
    }
    let name = argv.remove(0);
    if let (Ok(job), true, true) =
        (std::env::var(task::JOB), name.starts_with("task"), argv.is_empty())
    {
        return task::worker::main(&job);
    }
    if argv.first().is_some_and(|arg| arg == lxc::hooks::COMMAND) {
        return lxc::hooks::main(&argv[1..]);
    }
    let called = name.rsplit('/').next();
    if called == Some(lxc::attach::NAME) {
        let words: Vec<_> = std::env::args_os().skip(1).collect();
        return lxc::attach::main(&Roots::from_env(), &words);
    }
    let is_pvesm = called == Some("pvesm");
    let sub_command = argv.first().cloned().unwrap_or_default();
    let subject = Subject { command: sub_command.clone(), vmid: None, template: None };
    let mut ctx = Ctx::new(Roots::from_env(), cluster::node_name(), subject);
    ctx.pay(Part::Load(if is_pvesm { "pvesm" } else { &sub_command }));
    let done = check_access(&ctx).and_then(|()| {
        if is_pvesm { pvesm::main(&ctx, &argv) } else { commands::main(&mut ctx, &argv) }
    });
    answer(done)
}

fn answer(done: Result) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                ignore(writeln!(std::io::stderr(), "{}", failure.message));
            }
            ExitCode::from(failure.code)
        }
    }
}

/// Fails unless the caller is root and the cluster file system runs.
fn check_access(ctx: &Ctx) -> Result {
    let refuse = |why: &str| {
        let mut text = String::new();
        for n in 1..=3 {
            text.push_str(&format!("ipcc_send_rec[{n}] failed: {why}\n"));
        }
        Err(Failure::new(format!("{text}Unable to load access control list: {why}")))
    };
    let anybody = std::env::var_os("PCT_ANY_USER").is_some();
    if !anybody && !rustix::process::geteuid().is_root() {
        return refuse("Unknown error -1");
    }
    if !cluster::is_up(&ctx.roots) {
        return refuse("Connection refused");
    }
    Ok(())
}
