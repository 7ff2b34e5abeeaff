//! Operations on one sandbox or several: `start`, `stop`, `rm`, `pause` and `resume` call the API for
//! each, then wait for the phase that they ask for.

use std::{collections::VecDeque, time::Duration};

use clap::Args;
use proto::sandbox::v1::{Phase, Sandbox};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Response, Status};

use super::targets::Many;
use crate::{
    client::{Controller, Sandboxes, patient, promised},
    exit,
    failure::Failure,
    output::{Output, json},
    progress::Spinner,
};

/// Concurrent calls at most.
const AT_ONCE: usize = 32;
/// Longest time for an operation; the nodes have shorter deadlines of their own.
const WAIT: Duration = Duration::from_secs(300);

/// Sandboxes to change, and whether to wait for their next phase.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl stop ID && sandboxctl start ID  the disk is kept, what ran is not
  sandboxctl ls -q --filter phase=stopped | xargs sandboxctl start
  sandboxctl stop --no-wait ID1 ID2          `wait ID --for stopped` waits later")]
pub(crate) struct Change {
    /// Sandboxes.
    #[command(flatten)]
    pub(super) sandboxes: Many,
    /// Do not wait for the end of what takes longer than a call
    #[arg(long)]
    pub(super) no_wait: bool,
}

/// Makes the call for each sandbox, then waits until `goal` is true of it.
pub(super) async fn change<C, F, G>(
    controller: Controller,
    Change { sandboxes, no_wait }: Change,
    output: Output,
    call: C,
    goal: G,
) -> Result<u8, Failure>
where
    C: Fn(Sandboxes, String) -> F + Copy + Send + Sync + 'static,
    F: Future<Output = Result<Response<Option<Sandbox>>, Status>> + Send,
    G: Fn(&Sandbox) -> Result<bool, Failure> + Copy + Send + 'static,
{
    each(sandboxes.ids, output, show, false, move |id| {
        let controller = controller.clone();
        async move {
            let deadline = Instant::now() + WAIT;
            let asked = patient(|| call(controller.sandboxes.clone(), id.clone())).await?;
            let sandbox = promised(asked)?;
            if no_wait || goal(&sandbox)? {
                return Ok(sandbox);
            }
            let _spinner = Spinner::new(output.json, format!("waiting for {}", sandbox.id));
            controller.follow(&sandbox.id, Some(deadline), goal).await
        }
    })
    .await
}

fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    if output.names {
        return output.line(&sandbox.id);
    }
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
/// is that of the first. Lines are printed in order, or `as_they_come`.
pub(super) async fn each<T, W, F>(
    items: Vec<T>,
    output: Output,
    show: fn(&Sandbox, Output) -> Result<(), Failure>,
    as_they_come: bool,
    work: W,
) -> Result<u8, Failure>
where
    T: Send + 'static,
    W: Fn(T) -> F,
    F: Future<Output = Result<Sandbox, Failure>> + Send + 'static,
{
    let alone = items.len() == 1;
    let at_once = as_they_come && !output.json && !alone;
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
            joined.map_err(|error| Failure::local(format!("a task failed: {error}")))?;
        match &result {
            Ok(sandbox) if at_once => show(sandbox, output)?,
            Err(failure) if at_once => failure.print(false),
            _ => {}
        }
        ended[place] = Some(result);
    }
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for result in ended.into_iter().flatten() {
        match result {
            Ok(sandbox) => done.push(sandbox),
            Err(failure) => failed.push(failure),
        }
    }
    if at_once {
        return Ok(failed.first().map_or(0, |failure: &Failure| failure.exit));
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
    fn waiting_ends_when_the_goal_cannot_be_reached() {
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
