//! `use`: chooses the sandbox that `@current` means.

use clap::Args;
use serde_json::json;

use crate::{
    client::{Controller, fetch},
    failure::Failure,
    output::Output,
    state::Slot,
};

/// Arguments of `use`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl use ID                             from now on @current is this one
  sandboxctl exec @current uname -a
  sandboxctl use @last                          the last created one
  sandboxctl use                                print the id of the current one
  sandboxctl use --none                         none is current any more

Each controller has its own current sandbox, in $XDG_STATE_HOME/sandboxctl
(~/.local/state).")]
pub(crate) struct Use {
    /// Sandbox: its name, its id or a part of it from either end, a vmid, or @last
    pub(super) id: Option<String>,
    /// Forget the current one
    #[arg(long, conflicts_with = "id")]
    none: bool,
}

pub(super) async fn run(controller: Controller, args: Use, output: Output) -> Result<u8, Failure> {
    if args.none {
        controller.state.clear(Slot::Current)?;
        return Ok(0);
    }
    let id = match args.id {
        // It must be there, and a vmid may be another one's later.
        Some(id) => {
            let id = fetch(&controller, id).await?.id;
            controller.state.set(Slot::Current, &id)?;
            Some(id)
        }
        None => controller.state.get(Slot::Current)?,
    };
    match (id, output.json) {
        (id, true) => output.value(&json!({ "id": id }))?,
        (Some(id), false) => output.line(id)?,
        (None, false) => output.note("no sandbox is current; `sandboxctl use ID` chooses one"),
    }
    Ok(0)
}
