//! State that all mounts share: the tree, its copy on disk, and the cluster's membership.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use super::cluster::{Cluster, Member, members_up, version_file, vmlist_file};
use super::store::Store;
use super::tree::{ROOT, Tree};
use crate::process::Proc;

/// Largest age of the recorded liveness of nodes: a check costs more than most calls, and the real
/// membership is much slower.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// File that tells every node that it is a member, before it has heard of the others.
const COROSYNC_CONF: &str = "corosync.conf";

/// The tree and the cluster behind one lock, with the store that mirrors the tree.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    store: Store,
    started_s: u64,
    /// Pid files of the nodes: a node is up as long as its init lives.
    pids: BTreeMap<String, PathBuf>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) tree: Tree,
    pub(super) cluster: Cluster,
    looked: Option<Instant>,
}

impl Shared {
    /// Reads the tree from `root` and creates the directories that every cluster has. A member
    /// without a pid file counts as booted.
    pub(super) fn open(
        root: &Path,
        members: BTreeMap<String, Member>,
        pids: BTreeMap<String, PathBuf>,
    ) -> Result<Shared> {
        let store = Store::open(root)?;
        let mut tree = store.load()?;
        let mut dirs = vec!["nodes".to_owned(), "priv".to_owned(), "priv/lock".to_owned()];
        dirs.push("virtual-guest".to_owned());
        for name in members.keys() {
            dirs.push(format!("nodes/{name}"));
            for sub in ["lxc", "openvz", "priv", "qemu-server"] {
                dirs.push(format!("nodes/{name}/{sub}"));
            }
        }
        for dir in dirs {
            if tree.at(&dir).is_err() {
                let (parent, name) = dir.rsplit_once('/').unwrap_or(("", &dir));
                let parent = tree.at(parent).unwrap_or(ROOT);
                tree.mkdir(parent, name, SystemTime::now())
                    .with_context(|| format!("cannot make {dir}"))?;
            }
        }
        if tree.at(COROSYNC_CONF).is_err() {
            let file = tree.create(ROOT, COROSYNC_CONF, SystemTime::now());
            let file = file.context("cannot make corosync.conf")?;
            tree.write(file, 0, b"totem {\n  cluster_name: lab\n}\n", SystemTime::now())
                .context("cannot write corosync.conf")?;
        }
        let changes = tree.take_changes();
        store.apply(&tree, changes).context("cannot write the tree")?;
        let cluster = Cluster { members, version: 1 };
        let started_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Ok(Shared {
            state: Mutex::new(State { tree, cluster, looked: None }),
            store,
            started_s,
            pids,
        })
    }

    /// Returns the state, with a membership of at most [`LOOK_EVERY`] ago.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return state;
        }
        state.looked = Some(Instant::now());
        let up =
            |name: &str| self.pids.get(name).is_none_or(|file| Proc::from_file(file).is_some());
        members_up(&mut state.cluster, up);
        state
    }

    /// Changes the tree on behalf of `node`, if that has quorum, and writes the change to disk.
    pub(super) fn change<T>(
        &self,
        node: &str,
        op: impl FnOnce(&mut Tree, SystemTime) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut state = self.state();
        let stopped = state.cluster.members.get(node).is_some_and(|member| member.stopped);
        if stopped || !state.cluster.quorate(node) {
            return Err(Errno::EACCES);
        }
        let answer = op(&mut state.tree, SystemTime::now());
        let changes = state.tree.take_changes();
        if let Err(error) = self.store.apply(&state.tree, changes) {
            eprintln!("pmxcfs: cannot write the tree to disk: {error}");
            return Err(Errno::EIO);
        }
        answer
    }

    /// Returns the text of a virtual file on `node`.
    pub(super) fn virtual_file(&self, node: &str, name: &str) -> String {
        let state = self.state();
        match name {
            ".members" => state.cluster.members_file(node),
            ".vmlist" => vmlist_file(&state.tree),
            ".version" => version_file(&state.tree, &state.cluster, self.started_s),
            ".clusterlog" => "{\n\"data\": [\n]\n}\n".to_owned(),
            ".debug" => "0\n".to_owned(),
            _ => String::new(),
        }
    }
}
