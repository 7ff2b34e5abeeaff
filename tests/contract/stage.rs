//! Stage of the behaviours, with functions that play the operator and cause faults.

use std::{
    fmt::Debug,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use agent::{
    pve::{Address, CloneOrder, Link, Mark, OwnVolumes, Pve, Settings},
    shim::Host,
};
use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};
use tokio::time::{Instant, sleep};

/// Deadline of a step, longer than any takes on a slow machine; a real start alone takes 2 s.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Result of a behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// The behaviour was shown.
    Yes,
    /// The behaviour needs something that is not available here.
    NotHere(&'static str),
}

/// Moment at which a clone is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// After its first write, which is only a lock.
    FirstWrite,
    /// When its volume exists and its config does not name it.
    Volume,
    /// When its config names its volume, and the volume is mounted to be written to.
    Mounted,
}

/// A `Pve` under test, and actions of others on it.
#[async_trait::async_trait]
pub(crate) trait Stage: Sync {
    /// Returns the implementation under test.
    fn pve(&self) -> Arc<dyn Pve>;

    /// Returns a template of this node.
    fn template(&self) -> Vmid;

    /// Returns an unused number, another one each time.
    fn fresh(&self) -> Vmid;

    /// Returns bridge and address for one container.
    fn network(&self) -> (String, Address);

    /// Clones the template as somebody else, with that description.
    async fn by_others(&self, vmid: Vmid, description: &str);

    /// Changes a setting of a container of the suite, as an operator.
    async fn operator_sets(&self, vmid: Vmid, key: &str, value: &str);

    /// Takes a snapshot of a container of the suite, as an operator. Returns the error if PVE
    /// refuses.
    async fn snapshot(&self, vmid: Vmid) -> Result<(), String>;

    /// Removes or restores the cluster's quorum; returns false if that is not possible here.
    async fn set_quorate(&self, on: bool) -> bool;

    /// Stops or starts pmxcfs; returns false if that is not possible here.
    async fn set_pmxcfs(&self, on: bool) -> bool;

    /// Plans to kill the next clone to this number; returns false if that is not possible here.
    async fn kill_next_clone(&self, vmid: Vmid, moment: Moment) -> bool;

    /// Plans to kill the next destruction of this number, when the volume is gone and the config is
    /// not; returns false if that is not possible here.
    async fn kill_next_destroy(&self, vmid: Vmid) -> bool;

    /// Returns the same node, as a restarted agent sees it.
    fn another_life(&self) -> Arc<dyn Pve>;

    /// Makes the next clone to this number slow enough to be observed; returns false if its
    /// duration cannot be changed.
    async fn slow_next_clone(&self, vmid: Vmid) -> bool;

    /// Returns whether every node of the cluster sees the volumes of clones of the template now.
    async fn is_shared(&self) -> bool;

    /// Makes the nodes' volumes visible to every node of the cluster, or not; returns false if that
    /// is not possible here.
    async fn share(&self, on: bool) -> bool;

    /// Waits until a started container has finished its boot.
    async fn at_rest(&self, vmid: Vmid);

    /// Removes what is left of the suite, and restores what it changed on the node.
    async fn clean_up(&self);

    /// Moves a container that the suite gave to another node back here, as an operator.
    async fn fetch_back(&self, vmid: Vmid, from: &NodeName);

    /// Allocates a volume under a number of the suite's, as an operator. Returns PVE's name of it.
    async fn allocate(&self, vmid: Vmid) -> String;

    /// Removes an allocated volume.
    async fn free(&self, volume: &str);

    /// Returns a shim's view of a running container and its way into it; for containers that run
    /// nothing, of this machine.
    fn inside(&self, vmid: Vmid) -> Arc<dyn Host>;

    /// Makes servers in a running container listen on these addresses, and no others of the suite's.
    async fn listen(&self, vmid: Vmid, at: &[SocketAddr]);

    /// Returns how many short commands are enough to show that none is lost.
    fn calls(&self) -> usize;

    /// Removes a container that `by_others` created.
    async fn remove(&self, vmid: Vmid);
}

static SERIAL: AtomicU64 = AtomicU64::new(1);

impl dyn Stage + '_ {
    /// Returns an order for a clone to a fresh number.
    pub(crate) fn order(&self) -> CloneOrder {
        let vmid = self.fresh();
        CloneOrder { template: self.template(), vmid, mark: mark(vmid) }
    }

    /// Returns settings for one container.
    pub(crate) fn settings(&self) -> Settings {
        let (bridge, address) = self.network();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let [.., a, b] = serial.to_be_bytes();
        let (mac, link) = ([0x02, 0, 0xC0, 0xDE, a, b], Link::default());
        Settings { bridge, mac, address, link, cores: 1, memory_mib: 128 }
    }

    /// Creates a clone.
    pub(crate) async fn cloned(&self) -> CloneOrder {
        let order = self.order();
        self.pve().clone_template(&order, DEADLINE).await.expect("clone");
        order
    }

    /// Creates a clone and configures it.
    pub(crate) async fn configured(&self) -> CloneOrder {
        let order = self.cloned().await;
        self.pve().configure(order.vmid, &self.settings()).await.expect("configure");
        order
    }

    /// Destroys a clone and checks that nothing is left.
    pub(crate) async fn destroy(&self, order: &CloneOrder) {
        let (pve, own) = (self.pve(), self.own().await);
        let id = order.mark.sandbox_id;
        pve.destroy_owned(order.vmid, &id, &own, DEADLINE).await.expect("destroy");
        self.nothing_left(order.vmid).await;
    }

    /// Returns the known volumes of a clone in progress.
    pub(crate) async fn own(&self) -> OwnVolumes {
        let template = self.pve().config(self.template()).await.expect("read").expect("template");
        OwnVolumes::cloned_to(template.storages())
    }

    /// Checks that nothing exists under a number.
    pub(crate) async fn nothing_left(&self, vmid: Vmid) {
        let pve = self.pve();
        assert_eq!(pve.config(vmid).await.expect("read"), None);
        assert!(!pve.running(vmid).await);
        assert_eq!(pve.volumes(vmid).await.expect("volumes"), [""; 0]);
        assert!(!pve.cluster().await.guests.contains_key(&vmid));
    }

    /// Returns everything visible of a container, for a later comparison.
    pub(crate) async fn look(&self, vmid: Vmid) -> impl Debug + PartialEq {
        let pve = self.pve();
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        (config, pve.volumes(vmid).await.expect("volumes"), pve.init(vmid).await)
    }
}

/// Returns a mark for that number.
pub(crate) fn mark(vmid: Vmid) -> Mark {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&serial.to_be_bytes());
    random[8..].copy_from_slice(&std::process::id().to_be_bytes()[2..]);
    Mark {
        sandbox_id: SandboxId::new(1_700_000_000_000, &random),
        vmid,
        attempt: 1,
        team: "contract".parse().expect("valid"),
        request_id: format!("r-{serial}").parse().expect("valid"),
    }
}

/// Polls until a result appears.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what}: not seen in time");
        sleep(Duration::from_millis(5)).await;
    }
}
