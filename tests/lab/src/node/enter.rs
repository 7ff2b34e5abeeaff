//! Runs a command inside a node: in all of its namespaces and in its cgroups.

use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::cgroup::Hierarchies;
use crate::layout::{Layout, NodeId};
use crate::process::Proc;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables of the caller's environment that are passed on.
const KEPT: [&str; 4] = ["TERM", "LANG", "LC_ALL", "COLORTERM"];
/// Namespaces in the order to join them. The user namespace is not joined; the mount namespace is
/// last, because the paths to the others disappear with it.
const NAMESPACES: [(&str, CloneFlags); 6] = [
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Joins the node and runs the command; returns its exit code, or 128 plus the signal's number. The
/// calling process must have one thread, and it cannot leave the node again.
#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
pub fn enter_and_run(layout: &Layout, node: NodeId, argv: &[String]) -> Result<i32> {
    let init =
        Proc::from_file(&layout.node_pid(node)).with_context(|| format!("{node} is down"))?;
    let (program, args) = argv.split_first().context("no command was given")?;
    let open = |(name, flag): (&str, CloneFlags)| -> Result<(File, CloneFlags)> {
        let path = format!("/proc/{}/ns/{name}", init.pid);
        Ok((File::open(&path).with_context(|| format!("cannot open {path}"))?, flag))
    };
    let namespaces = NAMESPACES.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    Hierarchies::open()?.node(node).join("user.slice")?;
    for (namespace, flag) in &namespaces {
        setns(namespace, *flag).with_context(|| format!("cannot enter {node}"))?;
    }
    let mut command = Command::new(program);
    command.args(args).env_clear().current_dir("/root");
    command.env("PATH", PATH).env("HOME", "/root").env("USER", "root");
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // SAFETY: the only call in the child is a plain system call.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("lab: {node}: cannot run {program}: {error}");
            return Ok(127);
        }
    };
    let status = child.wait()?;
    Ok(status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1))
}
