//! State of the fake cluster, and the effect of PVE's operations on it. No time, no tasks: `super`
//! runs the steps one after another and injects failures.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
};

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};
use tokio::time::Instant;

use super::{KernelLimits, Limiting, Membership, Mutation};
use crate::pve::{
    CloneOrder, ContainerConfig, ErrorKind, IoMax, Mark, OwnVolumes, Result, Settings, StorageRoom,
    cluster::Signs, config_file::Ip, interface, ownership, pause_lock, tags, volume,
};

/// Size of every clone's volume, bytes, for the space on storages.
const VOLUME_BYTES: u64 = 1 << 30;

/// Guest of any kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    /// Node of the guest.
    pub node: NodeName,
    /// Config; a virtual machine has one too, but no agent reads it.
    pub config: ContainerConfig,
    /// Whether this is a virtual machine: agents see only that its vmid is taken.
    pub is_vm: bool,
    /// Pid of its init, while it runs.
    pub pid: Option<u32>,
    /// Time from which it has its address.
    pub up_at: Option<Instant>,
    /// Bytes that a connection to it has moved; `None` while nobody is connected.
    pub connection: Option<u64>,
    /// Addresses that something in it listens on while it runs.
    pub listeners: Vec<SocketAddr>,
    /// CPU time that it has used, microseconds.
    pub cpu_us: u64,
    /// Whether it is frozen.
    pub frozen: bool,
    /// Whether its init ignores that it is asked to shut down.
    pub stubborn: bool,
    /// Memory that it uses while it runs, bytes.
    pub memory_bytes: u64,
    /// Limits that the kernel holds it to while it runs.
    pub limits: KernelLimits,
    /// Limit on its processes, since it was started.
    pub processes_max: Option<u32>,
    /// Limits on its use of disks, since it was started.
    pub io_max: Option<IoMax>,
}

impl Guest {
    /// Creates a stopped container.
    pub fn stopped(node: NodeName, config: ContainerConfig) -> Self {
        Self {
            node,
            config,
            is_vm: false,
            pid: None,
            up_at: None,
            connection: None,
            listeners: Vec::new(),
            cpu_us: 0,
            frozen: false,
            stubborn: false,
            memory_bytes: 64 << 20,
            limits: KernelLimits::default(),
            processes_max: None,
            io_max: None,
        }
    }
}

/// Node of the fake cluster.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Counter of the node's deaths: each cuts off the operations under way.
    pub life: u64,
    /// Whether pmxcfs is mounted.
    pub pmxcfs: bool,
    pub room: StorageRoom,
    /// Factor on the duration of everything.
    pub slow: u32,
    pub number: u32,
    pub cluster: Membership,
}

#[derive(Debug)]
pub(super) struct World {
    pub quorate: bool,
    /// Whether every node sees the volumes of every other.
    pub shared: bool,
    pub nodes: BTreeMap<NodeName, Node>,
    pub guests: BTreeMap<Vmid, Guest>,
    /// Volumes on the storages, by node and vmid, referenced or not.
    pub volumes: BTreeMap<(NodeName, Vmid), BTreeSet<String>>,
    /// Containers that a worker is busy with.
    pub busy: BTreeSet<Vmid>,
    pub next_pid: u32,
    pub mutation: Option<Mutation>,
    /// Behaviour of the hosts' kernels when a limit is written to a cgroup.
    pub limiting: Limiting,
    /// Addresses of the nodes on further links of corosync.
    pub links: BTreeSet<std::net::IpAddr>,
    /// Program that runs a command in a container; `None`: there is no way in.
    pub entry: Option<std::ffi::OsString>,
}

/// Remains that `destroy_owned` finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Remains {
    Nothing,
    VolumesOnly,
    Container,
}

impl World {
    pub(super) fn check_quorum(&self, node: &NodeName) -> Result<()> {
        match self.nodes.get(node) {
            Some(node) if node.pmxcfs && self.holds(node) => Ok(()),
            Some(_) | None => Err(ErrorKind::NoQuorum("cluster not ready - no quorum?".to_owned())),
        }
    }

    /// True where PVE allows changes.
    fn holds(&self, node: &Node) -> bool {
        match node.cluster {
            Membership::Member => self.quorate,
            Membership::Unheard => false,
            Membership::Alone => true,
        }
    }

    /// Checks the quorum as the agent of this node sees it. Wrong only with a defect.
    pub(super) fn believes_in_quorum(&self, node: &NodeName) -> Result<()> {
        if self.has(Mutation::Alone) && self.nodes.get(node).is_some_and(|node| node.pmxcfs) {
            return Ok(());
        }
        self.check_quorum(node)
    }

    /// `.members` of a node, as pmxcfs writes it, and the signs beside it.
    pub(super) fn members(&self, name: &NodeName) -> (String, Signs) {
        let bare = format!(r#"{{"nodename":"{name}","version":0}}"#);
        let fine = Signs { corosync_conf: false, writable: true };
        let Some(node) = self.nodes.get(name) else { return (bare, fine) };
        let signs = match node.cluster {
            Membership::Unheard if self.has(Mutation::Alone) => fine,
            Membership::Member | Membership::Unheard => {
                Signs { corosync_conf: true, writable: self.holds(node) }
            }
            Membership::Alone => fine,
        };
        if node.cluster != Membership::Member {
            return (bare, signs);
        }
        let list: Vec<_> = self
            .nodes
            .iter()
            .map(|(name, node)| {
                format!(r#""{name}":{{"id":{},"online":1,"ip":"127.0.0.1"}}"#, node.number)
            })
            .collect();
        let (list, quorate) = (list.join(","), u8::from(self.quorate));
        let text = format!(
            r#"{{"nodename":"{name}","cluster":{{"quorate":{quorate}}},"nodelist":{{{list}}}}}"#
        );
        (text, signs)
    }

    pub(super) fn container(&self, node: &NodeName, vmid: Vmid) -> Option<&Guest> {
        self.guests.get(&vmid).filter(|guest| guest.node == *node && !guest.is_vm)
    }

    pub(super) fn container_mut(&mut self, node: &NodeName, vmid: Vmid) -> Result<&mut Guest> {
        let found = self.guests.get_mut(&vmid).filter(|guest| guest.node == *node && !guest.is_vm);
        found.ok_or_else(|| missing(node, vmid))
    }

    pub(super) fn has(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// Returns a container that may be changed: marked for its own vmid, and not locked.
    pub(super) fn ours(&mut self, node: &NodeName, vmid: Vmid) -> Result<&mut Guest> {
        let unseen = self.has(Mutation::Ownership);
        let guest = self.container_mut(node, vmid)?;
        if !unseen {
            ownership::marked(&guest.config, vmid)?;
        }
        match guest.config.lock() {
            Some(lock) => Err(locked(lock)),
            None => Ok(guest),
        }
    }

    /// First write of a clone: only its lock.
    pub(super) fn claim(&mut self, node: &NodeName, vmid: Vmid) {
        let config = ContainerConfig::parse(b"lock: create\n");
        let guest = Guest::stopped(node.clone(), config);
        self.guests.insert(vmid, guest);
    }

    /// Next writes of a clone: the template's lock, and a config that names its owner before there
    /// is a volume.
    pub(super) fn begin_clone(&mut self, node: &NodeName, order: &CloneOrder) -> Result<()> {
        let template = self.container_mut(node, order.template)?;
        ownership::clonable(&template.config, order.template)?;
        if let Some(lock) = template.config.lock() {
            return Err(locked(lock));
        }
        let source = template.config.clone();
        if let Some(guest) = self.guests.get(&order.vmid) {
            let (kind, at) = (if guest.is_vm { "VM" } else { "CT" }, &guest.node);
            let text = format!("{kind} {} already exists on node '{at}'", order.vmid);
            return Err(ErrorKind::VmidTaken(text));
        }
        let mut config = source;
        for key in ["template", "rootfs", "lock"] {
            config.remove(key);
        }
        put(&mut config, "hostname", &order.mark.sandbox_id.to_string());
        put(&mut config, "lock", "create");
        config.set_description(&order.mark.to_string()).expect("a mark is short");
        self.edit(node, order.template, |config| put(config, "lock", "disk"));
        let guest = Guest::stopped(node.clone(), config);
        self.guests.insert(order.vmid, guest);
        Ok(())
    }

    /// Snapshots the template's volume, under the first free name.
    pub(super) fn make_volume(&mut self, node: &NodeName, vmid: Vmid) -> Result<String> {
        let room = self.nodes.get_mut(node).map(|node| &mut node.room);
        match room {
            Some(room) if room.free >= VOLUME_BYTES => room.free -= VOLUME_BYTES,
            Some(_) | None => {
                return Err(ErrorKind::StorageFull("No space left on device".to_owned()));
            }
        }
        let volumes = self.volumes.entry((node.clone(), vmid)).or_default();
        let name = |disk: u32| format!("subvol-{vmid}-disk-{disk}");
        let free = |name: &String| !volumes.contains(&format!("local-zfs:{name}"));
        let name = (0..).map(name).find(free).expect("there are many names");
        volumes.insert(format!("local-zfs:{name}"));
        Ok(name)
    }

    /// Last writes of a clone.
    pub(super) fn finish_clone(&mut self, node: &NodeName, order: &CloneOrder, volume: &str) {
        let (template, vmid) = (order.template, order.vmid);
        let source = self.container(node, template).and_then(|guest| guest.config.get("rootfs"));
        let options =
            source.and_then(|line| line.split_once(',')).map_or("size=2G", |(_, rest)| rest);
        let volume = format!("local-zfs:basevol-{template}-disk-0/{volume},{options}");
        self.edit(node, vmid, |config| {
            put(config, "rootfs", &volume);
            config.remove("lock");
        });
        self.edit(node, template, |config| config.remove("lock"));
    }

    /// Rolls back a clone that fails or is told to stop. A volume that is being made when the
    /// signal comes stays behind: PVE does not know it yet.
    pub(super) fn roll_back_clone(&mut self, node: &NodeName, order: &CloneOrder) {
        self.guests.remove(&order.vmid);
        self.edit(node, order.template, |config| config.remove("lock"));
    }

    pub(super) fn configure(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        settings: &Settings,
    ) -> Result<()> {
        let guest = self.ours(node, vmid)?;
        if guest.pid.is_some() {
            return Err(ErrorKind::WrongState(format!("CT {vmid} is running")));
        }
        let net0 = interface::net0(settings, guest.config.get("net0"));
        put(&mut guest.config, "net0", &net0);
        put(&mut guest.config, "cores", &settings.cores.to_string());
        put(&mut guest.config, "cpulimit", &settings.cores.to_string());
        put(&mut guest.config, "memory", &settings.memory_mib.to_string());
        put(&mut guest.config, "swap", "0");
        put(&mut guest.config, "onboot", "0");
        tags::put(&mut guest.config);
        Ok(())
    }

    /// True when the container runs already.
    pub(super) fn may_start(&mut self, node: &NodeName, vmid: Vmid) -> Result<bool> {
        let guest = self.ours(node, vmid)?;
        if guest.config.rootfs().is_none() {
            return Err(ErrorKind::Failed("missing 'rootfs' configuration".to_owned()));
        }
        Ok(guest.pid.is_some())
    }

    pub(super) fn start(&mut self, node: &NodeName, vmid: Vmid, up_at: Instant) -> Result<()> {
        let pid = self.next_pid;
        let guest = self.ours(node, vmid)?;
        guest.pid = Some(pid);
        guest.up_at = Some(up_at);
        guest.limits = KernelLimits::of(&guest.config);
        (guest.processes_max, guest.io_max) = (None, None);
        self.next_pid += 1;
        Ok(())
    }

    pub(super) fn is_stopped(&mut self, node: &NodeName, vmid: Vmid) -> Result<bool> {
        let stopped = self.container_mut(node, vmid)?.pid.is_none();
        if stopped && !self.has(Mutation::Ownership) {
            ownership::marked(&self.container_mut(node, vmid)?.config, vmid)?;
        }
        if stopped { Ok(true) } else { self.ours(node, vmid).map(|_| false) }
    }

    pub(super) fn stop(&mut self, node: &NodeName, vmid: Vmid) -> Result<()> {
        let guest = self.ours(node, vmid)?;
        guest.pid = None;
        guest.up_at = None;
        guest.frozen = false;
        Ok(())
    }

    /// Asks the init of a container to shut down. A frozen one does not get to it.
    pub(super) fn halt(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
    ) -> Result<(), ErrorKind> {
        let guest = self.owned(node, vmid, owner)?;
        if !guest.frozen && !guest.stubborn {
            (guest.pid, guest.up_at) = (None, None);
        }
        Ok(())
    }

    /// Starts or stops a container as an operator does, without checking the owner.
    pub(super) fn switch(&mut self, vmid: Vmid, on: bool) {
        let pid = self.next_pid;
        let Some(guest) = self.guests.get_mut(&vmid) else { return };
        guest.pid = on.then_some(pid);
        guest.up_at = on.then(Instant::now);
        guest.frozen = false;
        (guest.processes_max, guest.io_max) = (None, None);
        self.next_pid += u32::from(on);
    }

    /// Moves a config and its volumes to another node, as an operator does.
    pub(super) fn migrate(&mut self, vmid: Vmid, to: &NodeName) {
        let Some(guest) = self.guests.get_mut(&vmid) else { return };
        let from = std::mem::replace(&mut guest.node, to.clone());
        if let Some(volumes) = self.volumes.remove(&(from, vmid)) {
            self.volumes.insert((to.clone(), vmid), volumes);
        }
    }

    pub(super) fn move_config_to(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
        target: &NodeName,
    ) -> Result<()> {
        let there = self.guests.get(&vmid).is_some_and(|guest| guest.node == *target);
        if there && target != node {
            return Ok(());
        }
        if target == node || !self.nodes.get(target).is_some_and(|node| node.pmxcfs) {
            let text = format!("{target} is no other node of the cluster that is online");
            return Err(ErrorKind::WrongState(text));
        }
        let shared = self.shared;
        let guest = self.ours(node, vmid)?;
        ownership::owned(&guest.config, vmid, owner)?;
        if guest.pid.is_some() {
            return Err(ErrorKind::WrongState(format!("CT {vmid} is running")));
        }
        if !shared {
            return Err(ErrorKind::WrongState(format!("{target} does not see its volumes")));
        }
        self.migrate(vmid, target);
        Ok(())
    }

    /// Returns a container of this owner.
    pub(super) fn owned(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
    ) -> Result<&mut Guest> {
        let unseen = self.has(Mutation::Ownership);
        let guest = self.container_mut(node, vmid)?;
        if !unseen {
            ownership::owned(&guest.config, vmid, owner)?;
        }
        Ok(guest)
    }

    pub(super) fn mark(&mut self, node: &NodeName, mark: &Mark) -> Result<()> {
        self.check_quorum(node)?;
        ownership::mark(&mut self.container_mut(node, mark.vmid)?.config, mark)
    }

    pub(super) fn unmark(&mut self, node: &NodeName, vmid: Vmid, owner: &SandboxId) -> Result<()> {
        self.check_quorum(node)?;
        if let Ok(guest) = self.container_mut(node, vmid) {
            ownership::unmark(&mut guest.config, owner);
        }
        Ok(())
    }

    pub(super) fn acquire_pause_lock(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
    ) -> Result<()> {
        self.check_quorum(node)?;
        if self.has(Mutation::PauseLock) {
            return Ok(());
        }
        pause_lock::acquire(&mut self.owned(node, vmid, owner)?.config)
    }

    pub(super) fn release_pause_lock(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
    ) -> Result<()> {
        let quorum = self.check_quorum(node);
        if !self.nodes.get(node).is_some_and(|node| node.pmxcfs) {
            return quorum;
        }
        let guest = self.owned(node, vmid, owner)?;
        if pause_lock::is_noted(&guest.config) {
            quorum?;
            pause_lock::release(&mut guest.config)?;
        }
        Ok(())
    }

    pub(super) fn freeze(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
        frozen: bool,
    ) -> Result<()> {
        let guest = self.owned(node, vmid, owner)?;
        if frozen && guest.pid.is_none() {
            return Err(ErrorKind::WrongState(format!("CT {vmid} not running")));
        }
        guest.frozen = frozen;
        Ok(())
    }

    /// Thaws a paused container and releases its lock, before a stop, a start or a destruction.
    pub(super) fn end_pause(&mut self, node: &NodeName, vmid: Vmid) -> Result<()> {
        let quorum = self.check_quorum(node);
        let Ok(guest) = self.container_mut(node, vmid) else { return Ok(()) };
        if ownership::marked(&guest.config, vmid).is_err() {
            return Ok(());
        }
        if pause_lock::is_noted(&guest.config) {
            quorum?;
            pause_lock::release(&mut guest.config)?;
        }
        guest.frozen = false;
        Ok(())
    }

    /// Finds the remains of a vmid, right before it is destroyed.
    pub(super) fn remains(
        &self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
        own: &OwnVolumes,
    ) -> Result<Remains> {
        let Some(guest) = self.guests.get(&vmid) else {
            let mut volumes = self.volumes.get(&(node.clone(), vmid)).into_iter().flatten();
            let some = volumes.any(|volume| own.owns(volume));
            return Ok(if some { Remains::VolumesOnly } else { Remains::Nothing });
        };
        if guest.node != *node || guest.is_vm {
            return Err(ErrorKind::NotOurs(format!("{vmid} is a guest of node {}", guest.node)));
        }
        if !self.has(Mutation::Ownership) {
            ownership::check(&guest.config, vmid, owner)?;
        }
        match guest.config.lock() {
            // No worker is busy with it, so the lock was left by a dead clone or destroy of ours.
            None | Some("create" | "destroyed") => Ok(Remains::Container),
            Some(_) if pause_lock::is_held(&guest.config) => Ok(Remains::Container),
            Some(lock) => Err(locked(lock)),
        }
    }

    /// Destroys marked containers that were not made here; only with a defect.
    pub(super) fn destroy_strangers(&mut self, node: &NodeName) {
        if self.has(Mutation::Strangers) {
            let volumes = &self.volumes;
            let ours = |vmid: &Vmid| volumes.contains_key(&(node.clone(), *vmid));
            self.guests.retain(|vmid, guest| {
                guest.node != *node || guest.config.mark().is_none() || ours(vmid)
            });
        }
    }

    pub(super) fn free_volumes(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        goes: impl Fn(&str) -> bool,
    ) {
        let all = self.volumes.remove(&(node.clone(), vmid)).unwrap_or_default();
        let (freed, stay): (BTreeSet<_>, BTreeSet<_>) = all.into_iter().partition(|v| goes(v));
        if !stay.is_empty() {
            self.volumes.insert((node.clone(), vmid), stay);
        }
        if let Some(node) = self.nodes.get_mut(node) {
            node.room.free += VOLUME_BYTES * u64::try_from(freed.len()).unwrap_or(0);
        }
    }

    /// Destroys all but the last write: the sandbox's volumes are gone, and its config says so.
    pub(super) fn half_destroy(&mut self, node: &NodeName, vmid: Vmid, own: &OwnVolumes) {
        let named = self.guests.get(&vmid).map(|guest| guest.config.own_volumes(vmid));
        let (named, all) = (named.unwrap_or_default(), self.has(Mutation::Volumes));
        let is_named = |text: &str| volume::key(text).is_some_and(|key| named.contains(&key));
        self.free_volumes(node, vmid, |text| all || is_named(text) || own.owns(text));
        if let Some(guest) = self.guests.get_mut(&vmid) {
            guest.config = ContainerConfig::parse(b"lock: destroyed\n");
            guest.pid = None;
            guest.frozen = false;
        }
    }

    pub(super) fn edit(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        change: impl FnOnce(&mut ContainerConfig),
    ) {
        if let Ok(guest) = self.container_mut(node, vmid) {
            change(&mut guest.config);
        }
    }

    pub(super) fn has_address(
        &self,
        node: &NodeName,
        vmid: Vmid,
        ip: Ipv4Addr,
        now: Instant,
    ) -> bool {
        let up = |guest: &&Guest| guest.up_at.is_some_and(|at| at <= now);
        let guest = self.container(node, vmid).filter(up);
        guest.and_then(|guest| guest.config.net0()).is_some_and(|net0| match net0.ip {
            Ip::Static(found, _) => found == ip,
            // The DHCP client accepts any address that it is given.
            Ip::Dhcp => true,
            Ip::Manual => false,
        })
    }
}

pub(super) fn locked(lock: &str) -> ErrorKind {
    ErrorKind::Locked(format!("CT is locked ({lock})"))
}

pub(super) fn missing(node: &NodeName, vmid: Vmid) -> ErrorKind {
    ErrorKind::NotFound(format!("Configuration file 'nodes/{node}/lxc/{vmid}.conf' does not exist"))
}

pub(super) fn put(config: &mut ContainerConfig, key: &str, text: &str) {
    config.set(key, text).expect("the fake's own values are one line");
}

/// Config of a template, as PVE writes one.
pub(super) fn template_config(vmid: Vmid) -> ContainerConfig {
    let text = format!(
        "arch: amd64\ncores: 1\nhostname: template\nmemory: 512\n\
         net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=dhcp,type=veth\n\
         ostype: debian\nrootfs: local-zfs:basevol-{vmid}-disk-0,size=2G\nswap: 512\n\
         template: 1\nunprivileged: 1\n"
    );
    ContainerConfig::parse(text.as_bytes())
}
