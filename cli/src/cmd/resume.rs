//! `resume`: lets paused sandboxes go on.

use clap::Args;
use proto::sandbox::v1::{Phase, ResumeSandboxRequest};

use super::lifecycle::{Many, change, settled};
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
    /// Sandboxes: each an id or a part of it from either end, a vmid, @current or @last
    #[arg(required = true, value_name = "ID")]
    pub(super) ids: Vec<String>,
}

pub(super) async fn run(
    controller: Controller,
    Resume { ids }: Resume,
    output: Output,
) -> Result<u8, Failure> {
    let call = |mut client: Sandboxes, id| async move {
        let request = ResumeSandboxRequest { id };
        Ok(client.resume_sandbox(request).await?.map(|told| told.sandbox))
    };
    let many = Many { ids, no_wait: false };
    change(controller, many, output, call, |now| settled(now, Phase::Running)).await
}
