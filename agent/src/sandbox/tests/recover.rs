//! Lost journal: containers are left alone, keep their addresses, and can be recovered.

use proto::Invariant;

use super::*;

impl Node {
    /// Restarts the agent with an empty journal.
    async fn lose_journal(&mut self) {
        self.tasks.kill().await;
        self.tasks = Tasks::default();
        let pools = Pools {
            vmids: (vmid(100_000), vmid(100_099)),
            addresses: (Ipv4Addr::new(10, 100, 1, 2), Ipv4Addr::new(10, 100, 1, 254)),
            address_quarantine_ms: 60_000,
        };
        self.journal = Arc::new(MemoryJournal::new("another", pools, Arc::new(SoundDisk)));
        let Self { cluster, name, journal, clock, options, tasks, .. } = self;
        self.sandboxes =
            open(cluster, name, journal, clock, options, tasks, Faults::default()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn container_unknown_to_the_journal_is_left_alone_until_recovered() {
    let mut node = Node::new().await;
    let before = node.running(1).await;
    node.lose_journal().await;
    let mark = before.mark();
    let quarantine = [Action::Quarantine { vmid: before.vmid, mark }];
    let mut reconciler = node.reconciler();
    for _ in 0..3 {
        assert_eq!(reconciler.pass().await, quarantine);
    }
    assert!(node.cluster.guests()[&before.vmid].pid.is_some(), "it runs on");
    let (findings, _) = node.sandboxes.check().await;
    assert_eq!(findings.iter().map(|f| f.invariant).collect::<Vec<_>>(), [Invariant::I1]);

    let told = node.sandboxes.recover(before.vmid, Egress::Open, true).await.expect("could be");
    assert_eq!((told.id, told.phase, told.ip), (before.id, Phase::Running, before.ip));
    assert!(node.sandboxes.live().is_empty(), "only told");
    let after = node.sandboxes.recover(before.vmid, Egress::Open, false).await.expect("recovered");
    assert_eq!((after.id, after.vmid, &after.team), (before.id, before.vmid, &before.team));
    assert_eq!((after.size, after.ip), (before.size, before.ip));
    assert!(after.services.is_empty(), "its ports are closed");
    node.assert_sound().await;
    assert_eq!(node.reconcile().await, []);
    // The same request returns the same sandbox, and everything else works as before.
    let again = node.sandboxes.create(order(1), LONG).await.expect("known");
    assert_eq!(again.id, before.id);
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.sandboxes.start(&id(1), LONG).await.expect("started");
    let error = node.sandboxes.recover(before.vmid, Egress::Open, false).await.expect_err("known");
    assert_eq!(error.reason, Reason::SandboxKnown);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn paused_or_stopped_container_is_recovered_in_its_phase() {
    let mut node = Node::new().await;
    let (paused, stopped) = (node.running(1).await, node.running(2).await);
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.sandboxes.stop(&id(2), LONG).await.expect("stopped");
    node.lose_journal().await;
    let recovered =
        node.sandboxes.recover(paused.vmid, Egress::Open, false).await.expect("its lock is ours");
    assert_eq!(recovered.phase, Phase::Paused);
    let recovered =
        node.sandboxes.recover(stopped.vmid, Egress::Open, false).await.expect("recovered");
    assert_eq!(recovered.phase, Phase::Stopped);
    assert_eq!(node.reconcile().await, [], "they are as they are to be");
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.sandboxes.start(&id(2), LONG).await.expect("started");
    // The lock of a running backup is not ours.
    node.lose_journal().await;
    node.cluster.edit(&node.name, stopped.vmid, |c| c.set("lock", "backup").expect("fits"));
    let error =
        node.sandboxes.recover(stopped.vmid, Egress::Open, false).await.expect_err("locked");
    assert_eq!(error.reason, Reason::ContainerLocked);
}

#[tokio::test(start_paused = true)]
async fn address_of_an_unknown_container_is_not_leased() {
    let mut node = Node::new().await;
    let before = node.running(1).await;
    node.lose_journal().await;
    let other = node.running(2).await;
    assert_ne!(other.ip, before.ip);
    assert_ne!(other.vmid, before.vmid);
    node.reconciler().pass().await;
    assert_ne!(node.running(3).await.ip, before.ip);
}

#[tokio::test(start_paused = true)]
async fn foreign_or_ended_container_is_not_recovered() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let refused = async |number: u32| {
        node.sandboxes.recover(vmid(number), Egress::Open, false).await.expect_err("refused").reason
    };
    assert_eq!(refused(100_050).await, Reason::SandboxNotFound);
    let mut config = node.cluster.guests()[&record.vmid].config.clone();
    node.cluster.add_guest(&node.name, vmid(100_050), config.clone(), false);
    assert_eq!(refused(100_050).await, Reason::NotOurs, "somebody's clone of ours");
    config.set_description("an operator's").expect("fits");
    node.cluster.add_guest(&node.name, vmid(100_051), config.clone(), false);
    assert_eq!(refused(100_051).await, Reason::NotOurs);
    assert_eq!(refused(TEMPLATE).await, Reason::NotOurs);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    config.set_description(&record.mark().to_string()).expect("fits");
    node.cluster.add_guest(&node.name, record.vmid, config, false);
    assert_eq!(refused(record.vmid.get()).await, Reason::SandboxDeleted);
}
