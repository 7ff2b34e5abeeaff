//! `pve-sandbox-agent`: flags, configuration, logs, run.

mod production;

use std::{path::PathBuf, process::ExitCode};

use agent::{
    config::{self, Config, Flags},
    join::Line,
};
use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use daemon::chain::Chain;

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
    },
    /// Accept the number that this node has in its cluster now, after it has changed; stop the agent
    /// first, and start it again after
    ConfirmNodeNumber(Common),
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
            production::check(&config)
        }
        Command::ConfirmNodeNumber(common) => production::confirm_number(&common.config()?),
        Command::RenderCaddy { common, print } => production::render(&common.config()?, *print),
        Command::Join { line, config, no_start } => {
            daemon::logs::init("warn", false);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("no runtime")?.block_on(production::join(line, config, *no_start))
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
