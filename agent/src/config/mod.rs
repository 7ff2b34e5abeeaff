//! Configuration of the agent. Sources by precedence: flags, one file, the `PVE_*` variables of
//! older setups, detection on the host, defaults. Each value records its source.

mod basics;
mod certificate;
mod checks;
pub mod edit;
mod file;
mod isolation;
mod network;
mod options;
mod pool;
mod wake;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    id::Vmid,
    lifetime::LifetimePatch,
    name::{Label, NodeName},
};

pub use basics::Basics;
pub use certificate::{AcmeDns, Certificate, Redirect};
pub use file::{File, Ingress, Limits, Load, Shim, Template, Tls};
pub use isolation::{Isolation, Reach};
pub use network::{Network, pool_of_host};
pub use pool::Pool;
pub use wake::Wake;

use crate::{
    detect::{self, Roots},
    journal::{self, SqliteJournal},
    pve::{HostPaths, template_mark::TemplateMark},
    sandbox::{Lifetimes, OnReboot, exec::shims::Backend},
};

/// Source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Flag,
    File,
    /// Environment variable of this name.
    Env(&'static str),
    /// Detected on the host.
    Detected,
    /// Journal, which remembers a value that was detected earlier.
    Journal,
    /// Default, without any other source.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::File => f.write_str("file"),
            Self::Env(name) => f.write_str(name),
            Self::Detected => f.write_str("detected"),
            Self::Journal => f.write_str("journal"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Value of a setting with its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced<T> {
    /// Value.
    pub value: T,
    /// Source of the value.
    pub source: Source,
}

/// Flags of the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Where the controller reaches the agent, address:port
    #[arg(long)]
    pub listen: Option<std::net::SocketAddr>,
    /// PVE's name of this node
    #[arg(long)]
    pub node: Option<NodeName>,
    /// Bridge that sandboxes are connected to
    #[arg(long)]
    pub bridge: Option<String>,
    /// Default route of sandboxes
    #[arg(long)]
    pub gateway: Option<Ipv4Addr>,
    /// Addresses of sandboxes: a network, or first-last
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Storage that new templates go to
    #[arg(long)]
    pub storage: Option<String>,
    /// Domain of the sandboxes' host names
    #[arg(long)]
    pub domain: Option<String>,
}

/// Invalid or missing value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Name of the setting in the file.
    pub what: &'static str,
    /// Error, and how to fix it.
    pub why: String,
}

/// Reason why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("the configuration was not read")]
    File(#[source] daemon::config::Error),
    /// All mistakes in the configuration.
    #[error("the configuration cannot be used{}", list(.0))]
    Mistakes(Vec<Mistake>),
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(|mistake| format!("\n  {}: {}", mistake.what, mistake.why)).collect()
}

/// Line of the table that `check-config` prints and the log begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Name of the setting in the file.
    pub name: &'static str,
    /// Value, as text.
    pub value: String,
    /// Source of the value.
    pub source: Source,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} ({})", self.name, self.value, self.source)
    }
}

/// Configuration, complete and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// PVE's name of this node.
    pub node: Sourced<NodeName>,
    /// Address where the controller reaches the agent.
    pub listen: Sourced<std::net::SocketAddr>,
    /// Directory for the journal and other state that must survive a reboot.
    pub state_dir: PathBuf,
    /// Directory for sockets and the output of commands.
    pub run_dir: PathBuf,
    /// Certificates for the controller's connections.
    pub tls: Tls,
    /// Host paths of PVE.
    pub pve: HostPaths,
    /// Number of this node in the cluster, which decides the ranges below; `None` while it is
    /// unknown.
    pub number: Option<u32>,
    /// Stripe of the vmids that belongs to this node, inclusive.
    pub vmids: Sourced<(Vmid, Vmid)>,
    /// Addresses of sandboxes.
    pub network: Network,
    /// Isolation of the sandboxes.
    pub isolation: Isolation,
    /// Time for which a released address is not leased to another sandbox.
    pub quarantine: Duration,
    /// Templates that can be cloned on this node.
    pub templates: Vec<Template>,
    /// Those of them that the file does not name: they were found by their marks.
    pub found_templates: BTreeSet<Vmid>,
    /// Limits on concurrency and duration.
    pub limits: Limits,
    /// Default lifetime of sandboxes, and how long they are kept paused or stopped.
    pub lifetimes: Lifetimes,
    /// Action after a reboot of the node for sandboxes that ran before.
    pub on_reboot: OnReboot,
    /// Labels of the node.
    pub labels: Vec<Label>,
    /// Limits on the host resources that serve a sandbox's commands.
    pub shim: Shim,
    /// Method by which a shim enters its sandbox.
    pub exec_backend: Backend,
    /// File with the boot id of the host.
    pub boot_id: PathBuf,
    /// Paths where the load is read.
    pub load: Load,
    /// Ingress from the web; its domain is in `settings` too, with its source.
    pub ingress: Ingress,
    /// Storage for new templates; `None` when none is named and none is fit.
    pub storage: Option<Sourced<String>>,
    settings: Vec<Setting>,
}

/// Inputs of the configuration, and what is collected while it is completed.
struct Sources<'a> {
    flags: &'a Flags,
    env: &'a dyn Fn(&str) -> Option<String>,
    mistakes: Vec<Mistake>,
    settings: Vec<Setting>,
}

impl Sources<'_> {
    fn mistake(&mut self, what: &'static str, why: impl fmt::Display) {
        self.mistakes.push(Mistake { what, why: why.to_string() });
    }

    fn must(&mut self, holds: bool, what: &'static str, why: &str) {
        if !holds {
            self.mistake(what, why);
        }
    }

    /// Returns the first value that flag, file or environment variable provides.
    fn said<T: std::str::FromStr>(
        &mut self,
        what: &'static str,
        flag: Option<T>,
        file: Option<T>,
        variable: &'static str,
    ) -> Option<Sourced<T>>
    where
        T::Err: fmt::Display,
    {
        if let Some(value) = flag {
            return Some(Sourced { value, source: Source::Flag });
        }
        if let Some(value) = file {
            return Some(Sourced { value, source: Source::File });
        }
        let text = (self.env)(variable).filter(|text| !text.is_empty())?;
        match text.parse() {
            Ok(value) => Some(Sourced { value, source: Source::Env(variable) }),
            Err(error) => {
                self.mistake(what, format_args!("{variable}={text}: {error}"));
                None
            }
        }
    }

    /// Falls back to detection on the host when no value was provided.
    fn or_detect<T>(
        &mut self,
        what: &'static str,
        said: Option<Sourced<T>>,
        detect: impl FnOnce() -> Result<T, detect::Undecided>,
    ) -> Option<Sourced<T>> {
        if said.is_some() {
            return said;
        }
        match detect() {
            Ok(value) => Some(Sourced { value, source: Source::Detected }),
            Err(undecided) => {
                self.mistake(what, undecided);
                None
            }
        }
    }

    fn show<T: fmt::Display>(&mut self, name: &'static str, sourced: Option<&Sourced<T>>) {
        if let Some(Sourced { value, source }) = sourced {
            self.settings.push(Setting { name, value: value.to_string(), source: *source });
        }
    }
}

impl Config {
    /// Reads the file at `path`, if one is given (it must then exist), and completes it.
    pub fn load(
        path: Option<&Path>,
        flags: &Flags,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Error> {
        let file = path.map(daemon::config::load).transpose().map_err(Error::File)?;
        Self::complete(file.unwrap_or_default(), flags, env, Path::new("/sys/class/net"))
    }

    /// Completes a configuration file from the other sources, and checks the result.
    pub fn complete(
        file: File,
        flags: &Flags,
        env: &dyn Fn(&str) -> Option<String>,
        net: &Path,
    ) -> Result<Self, Error> {
        let mut from = Sources { flags, env, mistakes: Vec::new(), settings: Vec::new() };
        let pve = file.pve.clone();
        let roots = Roots { pve: &pve.root, proc: &pve.proc, net };

        let state_dir = file.state_dir.unwrap_or_else(|| STATE_DIR.into());
        let known = SqliteJournal::node_of(&journal_in(&state_dir)).unwrap_or_else(|error| {
            from.mistake("state_dir", error);
            None
        });
        let (node, number) = node(&mut from, file.node, known, roots);
        from.show("node", node.as_ref());
        let listen = flags.listen.map(|value| Sourced { value, source: Source::Flag });
        let listen = listen
            .or(file.listen.map(|value| Sourced { value, source: Source::File }))
            .unwrap_or(Sourced { value: ([0, 0, 0, 0], 7445).into(), source: Source::Default });
        from.show("listen", Some(&listen));
        let vmids = vmids(&mut from, &file.vmids, number);
        let network = network::complete(&mut from, &file.network, number, roots);
        let isolation = isolation::complete(&mut from, &file.network);
        let storage = storage(&mut from, file.storage, node.as_ref(), roots);
        let mut ingress = file.ingress;
        ingress.domain = domain(&mut from, ingress.domain.take());
        let mut templates = file.template;
        checks::services(&mut from, &templates);
        let marked = node.as_ref().map(|node| detect::templates(roots, &node.value));
        let found_templates = add_marked(&mut from, &mut templates, marked.unwrap_or_default());
        checks::templates(&mut from, &templates, roots);
        checks::labels(&mut from, &file.labels);
        checks::limits(&mut from, &file.limits);
        let lifetimes = lifetimes(&mut from, &file.lifetime);
        checks::shim(&mut from, &file.shim);
        ingress.wake.check(&mut from);
        certificate::check(&mut from, &ingress);

        let (Some(node), Some(vmids), Some(network), []) =
            (node, vmids, network, from.mistakes.as_slice())
        else {
            return Err(Error::Mistakes(from.mistakes));
        };
        let quarantine = Duration::from_secs(file.network.quarantine_s.unwrap_or(30));
        let run_dir = file.run_dir.unwrap_or_else(|| "/run/pve-sandbox".into());
        ingress.socket.get_or_insert_with(|| run_dir.join("ingress.sock"));
        let mut load = file.load;
        load.proc.get_or_insert_with(|| pve.proc.clone());
        Ok(Self {
            node,
            listen,
            state_dir,
            run_dir,
            tls: file.tls,
            pve,
            number,
            vmids,
            network,
            isolation,
            quarantine,
            templates,
            found_templates,
            limits: parallel(file.limits),
            lifetimes,
            on_reboot: file.on_reboot,
            labels: file.labels,
            shim: file.shim,
            exec_backend: file.exec_backend,
            boot_id: file.boot_id.unwrap_or_else(|| crate::clock::BOOT_ID.into()),
            load,
            ingress,
            storage,
            settings: from.settings,
        })
    }

    /// Returns the path of the journal.
    pub fn journal(&self) -> PathBuf {
        journal_in(&self.state_dir)
    }

    /// Lists the chosen values with their sources.
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }
}

/// Adds the templates that were found by their marks, unless the file has their vmids. A mark says nothing of services:
/// those that the file gives to the snapshot count for all of its templates. Returns the vmids of those that were added.
fn add_marked(
    from: &mut Sources<'_>,
    templates: &mut Vec<Template>,
    marked: BTreeMap<Vmid, TemplateMark>,
) -> BTreeSet<Vmid> {
    let mut added = BTreeSet::new();
    for (vmid, mark) in marked {
        if templates.iter().any(|template| template.vmid == vmid) {
            continue;
        }
        let value = format!("{} is {vmid}", mark.snapshot);
        from.show("template", Some(&Sourced { value, source: Source::Detected }));
        let mut template = Template::marked(vmid, mark);
        if let Some(twin) = templates.iter().find(|twin| twin.snapshot == template.snapshot) {
            template.services.clone_from(&twin.services);
            template.expose_on_listen = twin.expose_on_listen;
        }
        templates.push(template);
        added.insert(vmid);
    }
    added
}

/// Chooses the storage for new templates. The agent does not use it, so a mistake in it must not stop
/// the agent.
fn storage(
    from: &mut Sources<'_>,
    in_file: Option<String>,
    node: Option<&Sourced<NodeName>>,
    roots: Roots<'_>,
) -> Option<Sourced<String>> {
    let said = from.said("storage", from.flags.storage.clone(), in_file, "PVE_STORAGE");
    let detected = || {
        let found = detect::storage(roots, &node?.value).ok()?;
        Some(Sourced { value: found, source: Source::Detected })
    };
    let storage = said.or_else(detected);
    from.show("storage", storage.as_ref());
    storage
}

/// Lets as many `pct` run at once as there are cores, unless the file says how many.
fn parallel(mut limits: Limits) -> Limits {
    if limits.pct_parallel_max == 0 {
        let cores = std::thread::available_parallelism();
        limits.pct_parallel_max = cores.map_or(1, std::num::NonZero::get);
    }
    limits
}

fn domain(from: &mut Sources<'_>, in_file: Option<String>) -> Option<String> {
    let flag = from.flags.domain.clone();
    let domain = from.said("ingress.domain", flag, in_file, "PVE_PUBLIC_DOMAIN");
    from.show("ingress.domain", domain.as_ref());
    domain.map(|domain| domain.value)
}

fn lifetimes(from: &mut Sources<'_>, file: &file::Lifetime) -> Lifetimes {
    if (1..proto::lifetime::IDLE_MIN.as_secs()).contains(&file.idle_s) {
        from.mistake("lifetime.idle_s", "must be 10 or more; 0 is never");
    }
    if file.idle_cpu > proto::lifetime::IDLE_CPU_MAX {
        from.mistake("lifetime.idle_cpu", "must be at most 6400, percent of one core; 0 is off");
    }
    let exempt = file.exemption().unwrap_or_else(|why| {
        from.mistake("lifetime.exempt", why);
        None
    });
    Lifetimes {
        default: LifetimePatch {
            ttl: Some(Duration::from_secs(file.ttl_s)),
            ttl_action: Some(file.ttl_action),
            idle: Some(Duration::from_secs(file.idle_s)),
            idle_action: Some(file.idle_action),
            idle_cpu: Some(file.idle_cpu),
        },
        silent_bytes: file.silent_bytes,
        paused_max: Duration::from_secs(file.paused_max_s),
        stopped_max: Duration::from_secs(file.stopped_max_s),
        exempt,
    }
}

/// Reads a variable of this process's environment, for `Config::load`. Called at the start and
/// nowhere else.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Default port where the Caddys of the nodes listen for their peers.
pub const PEER_PORT: u16 = 8481;

/// Directory for the journal, unless the file says otherwise.
pub const STATE_DIR: &str = "/var/lib/pve-sandbox-agent";

fn journal_in(state_dir: &Path) -> PathBuf {
    state_dir.join("journal.sqlite")
}

/// Chooses the node's name, and the number that decides its ranges. The journal's number takes
/// precedence: a node keeps the number it was given until an operator has confirmed another.
fn node(
    from: &mut Sources<'_>,
    file: Option<NodeName>,
    known: Option<journal::Node>,
    roots: Roots<'_>,
) -> (Option<Sourced<NodeName>>, Option<u32>) {
    let said = from.said("node", from.flags.node.clone(), file, "PVE_NODE");
    let detected = detect::identity(roots);
    let told = detected.as_ref().ok().and_then(|identity| identity.number);
    let number = known.as_ref().map(|node| node.number).or(told);
    if let (Some(said), Ok(identity)) = (&said, &detected)
        && said.value != identity.node
    {
        // Another node's name would make the agent read, and change, another node's containers.
        let (name, source) = (&said.value, said.source);
        let text = format!("{name} ({source}) is not this node, which is {}", identity.node);
        from.mistake("node", text);
    }
    // pmxcfs may be unavailable for a moment: the sandboxes of this node stay reachable meanwhile.
    let remembered = known.filter(|_| said.is_none() && detected.is_err());
    if let Some(node) = remembered {
        return (Some(Sourced { value: node.name, source: Source::Journal }), number);
    }
    (from.or_detect("node", said, || detected.map(|identity| identity.node)), number)
}

/// Explains why there is no default stripe and no default pool.
const NUMBER_UNKNOWN: &str = "the node's number in the cluster is not known: it is a member, and \
    corosync has not been heard of since pmxcfs was started; wait for it, or say it";

/// Computes this node's stripe.
fn vmids(
    from: &mut Sources<'_>,
    vmids: &file::Vmids,
    number: Option<u32>,
) -> Option<Sourced<(Vmid, Vmid)>> {
    let source = if *vmids == file::Vmids::default() { Source::Default } else { Source::File };
    let stripe = match vmids.stripe.or(number) {
        Some(stripe) => stripe,
        None => {
            from.mistake("vmids.stripe", NUMBER_UNKNOWN);
            return None;
        }
    };
    let (first, last) = (vmids.first.get(), vmids.last.get());
    let each = last.checked_sub(first).and_then(|span| (span + 1).checked_div(vmids.stripes));
    if stripe == 0 || stripe > vmids.stripes {
        let text = format!(
            "{stripe} is not one of the {} stripes: raise vmids.stripes on every \
            node, or choose one",
            vmids.stripes
        );
        from.mistake("vmids.stripe", text);
        return None;
    }
    let Some(each) = each.filter(|each| *each > 0) else {
        from.mistake("vmids", format!("{first}-{last} has no number for each of the stripes"));
        return None;
    };
    let first = first + (stripe - 1) * each;
    let vmid = |number| Vmid::try_from(number).ok();
    let (first, last) = (vmid(first)?, vmid(first + each - 1)?);
    from.settings.push(Setting { name: "vmids", value: format!("{first}-{last}"), source });
    Some(Sourced { value: (first, last), source })
}

#[cfg(test)]
mod tests;
