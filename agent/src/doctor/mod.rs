//! `doctor`: looks at this node and says what is wrong, each finding with its remedy.
//!
//! `look` and `contact` see: all effects are there, each with a deadline. `facts` holds what was seen.
//! `configuration`, `network`, `firewall`, `pool`, `storage`, `limits`, `kernel`, `ingress` and `node` decide from the
//! facts and are pure.

mod configuration;
mod contact;
pub mod facts;
mod firewall;
mod ingress;
mod kernel;
mod limits;
mod look;
mod network;
mod node;
mod pool;
mod storage;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use daemon::doctor::{Check, Report, certificate, reach};

use self::facts::Facts;
use crate::{
    bridge,
    config::{self, Config, File, Flags},
    ingress::render::PEER_NAME,
    tunnel,
};

/// Where this host is looked at, beside what the configuration says. Below another root in tests.
#[derive(Debug, Clone)]
pub struct Host {
    /// Kernel's list of network interfaces.
    pub net: PathBuf,
    /// Files of the sandboxes' bridge, and the agent's configuration.
    pub bridge: bridge::Paths,
    /// Command line of `nft`, without arguments.
    pub nft: Vec<String>,
    /// Program of the ingress.
    pub caddy: PathBuf,
    /// Program of the name server.
    pub dnsmasq: PathBuf,
    /// Address of the name server, if it is not port 53 of the gateway.
    pub name_server: Option<SocketAddr>,
    /// Program that knows which units run.
    pub systemctl: PathBuf,
    /// Files and programs of the tunnel, if they are not those of the host.
    pub tunnel: Option<tunnel::node::Paths>,
    /// Program that knows whether the clock is synchronised.
    pub timedatectl: PathBuf,
    /// Time, milliseconds since 1970, if it is not that of the host.
    pub now_ms: Option<u64>,
}

impl Host {
    /// Paths on a PVE node whose agent has this configuration.
    pub fn of_node(config: &Path) -> Self {
        Self {
            net: "/sys/class/net".into(),
            bridge: bridge::Paths::of_host(config),
            nft: vec!["/usr/sbin/nft".to_owned()],
            caddy: "/usr/bin/caddy".into(),
            dnsmasq: "/usr/sbin/dnsmasq".into(),
            name_server: None,
            systemctl: "/usr/bin/systemctl".into(),
            tunnel: None,
            timedatectl: reach::TIMEDATECTL.into(),
            now_ms: None,
        }
    }
}

/// Looks at everything.
pub async fn run(
    path: Option<&Path>,
    flags: &Flags,
    env: &dyn Fn(&str) -> Option<String>,
    host: &Host,
) -> Report {
    let file = path.map(daemon::config::load::<File>).transpose();
    let pve = file.as_ref().ok().and_then(Option::as_ref).map(|file| file.pve.clone());
    let pve = pve.unwrap_or_default();
    if !look::pmxcfs_answers(&pve).await {
        // The configuration is completed from pmxcfs, too, so nothing else of the node can be judged.
        let stuck = node::stuck(&pve);
        let is_root = nix::unistd::geteuid().is_root();
        let clock = reach::clock(reach::is_synchronised(&host.timedatectl).await);
        return Report::new(vec![stuck, node::privileges(is_root), clock]);
    }
    let named_bridge = file.as_ref().ok().and_then(Option::as_ref).and_then(named_bridge);
    let config = file
        .map_err(config::Error::File)
        .and_then(|file| Config::complete(file.unwrap_or_default(), flags, env, &host.net));
    let facts = look::all(config.as_ref().ok(), named_bridge, &pve, host, env).await;
    Report::new(checks(&config, &facts, host))
}

/// Returns the bridge that a configuration file names.
fn named_bridge(file: &File) -> Option<String> {
    file.network.bridge.clone()
}

/// Judges everything. Pure.
fn checks(config: &Result<Config, config::Error>, facts: &Facts, host: &Host) -> Vec<Check> {
    let mut checks = configuration::check(config, facts, host);
    checks.push(node::privileges(facts.is_root));
    checks.push(node::quorum(&facts.cluster));
    checks.push(reach::clock(facts.synchronised));
    if let (Ok(config), Some(node)) = (config, &facts.node) {
        checks.extend(node::programs(&node.programs));
        checks.extend(node::number(config.number, &facts.cluster));
        checks.extend(certificates(config, node, facts.now()));
        let made = facts.made_bridge.as_deref();
        checks.extend(network::check(config, node, made, host));
        checks.extend(firewall::check(config, node, &facts.cluster));
        checks.extend(pool::check(&config.network, config.vmids.value, &node.taken));
        checks.extend(storage::check(config, node));
        checks.extend(storage::templates(config, &node.templates));
        checks.extend(limits::check(config, node));
        checks.extend(kernel::check(&node.kernel, pool::most(&config.network, config.vmids.value)));
        checks.extend(ingress::files(config, node));
        checks.extend(own_certificate(config, node, facts.now()));
        checks.extend(ingress::caddy(config, node, facts.now_ms));
        checks.extend(ingress::peer(config, &facts.cluster));
        checks.extend(of_tunnel(config, node, host));
        checks.extend(node::edits(&node.edits, facts.now_ms));
        checks.push(node::room(&config.state_dir, node.room));
        checks.extend(node::listen(config, &facts.cluster));
        checks.extend(node::agent(config, &node.agent));
        checks.extend(node::capabilities(&node.agent));
    }
    checks
}

/// Looks at the files that the agent and Caddy need to start: certificates, and what Caddy reads. The
/// commands `check-config` and `join` do not look further.
pub fn of_start(config: &Config) -> Vec<Check> {
    let node = look::files(config);
    let mut checks = certificates(config, &node, now(config));
    checks.extend(ingress::files(config, &node));
    checks
}

/// Looks at the certificate of the operator's own, if there is one in files. Without a good one the agent starts, and
/// Caddy serves what it has.
pub fn of_certificate(config: &Config) -> Vec<Check> {
    own_certificate(config, &look::files(config), now(config))
}

/// Time by a clock that nobody was asked about.
fn now(config: &Config) -> certificate::Now {
    certificate::Now { ms: look::now_ms(config), synchronised: None }
}

/// Looks at the templates, without the storage that they are on.
pub fn of_templates(config: &Config) -> Vec<Check> {
    storage::templates(config, &look::templates(config))
}

/// Says what is wrong with the configuration itself.
pub fn of_mistakes(error: config::Error, host: &Host) -> Report {
    let file = daemon::config::load::<File>(&host.bridge.config).ok();
    let facts = Facts {
        named_bridge: file.as_ref().and_then(named_bridge),
        made_bridge: bridge::made(&host.bridge),
        ..Facts::default()
    };
    Report::new(configuration::check(&Err(error), &facts, host))
}

/// Judges the tunnel, where one was set up.
fn of_tunnel(config: &Config, node: &facts::Node, host: &Host) -> Vec<Check> {
    let paths = tunnel_paths(config, host);
    match &node.tunnel {
        Ok(None) => Vec::new(),
        Ok(Some(facts)) => tunnel::judge::checks(facts, &paths),
        Err(why) => {
            let path = paths.settings().display().to_string();
            let remedy =
                format!("rm {path}; then pve-sandbox-agent tunnel setup --token-file FILE");
            vec![Check::failed("tunnel", path, why.clone(), remedy)]
        }
    }
}

/// Files and programs of the tunnel.
fn tunnel_paths(config: &Config, host: &Host) -> tunnel::node::Paths {
    host.tunnel.clone().unwrap_or_else(|| tunnel::node::Paths::of_host(config))
}

fn certificates(config: &Config, node: &facts::Node, now: certificate::Now) -> Vec<Check> {
    let mut checks = certificate::check(&own(config), &node.certificate, now);
    if let (Some(expected), Some(facts)) = (hop(config), &node.hop) {
        checks.extend(certificate::check(&expected, facts, now));
    }
    checks
}

/// Certificate of the agent.
fn own(config: &Config) -> certificate::Expected {
    let (tls, node) = (&config.tls, &config.node.value);
    let join =
        format!("sandboxctl node token {node}; then run the line that it prints on this node");
    certificate::Expected {
        name: "certificate",
        certificate: tls.cert.clone(),
        key: tls.key.clone(),
        ca: Some(tls.ca.clone()),
        for_group: false,
        names: vec![daemon::peer::agent_name(node)],
        replace: join.clone(),
        rename: join,
        overdue: Some(
            "sandboxctl node ls: the controller renews it, while it reaches this node's agent"
                .to_owned(),
        ),
        early: None,
        restart: "systemctl restart pve-sandbox-agent".to_owned(),
    }
}

/// Certificate of the hop between the nodes' Caddys, where there is one.
fn hop(config: &Config) -> Option<certificate::Expected> {
    let (tls, own) = (&config.ingress.tls, own(config));
    (config.ingress.domain.is_some() && config.ingress.peer.is_some()).then(|| {
        certificate::Expected {
            name: "ingress-certificate",
            certificate: tls.cert.clone(),
            key: tls.key.clone(),
            ca: Some(tls.ca.clone()),
            for_group: config.ingress.group.is_some(),
            names: vec![PEER_NAME.to_owned()],
            ..own
        }
    })
}

fn own_certificate(config: &Config, node: &facts::Node, now: certificate::Now) -> Vec<Check> {
    match (own_web(config), &node.own) {
        (Some(expected), Some(facts)) => certificate::check(&expected, facts, now),
        (Some(_), None) | (None, _) => Vec::new(),
    }
}

/// Certificate of the operator's own for https, where it is in files.
fn own_web(config: &Config) -> Option<certificate::Expected> {
    let (web, domain) = (config.ingress.certificate.as_ref()?, config.ingress.domain.as_ref()?);
    let (certificate, key) = (web.cert.clone()?, web.key.clone()?);
    let name = format!("*.{domain}");
    let replace = format!(
        "put a certificate for {name} with its chain into {}, and its key into {}; the agent takes them within a minute",
        certificate.display(),
        key.display()
    );
    Some(certificate::Expected {
        name: "web-certificate",
        certificate,
        key,
        ca: None,
        // certbot and others give keys to a group.
        for_group: true,
        names: vec![name],
        replace: replace.clone(),
        rename: replace,
        overdue: None,
        early: None,
        restart: "systemctl restart pve-sandbox-agent".to_owned(),
    })
}

/// Address of the name server of the sandboxes.
fn name_server(config: &Config, host: &Host) -> SocketAddr {
    host.name_server.unwrap_or_else(|| SocketAddr::from((config.network.gateway, 53)))
}

/// Address as `ss` filters it.
fn listeners_of(address: SocketAddr) -> String {
    format!("ss -ltnp 'sport = :{}' shows what does", address.port())
}
