//! `pause` and `resume`: freeze and thaw sandboxes.

use std::time::Duration;

use proto::sandbox::v1::{PauseSandboxRequest, Phase, ResumeSandboxRequest, Sandbox};
use tokio::time::Instant;

use super::lifecycle;
use crate::{
    args::{Pause, Resume},
    client::{Controller, patient, promised},
    failure::Failure,
    output::{Output, json},
};

/// Longest time for the operation. Its node gives up a freeze much sooner.
const WAIT: Duration = Duration::from_secs(120);

pub(super) async fn pause(
    controller: Controller,
    pause: Pause,
    output: Output,
) -> Result<u8, Failure> {
    let or_stop = pause.or_stop;
    lifecycle::each(pause.ids, output, show, move |id| {
        let controller = controller.clone();
        async move {
            let call = || {
                let request = PauseSandboxRequest { id: id.clone(), or_stop };
                let mut client = controller.sandboxes.clone();
                async move { client.pause_sandbox(request).await }
            };
            let sandbox = promised(patient(call).await?.sandbox)?;
            let goal = |now: &Sandbox| {
                let stopped = or_stop && now.phase() == Phase::Stopped;
                if stopped { Ok(true) } else { lifecycle::settled(now, Phase::Paused) }
            };
            if goal(&sandbox)? {
                return Ok(sandbox);
            }
            controller.follow(&sandbox.id, Some(Instant::now() + WAIT), goal).await
        }
    })
    .await
}

pub(super) async fn resume(
    controller: Controller,
    resume: Resume,
    output: Output,
) -> Result<u8, Failure> {
    lifecycle::each(resume.ids, output, show, move |id| {
        let controller = controller.clone();
        async move {
            let call = || {
                let request = ResumeSandboxRequest { id: id.clone() };
                let mut client = controller.sandboxes.clone();
                async move { client.resume_sandbox(request).await }
            };
            let sandbox = promised(patient(call).await?.sandbox)?;
            let goal = |now: &Sandbox| lifecycle::settled(now, Phase::Running);
            if goal(&sandbox)? {
                return Ok(sandbox);
            }
            controller.follow(&sandbox.id, Some(Instant::now() + WAIT), goal).await
        }
    })
    .await
}

fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    output.line(format!("{} {}", sandbox.id, json::phase(sandbox.phase())))
}
