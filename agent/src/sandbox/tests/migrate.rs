//! Moves a stopped sandbox to another node that sees its disk.

use proto::{Cause, Reason, lifetime::LifetimePatch};

use super::*;
use crate::{journal::PortRules, pve::ErrorKind, sandbox::ownership::migrate::Exported};

/// Two nodes of one cluster, each with an agent.
struct Two {
    node: Node,
    there: Arc<Sandboxes>,
}

impl Two {
    async fn new() -> Self {
        let node = Node::new().await;
        node.cluster.set_shared(true);
        let pools = Pools {
            vmids: (vmid(200_000), vmid(200_099)),
            addresses: (Ipv4Addr::new(10, 100, 2, 2), Ipv4Addr::new(10, 100, 2, 254)),
            address_quarantine_ms: 60_000,
        };
        let journal = Arc::new(MemoryJournal::new("other", pools, Arc::new(SoundDisk)));
        let mut options = node.options.clone();
        options.network.gateway = Ipv4Addr::new(10, 100, 2, 1);
        for template in &mut options.templates {
            template.vmid = vmid(9001);
        }
        node.cluster.add_template(&node.other(), vmid(9001));
        let (cluster, clock, tasks) = (&node.cluster, &node.clock, Tasks::default());
        let faults = Faults::default();
        let there = open(cluster, &node.other(), &journal, clock, &options, &tasks, faults).await;
        Self { node, there }
    }

    async fn stopped(&self) -> Arc<Record> {
        let mut order = order(1);
        order.spec.metadata.insert("a".into(), "b".into());
        order.spec.env.insert("COLOUR".into(), "green".into());
        order.spec.services.insert("web".parse().expect("valid"), "80".parse().expect("valid"));
        order.spec.expose_on_listen = Some(true);
        let default = proto::visibility::Visibility::Team;
        order.port_rules =
            Some(PortRules { default, denied: ["22".parse().expect("valid")].into() });
        self.node.sandboxes.create(order, LONG).await.expect("admitted");
        self.node.sandboxes.stop(&id(1), LONG).await.expect("stopped")
    }

    async fn export(&self) -> Exported {
        let exported = self.node.sandboxes.export(&id(1), &self.node.other(), LONG).await;
        let (exported, node) = exported.expect("exported");
        assert_eq!(node, self.node.other());
        exported
    }

    async fn assert_sound(&self) {
        self.node.assert_sound().await;
        assert_eq!(self.there.check().await.0, []);
    }
}

#[tokio::test(start_paused = true)]
async fn moved_sandbox_keeps_its_record_and_gets_a_new_address() {
    let two = Two::new().await;
    let before = two.stopped().await;
    let exported = two.export().await;
    let after = two.there.import(exported, LONG).await.expect("taken over");
    let released =
        two.node.sandboxes.forget_moved(&id(1), &two.node.other(), LONG).await.expect("let go");
    assert_eq!((released.phase, released.cause), (Phase::Deleted, Cause::Moved));

    assert_eq!((after.phase, after.vmid, after.boot), (Phase::Stopped, before.vmid, before.boot));
    assert_eq!((&after.metadata, &after.env), (&before.metadata, &before.env));
    assert_eq!((&after.services, &after.snapshot), (&before.services, &before.snapshot));
    assert!(before.access.listen.is_some());
    assert_eq!(after.access, before.access, "with the rule for ports that something listens on");
    assert_eq!((&after.lifetime, after.size), (&before.lifetime, before.size));
    assert_eq!(after.ip, Some(Ipv4Addr::new(10, 100, 2, 2)), "an address of that node");
    let up = two.there.start(&id(1), LONG).await.expect("starts");
    assert_eq!((up.phase, up.ip), (Phase::Running, after.ip));
    let interface = two.node.cluster.guests()[&up.vmid].config.net0().expect("connected");
    assert_eq!(interface.gateway, Some(Ipv4Addr::new(10, 100, 2, 1)));
    two.assert_sound().await;

    // Back again, over the tombstone that it left there.
    two.there.stop(&id(1), LONG).await.expect("stopped");
    let (exported, _) = two.there.export(&id(1), &two.node.name, LONG).await.expect("back");
    // Until it is taken back, a container with the mark of a sandbox that ended here is left alone.
    two.node.reconcile_some().await;
    two.node.sandboxes.import(exported, LONG).await.expect("taken back");
    two.there.forget_moved(&id(1), &two.node.name, LONG).await.expect("let go");
    two.node.sandboxes.start(&id(1), LONG).await.expect("starts");
    two.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn each_step_of_a_move_can_be_repeated_and_interrupted() {
    let mut two = Two::new().await;
    two.stopped().await;
    let first = two.export().await;
    two.node.restart().await;
    two.node.reconcile().await;
    let told = two.node.record(1).await;
    assert_eq!(told.failure.as_ref().map(|f| f.reason), Some(Reason::ContainerGone));
    let again = two.export().await;
    assert_eq!(again.record.env, first.record.env);
    assert_eq!((again.record.id, again.record.vmid), (first.record.id, first.record.vmid));

    // Recorded there, and not connected yet.
    let said = ErrorKind::Failed("lost its way".into());
    two.node.fault(Op::Set, Trouble::Before(said));
    two.there.import(again.clone(), LONG).await.expect_err("could not be connected");
    let up = two.there.start(&id(1), LONG).await.expect("connected first");
    let ip = two.node.cluster.guests()[&up.vmid].config.net0().map(|net| net.ip);
    let expected = up.ip.map(|ip| crate::pve::config_file::Ip::Static(ip, 24));
    assert_eq!(ip, expected);
    // A change that is requested meanwhile would be lost.
    let extended = two.node.sandboxes.update(&id(1), lives(LifetimePatch::default())).await;
    assert_eq!(extended.expect_err("not here").reason, Reason::SandboxBusy);
    let started = two.node.sandboxes.start(&id(1), LONG).await;
    assert_eq!(started.expect_err("not here").reason, Reason::SandboxBusy);
    let taken = two.there.import(again, LONG).await.expect("it is there");
    assert_eq!(taken.phase, Phase::Running, "as it is by now");
    two.node.sandboxes.forget_moved(&id(1), &two.node.other(), LONG).await.expect("let go");
    two.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_cannot_move_stays() {
    let two = Two::new().await;
    let (node, other) = (&two.node, two.node.other());
    let refused = async |sandbox: u8, to: &NodeName| {
        let exported = node.sandboxes.export(&id(sandbox), to, LONG).await;
        exported.expect_err("stays").reason
    };
    node.running(2).await;
    assert_eq!(refused(2, &other).await, Reason::NotMovable, "it runs");
    let record = two.stopped().await;
    assert_eq!(refused(1, &node.name).await, Reason::NotMovable, "no other node");
    node.cluster.set_shared(false);
    assert_eq!(refused(1, &other).await, Reason::NotMovable, "its disk is not seen there");
    assert_eq!(refused(9, &other).await, Reason::SandboxNotFound);
    let error = node.sandboxes.forget_moved(&id(1), &other, LONG).await.expect_err("it is here");
    assert_eq!(error.reason, Reason::NotMovable);
    let here = Exported { record: Record::clone(&record), now: node.clock.moment() };
    let error = two.there.import(here, LONG).await.expect_err("is not there");
    assert_eq!(error.reason, Reason::SandboxNotFound);
    node.sandboxes.start(&id(1), LONG).await.expect("as before");
    two.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_deleted_during_a_move_is_deleted_on_the_new_node() {
    let two = Two::new().await;
    two.stopped().await;
    two.export().await;
    two.node.sandboxes.delete(&id(1), LONG).await.expect_err("its container is not here");
    let exported = two.export().await;
    assert_eq!(exported.record.phase, Phase::Deleting);
    // The reconciler continues it, or a caller who asks again.
    for phase in [Phase::Deleting, Phase::Deleted] {
        let taken = two.there.import(exported.clone(), LONG).await.expect("taken over");
        assert_eq!(taken.phase, phase);
    }
    // Now that the container is on no node, the sandbox is deleted here, too.
    two.node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(two.node.cluster.guests().get(&exported.record.vmid), None);
    two.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn failed_attempt_on_the_new_node_does_not_block_a_move() {
    let two = Two::new().await;
    // The first attempt was made there, and failed in the middle of its clone.
    let said = ErrorKind::Failed("lost its way".into());
    two.node.fault(Op::Clone, Trouble::Before(said));
    let first = two.there.create(order(1), LONG).await.expect("admitted");
    assert_eq!(first.phase, Phase::Failed);
    let second = Order { attempt: 2, ..order(1) };
    two.node.sandboxes.create(second, LONG).await.expect("admitted");
    two.node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    let taken = two.there.import(two.export().await, LONG).await.expect("taken over");
    assert_eq!((taken.attempt, taken.phase), (2, Phase::Stopped));
    two.node.sandboxes.forget_moved(&id(1), &two.node.other(), LONG).await.expect("let go");
    two.assert_sound().await;
}
