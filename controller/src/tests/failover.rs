//! Another controller starts: over the same store while the former one still runs, over an old copy
//! of it, or over an empty one.

use proto::{Reason, sandbox::v1::*};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;
use crate::store::State;

/// Boot time that is long enough to observe a creation under way.
const BOOT: Duration = Duration::from_secs(5);

async fn slow(memory: &Arc<Memory>) -> Lab {
    let lab = Lab::over(memory.clone()).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = BOOT);
    }
    lab
}

/// Begins a creation and lets it run; returns its answer.
async fn begin(lab: &Lab) -> tokio::task::JoinHandle<Result<Sandbox, Status>> {
    let mut api = lab.api();
    let creation = tokio::spawn(async move { create(&mut api, request("r1")).await });
    tokio::time::sleep(BOOT / 2).await;
    creation
}

/// Starts a controller over another store: a copy, or an empty one.
async fn restored(lab: &mut Lab, store: Memory) {
    lab.store = Arc::new(store);
    lab.red = token(&lab.store, "red", "sandbox operator").await;
    lab.start().await;
}

/// Makes a creation that the first node fails and another node completes; also returns a copy of
/// the store from the middle of the first attempt.
async fn made_elsewhere() -> (Lab, Memory, Sandbox) {
    let memory = Arc::new(Memory::new());
    let lab = slow(&memory).await;
    lab.agents[0].faults(|faults| faults.fail = Some(Reason::PctFailed));
    for agent in &lab.agents[1..] {
        agent.load(|load| load.memory_available = 20 << 30);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let answer = begin(&lab).await;
    let copy = memory.copy();
    let made = answer.await.expect("answered").expect("made elsewhere");
    assert_eq!((made.attempt, lab.living().len()), (2, 1));
    (lab, copy, made)
}

async fn kinds(lab: &Lab, id: &str) -> Vec<EventKind> {
    let filter =
        crate::store::Filter { sandbox: Some(id.parse().expect("id")), ..Default::default() };
    let page = lab.store.events(0, filter, 100).await.expect("a page");
    page.events.into_iter().map(|(_, event)| event.kind).collect()
}

#[tokio::test(start_paused = true)]
async fn replaced_controller_leaves_a_creation_to_the_next() {
    let memory = Arc::new(Memory::new());
    let mut lab = slow(&memory).await;
    let answer = begin(&lab).await;
    let (before, mut api) = (lab.controller.take(), lab.api());
    lab.store = Arc::new(memory.beside());
    lab.start().await;
    let made = lab.create("r1").await.expect("made");
    assert_eq!(reason(answer.await.expect("answered")), Reason::StaleEpoch);
    assert_eq!(reason(create(&mut api, request("r2")).await), Reason::StaleEpoch);
    assert_eq!(lab.living().len(), 1);
    let rows = lab.store.all().await.expect("rows");
    let rows: Vec<_> = rows.iter().map(|row| (row.id.to_string(), row.state)).collect();
    assert_eq!(rows, [(made.id, State::Done)]);
    drop(before);
}

#[tokio::test(start_paused = true)]
async fn replaced_controller_says_to_health_checks_that_it_does_not_serve() {
    let memory = Arc::new(Memory::new());
    let mut lab = Lab::over(memory.clone()).await;
    let id = lab.create("r1").await.expect("made").id;
    let (before, old, mut api) = (lab.controller.take(), lab.channel(), lab.api());
    let status = async |channel: &Channel, service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(channel.clone()).check(request).await;
        answer.expect("an answer").into_inner().status()
    };
    let services = ["", "sandbox.v1.SandboxService", "sandbox.v1.OperatorService"];
    for service in services {
        assert_eq!(status(&old, service).await, ServingStatus::Serving, "{service}");
    }
    lab.store = Arc::new(memory.beside());
    lab.start().await;
    let stop = StopSandboxRequest { id, grace: None };
    assert_eq!(reason(api.stop_sandbox(stop).await), Reason::StaleEpoch);
    for service in services {
        let told = async {
            while status(&old, service).await != ServingStatus::NotServing {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), told).await.expect("it is told");
        assert_eq!(status(&lab.channel(), service).await, ServingStatus::Serving, "{service}");
    }
    drop(before);
}

#[tokio::test(start_paused = true)]
async fn deleted_sandbox_is_not_made_again_over_an_old_store() {
    let memory = Arc::new(Memory::new());
    let mut lab = slow(&memory).await;
    let answer = begin(&lab).await;
    let copy = memory.copy();
    let made = answer.await.expect("answered").expect("made");
    lab.api().delete_sandbox(DeleteSandboxRequest { id: made.id.clone() }).await.expect("deleted");
    restored(&mut lab, copy).await;
    lab.until(&made.id, Phase::Deleted).await;
    assert_eq!(lab.create("r1").await.expect("the same").id, made.id);
    assert_eq!(lab.living(), []);
}

#[tokio::test(start_paused = true)]
async fn old_store_continues_with_the_attempt_that_came_up() {
    let (mut lab, copy, made) = made_elsewhere().await;
    restored(&mut lab, copy).await;
    let same = lab.until(&made.id, Phase::Running).await;
    assert_eq!((same.node, same.attempt), (made.node, 2));
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn cancelled_attempt_does_not_end_a_creation_while_a_node_is_away() {
    let (mut lab, copy, made) = made_elsewhere().await;
    let holder = lab.holder(&made.id).clone();
    // The sandbox had come up, and was cancelled in favour of the second attempt.
    let first = lab.agents[0].name().to_string();
    let mut off = Sandbox { attempt: 1, node: first, ..made.clone() };
    off.set_phase(Phase::Deleted);
    lab.agents[0].put(off);
    holder.down();
    // Within the time for which a new controller waits for its nodes.
    let back = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        holder.up();
    });
    restored(&mut lab, copy).await;
    back.await.expect("it came back");
    let same = lab.until(&made.id, Phase::Running).await;
    assert_eq!((same.node, same.attempt), (made.node, 2));
    assert!(!kinds(&lab, &made.id).await.contains(&EventKind::Deleted));
}

#[tokio::test(start_paused = true)]
async fn deleted_attempt_unknown_to_an_old_store_is_not_made_again() {
    let (mut lab, copy, made) = made_elsewhere().await;
    lab.api().delete_sandbox(DeleteSandboxRequest { id: made.id.clone() }).await.expect("deleted");
    // The copy knows the first attempt, whose node reports that it failed.
    restored(&mut lab, copy).await;
    lab.until(&made.id, Phase::Deleted).await;
    assert_eq!(lab.create("r1").await.expect("the same").id, made.id);
    assert_eq!(lab.living(), []);
}

#[tokio::test(start_paused = true)]
async fn later_attempt_on_a_node_beats_an_old_store() {
    let memory = Arc::new(Memory::new());
    let mut lab = slow(&memory).await;
    let answer = begin(&lab).await;
    let copy = memory.copy();
    let made = answer.await.expect("answered").expect("made");
    // The sandbox went to another node and came back.
    lab.holder(&made.id).put(Sandbox { attempt: 3, ..made.clone() });
    restored(&mut lab, copy).await;
    let same = lab.until(&made.id, Phase::Running).await;
    assert_eq!((same.node, same.attempt), (made.node, 3));
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn empty_store_finds_the_running_attempt_and_cancels_the_abandoned_one() {
    let mut lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let holder = lab.holder(&made.id).clone();
    let mut others = lab.agents.iter().filter(|agent| agent.name() != holder.name());
    let (stale, tombstone) = (others.next().expect("a node"), others.next().expect("a node"));
    // Three attempts, the last of which came up; the store with a node's pending cancel is lost.
    let at = |agent: &FakeAgent, attempt| Sandbox {
        attempt,
        node: agent.name().to_string(),
        ..made.clone()
    };
    let mut failed = at(tombstone, 1);
    failed.set_phase(Phase::Failed);
    tombstone.put(failed);
    stale.put(at(stale, 2));
    holder.put(at(&holder, 3));
    restored(&mut lab, Memory::new()).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let living = lab.living();
    let living: Vec<_> = living.iter().map(|s| (s.node.as_str(), s.attempt)).collect();
    assert_eq!(living, [(holder.name().as_str(), 3)]);
    assert_eq!(lab.get(&made.id).await.expect("known").phase(), Phase::Running);
    assert!(kinds(&lab, &made.id).await.contains(&EventKind::Found));
}

#[tokio::test(start_paused = true)]
async fn raised_epoch_reaches_every_node() {
    let mut lab = Lab::new().await;
    lab.agents[2].set_epoch(1000);
    restored(&mut lab, Memory::new()).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let epochs: Vec<_> = lab.agents.iter().map(|agent| agent.epoch()).collect();
    assert_eq!(epochs, [1001; 3]);
}
