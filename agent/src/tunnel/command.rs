//! Commands of an operator: they join the parts of this module, and say what these do.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use daemon::{
    chain::Chain,
    doctor::{Check, Report},
};
use futures_util::{StreamExt as _, stream};

use super::{
    UNIT,
    api::Api,
    args::{self, Account, Common, Setup, Status, Teardown, Test, TunnelCommand, ZoneFlags},
    ids::CloudId,
    judge, look,
    node::{self, Node, Paths},
    probe::{Probe, Service},
    settings::{self, Controller, Hostname, Settings},
    setup, teardown,
};
use crate::{
    clock::{Clock as _, SystemClock},
    config::{self, Config, File, Flags, edit},
    journal::{OpenPort, Record, SqliteJournal},
    run::Runner,
};

/// Open ports that are asked at a time.
const AT_ONCE: usize = 4;
/// Open ports of a sandbox that are asked.
const PORTS_MAX: usize = 32;
/// Units that a new domain is for, the agent first.
const AGENT: &str = "pve-sandbox-agent";
const INGRESS: &str = "pve-sandbox-ingress";

/// Where the commands work. Below another root in tests.
#[derive(Debug, Clone)]
pub struct Host {
    /// Kernel's list of network interfaces.
    pub net: PathBuf,
    /// Reads a variable of the environment.
    pub env: fn(&str) -> Option<String>,
    /// Files and programs of the tunnel, if they are not those of the host.
    pub paths: Option<Paths>,
}

impl Default for Host {
    fn default() -> Self {
        Self { net: "/sys/class/net".into(), env: config::environment, paths: None }
    }
}

impl Host {
    fn load(&self, common: &Common, domain: Option<&Hostname>) -> Result<Config> {
        let flags = Flags { domain: domain.map(Hostname::to_string), ..Flags::default() };
        Ok(Config::complete(file(&common.config)?, &flags, &self.env, &self.net)?)
    }

    fn paths(&self, config: &Config) -> Paths {
        self.paths.clone().unwrap_or_else(|| Paths::of_host(config))
    }

    /// Reads a variable of the environment; an empty one counts as none.
    fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|text| !text.is_empty())
    }

    fn api(&self, account: &Account) -> Result<Option<Api>> {
        let token = args::token(account.token_file.as_deref(), &self.env)
            .context("the API token cannot be read")?;
        Ok(token.map(|token| Api::new(&account.api, &token, None)).transpose()?)
    }

    fn needed_api(&self, account: &Account) -> Result<Api> {
        self.api(account)?.context(
            "this needs an API token of Cloudflare: give --token-file FILE, or - for stdin, or CF_API_TOKEN; make \
             one at dash.cloudflare.com, My Profile > API Tokens, with Account > Cloudflare Tunnel > Edit, Zone > DNS \
             > Edit and Zone > Zone > Read",
        )
    }

    /// Calls `work` with this node, whose programs write their output to a directory of this process.
    async fn with_node<T>(
        &self,
        config: &Config,
        work: impl AsyncFnOnce(&Node) -> Result<T>,
    ) -> Result<T> {
        let dir = config.run_dir.join(format!("tunnel-{}", std::process::id()));
        let runner = Runner::new(dir.clone(), config.pve.proc.clone(), |_| false, 1)
            .with_context(|| format!("directory {}", dir.display()))?;
        let done = work(&Node::new(self.paths(config), runner)).await;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", dir.display()))
            }
            Ok(()) | Err(_) => done,
        }
    }
}

fn file(path: &Path) -> Result<File> {
    Ok(daemon::config::load(path).map_err(config::Error::File)?)
}

/// Says a line.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// Runs a command; returns false when it found that something does not work.
///
/// # Errors
/// When it cannot be done.
pub async fn execute(command: &TunnelCommand, host: &Host, say: Say<'_>) -> Result<bool> {
    match command {
        TunnelCommand::Setup(args) => Box::pin(set_up(args, host, say)).await,
        TunnelCommand::Status(args) => Box::pin(status(args, host, say)).await,
        TunnelCommand::Teardown(args) => Box::pin(tear_down(args, host, say)).await,
        TunnelCommand::Test(args) => test(args, host, say).await,
    }
}

/// Returns true for the failure of a node without cloudflared, which has an exit code of its own.
pub fn is_without_cloudflared(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(setup::Error::Node(node::Error::Missing(_))))
}

async fn set_up(args: &Setup, host: &Host, say: Say<'_>) -> Result<bool> {
    let domain = domain(args, host)?;
    let config = host.load(&args.common, Some(&domain))?;
    let origin = node::origin(&config).context("ingress.public of the configuration is empty")?;
    let (zone, account) = zone_and_account(&args.zone, host)?;
    let before = node::settings(&host.paths(&config))?;
    let order = setup::Order {
        name: name(args, before.as_ref(), &domain),
        zone,
        account,
        controller: controller(args, &config, &domain)?,
        metrics: args.metrics,
        replace_record: args.replace_record,
        dry_run: args.dry_run,
        start: !args.no_start,
        now_ms: SystemClock::new(&config.boot_id).now_ms(),
    };
    let api = host.needed_api(&args.account)?;
    let (done, domain_is_new) = host
        .with_node(&config, async |node| {
            let done = setup::run(&order, &origin, &api, node, say).await?;
            Ok((done, set_domain(args, &domain, node, say).await?))
        })
        .await?;
    match (done.changes + usize::from(domain_is_new), args.dry_run) {
        (0, _) => say("nothing is to be changed"),
        (_, true) => say("nothing was changed: this was a dry run"),
        (_, false) => {}
    }
    let is_connected = !done.is_started || done.ready.is_some();
    if !is_connected {
        say(&format!(
            "failed {UNIT} has no connection to Cloudflare yet: journalctl -u {UNIT} -n 20; it needs port 7844 to \
             the internet, UDP or TCP"
        ));
    }
    Ok(is_connected)
}

/// Chooses the tunnel's name: the given one, else one that an earlier call was given, else that of the domain.
fn name(args: &Setup, before: Option<&Settings>, domain: &Hostname) -> String {
    let chosen = before.filter(|before| before.name != settings::name_of(&before.domain));
    let kept = chosen.map(|before| before.name.clone());
    args.name.clone().or(kept).unwrap_or_else(|| settings::name_of(domain))
}

/// Returns zone and account, where they are given.
fn zone_and_account(args: &ZoneFlags, host: &Host) -> Result<(Option<CloudId>, Option<CloudId>)> {
    Ok((
        identifier(args.zone_id.as_ref(), "CF_ZONE_ID", host)?,
        identifier(args.account_id.as_ref(), "CF_ACCOUNT_ID", host)?,
    ))
}

/// Returns the identifier that a flag gives, or else a variable of the environment.
fn identifier(flag: Option<&CloudId>, variable: &str, host: &Host) -> Result<Option<CloudId>> {
    if let Some(id) = flag {
        return Ok(Some(id.clone()));
    }
    let found = host.variable(variable).map(|text| text.parse());
    found.transpose().with_context(|| format!("the variable {variable} cannot be used"))
}

fn controller(args: &Setup, config: &Config, domain: &Hostname) -> Result<Option<Controller>> {
    let (Some(host), Some(address)) = (&args.controller_host, &args.controller_address) else {
        return Ok(None);
    };
    let controller = Controller { host: host.clone(), address: address.clone() };
    settings::check_controller(&controller, domain, &own_ports(config))
        .map_err(anyhow::Error::msg)?;
    Ok(Some(controller))
}

/// Ports of this node that are never published as the controller's.
fn own_ports(config: &Config) -> Vec<(u16, &'static str)> {
    let ingress = &config.ingress;
    let public = ingress.public.iter().map(|address| (address.port(), "Caddy's"));
    let peer = ingress.peer.map_or(config::PEER_PORT, |peer| peer.port());
    [
        (config.listen.value.port(), "the agent's"),
        (peer, "that of the hop between the nodes' Caddys"),
    ]
    .into_iter()
    .chain(public)
    .collect()
}

/// Chooses the domain; one that contradicts the configuration is refused.
fn domain(args: &Setup, host: &Host) -> Result<Hostname> {
    let path = &args.common.config;
    let in_file = file(path)?.ingress.domain;
    let text = match (&args.domain, &in_file) {
        (Some(domain), _) => domain.to_string(),
        (None, Some(domain)) => domain.clone(),
        (None, None) => {
            let found = host.variable("PVE_PUBLIC_DOMAIN");
            let found = found.or_else(|| host.variable("CF_DOMAIN"));
            found.context("no domain is known: give --domain, such as example.com")?
        }
    };
    if let Some(other) = in_file.filter(|other| *other != text) {
        anyhow::bail!(
            "ingress.domain in {} is {other}, and not {text}: change it there first, or leave --domain out",
            path.display()
        );
    }
    Ok(text.parse()?)
}

/// Writes the domain into the configuration, if it has none, and lets agent and Caddy use it; returns whether that
/// was to be done.
async fn set_domain(args: &Setup, domain: &Hostname, node: &Node, say: Say<'_>) -> Result<bool> {
    let path = &args.common.config;
    if file(path)?.ingress.domain.is_some() {
        return Ok(false);
    }
    if args.dry_run {
        say(&format!(
            "would  set ingress.domain = \"{domain}\" in {}, and restart {AGENT}",
            path.display()
        ));
        return Ok(true);
    }
    let wanted = vec![("ingress", "domain", toml_edit::value(domain.as_str()))];
    for line in
        edit::set(path, wanted).with_context(|| format!("cannot change {}", path.display()))?
    {
        say(&format!("change {line}"));
    }
    if args.no_start || !node::has_systemd(node.paths()) {
        say(&format!("note   restart {AGENT} first, and {INGRESS} second"));
        return Ok(true);
    }
    say(&format!("change enable and restart {AGENT} and {INGRESS}"));
    // The package enables neither.
    node.systemctl(&["enable", "--quiet", AGENT, INGRESS]).await?;
    node.systemctl(&["restart", AGENT]).await?;
    node.systemctl(&["restart", INGRESS]).await?;
    Ok(true)
}

async fn status(args: &Status, host: &Host, say: Say<'_>) -> Result<bool> {
    let config = host.load(&args.common, None)?;
    let paths = host.paths(&config);
    let (origin, api) = (node::origin(&config), host.api(&args.account)?);
    let now_ms = SystemClock::new(&config.boot_id).now_ms();
    let checks = match look::look(&paths, origin.as_ref(), api.as_ref(), now_ms).await? {
        Some(facts) => judge::checks(&facts, &paths),
        None => vec![Check::failed(
            "tunnel",
            "",
            "no tunnel was set up on this node",
            "pve-sandbox-agent tunnel setup --token-file FILE",
        )],
    };
    Ok(show(checks, args.json, say))
}

/// Shows a report; returns false when something has failed.
fn show(checks: Vec<Check>, json: bool, say: Say<'_>) -> bool {
    let report = Report::new(checks);
    say(&if json { report.json().to_string() } else { report.text() });
    !report.has_failed()
}

async fn tear_down(args: &Teardown, host: &Host, say: Say<'_>) -> Result<bool> {
    let config = host.load(&args.common, None)?;
    let api = if args.everything { Some(host.needed_api(&args.account)?) } else { None };
    let order = teardown::Order { force: args.force, dry_run: args.dry_run };
    let origin = node::origin(&config);
    let (zone, account) = zone_and_account(&args.zone, host)?;
    let cloud = api.as_ref().map(|api| teardown::CloudScope {
        api,
        domain: origin.as_ref().map(|origin| &origin.domain),
        zone: zone.as_ref(),
        account: account.as_ref(),
    });
    host.with_node(&config, async |node| Ok(teardown::run(order, cloud, node, say).await?)).await?;
    if !args.everything {
        say("the tunnel and its DNS records stay at Cloudflare: --everything removes them");
    }
    Ok(true)
}

async fn test(args: &Test, host: &Host, say: Say<'_>) -> Result<bool> {
    let config = host.load(&args.common, None)?;
    let origin = node::origin(&config).context("agent.toml has no ingress.domain")?;
    let found = SqliteJournal::record_of(&config.journal(), args.id);
    let found = found.map_err(|error| {
        anyhow::anyhow!("the journal of this node cannot be read: {}", Chain(&error))
    })?;
    let id = args.id;
    let record = found.with_context(|| {
        format!(
            "this node's journal has no sandbox {id}: run this on its node (sandboxctl get {id})"
        )
    })?;
    let (services, id) = (services(&record), record.id);
    anyhow::ensure!(
        !services.is_empty(),
        "{id} has no open port: sandboxctl expose {id} PORT --name NAME"
    );
    let settings = node::settings(&host.paths(&config))?;
    let metrics = settings.map_or(settings::METRICS, |settings| settings.metrics);
    let probe = Probe {
        web: Probe::client(args.ca.as_deref())?,
        domain: origin.domain.to_string(),
        at: args.edge.map(|edge| vec![edge]),
        caddy: origin.caddy,
        connections: node::ready(metrics).await.map(|ready| ready.connections),
    };
    let checks = services.iter().map(|service| probe.check(&id, service));
    let checks = stream::iter(checks).buffered(AT_ONCE).collect::<Vec<_>>().await;
    Ok(show(checks, args.json, say))
}

/// Lists the open ports, each once, under the first of its names.
fn services(record: &Record) -> Vec<Service> {
    let mut services: Vec<Service> = Vec::new();
    for OpenPort { name, port, visibility } in record.open_ports() {
        if services.len() < PORTS_MAX && services.iter().all(|known| known.port != port) {
            services.push(Service { name: name.to_string(), port, visibility });
        }
    }
    services
}
