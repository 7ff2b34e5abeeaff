//! Brings a lab up, in the order of this file, or updates a lab that is up.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::{Uid, setsid};

use crate::cgroup::Hierarchies;
use crate::daemons::{self, FORWARD, PMXCFS};
use crate::image::IMAGES;
use crate::lab::{Lab, Node};
use crate::layout::{Layout, NODES_MAX, NodeId};
use crate::process::wait_until;
use crate::progress::{say, step};
use crate::pve::{self, Template};
use crate::settings::{Limits, Settings};
use crate::supervise::Service;
use crate::{configure, disk, down, install, lxcfs, machine, net, owner, template, way_out};

/// Longest time of a node's boot.
pub const BOOT_WITHIN: Duration = Duration::from_secs(60);
const START_WITHIN: Duration = Duration::from_secs(10);
/// Longest start of a daemon, which first opens its database and its certificates.
const DAEMON_WITHIN: Duration = Duration::from_secs(30);

/// Options of [`up`].
#[derive(Debug, Clone)]
pub struct UpOptions {
    pub nodes: u8,
    /// Whether to discard the nodes' disks and /etc/pve of the last time.
    pub fresh: bool,
    /// Limits of each node.
    pub limits: Limits,
    /// Values that are written into the nodes' templates; the lab adds the name server.
    pub template: Template,
    /// Directory of the workspace's built programs.
    pub built: PathBuf,
}

impl Default for UpOptions {
    fn default() -> UpOptions {
        UpOptions {
            nodes: 3,
            fresh: false,
            limits: Limits::default(),
            template: Template::default(),
            built: built(),
        }
    }
}

/// Finds the workspace's programs: beside this one, or in the checkout's target directory.
fn built() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    beside
        .filter(|dir| dir.join("lab").exists())
        .unwrap_or_else(|| workspace.unwrap_or(Path::new(".")).join("target/release"))
}

/// Brings the lab up.
pub fn up(lab: &Lab, options: &UpOptions) -> Result<()> {
    let layout = lab.layout();
    ensure!(Uid::effective().is_root(), "the lab makes namespaces and mounts: run it as root");
    ensure!((1..=NODES_MAX).contains(&options.nodes), "a lab has 1 to {NODES_MAX} nodes");
    let _held = down::lock(layout)?;
    if let Some(other) = owner::other(layout) {
        bail!("the lab in {} has this machine: take it down first", other.display());
    }
    if lab.is_up() && layout.complete().exists() && !options.fresh {
        let settings = Settings::load(layout)?;
        ensure!(
            settings.nodes == options.nodes,
            "the lab is up with {} nodes: take it down first",
            settings.nodes
        );
        say("the lab is up already; bringing its programs up to date");
        for node in lab.nodes()?.iter().filter(|node| node.init().is_none()) {
            step(&format!("booting {}", node.id()), |_| node.boot())?;
        }
        return programs(lab, options);
    }
    for dir in [layout.cache(), layout.logs()] {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    step("making the machine ready", |_| machine::prepare())?;
    template::ensure_all(layout)?;
    step("clearing what was left", |_| clear(layout, options))?;
    let mut settings =
        Settings { nodes: options.nodes, limits: options.limits.clone(), way_out: false };
    settings.save(layout)?;
    step("starting the supervisor and /etc/pve", |_| supervisor(lab, &settings, options))?;
    // The lab goes on without these two.
    if let Err(error) = step("starting lxcfs", |_| lxcfs::start(lab)) {
        say(&format!("  {error:#}\n  In sandboxes `free` shows the memory of the whole machine"));
    }
    match step("opening the way out", |_| way_out::start(lab)) {
        Ok(()) => settings.way_out = true,
        Err(error) => say(&format!("  {error:#}\n  Sandboxes reach nothing outside the lab")),
    }
    settings.save(layout)?;
    step("making the disks", |_| {
        each(&settings.node_ids(), |node| {
            disk::ensure_mounted(layout, node, settings.limits.disk_gib)
        })
    })?;
    step(&format!("booting {} nodes", options.nodes), |_| {
        each(&settings.node_ids(), |node| lab.node(&node.name())?.boot())
    })?;
    let name_server = if settings.way_out { way_out::NAME_SERVER } else { "" };
    let template = Template { name_server: name_server.to_owned(), ..options.template.clone() };
    step("writing the templates", |_| {
        pve::ensure_storage(layout, settings.node_ids()[0])?;
        each(&settings.node_ids(), |node| {
            let node = lab.node(&node.name())?;
            IMAGES
                .iter()
                .try_for_each(|image| pve::ensure_template(layout, &node, image, &template))
        })
    })?;
    programs(lab, options)?;
    fs::write(layout.complete(), "").context("cannot write that the lab is up")
}

fn clear(layout: &Layout, options: &UpOptions) -> Result<()> {
    down::clean(layout)?;
    if options.fresh {
        down::forget(layout)?;
    }
    fs::create_dir_all(layout.run())?;
    owner::take(layout)?;
    Hierarchies::ensure(layout)?;
    net::make()
}

/// Starts the supervisor, to which every process of the lab is bound, and /etc/pve.
fn supervisor(lab: &Lab, settings: &Settings, options: &UpOptions) -> Result<()> {
    let layout = lab.layout();
    install::on_the_machine(layout, &options.built)?;
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(layout.logs().join("supervisor.log"))?;
    let mut command = Command::new(layout.binary());
    command.arg("--lab-dir").arg(layout.dir()).arg("supervise");
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    detach(&mut command);
    let mut child = command.spawn().context("cannot start the supervisor")?;
    wait_until(START_WITHIN, || {
        lab.services().status().is_ok() || matches!(child.try_wait(), Ok(Some(_)))
    })
    .context("the supervisor does not answer")?;
    lab.services().put(daemons::of_the_lab(layout, settings))?;
    lab.services().start(PMXCFS, START_WITHIN)
}

#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
fn detach(command: &mut Command) {
    // SAFETY: the only call in the child is a plain system call.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
}

/// Installs the built programs and updates the services.
fn programs(lab: &Lab, options: &UpOptions) -> Result<()> {
    let missing = install::missing(&options.built);
    if !missing.is_empty() {
        say(&format!("  not built, so left out: {}", missing.join(", ")));
    }
    let settings = Settings::load(lab.layout())?;
    let nodes = settings.node_ids();
    // The machine first: the controller writes the nodes' certificates.
    let changed = step("installing the programs", |_| {
        let changed = install::on_the_machine(lab.layout(), &options.built)?;
        configure::controller(lab, &nodes)?;
        Ok(changed)
    })?;
    step("starting the agents", |_| {
        each(&nodes, |node| programs_in(lab, &lab.node(&node.name())?, options))
    })?;
    step("starting the controller", |_| {
        let mut services = daemons::of_the_lab(lab.layout(), &settings);
        let daemons = daemons::on_the_machine(lab.layout());
        services.extend(daemons.iter().cloned());
        lab.services().put(services)?;
        lab.services().start(FORWARD, START_WITHIN)?;
        ready(&lab.services(), &daemons, &changed)
    })
}

fn programs_in(lab: &Lab, node: &Node, options: &UpOptions) -> Result<()> {
    let root = node.root()?;
    let mut changed = install::in_node(&root, &options.built)?;
    if configure::node(lab, node)? {
        changed.push(daemons::AGENT);
    }
    let daemons = daemons::on_a_node(node.id(), &root);
    let services = node.services()?;
    let caddy = || fs::read(root.join(daemons::CADDY_CONFIG.trim_start_matches('/'))).ok();
    let before = caddy();
    services.put(daemons.clone())?;
    ready(&services, &daemons, &changed)?;
    // A new agent may have another configuration for Caddy.
    if before.is_some() && before != caddy() {
        services.restart(daemons::CADDY, DAEMON_WITHIN)?;
    }
    Ok(())
}

/// Restarts the daemons whose program changed, and waits until every daemon is ready.
fn ready(
    services: &crate::supervise::Services,
    daemons: &[Service],
    changed: &[&'static str],
) -> Result<()> {
    for daemon in daemons {
        if changed.contains(&daemon.name.as_str()) {
            services.restart(&daemon.name, DAEMON_WITHIN)?;
        } else {
            services.start(&daemon.name, DAEMON_WITHIN)?;
        }
    }
    Ok(())
}

/// Runs the work for all nodes in parallel; returns the first failure.
fn each(nodes: &[NodeId], work: impl Fn(NodeId) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            nodes.iter().map(|node| (node, scope.spawn(move || work(*node)))).collect();
        let mut result = Ok(());
        for (node, thread) in threads {
            let done = match thread.join() {
                Ok(done) => done.with_context(|| node.name()),
                Err(panic) => std::panic::resume_unwind(panic),
            };
            result = result.and(done);
        }
        result
    })
}
