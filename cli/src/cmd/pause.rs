//! `pause`: freezes running sandboxes.

use clap::Args;
use proto::sandbox::v1::{PauseSandboxRequest, Phase};

use super::{
    lifecycle::{Change, change, settled},
    targets::Many,
};
use crate::{
    client::{Controller, Sandboxes},
    failure::Failure,
    output::Output,
};

/// Arguments of `pause`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl pause ID                        frozen where it stands; `resume`
                                             goes on from there
  sandboxctl pause --or-stop ID              stop it where something in it does
                                             not freeze
  sandboxctl ls -q | xargs sandboxctl pause  all of them

A paused sandbox keeps its memory, not its CPU. A request for an open port, or
an exec, wakes it; see `wake-on`. A reboot of its node loses what was in its
memory.")]
pub(crate) struct Pause {
    /// Sandboxes.
    #[command(flatten)]
    pub(super) sandboxes: Many,
    /// Stop it where it cannot be frozen, instead of leaving it running
    #[arg(long)]
    or_stop: bool,
}

pub(super) async fn run(
    controller: Controller,
    Pause { sandboxes, or_stop }: Pause,
    output: Output,
) -> Result<u8, Failure> {
    let call = move |mut client: Sandboxes, id| async move {
        let request = PauseSandboxRequest { id, or_stop };
        Ok(client.pause_sandbox(request).await?.map(|told| told.sandbox))
    };
    let asked = Change { sandboxes, no_wait: false };
    change(controller, asked, output, call, move |now| {
        let stopped = or_stop && now.phase() == Phase::Stopped;
        if stopped { Ok(true) } else { settled(now, Phase::Paused) }
    })
    .await
}
