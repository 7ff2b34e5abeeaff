//! Node without quorum, node whose number in the cluster changes, and node without pmxcfs.

use proto::Reason;

use super::*;
use crate::{
    journal,
    pve::{fake::Membership, pause_lock},
};

impl Node {
    async fn refused(&self, number: u8) -> Reason {
        self.sandboxes.create(order(number), LONG).await.expect_err("refused").reason
    }

    fn number(&self) -> Option<u32> {
        let node = self.sandboxes.node.read();
        node.as_ref().map(|node| node.number)
    }
}

#[tokio::test(start_paused = true)]
async fn node_without_corosync_creates_nothing_and_keeps_its_volumes() {
    let mut node = Node::new().await;
    let record = node.running(1).await;
    let volumes = node.cluster.volumes();
    node.cluster.set_membership(&node.name.clone(), Membership::Unheard);
    for restarted in [false, true] {
        if restarted {
            node.restart().await;
        }
        assert_eq!(node.refused(2).await, Reason::NoQuorum);
        let error = node.sandboxes.delete(&id(1), LONG).await.expect_err("no quorum");
        assert_eq!(error.reason, Reason::NoQuorum);
        assert_eq!(node.reconcile().await, [], "absence proves nothing");
        assert_eq!(node.cluster.volumes(), volumes);
        assert!(node.cluster.guests()[&record.vmid].config.rootfs().is_some());
    }
    node.cluster.set_membership(&node.name, Membership::Member);
    node.reconcile().await;
    node.assert_clean().await;
    node.running(2).await;
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn node_number_is_written_only_once_the_node_is_quorate() {
    let mut node = Node::new().await;
    let name = node.other();
    node.name = name;
    node.cluster.add_template(&node.name, vmid(TEMPLATE + 1));
    node.options.templates[0].vmid = vmid(TEMPLATE + 1);
    node.cluster.set_membership(&node.name, Membership::Unheard);
    node.restart().await;
    node.reconcile().await;
    assert_eq!(node.number(), None, "not taken for number 1");
    node.cluster.set_membership(&node.name, Membership::Member);
    node.reconcile().await;
    assert_eq!(node.number(), Some(2));
    let kept = journal::Node { name: node.name.clone(), number: 2 };
    assert_eq!(node.journal.node().await.expect("reads"), Some(kept));
    // The number in the journal stays while the cluster cannot tell.
    node.cluster.set_membership(&node.name, Membership::Unheard);
    node.restart().await;
    node.reconcile().await;
    assert_eq!(node.number(), Some(2));
}

#[tokio::test(start_paused = true)]
async fn first_creation_writes_the_node_number() {
    let node = Node::new().await;
    node.cluster.set_membership(&node.name, Membership::Alone);
    assert_eq!(node.number(), None);
    node.running(1).await;
    assert_eq!(node.number(), Some(1));
}

#[tokio::test(start_paused = true)]
async fn node_with_a_changed_number_creates_nothing_until_confirmed() {
    let mut node = Node::with(|options| options.number = Some(1), Faults::default()).await;
    node.cluster.set_membership(&node.name.clone(), Membership::Alone);
    node.running(1).await;
    node.cluster.set_membership(&node.name, Membership::Member);
    node.cluster.renumber(&node.name, 3);
    for restarted in [false, true] {
        if restarted {
            node.restart().await;
        }
        node.reconcile().await;
        assert_eq!(node.number(), Some(1), "only an operator can say so");
        assert_eq!(node.refused(2).await, Reason::NodeNumberChanged);
        let snapshot = "base".parse().expect("valid");
        let counted = node.sandboxes.reserve(&id(3), &snapshot, Size::default()).await;
        assert_eq!(counted.expect_err("no counted").reason, Reason::NodeNumberChanged);
        let cluster = node.sandboxes.pve().cluster().await;
        let told = node.sandboxes.renumbered(&cluster).expect("another");
        assert_eq!((told.known, told.now), (1, 3));
        // Existing sandboxes work in every respect.
        node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
        node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        node.sandboxes.start(&id(1), LONG).await.expect("started");
    }
    let confirmed = journal::Node { name: node.name.clone(), number: 3 };
    node.journal.set_node(&confirmed).await.expect("written");
    node.restart().await;
    assert_eq!(node.refused(2).await, Reason::NodeNumberChanged, "its ranges are the old ones");
    node.options.number = Some(3);
    node.restart().await;
    node.running(2).await;
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn node_with_a_changed_number_refuses_an_import() {
    let node = Node::with(|options| options.number = Some(1), Faults::default()).await;
    node.cluster.renumber(&node.name, 4);
    node.cluster.set_shared(true);
    let record = Record { vmid: vmid(100_050), ..crate::journal::conformance::record(1) };
    let mut config = crate::pve::ContainerConfig::parse(b"rootfs: shared:x,size=1G\n");
    config.set_description(&record.mark().to_string()).expect("a mark is short");
    node.cluster.add_guest(&node.name, record.vmid, config, false);
    let exported = crate::sandbox::ownership::migrate::Exported {
        record: Record { phase: Phase::Stopped, ..record },
        now: node.clock.moment(),
    };
    let error = node.sandboxes.import(exported, LONG).await.expect_err("refused");
    assert_eq!(error.reason, Reason::NodeNumberChanged);
}

/// Stops or restores pmxcfs of the node; it stops at each restart of pve-cluster.
fn away(node: &Node, away: bool) {
    node.cluster.set_pmxcfs(&node.name, !away);
}

#[tokio::test(start_paused = true)]
async fn running_sandbox_is_paused_and_resumed_without_pmxcfs() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let guest = || node.cluster.guests()[&record.vmid].clone();
    // Also for a container that was not observed since its start.
    away(&node, true);
    node.sandboxes.check_ours(&record).await.expect("its init is the one that was started");
    let paused = node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    assert_eq!((paused.phase, &paused.failure), (Phase::Paused, &None));
    assert!(guest().frozen && !pause_lock::is_held(&guest().config), "the lock follows");
    assert_eq!(node.reconcile().await, []);
    away(&node, false);
    node.reconcile().await;
    assert!(guest().frozen && pause_lock::is_held(&guest().config));
    away(&node, true);
    let woken = node.sandboxes.wake(&SandboxRef::Id(id(1)), Wake::Exec).await.expect("woken");
    assert_eq!(woken.phase, Phase::Running);
    assert!(!guest().frozen);
    // The removal of the lock has failed.
    while !node.sandboxes.busy().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    away(&node, false);
    node.reconcile().await;
    assert!(!pause_lock::is_noted(&guest().config));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn other_container_under_the_vmid_is_not_entered_without_pmxcfs() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.reconcile().await;
    away(&node, true);
    // A container of an operator, which is not visible yet: another process is its init.
    node.cluster.switch(record.vmid, false);
    let error = node.sandboxes.check_ours(&record).await.expect_err("it does not run");
    assert_eq!(error.reason, Reason::NoQuorum);
    node.cluster.switch(record.vmid, true);
    let error = node.sandboxes.check_ours(&record).await.expect_err("another init");
    assert_eq!(error.reason, Reason::NoQuorum);
    let error = node.sandboxes.pause(&id(1), false, LONG).await.expect_err("not known");
    assert_eq!(error.reason, Reason::NoQuorum);
    assert_eq!(node.record(1).await.phase, Phase::Running, "the intent was taken back");
    assert!(!node.cluster.guests()[&record.vmid].frozen);
    away(&node, false);
    node.reconcile().await;
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn container_that_lost_its_mark_is_not_entered_without_pmxcfs() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.edit(&node.name, record.vmid, |c| c.set_description("mine").expect("fits"));
    assert_eq!(
        node.sandboxes.check_ours(&record).await.expect_err("not ours").reason,
        Reason::NotOurs
    );
    away(&node, true);
    let error = node.sandboxes.check_ours(&record).await.expect_err("it was seen without a mark");
    assert_eq!(error.reason, Reason::NoQuorum);
}

#[tokio::test(start_paused = true)]
async fn restarted_agent_without_pmxcfs_reverts_a_pause() {
    let mut node = Node::new().await;
    let record = node.running(1).await;
    away(&node, true);
    node.restart().await;
    let error = node.sandboxes.pause(&id(1), false, LONG).await.expect_err("it knows nobody");
    assert_eq!(error.reason, Reason::NoQuorum);
    assert_eq!(node.record(1).await.phase, Phase::Running);
    away(&node, false);
    node.reconcile().await;
    assert!(!node.cluster.guests()[&record.vmid].frozen);
    node.assert_sound().await;
}
