//! Volumes with a sandbox's vmid that it did not make: an operator allocated them, or an
//! interrupted restore left them. Their vmids are skipped; they are reported, never removed.

use proto::{Invariant, Progress};

use super::*;

const STRAY: u32 = 7;

impl Node {
    fn stray(&self, number: u32) -> String {
        self.cluster.alloc(&self.name, vmid(number), STRAY)
    }

    fn volumes(&self, number: u32) -> Vec<String> {
        let volumes = self.cluster.volumes().remove(&(self.name.clone(), vmid(number)));
        volumes.into_iter().flatten().collect()
    }

    /// Asserts that this volume is the only finding.
    async fn assert_told(&self, volume: &str) {
        self.cluster.settle().await;
        let (findings, _) = self.sandboxes.check().await;
        let found: Vec<_> = findings.iter().map(|f| (f.invariant, f.subject.as_str())).collect();
        assert_eq!(found, [(Invariant::I1, volume)], "{findings:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn vmid_with_a_foreign_volume_is_skipped() {
    let node = Node::new().await;
    let (first, second) = (node.stray(100_000), node.stray(100_001));
    let record = node.running(1).await;
    assert_eq!(record.vmid, vmid(100_002));
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.volumes(100_002), [""; 0]);
    let (findings, _) = node.sandboxes.check().await;
    let found: Vec<_> = findings.iter().map(|finding| finding.subject.clone()).collect();
    assert_eq!(found, [first, second]);
}

#[tokio::test(start_paused = true)]
async fn foreign_volume_survives_every_kind_of_failed_creation() {
    let failed = || crate::pve::ErrorKind::Failed("no".into());
    for trouble in [
        Trouble::Before(failed()),
        Trouble::After(failed()),
        Trouble::Killed,
        Trouble::KilledAtOnce,
        Trouble::RolledBack,
    ] {
        let mut node = Node::new().await;
        let stray = node.stray(100_000);
        node.fault(Op::Clone, trouble.clone());
        assert_eq!(node.create(1).await.phase, Phase::Failed, "{trouble:?}");
        node.restart().await;
        node.reconcile().await;
        assert_eq!(node.volumes(100_000), std::slice::from_ref(&stray), "{trouble:?}");
        assert_eq!(node.volumes(100_001), [""; 0], "what the clone has left goes");
        node.assert_told(&stray).await;
    }
}

#[tokio::test(start_paused = true)]
async fn foreign_volume_beside_a_live_sandbox_survives_its_deletion() {
    for phase in [Phase::Running, Phase::Paused, Phase::Stopped] {
        let mut node = Node::new().await;
        let record = node.running(1).await;
        match phase {
            Phase::Paused => drop(node.sandboxes.pause(&id(1), false, LONG).await.expect("paused")),
            Phase::Stopped => drop(node.sandboxes.stop(&id(1), LONG).await.expect("stopped")),
            Phase::Creating
            | Phase::Undoing
            | Phase::Running
            | Phase::Starting
            | Phase::Stopping
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => {}
        }
        let stray = node.stray(record.vmid.get());
        node.assert_told(&stray).await;
        node.restart().await;
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        assert_eq!(node.volumes(record.vmid.get()), std::slice::from_ref(&stray), "{phase:?}");
        assert_eq!(node.containers(), [] as [u32; 0]);
        node.reconcile().await;
        node.assert_told(&stray).await;
        // The vmid is not used while the volume exists.
        assert_ne!(node.running(2).await.vmid, record.vmid);
    }
}

#[tokio::test(start_paused = true)]
async fn volume_named_in_the_config_is_deleted_with_its_sandbox() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let volume = node.stray(record.vmid.get());
    node.cluster.edit(&node.name, record.vmid, |config| {
        config.set("mp0", &format!("{volume},mp=/data")).expect("fits");
    });
    node.assert_sound().await;
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.volumes(record.vmid.get()), [""; 0]);
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn own_volume_is_deleted_even_if_the_config_lost_its_name() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.cluster.edit(&node.name, record.vmid, |config| config.remove("rootfs"));
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.volumes(record.vmid.get()), [""; 0]);
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn interrupted_destruction_spares_a_foreign_volume() {
    let mut node = Node::new().await;
    let record = node.running(1).await;
    let stray = node.stray(record.vmid.get());
    node.fault(Op::Destroy, Trouble::Killed);
    drop(node.sandboxes.delete(&id(1), LONG).await);
    node.restart().await;
    node.reconcile().await;
    assert_eq!(node.containers(), [] as [u32; 0]);
    assert_eq!(node.volumes(record.vmid.get()), std::slice::from_ref(&stray));
    node.assert_told(&stray).await;
}

#[tokio::test(start_paused = true)]
async fn volume_made_while_the_template_is_locked_is_foreign() {
    for cancel in [false, true] {
        let node = Node::new().await;
        let lock =
            |config: &mut crate::pve::ContainerConfig| config.set("lock", "disk").expect("fits");
        node.cluster.edit(&node.name, vmid(TEMPLATE), lock);
        node.sandboxes.create(order(1), Duration::from_secs(5)).await.expect("admitted");
        assert_eq!(node.record(1).await.phase, Phase::Creating, "it waits");
        let stray = node.stray(100_000);
        if cancel {
            node.sandboxes.delete(&id(1), LONG).await.expect("cancelled");
        }
        node.cluster.edit(&node.name, vmid(TEMPLATE), |config| config.remove("lock"));
        if !cancel {
            let record = node.sandboxes.create(order(1), LONG).await.expect("joined");
            assert_eq!((record.phase, record.vmid), (Phase::Running, vmid(100_001)));
        }
        assert_eq!(node.volumes(100_000), std::slice::from_ref(&stray), "{cancel}");
        node.assert_told(&stray).await;
    }
}

#[tokio::test(start_paused = true)]
async fn volume_made_after_the_clone_is_foreign() {
    let mut node = Node::new().await;
    node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
    while node.record(1).await.progress == Progress::Queued
        || node.record(1).await.progress == Progress::Clone
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stray = node.stray(100_000);
    node.restart().await;
    node.reconcile().await;
    assert_eq!(node.record(1).await.phase, Phase::Failed);
    assert_eq!(node.volumes(100_000), std::slice::from_ref(&stray));
    node.assert_told(&stray).await;
}

#[tokio::test(start_paused = true)]
async fn foreign_volume_survives_the_return_of_a_deleted_sandbox() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let config = node.cluster.guests()[&record.vmid].config.clone();
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    let stray = node.stray(record.vmid.get());
    // A power cut brings its config and its volume back.
    node.cluster.add_guest(&node.name, record.vmid, config, false);
    node.cluster.add_volume(&node.name, record.vmid);
    node.reconcile().await;
    assert_eq!(node.containers(), [] as [u32; 0]);
    assert_eq!(node.volumes(record.vmid.get()), std::slice::from_ref(&stray));
    node.assert_told(&stray).await;
}

#[tokio::test(start_paused = true)]
async fn creation_fails_if_every_vmid_has_a_foreign_volume() {
    let node = Node::new().await;
    for number in 100_000..100_100 {
        node.stray(number);
    }
    let record = node.create(1).await;
    assert_eq!(record.phase, Phase::Failed);
    assert_eq!(record.failure.as_ref().expect("told").reason, proto::Reason::VmidsExhausted);
    assert_eq!(node.cluster.volumes().len(), 101, "the template's, too");
    assert_eq!(node.containers(), [] as [u32; 0]);
}

#[tokio::test(start_paused = true)]
async fn adopted_sandbox_owns_only_the_volumes_in_its_config() {
    let node = Node::new().await;
    let text = b"hostname: db\nunprivileged: 1\nrootfs: local-zfs:subvol-207-disk-0,size=2G\n";
    let config = crate::pve::ContainerConfig::parse(text);
    node.cluster.add_guest(&node.name, vmid(207), config, false);
    node.cluster.add_volume(&node.name, vmid(207));
    let stray = node.stray(207);
    let adoption = Adoption { vmid: vmid(207), ..super::adopt::adoption() };
    let (_, told) = node.sandboxes.adopt(adoption, false, LONG).await.expect("adopted");
    assert_eq!(told, ["local-zfs:subvol-207-disk-0"]);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.volumes(207), [stray]);
}
