//! A PVE cluster in memory, for the simulation and for tests of what is built on `Pve`.
//!
//! The fake keeps PVE's semantics: a vmid is taken cluster-wide, a template that is being cloned
//! refuses a second clone at once, a clone's config has its mark before it has a volume, an
//! operation continues when its caller has gone, and an operation that is cut off leaves its locks
//! and volumes behind. Time is tokio's, so it can be paused; durations vary by a seed.

mod driver;
mod membership;
mod op;
mod size;
mod work;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use daemon::sync::Mutex;
use proto::{id::Vmid, name::NodeName};
use tokio::sync::{Notify, broadcast};
use tokio_util::task::TaskTracker;

pub use membership::Membership;
pub use op::Op;
pub use size::{KernelLimits, Limiting};
pub use world::Guest;
use world::{Node, World, template_config};

use super::{CloneOrder, ContainerConfig, ErrorKind, StorageRoom, known::Known};

/// Failure mode of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Fails and does nothing.
    Before(ErrorKind),
    /// Does its work but reports a failure.
    After(ErrorKind),
    /// Stops half-way and leaves what a killed worker leaves.
    Killed,
    /// Fails a clone half-way; PVE rolls it back and forgets its volume.
    RolledBack,
    /// Stops a clone after its first write, which does not name an owner.
    KilledAtOnce,
    /// Hangs until `FakeCluster::release`, or until the deadline stops the operation.
    Hangs,
}

/// Most boots that nobody has taken notice of; earlier ones are not told.
const BOOTS_MAX: usize = 64;

/// Deliberate defect of the fake host. The simulation must notice each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Changes and destroys containers without checking the owner.
    Ownership,
    /// Reports a destruction as done without doing anything.
    Destroy,
    /// Keeps the lock of a dead clone, but reports its removal.
    Unlock,
    /// Pauses without taking a lock.
    PauseLock,
    /// Reports frozen containers as dead.
    Frozen,
    /// Destroys containers with unknown marks when all configs are listed.
    Strangers,
    /// Removes all volumes of a vmid with its sandbox, whoever made them.
    Volumes,
    /// Lets a member that has lost its cluster believe that it has none.
    Alone,
    /// Takes every container for the sandbox's own.
    Entry,
    /// Hides the volumes that exist under the vmid of a clone.
    Site,
}

/// One planned failure; used up by the operation that it hits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Operation to fail.
    pub op: Op,
    /// Node to fail on; any if absent.
    pub node: Option<NodeName>,
    /// Container to fail for (for a clone, the new one); any if absent.
    pub vmid: Option<Vmid>,
    /// Failure mode.
    pub trouble: Trouble,
}

/// Durations of the operations. Each takes between this and a quarter more.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// `pct clone`.
    pub clone: Duration,
    /// `pct set`.
    pub set: Duration,
    /// `pct resize` of a running container.
    pub resize: Duration,
    /// `pct resize` of a stopped container, on a volume with its own file system.
    pub resize_stopped: Duration,
    /// `pct start`.
    pub start: Duration,
    /// Time from the start to the address.
    pub boot: Duration,
    /// `pct stop`.
    pub stop: Duration,
    /// `pct destroy`.
    pub destroy: Duration,
    /// Write of a config.
    pub write: Duration,
    /// Half of a freeze, or a thaw.
    pub freeze: Duration,
}

impl Pace {
    /// Durations measured on real nodes.
    pub const RECORDED: Self = Self {
        clone: Duration::from_millis(904),
        set: Duration::from_millis(661),
        resize: Duration::from_millis(650),
        resize_stopped: Duration::from_millis(23_255),
        start: Duration::from_millis(1915),
        boot: Duration::from_millis(400),
        stop: Duration::from_millis(1719),
        destroy: Duration::from_millis(726),
        write: Duration::from_micros(2500),
        freeze: Duration::from_micros(1100),
    };
}

/// Handle of the cluster: holds the state that its nodes share, and lets tests change it.
#[derive(Debug, Clone)]
pub struct FakeCluster(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    faults: Mutex<Vec<Fault>>,
    random: Mutex<u64>,
    pace: Mutex<Pace>,
    /// Signals any change that an operation may wait for.
    changed: Notify,
    on_clone: OnClone,
    released: Notify,
    /// Tells of containers that boot.
    boots: broadcast::Sender<Vmid>,
    /// Runs operations, which outlive their callers as `pct` outlives the agent.
    tracker: TaskTracker,
}

/// Callback for every clone, before it begins.
type Hear = Box<dyn Fn(&NodeName, &CloneOrder) + Send + Sync>;

#[derive(Default)]
struct OnClone(OnceLock<Hear>);

impl std::fmt::Debug for OnClone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnClone")
    }
}

/// One node of the fake cluster.
#[derive(Debug)]
pub struct FakePve {
    node: NodeName,
    shared: Arc<Shared>,
    known: Known,
}

impl FakeCluster {
    /// Creates a quorate cluster without guests and with 1 TiB on each node.
    pub fn new(nodes: &[NodeName], pace: Pace, seed: u64) -> Self {
        let room = StorageRoom::new(1 << 40, 1 << 40);
        let node = |number| Node {
            life: 0,
            pmxcfs: true,
            room,
            slow: 1,
            number,
            cluster: Membership::Member,
        };
        let world = World {
            quorate: true,
            shared: false,
            nodes: nodes.iter().cloned().zip((1..).map(node)).collect(),
            guests: BTreeMap::new(),
            volumes: BTreeMap::new(),
            busy: BTreeSet::new(),
            next_pid: 1000,
            mutation: None,
            limiting: Limiting::default(),
            links: BTreeSet::new(),
            entry: None,
        };
        Self(Arc::new(Shared {
            world: Mutex::new(world),
            faults: Mutex::default(),
            random: Mutex::new(seed),
            pace: Mutex::new(pace),
            changed: Notify::new(),
            on_clone: OnClone::default(),
            released: Notify::new(),
            boots: broadcast::Sender::new(BOOTS_MAX),
            tracker: TaskTracker::new(),
        }))
    }

    /// Returns a node as an agent sees it.
    pub fn node(&self, name: &NodeName) -> Arc<FakePve> {
        let (node, shared) = (name.clone(), Arc::clone(&self.0));
        Arc::new(FakePve { node, shared, known: Known::default() })
    }

    /// Adds a template.
    pub fn add_template(&self, node: &NodeName, vmid: Vmid) {
        self.add_guest(node, vmid, template_config(vmid), false);
        let volume = format!("local-zfs:basevol-{vmid}-disk-0");
        self.0.world.lock().volumes.entry((node.clone(), vmid)).or_default().insert(volume);
    }

    /// Adds a stopped container, or a virtual machine, that the agent did not make.
    pub fn add_guest(&self, node: &NodeName, vmid: Vmid, config: ContainerConfig, is_vm: bool) {
        let guest = Guest { is_vm, ..Guest::stopped(node.clone(), config) };
        self.0.world.lock().guests.insert(vmid, guest);
    }

    /// All guests.
    pub fn guests(&self) -> BTreeMap<Vmid, Guest> {
        self.0.world.lock().guests.clone()
    }

    /// Opens a connection to this container, or moves bytes on the one that there is.
    pub fn transfer(&self, vmid: Vmid, bytes: u64) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            *guest.connection.get_or_insert_default() += bytes;
        }
    }

    /// Closes the connection to this container.
    pub fn disconnect(&self, vmid: Vmid) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            guest.connection = None;
        }
    }

    /// Makes servers in this container listen on these addresses, and no others.
    pub fn listen(&self, vmid: Vmid, listeners: &[SocketAddr]) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            guest.listeners = listeners.to_vec();
        }
    }

    /// Makes this container use CPU time.
    pub fn use_cpu(&self, vmid: Vmid, time: Duration) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            guest.cpu_us += u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        }
    }

    /// Sets the memory that this container uses.
    pub fn use_memory(&self, vmid: Vmid, bytes: u64) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            guest.memory_bytes = bytes;
        }
    }

    /// Makes the init of this container ignore that it is asked to shut down.
    pub fn make_stubborn(&self, vmid: Vmid) {
        if let Some(guest) = self.0.world.lock().guests.get_mut(&vmid) {
            guest.stubborn = true;
        }
    }

    /// Changes a guest's config as an operator would.
    pub fn edit(&self, node: &NodeName, vmid: Vmid, change: impl FnOnce(&mut ContainerConfig)) {
        self.0.world.lock().edit(node, vmid, change);
    }

    /// Allocates a guest's volume.
    pub fn add_volume(&self, node: &NodeName, vmid: Vmid) {
        self.alloc(node, vmid, 0);
    }

    /// Allocates a volume under a vmid, as an operator does with `pvesm alloc`. Returns its name.
    pub fn alloc(&self, node: &NodeName, vmid: Vmid, disk: u32) -> String {
        let volume = format!("local-zfs:subvol-{vmid}-disk-{disk}");
        let mut world = self.0.world.lock();
        world.volumes.entry((node.clone(), vmid)).or_default().insert(volume.clone());
        volume
    }

    /// Removes a volume as an operator would.
    pub fn free(&self, volume: &str) {
        self.0.world.lock().volumes.values_mut().for_each(|set| {
            set.remove(volume);
        });
    }

    /// Starts or stops a container as an operator would.
    pub fn switch(&self, vmid: Vmid, on: bool) {
        self.0.world.lock().switch(vmid, on);
        if on {
            self.0.booted(vmid);
        }
    }

    /// Moves a stopped container to another node, as an operator would.
    pub fn migrate(&self, vmid: Vmid, to: &NodeName) {
        self.0.world.lock().migrate(vmid, to);
    }

    /// Removes a guest as an operator would, with its volumes.
    pub fn remove(&self, vmid: Vmid) {
        let mut world = self.0.world.lock();
        if let Some(guest) = world.guests.remove(&vmid) {
            world.free_volumes(&guest.node, vmid, |_| true);
        }
    }

    /// Volumes on the storages, by node and the vmid in their name.
    pub fn volumes(&self) -> BTreeMap<(NodeName, Vmid), BTreeSet<String>> {
        self.0.world.lock().volumes.clone()
    }

    /// Replaces a container with another, as an operator would. Returns the old one, stopped; does
    /// nothing and returns `None` while an operation on it is under way.
    pub fn replace(&self, vmid: Vmid, by: Guest) -> Option<Guest> {
        let mut world = self.0.world.lock();
        if world.busy.contains(&vmid) {
            return None;
        }
        let before = world.guests.insert(vmid, by)?;
        Some(Guest { pid: None, up_at: None, frozen: false, ..before })
    }

    /// Calls `hear` for every clone before it begins. Can be set once per cluster.
    pub fn on_clone(&self, hear: impl Fn(&NodeName, &CloneOrder) + Send + Sync + 'static) {
        drop(self.0.on_clone.0.set(Box::new(hear)));
    }

    /// Activates a defect.
    pub fn mutation(&self, mutation: Mutation) {
        self.0.world.lock().mutation = Some(mutation);
    }

    /// Sets the durations of operations that begin from now on.
    pub fn set_pace(&self, pace: Pace) {
        *self.0.pace.lock() = pace;
    }

    /// Plans a failure.
    pub fn inject(&self, fault: Fault) {
        self.0.faults.lock().push(fault);
    }

    /// Continues operations that hang.
    pub fn release(&self) {
        self.0.released.notify_waiters();
    }

    /// Sets whether every node sees the volumes of every other.
    pub fn set_shared(&self, shared: bool) {
        self.0.world.lock().shared = shared;
    }

    /// Sets what the hosts' kernels do when a limit is written to a cgroup.
    pub fn set_limiting(&self, limiting: Limiting) {
        self.0.world.lock().limiting = limiting;
    }

    /// Adds an address of a node on a further link of corosync.
    pub fn add_link(&self, address: std::net::IpAddr) {
        self.0.world.lock().links.insert(address);
    }

    /// Makes addresses of containers lead somewhere, as connections that can be cut, and commands run by this
    /// program.
    pub fn set_entry(&self, program: &str) {
        self.0.world.lock().entry = Some(program.into());
    }

    /// Sets whether the cluster has quorum.
    pub fn set_quorate(&self, quorate: bool) {
        self.0.world.lock().quorate = quorate;
    }

    /// Mounts or unmounts a node's /etc/pve.
    pub fn set_pmxcfs(&self, node: &NodeName, up: bool) {
        if let Some(node) = self.0.world.lock().nodes.get_mut(node) {
            node.pmxcfs = up;
        }
    }

    /// Multiplies the durations of a node's operations from now on.
    pub fn set_slow(&self, node: &NodeName, times: u32) {
        if let Some(node) = self.0.world.lock().nodes.get_mut(node) {
            node.slow = times;
        }
    }

    /// Sets the free space on a node's storage, bytes.
    pub fn set_room(&self, node: &NodeName, free: u64) {
        if let Some(node) = self.0.world.lock().nodes.get_mut(node) {
            node.room.free = free;
        }
    }

    /// Plays a power failure and reboot of a node: nothing runs, operations under way are cut off.
    pub fn crash(&self, node: &NodeName) {
        let mut world = self.0.world.lock();
        if let Some(node) = world.nodes.get_mut(node) {
            node.life += 1;
        }
        for guest in world.guests.values_mut().filter(|guest| guest.node == *node) {
            guest.pid = None;
            guest.up_at = None;
            guest.frozen = false;
        }
        drop(world);
        self.0.changed.notify_waiters();
    }

    /// Waits until no operation is under way.
    pub async fn settle(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.0.world.lock().busy.is_empty() {
                return;
            }
            changed.await;
        }
    }
}

impl Shared {
    fn booted(&self, vmid: Vmid) {
        // Nobody may watch.
        drop(self.boots.send(vmid));
    }

    fn pace(&self) -> Pace {
        *self.pace.lock()
    }

    /// Next number of SplitMix64: small, and the same for a seed on every machine.
    fn random(&self) -> u64 {
        let mut state = self.random.lock();
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn vary(&self, duration: Duration) -> Duration {
        let percent = u32::try_from(self.random() % 26).unwrap_or(0);
        duration * (100 + percent) / 100
    }

    fn take_fault(&self, op: Op, node: &NodeName, vmid: Vmid) -> Option<Trouble> {
        let mut faults = self.faults.lock();
        let hits = |fault: &Fault| {
            fault.op == op
                && fault.node.as_ref().is_none_or(|n| n == node)
                && fault.vmid.is_none_or(|v| v == vmid)
        };
        let at = faults.iter().position(hits)?;
        Some(faults.remove(at).trouble)
    }
}
