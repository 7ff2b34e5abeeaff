//! Who owns a sandbox that is not on this node.
//!
//! By vmid pmxcfs says it itself (`.vmlist`). By sandbox id, the mark in the container's config
//! does, which pmxcfs keeps on every node, so nobody has to be asked and it works with the
//! controller down. Both are polled, because pmxcfs tells nobody of changes; a name that is not
//! known makes it look again at once, so a sandbox of a moment ago is found too.
//!
//! What has been deleted leaves no trace in pmxcfs. That it was there is remembered (`seen`), across
//! restarts in a small file: the request still goes to the owner, which says 410.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::NodeName,
};
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Owner,
    seen::{Place, Seen, Sighting},
};
use crate::{
    clock::Clock,
    pve::{Cluster, ContainerConfig, Member, Pve},
    sys::read,
};

/// How often pmxcfs is looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// How much younger than this the last look must be for a name to be unknown.
const FRESH: Duration = Duration::from_millis(100);
/// How long a look may take; pmxcfs answers within a millisecond, or hangs.
const LOOK: Duration = Duration::from_secs(2);
/// Lines that the file may have more than there are sandboxes to remember.
const LINES_SPARE: usize = 10_000;
/// Largest config that is read; PVE's own limit.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Largest file of memories that is read: half a million lines.
const MEMORY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Where the owners are found.
#[derive(Debug, Clone)]
pub struct Sources {
    /// pmxcfs: `/etc/pve`.
    pub root: PathBuf,
    /// The file that outlives a restart.
    pub memory: PathBuf,
    /// Port of every node's peer server.
    pub peer_port: u16,
}

/// See the module.
#[derive(Debug)]
pub struct Owners {
    pve: Arc<dyn Pve>,
    clock: Arc<dyn Clock>,
    sources: Sources,
    state: RwLock<State>,
    /// When pmxcfs was last looked at. Held while somebody looks.
    looked: tokio::sync::Mutex<Looked>,
}

#[derive(Debug)]
struct State {
    seen: Seen,
    members: BTreeMap<NodeName, Member>,
    /// pmxcfs could not be read last time.
    blind: bool,
}

#[derive(Debug)]
struct Looked {
    at: Option<Instant>,
    lines: usize,
}

impl Owners {
    /// Reads what an earlier life remembered. Nothing is known of the cluster yet.
    pub fn new(pve: Arc<dyn Pve>, clock: Arc<dyn Clock>, sources: Sources) -> Self {
        let remembered = match read::whole_text(&sources.memory, MEMORY_BYTES_MAX) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, "what was seen of other nodes' sandboxes is forgotten");
                }
                String::new()
            }
        };
        // Later lines win; a line cut short by a power cut is none.
        let remembered: BTreeMap<_, _> = remembered.lines().filter_map(from_line).collect();
        let seen = Seen::new(pve.node().clone(), remembered);
        let state = RwLock::new(State { seen, members: BTreeMap::new(), blind: true });
        // More than any file has: the first look writes it anew.
        let looked = tokio::sync::Mutex::new(Looked { at: None, lines: usize::MAX });
        Self { pve, clock, sources, state, looked }
    }

    /// Looks at pmxcfs every second until `stop`.
    pub async fn poll(&self, stop: CancellationToken) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => self.look(Duration::ZERO).await,
            }
        }
    }

    /// The owner of a sandbox that this node's table does not hold.
    pub async fn of(&self, sandbox: SandboxRef) -> Owner {
        if let Some(owner) = self.known(sandbox) {
            return owner;
        }
        self.look(FRESH).await;
        let blind = || if self.read().blind { Owner::Unknown } else { Owner::Nobody };
        self.known(sandbox).unwrap_or_else(blind)
    }

    fn known(&self, sandbox: SandboxRef) -> Option<Owner> {
        let state = self.read();
        // Nothing has been looked at yet; what is remembered has no address.
        if state.members.is_empty() {
            return None;
        }
        match state.seen.find(sandbox) {
            Place::Nowhere => None,
            Place::Here => Some(Owner::Here),
            Place::On(node) => {
                let ip = state.members.get(&node).filter(|m| m.online).and_then(|m| m.ip);
                let peer = |ip| Owner::Peer(SocketAddr::new(ip, self.sources.peer_port));
                Some(ip.map_or(Owner::Down(node), peer))
            }
        }
    }

    /// Looks at pmxcfs, unless somebody has less than `fresh` ago. What cannot be read changes
    /// nothing: a pmxcfs that is down is no empty cluster.
    async fn look(&self, fresh: Duration) {
        let mut looked = self.looked.lock().await;
        if looked.at.is_some_and(|at| at.elapsed() < fresh) {
            return;
        }
        let looking = timeout(LOOK, self.look_now(looked.lines)).await;
        looked.at = Some(Instant::now());
        match looking {
            Ok(Ok(lines)) => looked.lines = lines,
            Ok(Err(error)) => tracing::warn!(%error, "sightings were not remembered"),
            Err(_) => {
                self.write().blind = true;
                tracing::warn!("pmxcfs did not answer in time");
            }
        }
    }

    /// Returns how many lines the file has.
    async fn look_now(&self, lines: usize) -> io::Result<usize> {
        let cluster = self.pve.cluster().await;
        if cluster.members.is_empty() {
            self.write().blind = true;
            return Ok(lines);
        }
        let now_ms = self.clock.now_ms();
        let marks = self.marks(&cluster, now_ms).await;
        let (changes, kept) = {
            let mut state = self.write();
            state.members.clone_from(&cluster.members);
            state.blind = false;
            let changed = state.seen.update(cluster, &marks, now_ms);
            let kept = state.seen.sightings().count();
            let sightings = changed.iter().filter_map(|id| Some((id, state.seen.sighting(id)?)));
            (to_lines(sightings), kept)
        };
        if lines > kept + LINES_SPARE {
            let all = to_lines(self.read().seen.sightings());
            rewrite(&self.sources.memory, &all).await?;
            return Ok(kept);
        }
        append(&self.sources.memory, &changes).await?;
        Ok(lines + changes.lines().count())
    }

    async fn marks(&self, cluster: &Cluster, now_ms: u64) -> BTreeMap<Vmid, Option<SandboxId>> {
        let unread = self.read().seen.unread(cluster, now_ms);
        let mut marks = BTreeMap::new();
        for (vmid, node) in unread {
            let path = self.sources.root.join(format!("nodes/{node}/lxc/{vmid}.conf"));
            match mark(&path, vmid).await {
                Ok(id) => drop(marks.insert(vmid, id)),
                // A virtual machine has its config elsewhere, and a container may just have gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    marks.insert(vmid, None);
                }
                Err(error) => tracing::warn!(%vmid, %error, "a container's config was not read"),
            }
        }
        marks
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sandbox that a config is marked as, if the mark is of this very container.
async fn mark(path: &Path, vmid: Vmid) -> io::Result<Option<SandboxId>> {
    use tokio::io::AsyncReadExt;
    let mut bytes = Vec::new();
    tokio::fs::File::open(path).await?.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes).await?;
    let mark = ContainerConfig::parse(&bytes).mark();
    Ok(mark.filter(|mark| mark.vmid == vmid).map(|mark| mark.sandbox_id))
}

fn to_lines<'a>(sightings: impl Iterator<Item = (&'a SandboxId, &'a Sighting)>) -> String {
    let mut text = String::new();
    for (id, Sighting { vmid, node, left_ms }) in sightings {
        let left = left_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        writeln!(text, "{id} {vmid} {node} {left} .").expect("a String takes all");
    }
    text
}

fn from_line(line: &str) -> Option<(SandboxId, Sighting)> {
    let mut words = line.split(' ');
    let id = words.next()?.parse().ok()?;
    let vmid = words.next()?.parse().ok()?;
    let node = words.next()?.parse().ok()?;
    let left_ms = match words.next()? {
        "-" => None,
        ms => Some(ms.parse().ok()?),
    };
    // The last word says that the line is whole.
    (words.next() == Some(".")).then_some((id, Sighting { vmid, node, left_ms }))
}

async fn append(path: &Path, lines: &str) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut file = tokio::fs::File::options().create(true).append(true).open(path).await?;
    file.write_all(lines.as_bytes()).await?;
    file.flush().await
}

async fn rewrite(path: &Path, lines: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    tokio::fs::write(&fresh, lines).await?;
    tokio::fs::rename(&fresh, path).await
}

#[cfg(test)]
mod tests;
