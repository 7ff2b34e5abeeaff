//! `pct exec`: a check, then this process becomes `lxc-attach`. As with the real `pct`, the
//! caller's environment and open files are inherited, and the command survives a killed caller.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::execve;

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::lxc::state;
use crate::run::PATH;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "exec",
        positional: &[("vmid", Kind::Vmid)],
        extra: true,
        options: &[("keep-env", Kind::Bool)],
        usage: "<vmid> [<extra-args>] [OPTIONS]",
    },
    run,
};

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    if args.extra().is_empty() {
        let text = "missing command at /usr/share/perl5/PVE/CLI/pct.pm line 246.";
        return Err(Failure::new(text));
    }
    cluster::load(ctx, vmid)?;
    if !state::is_running(ctx, vmid) {
        return Err(Failure::new(format!("container '{vmid}' not running!")));
    }
    ctx.point("attach")?;
    let mut command = state::program(ctx, "lxc-attach", vmid);
    let keep = args.get("keep-env") != Some("0");
    command.arg(if keep { "--keep-env" } else { "--clear-env" }).arg("--").args(args.extra());
    let error = become_program(&command);
    Err(Failure::new(format!("exec failed: {error}")))
}

/// Executes the program with SIGPIPE ignored, as the real `pct` does: a command whose reader is
/// gone sees an error instead of a signal. `Command::exec` would restore the default action.
fn become_program(command: &Command) -> Errno {
    let c_string = |word: &OsStr| CString::new(word.as_bytes()).unwrap_or_default();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<CString> = words.map(c_string).collect();
    let own = std::env::vars_os().filter(|(name, _)| name != "PATH");
    let path = (OsString::from("PATH"), OsString::from(PATH));
    let env: Vec<CString> = own
        .chain([path])
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            c_string(&name)
        })
        .collect();
    let mut last = Errno::ENOENT;
    for dir in PATH.split(':') {
        let program = c_string(OsStr::new(&format!("{dir}/lxc-attach")));
        match execve(&program, &words, &env) {
            Err(Errno::ENOENT) => {}
            Err(error) => last = error,
        }
    }
    last
}
