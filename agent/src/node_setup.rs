//! Commands that set a node up: `join`, `setup`, `bridge init`, `template init`. They print what they do.

use std::{path::Path, time::Duration};

use agent::{
    bridge::{self, Bridge, Plan},
    config::{self, Config, Flags},
    detect::{self, Roots, Undecided},
    join::{
        self, Done, Line,
        lacks::{self, Wanted},
        other_caddy::{self, Decision},
    },
    pve::worker,
    run::Runner,
    template::{self, Order, Source},
    uninstall::{MASKED_CADDY, TEMPLATE},
};
use anyhow::{Context, Result};
use daemon::{
    replace::{Access, replace},
    systemctl,
};
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
pub(crate) fn join(line: &Line, path: &Path, wanted: Wanted) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let paths = bridge::Paths::of_host(path);
    let Done(done) = runtime.block_on(join::run(line, &paths, Path::new(NET)))?;
    for step in done {
        println!("{step}");
    }
    // The node has joined, whatever becomes of the rest, and its token is used up.
    complete(path, wanted).context("this node has joined, but it is not complete")
}

/// Makes what a node that has joined lacks, and starts the units; a dry run only says it.
pub(crate) fn setup(path: &Path, wanted: Wanted, dry_run: bool) -> Result<()> {
    let file: config::File = match path.exists() {
        true => daemon::config::load(path)?,
        false => config::File::default(),
    };
    anyhow::ensure!(
        file.tls.cert.exists(),
        "this node has not joined: run here the line that `sandboxctl node token NODE` prints"
    );
    let wanted = Wanted { start: wanted.start && systemctl::is_there(), ..wanted };
    let paths = bridge::Paths::of_host(path);
    let [agent, ingress] = UNITS;
    // Without a configuration there is no Caddy to start.
    let serves =
        || !file.ingress.caddy_config.exists() || is_active(ingress) || is_active(GREEN_UNIT);
    let runs = wanted.start && is_active(agent) && is_enabled(agent) && serves();
    let lacks = lacks::look(wanted, &paths, Path::new(NET), runs)?;
    if lacks.is_empty() {
        println!("nothing to do: all of it is there");
        return Ok(());
    }
    if dry_run {
        lacks.iter().for_each(|lack| println!("would {lack}"));
        return Ok(());
    }
    complete(path, wanted)
}

/// Makes the parts of a node that are missing, each as far as it can, and starts the units.
///
/// # Errors
/// When a part that is wanted is missing at the end.
fn complete(path: &Path, wanted: Wanted) -> Result<()> {
    let mut missing = Vec::new();
    if wanted.bridge
        && let Err(error) = make_bridge(None, path, wanted.start)
    {
        println!("the bridge is not complete: {error:#}");
        missing.push("the bridge");
    }
    let config = Config::load(Some(path), &Flags::default(), &config::environment);
    let ready = config.map_err(anyhow::Error::from).and_then(|config| {
        production::check(&config)?;
        // Sandboxes would be put on a bridge of the node's own network, and stay there.
        let is_named = missing.is_empty() || lacks::names_a_bridge(path)?;
        anyhow::ensure!(is_named, "the configuration names no bridge");
        Ok(config)
    });
    let config = match ready {
        Ok(config) => config,
        Err(error) => {
            println!("the agent is not started: {error:#}");
            missing.push("an agent that runs");
            return all_there(&missing);
        }
    };
    if wanted.template
        && config.templates.is_empty()
        && let Err(error) = first_template(&config).and_then(|order| make_template(&config, &order))
    {
        println!("no template was made: {error:#}");
        missing.push("a template");
    }
    if !wanted.start || !systemctl::is_there() {
        println!("nothing was started: systemctl enable --now {}", UNITS.join(" "));
        return all_there(&missing);
    }
    mask_unused_caddy(&config)?;
    systemctl::run(&[&["enable", "--quiet"], &UNITS[..]].concat())?;
    let [agent, ingress] = UNITS;
    // It may run with the earlier certificates. The agent has Caddy use the new ones.
    systemctl::run(&["restart", agent])?;
    if !is_active(GREEN_UNIT) {
        systemctl::run(&["start", ingress])?;
    }
    println!("started {}", UNITS.join(" and "));
    all_there(&missing)
}

/// Fails when parts are missing: a script must not take such a node for a complete one.
fn all_there(missing: &[&str]) -> Result<()> {
    let parts = missing.join(" and ");
    anyhow::ensure!(
        missing.is_empty(),
        "missing: {parts}; when the reason is mended, `pve-sandbox-agent setup` makes what is missing (with \
         the same --no-... and --config)"
    );
    Ok(())
}

/// Returns true for a unit that runs.
pub(crate) fn is_active(unit: &str) -> bool {
    told("/usr/bin/systemctl", &["is-active", unit]).0.trim() == "active"
}

/// Returns true for a unit that a boot starts.
fn is_enabled(unit: &str) -> bool {
    told("/usr/bin/systemctl", &["is-enabled", unit]).1
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
            // `uninstall` and the purge give it back. First, so that no crash leaves it masked without the
            // file; one that is not masked is not harmed by either.
            std::fs::create_dir_all(&config.state_dir)?;
            replace(&config.state_dir.join(MASKED_CADDY), b"", Access::PRIVATE)?;
            systemctl::run(&["mask", "--now", "--quiet", other_caddy::UNIT])?;
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
    let is_complete = changed.is_empty() && is_up(&bridge, config)?;
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
            .with_context(|| {
                format!(
                    "the name server did not start: is dnsmasq-base installed, and port 53 of {} free? journalctl -u \
                     {DNS_UNIT} -n 20 says why",
                    bridge.address.addr()
                )
            })?;
    }
    Ok(())
}

/// Returns true when a bridge has its interface and its address: a run may have ended before it had both.
fn is_up(bridge: &Bridge, config: &Path) -> Result<bool> {
    let pve = daemon::config::load::<config::File>(config)?.pve;
    let roots = Roots { pve: &pve.root, proc: &pve.proc, net: Path::new(NET) };
    Ok(lacks::is_up(bridge, roots))
}

/// Settings of the template that a node gets which has none.
fn first_template(config: &Config) -> Result<Order> {
    let suite = template::release().context("cannot read the node's release")?;
    Ok(Order {
        vmid: template::vmid(&config.pve.root, &config.node.value, template::Named::default())?,
        is_named: false,
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
    if let Some(storage) = &config.storage {
        return Ok(storage.value.clone());
    }
    let roots = Roots { pve: &config.pve.root, proc: &config.pve.proc, net: Path::new(NET) };
    detect::storage(roots, &config.node.value).map_err(|undecided| {
        let fit = match &undecided {
            Undecided::Several { candidates, .. } => candidates.as_slice(),
            Undecided::None(_) => &[],
        };
        let remedy = detect::storage_remedy(fit);
        anyhow::anyhow!("{undecided}; {remedy}")
    })
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
    match done {
        template::Done::There => println!("template {} is there already", order.vmid),
        template::Done::Made(vmid) => {
            say(&format!("template {vmid} is ready: snapshot {}", order.snapshot));
            println!("An agent that runs offers it after `systemctl restart pve-sandbox-agent`;");
            println!("sandboxes run on meanwhile.");
        }
    }
    Ok(())
}
