//! A lab and its nodes, for tests and for the command line.

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

/// How long an order to a service of the lab's own may take.
const SERVICE_WITHIN: Duration = Duration::from_secs(30);

/// A lab, by its directory.
#[derive(Debug, Clone)]
pub struct Lab {
    layout: Layout,
}

impl Lab {
    /// The lab in that directory, up or down.
    pub fn open(dir: impl AsRef<Path>) -> Result<Lab> {
        let dir = std::path::absolute(dir.as_ref()).context("cannot find the lab's directory")?;
        Ok(Lab { layout: Layout::new(&dir) })
    }

    /// `LAB_DIR`, or `target/lab` of this checkout.
    pub fn default_dir() -> PathBuf {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
        std::env::var_os("LAB_DIR")
            .map_or_else(|| workspace.unwrap_or(Path::new(".")).join("target/lab"), PathBuf::from)
    }

    /// Where it keeps what.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Makes the machine ready and starts the lab; where it is up, brings its programs up to date.
    pub fn up(&self, options: &UpOptions) -> Result<()> {
        up::up(self, options)
    }

    /// Stops everything and takes it away, but for the cache and the logs; `keep` leaves the nodes'
    /// disks, /etc/pve and the controller for the next time.
    pub fn down(&self, keep: bool) -> Result<()> {
        down::down(&self.layout, keep)
    }

    /// True while its supervisor lives.
    pub fn is_up(&self) -> bool {
        Proc::from_file(&self.layout.host_pid()).is_some()
    }

    /// Its nodes.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        let ids = Settings::load(&self.layout)?.node_ids();
        Ok(ids.into_iter().map(|id| self.node_of(id)).collect())
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Result<Node> {
        let id: NodeId = name.parse().map_err(anyhow::Error::msg)?;
        let settings = Settings::load(&self.layout)?;
        anyhow::ensure!(id.number() <= settings.nodes, "this lab has {} nodes", settings.nodes);
        Ok(self.node_of(id))
    }

    /// The services on the machine: pmxcfs, the nodes, the forwards, the controller.
    pub fn services(&self) -> Services {
        Services::at(&self.layout.host_socket())
    }

    /// The cluster file system.
    pub fn pmxcfs(&self) -> Control {
        Control::new(&self.layout.pmxcfs_socket())
    }

    fn node_of(&self, id: NodeId) -> Node {
        Node { layout: self.layout.clone(), id }
    }
}

/// A node of a lab.
#[derive(Debug, Clone)]
pub struct Node {
    layout: Layout,
    id: NodeId,
}

impl Node {
    /// Its number, name and addresses.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// A command that will run inside the node, as root, with an environment of its own. Its exit
    /// code is the command's; it dies with the process that it is started as.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.layout.binary());
        command.arg("--lab-dir").arg(self.layout.dir()).arg("exec").arg(self.id.name()).arg("--");
        command.args(argv);
        command
    }

    /// Runs a command inside the node, its input closed, and returns what it said.
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

    /// Its init, as the machine sees it; none while it is down.
    pub fn init(&self) -> Option<Proc> {
        Proc::from_file(&self.layout.node_pid(self.id))
    }

    /// Its root, as the machine sees it: for reading and writing files in a node that is up.
    pub fn root(&self) -> Result<PathBuf> {
        let init = self.init().with_context(|| format!("{} is down", self.id))?;
        Ok(PathBuf::from(format!("/proc/{}/root", init.pid)))
    }

    /// The id of its present boot.
    pub fn boot_id(&self) -> Result<String> {
        let id = fs::read_to_string(self.root()?.join("run/lab/boot_id"))?;
        Ok(id.trim().to_owned())
    }

    /// Cuts its power: everything in it is gone at once, its disk stays.
    pub fn kill(&self) -> Result<()> {
        self.machine().kill(&self.id.name(), true, SERVICE_WITHIN)?;
        self.cgroup()?.kill()
    }

    /// Boots it and waits until its init is up. Its services start by themselves.
    pub fn boot(&self) -> Result<()> {
        self.machine().start(&self.id.name(), BOOT_WITHIN)
    }

    /// Cuts its power, and boots it.
    pub fn reboot(&self) -> Result<()> {
        self.kill()?;
        self.boot()
    }

    /// Takes its quorum away, by cutting it off from the others, or gives it back.
    pub fn set_quorum(&self, on: bool) -> Result<()> {
        let order = Order::Quorum { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Starts its pmxcfs anew while its corosync is down, or lets it hear of corosync again.
    pub fn set_corosync(&self, on: bool) -> Result<()> {
        let order = Order::Corosync { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Stops its pmxcfs, after which its /etc/pve is empty, or starts it again.
    pub fn set_pmxcfs(&self, on: bool) -> Result<()> {
        let order = Order::Running { node: self.id.name(), on };
        Control::new(&self.layout.pmxcfs_socket()).give(&order).map(drop)
    }

    /// Its services: the agent, Caddy, DHCP.
    pub fn services(&self) -> Result<Services> {
        Ok(Services::at(&self.root()?.join(NODE_SOCKET.trim_start_matches('/'))))
    }

    /// Its cgroups on the machine.
    pub fn cgroup(&self) -> Result<NodeCgroup> {
        Ok(Hierarchies::open()?.node(self.id))
    }

    fn machine(&self) -> Services {
        Services::at(&self.layout.host_socket())
    }
}
