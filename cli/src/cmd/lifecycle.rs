//! `start`, `stop`, `rm`: call the API for each sandbox, then wait for the requested phase.

use std::{collections::VecDeque, time::Duration};

use proto::sandbox::v1::{
    DeleteSandboxRequest, Phase, Sandbox, StartSandboxRequest, StopSandboxRequest,
};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    args::Many,
    client::{Controller, patient, promised},
    exit,
    failure::Failure,
    output::{Output, json},
    progress::Spinner,
};

/// Concurrent calls at most.
const AT_ONCE: usize = 32;
/// Longest time for an operation; the nodes have shorter deadlines of their own.
const WAIT: Duration = Duration::from_secs(300);

pub(super) async fn start(
    controller: Controller,
    many: Many,
    output: Output,
) -> Result<u8, Failure> {
    run(controller, many, output, Phase::Running).await
}

pub(super) async fn stop(
    controller: Controller,
    many: Many,
    output: Output,
) -> Result<u8, Failure> {
    run(controller, many, output, Phase::Stopped).await
}

pub(super) async fn rm(controller: Controller, many: Many, output: Output) -> Result<u8, Failure> {
    run(controller, many, output, Phase::Deleted).await
}

async fn run(
    controller: Controller,
    many: Many,
    output: Output,
    goal: Phase,
) -> Result<u8, Failure> {
    let no_wait = many.no_wait;
    each(many.ids, output, show, move |id| {
        let controller = controller.clone();
        async move {
            let deadline = Instant::now() + WAIT;
            let sandbox = ask(&controller, id, goal).await?;
            if no_wait || settled(&sandbox, goal)? {
                return Ok(sandbox);
            }
            let _spinner = Spinner::new(output.json, format!("waiting for {}", sandbox.id));
            let follow = controller.follow(&sandbox.id, Some(deadline), |now| settled(now, goal));
            follow.await
        }
    })
    .await
}

async fn ask(controller: &Controller, id: String, goal: Phase) -> Result<Sandbox, Failure> {
    let client = || (controller.sandboxes.clone(), id.clone());
    let sandbox = if goal == Phase::Running {
        let call = || {
            let (mut client, id) = client();
            async move { client.start_sandbox(StartSandboxRequest { id }).await }
        };
        patient(call).await?.sandbox
    } else if goal == Phase::Stopped {
        let call = || {
            let (mut client, id) = client();
            async move { client.stop_sandbox(StopSandboxRequest { id }).await }
        };
        patient(call).await?.sandbox
    } else {
        let call = || {
            let (mut client, id) = client();
            async move { client.delete_sandbox(DeleteSandboxRequest { id }).await }
        };
        patient(call).await?.sandbox
    };
    promised(sandbox)
}

fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    output.line(format!("{} {}", sandbox.id, json::phase(sandbox.phase())))
}

/// True when the sandbox is in the goal phase; an error when it will never be.
pub(super) fn settled(sandbox: &Sandbox, goal: Phase) -> Result<bool, Failure> {
    let phase = sandbox.phase();
    if phase == goal {
        return Ok(true);
    }
    let recorded = || sandbox.failure.as_ref().map(Failure::recorded);
    match phase {
        Phase::Failed => Err(recorded().unwrap_or_else(|| Failure::local("the creation failed"))),
        Phase::Deleted => {
            Err(Failure::local(format!("{} was deleted", sandbox.id)).exit(exit::NOT_FOUND))
        }
        // The sandbox is stable in another phase: final if a failure explains it.
        Phase::Running | Phase::Paused | Phase::Stopped => recorded().map_or(Ok(false), Err),
        Phase::Unspecified
        | Phase::Creating
        | Phase::Starting
        | Phase::Stopping
        | Phase::Deleting
        | Phase::Unreachable => Ok(false),
    }
}

/// Does `work` for each item, a bounded number at once, and prints the results in order: one object
/// for one item, a list for more. A failure is printed and does not stop the others; the exit code
/// is that of the first.
pub(super) async fn each<T, W, F>(
    items: Vec<T>,
    output: Output,
    show: fn(&Sandbox, Output) -> Result<(), Failure>,
    work: W,
) -> Result<u8, Failure>
where
    T: Send + 'static,
    W: Fn(T) -> F,
    F: Future<Output = Result<Sandbox, Failure>> + Send + 'static,
{
    let alone = items.len() == 1;
    let mut waiting: VecDeque<_> = items.into_iter().enumerate().collect();
    let mut ended: Vec<_> = (0..waiting.len()).map(|_| None).collect();
    let mut running = JoinSet::new();
    loop {
        while running.len() < AT_ONCE
            && let Some((place, item)) = waiting.pop_front()
        {
            let work = work(item);
            running.spawn(async move { (place, work.await) });
        }
        let Some(joined) = running.join_next().await else { break };
        let (place, result) =
            joined.map_err(|error| Failure::local(format!("a task broke: {error}")))?;
        ended[place] = Some(result);
    }
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for result in ended.into_iter().flatten() {
        match result {
            Ok(sandbox) => done.push(sandbox),
            Err(failure) => failed.push(failure),
        }
    }
    match (output.json, done.as_slice()) {
        (true, []) if alone => {}
        (true, [sandbox]) if alone => output.value(&json::sandbox(sandbox))?,
        (true, several) => output.value(&several.iter().map(json::sandbox).collect::<Vec<_>>())?,
        (false, several) => several.iter().try_for_each(|sandbox| show(sandbox, output))?,
    }
    if alone && let Some(failure) = failed.pop() {
        return Err(failure);
    }
    failed.iter().for_each(|failure| failure.print(output.json));
    Ok(failed.first().map_or(0, |failure| failure.exit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(phase: Phase, failed: bool) -> Sandbox {
        let failure = failed.then(|| proto::sandbox::v1::Failure {
            reason: proto::Reason::PctFailed.into(),
            message: "it broke".into(),
            rollback: String::new(),
        });
        Sandbox { phase: phase.into(), failure, ..Sandbox::default() }
    }

    #[test]
    fn waiting_ends_where_nothing_more_can_come() {
        let check = |phase, failed, goal| settled(&sandbox(phase, failed), goal).ok();
        assert_eq!(check(Phase::Creating, false, Phase::Running), Some(false));
        assert_eq!(check(Phase::Running, false, Phase::Running), Some(true));
        assert_eq!(check(Phase::Running, true, Phase::Running), Some(true), "an old failure");
        assert_eq!(check(Phase::Failed, true, Phase::Running), None);
        assert_eq!(check(Phase::Deleted, false, Phase::Running), None);
        assert_eq!(check(Phase::Stopped, true, Phase::Running), None, "the start failed");
        assert_eq!(check(Phase::Running, true, Phase::Stopped), None, "the stop failed");
        assert_eq!(check(Phase::Unreachable, false, Phase::Deleted), Some(false));
        assert_eq!(check(Phase::Deleted, false, Phase::Deleted), Some(true));
    }
}
