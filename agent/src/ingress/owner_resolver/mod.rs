//! Finds the owners of sandboxes that are not on this node.
//!
//! By vmid, pmxcfs lists the owner (`.vmlist`). By sandbox id, the mark in the container's config
//! tells it; pmxcfs keeps all configs on every node, so no other node is asked and it works with
//! the controller down. Both are polled, because pmxcfs does not notify of changes. An unknown name
//! triggers a poll at once, so a sandbox that was just created is found too.
//!
//! A deleted sandbox leaves no trace in pmxcfs. It is remembered (`seen`), across restarts in a
//! small file: the request still goes to the owner, which answers 410. Answers come from memory and
//! do not wait for that file, whose disk may hang.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use daemon::{
    replace::{Access, replace},
    sync::RwLock,
};
use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::NodeName,
};
use tokio::{
    io::AsyncWriteExt,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Owner,
    peer_directory::{Place, Seen, Sighting},
};
use crate::{
    clock::Clock,
    pve::{Cluster, ContainerConfig, Member, Pve, pmxcfs},
    sys::read,
};

/// Interval between polls of pmxcfs.
const PERIOD: Duration = Duration::from_secs(1);
/// Greatest age of the last poll for a name to count as unknown.
const FRESH: Duration = Duration::from_millis(100);
/// Time budget of a poll; pmxcfs answers within a millisecond, or hangs.
const LOOK: Duration = Duration::from_secs(2);
/// Longest wait for the memory file when the agent stops.
const SAVE: Duration = Duration::from_secs(2);
/// Most lines of the file beyond one for each sandbox to remember, before it is rewritten.
const LINES_SPARE: usize = 10_000;
/// Largest config that is read, in bytes; PVE's own limit.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Largest memory file that is read, in bytes: half a million lines.
const MEMORY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Sources of the owners.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Mount point of pmxcfs.
    pub root: PathBuf,
    /// Memory file, which outlives a restart.
    pub memory: PathBuf,
    /// Port of the peer server on every node.
    pub peer_port: u16,
}

#[derive(Debug)]
pub struct Owners {
    pve: Arc<dyn Pve>,
    clock: Arc<dyn Clock>,
    sources: Sources,
    state: RwLock<State>,
    /// Time of the last poll. Locked during a poll.
    looked: tokio::sync::Mutex<Looked>,
}

#[derive(Debug)]
struct State {
    seen: Seen,
    members: BTreeMap<NodeName, Member>,
    /// True when pmxcfs could not be read last time.
    blind: bool,
}

#[derive(Debug)]
struct Looked {
    at: Option<Instant>,
    /// Lines of the memory file; more than any file has where that is not known.
    lines: usize,
    /// Write of the memory file, until its end was seen.
    write: Option<JoinHandle<io::Result<()>>>,
    /// Polls that have found this write under way.
    waited: u32,
}

/// Polls after which a write that is still under way is told.
const SLOW: u32 = 10;
/// Lines of a memory file that the next write replaces whole.
const UNKNOWN: usize = usize::MAX;

impl Owners {
    /// Reads the memory file. The cluster is not polled yet.
    pub fn new(pve: Arc<dyn Pve>, clock: Arc<dyn Clock>, sources: Sources) -> Self {
        let remembered = match read::whole_text(&sources.memory, MEMORY_BYTES_MAX) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, "the memory of other nodes' sandboxes is lost");
                }
                String::new()
            }
        };
        // Later lines win; a line cut short by a power failure is skipped.
        let remembered: BTreeMap<_, _> = remembered.lines().filter_map(from_line).collect();
        let seen = Seen::new(pve.node().clone(), remembered);
        let state = RwLock::new(State { seen, members: BTreeMap::new(), blind: true });
        let looked =
            tokio::sync::Mutex::new(Looked { at: None, lines: UNKNOWN, write: None, waited: 0 });
        Self { pve, clock, sources, state, looked }
    }

    /// Polls pmxcfs every second until `stop`.
    pub async fn poll(&self, stop: CancellationToken) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.look(Duration::ZERO).await;
        }
        if timeout(SAVE, self.saved()).await.is_err() {
            tracing::warn!("sightings were not saved in time at shutdown");
        }
    }

    /// Returns the owner of a sandbox that is not in this node's table.
    pub async fn of(&self, sandbox: SandboxRef) -> Owner {
        if let Some(owner) = self.known(sandbox) {
            return owner;
        }
        self.look(FRESH).await;
        let blind = || if self.state.read().blind { Owner::Unknown } else { Owner::Nobody };
        self.known(sandbox).unwrap_or_else(blind)
    }

    fn known(&self, sandbox: SandboxRef) -> Option<Owner> {
        let state = self.state.read();
        // No poll has succeeded yet; remembered sandboxes have no address.
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

    /// Polls pmxcfs, unless that happened less than `fresh` ago. A failed read changes nothing: a
    /// pmxcfs that is down is not an empty cluster.
    async fn look(&self, fresh: Duration) {
        let mut looked = self.looked.lock().await;
        if looked.at.is_some_and(|at| at.elapsed() < fresh) {
            return;
        }
        let looking = timeout(LOOK, self.look_now()).await;
        looked.at = Some(Instant::now());
        match looking {
            Ok(None) => {}
            Ok(Some(changes)) => self.save(&mut looked, changes).await,
            Err(_) => {
                self.state.write().blind = true;
                tracing::warn!("pmxcfs did not answer in time");
            }
        }
    }

    /// Polls pmxcfs. Returns the lines that the memory file lacks; `None` when pmxcfs is down.
    async fn look_now(&self) -> Option<String> {
        let cluster = self.pve.cluster().await;
        if cluster.members.is_empty() {
            self.state.write().blind = true;
            return None;
        }
        let now_ms = self.clock.now_ms();
        let marks = self.marks(&cluster, now_ms).await;
        let mut state = self.state.write();
        state.members.clone_from(&cluster.members);
        state.blind = false;
        let changed = state.seen.update(cluster, &marks, now_ms);
        Some(to_lines(changed.iter().filter_map(|id| Some((id, state.seen.sighting(id)?)))))
    }

    /// Begins to write changes to the memory file. One write runs at a time: what comes meanwhile, and what failed, is
    /// in the next one, which replaces the file.
    async fn save(&self, looked: &mut Looked, changes: String) {
        match looked.write.take_if(|write| write.is_finished()) {
            Some(write) => note(looked, write.await),
            None if looked.write.is_some() => {
                looked.waited = looked.waited.saturating_add(1);
                if looked.waited == SLOW {
                    let path = self.sources.memory.display();
                    tracing::warn!(%path, "sightings are not saved yet: the disk is slow, or hangs");
                }
                if !changes.is_empty() {
                    looked.lines = UNKNOWN;
                }
                return;
            }
            None => {}
        }
        looked.waited = 0;
        let path = self.sources.memory.clone();
        let state = self.state.read();
        let kept = state.seen.sightings().count();
        looked.write = if looked.lines > kept + LINES_SPARE {
            let all = to_lines(state.seen.sightings());
            looked.lines = kept;
            Some(tokio::spawn(async move { rewrite(&path, all).await }))
        } else if changes.is_empty() {
            None
        } else {
            looked.lines += changes.lines().count();
            Some(tokio::spawn(async move { append(&path, &changes).await }))
        };
    }

    /// Waits for the write that is under way, if there is one, and writes what came meanwhile or failed: once, since a
    /// disk that fails twice may go on so.
    async fn saved(&self) {
        let mut looked = self.looked.lock().await;
        let Some(write) = looked.write.take() else { return };
        note(&mut looked, write.await);
        if looked.lines == UNKNOWN {
            self.save(&mut looked, String::new()).await;
            if let Some(write) = looked.write.take() {
                note(&mut looked, write.await);
            }
        }
    }

    async fn marks(&self, cluster: &Cluster, now_ms: u64) -> BTreeMap<Vmid, Option<SandboxId>> {
        let unread = self.state.read().seen.unread(cluster, now_ms);
        let mut marks = BTreeMap::new();
        for (vmid, node) in unread {
            let path = self.sources.root.join(pmxcfs::config(&node, vmid));
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
}

/// Reads the sandbox id from the mark in a config, if the mark belongs to this very container.
async fn mark(path: &Path, vmid: Vmid) -> io::Result<Option<SandboxId>> {
    use tokio::io::AsyncReadExt;
    let mut bytes = Vec::new();
    tokio::fs::File::open(path).await?.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes).await?;
    let mark = ContainerConfig::parse(&bytes).mark();
    Ok(mark.filter(|mark| mark.vmid == vmid).map(|mark| mark.sandbox_id))
}

/// Notes how a write of the memory file ended. After a failure the next one replaces the file.
fn note(looked: &mut Looked, write: Result<io::Result<()>, tokio::task::JoinError>) {
    if let Err(error) = write.unwrap_or_else(|gone| Err(gone.into())) {
        looked.lines = UNKNOWN;
        tracing::warn!(%error, "sightings were not saved");
    }
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
    // The last word shows that the line is complete.
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

async fn rewrite(path: &Path, lines: String) -> io::Result<()> {
    let path = path.to_owned();
    let written =
        tokio::task::spawn_blocking(move || replace(&path, lines.as_bytes(), Access::PRIVATE));
    written.await.unwrap_or_else(|gone| Err(gone.into()))
}

#[cfg(test)]
mod tests;
