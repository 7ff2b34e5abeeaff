//! The agent dies in the middle of an operation; the next one finishes it or rolls it back.

use super::*;
use crate::{pve::ErrorKind, saga::When};

/// Interval of the tested moments of death, ms; before the last the operation ends by itself.
const STEP_MS: u64 = 150;

#[tokio::test(start_paused = true)]
async fn creation_interrupted_by_an_agent_restart_is_undone() {
    let mut cut_short = 0;
    for at in 0..40 {
        let mut node = Node::new().await;
        node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(at * STEP_MS)).await;
        node.restart().await;
        node.reconcile().await;
        let record = node.record(1).await;
        if record.phase == Phase::Running {
            node.assert_sound().await;
        } else {
            assert_eq!(record.phase, Phase::Failed, "after {} ms", at * STEP_MS);
            cut_short += 1;
            let failure = record.failure.as_ref().expect("recorded");
            assert!(failure.message.contains("in the middle"), "{failure:?}");
            node.assert_clean().await;
        }
        // The node works as before.
        node.running(2).await;
    }
    assert!((15..40).contains(&cut_short), "{cut_short}");
}

#[tokio::test(start_paused = true)]
async fn creation_interrupted_by_a_power_cut_is_failed_or_stopped() {
    for at in 0..40 {
        let mut node = Node::new().await;
        node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(at * STEP_MS)).await;
        node.cluster.crash(&node.name);
        node.restart().await;
        node.reconcile().await;
        let phase = node.record(1).await.phase;
        assert!(matches!(phase, Phase::Failed | Phase::Stopped), "{phase:?}");
        node.assert_sound().await;
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        node.assert_clean().await;
        node.running(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn creation_is_undone_after_a_crash_around_any_step() {
    for step in 0..faults::steps().await {
        for when in [When::Before, When::After] {
            let reached = Arc::new(tokio::sync::Notify::new());
            let there = Arc::clone(&reached);
            let faults = Faults {
                hook: Some(Arc::new(move |number, _, moment| {
                    let there = Arc::clone(&there);
                    Box::pin(async move {
                        if (number, moment) == (step, when) {
                            there.notify_one();
                            std::future::pending::<()>().await;
                        }
                    })
                })),
                ..Faults::default()
            };
            let mut node = Node::with(|_| {}, faults).await;
            node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
            reached.notified().await;
            node.restart().await;
            node.reconcile().await;
            assert_eq!(node.record(1).await.phase, Phase::Failed, "{step} {when:?}");
            node.assert_clean().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn interrupted_delete_stop_and_start_are_finished() {
    for at in 0..20 {
        let pause = Duration::from_millis(at * STEP_MS);
        let mut node = Node::new().await;
        for number in 1..=3 {
            node.running(number).await;
        }
        node.sandboxes.stop(&id(3), LONG).await.expect("stopped");
        node.sandboxes.delete(&id(1), Duration::ZERO).await.expect("under way");
        node.sandboxes.stop(&id(2), Duration::ZERO).await.expect("under way");
        node.sandboxes.start(&id(3), Duration::ZERO).await.expect("under way");
        tokio::time::sleep(pause).await;
        node.restart().await;
        node.reconcile().await;
        node.assert_sound().await;
        let phases = [node.record(1).await, node.record(2).await, node.record(3).await]
            .map(|record| record.phase);
        if at > 0 {
            assert_eq!(phases, [Phase::Deleted, Phase::Stopped, Phase::Running], "{pause:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn lock_of_a_dead_clone_is_removed_from_the_template() {
    let mut node = Node::new().await;
    node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Agent and worker die together.
    node.cluster.crash(&node.name);
    let locked = |node: &Node| node.cluster.guests()[&vmid(TEMPLATE)].config.lock() == Some("disk");
    assert!(locked(&node), "the fake leaves what PVE leaves");
    node.restart().await;
    // A creation that comes before the reconciler also unlocks the template.
    assert_eq!(node.create(2).await.phase, Phase::Running);
    assert!(!locked(&node));
    node.reconcile().await;
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn lock_of_a_dead_clone_is_removed_after_a_new_attempt_or_a_deletion() {
    for deleted in [false, true] {
        let mut node = Node::new().await;
        node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.cluster.crash(&node.name);
        node.restart().await;
        // The creation is rolled back; the template is not checked yet.
        node.sandboxes.undo(&id(1), LONG).await.expect("undone");
        assert_eq!(node.cluster.guests()[&vmid(TEMPLATE)].config.lock(), Some("disk"));
        if deleted {
            node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        } else {
            // It fails and leaves no trace of the clone before it.
            node.fault(Op::Clone, Trouble::Before(ErrorKind::Failed("no".into())));
            let second = Order { attempt: 2, ..order(1) };
            node.sandboxes.create(second, LONG).await.expect("admitted");
        }
        node.reconcile().await;
        node.assert_sound().await;
        node.running(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn foreign_lock_on_the_template_stays() {
    let node = Node::with(|o| o.limits.create = Duration::from_secs(20), Faults::default()).await;
    node.cluster.edit(&node.name, vmid(TEMPLATE), |config| {
        config.set("lock", "disk").expect("fits");
    });
    assert_eq!(node.reconcile().await, []);
    let record = node.create(1).await;
    assert_eq!(record.phase, Phase::Failed);
    let failure = record.failure.as_ref().expect("recorded");
    assert_eq!(failure.reason, Reason::ContainerLocked);
    assert_eq!(node.reconcile().await, [], "nor is it ours after that");
    assert_eq!(node.cluster.guests()[&vmid(TEMPLATE)].config.lock(), Some("disk"));
}

/// Interval of the tested moments of death: a pause takes milliseconds, so they fall around every
/// write and every effect of it.
const PAUSE_STEP: Duration = Duration::from_micros(500);

#[tokio::test(start_paused = true)]
async fn interrupted_pause_or_resume_is_finished_or_undone() {
    for (resumes, power_cut) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut phases = std::collections::BTreeSet::new();
        for at in 0..25 {
            let mut node = Node::new().await;
            node.running(1).await;
            if resumes {
                node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
                node.sandboxes.resume(&id(1), Duration::ZERO).await.expect("under way");
            } else {
                node.sandboxes.pause(&id(1), false, Duration::ZERO).await.expect("under way");
            }
            tokio::time::sleep(PAUSE_STEP * at).await;
            if power_cut {
                node.cluster.crash(&node.name);
            }
            node.restart().await;
            node.reconcile().await;
            // Frozen and locked, or neither: that is I13.
            node.assert_sound().await;
            let record = node.record(1).await;
            phases.insert(format!("{:?}", record.phase));
            let guest = &node.cluster.guests()[&record.vmid];
            let paused = record.phase == Phase::Paused;
            assert_eq!(
                (guest.frozen, crate::pve::pause_lock::is_held(&guest.config)),
                (paused, paused)
            );
            // The node works as before.
            if record.phase == Phase::Paused {
                node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
            }
            node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
            node.reconcile().await;
            node.assert_clean().await;
        }
        let expected: &[&str] = match (resumes, power_cut) {
            (_, true) => &["Stopped"],
            (false, false) => &["Paused", "Running"],
            (true, false) => &["Paused", "Running"],
        };
        assert!(phases.iter().all(|phase| expected.contains(&phase.as_str())), "{phases:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn pause_killed_on_the_host_is_undone() {
    for op in [Op::PauseLock, Op::Freeze] {
        let mut node = Node::new().await;
        let record = node.running(1).await;
        node.fault(op, Trouble::Killed);
        drop(node.sandboxes.pause(&id(1), false, LONG).await);
        node.restart().await;
        node.reconcile().await;
        node.assert_sound().await;
        assert_eq!(node.record(1).await.phase, Phase::Running, "{op:?}");
        assert!(!node.cluster.guests()[&record.vmid].frozen);
    }
}

#[tokio::test(start_paused = true)]
async fn remnant_of_an_interrupted_removal_is_removed_without_a_record() {
    let node = Node::new().await;
    let rest = || crate::pve::ContainerConfig::parse(b"lock: destroyed\n");
    node.cluster.add_guest(&node.name, vmid(100_050), rest(), false);
    node.cluster.add_guest(&node.name, vmid(555), rest(), false);
    assert_eq!(
        node.reconcile().await,
        [Action::RemoveRemnant(vmid(100_050))],
        "when it is seen twice"
    );
    assert_eq!(node.containers(), [555], "somebody else's number is not looked at");
    node.assert_sound().await;
    // A config with volumes is no remnant.
    node.cluster.add_guest(&node.name, vmid(100_051), rest(), false);
    node.cluster.add_volume(&node.name, vmid(100_051));
    let error = node.sandboxes.remove_remnant(vmid(100_051)).await.expect_err("left alone");
    assert_eq!(error.reason, proto::Reason::NotOurs);
    assert_eq!(node.containers(), [555, 100_051]);
}
