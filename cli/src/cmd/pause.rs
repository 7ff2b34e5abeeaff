//! `pause` and `resume`.

use std::time::Duration;

use proto::sandbox::v1::{PauseSandboxRequest, Phase, ResumeSandboxRequest, Sandbox};
use tokio::time::Instant;

use super::lifecycle;
use crate::{
    args::{Pause, Resume},
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

/// How long it may take in all. What does not freeze is given up by its node much sooner.
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
            let request = PauseSandboxRequest { id, or_stop };
            let mut client = controller.sandboxes.clone();
            let sandbox = promised(answer(client.pause_sandbox(request)).await?.sandbox)?;
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
            let mut client = controller.sandboxes.clone();
            let asked = answer(client.resume_sandbox(ResumeSandboxRequest { id })).await?;
            let sandbox = promised(asked.sandbox)?;
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
