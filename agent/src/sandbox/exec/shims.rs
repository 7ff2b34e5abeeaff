//! Shims of this node's sandboxes: found by their sockets, started when there is none.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::DirBuilder,
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use proto::id::{SandboxId, Vmid};
use tokio::{net::UnixStream, sync::Semaphore};

use crate::{
    journal::Record,
    pve::{HostPaths, IoMax, shim_cgroup, shim_io::ShimIo},
    run,
    shim::{self, Options},
    sys::{image, proc},
};

/// Access to the shims of sandboxes. Tests use shims that serve in their own process.
#[async_trait::async_trait]
pub trait Shims: Send + Sync + std::fmt::Debug {
    /// Connects to the shim of this boot, if it runs.
    async fn find(&self, record: &Record) -> Option<UnixStream>;

    /// Starts a shim for this boot. The caller has checked that the container is the sandbox's own.
    async fn start(&self, record: &Record) -> io::Result<UnixStream>;

    /// Sockets of all shims; some of the shims may not run any more.
    fn sockets(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Removes cgroups that killed shims left. Returns the containers whose cgroups cannot be
    /// removed because something runs there.
    async fn sweep_cgroups(&self) -> BTreeSet<Vmid> {
        BTreeSet::new()
    }

    /// Sandboxes whose shims run, by the host's processes and not from memory.
    async fn running(&self) -> BTreeSet<SandboxId> {
        BTreeSet::new()
    }
}

/// Node without a way into its containers, for the simulation.
#[derive(Debug)]
pub struct NoShims;

#[async_trait::async_trait]
impl Shims for NoShims {
    async fn find(&self, _: &Record) -> Option<UnixStream> {
        None
    }

    async fn start(&self, _: &Record) -> io::Result<UnixStream> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "there is no way into this sandbox"))
    }
}

/// Way in which a helper enters its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// `lxc-attach`, used as `pct exec` does.
    #[default]
    Lxc,
    /// `pct exec` itself: half a second of Perl once per boot.
    Pct,
}

/// Resources that the shim of a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Limits of CPU and memory.
    pub limits: shim_cgroup::Limits,
    /// Limits of a sandbox's use of disks, from which those of its shim follow.
    pub io: IoMax,
    /// Disk space for the outputs of its commands, bytes.
    pub output_bytes_max: u64,
}

/// Shims that are processes of this program.
#[derive(Debug)]
pub struct ShimProcesses {
    sockets: PathBuf,
    state: PathBuf,
    places: HostPaths,
    backend: Backend,
    allowance: Allowance,
    io: ShimIo,
    /// Place of a look at the host's processes.
    looks: Arc<Semaphore>,
    /// Image of the helper, one for all sandboxes while this agent runs.
    image: OwnedFd,
}

impl ShimProcesses {
    /// Uses `run_dir` for sockets and `state_dir` for what must survive a reboot.
    ///
    /// # Errors
    /// When the directories or the helper's image cannot be made.
    pub fn new(
        run_dir: &Path,
        state_dir: &Path,
        places: HostPaths,
        backend: Backend,
        allowance: Allowance,
    ) -> io::Result<Self> {
        let (sockets, state) = (run_dir.join("shim"), state_dir.join("exec"));
        for dir in [&sockets, &state] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let image = image::sealed("pve-sandbox-helper", image::HELPER)?;
        let (io, looks) = (ShimIo::new(&places, &state, allowance.io), Arc::new(Semaphore::new(1)));
        Ok(Self { sockets, state, places, backend, allowance, io, looks, image })
    }

    /// Removes the files of sandboxes that are not in `live`.
    pub fn sweep(&self, live: &BTreeSet<SandboxId>) {
        for dir in [&self.sockets, &self.state] {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if owner(&path).is_some_and(|id| !live.contains(&id))
                    && let Err(error) = std::fs::remove_file(&path)
                {
                    tracing::warn!(path = %path.display(), %error, "file of an ended sandbox was not removed");
                }
            }
        }
    }

    fn socket(&self, record: &Record) -> PathBuf {
        self.sockets.join(format!("{}.{}.sock", record.id, record.boot))
    }

    fn enter(&self, vmid: Vmid) -> Vec<String> {
        let argv = match self.backend {
            Backend::Lxc => self.places.attach(vmid),
            Backend::Pct => self.places.pct_exec(vmid),
        };
        argv.iter().map(|word| word.to_string_lossy().into_owned()).collect()
    }
}

#[async_trait::async_trait]
impl Shims for ShimProcesses {
    async fn find(&self, record: &Record) -> Option<UnixStream> {
        // Refused or absent: the shim that listened is gone.
        UnixStream::connect(self.socket(record)).await.ok()
    }

    async fn start(&self, record: &Record) -> io::Result<UnixStream> {
        let socket = self.socket(record);
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // Bound here, so that there is something to connect to from the first moment on.
        let listener = UnixListener::bind(&socket)?;
        let options = Options {
            vmid: record.vmid.get(),
            socket: socket.clone(),
            dir: self.state.clone(),
            output_bytes_max: self.allowance.output_bytes_max,
            limits: Some(self.allowance.limits),
            io: self.io.clone(),
            ids: self.state.join(format!("{}.ids", record.id)),
            enter: self.enter(record.vmid),
            places: self.places.clone(),
        };
        let options = serde_json::to_string(&options)?;
        // The program that this process runs, whatever has been installed since.
        let line = ["/proc/self/exe", shim::COMMAND, &options].map(OsString::from);
        run::spawn_detached(&line, vec![listener.into(), self.image.try_clone()?])?;
        UnixStream::connect(&socket).await
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.sockets).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    async fn sweep_cgroups(&self) -> BTreeSet<Vmid> {
        let root = self.places.cgroup_root.clone();
        tokio::task::spawn_blocking(move || shim_cgroup::sweep(&root)).await.unwrap_or_default()
    }

    async fn running(&self) -> BTreeSet<SandboxId> {
        let (root, looks) = (self.places.proc.clone(), Arc::clone(&self.looks));
        // One at a time, held by the thread: tenants decide how many processes are passed over.
        let Ok(place) = looks.acquire_owned().await else { return BTreeSet::new() };
        let processes = tokio::task::spawn_blocking(move || {
            let _place = place;
            proc::host_processes(&root)
        });
        let processes = processes.await.unwrap_or_default();
        processes.iter().filter_map(|process| of_shim(&process.argv)).collect()
    }
}

/// Sandbox whose shim has this command line, if it is a shim's.
fn of_shim(argv: &[String]) -> Option<SandboxId> {
    let [_, command, options] = argv else { return None };
    // The socket is near the front; the end of a long command line may not have been read.
    let (_, socket) = options.split_once("\"socket\":\"").filter(|_| command == shim::COMMAND)?;
    owner(Path::new(socket.split_once('"')?.0))
}

/// Sandbox that a file belongs to, by its name.
pub(super) fn owner(path: &Path) -> Option<SandboxId> {
    path.file_name()?.to_str()?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shim_is_recognized_by_its_command_line() {
        let id = "pvelxc-01k8aaovkbf15qqshbais28viu";
        let options = Options {
            vmid: 100,
            socket: format!("/run/pve-sandbox/shim/{id}.1.sock").into(),
            dir: "/var/lib/x".into(),
            output_bytes_max: 1,
            limits: None,
            io: ShimIo::default(),
            ids: "/var/lib/x/y.ids".into(),
            enter: Vec::new(),
            places: HostPaths::default(),
        };
        let line =
            ["/proc/self/exe", shim::COMMAND, &serde_json::to_string(&options).expect("fits")];
        let argv = line.map(String::from);
        assert_eq!(of_shim(&argv).map(|id| id.to_string()).as_deref(), Some(id));
        assert_eq!(of_shim(&argv[..2]), None);
        let other = [argv[0].clone(), "run".into(), argv[2].clone()];
        assert_eq!(of_shim(&other), None);
        assert_eq!(of_shim(&[argv[0].clone(), argv[1].clone(), "{}".into()]), None);
    }
}
