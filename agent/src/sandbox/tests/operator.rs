//! Actions of an operator outside of the agent, in PVE's GUI or by `pct`: one test per row of the
//! table in docs/cleanup.md. None may lose a sandbox, touch a container that is not ours, or end in
//! a state without a way out.

use proto::{Cause, Invariant};

use super::*;
use crate::pve::{ContainerConfig, ErrorKind};

impl Node {
    /// Creates a running sandbox and lets the operator change its container.
    async fn meddled(meddle: impl FnOnce(&Self, &Record)) -> (Self, Arc<Record>) {
        let node = Self::new().await;
        let record = node.running(1).await;
        meddle(&node, &record);
        node.reconcile().await;
        (node, record)
    }

    async fn stands(&self) -> (Phase, Option<Reason>) {
        let record = self.record(1).await;
        (record.phase, record.failure.as_ref().map(|failure| failure.reason))
    }

    fn change(&self, record: &Record, change: impl FnOnce(&mut ContainerConfig)) {
        self.cluster.edit(&self.name, record.vmid, change);
    }

    /// Asserts that the sandbox works as before.
    async fn assert_works(&self) {
        self.assert_sound().await;
        if self.record(1).await.phase == Phase::Stopped {
            self.sandboxes.start(&id(1), LONG).await.expect("starts");
        }
        self.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        self.sandboxes.resume(&id(1), LONG).await.expect("resumed");
        self.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        self.assert_clean().await;
    }
}

fn because(reason: Reason) -> Option<Reason> {
    Some(reason)
}

#[tokio::test(start_paused = true)]
async fn sandbox_stopped_by_an_operator_is_recorded_as_stopped() {
    let (node, _) = Node::meddled(|node, record| node.cluster.switch(record.vmid, false)).await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::SandboxNotRunning)));
    assert_eq!(node.record(1).await.cause, Cause::FoundDown);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_started_by_an_operator_is_recorded_as_running() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.clock.forward(Duration::from_secs(60));
    // It has another address than its lease: a neighbour's, for example.
    let net0 = node.cluster.guests()[&record.vmid].config.get("net0").expect("one").to_owned();
    node.change(&record, |config| {
        config.set("net0", "name=eth0,bridge=vmbr0,ip=10.100.1.77/24").expect("fits");
    });
    node.cluster.switch(record.vmid, true);
    node.reconcile().await;
    assert_eq!(node.record(1).await.ip, record.ip, "requests go where they went");
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot), (Phase::Running, record.boot + 1), "another life");
    assert_eq!(after.cause, Cause::FoundUp);
    let (findings, _) = node.sandboxes.check().await;
    assert_eq!(findings.iter().map(|f| f.invariant).collect::<Vec<_>>(), [Invariant::I5]);
    node.change(&record, |config| config.set("net0", &net0).expect("fits"));
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_with_a_removed_container_is_reported_and_can_be_deleted() {
    let (node, _) = Node::meddled(|node, record| node.cluster.remove(record.vmid)).await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::ContainerGone)));
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("there is none");
    assert_eq!(error.reason, Reason::NotOurs);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn container_removed_while_stopped_or_paused_is_reported() {
    for pause in [false, true] {
        let node = Node::new().await;
        let record = node.running(1).await;
        if pause {
            node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        } else {
            node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        }
        node.cluster.remove(record.vmid);
        node.reconcile().await;
        assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::ContainerGone)));
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        node.assert_clean().await;
    }
}

#[tokio::test(start_paused = true)]
async fn renamed_and_resized_container_is_the_same_sandbox() {
    let (node, record) = Node::meddled(|node, record| {
        node.change(record, |config| {
            config.set("hostname", "web").expect("fits");
            config.set("memory", "4096").expect("fits");
            config.set("tags", "mine").expect("fits");
        });
    })
    .await;
    assert_eq!(node.record(1).await, record);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn line_added_to_the_description_changes_nothing() {
    let (node, record) =
        Node::meddled(|node, record| node.change(record, |c| c.add_note("ask Jo before"))).await;
    assert_eq!(node.record(1).await, record);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn container_without_its_mark_is_left_alone_until_it_is_back() {
    let (node, record) = Node::meddled(|node, record| {
        node.change(record, |config| config.set_description("mine now").expect("fits"));
    })
    .await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::NotOurs)));
    assert!(node.cluster.guests()[&record.vmid].pid.is_some(), "it runs on");
    node.change(&record, |c| c.set_description(&record.mark().to_string()).expect("fits"));
    node.reconcile().await;
    assert_eq!(node.stands().await, (Phase::Running, None));
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_without_its_mark_can_be_released_even_while_deleting() {
    for delete in [false, true] {
        let (node, record) = Node::meddled(|node, record| {
            node.change(record, |config| config.set_description("mine now").expect("fits"));
        })
        .await;
        if delete {
            node.sandboxes.delete(&id(1), LONG).await.expect_err("not ours");
        }
        let theirs = node.cluster.guests()[&record.vmid].clone();
        let ended = node.sandboxes.release(&id(1), LONG).await.expect("let go");
        assert_eq!((ended.phase, ended.cause), (Phase::Deleted, Cause::Released));
        node.reconcile().await;
        node.assert_sound().await;
        assert_eq!(node.cluster.guests()[&record.vmid], theirs);
        assert_eq!(node.sandboxes.live(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn ignores_cloned_container_with_copied_mark() {
    let (node, record) = Node::meddled(|node, record| {
        let mut config = node.cluster.guests()[&record.vmid].config.clone();
        // With the sandbox's address it would be a finding.
        config.set("net0", "name=eth0,bridge=vmbr0,ip=10.100.1.77/24").expect("fits");
        node.cluster.add_guest(&node.name, vmid(100_050), config, false);
    })
    .await;
    let copy = node.cluster.guests()[&vmid(100_050)].clone();
    assert_eq!(node.record(1).await, record);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.reconcile().await;
    assert_eq!(node.containers(), [100_050]);
    assert_eq!(node.cluster.guests()[&vmid(100_050)], copy);
}

#[tokio::test(start_paused = true)]
async fn container_moved_to_another_node_is_reported_and_left_alone() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.switch(record.vmid, false);
        node.cluster.migrate(record.vmid, &node.other());
    })
    .await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::ContainerGone)));
    let failure = node.record(1).await.failure.clone().expect("told");
    assert!(failure.message.contains(OTHER), "{}", failure.message);
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("is not here");
    assert_eq!(error.reason, Reason::NotOurs);
    let error = node.sandboxes.delete(&id(1), LONG).await.expect_err("is not here");
    assert_eq!(error.reason, Reason::NotOurs);
    node.reconcile_some().await;
    let there = node.cluster.guests()[&record.vmid].clone();
    assert_eq!(there.node, node.other());
    assert_eq!(node.cluster.volumes()[&(node.other(), record.vmid)].len(), 1, "its volume, too");
    // The way out, once it lives on there.
    node.sandboxes.release(&id(1), LONG).await.expect("let go");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn container_moved_there_and_back_works_as_before() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.switch(record.vmid, false);
        node.cluster.migrate(record.vmid, &node.other());
    })
    .await;
    node.cluster.migrate(record.vmid, &node.name);
    node.reconcile().await;
    assert_eq!(node.stands().await, (Phase::Stopped, None));
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn container_moved_to_this_node_is_quarantined_until_recovered() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let mut config = node.cluster.guests()[&record.vmid].config.clone();
    let mark = crate::pve::Mark {
        sandbox_id: id(2),
        vmid: vmid(200_007),
        request_id: "of-node2".parse().expect("valid"),
        ..record.mark()
    };
    config.set_description(&mark.to_string()).expect("fits");
    config.set("net0", "name=eth0,bridge=vmbr0,ip=10.100.2.9/24").expect("fits");
    config.set("rootfs", "local-zfs:subvol-200007-disk-0,size=2G").expect("fits");
    node.cluster.add_guest(&node.other(), mark.vmid, config, false);
    node.cluster.add_volume(&node.other(), mark.vmid);
    node.cluster.migrate(mark.vmid, &node.name);
    let quarantine = Action::Quarantine { vmid: mark.vmid, mark: mark.clone() };
    assert_eq!(node.reconciler().pass().await, [quarantine]);
    let recovered =
        node.sandboxes.recover(mark.vmid, Egress::Open, false).await.expect("recovered");
    assert_eq!((recovered.id, recovered.vmid), (id(2), mark.vmid), "a number of another node's");
    node.assert_sound().await;
    node.sandboxes.start(&id(2), LONG).await.expect("started");
    node.sandboxes.delete(&id(2), LONG).await.expect("deleted");
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn pve_snapshot_of_a_sandbox_changes_nothing() {
    let (node, record) = Node::meddled(|node, record| {
        node.change(record, |config| {
            let mut text = config.to_bytes();
            text.extend(b"\n[before]\n#pve-sandbox:v1 of then\nlock: x\nrootfs: elsewhere:0\n");
            config.set("parent", "before").expect("fits");
            *config = ContainerConfig::parse(&text);
        });
    })
    .await;
    assert_eq!(node.record(1).await, record);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn pause_is_refused_and_delete_waits_during_a_snapshot_or_backup() {
    for lock in ["snapshot", "backup"] {
        let (node, record) = Node::meddled(|node, record| {
            node.change(record, |config| config.set("lock", lock).expect("fits"));
        })
        .await;
        let error = node.sandboxes.pause(&id(1), false, LONG).await.expect_err("locked");
        assert_eq!(error.reason, Reason::ContainerLocked);
        let error = node.sandboxes.delete(&id(1), LONG).await.expect_err("locked");
        assert_eq!(error.reason, Reason::ContainerLocked);
        assert_eq!(node.containers(), [record.vmid.get()]);
        // The lock is gone: the deletion continues by itself.
        node.change(&record, |config| config.remove("lock"));
        node.reconcile().await;
        node.assert_clean().await;
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_made_a_template_is_left_alone_and_can_be_released() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.switch(record.vmid, false);
        node.change(record, |config| config.set("template", "1").expect("fits"));
    })
    .await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::NotOurs)));
    let template = node.cluster.guests()[&record.vmid].clone();
    node.sandboxes.delete(&id(1), LONG).await.expect_err("not ours");
    node.sandboxes.release(&id(1), LONG).await.expect("let go");
    node.reconcile().await;
    assert_eq!(node.cluster.guests()[&record.vmid], template);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn protected_sandbox_is_deleted_once_the_protection_is_removed() {
    let (node, record) = Node::meddled(|node, record| {
        node.change(record, |config| config.set("protection", "1").expect("fits"));
    })
    .await;
    node.sandboxes.delete(&id(1), LONG).await.expect_err("protected");
    node.reconcile_some().await;
    assert_eq!(node.containers(), [record.vmid.get()]);
    node.change(&record, |config| config.remove("protection"));
    node.reconcile().await;
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn paused_sandbox_is_repaused_after_an_operator_unlock_or_thaw() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.change(&record, |config| config.remove("lock"));
    node.reconcile().await;
    node.assert_sound().await;
    node.cluster.node(&node.name).thaw(record.vmid, &record.id).await.expect("thawed");
    node.reconcile().await;
    assert_eq!(node.stands().await, (Phase::Paused, None));
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn another_container_under_the_vmid_is_left_alone() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.remove(record.vmid);
        let config = ContainerConfig::parse(b"hostname: db\nrootfs: local-zfs:subvol-1-disk-9\n");
        node.cluster.add_guest(&node.name, record.vmid, config, false);
    })
    .await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::NotOurs)));
    let theirs = node.cluster.guests()[&record.vmid].clone();
    node.sandboxes.delete(&id(1), LONG).await.expect_err("not ours");
    node.reconcile_some().await;
    node.sandboxes.release(&id(1), LONG).await.expect("let go");
    assert_eq!(node.cluster.guests()[&record.vmid], theirs);
}

impl Node {
    /// Runs a few passes while something cannot be done.
    pub(super) async fn reconcile_some(&self) {
        let mut reconciler = self.reconciler();
        for _ in 0..3 {
            reconciler.pass().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_rebooted_by_an_operator_keeps_running() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.switch(record.vmid, false);
        node.cluster.switch(record.vmid, true);
    })
    .await;
    assert_eq!(node.record(1).await, record);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn rolled_back_container_is_still_the_sandbox_of_its_mark() {
    let (node, record) = Node::meddled(|node, record| {
        node.cluster.switch(record.vmid, false);
        node.change(record, |config| {
            config.remove("cores");
            config.set("parent", "before").expect("fits");
            config.set_description(&format!("old\n{}", record.mark())).expect("fits");
        });
    })
    .await;
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::SandboxNotRunning)));
    assert_eq!(node.record(1).await.vmid, record.vmid);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn stop_refused_by_a_lock_changes_nothing() {
    for paused in [false, true] {
        let node = Node::new().await;
        let record = node.running(1).await;
        if paused {
            node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        }
        let before = node.record(1).await;
        // A backup in mode "stop", or a snapshot: PVE refuses every change as long as it takes.
        node.change(&record, |config| {
            config.remove("lock");
            config.remove_note(
                "paused by pve-sandbox, which holds the lock; resume it with sandboxctl",
            );
            config.set("lock", "backup").expect("fits");
        });
        let error = node.sandboxes.stop(&id(1), LONG).await.expect_err("locked");
        assert_eq!(error.reason, Reason::ContainerLocked);
        assert!(error.message.contains("stays as it is"), "{error}");
        let after = node.record(1).await;
        assert_eq!((after.phase, after.revision), (before.phase, before.revision));
        let guest = node.cluster.guests()[&record.vmid].clone();
        assert!(guest.pid.is_some() && guest.frozen == paused);
        assert_eq!(guest.config.lock(), Some("backup"));
        node.change(&record, |config| config.remove("lock"));
        node.reconcile().await;
        let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        assert_eq!(stopped.phase, Phase::Stopped);
        node.assert_works().await;
    }
}

#[tokio::test(start_paused = true)]
async fn stop_overtaken_by_a_lock_is_reverted_and_reported() {
    let node = Node::new().await;
    node.running(1).await;
    node.fault(Op::Stop, Trouble::Before(ErrorKind::Locked("CT is locked (snapshot)".into())));
    let at_once = Duration::ZERO;
    let error = node.sandboxes.stop_within(&id(1), at_once, LONG).await.expect_err("locked");
    assert_eq!(error.reason, Reason::ContainerLocked);
    assert!(error.message.contains("runs on"), "{error}");
    assert_eq!(node.stands().await, (Phase::Running, because(Reason::ContainerLocked)));
    assert_eq!(node.reconcile().await, [], "nobody stops it behind the caller's back");
    // A stop that may have had an effect is continued, and the error says so.
    node.fault(Op::Stop, Trouble::Before(ErrorKind::Failed("simulated".into())));
    let error = node.sandboxes.stop(&id(1), LONG).await.expect_err("failed");
    assert!(error.message.contains("tried again"), "{error}");
    assert_eq!(node.record(1).await.phase, Phase::Stopping);
    node.reconcile().await;
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn stop_without_pmxcfs_changes_nothing() {
    let node = Node::new().await;
    node.running(1).await;
    node.cluster.set_pmxcfs(&node.name, false);
    let error = node.sandboxes.stop(&id(1), LONG).await.expect_err("no /etc/pve");
    assert_eq!(error.reason, Reason::NoQuorum);
    assert_eq!(node.record(1).await.phase, Phase::Running);
    node.cluster.set_pmxcfs(&node.name, true);
    assert_eq!(node.reconcile().await, []);
    node.assert_works().await;
}

#[tokio::test(start_paused = true)]
async fn start_under_a_foreign_lock_fails_at_once_with_its_reason() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.change(&record, |config| config.set("lock", "backup").expect("fits"));
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("locked");
    assert_eq!(error.reason, Reason::ContainerLocked);
    assert_eq!(node.stands().await, (Phase::Stopped, because(Reason::ContainerLocked)));
    assert_eq!(node.reconcile().await, []);
    // A stopped sandbox counts as stopped, whoever has locked it.
    node.sandboxes.stop(&id(1), LONG).await.expect("is stopped");
    node.change(&record, |config| config.remove("lock"));
    node.assert_works().await;
}
