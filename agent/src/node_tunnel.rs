//! Commands of the tunnel: they join the parts of `agent::tunnel`, and print what these do.

use std::{fs, path::Path, process::ExitCode};

use agent::{
    clock::{Clock as _, SystemClock},
    config::{self, Config, File, Flags, edit},
    journal::SqliteJournal,
    run::Runner,
    tunnel::{
        NO_CLOUDFLARED, UNIT,
        api::Api,
        args::{self, Account, Common, Setup, Status, Teardown, Test, TunnelCommand},
        judge, look,
        node::{self, Node, Paths},
        probe::{Probe, Service},
        settings::{self, Controller, Hostname},
        setup, teardown,
    },
};
use anyhow::{Context, Result};
use daemon::{
    chain::Chain,
    doctor::{Check, Report, reach},
    systemctl,
};
use futures_util::{StreamExt as _, stream};

/// Services that are asked at a time.
const AT_ONCE: usize = 4;
/// Services of a sandbox that are asked.
const SERVICES_MAX: usize = 32;

/// Runs a command; returns the exit code.
pub(crate) fn execute(command: &TunnelCommand) -> Result<ExitCode> {
    daemon::logs::init("warn", false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            TunnelCommand::Setup(args) => Box::pin(set_up(args)).await,
            TunnelCommand::Status(args) => status(args).await,
            TunnelCommand::Teardown(args) => tear_down(args).await,
            TunnelCommand::Test(args) => test(args).await,
        }
    })
}

fn load(common: &Common, domain: Option<&Hostname>) -> Result<Config> {
    let flags = Flags { domain: domain.map(Hostname::to_string), ..Flags::default() };
    Ok(Config::load(Some(&common.config), &flags, &config::environment)?)
}

fn api(account: &Account) -> Result<Option<Api>> {
    let token = args::token(account.token_file.as_deref(), &config::environment)
        .context("the API token cannot be read")?;
    Ok(token.map(|token| Api::new(&account.api, &token, None)).transpose()?)
}

fn needed_api(account: &Account) -> Result<Api> {
    api(account)?.context(
        "this needs an API token of Cloudflare: give --token-file FILE, or - for stdin, or CF_API_TOKEN; make one at \
         dash.cloudflare.com, My Profile > API Tokens, with Account > Cloudflare Tunnel > Edit, Zone > DNS > Edit and \
         Zone > Zone > Read",
    )
}

/// Calls `work` with this node, whose commands write their output to a directory of this process.
async fn with_node<T>(
    config: &Config,
    common: &Common,
    work: impl AsyncFnOnce(&Node) -> T,
) -> Result<T> {
    let dir = config.run_dir.join(format!("tunnel-{}", std::process::id()));
    let runner = Runner::new(dir.clone(), config.pve.proc.clone(), |_| false, 1)
        .with_context(|| format!("directory {}", dir.display()))?;
    let done = work(&Node::new(Paths::of_host(config), runner)).await;
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    Ok(done)
}

async fn set_up(args: &Setup) -> Result<ExitCode> {
    let domain = domain(args)?;
    let config = load(&args.common, Some(&domain))?;
    let origin = node::origin(&config).context("ingress.public of the configuration is empty")?;
    let controller = match (&args.controller_host, &args.controller_address) {
        (Some(host), Some(address)) => {
            let controller = Controller { host: host.clone(), address: address.clone() };
            let own = own_ports(&config);
            settings::check_controller(&controller, &domain, &own).map_err(anyhow::Error::msg)?;
            Some(controller)
        }
        _ => None,
    };
    let order = setup::Order {
        name: args.name.clone().unwrap_or_else(|| settings::name_of(&domain)),
        zone: args.zone_id.clone(),
        account: args.account_id.clone(),
        controller,
        metrics: settings::METRICS,
        replace_record: args.replace_record,
        dry_run: args.dry_run,
        start: !args.no_start,
    };
    let api = needed_api(&args.account)?;
    let mut say = |line: &str| println!("{line}");
    let done =
        with_node(&config, async |node| setup::run(&order, &origin, &api, node, &mut say).await);
    let done = match done.await? {
        Ok(done) => done,
        Err(setup::Error::Node(error @ node::Error::Missing(_))) => {
            eprintln!("pve-sandbox-agent: {error}");
            return Ok(ExitCode::from(NO_CLOUDFLARED));
        }
        Err(error) => return Err(error.into()),
    };
    let changes = done.changes + usize::from(set_domain(args, &domain)?);
    match (changes, args.dry_run) {
        (0, _) => println!("nothing is to be changed"),
        (_, true) => println!("nothing was changed: this was a dry run"),
        (_, false) => {}
    }
    if done.is_started && done.ready.is_none() {
        eprintln!(
            "pve-sandbox-agent: {UNIT} has no connection to Cloudflare yet: journalctl -u {UNIT} -n 20; it needs port \
             7844 to the internet, UDP or TCP"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Chooses the domain; one that contradicts the configuration is refused.
fn domain(args: &Setup) -> Result<Hostname> {
    let in_file = domain_of(&args.common.config)?;
    let parsed = |text: String| text.parse::<Hostname>().map_err(anyhow::Error::from);
    let env = |name: &str| config::environment(name).filter(|text| !text.is_empty());
    let domain = match (&args.domain, &in_file) {
        (Some(domain), _) => domain.clone(),
        (None, Some(domain)) => parsed(domain.clone())?,
        (None, None) => {
            let found = env("PVE_PUBLIC_DOMAIN").or_else(|| env("CF_DOMAIN"));
            parsed(found.context("no domain is known: give --domain, such as example.com")?)?
        }
    };
    if let Some(other) = in_file
        && other != domain.as_str()
    {
        anyhow::bail!(
            "ingress.domain in {} is {other}, and not {domain}: change it there first, or leave --domain out",
            args.common.config.display()
        );
    }
    Ok(domain)
}

fn domain_of(path: &Path) -> Result<Option<String>> {
    let file: File = daemon::config::load(path).map_err(config::Error::File)?;
    Ok(file.ingress.domain)
}

/// Writes the domain into the configuration, and lets agent and Caddy use it; returns whether that was to be done.
fn set_domain(args: &Setup, domain: &Hostname) -> Result<bool> {
    let path = &args.common.config;
    if domain_of(path)?.is_some() {
        return Ok(false);
    }
    if args.dry_run {
        println!(
            "would  set ingress.domain = \"{domain}\" in {}, and restart the agent",
            path.display()
        );
        return Ok(true);
    }
    let wanted = vec![("ingress", "domain", toml_edit::value(domain.as_str()))];
    for line in
        edit::set(path, wanted).with_context(|| format!("cannot change {}", path.display()))?
    {
        println!("change {line}");
    }
    if args.no_start || !systemctl::is_there() {
        println!("note   restart pve-sandbox-agent first, and pve-sandbox-ingress second");
        return Ok(true);
    }
    println!("change restart pve-sandbox-agent and pve-sandbox-ingress");
    systemctl::run(&["restart", "pve-sandbox-agent"])?;
    systemctl::run(&["enable", "--quiet", "pve-sandbox-ingress"])?;
    systemctl::run(&["restart", "pve-sandbox-ingress"])?;
    Ok(true)
}

/// Ports of this node that are never published as the controller's.
fn own_ports(config: &Config) -> Vec<(u16, &'static str)> {
    let ingress = &config.ingress;
    let public = ingress.public.iter().map(|address| (address.port(), "Caddy's"));
    let peer = ingress.peer.map_or(config::PEER_PORT, |peer| peer.port());
    [(config.listen.value.port(), "the agent's"), (peer, "the hop between the nodes' Caddys")]
        .into_iter()
        .chain(public)
        .collect()
}

async fn status(args: &Status) -> Result<ExitCode> {
    let config = load(&args.common, None)?;
    let paths = Paths::of_host(&config);
    let (origin, api) = (node::origin(&config), api(&args.account)?);
    let now_ms = SystemClock::new(&config.boot_id).now_ms();
    let facts = look::look(&paths, origin.as_ref(), api.as_ref(), now_ms).await?;
    let checks = match facts {
        Some(facts) => judge::checks(&facts, &paths),
        None => vec![Check::failed(
            "tunnel",
            "",
            "no tunnel was set up on this node",
            "pve-sandbox-agent tunnel setup --token-file FILE",
        )],
    };
    Ok(show(checks, args.json))
}

fn show(checks: Vec<Check>, json: bool) -> ExitCode {
    let report = Report::new(checks);
    println!("{}", if json { report.json().to_string() } else { report.text() });
    if report.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn tear_down(args: &Teardown) -> Result<ExitCode> {
    let config = load(&args.common, None)?;
    let api = if args.everything { Some(needed_api(&args.account)?) } else { None };
    let order = teardown::Order { force: args.force, dry_run: args.dry_run };
    let mut say = |line: &str| println!("{line}");
    let done =
        with_node(&config, async |node| teardown::run(order, api.as_ref(), node, &mut say).await);
    done.await??;
    if !args.everything {
        println!("the tunnel and its DNS records stay at Cloudflare: --everything removes them");
    }
    Ok(ExitCode::SUCCESS)
}

async fn test(args: &Test) -> Result<ExitCode> {
    let config = load(&args.common, None)?;
    let origin = node::origin(&config).context("agent.toml has no ingress.domain")?;
    let record = SqliteJournal::record_of(&config.journal(), args.id).map_err(|error| {
        anyhow::anyhow!("the journal of this node cannot be read: {}", Chain(&error))
    })?;
    let record = record.with_context(|| {
        format!(
            "this node's journal has no sandbox {}: run this on its node (sandboxctl get {})",
            args.id, args.id
        )
    })?;
    let services: Vec<_> = record
        .services
        .iter()
        .take(SERVICES_MAX)
        .map(|(name, port)| Service { name: name.to_string(), port: *port })
        .collect();
    anyhow::ensure!(
        !services.is_empty(),
        "{} has no exposed service: sandboxctl expose {} NAME PORT",
        record.id,
        record.id
    );
    let metrics = node::settings(&Paths::of_host(&config))?;
    let metrics = metrics.map_or(settings::METRICS, |settings| settings.metrics);
    let probe = Probe {
        web: Probe::client(None)?,
        domain: origin.domain.to_string(),
        at: None,
        caddy: reach::local(origin.caddy),
        connections: node::ready(metrics).await.map(|ready| ready.connections),
    };
    let checks = services.iter().map(|service| probe.check(&record.id, service));
    let checks = stream::iter(checks).buffered(AT_ONCE).collect::<Vec<_>>().await;
    Ok(show(checks, args.json))
}
