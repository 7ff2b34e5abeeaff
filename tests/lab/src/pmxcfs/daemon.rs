//! The daemon: mounts the tree once for each node and takes orders until it is ended.

use std::collections::BTreeMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::cluster::Member;
use super::control::{Answer, Order};
use super::fs::NodeFs;
use super::shared::Shared;
use crate::wire;

/// One node's mount.
#[derive(Debug, Clone)]
pub struct Mount {
    pub node: String,
    /// The node's membership in the cluster.
    pub member: Member,
    /// Mount point.
    pub dir: PathBuf,
    /// Pid file of the node's init; without one the node counts as booted.
    pub pid_file: Option<PathBuf>,
}

/// Mounts of a running daemon; dropping the value unmounts them.
#[derive(Debug)]
pub struct Mounted {
    shared: Arc<Shared>,
    #[expect(dead_code, reason = "held so that the mounts stay until it is dropped")]
    sessions: Vec<BackgroundSession>,
}

/// Reads the tree from `store` and mounts it for every node.
pub fn mount(store: &Path, mounts: &[Mount]) -> Result<Mounted> {
    let members = mounts.iter().map(|m| (m.node.clone(), m.member.clone())).collect();
    let pids: BTreeMap<String, PathBuf> = mounts
        .iter()
        .filter_map(|m| m.pid_file.clone().map(|file| (m.node.clone(), file)))
        .collect();
    let shared = Arc::new(Shared::open(store, members, pids)?);
    let mut sessions = Vec::new();
    for mount in mounts {
        // A daemon that was killed leaves a dead mount behind.
        if matches!(nix::sys::stat::stat(&mount.dir), Err(Errno::ENOTCONN)) {
            umount2(&mount.dir, MntFlags::MNT_DETACH).context("cannot remove the dead mount")?;
        }
        std::fs::create_dir_all(&mount.dir)
            .with_context(|| format!("cannot make {}", mount.dir.display()))?;
        let fs = NodeFs { shared: Arc::clone(&shared), node: mount.node.clone() };
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.mount_options = vec![
            MountOption::FSName("/dev/fuse".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        let session = Session::new(fs, &mount.dir, &config)
            .with_context(|| format!("cannot mount {}", mount.dir.display()))?;
        sessions.push(session.spawn().context("cannot start the FUSE thread")?);
    }
    Ok(Mounted { shared, sessions })
}

impl Mounted {
    /// Takes orders on `socket`, for ever. Calls `ready` when it listens.
    pub fn serve(&self, socket: &Path, ready: impl FnOnce()) -> Result<()> {
        let listener: UnixListener = wire::listen(socket)?;
        ready();
        loop {
            let (stream, _) = listener.accept().context("cannot take an order")?;
            if let Err(error) = self.answer(&stream) {
                eprintln!("pmxcfs: an order failed: {error:#}");
            }
        }
    }

    fn answer(&self, stream: &UnixStream) -> Result<()> {
        let order: Order = wire::receive(stream)?;
        let error = self.obey(&order);
        let cluster = self.shared.state().cluster.clone();
        wire::send(stream, &Answer { error, cluster })
    }

    /// Carries out an order; returns the reason of a refusal.
    pub fn obey(&self, order: &Order) -> Option<String> {
        let mut state = self.shared.state();
        let (node, on, off_flag): (&str, bool, fn(&mut Member) -> &mut bool) = match order {
            Order::State => return None,
            Order::Quorum { node, on } => (node, *on, |member| &mut member.cut),
            Order::Corosync { node, on } => (node, *on, |member| &mut member.unheard),
            Order::Running { node, on } => (node, *on, |member| &mut member.stopped),
        };
        let Some(member) = state.cluster.members.get_mut(node) else {
            return Some(format!("there is no node {node}"));
        };
        let flag = off_flag(member);
        let changed = *flag == on;
        *flag = !on;
        state.cluster.version += u64::from(changed);
        None
    }
}
