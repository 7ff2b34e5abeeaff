//! Commands that set a node up: `join`, `bridge init`, `template init`. They print what they do.

use std::{path::Path, time::Duration};

use agent::{
    bridge::{self, Plan},
    config::{self, Config, Flags},
    join::{
        self, Done, Line,
        other_caddy::{self, Decision},
    },
    pve::worker,
    run::Runner,
    template::{self, Order, Source},
    uninstall::{MASKED_CADDY, TEMPLATE},
};
use anyhow::{Context, Result};
use daemon::systemctl;
use ipnet::Ipv4Net;
use tokio::time::Instant;

use crate::production::{self, NET};

/// Units of a node, the agent first.
pub(crate) const UNITS: &[&str; 2] = &["pve-sandbox-agent", "pve-sandbox-ingress"];
/// Second unit of the ingress, which the agent starts when it needs it.
pub(crate) const GREEN_UNIT: &str = "pve-sandbox-ingress-green";
/// Unit of the name server on the sandboxes' bridge.
pub(crate) const DNS_UNIT: &str = "pve-sandbox-dns";
/// Program of ifupdown2 that brings one interface up.
const IFUP: &str = "/usr/sbin/ifup";

/// Joins a controller, makes what the node lacks, and starts the units.
pub(crate) fn join(line: &Line, path: &Path, start: bool, template: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Done(done) = runtime.block_on(join::run(line, path, Path::new(NET)))?;
    for step in done {
        println!("{step}");
    }
    // The node has joined, whatever becomes of the rest, and its token is used up.
    if !line.no_bridge
        && let Err(error) = make_bridge(None, path, start)
    {
        println!("no bridge was made: {error:#}");
        println!("repeat it with: pve-sandbox-agent bridge init");
    }
    let config = Config::load(Some(path), &Flags::default(), &config::environment);
    let ready = config.map_err(anyhow::Error::from).and_then(|config| {
        production::check(&config)?;
        Ok(config)
    });
    let config = match ready {
        Ok(config) => config,
        Err(error) => {
            let path = path.display();
            println!("this node is joined, and its agent is not started: {error:#}");
            println!("complete {path}, then: systemctl enable --now {}", UNITS.join(" "));
            return Ok(());
        }
    };
    if template && config.templates.is_empty() {
        let order = first_template(&config)?;
        if let Err(error) = make_template(&config, &order) {
            println!("no template was made: {error:#}");
            println!("repeat it with: pve-sandbox-agent template init");
        }
    }
    if !start || !systemctl::is_there() {
        println!("nothing was started; start {}", UNITS.join(" and "));
        return Ok(());
    }
    mask_unused_caddy(&config)?;
    systemctl::run(&[&["enable", "--quiet"], &UNITS[..]].concat())?;
    let [agent, ingress] = UNITS;
    // It may run with the certificates of before. The agent has Caddy use the new ones.
    systemctl::run(&["restart", agent])?;
    if !is_active(GREEN_UNIT) {
        systemctl::run(&["start", ingress])?;
    }
    println!("started {}", UNITS.join(" and "));
    Ok(())
}

fn is_active(unit: &str) -> bool {
    told("/usr/bin/systemctl", &["is-active", unit]).0.trim() == "active"
}

/// Asks a program; returns what it prints, and whether it ended well.
fn told(program: &str, words: &[&str]) -> (String, bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map(|runtime| {
        runtime.block_on(systemctl::ask(Path::new(program), words, Duration::from_secs(30)))
    });
    match asked {
        Ok(Ok(answer)) => (answer.stdout, answer.success),
        Ok(Err(_)) | Err(_) => (String::new(), false),
    }
}

/// Keeps Debian's own caddy.service from running where apt has brought it for us and nobody uses it.
fn mask_unused_caddy(config: &Config) -> Result<()> {
    let (changed, is_known) = told("/usr/bin/dpkg", &["--verify", "caddy"]);
    let facts = other_caddy::Facts {
        enabled: told("/usr/bin/systemctl", &["is-enabled", other_caddy::UNIT]).0,
        active: told("/usr/bin/systemctl", &["is-active", other_caddy::UNIT]).0,
        automatic: told("/usr/bin/apt-mark", &["showauto", "caddy"]).0,
        changed: (is_known || !changed.is_empty()).then_some(changed),
    };
    match other_caddy::decide(&facts) {
        Decision::Nothing => {}
        Decision::LeaveAlone(why) => {
            println!(
                "{} is left alone, because {why}; the ingress runs beside it",
                other_caddy::UNIT
            );
        }
        Decision::Mask => {
            systemctl::run(&["mask", "--now", "--quiet", other_caddy::UNIT])?;
            // `uninstall` gives it back.
            std::fs::create_dir_all(&config.state_dir)?;
            std::fs::write(config.state_dir.join(MASKED_CADDY), "")?;
            println!("stopped and masked {}: the ingress has its own units", other_caddy::UNIT);
        }
    }
    Ok(())
}

/// Makes the sandboxes' own bridge, unless the configuration names another.
pub(crate) fn make_bridge(subnet: Option<Ipv4Net>, config: &Path, start: bool) -> Result<()> {
    let paths = bridge::Paths::of_host(config);
    let bridge = match bridge::plan(subnet, &paths, Path::new(NET))? {
        Plan::Named(name) => {
            println!(
                "the bridge of the sandboxes is {name}; `network.bridge` in {} would name another",
                config.display()
            );
            return Ok(());
        }
        Plan::Make(bridge) => bridge,
    };
    let changed = bridge::write(&bridge, &paths)?;
    for path in &changed {
        println!("wrote {}", path.display());
    }
    let there = Path::new(NET).join(&bridge.name).exists();
    let is_complete = there && changed.is_empty();
    if is_complete {
        println!("bridge {} with {} is there already", bridge.name, bridge.address);
    }
    if !start {
        println!("nothing was started: ifup {}; systemctl enable --now {DNS_UNIT}", bridge.name);
        return Ok(());
    }
    if !is_complete {
        systemctl::run_program(Path::new(IFUP), &["--force", &bridge.name], &[])
            .context("the bridge did not come up; is ifupdown2 installed?")?;
        println!("bridge {} is up with {}", bridge.name, bridge.address);
    }
    if systemctl::is_there() {
        let up = if is_complete { "start" } else { "restart" };
        systemctl::run(&["enable", "--quiet", DNS_UNIT])
            .and_then(|()| systemctl::run(&[up, DNS_UNIT]))
            .context("the name server did not start; is dnsmasq-base installed?")?;
    }
    Ok(())
}

/// Settings of the template that a node gets which has none.
fn first_template(config: &Config) -> Result<Order> {
    let suite = template::release().context("cannot read the node's release")?;
    Ok(Order {
        vmid: template::vmid(&config.pve.root, &config.node.value)?,
        snapshot: format!("debian-{suite}").parse()?,
        source: Source::Debian { suite, mirror: template::MIRROR.to_owned() },
        http: Some(template::http(template::WWW).map_err(anyhow::Error::msg)?),
        patience: Duration::from_secs(template::PATIENCE_S),
        storage: storage(config)?,
        disk_gib: template::DISK_GIB,
        bridge: config.network.bridge.clone(),
        name_server: name_server(config),
        cores: template::CORES,
        memory_mib: template::MEMORY_MIB,
    })
}

/// Returns the storage for new templates that the configuration says or this host shows.
pub(crate) fn storage(config: &Config) -> Result<String> {
    let storage = config.settings().iter().find(|setting| setting.name == "storage");
    let storage = storage.context("no storage was detected: name one with --storage")?;
    Ok(storage.value.clone())
}

/// Returns the address of the bridge's name server, where `bridge init` has made one.
pub(crate) fn name_server(config: &Config) -> Option<std::net::Ipv4Addr> {
    bridge::has_name_server().then_some(config.network.gateway)
}

/// Makes a template with progress on stdout.
pub(crate) fn make_template(config: &Config, order: &Order) -> Result<()> {
    let begun = Instant::now();
    let say = |step: &str| println!("{:>4} s  {step}", begun.elapsed().as_secs());
    let (node, work) = (&config.node.value, config.state_dir.join(TEMPLATE));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let runner = Runner::new(work.join("output"), config.pve.proc.clone(), worker::is_task, 1)
            .with_context(|| format!("directory {}", work.display()))?;
        Ok::<_, anyhow::Error>(
            template::init(order, node, &config.pve, runner, work.clone(), &say).await?,
        )
    })?;
    let Order { vmid, snapshot, .. } = order;
    match done {
        template::Done::There => println!("template {vmid} is there already"),
        template::Done::Made => {
            say(&format!("template {vmid} is ready: snapshot {snapshot}"));
            println!("An agent that runs offers it after `systemctl restart pve-sandbox-agent`;");
            println!("sandboxes run on meanwhile.");
        }
    }
    Ok(())
}
