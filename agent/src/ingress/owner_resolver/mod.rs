//! Finds the owners of sandboxes that are not on this node.
//!
//! By vmid, pmxcfs lists the owner (`.vmlist`). By sandbox id, the mark in the container's config
//! tells it; pmxcfs keeps all configs on every node, so no other node is asked and it works with
//! the controller down. Both are polled, because pmxcfs does not notify of changes. An unknown name
//! triggers a poll at once, so a sandbox that was just created is found too.
//!
//! A poll reads the list as a whole, and of the configs those that are new or have changed, for a while: the next polls
//! read the rest. Until all are read, an id that is not found is not called unknown.
//!
//! A deleted sandbox leaves no trace in pmxcfs. `PeerDirectory` remembers it, across restarts in a
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
    task::{JoinError, JoinHandle},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Owner,
    peer_directory::{Location, PeerDirectory, Unread, Whereabouts},
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
/// Longest wait for the state of the cluster; pmxcfs answers within a millisecond, or hangs.
const LOOK: Duration = Duration::from_secs(2);
/// Time after which a poll reads no further config.
const READING: Duration = Duration::from_secs(1);
/// Most configs that a poll reads. Each takes some tenths of a millisecond.
const READS_MAX: usize = 1000;
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

/// Finds the node that owns a sandbox, by what pmxcfs shows of all nodes.
#[derive(Debug)]
pub struct OwnerResolver {
    pve: Arc<dyn Pve>,
    clock: Arc<dyn Clock>,
    sources: Sources,
    state: RwLock<State>,
    /// Time of the last poll. Locked during a poll.
    looked: tokio::sync::Mutex<Looked>,
}

#[derive(Debug)]
struct State {
    directory: PeerDirectory,
    members: BTreeMap<NodeName, Member>,
    /// True when pmxcfs could not be read last time.
    blind: bool,
    /// True while a sandbox may be in a config that was not read yet.
    behind: bool,
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
    /// Sandboxes whose location has changed since the last write began.
    unsaved: Vec<SandboxId>,
    /// Read of configs, until its results were taken.
    reading: Option<JoinHandle<Vec<Reading>>>,
}

/// Config that was read, and the sandbox whose mark it has.
type Reading = (Unread, io::Result<Option<SandboxId>>);

/// Polls after which a write that is still under way is told.
const SLOW: u32 = 10;
/// Lines of a memory file that the next write replaces whole.
const UNKNOWN: usize = usize::MAX;

impl OwnerResolver {
    /// Reads the memory file. The cluster is not polled yet.
    pub fn new(pve: Arc<dyn Pve>, clock: Arc<dyn Clock>, sources: Sources) -> Self {
        let remembered = match read::whole_text(&sources.memory, MEMORY_BYTES_MAX) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, "the list of other nodes' sandboxes was not read");
                }
                String::new()
            }
        };
        // Later lines win; a line cut short by a power failure is skipped.
        let remembered: BTreeMap<_, _> = remembered.lines().filter_map(from_line).collect();
        let directory = PeerDirectory::new(pve.node().clone(), remembered);
        let members = BTreeMap::new();
        let state = RwLock::new(State { directory, members, blind: true, behind: true });
        let looked = tokio::sync::Mutex::new(Looked {
            at: None,
            lines: UNKNOWN,
            write: None,
            waited: 0,
            unsaved: Vec::new(),
            reading: None,
        });
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
            tracing::warn!("the list of other nodes' sandboxes was not saved in time at shutdown");
        }
    }

    /// Returns the owner of a sandbox that is not in this node's table.
    pub async fn of(&self, sandbox: SandboxRef) -> Owner {
        if let Some(owner) = self.known(sandbox) {
            return owner;
        }
        self.look(FRESH).await;
        self.known(sandbox).unwrap_or_else(|| self.absent(sandbox))
    }

    /// Returns the owner of a sandbox that was not found. One that is asked for by its id may be in a config that was not
    /// read yet.
    fn absent(&self, sandbox: SandboxRef) -> Owner {
        let state = self.state.read();
        let is_behind = state.behind && matches!(sandbox, SandboxRef::Id(_));
        if state.blind || is_behind { Owner::Unknown } else { Owner::Nobody }
    }

    fn known(&self, sandbox: SandboxRef) -> Option<Owner> {
        let state = self.state.read();
        // No poll has succeeded yet; remembered sandboxes have no address.
        if state.members.is_empty() {
            return None;
        }
        match state.directory.find(sandbox) {
            Whereabouts::Nowhere => None,
            Whereabouts::Here => Some(Owner::Here),
            Whereabouts::On(node) => {
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
        if self.look_at_cluster(&mut looked).await {
            self.read_marks(&mut looked).await;
            self.save(&mut looked).await;
        }
        looked.at = Some(Instant::now());
    }

    /// Reads and applies where all containers are; false when pmxcfs is down or hangs.
    async fn look_at_cluster(&self, looked: &mut Looked) -> bool {
        let cluster = timeout(LOOK, self.pve.cluster()).await.unwrap_or_else(|_| {
            tracing::warn!("pmxcfs did not answer in time");
            Cluster::default()
        });
        let mut state = self.state.write();
        state.blind = cluster.members.is_empty();
        if state.blind {
            return false;
        }
        state.members.clone_from(&cluster.members);
        looked.unsaved.extend(state.directory.apply(cluster, self.clock.now_ms()));
        state.behind = state.directory.is_behind();
        true
    }

    /// Reads configs that are new or have changed, for a while. One read runs at a time: a file that hangs holds up the
    /// poll that finds it, and then only what is in the configs.
    async fn read_marks(&self, looked: &mut Looked) {
        match looked.reading.take_if(|reading| reading.is_finished()) {
            Some(reading) => self.note_marks(looked, reading.await),
            None if looked.reading.is_some() => return,
            None => {}
        }
        let mut unread = self.state.read().directory.unread(self.clock.now_ms());
        unread.truncate(READS_MAX);
        if unread.is_empty() {
            return;
        }
        let root = self.sources.root.clone();
        let reading = tokio::task::spawn_blocking(move || marks(&root, unread));
        let read = timeout(2 * READING, looked.reading.insert(reading)).await;
        if let Ok(read) = read {
            looked.reading = None;
            self.note_marks(looked, read);
        } else {
            tracing::warn!("configs of containers were not read in time: pmxcfs is slow, or hangs");
        }
    }

    fn note_marks(&self, looked: &mut Looked, read: Result<Vec<Reading>, JoinError>) {
        let read = read.unwrap_or_else(|error| {
            tracing::warn!(%error, "the configs of containers were not read");
            Vec::new()
        });
        let (mut state, now_ms) = (self.state.write(), self.clock.now_ms());
        for (config, mark) in read {
            match mark {
                Ok(mark) => looked.unsaved.extend(state.directory.note(&config, mark, now_ms)),
                Err(error) => {
                    tracing::warn!(vmid = %config.vmid, %error, "a container's config was not read");
                }
            }
        }
        state.behind = state.directory.is_behind();
    }

    /// Begins to write changes to the memory file. One write runs at a time: what comes meanwhile, and what failed, is
    /// in the next one, which replaces the file.
    async fn save(&self, looked: &mut Looked) {
        match looked.write.take_if(|write| write.is_finished()) {
            Some(write) => note(looked, write.await),
            None if looked.write.is_some() => {
                looked.waited = looked.waited.saturating_add(1);
                if looked.waited == SLOW {
                    let path = self.sources.memory.display();
                    tracing::warn!(
                        %path,
                        "the list of other nodes' sandboxes is not saved yet: the disk is slow, or hangs"
                    );
                }
                if !std::mem::take(&mut looked.unsaved).is_empty() {
                    looked.lines = UNKNOWN;
                }
                return;
            }
            None => {}
        }
        looked.waited = 0;
        let path = self.sources.memory.clone();
        let (state, changed) = (self.state.read(), std::mem::take(&mut looked.unsaved));
        let changed = changed.iter().filter_map(|id| Some((id, state.directory.location(id)?)));
        let changes = to_lines(changed);
        let kept = state.directory.locations().count();
        looked.write = if looked.lines > kept + LINES_SPARE {
            let all = to_lines(state.directory.locations());
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
            self.save(&mut looked).await;
            if let Some(write) = looked.write.take() {
                note(&mut looked, write.await);
            }
        }
    }
}

/// Reads configs in this order until the time of a poll is over. Blocks: pmxcfs is a FUSE file system.
fn marks(root: &Path, unread: Vec<Unread>) -> Vec<Reading> {
    let begun = Instant::now();
    let in_time = unread.into_iter().take_while(|_| begun.elapsed() < READING);
    let read = in_time.map(|config| {
        let path = root.join(pmxcfs::config(&config.node, config.vmid));
        let mark = mark(&path, config.vmid);
        (config, mark)
    });
    read.collect()
}

/// Reads the sandbox id from the mark in a config, if the mark belongs to this very container.
fn mark(path: &Path, vmid: Vmid) -> io::Result<Option<SandboxId>> {
    let bytes = match read::whole(path, CONFIG_BYTES_MAX) {
        Ok(bytes) => bytes,
        // A virtual machine has its config elsewhere, and a container may just have gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mark = ContainerConfig::parse(&bytes).mark();
    Ok(mark.filter(|mark| mark.vmid == vmid).map(|mark| mark.sandbox_id))
}

/// Notes how a write of the memory file ended. After a failure the next one replaces the file.
fn note(looked: &mut Looked, write: Result<io::Result<()>, JoinError>) {
    if let Err(error) = write.unwrap_or_else(|gone| Err(gone.into())) {
        looked.lines = UNKNOWN;
        tracing::warn!(%error, "the list of other nodes' sandboxes was not saved");
    }
}

fn to_lines<'a>(locations: impl Iterator<Item = (&'a SandboxId, &'a Location)>) -> String {
    let mut text = String::new();
    for (id, Location { vmid, node, left_ms }) in locations {
        let left = left_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        writeln!(text, "{id} {vmid} {node} {left} .").expect("a String takes all");
    }
    text
}

fn from_line(line: &str) -> Option<(SandboxId, Location)> {
    let mut words = line.split(' ');
    let id = words.next()?.parse().ok()?;
    let vmid = words.next()?.parse().ok()?;
    let node = words.next()?.parse().ok()?;
    let left_ms = match words.next()? {
        "-" => None,
        ms => Some(ms.parse().ok()?),
    };
    // The last word shows that the line is complete.
    (words.next() == Some(".")).then_some((id, Location { vmid, node, left_ms }))
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
