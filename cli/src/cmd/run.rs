//! `run`: creates a sandbox, runs a command in it, and with `--rm` deletes it again.

use std::{ffi::OsString, time::Duration};

use clap::Args;
use proto::sandbox::v1::{DeleteSandboxRequest, Sandbox};
use tokio::time::timeout;

use super::{
    create::{self, Creation, Way},
    exec::{self, How},
    shell,
    wanted::{self, Wanted},
};
use crate::{
    client::{Controller, patient},
    failure::Failure,
    output::Output,
    signals::{Stop, Stops},
    values::duration,
};

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl run --rm -- uname -a              a sandbox for one command
  sandboxctl run --rm -it                      a shell; the sandbox goes with it
  sandboxctl run --snapshot small --memory 2g -e CI=1 -- make test
  sandboxctl run --rm -i -- tar cz < in > out  stdin with -i only

The exit code is the command's own, 125 when it could not be run. With --rm the
sandbox is deleted whatever happens: also when the creation fails, or on Ctrl-C.
Without it, `@last` is this one.")]
pub(crate) struct Run {
    /// Delete the sandbox when the command has ended
    #[arg(long)]
    rm: bool,
    /// Way to run it.
    #[command(flatten)]
    how: How,
    /// Description of the sandbox.
    #[command(flatten)]
    wanted: Wanted,
    /// How long to wait for the sandbox to run
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    wait: Duration,
    /// Program and arguments, passed on as they are; with -t it may be left out: a shell
    #[arg(trailing_var_arg = true, required_unless_present = "tty", value_name = "CMD")]
    command: Vec<OsString>,
}

/// Longest wait for the deletion.
const REMOVAL: Duration = Duration::from_secs(30);
/// Longest wait for the deletion when the exit must come within a second.
const REMOVAL_AT_ONCE: Duration = Duration::from_millis(700);

/// The id is to be known at once: with `--rm` it is deleted whatever happens.
const WAY: Way = Way { quick: true, no_wait: false, alone: true };

pub(super) async fn run(controller: Controller, run: Run, output: Output) -> Result<u8, Failure> {
    let Run { rm, how, wanted, wait, command } = run;
    let command = if command.is_empty() { shell::login() } else { exec::argv(command)? };
    let request = wanted::request(&controller, wanted, create::random_key()?).await?;
    let creation = Creation::new(&controller, request, wait);
    let mut stops = Stops::listen()?;
    let made = tokio::select! {
        made = creation.finish(WAY, output) => made,
        stop = stops.next() => {
            if rm {
                undo(&creation, stop, output).await;
            } else {
                create::tell([&creation], output);
            }
            return Ok(stop.exit());
        }
    };
    let sandbox = match made {
        Ok(sandbox) => sandbox,
        Err(failure) => {
            if rm && let Some(sandbox) = creation.known() {
                remove(&controller, &sandbox, REMOVAL, output).await;
            }
            return Err(failure);
        }
    };
    if !rm {
        output.note(format!("{} runs on {}", sandbox.id, sandbox.node));
    }
    drop(stops);
    let start = exec::start(sandbox.id.clone(), &how, Vec::new(), command)?;
    let ended = exec::attached(controller.clone(), start, how.interactive, true, output).await;
    if rm {
        remove(&controller, &sandbox, REMOVAL, output).await;
    }
    ended
}

/// Deletes what was begun. Waits for the answer to the creation where it has not come yet: only with
/// it the id is known.
async fn undo(creation: &Creation, stop: Stop, output: Output) {
    let limit = if stop == Stop::Terminated { REMOVAL_AT_ONCE } else { REMOVAL };
    let undone = timeout(limit, async {
        let sandbox = match creation.known() {
            Some(sandbox) => sandbox,
            None => creation.ask(Duration::ZERO).await?,
        };
        remove(creation.controller(), &sandbox, limit, output).await;
        Ok::<_, Failure>(())
    });
    if !matches!(undone.await, Ok(Ok(()))) {
        create::tell([creation], output);
    }
}

/// Deletes the sandbox. Another signal, or the end of the time, leaves the deletion to the user.
async fn remove(controller: &Controller, sandbox: &Sandbox, limit: Duration, output: Output) {
    let call = || {
        let mut client = controller.sandboxes.clone();
        let request = DeleteSandboxRequest { id: sandbox.id.clone() };
        async move { client.delete_sandbox(request).await }
    };
    let stopped = async {
        match Stops::listen() {
            Ok(mut stops) => drop(stops.next().await),
            Err(_) => std::future::pending().await,
        }
    };
    let removed = tokio::select! {
        removed = timeout(limit, patient(call)) => {
            removed.unwrap_or_else(|_| Err(Failure::deadline("it was not deleted", limit)))
        }
        () = stopped => Err(Failure::local("interrupted")),
    };
    if let Err(failure) = removed {
        let left = format!("{} may be left: {}", sandbox.id, failure.message);
        let next = format!("`sandboxctl rm {}` deletes it", sandbox.id);
        Failure::local(left).hint(next).print(output.json);
    }
}
