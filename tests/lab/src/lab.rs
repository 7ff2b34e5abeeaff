//! A lab and its nodes, as tests and the command line use them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cgroup::{Hierarchies, NodeCgroup};
use crate::layout::{Layout, NODE_SOCKET, NodeId};
use crate::pmxcfs::control::{Control, Order};
use crate::process::Proc;
use crate::settings::Settings;
use crate::supervise::Services;
use crate::up::{self, UpOptions};
use crate::{down, up::BOOT_WITHIN};

/// Longest time of an order to one of the lab's own services.
const SERVICE_WITHIN: Duration = Duration::from_secs(30);

/// A lab, identified by its directory.
#[derive(Debug, Clone)]
pub struct Lab {
    layout: Layout,
}

impl Lab {
    /// Opens the lab in a directory, whether it is up or down.
    pub fn open(dir: impl AsRef<Path>) -> Result<Lab> {
        let dir = std::path::absolute(dir.as_ref()).context("cannot find the lab's directory")?;
        Ok(Lab { layout: Layout::new(&dir) })
    }

    /// Returns `LAB_DIR`, or `target/lab` of this checkout.
    pub fn default_dir() -> PathBuf {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
        std::env::var_os("LAB_DIR")
            .map_or_else(|| workspace.unwrap_or(Path::new(".")).join("target/lab"), PathBuf::from)
    }

    /// Returns the paths of the lab.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Prepares the machine and starts the lab; updates the programs of a lab that is up.
    pub fn up(&self, options: &UpOptions) -> Result<()> {
        up::up(self, options)
    }

    /// Stops the lab and removes everything except the cache and the logs; `keep` also leaves the
    /// nodes' disks, /etc/pve and the controller for the next time.
    pub fn down(&self, keep: bool) -> Result<()> {
        down::down(&self.layout, keep)
    }

    /// Returns true while the lab's supervisor lives.
    pub fn is_up(&self) -> bool {
        Proc::from_file(&self.layout.host_pid()).is_some()
    }

    /// Returns the nodes of the lab.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        let ids = Settings::load(&self.layout)?.node_ids();
        Ok(ids.into_iter().map(|id| self.node_of(id)).collect())
    }

    pub fn node(&self, name: &str) -> Result<Node> {
        let id: NodeId = name.parse().map_err(anyhow::Error::msg)?;
        let settings = Settings::load(&self.layout)?;
        anyhow::ensure!(id.number() <= settings.nodes, "this lab has {} nodes", settings.nodes);
        Ok(self.node_of(id))
    }

    /// Returns the services on the machine: pmxcfs, the nodes, the forwards, the controller.
    pub fn services(&self) -> Services {
        Services::at(&self.layout.host_socket())
    }

    /// Returns the control of the cluster file system.
    pub fn pmxcfs(&self) -> Control {
        Control::new(&self.layout.pmxcfs_socket())
    }

    fn node_of(&self, id: NodeId) -> Node {
        Node { layout: self.layout.clone(), id }
    }
}

#[derive(Debug, Clone)]
pub struct Node {
    layout: Layout,
    id: NodeId,
}

impl Node {
    /// Returns the id, which gives the node's number, name and addresses.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Prepares a command that runs inside the node as root, with its own environment. Its exit
    /// code is the command's; killing the started process also kills the command.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.layout.binary());
        command.arg("--lab-dir").arg(self.layout.dir()).arg("exec").arg(self.id.name()).arg("--");
        command.args(argv);
        command
    }

    /// Runs a command inside the node with closed stdin and returns its output.
    pub fn exec<S: AsRef<std::ffi::OsStr>>(
        &self,
        argv: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        let output = self.command(argv).stdin(Stdio::null()).output();
        output.with_context(|| format!("cannot run a command in {}", self.id))
    }

    /// Runs a line in the node's shell.
    pub fn shell(&self, line: &str) -> Result<Output> {
        self.exec(["/bin/bash", "-c", line])
    }

    /// Returns the node's init as the machine sees it; none while the node is down.
    pub fn init(&self) -> Option<Proc> {
        Proc::from_file(&self.layout.node_pid(self.id))
    }

    /// Returns the node's root as the machine sees it, to read and write files in a running node.
    pub fn root(&self) -> Result<PathBuf> {
        let init = self.init().with_context(|| format!("{} is down", self.id))?;
        Ok(PathBuf::from(format!("/proc/{}/root", init.pid)))
    }

    /// Reads the id of the present boot.
    pub fn boot_id(&self) -> Result<String> {
        let id = fs::read_to_string(self.root()?.join("run/lab/boot_id"))?;
        Ok(id.trim().to_owned())
    }

    /// Cuts the node's power: every process ends at once, the disk stays.
    pub fn kill(&self) -> Result<()> {
        self.machine().kill(&self.id.name(), true, SERVICE_WITHIN)?;
        self.cgroup()?.kill()
    }

    /// Boots the node and waits until its init is up. Its services start by themselves.
    pub fn boot(&self) -> Result<()> {
        self.machine().start(&self.id.name(), BOOT_WITHIN)
    }

    /// Cuts the node's power and boots it again.
    pub fn reboot(&self) -> Result<()> {
        self.kill()?;
        self.boot()
    }

    /// Removes the node's quorum, by cutting it off from the others, or restores it.
    pub fn set_quorum(&self, on: bool) -> Result<()> {
        let order = Order::Quorum { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Restarts the node's pmxcfs with corosync down (false), or reconnects it to corosync (true).
    pub fn set_corosync(&self, on: bool) -> Result<()> {
        let order = Order::Corosync { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Stops the node's pmxcfs, which leaves its /etc/pve empty, or starts it again.
    pub fn set_pmxcfs(&self, on: bool) -> Result<()> {
        let order = Order::Running { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Returns the node's services: the agent, Caddy, DHCP.
    pub fn services(&self) -> Result<Services> {
        Ok(Services::at(&self.root()?.join(NODE_SOCKET.trim_start_matches('/'))))
    }

    /// Returns the node's cgroups on the machine.
    pub fn cgroup(&self) -> Result<NodeCgroup> {
        Ok(Hierarchies::open()?.node(self.id))
    }

    fn machine(&self) -> Services {
        Services::at(&self.layout.host_socket())
    }
}
