//! One node of the fake cluster, as the trait `Pve` asks for it.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::stream::BoxStream;
use proto::{
    id::{SandboxId, Vmid},
    name::{NodeName, Port},
    spec::Size,
};
use tokio::time::Instant;
use tokio_stream::{StreamExt as _, wrappers::BroadcastStream};

use super::{FakePve, Guest, Mutation, Op, membership::init_with, work::Work, world::missing};
use crate::pve::{
    CloneOrder, CloneSite, Cluster, Connection, ContainerConfig, Error, ErrorKind, Init, IoLimited,
    IoMax, Limited, Mark, Operation, OwnVolumes, Pve, Settings, StorageRoom, Usage, cluster,
};

/// Deadline of the operations that take none.
const CALL: Duration = Duration::from_secs(60);

impl FakePve {
    /// Runs an operation to its end, even if its caller stops waiting.
    async fn run<F>(
        &self,
        op: Op,
        vmid: Vmid,
        deadline: Duration,
        steps: impl FnOnce(Work) -> F + Send + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<(), ErrorKind>> + Send + 'static,
    {
        let (shared, node) = (Arc::clone(&self.shared), self.node.clone());
        let deadline = Instant::now() + deadline;
        let task = self.shared.tracker.spawn(async move {
            steps(Work::begin(shared, node, op, vmid, deadline).await?).await
        });
        let gone = |_| Err(ErrorKind::Failed("the operation has gone".to_owned()));
        task.await.unwrap_or_else(gone).map_err(|kind| Error {
            op: op.operation(),
            vmid: Some(vmid),
            kind,
        })
    }

    pub(super) fn read_error(op: Operation, vmid: Option<Vmid>) -> Error {
        let kind = ErrorKind::NoQuorum("/etc/pve is not mounted".to_owned());
        Error { op, vmid, kind }
    }

    pub(super) fn pmxcfs(&self) -> bool {
        self.shared.world.lock().nodes.get(&self.node).is_some_and(|node| node.pmxcfs)
    }
}

#[async_trait::async_trait]
impl Pve for FakePve {
    fn node(&self) -> &NodeName {
        &self.node
    }

    async fn cluster(&self) -> Cluster {
        if !self.pmxcfs() {
            return Cluster::default();
        }
        let world = self.shared.world.lock();
        let (members, signs) = world.members(&self.node);
        Cluster {
            links: world.links.clone(),
            guests: world.guests.iter().map(|(id, guest)| (*id, guest.node.clone())).collect(),
            ..cluster::cluster(Some(members.as_bytes()), None, None, signs)
        }
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error> {
        if !self.pmxcfs() {
            return Err(Self::read_error(Operation::Read, Some(vmid)));
        }
        let init = self.init_of(vmid);
        let world = self.shared.world.lock();
        let config = world.container(&self.node, vmid).map(|guest| guest.config.clone());
        self.known.note(vmid, config.as_ref(), init);
        Ok(config)
    }

    async fn carries(&self, mark: &Mark) -> Result<bool, Error> {
        let found = match self.config(mark.vmid).await {
            Ok(config) => config.and_then(|config| config.mark()),
            Err(error) => Some(self.known.mark(mark.vmid, self.init_of(mark.vmid)).ok_or(error)?),
        };
        Ok(found.as_ref() == Some(mark) || self.shared.world.lock().has(Mutation::Entry))
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error> {
        if !self.pmxcfs() {
            return Err(Self::read_error(Operation::List, None));
        }
        let mut world = self.shared.world.lock();
        world.destroy_strangers(&self.node);
        let here = |(_, guest): &(&Vmid, &Guest)| guest.node == self.node && !guest.is_vm;
        let guests: BTreeMap<_, _> = world.guests.iter().filter(here).collect();
        for (vmid, guest) in &guests {
            let init = guest.pid.map(init_with);
            self.known.note(**vmid, Some(&guest.config), init);
        }
        self.known.retain(|vmid| guests.contains_key(vmid));
        Ok(guests.into_iter().map(|(vmid, guest)| (*vmid, guest.config.clone())).collect())
    }

    async fn running(&self, vmid: Vmid) -> bool {
        Pve::init(self, vmid).await.is_some()
    }

    async fn init(&self, vmid: Vmid) -> Option<Init> {
        let world = self.shared.world.lock();
        let dead = |guest: &&Guest| guest.frozen && world.mutation == Some(Mutation::Frozen);
        let pid = world.container(&self.node, vmid).filter(|guest| !dead(guest))?.pid?;
        Some(init_with(pid))
    }

    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool {
        self.shared.world.lock().has_address(&self.node, vmid, ip, Instant::now())
    }

    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error> {
        let world = self.shared.world.lock();
        if world.container(&self.node, template).is_none() {
            let kind = missing(&self.node, template);
            return Err(Error { op: Operation::MeasureStorage, vmid: Some(template), kind });
        }
        Ok(world.nodes.get(&self.node).map(|node| node.room).unwrap_or_default())
    }

    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error> {
        let world = self.shared.world.lock();
        let volumes = world.volumes.get(&(self.node.clone(), vmid));
        Ok(volumes.into_iter().flatten().cloned().collect())
    }

    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error> {
        let world = self.shared.world.lock();
        let here = world.volumes.iter().filter(|((node, _), _)| *node == self.node);
        Ok(here.map(|((_, vmid), set)| (*vmid, set.iter().cloned().collect())).collect())
    }

    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error> {
        let template = self.config(template).await?.unwrap_or_default();
        let hidden = self.shared.world.lock().has(Mutation::Site);
        let volumes = if hidden { Vec::new() } else { self.volumes(vmid).await? };
        Ok(CloneSite { storages: template.storages(), volumes })
    }

    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error> {
        if let Some(hear) = self.shared.on_clone.0.get() {
            hear(&self.node, order);
        }
        let order = order.clone();
        self.run(Op::Clone, order.vmid, deadline, |work| work.clone_template(order)).await
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error> {
        let settings = settings.clone();
        self.run(Op::Set, vmid, CALL, |work| work.configure(settings)).await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error> {
        self.run(Op::Resize, vmid, deadline, move |work| work.resize(gib)).await
    }

    async fn set_limits(&self, vmid: Vmid, owner: &SandboxId, size: Size) -> Result<(), Error> {
        let owner = *owner;
        self.run(Op::Set, vmid, CALL, move |work| work.set_limits(owner, size)).await
    }

    async fn move_config_to(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        target: &NodeName,
    ) -> Result<(), Error> {
        let (owner, target) = (*owner, target.clone());
        self.run(Op::MoveConfig, vmid, CALL, move |work| work.move_config_to(owner, target)).await
    }

    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.run(Op::Start, vmid, deadline, Work::start).await
    }

    async fn limit_processes(&self, vmid: Vmid, max: u32) -> Result<Limited, Error> {
        let limited = self.shared.world.lock().limit_processes(&self.node, vmid, max);
        limited.map_err(|kind| Error { op: Operation::Limit, vmid: Some(vmid), kind })
    }

    async fn limit_io(&self, vmid: Vmid, max: IoMax) -> Result<IoLimited, Error> {
        let limited = self.shared.world.lock().limit_io(&self.node, vmid, max);
        limited.map_err(|kind| Error { op: Operation::Limit, vmid: Some(vmid), kind })
    }

    fn boots(&self) -> io::Result<BoxStream<'static, Mark>> {
        let (shared, node) = (Arc::clone(&self.shared), self.node.clone());
        let boots = BroadcastStream::new(shared.boots.subscribe());
        let mark = move |booted: Result<Vmid, _>| {
            // Some are not told when there are too many.
            let booted = booted.ok()?;
            shared.world.lock().container(&node, booted)?.config.mark()
        };
        Ok(Box::pin(boots.filter_map(mark)))
    }

    async fn halt(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.check_known(Op::Halt, vmid, owner)?;
        let owner = *owner;
        self.run(Op::Halt, vmid, CALL, move |work| work.halt(owner)).await
    }

    async fn recheck_ended(&self, _init: Init) {}

    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.run(Op::Stop, vmid, deadline, Work::stop).await
    }

    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error> {
        let (owner, volumes) = (*owner, volumes.clone());
        self.run(Op::Destroy, vmid, deadline, move |work| work.destroy(owner, volumes)).await
    }

    async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        self.run(Op::Unlock, template, CALL, Work::unlock_template).await
    }

    async fn mark(&self, mark: &Mark) -> Result<(), Error> {
        let mark = mark.clone();
        self.run(Op::Mark, mark.vmid, CALL, move |work| work.mark(mark)).await
    }

    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.run(Op::Unmark, vmid, CALL, move |work| work.unmark(owner)).await
    }

    async fn acquire_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.run(Op::PauseLock, vmid, CALL, move |work| work.acquire_pause_lock(owner)).await
    }

    async fn release_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.run(Op::PauseUnlock, vmid, CALL, move |work| work.release_pause_lock(owner)).await
    }

    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error> {
        self.check_known(Op::Freeze, vmid, owner)?;
        let owner = *owner;
        self.run(Op::Freeze, vmid, deadline, move |work| work.freeze(owner)).await
    }

    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.check_known(Op::Thaw, vmid, owner)?;
        let owner = *owner;
        self.run(Op::Thaw, vmid, CALL, move |work| work.thaw(owner)).await
    }

    async fn reclaim(&self, _: Vmid, _: u64) -> bool {
        false
    }

    async fn usage(&self, vmid: Vmid) -> Option<Usage> {
        let world = self.shared.world.lock();
        let guest = world.container(&self.node, vmid).filter(|guest| guest.pid.is_some())?;
        Some(Usage {
            memory_bytes: guest.memory_bytes,
            memory_max_bytes: u64::from(guest.config.memory_mib()) << 20,
            pids: 3,
            cpu_us: guest.cpu_us,
            frozen: guest.frozen,
            ..Usage::default()
        })
    }

    async fn connections(&self, vmid: Vmid) -> Option<Vec<Connection>> {
        let world = self.shared.world.lock();
        let bytes = world.container(&self.node, vmid).and_then(|guest| guest.connection);
        let remote = SocketAddr::from(([192, 0, 2, 1], 443));
        Some(bytes.map(|bytes| Connection { id: 1, remote, bytes }).into_iter().collect())
    }

    async fn listens_on_loopback(&self, vmid: Vmid, port: Port) -> bool {
        let listeners = self.listeners(vmid).await;
        listeners.iter().any(|at| at.port() == port.get() && at.ip().to_canonical().is_loopback())
    }

    async fn listeners(&self, vmid: Vmid) -> Vec<SocketAddr> {
        let world = self.shared.world.lock();
        let guest = world.container(&self.node, vmid).filter(|guest| guest.pid.is_some());
        let mut listeners = guest.map(|guest| guest.listeners.clone()).unwrap_or_default();
        listeners.sort_by_key(|at| (at.port(), at.ip()));
        listeners
    }

    async fn processes(&self, _: Vmid) -> Vec<u32> {
        Vec::new()
    }

    async fn frozen(&self, vmid: Vmid) -> bool {
        let world = self.shared.world.lock();
        world.container(&self.node, vmid).is_some_and(|guest| guest.frozen)
    }

    fn enter(&self, _: Vmid) -> Option<Vec<std::ffi::OsString>> {
        self.shared.world.lock().entry.clone().map(|program| vec![program])
    }
}
