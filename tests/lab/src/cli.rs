//! The program `lab`.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cgroup::Hierarchies;
use crate::daemons;
use crate::forward::{Forward, forward};
use crate::lab::Lab;
use crate::layout::NodeId;
use crate::node::{enter, init, launch};
use crate::pmxcfs::cluster::Member;
use crate::pmxcfs::control::Order;
use crate::pmxcfs::daemon::{Mount, mount};
use crate::process::Proc;
use crate::progress::say;
use crate::settings::Settings;
use crate::supervise::supervisor::{Place, Supervisor};
use crate::supervise::{Services, Status};
use crate::up::UpOptions;

const SERVICE_WITHIN: Duration = Duration::from_secs(30);

/// A cluster of real nodes on this machine, without Proxmox VE.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Cli {
    /// Where the lab keeps everything [default: target/lab of the checkout].
    #[arg(long, env = "LAB_DIR", global = true)]
    lab_dir: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make the machine ready, build the template and start the nodes.
    Up(Up),
    /// Stop everything and take it away; what was downloaded and the logs stay.
    Down {
        /// Keep the nodes' disks, /etc/pve and the controller for the next `up`.
        #[arg(long)]
        keep: bool,
    },
    /// Run the main job on a lab that is up, as a user would, and leave the lab running.
    Demo,
    /// Show the nodes and what runs on them; exits with 3 while the lab is down.
    Status,
    /// Cut a node's power, boot it, or both.
    Node {
        /// Action to take.
        action: NodeAction,
        /// The node.
        node: NodeId,
    },
    /// Run a command inside a node; the exit code is the command's, or 255.
    Exec {
        /// The node.
        node: NodeId,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Cut a node off from the cluster (off), or join it to it again (on).
    Quorum {
        /// The node.
        node: NodeId,
        /// Quorum or none.
        state: OnOff,
    },
    /// Start, stop, kill or restart a service of a node; `machine` stands for the machine.
    Service {
        /// The node, or `machine`.
        place: String,
        /// Action to take.
        action: ServiceAction,
        /// The service.
        name: String,
        /// Keep a killed service down.
        #[arg(long)]
        hold: bool,
    },
    /// The cluster file system.
    Pmxcfs {
        #[command(subcommand)]
        action: PmxcfsAction,
    },
    /// Keeps the lab's services (internal).
    #[command(hide = true)]
    Supervise,
    /// Stands for a node on the machine (internal).
    #[command(hide = true)]
    NodeLaunch {
        /// The node.
        node: NodeId,
    },
    /// Is process 1 of a node (internal).
    #[command(hide = true)]
    NodeInit {
        /// The node.
        node: NodeId,
    },
    /// Opens ports of the lab on the loopback (internal).
    #[command(hide = true)]
    Forward {
        /// LOOPBACK:PORT=ADDRESS:PORT.
        #[arg(required = true)]
        forwards: Vec<Forward>,
    },
}

#[derive(Debug, Args)]
struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Forget the disks and /etc/pve of the last time.
    #[arg(long)]
    fresh: bool,
    /// CPU limit of a node, in percent of one core.
    #[arg(long, default_value_t = 200)]
    cpu_percent: u32,
    /// Memory limit of a node, in MiB.
    #[arg(long, default_value_t = 6144)]
    memory_mib: u64,
    /// The size of a new node's sparse disk, in GiB.
    #[arg(long, default_value_t = 20)]
    disk_gib: u64,
    /// Lines that stand on the nodes' templates.
    #[arg(long, default_value = "")]
    template_description: String,
    /// Tags that the nodes' templates carry.
    #[arg(long, default_value = "")]
    template_tags: String,
    /// Where the workspace's programs are built [default: beside this one].
    #[arg(long)]
    built: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NodeAction {
    Kill,
    Boot,
    Reboot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ServiceAction {
    Start,
    Stop,
    Kill,
    Restart,
    Status,
}

#[derive(Debug, Subcommand)]
enum PmxcfsAction {
    /// Show the members of the cluster, as JSON.
    State,
    /// Stop a node's pmxcfs: its /etc/pve is empty.
    Stop {
        /// The node.
        node: NodeId,
    },
    /// Start a node's pmxcfs.
    Start {
        /// The node.
        node: NodeId,
    },
    /// Mount /etc/pve for all nodes (internal).
    #[command(hide = true)]
    Serve,
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        // An exit code that does not fit cannot come from a process.
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            say(&format!("lab: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<i32> {
    let lab = Lab::open(cli.lab_dir.unwrap_or_else(Lab::default_dir))?;
    match cli.verb {
        Verb::Up(args) => {
            lab.up(&args.options())?;
            status(&lab)?;
        }
        Verb::Down { keep } => lab.down(keep)?,
        Verb::Demo => crate::demo::demo(&lab)?,
        Verb::Status => {
            status(&lab)?;
            // The exit code of systemctl for a service that does not run.
            return Ok(if lab.is_up() { 0 } else { 3 });
        }
        Verb::Node { action, node } => {
            let node = lab.node(&node.name())?;
            match action {
                NodeAction::Kill => node.kill()?,
                NodeAction::Boot => node.boot()?,
                NodeAction::Reboot => node.reboot()?,
            }
        }
        Verb::Exec { node, command } => {
            let ended = enter::enter_and_run(lab.layout(), node, &command);
            // As ssh does: 255 marks a failure of the lab, not of the command.
            return Ok(ended.unwrap_or_else(|error| {
                say(&format!("lab: {error:#}"));
                255
            }));
        }
        Verb::Quorum { node, state } => {
            lab.node(&node.name())?.set_quorum(state == OnOff::On)?;
        }
        Verb::Service { place, action, name, hold } => {
            let services = match place.as_str() {
                "machine" => lab.services(),
                node => lab.node(node)?.services()?,
            };
            service(&services, action, &name, hold)?;
        }
        Verb::Pmxcfs { action } => pmxcfs(&lab, &action)?,
        Verb::Supervise => supervise(&lab)?,
        Verb::NodeLaunch { node } => return launch::launch(lab.layout(), node),
        Verb::NodeInit { node } => init::init(lab.layout(), node)?,
        Verb::Forward { forwards } => forward(&forwards, say_ready)?,
    }
    Ok(0)
}

impl Up {
    fn options(self) -> UpOptions {
        let mut options =
            UpOptions { nodes: self.nodes, fresh: self.fresh, ..UpOptions::default() };
        options.limits.cpu_percent = self.cpu_percent;
        options.limits.memory_mib = self.memory_mib;
        options.limits.disk_gib = self.disk_gib;
        options.template.description = self.template_description;
        options.template.tags = self.template_tags;
        options.built = self.built.unwrap_or(options.built);
        options
    }
}

fn service(services: &Services, action: ServiceAction, name: &str, hold: bool) -> Result<()> {
    match action {
        ServiceAction::Start => services.start(name, SERVICE_WITHIN),
        ServiceAction::Stop => services.stop(name, SERVICE_WITHIN),
        ServiceAction::Kill => services.kill(name, hold, SERVICE_WITHIN),
        ServiceAction::Restart => services.restart(name, SERVICE_WITHIN),
        ServiceAction::Status => {
            show(&line(&services.status_of(name)?));
            Ok(())
        }
    }
}

fn status(lab: &Lab) -> Result<()> {
    if !lab.is_up() {
        show(&format!("the lab in {} is down", lab.layout().dir().display()));
        return Ok(());
    }
    show(&format!("the lab in {} is up", lab.layout().dir().display()));
    show("machine");
    for status in lab.services().status()? {
        show(&format!("  {}", line(&status)));
    }
    let cluster = lab.pmxcfs().give(&Order::State)?;
    for node in lab.nodes()? {
        let name = node.id().name();
        let quorum = if cluster.quorate(&name) { "quorum" } else { "no quorum" };
        let Some(init) = node.init() else {
            show(&format!("{name}  down"));
            continue;
        };
        show(&format!("{name}  up, {}, {quorum}, process {}", node.id().ip(), init.pid));
        for status in node.services()?.status()? {
            show(&format!("  {}", line(&status)));
        }
    }
    show("forwarded to this machine");
    let nodes: Vec<NodeId> = lab.nodes()?.iter().map(crate::Node::id).collect();
    for forward in daemons::forwards(&nodes) {
        show(&format!("  {} -> {}", forward.from, forward.to));
    }
    Ok(())
}

/// Prints a line; a reader that has closed the pipe is no error.
fn show(line: &str) {
    let _unread = writeln!(std::io::stdout(), "{line}");
}

fn line(status: &Status) -> String {
    let pid = status.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    let state = format!("{:?}", status.state).to_lowercase();
    let mut line = format!("{:<12} {state:<9} {pid:>8}", status.name);
    if status.restarts > 0 {
        line.push_str(&format!("  {} restarts", status.restarts));
    }
    if let Some(end) = &status.last_end {
        line.push_str(&format!("  last: {end}"));
    }
    line
}

fn pmxcfs(lab: &Lab, action: &PmxcfsAction) -> Result<()> {
    match action {
        PmxcfsAction::State => {
            let cluster = lab.pmxcfs().give(&Order::State)?;
            show(&serde_json::to_string_pretty(&cluster)?);
            Ok(())
        }
        PmxcfsAction::Stop { node } => lab.node(&node.name())?.set_pmxcfs(false),
        PmxcfsAction::Start { node } => lab.node(&node.name())?.set_pmxcfs(true),
        PmxcfsAction::Serve => {
            let layout = lab.layout();
            let mounts: Vec<Mount> = Settings::load(layout)?
                .node_ids()
                .into_iter()
                .map(|node| Mount {
                    node: node.name(),
                    member: Member {
                        id: node.number(),
                        ip: node.ip(),
                        up: false,
                        cut: false,
                        unheard: false,
                        stopped: false,
                    },
                    dir: layout.pve(node),
                    pid_file: Some(layout.node_pid(node)),
                })
                .collect();
            mount(&layout.pmxcfs_store(), &mounts)?.serve(&layout.pmxcfs_socket(), say_ready)
        }
    }
}

fn supervise(lab: &Lab) -> Result<()> {
    let layout = lab.layout();
    let own = Proc::of(std::process::id().cast_signed()).context("/proc does not show this")?;
    fs::create_dir_all(layout.run()).context("cannot make the lab's directory")?;
    own.write(&layout.host_pid()).context("cannot write the pid file")?;
    let place = Place {
        socket: layout.host_socket(),
        services: layout.host_services(),
        slice: None,
        cpu_slice: Hierarchies::open().ok().map(|hierarchies| hierarchies.cpu()),
        bound: true,
    };
    Supervisor::start(place)?.run()?;
    fs::remove_file(layout.host_pid()).context("cannot remove the pid file")
}

/// Tells the supervisor that this service is ready.
fn say_ready() {
    let told = std::env::var_os("NOTIFY_SOCKET").map(|path| {
        let socket = UnixDatagram::unbound()?;
        socket.send_to(b"READY=1", path)
    });
    if let Some(Err(error)) = told {
        say(&format!("lab: cannot say that it is ready: {error}"));
    }
}
