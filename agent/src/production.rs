//! Builds the agent on a real node from its configuration.

use std::{fs::DirBuilder, os::unix::fs::DirBuilderExt, path::Path, sync::Arc, time::Duration};

use agent::{
    Agent, Parts, caddy_settings,
    certificates::{Certificates, access_of},
    clock::{Clock, SystemClock},
    config::{Config, PEER_PORT},
    detect::{self, Roots},
    dhcp::{Replies, Server},
    doctor,
    firewall::{Firewall, Grounds, RESOLVER_PORT, nft::NftFirewall},
    hand_edits::{self, HandEdits},
    ingress::{
        caddy::{self, Proof},
        check::IngressCheck,
        hold::Holds,
        keeper::{Files, Keeper},
        metrics::Metrics,
        owner_resolver::{OwnerResolver, Sources},
        probe::Probe,
        program::{CADDY, Caddy, user_of},
        routes::NodeRoutes,
        server::{self, Ingress},
        settings::Settings,
        systemd::Systemd,
        version::{Generation, Version},
    },
    journal::{self, Journal, SqliteJournal},
    load::Sampler,
    name_directory::NameDirectory,
    pve::{Pve, pct::Pct, shim_cgroup, worker},
    reconcile, resolver,
    revoked::Revoked,
    run::Runner,
    saga::Faults,
    sandbox::{
        self, Sandboxes,
        exec::{
            outputs,
            shims::{Allowance, ShimProcesses, Shims},
        },
        lifecycle::address::DhcpReplies,
    },
    sys::apart,
    tasks::Tasks,
    tunnel::{self, keep::Keeper as TunnelKeeper},
    uninstall,
};
use anyhow::{Context, Result};
use daemon::{
    doctor::State,
    key_files::KeyFiles,
    peer::Peer,
    replace::Access,
    systemctl,
    tls::{ClientAuth, Identity, LiveIdentity},
};
use tokio::{net::TcpListener, sync::Notify, task::block_in_place, time::timeout};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

/// Longest wait for pending operations at a stop: systemd's stop timeout, minus our own needs.
const DRAIN: Duration = Duration::from_secs(40);
/// Interval between clean-ups of leftovers of shims.
const SWEEP: Duration = Duration::from_secs(60);
/// Kernel's list of network interfaces.
pub(crate) const NET: &str = "/sys/class/net";
/// File with the name servers of the host, which PVE copies into containers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Port of name servers.
const DNS_PORT: u16 = 53;
/// Longest wait for Caddy to tell its version.
const VERSION_MAX: Duration = Duration::from_secs(10);
/// Longest wait for the last answers to be sent.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Runs the agent until `stop`.
pub(crate) async fn run(config: Config, stop: CancellationToken) -> Result<()> {
    for setting in config.settings() {
        tracing::info!(name = setting.name, value = setting.value, source = %setting.source, "setting");
    }
    private_dir(&config.state_dir)?;
    let tls = &config.tls;
    let (own, hop) = key_files(&config);
    for files in [Some(&own), hop.as_ref()].into_iter().flatten() {
        let path = files.certificate.display();
        if files.recover().with_context(|| format!("certificate {path}"))? {
            tracing::info!(%path, "finished an interrupted renewal");
        }
    }
    let identity = Identity::load(&tls.cert, &tls.key, &tls.ca).context("certificates")?;
    let live = LiveIdentity::new(&identity).context("certificates")?;
    let server = live.server(ClientAuth::Required).context("certificates")?;
    let Assembled { agent, pve, clock, shims } = assemble(&config, &stop).await?;
    let revoked = Revoked::load(config.state_dir.join(uninstall::REVOKED_NODES));
    let revoked = Arc::new(revoked.context("the list of revoked nodes")?);
    agent.keep_revoked(Arc::clone(&revoked));
    let names = NameDirectory::load(config.state_dir.join(uninstall::SANDBOX_NAMES));
    let names = Arc::new(names);
    agent.keep_names(Arc::clone(&names));
    agent.tasks().spawn(outputs::keep(
        Arc::clone(&shims) as Arc<dyn Shims>,
        agent.execs().clone(),
        outputs::Budget {
            node: config.shim.output_node_mib << 20,
            sandbox: config.shim.output_mib << 20,
        },
        agent.tasks().stopping().clone(),
    ));
    agent.tasks().spawn(sweep(
        shims,
        Arc::clone(agent.sandboxes()),
        agent.tasks().stopping().clone(),
    ));
    // Separate tasks, because they continue while the agent drains: sandboxes stay reachable to the
    // end.
    let edge = Tasks::default();
    let edits = HandEdits::load(config.run_dir.join(hand_edits::FILE), clock.now_ms());
    let edits = Arc::new(edits);
    agent.report_edits(Arc::clone(&edits));
    let known = (revoked, names, Arc::clone(&edits));
    let caddy = ingress(&config, &agent, (pve, clock), known, &edge).await?;
    let node = config.node.value.to_string();
    let mut certificates = Certificates::new(node, (own, hop), tls.ca.clone(), live);
    if let Some(changed) = caddy {
        certificates = certificates.notifying(changed);
    }
    agent.renew(Arc::new(certificates));
    keep_tunnel(&config, &agent, edits);

    let listen = config.listen.value;
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let incoming = daemon::listen::tls(listener, server, agent.tasks().stopping().clone());
    // Other holders of our certificates, such as another agent, are disconnected after their
    // handshake.
    let incoming =
        incoming.filter(|conn| conn.as_ref().map_or(true, |conn| *conn.peer() == Peer::Controller));
    daemon::stop::ready("serving");
    tracing::info!(%listen, node = %config.node.value, version = daemon::version::get(), "serving");
    let serving = agent.serve(incoming);
    tokio::pin!(serving);
    tokio::select! {
        served = &mut serving => return served.context("the server ended"),
        () = stop.cancelled() => {}
    }
    // The last answers are sent while pending operations end.
    let (served, ()) = tokio::join!(timeout(DRAIN + LAST_ANSWERS, serving), agent.drain(DRAIN));
    if served.is_err() {
        tracing::warn!("the agent stopped with open connections");
    }
    if timeout(LAST_ANSWERS, edge.finish()).await.is_err() {
        tracing::warn!("the agent stopped with open route questions");
    }
    Ok(())
}

/// An agent that has read its journal and reconciles, and serves nothing yet.
pub(crate) struct Assembled {
    pub(crate) agent: Agent,
    pve: Arc<dyn Pve>,
    clock: Arc<dyn Clock>,
    pub(crate) shims: Arc<ShimProcesses>,
}

/// Builds and starts the agent of this host. No other may run: the journal has one user.
pub(crate) async fn assemble(config: &Config, stop: &CancellationToken) -> Result<Assembled> {
    private_dir(&config.state_dir)?;
    apart::move_children(&shim_cgroup::of_work(&config.pve.cgroup_root))?;
    let pve: Arc<dyn Pve> = Arc::new(pct(config)?);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new(&config.boot_id));
    let shims = ShimProcesses::new(
        &config.run_dir,
        &config.state_dir,
        config.pve.clone(),
        config.exec_backend,
        allowance(config),
    );
    let shims = Arc::new(shims.context("the ways into sandboxes could not be made")?);
    let mut parts = parts(config, Arc::clone(&pve), Arc::clone(&clock), Arc::clone(&shims))?;
    parts.dhcp = dhcp(config, stop);
    parts.isolation = isolation(config);
    if parts.isolation.is_none() {
        match NftFirewall::default().remove().await {
            Ok(tables) if tables.is_empty() => {}
            Ok(tables) => tracing::info!(?tables, "leftover isolation rules were removed"),
            Err(error) => tracing::warn!(%error, "the earlier isolation rules are still in force"),
        }
    }
    parts.resolver = parts.isolation.as_ref().and_then(|(_, grounds)| resolver(config, grounds));
    let agent = Agent::start(parts).await?;
    Ok(Assembled { agent, pve, clock, shims })
}

/// Returns the files of the node's certificates: the agent's, and the ingress hop's if it has one.
fn key_files(config: &Config) -> (KeyFiles, Option<KeyFiles>) {
    let files = |tls: &agent::config::Tls, access| KeyFiles {
        certificate: tls.cert.clone(),
        key: tls.key.clone(),
        access,
    };
    let ingress = &config.ingress;
    // What keeps Caddy from starting must not keep the agent from it: `check` tells of a missing group.
    let access = access_of(ingress.group.as_deref()).ok();
    let hop = access.filter(|_| ingress.tls.cert.exists());
    (files(&config.tls, Access::PRIVATE), hop.map(|access| files(&ingress.tls, access)))
}

/// Starts watching the DHCP server's replies, if any sandbox may use DHCP.
fn dhcp(config: &Config, stop: &CancellationToken) -> Option<Arc<dyn DhcpReplies>> {
    let network = &config.network;
    if network.dhcp == sandbox::Dhcp::Refused {
        return None;
    }
    let server = Server {
        bridge: network.bridge.clone(),
        address: network.dhcp_server,
        is_this_host: network.own.contains(&network.dhcp_server),
        net: NET.into(),
    };
    Some(Replies::watch(server, stop.clone()))
}

/// Returns the firewall of this host, unless the operator has switched isolation off.
fn isolation(config: &Config) -> Option<(Arc<dyn Firewall>, Grounds)> {
    let Some(grounds) = config.grounds(&detect::name_servers(Path::new(RESOLV_CONF))) else {
        tracing::warn!(
            "network.isolation is false: sandboxes reach each other, this host and its networks"
        );
        return None;
    };
    let (name_servers, reach) = (&grounds.name_servers, &grounds.reach);
    tracing::info!(?name_servers, ?reach, "sandboxes are isolated");
    Some((Arc::new(NftFirewall::default()), grounds))
}

/// Returns where the resolver of allow-lists answers and whom it asks; `None` where sandboxes send their
/// packets to another gateway, past this host's rules for what it routes.
fn resolver(config: &Config, grounds: &Grounds) -> Option<resolver::Settings> {
    let gateway = grounds.gateway;
    if !config.network.own.contains(&gateway) {
        tracing::info!(%gateway, "this host is not the gateway: no sandbox can have an allow-list");
        return None;
    }
    // What answers at the gateway asks the same servers, or is all that there is.
    let others = grounds.name_servers.iter().filter(|server| **server != gateway);
    let servers = others.chain([&gateway]).map(|server| (*server, DNS_PORT).into());
    Some(resolver::Settings { listen: (gateway, RESOLVER_PORT).into(), servers: servers.collect() })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a small positive number"
)]
fn allowance(config: &Config) -> Allowance {
    let shim = &config.shim;
    let limits = shim_cgroup::Limits {
        cpu_millicores: (shim.cpu_cores * 1000.0) as u64,
        memory_bytes: shim.memory_mib << 20,
    };
    let io = config.options().limits.io;
    Allowance { limits, io, output_bytes_max: shim.output_mib << 20 }
}

/// Removes leftovers of shims whose sandboxes do not exist any more, periodically.
async fn sweep(shims: Arc<ShimProcesses>, sandboxes: Arc<Sandboxes>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(SWEEP);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        shims.sweep(&sandboxes.live().iter().map(|record| record.id).collect());
        shims.sweep_cgroups().await;
    }
}

/// Starts to answer Caddy's route questions, and to keep Caddy as it should be, if the node has an ingress.
/// Returns who is notified of a new certificate, where the agent has Caddy use it.
async fn ingress(
    config: &Config,
    agent: &Agent,
    (pve, clock): (Arc<dyn Pve>, Arc<dyn Clock>),
    (revoked, names, edits): (Arc<Revoked>, Arc<NameDirectory>, Arc<HandEdits>),
    tasks: &Tasks,
) -> Result<Option<Arc<Notify>>> {
    let (Some(settings), Some(rules)) =
        (caddy_settings::of(config)?, caddy_settings::rules(config)?)
    else {
        tracing::info!("ingress.domain is not set: there is no ingress from the web");
        return Ok(None);
    };
    let path = &config.ingress.caddy_config;
    let proof = Proof::ensure(path)
        .with_context(|| format!("the proof beside Caddy's configuration, {}", path.display()))?;
    let keeper = keeper(config, &settings, &proof, &clock)?.recording(Arc::clone(&edits));
    // Before the agent is ready, since systemd starts Caddy after that. A refusal is told by the keeper.
    drop(keeper.write().await);
    let changed = Arc::new(Notify::new());
    let reaches_caddy = keeper.reaches_caddy();
    let keeper = Arc::new(keeper.until(agent.tasks().stopping().clone()));
    agent.tasks().spawn(keeper.keep(Arc::clone(&changed)));
    let sources = Sources {
        root: config.pve.root.clone(),
        memory: config.state_dir.join(uninstall::OWNERS),
        peer_port: config.ingress.peer.map_or(PEER_PORT, |peer| peer.port()),
    };
    let owners = Arc::new(OwnerResolver::new(pve, Arc::clone(&clock), sources));
    let routes = NodeRoutes::new(Arc::clone(agent.sandboxes()), Arc::clone(&owners), names);
    let socket = caddy_settings::socket(config);
    agent.also_check(Arc::new(IngressCheck {
        socket: socket.clone(),
        domain: settings.domain.clone(),
        sandboxes: Arc::clone(agent.sandboxes()),
    }));
    let ingress = Ingress {
        routes: Arc::new(routes),
        rules,
        clock,
        proof,
        probe: Probe::default(),
        revoked,
        metrics: Arc::new(Metrics::new(edits)),
        holds: Holds::new(caddy_settings::holds(&config.ingress.wake)),
    };
    let listener = server::listen(&socket, config.ingress.group.as_deref())
        .with_context(|| format!("listen on {}", socket.display()))?;
    let stop = tasks.stopping().clone();
    tasks.spawn(server::serve(listener, Arc::new(ingress), stop.clone()));
    tasks.spawn(async move { owners.poll(stop).await });
    Ok(reaches_caddy.then_some(changed))
}

/// Builds the keeper of this node's Caddy.
fn keeper(
    config: &Config,
    settings: &Settings,
    proof: &Proof,
    clock: &Arc<dyn Clock>,
) -> Result<Keeper> {
    let output = config.run_dir.join("ingress-output");
    let runner = Runner::new(output.clone(), config.pve.proc.clone(), |_| false, 2)
        .with_context(|| format!("directory {}", output.display()))?;
    let group = config.ingress.group.clone();
    let services = Systemd::of_host(runner.clone(), config.pve.proc.clone(), Arc::clone(clock));
    if services.is_none() {
        tracing::info!("systemd does not run this machine: somebody else starts Caddy");
    }
    let caddy = Caddy { path: CADDY.into(), runner, user: user_of(group.as_deref()) };
    let files = Files {
        config: config.ingress.caddy_config.clone(),
        group,
        record: caddy_settings::record(config),
        problem: caddy_settings::problem(config),
    };
    let keeper = Keeper::new(settings.clone(), files, proof.clone(), caddy);
    Ok(match services {
        Some(systemd) => keeper.served_by(Arc::new(systemd)),
        None => keeper,
    })
}

/// Looks after cloudflared's configuration, where a tunnel is or will be set up. What goes wrong with it keeps
/// nothing else from working.
fn keep_tunnel(config: &Config, agent: &Agent, edits: Arc<HandEdits>) {
    let Some(origin) = tunnel::node::origin(config) else { return };
    let output = config.run_dir.join("tunnel");
    let runner = Runner::new(output.clone(), config.pve.proc.clone(), |_| false, 1);
    let runner = match runner {
        Ok(runner) => runner,
        Err(error) => {
            tracing::warn!(path = %output.display(), %error, "the tunnel is not looked after");
            return;
        }
    };
    let node = tunnel::node::Node::new(tunnel::node::Paths::of_host(config), runner);
    let stop = agent.tasks().stopping().clone();
    let keeper = TunnelKeeper::new(node, origin).recording(edits);
    agent.tasks().spawn(keeper.run(stop));
}

/// Checks for problems that would stop `run`, beyond those in the configuration itself.
///
/// # Errors
/// Lists all problems.
pub(crate) fn check(config: &Config) -> Result<()> {
    let found = doctor::of_start(config);
    let failed = found.iter().filter(|check| check.state == State::Failed);
    let lines: Vec<_> = failed.map(|check| format!("{}: {}", check.subject, check.found)).collect();
    anyhow::ensure!(lines.is_empty(), "the agent would not start:\n  {}", lines.join("\n  "));
    Ok(())
}

/// Prints Caddy's configuration, in the form for the Caddy that is installed.
pub(crate) fn print_caddy(config: &Config) -> Result<()> {
    let mut settings = caddy_settings::of(config)?
        .context("ingress.domain is not set: without it there is no way in from the web")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let told = runtime.block_on(systemctl::ask(Path::new(CADDY), &["version"], VERSION_MAX));
    let version = told.ok().and_then(|told| told.stdout.parse::<Version>().ok());
    settings.generation = version.map_or(Generation::Before, Version::generation);
    print!("{}", caddy::show(&settings));
    Ok(())
}

/// Stores the node's current number in its cluster: an operator has made sure that no other node
/// hands out the ranges that go with it. The agent must not run.
pub(crate) fn confirm_number(config: &Config) -> Result<()> {
    let roots =
        Roots { pve: &config.pve.root, proc: &config.pve.proc, net: Path::new("/sys/class/net") };
    let found = detect::identity(roots)?;
    let number = found.number.context(
        "the node's number is not known now: its cluster has no quorum, or corosync is down",
    )?;
    let journal = SqliteJournal::open(&config.journal(), config.pools())
        .context("stop pve-sandbox-agent first; what runs in sandboxes goes on")?;
    let node = journal::Node { name: found.node, number };
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("no runtime")?;
    runtime.block_on(journal.set_node(&node)).context("the journal was not written")?;
    println!("this node is number {number}, {}; start pve-sandbox-agent now", node.name);
    Ok(())
}

fn pct(config: &Config) -> Result<Pct> {
    let output = config.run_dir.join("output");
    let (proc, parallel) = (config.pve.proc.clone(), config.limits.pct_parallel_max);
    let runner = Runner::new(output.clone(), proc, worker::is_task, parallel)
        .with_context(|| format!("directory {}", output.display()))?;
    Ok(Pct::new(config.node.value.clone(), config.pve.clone(), runner))
}

fn parts(
    config: &Config,
    pve: Arc<dyn Pve>,
    clock: Arc<dyn Clock>,
    shims: Arc<ShimProcesses>,
) -> Result<Parts> {
    let journal = SqliteJournal::open(&config.journal(), config.pools())
        .context("the journal could not be opened")?;
    let proc = config.load.proc.clone().unwrap_or_else(|| config.pve.proc.clone());
    let mut sampler =
        Sampler::new(proc, config.pve.cgroup_root.clone(), config.load.cgroup.clone());
    Ok(Parts {
        sandboxes: config.options(),
        reconcile: reconcile::Options::default(),
        pve,
        journal: Arc::new(journal),
        clock,
        // Tenants decide how long it takes to count what is in their cgroups.
        host_load: Box::new(move |now, sandboxes| {
            block_in_place(|| sampler.sample(now, sandboxes))
        }),
        shims,
        dhcp: None,
        isolation: None,
        resolver: None,
        faults: Faults::default(),
    })
}

/// Creates a private directory: the journal has what tenants say of their sandboxes, and the key that
/// seals their environments is beside it.
fn private_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("directory {}", path.display()))
}
