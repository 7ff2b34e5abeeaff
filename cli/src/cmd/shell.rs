//! `shell`: a login shell in a sandbox.

use std::{
    io::{IsTerminal, stdin, stdout},
    time::Duration,
};

use clap::Args;
use proto::sandbox::v1::{Argv, exec_start};

use super::exec::{self, How};
use crate::{
    client::Controller,
    failure::Failure,
    output::Output,
    values::{Pair, duration, variable},
};

/// Arguments of `shell`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl shell ID                     the login shell of root
  sandboxctl shell                        in the sandbox that `use` has chosen
  sandboxctl shell -u ada -w /srv ID
  echo 'make test' | sandboxctl shell ID  without a terminal, from stdin

The same as `exec -it` with the shell that the sandbox's user database names,
else bash or sh. The exit code is the shell's.")]
pub(crate) struct Shell {
    /// Sandbox: its name, its id or a part of it from either end, a vmid, @current or @last
    #[arg(default_value = "@current")]
    pub(super) id: String,
    /// User by name or number [default: root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Working directory [default: the user's home]
    #[arg(short = 'w', long, visible_alias = "workdir", value_name = "DIR")]
    cwd: Option<String>,
    /// Variable for the shell, or K alone for its value here; may be given often
    #[arg(short, long, value_name = "K[=V]", value_parser = variable)]
    env: Vec<Pair>,
    /// Kill the shell and all it started after this time [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

/// Finds the user's shell and becomes it.
const LOGIN: &str = "s=$(getent passwd \"$(id -u)\" 2>/dev/null | cut -d: -f7); \
    [ -x \"$s\" ] || s=$(command -v bash || echo /bin/sh); exec \"$s\" -l";

pub(super) async fn run(
    controller: Controller,
    shell: Shell,
    output: Output,
) -> Result<u8, Failure> {
    let Shell { id, user, cwd, env, timeout } = shell;
    let tty = stdin().is_terminal() && stdout().is_terminal() && !output.json;
    let how = How { interactive: true, tty, cwd, user, timeout };
    let start = exec::start(id, &how, env, login())?;
    exec::attached(controller, start, true, true, output).await
}

/// Command that runs the user's login shell.
pub(super) fn login() -> exec_start::Command {
    let args = ["/bin/sh", "-c", LOGIN].map(str::to_owned).into();
    exec_start::Command::Argv(Argv { args })
}
