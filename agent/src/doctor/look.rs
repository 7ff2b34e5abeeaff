//! Sees this node: reads files, and asks programs and servers at once. Changes nothing.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use daemon::{
    chain::Chain,
    doctor::{
        certificate,
        reach::{self, Listener, PATIENCE},
    },
    systemctl,
    tls::Identity,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use toml_edit::{DocumentMut, Item};

use super::{
    Host, contact,
    facts::{
        Agent, Bridge, Facts, Ingress, Kernel, Limits, NameServer, Node, Program, Storage, Taken,
        Template, TemplateLine, TemplateState, Written,
    },
    hop, kernel, own, own_web, tunnel_paths,
};
use crate::{
    bridge, caddy_settings,
    clock::{Clock as _, SystemClock},
    config::Config,
    detect::{self, Roots},
    firewall::render,
    hand_edits,
    ingress::{
        caddy, keeper,
        listeners::{self, Listener as WebListener},
        program,
        settings::{self as web, Settings},
        version::Version,
    },
    pve::{
        ContainerConfig, HostPaths, forbidden, host_firewall::HostFirewall, io_limit, pmxcfs,
        process_limit, storage, template_mark::TemplateMark,
    },
    sandbox,
    sys::{privileges, proc, read},
    tunnel::{self, api::Api},
};

/// Name of the agent's program and its command, as its processes show them.
const AGENT: [&str; 2] = ["pve-sandbox-agent", "run"];
/// Unit of the agent.
pub(super) const AGENT_UNIT: &str = "pve-sandbox-agent";
const CONTROLLER_UNIT: &str = "pve-sandbox-controller";
/// Program that reads a file of pmxcfs.
const CAT: &str = "/bin/cat";
/// Unit of the name server on the sandboxes' bridge.
pub(super) const DNS_UNIT: &str = "pve-sandbox-dns";
/// Default listen address of a controller.
const CONTROLLER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7443);
/// Ticks of the kernel's clock for processes, milliseconds each (USER_HZ, proc(5)).
const TICK_MS: u64 = 10;

/// Returns the time, milliseconds since 1970.
pub(super) fn now_ms(config: &Config) -> u64 {
    SystemClock::new(&config.boot_id).now_ms()
}

/// Returns false when pmxcfs gives no answer: it is mounted, and stuck. A child asks, since nothing ends a
/// read of it then: our own would keep this process, too.
pub(super) async fn pmxcfs_answers(pve: &HostPaths) -> bool {
    let members = pve.root.join(pmxcfs::MEMBERS);
    let Some(members) = members.to_str() else { return true };
    let asked = systemctl::ask(Path::new(CAT), &["--", members], PATIENCE).await;
    !asked.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Sees everything, at once where it takes time.
pub(super) async fn all(
    config: Option<&Config>,
    named_bridge: Option<String>,
    pve: &HostPaths,
    host: &Host,
    env: &dyn Fn(&str) -> Option<String>,
) -> Facts {
    let roots = Roots { pve: &pve.root, proc: &pve.proc, net: &host.net };
    let node = async {
        match config {
            Some(config) => Some(Box::pin(node(config, host, env)).await),
            None => None,
        }
    };
    let (synchronised, node) = tokio::join!(reach::is_synchronised(&host.timedatectl), node);
    Facts {
        now_ms: host.now_ms.unwrap_or_else(|| SystemClock::default().now_ms()),
        is_root: nix::unistd::geteuid().is_root(),
        synchronised,
        cluster: detect::cluster(roots),
        named_bridge,
        made_bridge: bridge::made(&host.bridge),
        node,
    }
}

async fn node(config: &Config, host: &Host, env: &dyn Fn(&str) -> Option<String>) -> Node {
    let files = files(config);
    let (storages, fit_storages) = storages(config, &files.templates);
    let (tables, connections, bridge, storages, ingress, listener, at_boot, tunnel, controller) = tokio::join!(
        tables(host),
        counts(host),
        bridge(config, host),
        active(config, storages),
        ingress(config, host, files.ingress),
        listener(config),
        starts_at_boot(host),
        of_tunnel(config, host, env),
        controller(host),
    );
    Node {
        tunnel,
        programs: programs(config, host, bridge.is_ours),
        bridge,
        firewall: firewall(config),
        controller,
        limits: Limits {
            processes: process_limit::can_limit(&config.pve),
            io: io_limit::can_limit(&config.pve),
            // Without the right to list tables, a refusal says nothing.
            connections: connections.filter(|_| tables.is_some()),
        },
        kernel: kernel_bounds(&config.pve.proc),
        taken: taken(config),
        tables,
        storages,
        fit_storages,
        ingress,
        room: room(&config.state_dir),
        agent: Agent { starts_at_boot: at_boot, ..agent(config, listener) },
        ..files
    }
}

/// Sees the files that the configuration names; nothing that runs.
pub(super) fn files(config: &Config) -> Node {
    let settings = caddy_settings::of(config);
    let ingress = match &settings {
        Ok(None) => None,
        Ok(Some(settings)) => Some(caddy_files(config, settings)),
        Err(error) => Some(no_ingress(format!("{error:#}"))),
    };
    Node {
        programs: Vec::new(),
        certificate: certificate::look(&own(config)),
        hop: hop(config).as_ref().map(certificate::look),
        own: own_web(config).as_ref().map(certificate::look),
        bridge: Bridge::default(),
        firewall: HostFirewall::default(),
        controller: Vec::new(),
        tables: None,
        storages: Vec::new(),
        fit_storages: Vec::new(),
        templates: templates(config),
        limits: Limits::default(),
        kernel: Kernel::default(),
        taken: Taken::default(),
        ingress,
        tunnel: Ok(None),
        edits: hand_edits::recent(&config.run_dir.join(hand_edits::FILE), now_ms(config)),
        room: None,
        agent: Agent::default(),
    }
}

/// Sees the tunnel; with a token in the environment, what Cloudflare has, too.
async fn of_tunnel(
    config: &Config,
    host: &Host,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<tunnel::look::Facts>, String> {
    let text = |error: &dyn std::error::Error| Chain(error).to_string();
    let token = tunnel::args::token(None, env).map_err(|error| text(&error))?;
    // A token that cannot be used is told by the commands of the tunnel.
    let api = token.and_then(|token| Api::new(tunnel::api::BASE, &token, None).ok());
    let (paths, origin) = (tunnel_paths(config, host), tunnel::node::origin(config));
    let seen = tunnel::look::look(&paths, origin.as_ref(), api.as_ref(), now_ms(config)).await;
    seen.map_err(|error| text(&error))
}

fn no_ingress(why: String) -> Ingress {
    Ingress {
        obstacles: Err(why),
        written: Written::Missing,
        written_ms: None,
        started_ms: None,
        public: Vec::new(),
        secure: Vec::new(),
        has_dns_module: None,
        routes: false,
        used: None,
        version: None,
        problem: None,
        strays: Vec::new(),
    }
}

fn caddy_files(config: &Config, settings: &crate::ingress::settings::Settings) -> Ingress {
    let (path, group) = (&config.ingress.caddy_config, config.ingress.group.as_deref());
    let written = match caddy::is_current(settings, path) {
        Ok(true) => Written::Current,
        Ok(false) => Written::Other,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => Written::Missing,
        Err(_) => Written::Other,
    };
    let changed = fs::metadata(path).and_then(|about| about.modified()).ok();
    let since = changed.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ingress {
        obstacles: Ok(caddy::obstacles(settings, path, group)),
        written,
        written_ms: since.map(daemon::clock::millis),
        ..no_ingress(String::new())
    }
}

async fn ingress(config: &Config, host: &Host, files: Option<Ingress>) -> Option<Ingress> {
    let (mut ingress, domain) = (files?, config.ingress.domain.as_deref()?);
    let mut public = Vec::new();
    for address in config.ingress.public.iter().take(4) {
        public.push((*address, contact::web(*address, domain).await));
    }
    ingress.public = public;
    if let Ok(Some(Settings { secure: Some(secure), .. })) = caddy_settings::of(config) {
        for address in secure.listen.iter().take(4) {
            let (answer, shown) = contact::secure(*address, domain).await;
            ingress.secure.push((*address, answer, shown));
        }
        if let web::Certificate::Acme(acme) = &secure.certificate {
            let told = systemctl::ask(&host.caddy, &["list-modules"], PATIENCE).await.ok();
            ingress.has_dns_module = told.map(|told| program::lists(&told.stdout, &acme.module()));
        }
    }
    if let Some(socket) = &config.ingress.socket {
        ingress.routes = contact::routes(socket, domain).await;
    }
    ingress.started_ms = caddy_started(config);
    let version = systemctl::ask(&host.caddy, &["version"], PATIENCE).await.ok();
    ingress.version = version.and_then(|told| told.stdout.parse().ok());
    ingress.used = is_used(config, ingress.version);
    let problem = read::text(&caddy_settings::problem(config), read::SMALL);
    ingress.problem = Some(problem).filter(|problem| !problem.is_empty());
    ingress.strays = strays(config);
    Some(ingress)
}

/// Returns whether the Caddy that the agent has started last reads the present files.
fn is_used(config: &Config, version: Option<Version>) -> Option<bool> {
    let record = keeper::record(&caddy_settings::record(config))?;
    let settings = caddy_settings::of(config).ok()??;
    let inputs = keeper::inputs(&settings, &config.ingress.caddy_config, version).ok()?;
    Some(record.digest == inputs.digest)
}

/// Lists programs that listen where clients reach Caddy, and that are none of ours.
fn strays(config: &Config) -> Vec<(SocketAddr, WebListener)> {
    let ours = config.ingress.caddy_config.to_str().unwrap_or_default();
    let mut addresses: Vec<_> = config.ingress.public.iter().take(4).copied().collect();
    if let Some(own) = &config.ingress.certificate {
        addresses.extend(own.listen.iter().take(4));
        addresses.extend(own.redirects());
    }
    let all = addresses.into_iter().flat_map(|address| {
        let all = listeners::of(&config.pve.proc, address).into_iter();
        all.map(move |listener| (address, listener))
    });
    all.filter(|(_, listener)| !listener.argv.iter().any(|word| word == ours)).collect()
}

/// Returns the start of the Caddy that runs with our configuration.
fn caddy_started(config: &Config) -> Option<u64> {
    let proc = &config.pve.proc;
    let ours = config.ingress.caddy_config.to_str()?;
    let mut processes = proc::host_processes(proc).into_iter();
    let caddy = processes.find(|process| process.argv.iter().any(|word| word == ours))?;
    let stat = read::text(&proc.join("stat"), read::LARGE);
    let boot: u64 = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    Some(boot * 1000 + caddy.start * TICK_MS)
}

fn agent(config: &Config, listener: Option<Listener>) -> Agent {
    let proc = &config.pve.proc;
    let is_agent = |process: &proc::Process| {
        let [program, command] = AGENT;
        let mut words = process.argv.iter();
        words.next().is_some_and(|word| word.ends_with(program))
            && words.next().is_some_and(|word| word == command)
    };
    let agents: Vec<_> = proc::host_processes(proc).into_iter().filter(is_agent).collect();
    let is_replaced = agents.iter().any(|agent| {
        let exe = fs::read_link(proc.join(agent.pid.to_string()).join("exe"));
        exe.is_ok_and(|exe| exe.to_string_lossy().ends_with(" (deleted)"))
    });
    let missing = agents.iter().flat_map(|agent| privileges::missing_of(agent.pid)).collect();
    Agent { listener, on_disk: der(&config.tls.cert), is_replaced, starts_at_boot: None, missing }
}

/// Returns whether a boot starts the agent's unit, which runs. `is-enabled` answers from the files, also where systemd
/// does not run the machine; `is-active` does not, so it is asked first.
async fn starts_at_boot(host: &Host) -> Option<bool> {
    let program = &host.systemctl;
    let active = systemctl::ask(program, &["is-active", AGENT_UNIT], PATIENCE).await.ok()?;
    if !matches!(active.stdout.trim(), "active" | "reloading") {
        return None;
    }
    let enabled = systemctl::ask(program, &["is-enabled", AGENT_UNIT], PATIENCE).await.ok()?;
    systemctl::starts_at_boot(&enabled.stdout)
}

fn programs(config: &Config, host: &Host, has_own_bridge: bool) -> Vec<Program> {
    let mut needed: Vec<(PathBuf, &'static str)> =
        config.pve.programs().map(|(path, package)| (path.to_owned(), package)).into();
    if config.isolation.enabled || has_own_bridge {
        needed.extend(host.nft.first().map(|nft| (PathBuf::from(nft), "nftables")));
    }
    if has_own_bridge {
        needed.push((host.dnsmasq.clone(), "dnsmasq-base"));
    }
    if config.ingress.domain.is_some() {
        needed.push((host.caddy.clone(), "caddy"));
    }
    let runs = |path: &Path| {
        let about = fs::metadata(path);
        about.is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    let program = |(path, package): (PathBuf, _)| Program { is_there: runs(&path), path, package };
    needed.into_iter().map(program).collect()
}

async fn bridge(config: &Config, host: &Host) -> Bridge {
    let name = &config.network.bridge;
    let roots = Roots { pve: &config.pve.root, proc: &config.pve.proc, net: &host.net };
    let is_ours = bridge::made(&host.bridge).as_ref() == Some(name);
    let name_server = match is_ours {
        true => Some(name_server(config, host).await),
        false => None,
    };
    let forwards = config.pve.proc.join("sys/net/ipv4/ip_forward");
    Bridge {
        is_bridge: host.net.join(name).join("bridge").is_dir(),
        address: detect::on_bridge(roots, name),
        is_ours,
        made_address: bridge::made_address(&host.bridge),
        has_nat: host.bridge.nat().exists(),
        has_dns: host.bridge.dns().exists(),
        forwards: read::text(&forwards, read::SMALL).trim() == "1",
        name_server,
    }
}

/// Sees PVE's own firewall of this node.
fn firewall(config: &Config) -> HostFirewall {
    let text = |name: &Path| read::text(&config.pve.root.join(name), read::LARGE);
    let host = pmxcfs::host_firewall(&config.node.value);
    HostFirewall::parse(&text(Path::new(pmxcfs::FIREWALL)), &text(&host))
}

/// Sees where the controller of this machine listens. Its package alone brings a configuration: a boot must start it, where
/// systemd knows that.
async fn controller(host: &Host) -> Vec<SocketAddr> {
    let asked = systemctl::ask(&host.systemctl, &["is-enabled", CONTROLLER_UNIT], PATIENCE).await;
    let word = asked.map(|asked| asked.stdout).unwrap_or_default();
    if word.trim() == "not-found" || systemctl::starts_at_boot(&word) == Some(false) {
        return Vec::new();
    }
    let text = read::whole_text(&host.bridge.etc.join("controller.toml"), read::LARGE).ok();
    let Some(file) = text.and_then(|text| text.parse::<DocumentMut>().ok()) else {
        return Vec::new();
    };
    let address = |item: Option<&Item>| -> Option<SocketAddr> { item?.as_str()?.parse().ok() };
    let api = address(file.get("listen")).unwrap_or(CONTROLLER);
    let ssh = address(file.get("ssh").and_then(|ssh| ssh.get("listen")));
    [Some(api), ssh].into_iter().flatten().collect()
}

/// Sees whether the dnsmasq of our unit answers. Another resolver of the node, which listens on all addresses, would
/// answer in its place, and may be a dnsmasq, too.
async fn name_server(config: &Config, host: &Host) -> NameServer {
    let answer = contact::name_server(super::name_server(config, host)).await;
    let asked = systemctl::ask(&host.systemctl, &["is-active", DNS_UNIT], PATIENCE).await.ok();
    let state = asked.as_ref().map_or("", |asked| asked.stdout.trim());
    // Without systemd, which says nothing then, the answer must do.
    let runs = matches!(state, "" | "active" | "reloading");
    match answer {
        None => NameServer::Silent,
        Some(is_dnsmasq) if is_dnsmasq && runs => NameServer::Ours,
        Some(_) => NameServer::Other,
    }
}

async fn tables(host: &Host) -> Option<BTreeSet<String>> {
    let (nft, first) = host.nft.split_first()?;
    let words: Vec<&str> = first.iter().map(String::as_str).chain(["list", "tables"]).collect();
    let listed = systemctl::ask(Path::new(nft), &words, PATIENCE).await.ok()?;
    let tables = listed.stdout.lines().filter_map(|line| line.trim().strip_prefix("table "));
    listed.success.then(|| tables.map(str::to_owned).collect())
}

/// Returns whether the kernel can count connections, by a check of nft that changes nothing.
async fn counts(host: &Host) -> Option<bool> {
    let (nft, first) = host.nft.split_first()?;
    let probe = render::counting_probe();
    let words: Vec<&str> = first.iter().map(String::as_str).chain(["-c", probe.as_str()]).collect();
    let checked = systemctl::ask(Path::new(nft), &words, PATIENCE).await.ok()?;
    Some(checked.success)
}

/// Sees the bounds of the kernel that sandboxes share.
fn kernel_bounds(proc: &Path) -> Kernel {
    let bound = |bound: &kernel::Bound| {
        let file = proc.join("sys").join(bound.name.replace('.', "/"));
        Some((bound.name, read::text(&file, read::SMALL).trim().parse().ok()?))
    };
    let text = read::text(&proc.join("meminfo"), read::SMALL);
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: Option<u64> = total.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    let bounds = kernel::BOUNDS.iter().filter_map(bound).collect();
    Kernel { memory: kib.map(|kib| kib << 10), bounds }
}

/// Sees the addresses and vmids of this node's containers.
fn taken(config: &Config) -> Taken {
    let configs = detect::configs(&config.pve.root, &config.node.value);
    let addresses = configs.values().flat_map(ContainerConfig::static_addresses).collect();
    Taken { addresses, vmids: configs.into_keys().collect() }
}

/// Sees the storages of the templates and the one for new templates; and the names of those that are fit.
fn storages(config: &Config, templates: &[Template]) -> (Vec<Storage>, Vec<String>) {
    let text = read::text(&config.pve.root.join(pmxcfs::STORAGES), read::LARGE);
    let (known, node) = (storage::parse(&text), &config.node.value);
    let of_templates = templates.iter().filter_map(|template| match &template.state {
        TemplateState::Fit(storage) => storage.clone(),
        TemplateState::Missing
        | TemplateState::Ordinary
        | TemplateState::Forbidden(..)
        | TemplateState::Unreadable(_) => None,
    });
    let of_templates: BTreeSet<String> = of_templates.collect();
    let mut names: Vec<_> = config.storage.iter().map(|storage| storage.value.clone()).collect();
    names.extend(of_templates.iter().cloned());
    names.sort();
    names.dedup();
    let see = |name: String| {
        let found = known.iter().find(|storage| storage.name == name);
        Storage {
            kind: found.map(|storage| storage.kind.clone()),
            holds_containers: found.is_some_and(|storage| storage.holds_containers(node)),
            links_clones: found.is_some_and(storage::Storage::links_clones),
            has_template: of_templates.contains(&name),
            is_active: None,
            name,
        }
    };
    let fit = known.iter().filter(|one| one.holds_containers(node) && one.links_clones());
    (names.into_iter().map(see).collect(), fit.map(|one| one.name.clone()).collect())
}

/// Asks PVE which storages are active, in one call.
async fn active(config: &Config, mut storages: Vec<Storage>) -> Vec<Storage> {
    let Ok(listed) = systemctl::ask(&config.pve.pvesm, &["status"], PATIENCE).await else {
        return storages;
    };
    for storage in &mut storages {
        storage.is_active = storage::is_active(&listed.stdout, &storage.name);
    }
    storages
}

/// Sees the templates that are configured or carry the mark.
pub(super) fn templates(config: &Config) -> Vec<Template> {
    let of_one = |template: &sandbox::Template| {
        let path = config.pve.root.join(pmxcfs::config(&config.node.value, template.vmid));
        let (state, mark) = match read::whole(&path, read::LARGE) {
            Ok(bytes) => {
                let config = ContainerConfig::parse(&bytes);
                (template_state(template, &config), template_line(&config))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                (TemplateState::Missing, TemplateLine::Missing)
            }
            Err(error) => (TemplateState::Unreadable(error.to_string()), TemplateLine::Missing),
        };
        let sandbox::Template { snapshot, vmid, .. } = template;
        let in_file = !config.found_templates.contains(vmid);
        Template { snapshot: snapshot.clone(), vmid: *vmid, path, state, in_file, mark }
    };
    config.options().templates.iter().map(of_one).collect()
}

fn template_line(config: &ContainerConfig) -> TemplateLine {
    let text = config.description().unwrap_or_default();
    let lines = text.lines().filter(|line| !line.trim().is_empty()).count();
    match TemplateMark::find(&text) {
        None => TemplateLine::Missing,
        Some(_) if lines == 1 => TemplateLine::Alone,
        Some(_) => TemplateLine::AmongOthers,
    }
}

fn template_state(template: &sandbox::Template, config: &ContainerConfig) -> TemplateState {
    if !config.is_template() {
        return TemplateState::Ordinary;
    }
    match template.obstacle(Some(config)) {
        None => TemplateState::Fit(config.storage().map(str::to_owned)),
        Some(text) => {
            let lines = forbidden::lines(config, &template.allowed);
            let key =
                |line: &str| line.split([':', '=']).next().unwrap_or_default().trim().to_owned();
            TemplateState::Forbidden(lines.iter().map(|line| key(&line.line)).collect(), text)
        }
    }
}

/// Returns the free space of a directory, or of the first above it that is there.
fn room(dir: &Path) -> Option<u64> {
    let there = dir.ancestors().find(|dir| dir.exists())?;
    let found = nix::sys::statvfs::statvfs(there).ok()?;
    Some(found.blocks_available() * found.fragment_size())
}

async fn listener(config: &Config) -> Option<Listener> {
    let tls = &config.tls;
    let identity = Identity::load(&tls.cert, &tls.key, &tls.ca).ok()?;
    let client = daemon::tls::client(&identity).ok()?;
    let name = daemon::peer::agent_name(&config.node.value);
    Some(reach::listener(reach::local(config.listen.value), &name, client).await)
}

fn der(path: &Path) -> Vec<u8> {
    let pem = read::whole(path, read::LARGE).unwrap_or_default();
    CertificateDer::from_pem_slice(&pem).map(|der| der.to_vec()).unwrap_or_default()
}
