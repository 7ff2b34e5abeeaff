//! `resume`: lets paused sandboxes go on.

use clap::Args;
use proto::sandbox::v1::{Phase, ResumeSandboxRequest};

use super::{
    lifecycle::{Change, change, settled},
    targets::Many,
};
use crate::{
    client::{Controller, Sandboxes},
    failure::Failure,
    output::Output,
};

/// Arguments of `resume`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl resume ID  in about a millisecond; nothing in it notices")]
pub(crate) struct Resume {
    /// Sandboxes.
    #[command(flatten)]
    pub(super) sandboxes: Many,
}

pub(super) async fn run(
    controller: Controller,
    Resume { sandboxes }: Resume,
    output: Output,
) -> Result<u8, Failure> {
    let call = |mut client: Sandboxes, id| async move {
        let request = ResumeSandboxRequest { id };
        Ok(client.resume_sandbox(request).await?.map(|told| told.sandbox))
    };
    let asked = Change { sandboxes, no_wait: false };
    change(controller, asked, output, call, |now| settled(now, Phase::Running)).await
}
