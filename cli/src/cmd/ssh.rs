//! `ssh`: becomes the `ssh` of this machine, with the options that lead to a sandbox.

use std::{io, os::unix::process::CommandExt, path::PathBuf, process::Command};

use clap::Args;
use proto::id::SandboxId;

use super::{ssh_config::Place, targets::One};
use crate::{
    client::{Controller, fetch},
    failure::Failure,
    output::Output,
};

/// Arguments of `ssh`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ssh ID                         a login shell
  sandboxctl ssh ID make test               one command; ssh has its exit code
  sandboxctl ssh ID -NL 8080:localhost:80   port 80 there is your own 8080
  sandboxctl ssh ID -R 5432:localhost:5432  port 5432 there is your own 5432
  sandboxctl ssh ID -- -o Compression=no    `--` before what sandboxctl has, too

Everything after ID is for `ssh`. Your ~/.ssh/config is not changed:
`sandboxctl ssh-config --write` prepares `ssh NAME`, `scp` and `rsync`. Your key
must be known: `sandboxctl ssh-key add`.")]
pub(crate) struct Ssh {
    /// Private key to log in with [default: those that ssh finds]
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Options of `ssh`, and the command to run [default: a login shell]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARG")]
    args: Vec<String>,
}

pub(super) async fn run(controller: Controller, ssh: Ssh, output: Output) -> Result<u8, Failure> {
    let Ssh { identity, sandbox: One { id }, args } = ssh;
    if output.json {
        return Err(Failure::usage(
            "ssh has no JSON output",
            "`sandboxctl exec --json ID COMMAND` runs a command with one",
        ));
    }
    let place = Place::of(&controller).await?;
    let id = fetch(&controller, id).await?.id;
    if id.parse::<SandboxId>().is_err() {
        return Err(Failure::local(
            "the controller told of a sandbox in a form that is not safe to use",
        ));
    }
    place.write_known_hosts().map_err(|(path, error)| {
        let message = format!("cannot write {}: {error}", path.display());
        Failure::usage(message, "ssh reads the host key of the controller from it")
    })?;
    #[expect(clippy::disallowed_methods, reason = "this process becomes ssh")]
    let mut ssh = Command::new("ssh");
    for (name, value) in place.options(identity.as_deref()) {
        ssh.arg("-o").arg(format!("{name}={value}"));
    }
    let failed = ssh.arg("-o").arg(format!("User={id}")).arg(id).args(args).exec();
    if failed.kind() == io::ErrorKind::NotFound {
        return Err(Failure::usage(
            "there is no program `ssh` on this machine",
            "install OpenSSH's client; `sandboxctl shell ID` needs none",
        ));
    }
    Err(Failure::local(format!("cannot run ssh: {failed}")))
}
