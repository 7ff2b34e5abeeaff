//! Where the behaviours are shown, and the hands that play the operator and fate.

use std::{
    fmt::Debug,
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

/// Longer than anything may take on a slow machine; a real start alone is 2 s.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// What has been shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// It is so.
    Yes,
    /// It takes something that cannot be had here.
    NotHere(&'static str),
}

/// When a clone is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// After its first write, which is a lock and nothing else.
    FirstWrite,
    /// When its volume is made and its config does not name it.
    Volume,
    /// When its config names its volume, and that is mounted to be written into.
    Mounted,
}

/// A `Pve`, and what others can do to it.
#[async_trait::async_trait]
pub(crate) trait Stage: Sync {
    /// What is held to its promises.
    fn pve(&self) -> Arc<dyn Pve>;

    /// A template of this node.
    fn template(&self) -> Vmid;

    /// A number that nobody has, another one each time.
    fn fresh(&self) -> Vmid;

    /// Bridge and address for one container.
    fn network(&self) -> (String, Address);

    /// Somebody else clones the template, with that description.
    async fn by_others(&self, vmid: Vmid, description: &str);

    /// An operator sets something of a container that the suite made.
    async fn operator_sets(&self, vmid: Vmid, key: &str, value: &str);

    /// An operator takes a snapshot of a container that the suite made; what he is told when he may
    /// not.
    async fn snapshot(&self, vmid: Vmid) -> Result<(), String>;

    /// The cluster loses its quorum or gets it back; false when that cannot be had.
    async fn set_quorate(&self, on: bool) -> bool;

    /// pmxcfs stops or comes back; false when that cannot be had.
    async fn set_pmxcfs(&self, on: bool) -> bool;

    /// The next clone to this number is killed at that moment; false when that cannot be had.
    async fn kill_next_clone(&self, vmid: Vmid, moment: Moment) -> bool;

    /// The next destruction of this number is killed when the volume is gone and the config is not;
    /// false when that cannot be had.
    async fn kill_next_destroy(&self, vmid: Vmid) -> bool;

    /// The same node, as an agent that was started anew sees it.
    fn another_life(&self) -> Arc<dyn Pve>;

    /// The next clone to this number takes so long that others can look at it; false when it takes
    /// as long as it takes.
    async fn slow_next_clone(&self, vmid: Vmid) -> bool;

    /// True when every node of the cluster sees the volumes of clones of the template now.
    async fn is_shared(&self) -> bool;

    /// Every node of the cluster sees the others' volumes from now on, or not; false when that cannot
    /// be had.
    async fn share(&self, on: bool) -> bool;

    /// Waits until a container that was started is at rest: its boot is over.
    async fn at_rest(&self, vmid: Vmid);

    /// Removes whatever is left of what the suite made, and puts right what it did to the node.
    async fn clean_up(&self);

    /// An operator moves a container that the suite gave to another node back here.
    async fn fetch_back(&self, vmid: Vmid, from: &NodeName);

    /// An operator allocates a volume under a number of the suite's. Returns it as PVE names it.
    async fn allocate(&self, vmid: Vmid) -> String;

    /// And removes it.
    async fn free(&self, volume: &str);

    /// How a shim sees a container that runs, and gets into it; this machine, where nothing runs in
    /// containers.
    fn inside(&self, vmid: Vmid) -> Arc<dyn Host>;

    /// How many short commands are enough to show that none is lost.
    fn calls(&self) -> usize;

    /// Removes what `by_others` made.
    async fn remove(&self, vmid: Vmid);
}

static SERIAL: AtomicU64 = AtomicU64::new(1);

impl dyn Stage + '_ {
    /// An order of a clone to a fresh number.
    pub(crate) fn order(&self) -> CloneOrder {
        let vmid = self.fresh();
        CloneOrder { template: self.template(), vmid, mark: mark(vmid) }
    }

    /// Settings for one container.
    pub(crate) fn settings(&self) -> Settings {
        let (bridge, address) = self.network();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let [.., a, b] = serial.to_be_bytes();
        let (mac, link) = ([0x02, 0, 0xC0, 0xDE, a, b], Link::default());
        Settings { bridge, mac, address, link, cores: 1, memory_mib: 128 }
    }

    /// A finished clone of ours.
    pub(crate) async fn cloned(&self) -> CloneOrder {
        let order = self.order();
        self.pve().clone_template(&order, DEADLINE).await.expect("clone");
        order
    }

    /// A clone of ours that has its settings.
    pub(crate) async fn configured(&self) -> CloneOrder {
        let order = self.cloned().await;
        self.pve().configure(order.vmid, &self.settings()).await.expect("configure");
        order
    }

    /// Removes a clone of ours and sees that nothing is left.
    pub(crate) async fn destroy(&self, order: &CloneOrder) {
        let (pve, own) = (self.pve(), self.own().await);
        let id = order.mark.sandbox_id;
        pve.destroy_owned(order.vmid, &id, &own, DEADLINE).await.expect("destroy");
        self.nothing_left(order.vmid).await;
    }

    /// The knowledge of the volumes of a clone under way.
    pub(crate) async fn own(&self) -> OwnVolumes {
        let template = self.pve().config(self.template()).await.expect("read").expect("template");
        OwnVolumes::cloned_to(template.storages())
    }

    /// Sees that there is nothing of a number.
    pub(crate) async fn nothing_left(&self, vmid: Vmid) {
        let pve = self.pve();
        assert_eq!(pve.config(vmid).await.expect("read"), None);
        assert!(!pve.running(vmid).await);
        assert_eq!(pve.volumes(vmid).await.expect("volumes"), [""; 0]);
        assert!(!pve.cluster().await.guests.contains_key(&vmid));
    }

    /// All that can be seen of a container, to be compared with later.
    pub(crate) async fn look(&self, vmid: Vmid) -> impl Debug + PartialEq {
        let pve = self.pve();
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        (config, pve.volumes(vmid).await.expect("volumes"), pve.init_pid(vmid).await)
    }
}

/// A mark for that number.
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

/// Looks until something is to be seen.
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
