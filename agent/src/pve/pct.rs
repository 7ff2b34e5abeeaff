//! A real node (or one of the lab, which it cannot tell apart): `pct` for changes of a container,
//! files for reads.
//!
//! Every change runs on a task of its own and under a lock of its container in this process: it
//! continues when its caller has gone, and a later change waits for it.

mod destroy;
mod edit;
mod hand_to;
mod pause;
mod rooms;

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};
use serde::{Deserialize, Serialize};
use tokio::{sync::OwnedMutexGuard, time::Instant};

use super::{
    CloneOrder, CloneSite, Cluster, ContainerConfig, Error, ErrorKind, Mark, OwnVolumes, Pve,
    Settings, StorageRoom, Usage, cgroup, cluster,
    command::Command,
    container,
    files::Files,
    known::{Init, Known},
    outcome, ownership, tags, worker,
};
use crate::{
    run::{self, Program, Runner},
    sys::{netns, proc, read},
};

/// Paths on the host. The defaults are PVE's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostPaths {
    /// Mount point of pmxcfs.
    pub root: PathBuf,
    /// Program that changes containers.
    pub pct: PathBuf,
    /// Program that changes volumes.
    pub pvesm: PathBuf,
    /// Program that enters containers.
    pub lxc_attach: PathBuf,
    /// LXC's directory of containers, also part of the names of their sockets.
    pub lxc_dir: PathBuf,
    /// Directory of the locks that PVE's tools take on configs.
    pub lock_dir: PathBuf,
    /// Mount point of cgroup2.
    pub cgroup_root: PathBuf,
    /// Mount point of procfs.
    pub proc: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            root: "/etc/pve".into(),
            pct: "/usr/sbin/pct".into(),
            pvesm: "/usr/sbin/pvesm".into(),
            lxc_attach: "/usr/bin/lxc-attach".into(),
            lxc_dir: LXC_DIR.into(),
            lock_dir: "/run/lock/lxc".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            proc: "/proc".into(),
        }
    }
}

const LXC_DIR: &str = "/var/lib/lxc";

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
    /// One lock per container with a change under way.
    locks: Mutex<HashMap<Vmid, Weak<tokio::sync::Mutex<()>>>>,
    rooms: rooms::Rooms,
    known: Known,
}

impl Pct {
    /// Creates the node of this name, whose commands `runner` runs.
    pub fn new(node: NodeName, places: HostPaths, runner: Runner) -> Self {
        Self(Arc::new(Host {
            node,
            places,
            runner,
            files: Files::default(),
            locks: Mutex::default(),
            rooms: rooms::Rooms::default(),
            known: Known::default(),
        }))
    }

    /// Runs a change to its end on a task of its own.
    async fn change<F>(
        &self,
        op: &'static str,
        vmid: Vmid,
        steps: impl FnOnce(Arc<Host>) -> F + Send + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<(), ErrorKind>> + Send + 'static,
    {
        let host = Arc::clone(&self.0);
        let task = self.0.runner.tracker().spawn(async move {
            let _lock = host.lock(vmid).await;
            let start = Instant::now();
            let result = steps(Arc::clone(&host)).await;
            let ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::debug!(op, %vmid, ms, ok = result.is_ok(), "container change ended");
            result
        });
        let gone = |_| Err(ErrorKind::Failed("the agent is shutting down".to_owned()));
        task.await.unwrap_or_else(gone).map_err(|kind| Error { op, vmid, kind })
    }
}

impl Host {
    async fn lock(&self, vmid: Vmid) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let held = locks.get(&vmid).and_then(Weak::upgrade);
            held.unwrap_or_else(|| {
                let lock = Arc::default();
                locks.insert(vmid, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }

    fn config_path(&self, vmid: Vmid) -> PathBuf {
        self.configs_dir().join(format!("{vmid}.conf"))
    }

    fn configs_dir(&self) -> PathBuf {
        self.places.root.join("nodes").join(self.node.as_str()).join("lxc")
    }

    async fn cluster(&self) -> Cluster {
        let read = |name| self.files.read(self.places.root.join(name));
        let root = self.places.root.clone();
        let signs = self.files.blocking(move || Ok(cluster::Signs::read(&root)));
        let (members, guests, manager, signs) =
            tokio::join!(read(".members"), read(".vmlist"), read("ha/manager_status"), signs);
        let members = members.inspect_err(|error| tracing::warn!(%error, "could not read pmxcfs"));
        let (members, guests, manager) =
            (members.ok().flatten(), guests.ok().flatten(), manager.ok().flatten());
        // Signs that cannot be read allow no change.
        let signs = signs.unwrap_or(cluster::Signs { corosync_conf: true, writable: false });
        cluster::cluster(members.as_deref(), guests.as_deref(), manager.as_deref(), signs)
    }

    /// Refuses a change without quorum: `pct destroy` would then remove the volume and keep the
    /// config.
    async fn check_quorum(&self) -> Result<Cluster, ErrorKind> {
        let cluster = self.cluster().await;
        if cluster.quorate {
            return Ok(cluster);
        }
        let why = if cluster.members.is_empty() { "pmxcfs is down" } else { "no quorum" };
        Err(ErrorKind::NoQuorum(why.to_owned()))
    }

    /// Checks that pmxcfs is mounted: only then an absent config means that there is no container.
    async fn check_mounted(&self) -> Result<(), ErrorKind> {
        match self.files.read(self.places.root.join(".members")).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(ErrorKind::NoQuorum("pmxcfs is down".to_owned())),
            Err(error) => Err(unread(&error)),
        }
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, ErrorKind> {
        let init = self.init(vmid);
        let bytes =
            self.files.read(self.config_path(vmid)).await.map_err(|error| unread(&error))?;
        if bytes.is_none() {
            self.check_mounted().await?;
        }
        let config = bytes.map(|bytes| ContainerConfig::parse(&bytes));
        self.known.note(vmid, config.as_ref(), init);
        Ok(config)
    }

    fn init(&self, vmid: Vmid) -> Option<Init> {
        container::init(&self.places.proc, &self.places.cgroup_root, vmid)
    }

    /// Mark that a container carries, or carried when /etc/pve could last be read.
    async fn mark_of(&self, vmid: Vmid) -> Result<Option<Mark>, ErrorKind> {
        match self.config(vmid).await {
            Ok(config) => Ok(config.and_then(|config| config.mark())),
            Err(error @ ErrorKind::NoQuorum(_)) => {
                self.known.mark(vmid, self.init(vmid)).map(Some).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, ErrorKind> {
        let dir = self.configs_dir();
        let HostPaths { proc, cgroup_root, .. } = self.places.clone();
        let read = self.files.blocking(move || {
            let (mut configs, mut inits) = (BTreeMap::new(), BTreeMap::new());
            for entry in std::fs::read_dir(dir)? {
                let path = entry?.path();
                let name = path.file_name().and_then(|name| name.to_str());
                // Skips PVE's half-written files, `ID.conf.tmp.PID`.
                let Some(id) = name.and_then(|name| name.strip_suffix(".conf")) else { continue };
                let Ok(vmid) = id.parse() else { continue };
                inits.insert(vmid, container::init(&proc, &cgroup_root, vmid));
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
            self.known.note(vmid, configs.get(&vmid), init);
        }
        self.known.retain(|vmid| configs.contains_key(vmid));
        Ok(configs)
    }

    /// Config of a sandbox of ours that nobody has locked.
    async fn ours(&self, vmid: Vmid) -> Result<ContainerConfig, ErrorKind> {
        let config = self.config(vmid).await?.ok_or_else(|| self.missing(vmid))?;
        ownership::marked(&config, vmid)?;
        match config.lock() {
            Some(lock) => Err(ErrorKind::Locked(format!("CT is locked ({lock})"))),
            None => Ok(config),
        }
    }

    fn missing(&self, vmid: Vmid) -> ErrorKind {
        let file = format!("nodes/{}/lxc/{vmid}.conf", self.node);
        ErrorKind::NotFound(format!("Configuration file '{file}' does not exist"))
    }

    fn running(&self, vmid: Vmid) -> bool {
        container::running(&self.places.proc, &self.places.lxc_dir, vmid)
    }

    async fn pct(&self, command: Command<'_>, deadline: Instant) -> Result<(), ErrorKind> {
        let program = Program { path: self.places.pct.clone(), arguments: command.arguments() };
        self.run(command.op(), program, deadline).await.map(drop)
    }

    /// Runs a tool of PVE's and returns its stdout.
    async fn run(
        &self,
        op: &'static str,
        program: Program,
        deadline: Instant,
    ) -> Result<String, ErrorKind> {
        Self::judged(op, self.runner.run(program, deadline).await)
    }

    fn judged(
        op: &'static str,
        done: Result<run::Finished, run::Error>,
    ) -> Result<String, ErrorKind> {
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

    async fn clone_template(&self, order: &CloneOrder, deadline: Instant) -> Result<(), ErrorKind> {
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
        self.pct(Command::Clone(order), deadline).await?;
        let config = self.config(order.vmid).await?.ok_or_else(|| self.missing(order.vmid))?;
        if config.mark().as_ref() != Some(&order.mark) || config.rootfs().is_none() {
            let text = "pct clone said that it succeeded, but the config is not the clone's";
            return Err(ErrorKind::Failed(text.to_owned()));
        }
        Ok(())
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), ErrorKind> {
        self.check_quorum().await?;
        let config = self.ours(vmid).await?;
        if self.running(vmid) {
            return Err(ErrorKind::WrongState(format!("CT {vmid} is running")));
        }
        let set = Command::Set(vmid, settings, config.get("net0"));
        self.pct(set, Instant::now() + CALL).await?;
        // Written without `pct`, which would load its half second of Perl once more.
        self.edit(vmid, move |config| {
            ownership::marked(config, vmid)?;
            tags::put(config);
            Ok(())
        })
        .await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Instant) -> Result<(), ErrorKind> {
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
        let said = Self::judged(command.op(), done)?;
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

    async fn start(&self, vmid: Vmid, deadline: Instant) -> Result<(), ErrorKind> {
        self.check_quorum().await?;
        self.let_go(vmid).await?;
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

    /// Stops without quorum, as PVE does, because that writes nothing to /etc/pve. Only removing
    /// the lock of a paused container needs quorum; PVE would refuse to stop it while locked.
    async fn stop(&self, vmid: Vmid, deadline: Instant) -> Result<(), ErrorKind> {
        self.let_go(vmid).await?;
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

    async fn unlock_template(&self, template: Vmid) -> Result<(), ErrorKind> {
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
    ) -> Result<Vec<u32>, ErrorKind> {
        let root = self.places.proc.clone();
        let picked = self.files.blocking(move || Ok(pick(&proc::host_processes(&root))));
        picked.await.map_err(|error| unread(&error))
    }
}

fn unread(error: &std::io::Error) -> ErrorKind {
    ErrorKind::NoQuorum(format!("the host's files could not be read: {error}"))
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
        self.0.config(vmid).await.map_err(|kind| Error { op: "read", vmid, kind })
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error> {
        let error = |kind| Error { op: "list from", vmid: Vmid::MIN, kind };
        self.0.configs().await.map_err(error)
    }

    async fn running(&self, vmid: Vmid) -> bool {
        self.0.running(vmid)
    }

    async fn carries(&self, mark: &Mark) -> Result<bool, Error> {
        let vmid = mark.vmid;
        let found = self.0.mark_of(vmid).await.map_err(|kind| Error { op: "read", vmid, kind })?;
        Ok(found.as_ref() == Some(mark))
    }

    async fn init_pid(&self, vmid: Vmid) -> Option<u32> {
        let HostPaths { cgroup_root, proc, .. } = self.0.places.clone();
        // Blocking, because a tenant may have put many processes before the init.
        let found =
            tokio::task::spawn_blocking(move || container::init_pid(&proc, &cgroup_root, vmid));
        found.await.ok().flatten()
    }

    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool {
        let HostPaths { cgroup_root, proc, .. } = self.0.places.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let pid = container::init_pid(&proc, &cgroup_root, vmid)?;
            netns::has_address(&proc, pid, ip).ok()
        });
        asked.await.ok().flatten().unwrap_or(false)
    }

    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error> {
        let room = self.0.storage_room(template).await;
        room.map_err(|kind| Error { op: "measure the storage of", vmid: template, kind })
    }

    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error> {
        let volumes = self.0.volumes(vmid).await;
        volumes.map_err(|kind| Error { op: "find volumes of", vmid, kind })
    }

    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error> {
        let error = |kind| Error { op: "list volumes from", vmid: Vmid::MIN, kind };
        self.0.all_volumes().await.map_err(error)
    }

    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error> {
        let site = self.0.clone_site(template, vmid).await;
        site.map_err(|kind| Error { op: "find volumes of", vmid, kind })
    }

    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error> {
        let (order, deadline) = (order.clone(), Instant::now() + deadline);
        self.change("clone", order.vmid, move |host| async move {
            host.clone_template(&order, deadline).await
        })
        .await
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error> {
        let settings = settings.clone();
        self.change("set", vmid, move |host| async move { host.configure(vmid, &settings).await })
            .await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error> {
        let until = Instant::now() + deadline;
        self.change("resize", vmid, move |host| async move { host.resize(vmid, gib, until).await })
            .await
    }

    async fn hand_to(&self, vmid: Vmid, owner: &SandboxId, target: &NodeName) -> Result<(), Error> {
        let (owner, target) = (*owner, target.clone());
        self.change("hand over", vmid, move |host| async move {
            host.hand_to(vmid, owner, &target).await
        })
        .await
    }

    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + deadline;
        self.change("start", vmid, move |host| async move { host.start(vmid, deadline).await })
            .await
    }

    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + deadline;
        self.change("stop", vmid, move |host| async move { host.stop(vmid, deadline).await }).await
    }

    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error> {
        let (owner, volumes, deadline) = (*owner, volumes.clone(), Instant::now() + deadline);
        self.change("destroy", vmid, move |host| async move {
            host.destroy_owned(vmid, &owner, &volumes, deadline).await
        })
        .await
    }

    async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        self.change(
            "unlock",
            template,
            move |host| async move { host.unlock_template(template).await },
        )
        .await
    }

    async fn mark(&self, mark: &Mark) -> Result<(), Error> {
        let mark = mark.clone();
        self.change("mark", mark.vmid, move |host| async move { host.mark(mark).await }).await
    }

    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change("unmark", vmid, move |host| async move { host.unmark(vmid, owner).await }).await
    }

    async fn hold(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change("hold", vmid, move |host| async move { host.hold(vmid, &owner).await }).await
    }

    async fn release(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change("release", vmid, move |host| async move { host.release(vmid, &owner).await })
            .await
    }

    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error> {
        let (owner, deadline) = (*owner, Instant::now() + deadline);
        self.change(
            "freeze",
            vmid,
            move |host| async move { host.freeze(vmid, &owner, deadline).await },
        )
        .await
    }

    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let owner = *owner;
        self.change("thaw", vmid, move |host| async move { host.thaw(vmid, &owner).await }).await
    }

    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool {
        let HostPaths { cgroup_root, proc, .. } = self.0.places.clone();
        // The write returns only when the kernel is done.
        let done = tokio::task::spawn_blocking(move || {
            cgroup::has_swap(&proc) && cgroup::reclaim(&cgroup_root, vmid, bytes)
        });
        done.await.unwrap_or(false)
    }

    async fn usage(&self, vmid: Vmid) -> Option<Usage> {
        let HostPaths { cgroup_root, proc, .. } = self.0.places.clone();
        let read = tokio::task::spawn_blocking(move || {
            let at = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            let ns = u64::try_from(at.tv_sec).unwrap_or(0) * 1_000_000_000
                + u64::try_from(at.tv_nsec).unwrap_or(0);
            Some(Usage { at_ns: ns, ..cgroup::usage(&cgroup_root, &proc, vmid)? })
        });
        read.await.ok().flatten()
    }

    async fn connected(&self, vmid: Vmid) -> bool {
        let HostPaths { cgroup_root, proc, .. } = self.0.places.clone();
        let read = tokio::task::spawn_blocking(move || {
            let pid = container::init_pid(&proc, &cgroup_root, vmid)?;
            Some(container::connected(&proc, pid))
        });
        read.await.ok().flatten().unwrap_or(false)
    }

    async fn processes(&self, vmid: Vmid) -> Vec<u32> {
        let root = self.0.places.cgroup_root.clone();
        // Blocking, because a container may hold thousands of cgroups.
        let found = tokio::task::spawn_blocking(move || cgroup::processes(&root, vmid)).await;
        found.unwrap_or_default()
    }

    async fn frozen(&self, vmid: Vmid) -> bool {
        cgroup::frozen(&self.0.places.cgroup_root, vmid)
    }

    fn enter(&self, vmid: Vmid) -> Option<Vec<OsString>> {
        let HostPaths { lxc_attach, lxc_dir, .. } = &self.0.places;
        let mut argv: Vec<OsString> = vec![lxc_attach.into(), "-n".into(), vmid.to_string().into()];
        if lxc_dir.as_os_str() != LXC_DIR {
            argv.extend(["-P".into(), lxc_dir.into()]);
        }
        argv.extend(["--clear-env".into(), "--".into()]);
        Some(argv)
    }
}

#[cfg(test)]
mod tests;
