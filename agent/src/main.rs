//! `pve-sandbox-agent`: flags, configuration, logs, run.

mod node_setup;
mod production;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use agent::{
    config::{self, Config, Flags},
    join::Line,
    template::{self, Order, Source},
};
use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use daemon::chain::Chain;
use ipnet::Ipv4Net;
use proto::{
    id::Vmid,
    name::{Port, SnapshotId},
};

/// Path where the package installs the configuration.
const CONFIG: &str = "/etc/pve-sandbox/agent.toml";

/// Creates, runs and removes the sandboxes of one Proxmox VE node.
#[derive(Debug, Parser)]
#[command(name = "pve-sandbox-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent
    Run(Common),
    /// Show every value of the configuration and where it comes from, and what keeps the agent from
    /// starting
    CheckConfig(Common),
    /// Join a controller: make this node's keys, get its certificates, write what is missing in the
    /// configuration, and start the agent. `sandboxctl node token NODE` prints the line to run
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
    /// Serve the commands of one sandbox; started by the agent
    #[command(hide = true)]
    Shim {
        /// The sandbox to serve, in JSON
        options: String,
    },
    /// Write Caddy's configuration with a fresh proof, as the agent does at its start where there is
    /// none; then restart the agent first, Caddy second
    RenderCaddy {
        #[command(flatten)]
        common: Common,
        /// Print it instead, without a proof
        #[arg(long)]
        print: bool,
    },
}

#[derive(Debug, Subcommand)]
enum BridgeCommand {
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

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Make the first template: a small Debian with git, curl, an ssh client, python3 and a web server,
    /// checked by starting a clone of it. Again: say that it is there
    #[command(after_help = TEMPLATE_HELP)]
    Init(TemplateInit),
}

const TEMPLATE_HELP: &str = "\
Examples:
  pve-sandbox-agent template init
  pve-sandbox-agent template init --vmid 9001 --snapshot trixie --suite trixie --storage local-zfs

The agent finds the template by a line in its description; no [[template]] is needed. A run that was
interrupted is repeated: what it has left is removed first.";

#[derive(Debug, Args)]
struct TemplateInit {
    /// Number of the template's container [default: that of an earlier run, else the first from 9000
    /// that nothing in the cluster has]
    #[arg(long)]
    vmid: Option<Vmid>,
    /// Name of the snapshot [default: debian-RELEASE]
    #[arg(long)]
    snapshot: Option<SnapshotId>,
    /// Release of Debian [default: that of this node]
    #[arg(long, value_parser = template::suite)]
    suite: Option<String>,
    /// Debian mirror
    #[arg(long, default_value = template::MIRROR)]
    mirror: String,
    /// Use this archive instead of building one: a path, or a volume such as
    /// local:vztmpl/debian-12-standard.tar.zst
    #[arg(long, conflicts_with_all = ["suite", "mirror"], requires = "snapshot")]
    archive: Option<String>,
    /// Port and path of a web server in the archive that answers when it is ready, such as 8000/
    #[arg(long, value_name = "PORT/PATH", requires = "archive", value_parser = template::http)]
    http: Option<(Port, String)>,
    /// Longest time until a clone of it is ready, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = template::PATIENCE_S)]
    patience_s: u64,
    /// Size of its disk, GiB; sandboxes have at least as much
    #[arg(long, default_value_t = template::DISK_GIB, value_parser = clap::value_parser!(u32).range(1..=1024))]
    disk_gib: u32,
    /// Cores of a sandbox that asks for no number
    #[arg(long, default_value_t = template::CORES, value_parser = clap::value_parser!(u32).range(1..=64))]
    cores: u32,
    /// Memory of a sandbox that asks for none, MiB
    #[arg(long, default_value_t = template::MEMORY_MIB, value_parser = clap::value_parser!(u32).range(64..=524_288))]
    memory_mib: u32,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Configuration file; /etc/pve-sandbox/agent.toml if that is there
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Log as JSON
    #[arg(long)]
    log_json: bool,
    #[command(flatten)]
    flags: Flags,
}

impl Common {
    fn config(&self) -> Result<Config> {
        let default = PathBuf::from(CONFIG);
        let path = self.config.clone().or_else(|| default.exists().then_some(default));
        Ok(Config::load(path.as_deref(), &self.flags, &config::environment)?)
    }
}

impl TemplateInit {
    fn order(&self, config: &Config) -> Result<Order> {
        let (source, http, name) = match &self.archive {
            Some(archive) => (Source::Archive(archive.clone()), self.http.clone(), String::new()),
            None => {
                let suite = self.suite.clone().or_else(template::release);
                let suite = suite.context("cannot read the node's release; use --suite")?;
                let name = format!("debian-{suite}");
                let mirror = self.mirror.clone();
                (
                    Source::Debian { suite, mirror },
                    Some(template::http(template::WWW).map_err(anyhow::Error::msg)?),
                    name,
                )
            }
        };
        let snapshot = self.snapshot.clone().map_or_else(|| name.parse(), Ok)?;
        Ok(Order {
            vmid: match self.vmid {
                Some(vmid) => vmid,
                None => template::vmid(&config.pve.root, &config.node.value)?,
            },
            snapshot,
            source,
            http,
            patience: Duration::from_secs(self.patience_s.min(3600)),
            storage: node_setup::storage(config)?,
            disk_gib: self.disk_gib,
            bridge: config.network.bridge.clone(),
            name_server: node_setup::name_server(config),
            cores: self.cores,
            memory_mib: self.memory_mib,
        })
    }
}

fn main() -> ExitCode {
    agent::sys::heap::keep_small();
    match execute(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pve-sandbox-agent: {}", Chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: &Command) -> Result<()> {
    match command {
        Command::CheckConfig(common) => {
            let config = common.config()?;
            for setting in config.settings() {
                println!("{setting}");
            }
            production::show_unfit_templates(&config);
            production::check(&config)
        }
        Command::ConfirmNodeNumber(common) => production::confirm_number(&common.config()?),
        Command::RenderCaddy { common, print } => production::render(&common.config()?, *print),
        Command::Template { command: TemplateCommand::Init(init) } => {
            let config = init.common.config()?;
            let order = init.order(&config)?;
            node_setup::make_template(&config, &order)
        }
        Command::Join { line, config, no_start, no_template } => {
            daemon::logs::init("warn", false);
            node_setup::join(line, config, !no_start, !no_template)
        }
        Command::Bridge { command: BridgeCommand::Init { subnet, config, no_start } } => {
            node_setup::make_bridge(*subnet, config, !no_start)
        }
        Command::Shim { options } => {
            daemon::logs::init("info", false);
            Ok(agent::shim::process::run(options)?)
        }
        Command::Run(common) => {
            let config = common.config()?;
            daemon::logs::init("info", common.log_json);
            agent::sys::privileges::confine().context("capabilities: is this root?")?;
            // The agent mostly waits: two threads, and few for blocking calls.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(8)
                .enable_all()
                .build()
                .context("no runtime")?;
            runtime.block_on(async { production::run(config, daemon::stop::signal_token()?).await })
        }
    }
}
