//! Adopts a container that existed before, and releases it again.

use proto::Cause;

use super::*;
use crate::pve::{ContainerConfig, ErrorKind};

const VMID: u32 = 207;

pub(super) const CMUX: &str = "#cmux-execd-auth-token=0123\n#made by hand\narch: amd64\ncores: 4\n\
    hostname: pvelxc-1a2b3c4d\nmemory: 6144\nnet0: name=eth0,bridge=vmbr0,ip=10.9.0.7/24\n\
    onboot: 1\nrootfs: local-zfs:subvol-207-disk-0,size=32G\nunprivileged: 1\n";

pub(super) fn adoption() -> Adoption {
    Adoption {
        id: id(1),
        vmid: vmid(VMID),
        team: "acme".parse().expect("valid"),
        egress: Egress::Open,
    }
}

impl Node {
    /// Adds a container like those of the predecessor.
    pub(super) fn add_cmux(&self, text: &str, runs: bool) -> ContainerConfig {
        let config = ContainerConfig::parse(text.as_bytes());
        self.cluster.add_guest(&self.name, vmid(VMID), config.clone(), false);
        self.cluster.add_volume(&self.name, vmid(VMID));
        self.cluster.switch(vmid(VMID), runs);
        config
    }

    pub(super) fn config_of_cmux(&self) -> ContainerConfig {
        self.cluster.guests()[&vmid(VMID)].config.clone()
    }

    async fn adopted(&self) -> Arc<Record> {
        self.sandboxes.adopt(adoption(), false, LONG).await.expect("adopted").0
    }

    /// Asserts that the operator has the container back as it was before.
    pub(super) fn assert_unchanged(&self, before: &ContainerConfig) {
        assert_eq!(self.config_of_cmux(), *before, "byte for byte");
        self.cluster.remove(vmid(VMID));
    }
}

#[tokio::test(start_paused = true)]
async fn adopted_container_is_a_full_sandbox_and_a_dry_run_adopts_nothing() {
    let mut node = Node::new().await;
    let before = node.add_cmux(CMUX, true);
    let (told, volumes) = node.sandboxes.adopt(adoption(), true, LONG).await.expect("could be");
    assert_eq!((told.phase, told.size.cpu_cores, told.size.memory_mib), (Phase::Running, 4, 6144));
    assert_eq!(volumes, ["local-zfs:subvol-207-disk-0"]);
    assert_eq!(node.config_of_cmux(), before, "only told");
    assert_eq!(node.sandboxes.live(), []);

    let record = node.adopted().await;
    assert_eq!((record.vmid, record.ip), (vmid(VMID), Some(Ipv4Addr::new(10, 9, 0, 7))));
    assert!(record.services.is_empty());
    let now = node.config_of_cmux();
    assert_eq!(now.mark(), Some(record.mark()));
    assert!(now.description().expect("one").contains("cmux-execd-auth-token"), "others' lines");
    node.assert_sound().await;
    assert_eq!(node.reconcile().await, []);
    // The same request returns the same sandbox; another id does not get the container.
    assert_eq!(node.adopted().await.id, record.id);
    let other = Adoption { id: id(2), ..adoption() };
    let error = node.sandboxes.adopt(other, false, LONG).await.expect_err("is one");
    assert_eq!(error.reason, Reason::SandboxKnown);

    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.restart().await;
    node.sandboxes.start(&id(1), LONG).await.expect("started");
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn adopted_sandbox_can_be_released_in_every_phase() {
    for phase in [Phase::Running, Phase::Paused, Phase::Stopped] {
        let node = Node::new().await;
        let before = node.add_cmux(CMUX, true);
        node.adopted().await;
        if phase == Phase::Paused {
            node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        } else if phase == Phase::Stopped {
            node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        }
        let ended = node.sandboxes.release(&id(1), LONG).await.expect("given back");
        assert_eq!((ended.phase, ended.cause), (Phase::Deleted, Cause::Released));
        let guest = node.cluster.guests()[&vmid(VMID)].clone();
        assert_eq!((guest.pid.is_some(), guest.frozen), (phase != Phase::Stopped, false));
        assert_eq!(node.reconcile().await, []);
        node.assert_sound().await;
        // The container can be adopted again, with another id.
        let again = Adoption { id: id(2), ..adoption() };
        node.sandboxes.adopt(again, false, LONG).await.expect("adopted");
        node.sandboxes.release(&id(2), LONG).await.expect("given back");
        node.assert_unchanged(&before);
        node.assert_clean().await;
    }
}

#[tokio::test(start_paused = true)]
async fn mark_restored_by_a_power_cut_after_a_release_is_removed() {
    let node = Node::new().await;
    let before = node.add_cmux(CMUX, true);
    node.adopted().await;
    let marked = node.config_of_cmux();
    node.sandboxes.release(&id(1), LONG).await.expect("given back");
    node.cluster.edit(&node.name, vmid(VMID), |config| *config = marked);
    let unmark = Action::Unmark { id: id(1), vmid: vmid(VMID) };
    assert_eq!(node.reconcile().await, [unmark], "and it is not destroyed");
    node.assert_unchanged(&before);
}

#[tokio::test(start_paused = true)]
async fn unfit_container_is_not_adopted_and_stays_unchanged() {
    let node = Node::new().await;
    let refused = async |change: &str, reason: Reason| {
        let before = node.add_cmux(&format!("{CMUX}{change}\n"), false);
        for dry_run in [true, false] {
            let error = node.sandboxes.adopt(adoption(), dry_run, LONG).await.expect_err(change);
            assert_eq!(error.reason, reason, "{change}: {error}");
        }
        node.assert_unchanged(&before);
    };
    refused("template: 1", Reason::ContainerUnfit).await;
    refused("protection: 1", Reason::ContainerUnfit).await;
    refused("lock: backup", Reason::ContainerLocked).await;
    refused("hookscript: local:snippets/x.pl", Reason::ContainerUnfit).await;
    refused("lxc.mount.entry: / host none bind", Reason::ContainerUnfit).await;
    refused("#pve-sandbox:v9 of a later version", Reason::NotOurs).await;
    let error = node.sandboxes.adopt(adoption(), false, LONG).await.expect_err("none there");
    assert_eq!(error.reason, Reason::SandboxNotFound);
    let privileged = CMUX.replace("unprivileged: 1\n", "");
    node.add_cmux(&privileged, true);
    let error = node.sandboxes.adopt(adoption(), false, LONG).await.expect_err("privileged");
    assert_eq!(error.reason, Reason::ContainerUnfit);
    assert!(error.message.contains("pct restore"), "{error}");
    node.cluster.remove(vmid(VMID));
    // A container of a sandbox, and a copy of it.
    let ours = node.running(3).await;
    let of = |vmid| Adoption { vmid, ..adoption() };
    let error = node.sandboxes.adopt(of(ours.vmid), false, LONG).await.expect_err("ours");
    assert_eq!(error.reason, Reason::SandboxKnown);
    let error = node.sandboxes.release(&id(3), LONG).await.expect_err("was made for it");
    assert_eq!(error.reason, Reason::NotAdopted);
    assert_eq!(node.sandboxes.live().len(), 1);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn adoption_is_undone_if_the_mark_cannot_be_written() {
    let node = Node::new().await;
    let before = node.add_cmux(CMUX, true);
    let full = ErrorKind::Failed("no space left on device".into());
    node.fault(Op::Mark, Trouble::Before(full.clone()));
    node.sandboxes.adopt(adoption(), false, LONG).await.expect_err("could not be written");
    assert_eq!(node.sandboxes.live(), []);
    // The mark is written, but the write reports an error.
    node.fault(Op::Mark, Trouble::After(full));
    let another = Adoption { id: id(2), ..adoption() };
    node.sandboxes.adopt(another, false, LONG).await.expect_err("is not known to be written");
    assert_eq!(node.reconcile().await, []);
    node.assert_unchanged(&before);
    node.assert_clean().await;
}
