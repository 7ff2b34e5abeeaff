//! `start`: boots stopped sandboxes.

use proto::sandbox::v1::{Phase, StartSandboxRequest};

use super::lifecycle::{Many, change, settled};
use crate::{
    client::{Controller, Sandboxes},
    failure::Failure,
    output::Output,
};

pub(super) async fn run(controller: Controller, many: Many, output: Output) -> Result<u8, Failure> {
    let call = |mut client: Sandboxes, id| async move {
        Ok(client.start_sandbox(StartSandboxRequest { id }).await?.map(|told| told.sandbox))
    };
    change(controller, many, output, call, |now| settled(now, Phase::Running)).await
}
