//! Starts the process of a service.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::setsid;

use super::service::Service;
use crate::cgroup::set_cpu_weight;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Settings that the supervisor adds to each of its services.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    /// Cgroup to start in; none leaves the process in the supervisor's.
    pub(super) cgroup: Option<&'a Path>,
    /// Weight, and the cgroup that gets it and in which the process starts, too.
    pub(super) cpu: Option<(u32, &'a Path)>,
    /// Socket for READY=1.
    pub(super) notify: Option<&'a Path>,
    /// Whether the process dies with the supervisor.
    pub(super) bound: bool,
}

/// Starts the process and returns its pid.
#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
pub(super) fn spawn(service: &Service, around: &Surroundings<'_>) -> Result<i32> {
    let (program, args) = service.argv.split_first().context("an empty command")?;
    let log = open_log(&service.log)?;
    let netns = match &service.netns {
        Some(name) => {
            let path = format!("/run/netns/{name}");
            Some(File::open(&path).with_context(|| format!("cannot open {path}"))?)
        }
        None => None,
    };
    let mut cgroups = Vec::new();
    for dir in around.cgroup.into_iter().chain(around.cpu.map(|(_, dir)| dir)) {
        fs::create_dir_all(dir)?;
        cgroups.push(OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?);
    }
    if let Some((weight, dir)) = around.cpu
        && let Err(error) = set_cpu_weight(dir, weight)
    {
        eprintln!("supervisor: {}: {error:#}", service.name);
    }
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", PATH).env("HOME", "/root");
    if let Some(notify) = around.notify {
        command.env("NOTIFY_SOCKET", notify);
    }
    command.envs(&service.env).current_dir("/").stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    let bound = around.bound;
    let before_exec = move || {
        // Its own session, so that no terminal and no group signal of the lab reaches it.
        setsid()?;
        if bound {
            set_pdeathsig(Signal::SIGKILL)?;
        }
        // The supervisor blocks its signals and reads them from a descriptor.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        for mut procs in &cgroups {
            procs.write_all(b"0")?;
        }
        if let Some(netns) = &netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: the supervisor has one thread, so the child may call anything; its calls here are
    // plain system calls on descriptors that were opened before the fork.
    unsafe { command.pre_exec(before_exec) };
    let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    Ok(child.id().cast_signed())
}

fn open_log(log: &Path) -> Result<File> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir)?;
    }
    let opened = OpenOptions::new().create(true).append(true).open(log);
    opened.with_context(|| format!("cannot open the log {}", log.display()))
}
