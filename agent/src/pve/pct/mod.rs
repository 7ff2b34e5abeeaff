//! A real node (or one of the lab, which it cannot tell apart): `pct` for changes of a container,
//! files for reads.
//!
//! Every change runs on a task of its own and under a lock of its container in this process: it
//! continues when its caller has gone, and a later change waits for it.

mod boots;
mod destroy;
mod driver;
mod edit;
mod move_config;
mod pause;
mod rooms;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use daemon::keyed_lock::KeyedLock;
use futures_util::future::BoxFuture;
use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::Size,
};
use tokio::time::Instant;

use super::{
    CloneOrder, Cluster, ContainerConfig, Error, ErrorKind, HostPaths, Mark, Operation, Result,
    Settings,
    block_device::KnownDevices,
    cluster,
    command::Command,
    container,
    files::Files,
    known::{Init, Known},
    looks::{Looks, Shared},
    outcome, ownership, pmxcfs, tags, worker,
};
use crate::{
    run::{self, Program, Runner},
    sys::{pidfd, proc, read},
};

/// Deadline of the calls that take none.
const CALL: Duration = Duration::from_secs(60);

/// One PVE node.
#[derive(Debug, Clone)]
pub struct Pct(Arc<Host>);

#[derive(Debug)]
struct Host {
    node: NodeName,
    places: HostPaths,
    runner: Runner,
    files: Files,
    looks: Looks,
    /// Looks at what listens in a container.
    listeners: Shared<Vec<SocketAddr>>,
    /// Locks of the containers with a change under way.
    locks: KeyedLock<Vmid>,
    rooms: rooms::Rooms,
    known: Known,
    disks: KnownDevices,
}

impl Pct {
    /// Creates the node of this name, whose commands `runner` runs.
    pub fn new(node: NodeName, places: HostPaths, runner: Runner) -> Self {
        Self(Arc::new(Host {
            node,
            places,
            runner,
            files: Files::default(),
            looks: Looks::default(),
            listeners: Shared::default(),
            locks: KeyedLock::default(),
            rooms: rooms::Rooms::default(),
            known: Known::default(),
            disks: KnownDevices::default(),
        }))
    }

    /// Runs a change to its end on a task of its own.
    async fn change(
        &self,
        op: Operation,
        vmid: Vmid,
        steps: impl for<'a> FnOnce(&'a Host) -> BoxFuture<'a, Result<()>> + Send + 'static,
    ) -> Result<(), Error> {
        let host = Arc::clone(&self.0);
        let task = self.0.runner.tracker().spawn(async move {
            let _lock = host.locks.lock(vmid).await;
            let start = Instant::now();
            let result = steps(&host).await;
            let ms = daemon::clock::millis(start.elapsed());
            tracing::debug!(%op, %vmid, ms, ok = result.is_ok(), "container change ended");
            result
        });
        let gone = |_| Err(ErrorKind::Failed("the agent is shutting down".to_owned()));
        task.await.unwrap_or_else(gone).map_err(|kind| Error { op, vmid: Some(vmid), kind })
    }
}

impl Host {
    fn config_path(&self, vmid: Vmid) -> PathBuf {
        self.places.root.join(pmxcfs::config(&self.node, vmid))
    }

    async fn cluster(&self) -> Cluster {
        let read = |name| self.files.read(self.places.root.join(name));
        let root = self.places.root.clone();
        let signs = self.files.blocking(move || Ok(cluster::Signs::read(&root)));
        let (members, guests, manager, corosync, signs) = tokio::join!(
            read(pmxcfs::MEMBERS),
            read(pmxcfs::GUESTS),
            read("ha/manager_status"),
            read(cluster::COROSYNC_CONF),
            signs
        );
        let members = members.inspect_err(|error| tracing::warn!(%error, "could not read pmxcfs"));
        let (members, guests, manager) =
            (members.ok().flatten(), guests.ok().flatten(), manager.ok().flatten());
        // Signs that cannot be read allow no change.
        let signs = signs.unwrap_or(cluster::Signs { corosync_conf: true, writable: false });
        let links = corosync.ok().flatten().map(|bytes| cluster::links(&bytes));
        Cluster {
            links: links.unwrap_or_default(),
            ..cluster::cluster(members.as_deref(), guests.as_deref(), manager.as_deref(), signs)
        }
    }

    /// Refuses a change without quorum: `pct destroy` would then remove the volume and keep the
    /// config.
    async fn check_quorum(&self) -> Result<Cluster> {
        let cluster = self.cluster().await;
        if cluster.quorate {
            return Ok(cluster);
        }
        let why = if cluster.members.is_empty() { "pmxcfs is down" } else { "no quorum" };
        Err(ErrorKind::NoQuorum(why.to_owned()))
    }

    /// Checks that pmxcfs is mounted: only then an absent config means that there is no container.
    async fn check_mounted(&self) -> Result<()> {
        match self.files.read(self.places.root.join(pmxcfs::MEMBERS)).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(ErrorKind::NoQuorum("pmxcfs is down".to_owned())),
            Err(error) => Err(unread(&error)),
        }
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>> {
        let init = self.init(vmid).await;
        let bytes =
            self.files.read(self.config_path(vmid)).await.map_err(|error| unread(&error))?;
        if bytes.is_none() {
            self.check_mounted().await?;
        }
        let config = bytes.map(|bytes| ContainerConfig::parse(&bytes));
        self.known.note(vmid, config.as_ref(), init);
        Ok(config)
    }

    /// Looks into a container, in its turn; `None` when that does not come in time. What a tenant makes is read
    /// here alone, and never on a thread of the runtime.
    async fn look_into<T: Send + 'static>(
        &self,
        vmid: Vmid,
        look: impl FnOnce(&HostPaths) -> T + Send + 'static,
    ) -> Option<T> {
        let places = self.places.clone();
        self.looks.at(vmid, move || look(&places)).await
    }

    /// Init of a container: the one that was found last, as long as that runs; else it is looked for.
    async fn init(&self, vmid: Vmid) -> Option<Init> {
        let HostPaths { proc, cgroup_root, .. } = &self.places;
        if !container::has_cgroup(cgroup_root, vmid) {
            return None;
        }
        if let Some(init) = self.known.init(proc, vmid) {
            return Some(init);
        }
        let found =
            self.look_into(vmid, move |at| container::init(&at.proc, &at.cgroup_root, vmid));
        found.await.flatten()
    }

    /// Mark that a container carries, or carried when /etc/pve could last be read.
    async fn mark_of(&self, vmid: Vmid) -> Result<Option<Mark>> {
        match self.config(vmid).await {
            Ok(config) => Ok(config.and_then(|config| config.mark())),
            Err(error @ ErrorKind::NoQuorum(_)) => {
                self.known.mark(vmid, self.init(vmid).await).map(Some).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>> {
        let dir = self.places.root.join(pmxcfs::configs(&self.node));
        let (known, proc) = (self.known.clone(), self.places.proc.clone());
        let read = self.files.blocking(move || {
            // Those of other containers are looked for one by one, in their own turns: see `config`.
            let (mut configs, inits) = (BTreeMap::new(), known.inits(&proc));
            for entry in std::fs::read_dir(dir)? {
                let path = entry?.path();
                let name = path.file_name().and_then(|name| name.to_str());
                // Skips PVE's half-written files, `ID.conf.tmp.PID`.
                let Some(id) = name.and_then(|name| name.strip_suffix(".conf")) else { continue };
                let Ok(vmid) = id.parse() else { continue };
                match read::whole(&path, read::LARGE) {
                    Ok(bytes) => drop(configs.insert(vmid, ContainerConfig::parse(&bytes))),
                    // Removed since the directory was read.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            Ok((configs, inits))
        });
        let (configs, inits) = read.await.map_err(|error| unread(&error))?;
        self.check_mounted().await?;
        for (vmid, init) in inits {
            self.known.note(vmid, configs.get(&vmid), Some(init));
        }
        self.known.retain(|vmid| configs.contains_key(vmid));
        Ok(configs)
    }

    /// Config of a sandbox of ours that nobody has locked.
    async fn ours(&self, vmid: Vmid) -> Result<ContainerConfig> {
        let config = self.config(vmid).await?.ok_or_else(|| self.missing(vmid))?;
        ownership::marked(&config, vmid)?;
        match config.lock() {
            Some(lock) => Err(ErrorKind::Locked(format!("CT is locked ({lock})"))),
            None => Ok(config),
        }
    }

    fn missing(&self, vmid: Vmid) -> ErrorKind {
        let file = pmxcfs::config(&self.node, vmid);
        ErrorKind::NotFound(format!("Configuration file '{}' does not exist", file.display()))
    }

    fn running(&self, vmid: Vmid) -> bool {
        container::running(&self.places.proc, &self.places.lxc_dir, vmid)
    }

    async fn pct(&self, command: Command<'_>, deadline: Instant) -> Result<()> {
        let program = Program { path: self.places.pct.clone(), arguments: command.arguments() };
        self.run(Some(command.op()), program, deadline).await.map(drop)
    }

    /// Runs `pct`, or another tool for no operation of its own, and returns its stdout.
    async fn run(
        &self,
        op: Option<Operation>,
        program: Program,
        deadline: Instant,
    ) -> Result<String> {
        Self::judged(op, self.runner.run(program, deadline).await)
    }

    fn judged(op: Option<Operation>, done: Result<run::Finished, run::Error>) -> Result<String> {
        match done {
            Ok(done) => {
                outcome::judge(op, done.exit, &done.stdout, &done.stderr)?;
                Ok(done.stdout)
            }
            Err(error @ (run::Error::Deadline { .. } | run::Error::NoTurn)) => {
                Err(ErrorKind::Deadline(error.to_string()))
            }
            Err(error @ (run::Error::Start { .. } | run::Error::Gone)) => {
                let chain = daemon::chain::Chain(&error).to_string();
                Err(ErrorKind::Failed(chain))
            }
        }
    }

    async fn clone_template(&self, order: CloneOrder, deadline: Instant) -> Result<()> {
        // Checked here, because PVE refuses only after loading its half second of Perl.
        if let Some(node) = self.check_quorum().await?.guests.get(&order.vmid) {
            let text = format!("{} already exists on node '{node}'", order.vmid);
            return Err(ErrorKind::VmidTaken(text));
        }
        let template = self.config(order.template).await?;
        let template = template.ok_or_else(|| self.missing(order.template))?;
        ownership::clonable(&template, order.template)?;
        if let Some(lock) = template.lock() {
            return Err(ErrorKind::Locked(format!("CT is locked ({lock})")));
        }
        self.pct(Command::Clone(&order), deadline).await?;
        let config = self.config(order.vmid).await?.ok_or_else(|| self.missing(order.vmid))?;
        if config.mark().as_ref() != Some(&order.mark) || config.rootfs().is_none() {
            let text = "pct clone said that it succeeded, but the config is not the clone's";
            return Err(ErrorKind::Failed(text.to_owned()));
        }
        Ok(())
    }

    async fn configure(&self, vmid: Vmid, settings: Settings) -> Result<()> {
        self.check_quorum().await?;
        let config = self.ours(vmid).await?;
        if self.running(vmid) {
            return Err(ErrorKind::WrongState(format!("CT {vmid} is running")));
        }
        let set = Command::Set(vmid, &settings, config.get("net0"));
        self.pct(set, Instant::now() + CALL).await?;
        // Written without `pct`, which would load its half second of Perl once more.
        self.edit(vmid, move |config| {
            ownership::marked(config, vmid)?;
            tags::put(config);
            Ok(())
        })
        .await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Instant) -> Result<()> {
        self.check_quorum().await?;
        let before = self.ours(vmid).await?;
        if before.rootfs_gib() >= gib {
            return Ok(());
        }
        if self.running(vmid) && !before.grows_running() {
            let text = format!("the root of CT {vmid} is mounted read-only: it grows when stopped");
            return Err(ErrorKind::WrongState(text));
        }
        let command = Command::Resize(vmid, gib);
        let program = Program { path: self.places.pct.clone(), arguments: command.arguments() };
        // With a stopped container this takes half a minute: e2fsck and resize2fs each wait to see
        // whether another host has the file system mounted.
        let done = self.runner.run_waiting(program, deadline).await;
        let said = Self::judged(Some(command.op()), done)?;
        // The exit code is 0 also when nothing grew, or only the volume without its file system.
        if let Some(why) = outcome::not_grown(&said) {
            return Err(ErrorKind::Failed(why));
        }
        let now = self.ours(vmid).await?.rootfs_gib();
        if now < gib {
            let text = format!("pct resize said that it succeeded, but the disk has {now} GiB");
            return Err(ErrorKind::Failed(text));
        }
        Ok(())
    }

    async fn set_limits(&self, vmid: Vmid, owner: SandboxId, size: Size) -> Result<()> {
        self.check_quorum().await?;
        self.owned(vmid, owner).await?;
        self.ours(vmid).await?;
        self.pct(Command::Limits(vmid, size), Instant::now() + CALL).await?;
        let config = self.ours(vmid).await?;
        if config.cores() == Some(size.cpu_cores) && config.memory_mib() == size.memory_mib {
            return Ok(());
        }
        let text = "pct set said that it succeeded, but the config has other limits";
        Err(ErrorKind::Failed(text.to_owned()))
    }

    async fn start(&self, vmid: Vmid, deadline: Instant) -> Result<()> {
        self.check_quorum().await?;
        self.end_pause(vmid).await?;
        self.ours(vmid).await?;
        if self.running(vmid) {
            return Ok(());
        }
        self.pct(Command::Start(vmid), deadline).await?;
        if self.running(vmid) {
            return Ok(());
        }
        Err(ErrorKind::Failed("the container's init ended right after the start".to_owned()))
    }

    /// Sends the signal past LXC's monitor, which can hang.
    async fn halt(&self, vmid: Vmid, owner: SandboxId) -> Result<()> {
        self.owned(vmid, owner).await?;
        let Some(init) = self.init(vmid).await else { return Ok(()) };
        let config = self.config(vmid).await.ok().flatten();
        let configured = config.and_then(|config| config.get("lxc.signal.halt").map(str::to_owned));
        let number = self.look_into(vmid, move |at| {
            container::halt_signal(&at.proc, init.pid, configured.as_deref())
        });
        let number = number.await.flatten().ok_or_else(|| {
            ErrorKind::WrongState(format!("the init of CT {vmid} does not take the signal"))
        })?;
        pidfd::signal(init.pid, number, || init.runs(&self.places.proc))
            .map_err(|error| ErrorKind::Failed(format!("its init could not be signalled: {error}")))
    }

    /// Stops without quorum, as PVE does, because that writes nothing to /etc/pve. Only removing
    /// the lock of a paused container needs quorum; PVE would refuse to stop it while locked.
    async fn stop(&self, vmid: Vmid, deadline: Instant) -> Result<()> {
        self.end_pause(vmid).await?;
        if !self.running(vmid) {
            // With nothing to stop, a lock does not matter.
            let config = self.config(vmid).await?.ok_or_else(|| self.missing(vmid))?;
            return ownership::marked(&config, vmid);
        }
        self.ours(vmid).await?;
        self.pct(Command::Stop(vmid), deadline).await?;
        if self.running(vmid) {
            return Err(ErrorKind::Failed("the container runs on".to_owned()));
        }
        Ok(())
    }

    async fn unlock_template(&self, template: Vmid) -> Result<()> {
        self.check_quorum().await?;
        let config = self.config(template).await?.ok_or_else(|| self.missing(template))?;
        match config.lock() {
            None => return Ok(()),
            Some("disk") if config.is_template() => {}
            Some(lock) => return Err(ErrorKind::Locked(format!("CT is locked ({lock})"))),
        }
        let busy = self.processes(move |processes| worker::cloning(processes, template)).await?;
        if let Some(pid) = busy.first() {
            let text = format!("CT is locked (disk), and process {pid} still clones it");
            return Err(ErrorKind::Locked(text));
        }
        self.pct(Command::Unlock(template), Instant::now() + CALL).await
    }

    /// Pids of the host's processes that `pick` selects.
    async fn processes(
        &self,
        pick: impl FnOnce(&[proc::Process]) -> Vec<u32> + Send + 'static,
    ) -> Result<Vec<u32>> {
        let root = self.places.proc.clone();
        // Those of tenants are passed over, but how many there are is up to them.
        let picked = self.looks.at_all(move || pick(&proc::host_processes(&root)));
        picked.await.ok_or_else(|| {
            let text = "the processes of the host could not be looked at in time";
            ErrorKind::NoQuorum(text.to_owned())
        })
    }
}

fn unread(error: &std::io::Error) -> ErrorKind {
    ErrorKind::NoQuorum(format!("the host's files could not be read: {error}"))
}

#[cfg(test)]
mod tests;
