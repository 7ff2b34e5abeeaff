//! Disk space of command outputs on the node. Each shim keeps the budget of its sandbox; this
//! module keeps the budget of all of them together, and tells the controller what each sandbox uses
//! and runs. Beyond that, outputs are dropped: those of the
//! command that ended first on the node before all others; and if the outputs of running commands
//! alone are too much, each sandbox gets an equal share.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use proto::{
    id::SandboxId,
    shim::v1::{self as wire, request, response},
};
use tokio::{
    net::UnixStream,
    time::{Instant, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    Execs,
    shims::{Shims, owner},
};
use crate::shim::client;

/// Interval of checks. In between the node's budget can be exceeded, each sandbox's own cannot.
const PERIOD: Duration = Duration::from_secs(5);
/// Time limit for a shim's answer; one that does not answer is asked again the next time.
const ANSWER: Duration = Duration::from_secs(1);
/// Most shims that are asked in parallel.
const PARALLEL: usize = 8;
/// Number of checks in a row in which a shim may not answer before its commands count as ended.
const MISSES_MAX: u32 = 3;

/// Bytes that outputs may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Budget of all sandboxes of the node.
    pub node: u64,
    /// Budget of one sandbox.
    pub sandbox: u64,
}

/// Commands of one sandbox, as its shim tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commands {
    /// Output that is kept in files, bytes.
    pub kept_bytes: u64,
    /// Names of the running commands whose callers chose them.
    pub running: Vec<String>,
}

/// Commands of all sandboxes of which one runs or output is kept.
pub type AllCommands = Arc<BTreeMap<SandboxId, Commands>>;

/// Last answers of the shims, by their sockets, with the number of checks since.
type Answers = BTreeMap<PathBuf, (wire::OutputsHeld, u32)>;

/// Keeps the node's budget until `stop` is cancelled.
pub async fn keep(shims: Arc<dyn Shims>, execs: Execs, budget: Budget, stop: CancellationToken) {
    let mut ticks = interval(PERIOD);
    let (mut limit, mut answers) = (budget.sandbox, Answers::new());
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        limit = look(&*shims, budget, limit, &mut answers).await;
        execs.tell(Arc::new(commands(&answers)));
    }
}

/// Checks once: asks all shims, and drops outputs beyond the budget. `limit` is what the outputs of
/// one sandbox may use now; returns the new limit.
pub(super) async fn look(
    shims: &dyn Shims,
    budget: Budget,
    limit: u64,
    answers: &mut Answers,
) -> u64 {
    let sockets = shims.sockets();
    let there: BTreeSet<_> = sockets.iter().collect();
    answers.retain(|socket, _| there.contains(socket));
    let ask = |socket: PathBuf| async move {
        let held = say(&socket, limit, 0).await;
        (socket, held)
    };
    let asked: Vec<_> = stream::iter(sockets).map(ask).buffer_unordered(PARALLEL).collect().await;
    let (mut sockets, mut held) = (Vec::new(), Vec::new());
    for (socket, answer) in asked {
        match answer {
            Some(answer) => {
                answers.insert(socket.clone(), (answer.clone(), 0));
                sockets.push(socket);
                held.push(answer);
            }
            None => missed(answers, &socket),
        }
    }
    let (next, free) = decide(&held, budget, limit);
    let changes = sockets.iter().zip(free).filter(|(_, free)| *free > 0 || next < limit);
    stream::iter(changes)
        .for_each_concurrent(PARALLEL, |(socket, free)| async move {
            drop(say(socket, next, free).await);
        })
        .await;
    next
}

/// Records that a shim has not answered. It may be stalled, or have ended.
fn missed(answers: &mut Answers, socket: &Path) {
    if let Some((_, misses)) = answers.get_mut(socket) {
        *misses += 1;
        if *misses >= MISSES_MAX {
            answers.remove(socket);
        }
    }
}

/// Sums the answers by sandbox. For a moment there are two shims of one that has booted. Pure.
fn commands(answers: &Answers) -> BTreeMap<SandboxId, Commands> {
    let mut all = BTreeMap::<SandboxId, Commands>::new();
    for (socket, (held, _)) in answers {
        let some = held.bytes > 0 || !held.running.is_empty();
        if let Some(id) = owner(socket).filter(|_| some) {
            let of_it = all.entry(id).or_default();
            of_it.kept_bytes += held.bytes;
            of_it.running.extend(held.running.iter().cloned());
        }
    }
    all
}

/// Computes the new limit of a sandbox, and the bytes of ended commands to drop by shim. Pure.
fn decide(held: &[wire::OutputsHeld], budget: Budget, limit: u64) -> (u64, Vec<u64>) {
    let mut free = vec![0; held.len()];
    let total: u64 = held.iter().map(|held| held.bytes).sum();
    if total <= budget.node {
        // Rises only with room to spare, so that the limit does not go up and down.
        let roomy = total <= budget.node / 4 * 3;
        return (if roomy { budget.sandbox } else { limit }, free);
    }
    let mut over = total - budget.node;
    let ended = held.iter().enumerate();
    let mut ended: Vec<(u64, usize, u64)> = ended
        .flat_map(|(shim, held)| held.ended.iter().map(move |one| (one.age_ms, shim, one.bytes)))
        .collect();
    ended.sort_unstable_by(|a, b| b.cmp(a));
    for (_, shim, bytes) in ended {
        if over == 0 {
            return (limit, free);
        }
        free[shim] += bytes;
        over = over.saturating_sub(bytes);
    }
    if over == 0 {
        return (limit, free);
    }
    let share = budget.node / u64::try_from(held.len()).unwrap_or(u64::MAX).max(1);
    (share.clamp(1, budget.sandbox), free)
}

async fn say(socket: &Path, limit_bytes: u64, free_bytes: u64) -> Option<wire::OutputsHeld> {
    let message = request::Message::Outputs(wire::Outputs { limit_bytes, free_bytes });
    let deadline = Instant::now() + ANSWER;
    let asked = async {
        client::control(UnixStream::connect(socket).await.ok()?, message, deadline).await.ok()
    };
    match timeout_at(deadline, asked).await {
        Ok(Some(response::Message::Outputs(held))) => Some(held),
        // The shim is about to end, is older than this message, or is stalled.
        Ok(Some(_) | None) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { node: 1000, sandbox: 400 };

    fn held(bytes: u64, ended: &[(u64, u64)]) -> wire::OutputsHeld {
        let ended = ended.iter().map(|&(age_ms, bytes)| wire::EndedOutput { age_ms, bytes });
        wire::OutputsHeld { bytes, ended: ended.collect(), running: Vec::new() }
    }

    #[test]
    fn commands_are_told_by_sandbox_until_their_shim_is_silent_for_long() {
        let (one, other) = (SandboxId::new(1, &[1; 10]), SandboxId::new(1, &[2; 10]));
        let socket =
            |id: SandboxId, boot: u32| PathBuf::from(format!("/run/shim/{id}.{boot}.sock"));
        let runs = wire::OutputsHeld { running: vec!["a".into()], ..held(5, &[]) };
        let mut answers = Answers::from([
            (socket(one, 1), (held(7, &[]), 0)),
            (socket(one, 2), (runs, 0)),
            (socket(other, 1), (held(0, &[]), 0)),
            ("/run/shim/else".into(), (held(9, &[]), 0)),
        ]);
        let expected = Commands { kept_bytes: 12, running: vec!["a".into()] };
        assert_eq!(commands(&answers), BTreeMap::from([(one, expected.clone())]));
        for _ in 1..MISSES_MAX {
            missed(&mut answers, &socket(one, 2));
        }
        assert_eq!(commands(&answers), BTreeMap::from([(one, expected)]));
        missed(&mut answers, &socket(one, 2));
        missed(&mut answers, &socket(one, 3));
        let rest = Commands { kept_bytes: 7, running: Vec::new() };
        assert_eq!(commands(&answers), BTreeMap::from([(one, rest)]));
    }

    #[test]
    fn outputs_within_the_budget_are_kept() {
        let fits = [held(400, &[(9, 400)]), held(400, &[])];
        assert_eq!(decide(&fits, BUDGET, 400), (400, vec![0, 0]));
        assert_eq!(decide(&[], BUDGET, 400), (400, vec![]));
    }

    #[test]
    fn oldest_output_on_the_node_is_dropped_first() {
        let all = [
            held(400, &[(5, 100), (50, 100), (500, 100)]),
            held(400, &[(40, 200)]),
            held(400, &[(700, 30), (3, 370)]),
        ];
        // 200 too much: those of ages 700, 500 and 50 are 230.
        assert_eq!(decide(&all, BUDGET, 400), (400, vec![200, 0, 30]));
    }

    #[test]
    fn running_outputs_over_the_budget_get_equal_shares() {
        let all = [held(700, &[(5, 100)]), held(500, &[])];
        assert_eq!(decide(&all, Budget { node: 600, ..BUDGET }, 400), (300, vec![100, 0]));
        // Nearly full: the limit stays. With room again each may use what the configuration says.
        let tight = [held(300, &[]), held(280, &[])];
        assert_eq!(decide(&tight, Budget { node: 600, ..BUDGET }, 300).0, 300);
        let roomy = [held(100, &[]), held(280, &[])];
        assert_eq!(decide(&roomy, Budget { node: 600, ..BUDGET }, 300).0, 400);
    }
}
