//! Fake node whose containers can be entered: each is this machine, or the container that
//! `PVE_SANDBOX_EXEC_LXC` names, which must run.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::stream::BoxStream;
use proto::{
    id::{SandboxId, Vmid},
    name::{NodeName, Port},
    spec::Size,
};

use tokio::net::{UnixListener, UnixStream};

use crate::{
    journal::Record,
    pve::{
        CloneOrder, CloneSite, Cluster, Connection, ContainerConfig, Error, Init, IoLimited, IoMax,
        Limited, Mark, OwnVolumes, Pve, Settings, StorageRoom, Usage, fake::FakePve,
    },
    sandbox::exec::shims::Shims,
    shim::{Host, Parts, serve},
    sys::image,
};

/// Fake PVE whose containers can be entered; see the module.
#[derive(Debug)]
pub(super) struct Entered {
    fake: Arc<FakePve>,
    container: Option<String>,
    pub(super) frozen: AtomicBool,
    /// True when only the shim sees it frozen: it was frozen after the agent's check.
    pub(super) frozen_later: AtomicBool,
    /// True when a test has stopped the container.
    pub(super) down: AtomicBool,
    /// Looks at the processes, from the next one on, that miss them all.
    pub(super) blind_looks: AtomicU32,
    /// Script that stands in for the helper, when it lies.
    pub(super) lie: std::sync::Mutex<Option<String>>,
}

/// View of the container that a shim has.
#[derive(Debug)]
struct Inside(Arc<Entered>);

impl Host for Inside {
    fn processes(&self) -> Vec<u32> {
        let blind = self
            .0
            .blind_looks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if blind.is_ok() { Vec::new() } else { self.0.pids() }
    }

    fn frozen(&self) -> bool {
        self.0.frozen.load(Ordering::Relaxed) || self.0.frozen_later.load(Ordering::Relaxed)
    }

    fn runs(&self) -> bool {
        !self.0.down.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Vec<OsString> {
        // A script in place of the helper gets the helper's path as an argument.
        let lie = self.0.lie.lock().expect("no panic").clone();
        match lie {
            Some(script) => ["/bin/bash", "-c", &script].map(OsString::from).into(),
            None => Pve::enter(&*self.0, Vmid::MIN).expect("a way in"),
        }
    }
}

/// Shims that run in the test's own process, with the real helper.
#[derive(Debug)]
pub(super) struct Here {
    pub(super) entered: Arc<Entered>,
    pub(super) dir: tempfile::TempDir,
    /// Bytes that the outputs of one shim may use.
    pub(super) output_bytes_max: AtomicU64,
    /// Shims that serve; aborting one kills it.
    pub(super) serving: std::sync::Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Here {
    fn socket(&self, record: &Record) -> PathBuf {
        self.dir.path().join(format!("{}.sock", record.boot))
    }
}

#[async_trait::async_trait]
impl Shims for Here {
    fn sockets(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path()).expect("a directory").flatten();
        let sockets = entries.map(|entry| entry.path());
        sockets.filter(|path| path.extension().is_some_and(|end| end == "sock")).collect()
    }

    async fn find(&self, record: &Record) -> Option<UnixStream> {
        UnixStream::connect(self.socket(record)).await.ok()
    }

    async fn start(&self, record: &Record) -> std::io::Result<UnixStream> {
        let socket = self.socket(record);
        drop(std::fs::remove_file(&socket));
        let listener = UnixListener::bind(&socket)?;
        let parts = Parts {
            host: Arc::new(Inside(Arc::clone(&self.entered))),
            image: image::sealed("pve-sandbox-helper", image::HELPER)?,
            dir: self.dir.path().to_owned(),
            ids: self.dir.path().join("ids"),
            socket: socket.clone(),
            output_bytes_max: self.output_bytes_max.load(Ordering::Relaxed),
        };
        let serving = tokio::spawn(async move { serve(listener, parts).await.expect("serves") });
        self.serving.lock().expect("no panic").push(serving);
        UnixStream::connect(&socket).await
    }
}

impl Entered {
    #[expect(clippy::disallowed_methods, reason = "a test's environment says what it runs on")]
    pub(super) fn new(fake: Arc<FakePve>) -> Self {
        Self {
            fake,
            container: std::env::var("PVE_SANDBOX_EXEC_LXC").ok(),
            frozen: AtomicBool::new(false),
            frozen_later: AtomicBool::new(false),
            down: AtomicBool::new(false),
            blind_looks: AtomicU32::new(0),
            lie: Default::default(),
        }
    }

    /// Pids of processes that run a program of this path.
    pub(super) fn pids_of_image(&self, image: &str) -> Vec<u32> {
        let runs = |pid: &u32| {
            let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
            exe.is_ok_and(|exe| exe.to_string_lossy().starts_with(image))
        };
        self.pids().into_iter().filter(runs).collect()
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        match &self.container {
            Some(name) => {
                for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                    listed(&PathBuf::from(root).join(format!("lxc.payload.{name}")), &mut pids);
                }
            }
            None => {
                let all = std::fs::read_dir("/proc").expect("procfs").flatten();
                pids.extend(all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()));
                pids.retain(|pid: &u32| *pid != std::process::id());
            }
        }
        pids
    }
}

/// Lists all processes in a cgroup and below.
fn listed(dir: &Path, pids: &mut Vec<u32>) {
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            listed(&entry.path(), pids);
        }
    }
}

#[async_trait::async_trait]
impl Pve for Entered {
    async fn connections(&self, vmid: Vmid) -> Option<Vec<Connection>> {
        self.fake.connections(vmid).await
    }

    async fn listens_on_loopback(&self, vmid: Vmid, port: Port) -> bool {
        self.fake.listens_on_loopback(vmid, port).await
    }

    async fn listeners(&self, vmid: Vmid) -> Vec<std::net::SocketAddr> {
        self.fake.listeners(vmid).await
    }

    async fn processes(&self, _: Vmid) -> Vec<u32> {
        self.pids()
    }

    async fn frozen(&self, vmid: Vmid) -> bool {
        self.frozen.load(Ordering::Relaxed) || self.fake.frozen(vmid).await
    }

    fn enter(&self, _: Vmid) -> Option<Vec<OsString>> {
        let argv: Vec<&str> = match &self.container {
            Some(name) => vec!["/usr/bin/lxc-attach", "-n", name, "--clear-env", "--"],
            None => vec!["/usr/bin/env", "-i", "--"],
        };
        Some(argv.into_iter().map(OsString::from).collect())
    }

    fn node(&self) -> &NodeName {
        self.fake.node()
    }

    async fn cluster(&self) -> Cluster {
        self.fake.cluster().await
    }

    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error> {
        self.fake.config(vmid).await
    }

    async fn carries(&self, mark: &Mark) -> Result<bool, Error> {
        self.fake.carries(mark).await
    }

    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error> {
        self.fake.configs().await
    }

    async fn running(&self, vmid: Vmid) -> bool {
        self.fake.running(vmid).await
    }

    async fn init(&self, vmid: Vmid) -> Option<Init> {
        self.fake.init(vmid).await
    }

    async fn limit_processes(&self, vmid: Vmid, max: u32) -> Result<Limited, Error> {
        self.fake.limit_processes(vmid, max).await
    }

    async fn limit_io(&self, vmid: Vmid, max: IoMax) -> Result<IoLimited, Error> {
        self.fake.limit_io(vmid, max).await
    }

    fn boots(&self) -> std::io::Result<BoxStream<'static, Mark>> {
        self.fake.boots()
    }

    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool {
        self.fake.has_address(vmid, ip).await
    }

    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error> {
        self.fake.storage_room(template).await
    }

    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error> {
        self.fake.volumes(vmid).await
    }

    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error> {
        self.fake.all_volumes().await
    }

    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error> {
        self.fake.clone_site(template, vmid).await
    }

    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error> {
        self.fake.clone_template(order, deadline).await
    }

    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error> {
        self.fake.configure(vmid, settings).await
    }

    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error> {
        self.fake.resize(vmid, gib, deadline).await
    }

    async fn set_limits(&self, vmid: Vmid, owner: &SandboxId, size: Size) -> Result<(), Error> {
        self.fake.set_limits(vmid, owner, size).await
    }

    async fn move_config_to(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        target: &NodeName,
    ) -> Result<(), Error> {
        self.fake.move_config_to(vmid, owner, target).await
    }

    async fn mark(&self, mark: &Mark) -> Result<(), Error> {
        self.fake.mark(mark).await
    }

    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.unmark(vmid, owner).await
    }

    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.fake.start(vmid, deadline).await
    }

    async fn halt(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.halt(vmid, owner).await
    }

    async fn recheck_ended(&self, init: Init) {
        self.fake.recheck_ended(init).await;
    }

    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error> {
        self.fake.stop(vmid, deadline).await
    }

    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error> {
        self.fake.destroy_owned(vmid, owner, volumes, deadline).await
    }

    async fn acquire_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.acquire_pause_lock(vmid, owner).await
    }

    async fn release_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.release_pause_lock(vmid, owner).await
    }

    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error> {
        self.fake.freeze(vmid, owner, deadline).await
    }

    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        self.fake.thaw(vmid, owner).await
    }

    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool {
        self.fake.reclaim(vmid, bytes).await
    }

    async fn usage(&self, vmid: Vmid) -> Option<Usage> {
        self.fake.usage(vmid).await
    }

    async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        self.fake.unlock_template(template).await
    }
}
