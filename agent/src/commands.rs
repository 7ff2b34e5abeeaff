//! Command line of `pve-sandbox-agent`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use ipnet::Ipv4Net;
use proto::{
    id::Vmid,
    name::{Port, SnapshotId},
};

use crate::{
    config::{self, Config, Flags},
    join::Line,
    template,
    tunnel::args::TunnelCommand,
    uninstall,
};

/// Path where the package installs the configuration.
pub const CONFIG: &str = "/etc/pve-sandbox/agent.toml";

/// Creates, runs and removes the sandboxes of one Proxmox VE node.
#[derive(Debug, Parser)]
#[command(name = "pve-sandbox-agent", version = daemon::version::get(), max_term_width = 80)]
pub struct Cli {
    /// Sub-command.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands of the program.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent
    Run(Common),
    /// Show every value of the configuration and where it comes from, and what keeps the agent from
    /// starting
    CheckConfig(Common),
    /// Look at this node: what is wrong, and what mends it; exit 1 if something does not work
    #[command(after_help = DOCTOR_HELP)]
    Doctor {
        #[command(flatten)]
        common: Common,
        /// Print one object in JSON
        #[arg(long)]
        json: bool,
    },
    /// Join a controller: make this node's keys, get its certificates, write what is missing in the
    /// configuration, and start the agent. `sandboxctl node token NODE` prints the line to run. Exit 1 if
    /// the node has joined, but something is missing; `setup` makes it
    #[command(override_usage = JOIN_USAGE)]
    Join {
        #[command(flatten)]
        line: Line,
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = CONFIG)]
        config: PathBuf,
        /// Start nothing
        #[arg(long)]
        no_start: bool,
        /// Make no template, also where the node has none
        #[arg(long)]
        no_template: bool,
    },
    /// Make what this node lacks after it has joined: the bridge, the first template, units that run. Again:
    /// do only what is missing
    Setup {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = CONFIG)]
        config: PathBuf,
        /// Make no bridge for the sandboxes: they use the one that is there
        #[arg(long)]
        no_bridge: bool,
        /// Make no template, also where the node has none
        #[arg(long)]
        no_template: bool,
        /// Start nothing
        #[arg(long)]
        no_start: bool,
        /// Show what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Make the network of the sandboxes
    Bridge {
        #[command(subcommand)]
        command: BridgeCommand,
    },
    /// Accept the number that this node has in its cluster now, after it has changed; stop the agent
    /// first, and start it again after
    ConfirmNodeNumber(Common),
    /// Make templates that sandboxes are cloned from
    Template {
        #[command(subcommand)]
        command: TemplateCommand,
    },
    /// Reach the sandboxes from the internet through a Cloudflare Tunnel, without an open port
    Tunnel {
        #[command(subcommand)]
        command: TunnelCommand,
    },
    /// Prepare this node for the removal of the package: choose what becomes of its sandboxes, of its
    /// journal and keys, and of the bridge. It stops the agent, and asks first
    #[command(after_help = UNINSTALL_HELP)]
    Uninstall {
        #[command(flatten)]
        flags: uninstall::Flags,
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = CONFIG)]
        config: PathBuf,
    },
    /// Serve the commands of one sandbox; started by the agent
    #[command(hide = true)]
    Shim {
        /// The sandbox to serve, in JSON
        options: String,
    },
    /// Print Caddy's configuration, without the proof. The agent writes it, has Caddy use it, and puts it back
    /// after a change by hand
    RenderCaddy {
        #[command(flatten)]
        common: Common,
        /// Accepted for scripts of earlier versions
        #[arg(long, hide = true)]
        print: bool,
    },
}

/// Commands of `bridge`.
#[derive(Debug, Subcommand)]
pub enum BridgeCommand {
    /// Make a bridge of the sandboxes alone, with addresses of its own, a way out and a name server;
    /// touch no other bridge. Again: complete it
    Init {
        /// Network of the sandboxes [default: network.pool of the configuration, else 10.100.N.0/24
        /// with the node's number in its cluster]
        #[arg(long, value_name = "NETWORK")]
        subnet: Option<Ipv4Net>,
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = CONFIG)]
        config: PathBuf,
        /// Write the files only
        #[arg(long)]
        no_start: bool,
    },
}

/// Commands of `template`.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make the first template: a small Debian with git, curl, an ssh client, python3 and a web server,
    /// checked by starting a clone of it. Again: say that it is there
    #[command(after_help = TEMPLATE_HELP)]
    Init(TemplateInit),
}

const JOIN_USAGE: &str = "\
PVE_SANDBOX_JOIN_TOKEN=<TOKEN> pve-sandbox-agent join [OPTIONS]
                              --ca-sha256 <HEX> <CONTROLLER>";

const DOCTOR_HELP: &str = "\
Examples:
  pve-sandbox-agent doctor  it changes nothing, and takes some seconds
  pve-sandbox-agent doctor --json | jq '.checks[] | select(.state != \"ok\")'";

const UNINSTALL_HELP: &str = "\
Examples:
  pve-sandbox-agent uninstall --dry-run
  pve-sandbox-agent uninstall                   it asks
  pve-sandbox-agent uninstall --sandboxes delete --data delete \\
      --bridge delete --yes
  pve-sandbox-agent uninstall --sandboxes keep --yes

Sandboxes that are kept run on without an agent, and keep the journal, the keys
and the bridge; an agent that is installed later takes them in again. The last
lines say what comes next: with sandboxes that are kept, apt remove, which keeps
agent.toml; else apt purge.";

const TEMPLATE_HELP: &str = "\
Examples:
  pve-sandbox-agent template init
  pve-sandbox-agent template init --vmid 9001 --suite trixie --storage local-zfs

The agent finds the template by a line in its description; no [[template]] is
needed. A run that was interrupted is repeated: what it has left is removed
first.";

/// Arguments of `template init`.
#[derive(Debug, Args)]
pub struct TemplateInit {
    /// Number of the template's container [default: that of an earlier run, unless --snapshot or --storage
    /// names another than that has; else the first from 9000 that nothing in the cluster has]
    #[arg(long)]
    pub vmid: Option<Vmid>,
    /// Name of the snapshot [default: debian-RELEASE]
    #[arg(long)]
    pub snapshot: Option<SnapshotId>,
    /// Release of Debian [default: that of this node]
    #[arg(long, value_parser = template::suite)]
    pub suite: Option<String>,
    /// Debian mirror
    #[arg(long, default_value = template::MIRROR)]
    pub mirror: String,
    /// Use this archive instead of building one: a path, or a volume such as
    /// local:vztmpl/debian-12-standard.tar.zst
    #[arg(long, conflicts_with_all = ["suite", "mirror"], requires = "snapshot")]
    pub archive: Option<String>,
    /// Port and path of a web server in the archive that answers when it is ready, such as 8000/
    #[arg(long, value_name = "PORT/PATH", requires = "archive", value_parser = template::http)]
    pub http: Option<(Port, String)>,
    /// Longest time until a clone of it is ready, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = template::PATIENCE_S)]
    pub patience_s: u64,
    /// Size of its disk, GiB; sandboxes have at least as much
    #[arg(long, default_value_t = template::DISK_GIB, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub disk_gib: u32,
    /// Cores of a sandbox that asks for no number
    #[arg(long, default_value_t = template::CORES, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cores: u32,
    /// Memory of a sandbox that asks for none, MiB
    #[arg(long, default_value_t = template::MEMORY_MIB, value_parser = clap::value_parser!(u32).range(64..=524_288))]
    pub memory_mib: u32,
    /// Configuration.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of every command that reads the whole configuration.
#[derive(Debug, Args)]
pub struct Common {
    /// Configuration file; /etc/pve-sandbox/agent.toml if that is there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Log as JSON
    #[arg(long)]
    pub log_json: bool,
    /// Settings that take the place of those in the file.
    #[command(flatten)]
    pub flags: Flags,
}

impl Common {
    /// Returns the configuration file that is given, or the package's if it is there.
    pub fn path(&self) -> Option<PathBuf> {
        let default = PathBuf::from(CONFIG);
        self.config.clone().or_else(|| default.exists().then_some(default))
    }

    /// Reads and completes the configuration.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn config(&self) -> Result<Config, config::Error> {
        Config::load(self.path().as_deref(), &self.flags, &config::environment)
    }
}
