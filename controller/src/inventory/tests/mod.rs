//! Tests of the inventory alone.

mod order;

use proto::{Cause, Progress, Reason, sandbox::v1::Failure};

use super::*;

fn id(n: u8) -> SandboxId {
    SandboxId::new(u64::from(n), &[n; 10])
}

fn node(name: &str) -> NodeName {
    name.parse().expect("name")
}

fn sandbox(n: u8, phase: Phase, revision: u64) -> Sandbox {
    let mut sandbox = Sandbox {
        id: id(n).to_string(),
        vmid: 100_000 + u32::from(n),
        node: "n1".into(),
        team: "red".into(),
        attempt: 1,
        revision,
        ..Sandbox::default()
    };
    sandbox.set_phase(phase);
    sandbox
}

fn apply(cache: &Cache, node: &NodeName, sandbox: Sandbox) -> Applied {
    cache.apply(node, sandbox, 1, |_, _| {})
}

fn stale(holder: &str, attempt: u32) -> Applied {
    Applied::StaleAttempt { node: node(holder), attempt }
}

fn phase(cache: &Cache, n: u8) -> Option<Phase> {
    cache.get(&SandboxRef::Id(id(n))).map(|entry| cache.view(&entry).phase())
}

/// Sends a whole inventory without any sandbox; returns the lost ones.
fn inventory(cache: &Cache, node: &NodeName) -> Vec<SandboxId> {
    cache.begin_inventory(node, true);
    cache.end_inventory(node).into_iter().map(|entry| entry.id).collect()
}

#[test]
fn older_report_changes_nothing() {
    let cache = Cache::default();
    cache.set_up(&node("n1"), true);
    assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Running, 5)), Applied::Changed);
    assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Creating, 4)), Applied::Known);
    assert_eq!(phase(&cache, 1), Some(Phase::Running));
}

#[test]
fn absent_sandbox_is_lost_only_after_a_whole_inventory() {
    let cache = Cache::default();
    let n1 = node("n1");
    cache.set_up(&n1, true);
    apply(&cache, &n1, sandbox(1, Phase::Running, 1));
    apply(&cache, &n1, sandbox(2, Phase::Running, 2));
    cache.begin_inventory(&n1, false);
    apply(&cache, &n1, sandbox(1, Phase::Running, 1));
    assert_eq!(phase(&cache, 2), Some(Phase::Running), "not whole yet");
    let lost: Vec<_> = cache.end_inventory(&n1).into_iter().map(|entry| entry.id).collect();
    assert_eq!(lost, [id(2)]);
    assert_eq!(phase(&cache, 2), Some(Phase::Unreachable));
    // The sandbox reappears.
    apply(&cache, &n1, sandbox(2, Phase::Running, 3));
    assert_eq!(phase(&cache, 2), Some(Phase::Running));
}

#[test]
fn sandboxes_of_a_down_node_stay_listed() {
    let cache = Cache::default();
    cache.set_up(&node("n1"), true);
    apply(&cache, &node("n1"), sandbox(1, Phase::Running, 1));
    cache.set_up(&node("n1"), false);
    assert_eq!(phase(&cache, 1), Some(Phase::Unreachable));
    assert_eq!(cache.page(&"red".parse().expect("team"), &Page::ALL).0.len(), 1);
}

#[test]
fn later_attempt_reported_during_a_creation_is_kept() {
    let cache = Cache::default();
    cache.begin(id(1), "red".parse().expect("team"), sandbox(1, Phase::Creating, 0));
    cache.placed(&id(1), Some(&node("n1")), 2, Progress::Placing);
    let elsewhere = Sandbox { attempt: 3, node: "n2".into(), ..sandbox(1, Phase::Running, 9) };
    assert_eq!(apply(&cache, &node("n2"), elsewhere.clone()), Applied::Ignored, "its task decides");
    let up = Sandbox { attempt: 2, ..sandbox(1, Phase::Running, 4) };
    let told = cache.settle(&id(1), up, 1, |_, _| {}).expect("what the task did not know");
    assert_eq!(*told, elsewhere);
    assert_eq!(apply(&cache, &node("n2"), elsewhere), stale("n1", 2));
    // The same with a later attempt that is deleted already.
    cache.begin(id(2), "red".parse().expect("team"), sandbox(2, Phase::Creating, 0));
    cache.placed(&id(2), Some(&node("n1")), 1, Progress::Placing);
    let deleted = Sandbox { attempt: 2, node: "n2".into(), ..sandbox(2, Phase::Deleted, 9) };
    assert_eq!(apply(&cache, &node("n2"), deleted.clone()), Applied::Ignored);
    let known = cache.get(&SandboxRef::Id(id(2))).and_then(|entry| entry.elsewhere);
    assert_eq!(known.as_deref(), Some(&deleted));
}

#[test]
fn moved_sandbox_survives_any_report_order() {
    let (n1, n2) = (node("n1"), node("n2"));
    let there = || Sandbox { node: "n2".into(), ..sandbox(1, Phase::Stopped, 1) };
    let left = || Sandbox {
        cause: Cause::Moved.into(),
        node: "n2".into(),
        ..sandbox(1, Phase::Deleted, 7)
    };
    let gone = || {
        let failure = Failure { reason: Reason::ContainerGone.into(), ..Failure::default() };
        Sandbox { failure: Some(failure), ..sandbox(1, Phase::Stopped, 6) }
    };
    let moved = || Applied::Moved { left: n1.clone(), to: n2.clone() };
    let known = || {
        let cache = Cache::default();
        cache.set_up(&n1, true);
        cache.set_up(&n2, true);
        apply(&cache, &n1, sandbox(1, Phase::Stopped, 5));
        cache
    };
    let on = |cache: &Cache| {
        assert_eq!(phase(cache, 1), Some(Phase::Stopped), "it never ends");
        cache.get(&SandboxRef::Id(id(1))).and_then(|entry| entry.node)
    };
    // Without an interruption.
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored, "not yet");
    assert_eq!(on(&cache), Some(n1.clone()));
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    assert_eq!(apply(&cache, &n1, left()), Applied::Ignored, "of the other node");
    // The new node reports after the old one has dropped its record.
    let cache = known();
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    assert_eq!(apply(&cache, &n2, there()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    // Nothing was known about it.
    let cache = Cache::default();
    cache.set_up(&n2, true);
    assert_eq!(apply(&cache, &n1, left()), Applied::Known);
    assert_eq!(apply(&cache, &n2, there()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    // The old node has not dropped its record yet.
    let cache = known();
    assert_eq!(apply(&cache, &n1, gone()), Applied::Changed);
    assert_eq!(apply(&cache, &n2, there()), moved());
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, gone()), moved());
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    // The new node reports first.
    let cache = Cache::default();
    cache.set_up(&n2, true);
    assert_eq!(apply(&cache, &n2, there()), Applied::Changed);
    assert_eq!(apply(&cache, &n1, sandbox(1, Phase::Stopped, 5)), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, gone()), moved());
    assert_eq!(on(&cache), Some(n2.clone()));
    // Exported further to a third node that has not imported it: no node drops its record for the
    // first.
    assert_eq!(apply(&cache, &n2, Sandbox { node: "n2".into(), ..gone() }), Applied::Changed);
    // Deleted during the move.
    let failure = Failure { reason: Reason::NotOurs.into(), ..Failure::default() };
    let deleting = || Sandbox { failure: Some(failure.clone()), ..sandbox(1, Phase::Deleting, 6) };
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, deleting()), moved());
    // The old node no longer has a record, and reports first, or last; or is forgotten.
    let cache = known();
    assert_eq!(inventory(&cache, &n1), [id(1)]);
    assert_eq!(apply(&cache, &n2, there()), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    assert_eq!(inventory(&cache, &n1), []);
    assert_eq!(on(&cache), Some(n2.clone()));
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    cache.end_on(&n1, 1, |_, _| panic!("nothing ends"));
    assert_eq!(on(&cache), Some(n2.clone()));
    // It moved on to a third node before the first reported.
    let n3 = node("n3");
    let cache = known();
    cache.set_up(&n3, true);
    let onwards = || Sandbox { node: "n3".into(), ..left() };
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    assert_eq!(apply(&cache, &n2, onwards()), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(on(&cache), Some(n3.clone()));
    // It was deleted on the new node before the first reported.
    let cache = known();
    assert_eq!(apply(&cache, &n2, there()), Applied::Ignored);
    let deleted = Sandbox { node: "n2".into(), ..sandbox(1, Phase::Deleted, 2) };
    assert_eq!(apply(&cache, &n2, deleted), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(phase(&cache, 1), Some(Phase::Deleted));
    // It was deleted on the new node, and the first does not know about the move.
    let cache = Cache::default();
    assert_eq!(apply(&cache, &n2, there()), Applied::Changed);
    let deleted = Sandbox { node: "n2".into(), ..sandbox(1, Phase::Deleted, 2) };
    assert_eq!(apply(&cache, &n2, deleted), Applied::Changed);
    assert_eq!(apply(&cache, &n1, gone()), stale("n1", 1));
    assert_eq!(phase(&cache, 1), Some(Phase::Deleted));
    // The same, and the first reports last.
    let cache = known();
    let deleted = Sandbox { node: "n2".into(), ..sandbox(1, Phase::Deleted, 2) };
    assert_eq!(apply(&cache, &n2, deleted), Applied::Ignored);
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    assert_eq!(phase(&cache, 1), Some(Phase::Deleted));
    // Only a failed earlier attempt is known.
    let cache = Cache::default();
    cache.set_up(&n2, true);
    let failed = Sandbox { node: "n3".into(), ..sandbox(1, Phase::Failed, 3) };
    assert_eq!(apply(&cache, &n3, failed), Applied::Changed);
    let second = |sandbox| Sandbox { attempt: 2, ..sandbox };
    assert_eq!(apply(&cache, &n1, second(left())), Applied::Ignored);
    assert_eq!(apply(&cache, &n2, second(there())), Applied::Changed);
    assert_eq!(on(&cache), Some(n2.clone()));
    // It moved between the answer to its creation and the creation's end.
    let cache = Cache::default();
    cache.set_up(&n2, true);
    let red: Team = "red".parse().expect("team");
    cache.begin(id(1), red, sandbox(1, Phase::Creating, 0));
    cache.placed(&id(1), Some(&n1), 1, Progress::Placing);
    assert_eq!(apply(&cache, &n1, left()), Applied::Changed);
    let up = Sandbox { node: "n1".into(), ..sandbox(1, Phase::Stopped, 5) };
    assert_eq!(cache.settle(&id(1), up, 1, |_, _| panic!("nothing happened")), None);
    assert_eq!(on(&cache), Some(n2.clone()));
}

#[test]
fn moved_back_sandbox_ignores_the_tombstone_of_its_first_move() {
    let (n1, n2) = (node("n1"), node("n2"));
    let cache = Cache::default();
    let moved = |to: &str, revision| Sandbox {
        cause: Cause::Moved.into(),
        node: to.into(),
        ..sandbox(1, Phase::Deleted, revision)
    };
    let back = sandbox(1, Phase::Stopped, 9);
    apply(&cache, &n1, sandbox(1, Phase::Stopped, 5));
    apply(&cache, &n2, Sandbox { node: "n2".into(), ..sandbox(1, Phase::Stopped, 1) });
    assert_eq!(apply(&cache, &n1, moved("n2", 7)), Applied::Changed);
    apply(&cache, &n1, back.clone());
    assert_eq!(apply(&cache, &n2, moved("n1", 3)), Applied::Changed);
    // The first node's watch lags behind the calls.
    assert_eq!(apply(&cache, &n1, moved("n2", 7)), Applied::Known);
    let entry = cache.get(&SandboxRef::Id(id(1))).expect("known");
    assert_eq!((entry.node, entry.sandbox), (Some(n1), back));
}

#[test]
fn record_that_a_sandbox_has_left_is_dropped_with_its_tombstone() {
    let (cache, n2) = (Cache::default(), node("n2"));
    apply(&cache, &n2, Sandbox { node: "n2".into(), ..sandbox(1, Phase::Stopped, 1) });
    apply(&cache, &node("n1"), sandbox(1, Phase::Stopped, 5));
    let left =
        Sandbox { cause: Cause::Moved.into(), node: "n2".into(), ..sandbox(1, Phase::Deleted, 7) };
    assert_eq!(apply(&cache, &node("n1"), left), Applied::Ignored);
    let entry = cache.get(&SandboxRef::Id(id(1))).expect("known");
    assert_eq!((entry.node, entry.elsewhere), (Some(n2), None));
}

#[test]
fn late_answer_does_not_revive_a_released_sandbox() {
    let (cache, n1) = (Cache::default(), node("n1"));
    let released = Sandbox { cause: Cause::Released.into(), ..sandbox(1, Phase::Deleted, 6) };
    assert_eq!(apply(&cache, &n1, released), Applied::Changed);
    assert_eq!(apply(&cache, &n1, sandbox(1, Phase::Running, 5)), Applied::Known);
    assert_eq!(phase(&cache, 1), Some(Phase::Deleted));
}

#[test]
fn creation_shows_creating_until_it_settles_and_hides_other_attempts() {
    let cache = Cache::default();
    cache.set_up(&node("n2"), true);
    let red: Team = "red".parse().expect("team");
    cache.begin(id(1), red.clone(), Sandbox { attempt: 1, ..sandbox(1, Phase::Creating, 0) });
    apply(&cache, &node("n1"), sandbox(1, Phase::Failed, 3));
    assert_eq!(phase(&cache, 1), Some(Phase::Creating));
    cache.placed(&id(1), Some(&node("n2")), 2, Progress::Placing);
    let second = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
    assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Failed, 4)), Applied::Ignored);
    assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Running, 4)), stale("n1", 1));
    assert_eq!(apply(&cache, &node("n2"), second.clone()), Applied::Changed);
    assert_eq!(phase(&cache, 1), Some(Phase::Creating));
    cache.settle(&id(1), second, 1, |_, _| {});
    assert_eq!(phase(&cache, 1), Some(Phase::Running));
    let living = |name| cache.with_team_counts(&red, |on| on(&node(name)).living);
    assert_eq!((living("n1"), living("n2")), (0, 1));
}

#[test]
fn creation_counts_as_queued_on_its_node_until_its_clone_begins() {
    let (cache, red): (_, Team) = (Cache::default(), "red".parse().expect("team"));
    let counts = || cache.with_team_counts(&red, |on| on(&node("n1")));
    let reported = |progress: Progress, revision| {
        let mut report = sandbox(1, Phase::Creating, revision);
        report.set_progress(progress);
        report
    };
    cache.begin(id(1), red.clone(), reported(Progress::Placing, 0));
    assert_eq!(counts(), TeamCount { living: 1, queued: 1 });
    apply(&cache, &node("n1"), reported(Progress::Queued, 1));
    assert_eq!(counts(), TeamCount { living: 1, queued: 1 });
    apply(&cache, &node("n1"), reported(Progress::Clone, 2));
    assert_eq!(counts(), TeamCount { living: 1, queued: 0 });
    // Without a node it waits on none.
    cache.placed(&id(1), None, 1, Progress::Queued);
    assert_eq!(counts(), TeamCount::default());
}

#[test]
fn creation_that_goes_back_to_its_node_keeps_a_later_attempt() {
    let cache = Cache::default();
    cache.begin(id(1), "red".parse().expect("team"), sandbox(1, Phase::Creating, 0));
    let later = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
    let entry = || cache.get(&SandboxRef::Id(id(1))).expect("known");
    apply(&cache, &node("n1"), sandbox(1, Phase::Creating, 1));
    apply(&cache, &node("n2"), later);
    let elsewhere = |entry: Entry| entry.elsewhere.map(|later| later.attempt);
    assert_eq!(elsewhere(entry()), Some(2));
    // Already there: what the node has reported stays.
    cache.placed_again(&id(1), &node("n1"), 1);
    assert_eq!((entry().sandbox.revision, elsewhere(entry())), (1, Some(2)));
    cache.placed_again(&id(1), &node("n3"), 1);
    assert_eq!((entry().node, elsewhere(entry())), (Some(node("n3")), Some(2)));
    cache.placed(&id(1), Some(&node("n1")), 3, Progress::Placing);
    assert_eq!(elsewhere(entry()), None);
}

#[test]
fn released_sandbox_can_come_back_elsewhere_and_a_deleted_one_cannot() {
    for (cause, lives) in [
        (Cause::Released, true),
        (Cause::NodeLost, true),
        (Cause::ASKED, false),
        (Cause::Ttl, false),
    ] {
        let cache = Cache::default();
        let ended = Sandbox { cause: cause.into(), ..sandbox(1, Phase::Deleted, 9) };
        cache.set_up(&node("n2"), true);
        apply(&cache, &node("n1"), ended.clone());
        let there = Sandbox { node: "n2".into(), ..sandbox(1, Phase::Running, 1) };
        let applied = apply(&cache, &node("n2"), there);
        assert_eq!(applied, if lives { Applied::Changed } else { Applied::Ignored }, "{cause:?}");
        let expected = if lives { Phase::Running } else { Phase::Deleted };
        assert_eq!(phase(&cache, 1), Some(expected));
        // The first node's tombstone contains nothing new.
        apply(&cache, &node("n1"), Sandbox { revision: 10, ..ended });
        assert_eq!(phase(&cache, 1), Some(expected));
    }
}

#[test]
fn failed_attempt_does_not_hide_the_running_one() {
    let tombstone = sandbox(1, Phase::Failed, 3);
    let up = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
    for tombstone_first in [true, false] {
        let cache = Cache::default();
        let mut words = [(node("n1"), tombstone.clone()), (node("n2"), up.clone())];
        if !tombstone_first {
            words.reverse();
        }
        for (from, word) in words {
            cache.set_up(&from, true);
            apply(&cache, &from, word);
        }
        assert_eq!(phase(&cache, 1), Some(Phase::Running), "{tombstone_first}");
    }
}

#[test]
fn sandboxes_of_a_forgotten_node_end_until_it_is_back() {
    let cache = Cache::default();
    let (n1, n2) = (node("n1"), node("n2"));
    cache.set_up(&n1, true);
    apply(&cache, &n1, sandbox(1, Phase::Running, 5));
    apply(&cache, &n1, sandbox(2, Phase::Deleted, 6));
    apply(&cache, &n2, Sandbox { node: "n2".into(), ..sandbox(3, Phase::Running, 5) });
    cache.set_up(&n1, false);
    cache.end_on(&n1, 7, |old, new| {
        assert_eq!((old.ended(), new.ended()), (false, true));
    });
    assert_eq!(
        (phase(&cache, 1), cache.count_on(&n1), cache.count_on(&n2)),
        (Some(Phase::Deleted), 0, 1)
    );
    cache.set_up(&n1, true);
    assert_eq!(apply(&cache, &n1, sandbox(1, Phase::Running, 5)), Applied::Changed);
    assert_eq!(phase(&cache, 1), Some(Phase::Running), "nothing was lost after all");
}

#[test]
fn reused_vmid_names_the_living_sandbox() {
    let cache = Cache::default();
    let n1 = node("n1");
    apply(&cache, &n1, Sandbox { vmid: 100_001, ..sandbox(1, Phase::Deleted, 1) });
    apply(&cache, &n1, Sandbox { vmid: 100_001, ..sandbox(2, Phase::Running, 2) });
    let by_vmid = SandboxRef::Vmid(100_001.try_into().expect("vmid"));
    assert_eq!(cache.get(&by_vmid).map(|entry| entry.id), Some(id(2)));
    assert_eq!(cache.count_on(&n1), 1);
}

#[tokio::test]
async fn watchers_see_each_change() {
    let cache = Cache::default();
    let mut changes = cache.watch(id(1));
    apply(&cache, &node("n1"), sandbox(1, Phase::Running, 1));
    changes.changed().await.expect("told");
    changes.mark_unchanged();
    cache.set_up(&node("n1"), true);
    changes.changed().await.expect("told of the node too");
    cache.dirty().await;
    assert_eq!(cache.take_dirty(10, Vec::new).0.len(), 1);
    assert_eq!(cache.take_dirty(10, Vec::new).0.len(), 0);
}

#[test]
fn earlier_of_two_living_attempts_is_cancelled_in_either_order() {
    let up = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
    let before = sandbox(1, Phase::Running, 3);
    let (n1, n2) = (node("n1"), node("n2"));
    let cache = Cache::default();
    assert_eq!(apply(&cache, &n1, before.clone()), Applied::Changed);
    assert_eq!(apply(&cache, &n2, up.clone()), stale("n1", 1));
    let cache = Cache::default();
    assert_eq!(apply(&cache, &n2, up), Applied::Changed);
    assert_eq!(apply(&cache, &n1, before), stale("n1", 1));
}
