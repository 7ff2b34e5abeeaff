//! Steps of a creation and their undos under every fault: afterwards the world is as before.

use proto::Invariant;

use super::*;
use crate::{pve::ErrorKind, saga::When};

/// Number of steps of a creation.
pub(super) async fn steps() -> usize {
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    let faults = Faults {
        hook: Some(Arc::new(move |number, _, _| {
            counted.fetch_max(number as u64 + 1, Ordering::Relaxed);
            Box::pin(std::future::ready(()))
        })),
        ..Faults::default()
    };
    Node::with(|_| {}, faults).await.running(1).await;
    usize::try_from(count.load(Ordering::Relaxed)).expect("few")
}

#[tokio::test(start_paused = true)]
async fn creation_that_fails_at_any_step_leaves_nothing() {
    let steps = steps().await;
    assert!(steps >= 5, "clone, configure, resize, start, probe");
    for step in 0..steps {
        for when in [When::Before, When::After] {
            for twice in [false, true] {
                let faults = Faults { fail: Some((step, when)), twice, ..Faults::default() };
                let node = Node::with(|_| {}, faults).await;
                let record = node.create(1).await;
                assert_eq!(record.phase, Phase::Failed, "step {step} {when:?}");
                let failure = record.failure.as_ref().expect("recorded");
                assert!(failure.message.contains("made to fail"), "{failure:?}");
                assert_eq!(failure.rollback, "the container and its volumes were removed");
                node.assert_clean().await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_step_of_a_creation_can_be_repeated() {
    let faults = Faults { twice: true, ..Faults::default() };
    let node = Node::with(|_| {}, faults).await;
    let record = node.running(1).await;
    assert_eq!((record.vmid, record.boot), (vmid(100_000), 1));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn creation_leaves_nothing_after_any_pct_fault() {
    let said = || ErrorKind::Failed("startup for container '100000' failed".into());
    for op in [Op::Clone, Op::Set, Op::Resize, Op::Start] {
        for trouble in [Trouble::Before(said()), Trouble::After(said()), Trouble::Killed] {
            let node = Node::new().await;
            node.add_foreign();
            let foreign = node.cluster.guests()[&vmid(FOREIGN)].clone();
            node.fault(op, trouble.clone());
            let record = node.create(1).await;
            assert_eq!(record.phase, Phase::Failed, "{op:?} {trouble:?}");
            node.reconcile().await;
            node.assert_clean().await;
            assert_eq!(node.cluster.guests()[&vmid(FOREIGN)], foreign);
            // The template can be used as before.
            node.running(2).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn failed_creation_reports_the_last_line_of_pct() {
    let node = Node::new().await;
    node.fault(
        Op::Start,
        Trouble::Before(ErrorKind::Failed("bridge 'vmbr0' does not exist".into())),
    );
    let failure = node.create(1).await.failure.clone().expect("recorded");
    assert_eq!(failure.reason, Reason::PctFailed);
    assert!(failure.message.contains("bridge 'vmbr0' does not exist"), "{failure:?}");
}

#[tokio::test(start_paused = true)]
async fn hanging_clone_is_ended_at_its_deadline() {
    let node = Node::new().await;
    node.fault(Op::Clone, Trouble::Hangs);
    let record = node.create(1).await;
    assert_eq!(record.phase, Phase::Failed, "{record:?}");
    node.reconcile().await;
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn failed_undo_is_finished_by_the_reconciler() {
    let node = Node::new().await;
    node.fault(Op::Start, Trouble::Before(ErrorKind::Failed("no".into())));
    node.fault(Op::Destroy, Trouble::Before(ErrorKind::Locked("CT is locked (backup)".into())));
    let record = node.create(1).await;
    assert_eq!(record.phase, Phase::Undoing);
    let failure = record.failure.as_ref().expect("recorded");
    assert!(failure.rollback.contains("locked (backup)"), "{failure:?}");
    assert!(failure.message.contains("no"), "the first failure stays: {failure:?}");
    let (findings, _) = node.sandboxes.check().await;
    assert_eq!(findings.first().map(|finding| finding.invariant), Some(Invariant::I9));
    node.reconcile().await;
    let record = node.record(1).await;
    assert_eq!(record.phase, Phase::Failed);
    let rollback = record.failure.as_ref().map(|failure| failure.rollback.as_str());
    assert_eq!(rollback, Some("the container and its volumes were removed"));
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn undo_waits_until_quorum_is_back() {
    let node = Node::new().await;
    node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    node.cluster.set_quorate(false);
    let record = node.create(1).await;
    assert_eq!(record.phase, Phase::Undoing, "{record:?}");
    assert_eq!(node.reconciler().pass().await, [], "nothing is touched without quorum");
    node.cluster.set_quorate(true);
    node.reconcile().await;
    node.assert_clean().await;
}
