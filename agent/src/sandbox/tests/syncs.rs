//! The agent dies at every sync of its journal, right before and right after it, in every
//! operation; then again in the recovery by the next agent. The syncs are counted first, so a new
//! step is covered by itself. After a crash before a sync, an effect is unrecorded and is repeated;
//! after a crash behind a sync, an intent is recorded that had no effect.

use std::collections::BTreeSet;

use daemon::disk::{FatalDisk, When};

use super::{
    port_changes::{Given, PortChange},
    *,
};
use crate::saga;

/// Time that no operation exceeds.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    /// A creation that fails after the clone and is rolled back.
    Undo,
    /// A creation that is cancelled in the middle.
    Cancel,
    Start,
    Stop,
    Pause,
    Resume,
    Resize,
    Delete,
    /// Adoption of somebody's container.
    Adopt,
    /// Release of an adopted sandbox.
    Release,
    /// Recovery by the reconciler of a creation and a deletion that were cut short.
    Recover,
    /// Change of an open port, or of who reaches it.
    Port(PortChange),
}

/// Phase that the next agent arrives at, and whether the change of a port was made; `None` for other operations.
type Left = (Option<Phase>, Option<bool>);

const ALL: [Operation; 17] = [
    Operation::Create,
    Operation::Undo,
    Operation::Cancel,
    Operation::Start,
    Operation::Stop,
    Operation::Pause,
    Operation::Resume,
    Operation::Resize,
    Operation::Delete,
    Operation::Adopt,
    Operation::Release,
    Operation::Recover,
    Operation::Port(PortChange::Expose),
    Operation::Port(PortChange::Hide),
    Operation::Port(PortChange::Guard),
    Operation::Port(PortChange::Revoke),
    Operation::Port(PortChange::ExposeOnListen),
];

impl Operation {
    /// Faults of the first agent.
    fn faults(self) -> Faults {
        // The third step starts what the first has cloned.
        let fail = (self == Self::Undo).then_some((2, saga::When::Before));
        Faults { fail, ..Faults::default() }
    }

    /// Brings the node to the moment before the operation. Returns the credentials that a change of a port starts
    /// with.
    async fn prepare(self, node: &mut Node) -> Option<Given> {
        match self {
            Self::Create | Self::Undo | Self::Cancel => {}
            Self::Stop | Self::Pause | Self::Resize | Self::Delete => drop(node.running(1).await),
            Self::Start => {
                node.running(1).await;
                node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
            }
            Self::Adopt => drop(node.add_cmux(adopt::CMUX, true)),
            Self::Release => {
                node.add_cmux(adopt::CMUX, true);
                node.sandboxes.adopt(adopt::adoption(), false, LONG).await.expect("adopted");
                node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
            }
            Self::Resume => {
                node.running(1).await;
                node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
            }
            Self::Recover => {
                node.running(2).await;
                node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
                node.sandboxes.delete(&id(2), Duration::ZERO).await.expect("under way");
                tokio::time::sleep(Duration::from_millis(600)).await;
                node.restart().await;
            }
            Self::Port(change) => return Some(change.prepare(node).await),
        }
        None
    }

    /// Runs to the end of the operation, or of the agent.
    async fn run(self, node: &Node) {
        let sandboxes = &node.sandboxes;
        let one = id(1);
        match self {
            Self::Create | Self::Undo => {
                sandboxes.create(order(1), PATIENCE).await.expect("admitted");
            }
            Self::Cancel => {
                let creating = sandboxes.create(order(1), PATIENCE);
                let cancelling = async {
                    tokio::time::sleep(Duration::from_millis(1200)).await;
                    sandboxes.cancel(&one, 1, PATIENCE).await.expect("cancelled")
                };
                let (created, _) = tokio::join!(creating, cancelling);
                drop(created);
            }
            Self::Start => drop(sandboxes.start(&one, PATIENCE).await.expect("started")),
            Self::Stop => drop(sandboxes.stop(&one, PATIENCE).await.expect("stopped")),
            Self::Pause => drop(sandboxes.pause(&one, false, PATIENCE).await.expect("paused")),
            Self::Resume => drop(sandboxes.resume(&one, PATIENCE).await.expect("resumed")),
            Self::Resize => {
                let size = Size { cpu_cores: 3, memory_mib: 2048, disk_gib: 9 };
                let asked = lifecycle::resize::Resize { size, revision: None };
                drop(sandboxes.resize(&one, asked, PATIENCE).await.expect("given"));
            }
            Self::Delete => drop(sandboxes.delete(&one, PATIENCE).await.expect("deleted")),
            Self::Adopt => {
                let adopted = sandboxes.adopt(adopt::adoption(), false, PATIENCE).await;
                drop(adopted.expect("adopted"));
            }
            Self::Release => drop(sandboxes.release(&one, PATIENCE).await.expect("given back")),
            Self::Recover => drop(node.reconcile().await),
            Self::Port(change) => change.run(node).await,
        }
    }

    /// Phases that the sandbox may have when the next agent is done. `None`: it has no record.
    fn ends(self) -> &'static [Option<Phase>] {
        match self {
            Self::Create => &[None, Some(Phase::Failed), Some(Phase::Running)],
            Self::Undo | Self::Cancel => &[None, Some(Phase::Failed)],
            Self::Recover => &[Some(Phase::Failed)],
            Self::Start => &[Some(Phase::Stopped), Some(Phase::Running)],
            Self::Stop => &[Some(Phase::Running), Some(Phase::Stopped)],
            // A power cut makes it STOPPED; that is no end of its own.
            Self::Resize | Self::Port(_) => &[Some(Phase::Running)],
            Self::Pause | Self::Resume => &[Some(Phase::Running), Some(Phase::Paused)],
            Self::Delete => &[Some(Phase::Running), Some(Phase::Deleted)],
            Self::Adopt => &[None, Some(Phase::Running)],
            Self::Release => &[Some(Phase::Paused), Some(Phase::Deleted)],
        }
    }
}

/// Counts the syncs of an operation.
async fn syncs(operation: Operation) -> usize {
    let disk = Arc::new(FatalDisk::default());
    let mut node = Node::on(Arc::clone(&disk) as _, |_| {}, operation.faults()).await;
    drop(operation.prepare(&mut node).await);
    disk.arm(true);
    operation.run(&node).await;
    disk.syncs()
}

/// Kills the agent at that sync; returns what the next agent arrives at.
async fn dies(operation: Operation, at: (usize, When), power_cut: bool) -> Left {
    let disk = Arc::new(FatalDisk::new(Some(at)));
    let mut node = Node::on(Arc::clone(&disk) as _, |_| {}, operation.faults()).await;
    node.add_foreign();
    let foreign = node.cluster.guests()[&vmid(FOREIGN)].clone();
    let given = operation.prepare(&mut node).await;
    disk.arm(true);
    let died = tokio::select! {
        biased;
        () = disk.reached() => true,
        () = operation.run(&node) => false,
        () = tokio::time::sleep(PATIENCE) => panic!("{operation:?} hangs at {at:?}"),
    };
    // The last answer may be sent before the disk is asked for more.
    assert!(died || at.1 == When::After, "{operation:?} has no sync {at:?}");
    disk.arm(false);
    if power_cut {
        node.cluster.crash(&node.name);
    }
    node.restart().await;
    // The `pct` processes end by themselves, before or while the next agent checks.
    node.reconcile().await;
    node.cluster.settle().await;
    node.reconcile().await;
    node.assert_sound().await;
    if let Ok(record) = node.sandboxes.get(&SandboxRef::Id(id(1))).await {
        assert_eq!(record.resizing, None, "{operation:?} at {at:?}: its size is settled");
    }
    let left = node.sandboxes.get(&SandboxRef::Id(id(1))).await.ok().map(|record| record.phase);
    let made = match (operation, &given) {
        (Operation::Port(change), Some(given)) => Some(change.check(&node, given).await),
        _ => None,
    };
    assert!(died || made != Some(false), "{operation:?} at {at:?} was answered, and is not made");
    let theirs = (operation == Operation::Adopt && left.is_none())
        || (operation == Operation::Release && left == Some(Phase::Deleted));
    if theirs {
        node.assert_unchanged(&crate::pve::ContainerConfig::parse(adopt::CMUX.as_bytes()));
    }
    // In any phase, it can be requested again and deleted; and the node works as before.
    if operation == Operation::Delete || left.is_some_and(|phase| phase != Phase::Failed) {
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    }
    node.running(3).await;
    node.sandboxes.delete(&id(3), LONG).await.expect("deleted");
    node.reconcile().await;
    node.assert_clean().await;
    assert_eq!(node.cluster.guests()[&vmid(FOREIGN)], foreign, "{operation:?} {at:?}");
    (left, made)
}

#[tokio::test(start_paused = true)]
async fn every_operation_survives_a_crash_around_any_journal_sync() {
    for operation in ALL {
        let syncs = syncs(operation).await;
        assert!(syncs > 0, "{operation:?} writes nothing");
        let mut seen = BTreeSet::new();
        for number in 0..syncs {
            for when in [When::Before, When::After] {
                for power_cut in [false, true] {
                    let left = dies(operation, (number, when), power_cut).await;
                    let down = power_cut && left.0 == Some(Phase::Stopped);
                    assert!(
                        down || operation.ends().contains(&left.0),
                        "{operation:?}, {when:?} sync {number} of {syncs}, power cut {power_cut}: \
                         {left:?}"
                    );
                    if !power_cut {
                        seen.insert(format!("{left:?}"));
                    }
                }
            }
        }
        // The first sync is an intent: nothing has happened before it, everything after the last. A change of a port
        // leaves the phase as it is, and is made or not.
        let is_port = matches!(operation, Operation::Port(_));
        let both = if is_port { 2 } else { operation.ends().len().min(2) };
        assert!(seen.len() >= both, "{operation:?} over {syncs} syncs: {seen:?}");
    }
}
