//! `pve-sandbox-agent`: flags, configuration, logs, run.

mod node_removal;
mod node_setup;
mod node_tunnel;
mod production;

use std::{io::Write as _, path::PathBuf, process::ExitCode, time::Duration};

use agent::{
    commands::{BridgeCommand, CONFIG, Cli, Command, Common, TemplateCommand, TemplateInit},
    config::{self, Config},
    doctor::{self, Host},
    join::lacks::Wanted,
    pve::{files::READS_MAX, looks::LOOKS_MAX},
    sys::privileges::Missing,
    template::{self, Named, Order, Source},
};
use anyhow::{Context, Result, ensure};
use clap::Parser as _;
use daemon::{
    chain::Chain,
    doctor::{Report, State},
};
use proto::name::SnapshotId;

/// Threads for blocking calls other than reads of /etc/pve and looks at what tenants make.
const OTHERS: usize = 4;

/// Returns the settings of a new template.
fn order(init: &TemplateInit, config: &Config) -> Result<Order> {
    let (source, http, name) = match &init.archive {
        Some(archive) => (Source::Archive(archive.clone()), init.http.clone(), String::new()),
        None => {
            let suite = init.suite.clone().or_else(template::release);
            let suite = suite.context("cannot read the node's release; use --suite")?;
            let name = format!("debian-{suite}");
            let mirror = init.mirror.clone();
            (
                Source::Debian { suite, mirror },
                Some(template::http(template::WWW).map_err(anyhow::Error::msg)?),
                name,
            )
        }
    };
    let snapshot = init.snapshot.clone().map_or_else(|| name.parse::<SnapshotId>(), Ok)?;
    ensure!(
        !snapshot.is_reserved(),
        "{snapshot} marks sandboxes that have no template: choose another name with --snapshot"
    );
    let storage = init.common.flags.storage.as_deref();
    let named = Named { snapshot: init.snapshot.as_ref(), storage };
    Ok(Order {
        vmid: match init.vmid {
            Some(vmid) => vmid,
            None => template::vmid(&config.pve.root, &config.node.value, named)?,
        },
        is_named: init.vmid.is_some(),
        snapshot,
        source,
        http,
        patience: Duration::from_secs(init.patience_s.min(3600)),
        storage: node_setup::storage(config)?,
        disk_gib: init.disk_gib,
        bridge: config.network.bridge.clone(),
        name_server: node_setup::name_server(config),
        cores: init.cores,
        memory_mib: init.memory_mib,
    })
}

/// Version of this program. Tests of upgrades build it a second time with another one.
const VERSION: &str = match option_env!("PVE_SANDBOX_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

fn main() -> ExitCode {
    agent::sys::heap::keep_small();
    daemon::version::set(VERSION);
    // Also in the shims: they hold environments, input and output of commands.
    if let Err(error) = daemon::core_dumps::forbid() {
        eprintln!("pve-sandbox-agent: a crash may write secrets to the disk: {error}");
    }
    match execute(&Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pve-sandbox-agent: {}", Chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: &Command) -> Result<ExitCode> {
    match command {
        Command::CheckConfig(common) => return check_config(common),
        Command::Doctor { common, json } => return doctor(common, *json),
        Command::ConfirmNodeNumber(common) => production::confirm_number(&common.config()?)?,
        Command::RenderCaddy { common, .. } => production::print_caddy(&common.config()?)?,
        Command::Template { command: TemplateCommand::Init(init) } => {
            let config = init.common.config()?;
            let order = order(init, &config)?;
            node_setup::make_template(&config, &order)?;
        }
        Command::Join { line, config, no_start, no_template } => {
            daemon::logs::init("warn", false);
            let bridge = !line.no_bridge;
            let wanted = Wanted { bridge, template: !no_template, start: !no_start };
            node_setup::join(line, config, wanted)?;
        }
        Command::Setup { config, no_bridge, no_template, no_start, dry_run } => {
            let (bridge, template) = (!no_bridge, !no_template);
            let wanted = Wanted { bridge, template, start: !no_start };
            node_setup::setup(config, wanted, *dry_run)?;
        }
        Command::Bridge { command: BridgeCommand::Init { subnet, config, no_start } } => {
            node_setup::make_bridge(*subnet, config, !no_start)?;
        }
        Command::Uninstall { flags, config } => {
            daemon::logs::init("error", false);
            node_removal::uninstall(flags, config)?;
        }
        Command::Tunnel { command } => return node_tunnel::execute(command),
        Command::Shim { options } => {
            daemon::logs::init("info", false);
            agent::shim::process::run(options)?;
        }
        Command::Run(common) => {
            // First: the configuration warns of templates that it leaves out.
            daemon::logs::init("info", common.log_json);
            let config = common.config()?;
            let missing =
                agent::sys::privileges::confine().context("capabilities: is this root?")?;
            for Missing { name, needed_for } in missing {
                tracing::error!(name, needed_for, "the agent lacks a capability");
            }
            // The agent mostly waits: two threads, and few for blocking calls. What hangs keeps its
            // own share of them.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(READS_MAX + LOOKS_MAX + OTHERS)
                .enable_all()
                .build()
                .context("no runtime")?;
            runtime
                .block_on(async { production::run(config, daemon::stop::signal_token()?).await })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows every value of the configuration, and what of `doctor` concerns files alone.
fn check_config(common: &Common) -> Result<ExitCode> {
    let config = match common.config() {
        Ok(config) => config,
        Err(error) => return show(&doctor::of_mistakes(error, &host(common)), false),
    };
    for setting in config.settings() {
        println!("{setting}");
    }
    let start = Report::new(doctor::of_start(&config));
    let templates = doctor::of_templates(&config);
    let certificate = doctor::of_certificate(&config);
    let found = start.checks.iter().chain(&certificate).chain(&templates);
    let found: Vec<_> = found.filter(|check| check.state != State::Ok).cloned().collect();
    if !found.is_empty() {
        show(&Report::new(found), false)?;
    }
    // A node without a snapshot starts, and so does one whose template is unfit, or whose own certificate is.
    anyhow::ensure!(!start.has_failed(), "the agent would not start, or Caddy would not");
    Ok(ExitCode::SUCCESS)
}

fn doctor(common: &Common, json: bool) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (path, host) = (common.path(), host(common));
    let env = &config::environment;
    show(&runtime.block_on(doctor::run(path.as_deref(), &common.flags, env, &host)), json)
}

fn host(common: &Common) -> Host {
    Host::of_node(&common.path().unwrap_or_else(|| PathBuf::from(CONFIG)))
}

/// Prints a report; returns the exit code.
fn show(report: &Report, json: bool) -> Result<ExitCode> {
    let text = if json { report.json().to_string() } else { report.text() };
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")?;
    Ok(if report.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
