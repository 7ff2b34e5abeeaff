//! A real node, as the trait `Pve` asks for it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, stream::BoxStream};
use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};
use proto::{
    id::{SandboxId, Vmid},
    name::{NodeName, Port},
    spec::Size,
};
use tokio::time::Instant;

use super::{Pct, boots};
use crate::{
    pve::{
        CloneOrder, CloneSite, Cluster, Connection, ContainerConfig, Error, ErrorKind, HostPaths,
        Init, IoLimited, IoMax, Limited, Mark, Operation, OwnVolumes, Pve, Settings, StorageRoom,
        Usage, cgroup, container, io_limit, pause_lock, process_limit,
    },
    sys::{netns, pidfd},
};

impl Pct {
    /// Uses files of the host, and none that a tenant makes, on a thread that may wait; `None` when there is
    /// none any more.
    async fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&HostPaths) -> T + Send + 'static,
    ) -> Option<T> {
        let places = self.0.places.clone();
        tokio::task::spawn_blocking(move || work(&places)).await.ok()
    }

    /// Looks into a running container, whose init has this pid.
    async fn look_inside<T: Send + 'static>(
        &self,
        vmid: Vmid,
        look: impl FnOnce(&HostPaths, u32) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let looked = self.0.look_into(vmid, move |at| {
            let pid = container::init_pid(&at.proc, &at.cgroup_root, vmid)?;
            look(at, pid)
        });
        looked.await.flatten()
    }
}

/// Converts the result of writing a limit to the cgroup of a container.
fn limited<T>(vmid: Vmid, set: Option<io::Result<T>>) -> Result<T, Error> {
    let failed = |text| {
        let kind = ErrorKind::Failed(text);
        Error { op: Operation::Limit, vmid: Some(vmid), kind }
    };
    let set = set.ok_or_else(|| failed("the agent had no thread for it in time".to_owned()))?;
    set.map_err(|error| failed(error.to_string()))
}

#[async_trait::async_trait]
impl Pve for Pct {
    fn node(&self) -> &NodeName {
        &self.0.node
    }

    async fn cluster(&self) -> Cluster {
        self.0.cluster().await
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error> {
        let config = self.0.config(vmid).await;
        config.map_err(|kind| Error { op: Operation::Read, vmid: Some(vmid), kind })
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error> {
        let error = |kind| Error { op: Operation::List, vmid: None, kind };
        self.0.configs().await.map_err(error)
    }

    async fn running(&self, vmid: Vmid) -> bool {
        self.0.running(vmid)
    }

    async fn carries(&self, mark: &Mark) -> Result<bool, Error> {
        let vmid = mark.vmid;
        let error = |kind| Error { op: Operation::Read, vmid: Some(vmid), kind };
        let found = self.0.mark_of(vmid).await.map_err(error)?;
        Ok(found.as_ref() == Some(mark))
    }

    async fn init(&self, vmid: Vmid) -> Option<Init> {
        self.0.init(vmid).await
    }

    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool {
        let asked =
            self.look_inside(vmid, move |at, pid| netns::has_address(&at.proc, pid, ip).ok());
        asked.await.unwrap_or(false)
    }

    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error> {
        let room = self.0.storage_room(template).await;
        let op = Operation::MeasureStorage;
        room.map_err(|kind| Error { op, vmid: Some(template), kind })
    }

    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error> {
        let volumes = self.0.volumes(vmid).await;
        volumes.map_err(|kind| Error { op: Operation::FindVolumes, vmid: Some(vmid), kind })
    }

    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error> {
        let error = |kind| Error { op: Operation::ListVolumes, vmid: None, kind };
        self.0.all_volumes().await.map_err(error)
    }

    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error> {
        let site = self.0.clone_site(template, vmid).await;
        site.map_err(|kind| Error { op: Operation::FindVolumes, vmid: Some(vmid), kind })
    }

    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error> {
        let (order, deadline) = (order.clone(), Instant::now() + deadline);
        self.change(Operation::Clone, order.vmid, move |host| {
            host.clone_template(order, deadline).boxed()
        })
        .await
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error> {
        let settings = settings.clone();
        self.change(Operation::Set, vmid, move |host| host.configure(vmid, settings).boxed()).await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error> {
        let until = Instant::now() + deadline;
        self.change(Operation::Resize, vmid, move |host| host.resize(vmid, gib, until).boxed())
            .await
    }

    async fn set_limits(&self, vmid: Vmid, owner: &SandboxId, size: Size) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::SetLimits, vmid, move |host| {
            host.set_limits(vmid, owner, size).boxed()
        })
        .await
    }

    async fn move_config_to(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        target: &NodeName,
    ) -> Result<(), Error> {
        let (owner, target) = (*owner, target.clone());
        self.change(Operation::MoveConfig, vmid, move |host| {
            host.move_config_to(vmid, owner, target).boxed()
        })
        .await
    }

    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + deadline;
        self.change(Operation::Start, vmid, move |host| host.start(vmid, deadline).boxed()).await
    }

    async fn limit_processes(&self, vmid: Vmid, max: u32) -> Result<Limited, Error> {
        // The container's own cgroup, which nobody in it reaches.
        limited(vmid, self.on_thread(move |at| process_limit::set(at, vmid, max)).await)
    }

    async fn limit_io(&self, vmid: Vmid, max: IoMax) -> Result<IoLimited, Error> {
        let host = Arc::clone(&self.0);
        let set = self.0.look_into(vmid, move |at| io_limit::set(at, &host.disks, vmid, max));
        limited(vmid, set.await)
    }

    fn boots(&self) -> io::Result<BoxStream<'static, Mark>> {
        boots::watch(Arc::clone(&self.0))
    }

    async fn halt(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::Halt, vmid, move |host| host.halt(vmid, owner).boxed()).await
    }

    async fn recheck_ended(&self, init: Init) {
        let told = self.on_thread(move |at| {
            pidfd::signal(init.pid, Signal::SIGCHLD as i32, || init.runs(&at.proc))
        });
        if let Some(Err(error)) = told.await {
            tracing::debug!(pid = init.pid, %error, "init could not be told of ended processes");
        }
    }

    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + deadline;
        self.change(Operation::Stop, vmid, move |host| host.stop(vmid, deadline).boxed()).await
    }

    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error> {
        let (owner, volumes, deadline) = (*owner, volumes.clone(), Instant::now() + deadline);
        self.change(Operation::Destroy, vmid, move |host| {
            host.destroy_owned(vmid, owner, volumes, deadline).boxed()
        })
        .await
    }

    async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        self.change(Operation::Unlock, template, move |host| host.unlock_template(template).boxed())
            .await
    }

    async fn mark(&self, mark: &Mark) -> Result<(), Error> {
        let mark = mark.clone();
        self.change(Operation::Mark, mark.vmid, move |host| host.mark(mark).boxed()).await
    }

    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::Unmark, vmid, move |host| host.unmark(vmid, owner).boxed()).await
    }

    async fn acquire_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::PauseLock, vmid, move |host| {
            host.edit_pause_lock(vmid, owner, pause_lock::acquire).boxed()
        })
        .await
    }

    async fn release_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::PauseUnlock, vmid, move |host| {
            host.edit_pause_lock(vmid, owner, pause_lock::release).boxed()
        })
        .await
    }

    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error> {
        let (owner, deadline) = (*owner, Instant::now() + deadline);
        self.change(Operation::Freeze, vmid, move |host| host.freeze(vmid, owner, deadline).boxed())
            .await
    }

    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change(Operation::Thaw, vmid, move |host| host.thaw(vmid, owner).boxed()).await
    }

    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool {
        // The write returns only when the kernel is done.
        let HostPaths { proc, cgroup_root, .. } = self.0.places.clone();
        let done = self
            .0
            .looks
            .slow(move || cgroup::has_swap(&proc) && cgroup::reclaim(&cgroup_root, vmid, bytes));
        done.await.unwrap_or(false)
    }

    async fn usage(&self, vmid: Vmid) -> Option<Usage> {
        let read = self.0.look_into(vmid, move |at| {
            let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?);
            let at_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            Some(Usage { at_ns, ..cgroup::usage(&at.cgroup_root, &at.proc, vmid)? })
        });
        read.await.flatten()
    }

    async fn connections(&self, vmid: Vmid) -> Option<Vec<Connection>> {
        let read = self.0.look_into(vmid, move |at| {
            let Some(pid) = container::init_pid(&at.proc, &at.cgroup_root, vmid) else {
                return Some(Vec::new());
            };
            // A kernel without sock_diag still tells whether there is any.
            let unknown = || (!container::connected(&at.proc, pid)).then(Vec::new);
            netns::connections(&at.proc, pid).ok().or_else(unknown)
        });
        read.await.unwrap_or_default()
    }

    async fn listens_on_loopback(&self, vmid: Vmid, port: Port) -> bool {
        container::on_loopback(&self.listeners(vmid).await, port)
    }

    async fn listeners(&self, vmid: Vmid) -> Vec<SocketAddr> {
        let HostPaths { proc, cgroup_root, .. } = self.0.places.clone();
        // Anybody with a URL, or a token that reads, may ask as often as he likes.
        let read = self.0.listeners.at(&self.0.looks, vmid, move || {
            let pid = container::init_pid(&proc, &cgroup_root, vmid);
            pid.map(|pid| container::listeners(&proc, pid)).unwrap_or_default()
        });
        read.await.unwrap_or_default()
    }

    async fn processes(&self, vmid: Vmid) -> Vec<u32> {
        // A container may hold thousands of cgroups.
        let found = self.0.look_into(vmid, move |at| cgroup::processes(&at.cgroup_root, vmid));
        found.await.unwrap_or_default()
    }

    async fn frozen(&self, vmid: Vmid) -> bool {
        cgroup::frozen(&self.0.places.cgroup_root, vmid)
    }

    fn enter(&self, vmid: Vmid) -> Option<Vec<OsString>> {
        Some(self.0.places.attach(vmid))
    }
}
