//! `start`: boots stopped sandboxes.

use proto::sandbox::v1::{Phase, StartSandboxRequest};

use super::lifecycle::{Change, change, settled};
use crate::{
    client::{Controller, Sandboxes},
    failure::Failure,
    output::Output,
};

pub(super) async fn run(
    controller: Controller,
    asked: Change,
    output: Output,
) -> Result<u8, Failure> {
    let call = |mut client: Sandboxes, id| async move {
        Ok(client.start_sandbox(StartSandboxRequest { id }).await?.map(|told| told.sandbox))
    };
    change(controller, asked, output, call, |now| settled(now, Phase::Running)).await
}
