//! `controller.toml`: read once at the start and checked as a whole; the error lists every mistake.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    limits::{Limit, Rate, TeamLimits},
    name::{NodeName, Port, Preset},
    spec::{Egress, Size, limit},
    visibility::Visibility,
};
use serde::Deserialize;

use crate::{
    audit,
    ca::Lives,
    events, node,
    placement::{BEST, Limits},
    sandbox::{self, Exposure},
    url::{AddressPrefix, Suffix, UrlTemplate, Urls},
};

/// The whole configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Listen address of the API: gRPC and gRPC-Web over TLS.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Directory of the database, the CA and the certificates.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// URL of an open port, with `{port}` and `{vmid}` or `{id}`, or with `{name}` and `{team}`. While it is empty, or the example of
    /// the package, URLs are those of the containers themselves.
    #[serde(default)]
    pub url_template: String,
    /// DNS suffix of the containers' names, for URLs of their own; empty: no DNS knows them.
    #[serde(default)]
    pub container_suffix: String,
    /// First numbers of the containers' addresses that URLs of their own may have; empty: any.
    #[serde(default)]
    pub container_ip_prefix: String,
    /// Whether the members of an agent's cluster are used as nodes too.
    #[serde(default)]
    pub discover: bool,
    /// Port of the agents of discovered nodes.
    #[serde(default = "default_agent_port")]
    pub agent_port: u16,
    /// Whether log lines are JSON.
    #[serde(default)]
    pub log_json: bool,
    /// Retention of events, days.
    #[serde(default = "default_events_keep_days")]
    pub events_keep_days: u32,
    /// Most events that are stored; the oldest are removed first.
    #[serde(default = "default_events_max")]
    pub events_max: u64,
    /// Retention of the audit log.
    #[serde(default)]
    pub audit: Audit,
    /// Certificates that replace those of `init`.
    #[serde(default)]
    pub tls: Tls,
    /// Configured nodes.
    #[serde(default, rename = "node")]
    pub nodes: Vec<Node>,
    /// SSH server. Without it there is none.
    pub ssh: Option<Ssh>,
    /// Bounds of the API.
    #[serde(default)]
    pub limits: ApiLimits,
    /// Bounds of creations.
    #[serde(default)]
    pub create: Create,
    /// Limits of how full nodes get.
    #[serde(default)]
    pub placement: Limits,
    /// How much a team may have at once, unless it has limits of its own.
    #[serde(default)]
    pub quota: Quota,
    /// How often a team may create, change and run commands, unless it has limits of its own.
    #[serde(default)]
    pub rates: Rates,
    /// Reach of a sandbox outside of itself.
    #[serde(default)]
    pub egress: EgressRules,
    /// Ports that are open to HTTP.
    #[serde(default)]
    pub ingress: Ingress,
    /// Sizes by name, `[sizes.NAME]`.
    #[serde(default)]
    pub sizes: BTreeMap<Preset, Size>,
}

/// One configured node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// PVE's name of the node; the agent's certificate must contain the same name.
    pub name: NodeName,
    /// Address of the agent, `host:port`.
    pub address: String,
}

/// Paths of the API's certificate. Without them the certificate of `init` is used.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Certificate that callers see, with its chain.
    pub cert: Option<PathBuf>,
    /// Private key of `cert`.
    pub key: Option<PathBuf>,
    /// Life of the certificates that renew themselves, seconds: the controller's and the agents'. They
    /// are renewed at half of it.
    pub life_s: Option<u64>,
}

/// SSH server.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// Listen address.
    pub listen: SocketAddr,
    /// Host name for clients; empty: the one by which they reach the API.
    #[serde(default)]
    pub host: String,
    /// Port for clients, where it is not that of `listen`.
    pub public_port: Option<u16>,
    /// Most connections of all teams that are logged in; a team may have half of them.
    #[serde(default = "default_ssh_connections_max")]
    pub connections_max: usize,
}

const fn default_ssh_connections_max() -> usize {
    1024
}

/// Retention of the audit log.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Time for which entries are kept, days.
    pub retention_days: u32,
    /// Most MiB of the log; the oldest entries are removed first, before their time. The teams share them.
    pub max_mib: u64,
    /// Age up to which entries are not removed for the size of the log, days.
    pub min_days: u32,
}

impl Default for Audit {
    fn default() -> Self {
        Self { retention_days: 365, max_mib: 1024, min_days: 7 }
    }
}

/// Lives of certificates that may be set, seconds. Hours are meant; tests use seconds.
const LIVES_S: std::ops::RangeInclusive<u64> = 10..=365 * 24 * 3600;

/// Bounds of the API.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiLimits {
    /// Most concurrent unary calls of all teams. A team may always have 32, whatever other teams
    /// have; only its calls above 32 count towards this.
    pub calls_max: usize,
    /// Most concurrent unary calls of one team. The default is half of `calls_max`.
    pub team_calls_max: Option<usize>,
    /// Most concurrent streams of all teams, counted like `calls_max`.
    pub streams_max: usize,
    /// Most concurrent streams of one team. The default is half of `streams_max`.
    pub team_streams_max: Option<usize>,
    /// Most HTTP/2 streams of one connection, which every kind of call needs. The default is more
    /// than a team may have calls and streams: HTTP/2 makes one too many wait without a word, while
    /// a team that has too many is told so.
    pub streams_per_connection: Option<u32>,
    /// Most connections at once. A further one closes a connection without a valid token, or one of
    /// the team that has the most.
    pub connections_max: usize,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            calls_max: 4096,
            team_calls_max: None,
            streams_max: 8192,
            team_streams_max: None,
            streams_per_connection: None,
            connections_max: 2048,
        }
    }
}

impl ApiLimits {
    /// Returns the most HTTP/2 streams of one connection.
    pub fn streams_per_connection(&self) -> u32 {
        let more_than_a_team = self.team_calls() + self.team_streams() + 64;
        let default = u32::try_from(more_than_a_team).unwrap_or(u32::MAX);
        self.streams_per_connection.unwrap_or(default)
    }

    /// Returns the most concurrent unary calls of one team.
    pub fn team_calls(&self) -> usize {
        self.team_calls_max.unwrap_or_else(|| self.calls_max.div_ceil(2))
    }

    /// Returns the most concurrent streams of one team.
    pub fn team_streams(&self) -> usize {
        self.team_streams_max.unwrap_or_else(|| self.streams_max.div_ceil(2))
    }
}

/// How much a team may have at once; without a value as much as there is.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Most sandboxes that are not deleted.
    pub sandboxes: Option<u64>,
    /// Most cores of all of them.
    pub cpu_cores: Option<u64>,
    /// Most memory of all of them, MiB.
    pub memory_mib: Option<u64>,
    /// Most disk of all of them, GiB; a sandbox that asked for none counts with its snapshot's.
    pub disk_gib: Option<u64>,
    /// Most commands that run at the same time.
    pub running_execs: Option<u64>,
    /// Most output of commands that the nodes keep, MiB.
    pub output_mib: Option<u64>,
    /// Most events that are kept.
    pub events: Option<u64>,
}

/// Reach of a sandbox outside of itself: `open`, `none` or `allow=NAME,NAME`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressRules {
    /// Egress of a sandbox whose creation says nothing.
    pub default: Egress,
    /// Most that a team may have, unless it has a maximum of its own.
    pub max: Egress,
}

/// Ports that are open to HTTP.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ingress {
    /// Visibility of a port whose caller does not say it: `public`, `team`, `token` or `private`.
    pub default_visibility: Visibility,
    /// Ports that may never be exposed.
    pub denied_ports: BTreeSet<Port>,
    /// Whether host names by the name of a sandbox are answered.
    pub names: bool,
}

impl Default for Ingress {
    fn default() -> Self {
        let Exposure { default, denied } = Exposure::default();
        Self { default_visibility: default, denied_ports: denied, names: false }
    }
}

/// How often a team may create, change and run commands; without a value as often as it likes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rates {
    /// Creations of the team, such as `10/hour`.
    pub creates: Option<String>,
    /// Creations of each of its users.
    pub user_creates: Option<String>,
    /// Starts of commands.
    pub execs: Option<String>,
    /// Changes of sandboxes that there are.
    pub changes: Option<String>,
}

impl Rates {
    /// All rates with their names.
    fn named(&self) -> [(&'static str, &Option<String>); 4] {
        [
            ("creates", &self.creates),
            ("user_creates", &self.user_creates),
            ("execs", &self.execs),
            ("changes", &self.changes),
        ]
    }
}

/// Bounds of creations.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Create {
    /// Most creations under way at once. A team gets a share of them: half, if there is no other.
    pub creates_max: usize,
    /// Most of those that may wait for capacity, shared in the same way.
    pub queue_max: usize,
    /// Longest wait of a creation for capacity, seconds.
    pub queue_s: u64,
    /// Time for which a node that stops answering during a creation is retried before another node
    /// gets the next attempt, seconds.
    pub patience_s: u64,
    /// Time after which a creation that is not running yet is cancelled, seconds.
    pub deadline_s: u64,
    /// Number of the best nodes, 1 to 3, that are asked for a reservation before one is chosen.
    /// This costs a creation one round trip; 1 asks none. Versions before called it `bids`.
    #[serde(alias = "bids")]
    pub candidate_probes: usize,
}

impl Default for Create {
    fn default() -> Self {
        let defaults = sandbox::Options::default();
        Self {
            creates_max: defaults.creates_max,
            queue_max: defaults.queue_max,
            queue_s: defaults.queue.as_secs(),
            patience_s: defaults.patience.as_secs(),
            deadline_s: defaults.deadline.as_secs(),
            candidate_probes: defaults.candidate_probes,
        }
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7443))
}

/// Usual directory of the database, the CA and the certificates.
pub(crate) const DATA_DIR: &str = "/var/lib/pve-sandbox-controller";

fn default_data_dir() -> PathBuf {
    DATA_DIR.into()
}

const fn default_agent_port() -> u16 {
    7445
}

const fn default_events_keep_days() -> u32 {
    30
}

const fn default_events_max() -> u64 {
    1_000_000
}

/// Mistakes of a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not readable, or not TOML of the right form.
    #[error(transparent)]
    Load(#[from] daemon::config::Error),
    /// The file is readable, but some values are invalid.
    #[error("the configuration is wrong:\n  {}", .0.join("\n  "))]
    Wrong(Vec<String>),
}

/// Variable of older setups with the first numbers of the addresses that URLs may have.
const IP_PREFIX: &str = "PVE_CONTAINER_IP_PREFIX";

/// Reads a variable of this process's environment. Called when the configuration is read.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// With all mistakes in it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        Self::load_in(path, &environment)
    }

    /// Reads and checks a file. What it does not say comes from variables of older setups.
    pub(crate) fn load_in(
        path: &Path,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Error> {
        let mut config = daemon::config::load::<Self>(path)?;
        if config.container_ip_prefix.is_empty() {
            config.container_ip_prefix = env(IP_PREFIX).unwrap_or_default();
        }
        config.checked()
    }

    /// Parses and checks a file's content.
    ///
    /// # Errors
    /// With all mistakes in it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        daemon::config::parse::<Self>(path, text)?.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        let mistakes = self.mistakes();
        if mistakes.is_empty() { Ok(self) } else { Err(Error::Wrong(mistakes)) }
    }

    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut must = |holds: bool, what: String| {
            if !holds {
                mistakes.push(what);
            }
        };
        if let Err(why) = self.read_urls() {
            must(false, why);
        }
        must(self.data_dir.is_absolute(), "data_dir must be an absolute path".into());
        must(
            self.tls.cert.is_some() == self.tls.key.is_some(),
            "tls.cert and tls.key must be given together".into(),
        );
        must(
            self.tls.life_s.is_none_or(|life| LIVES_S.contains(&life)),
            "tls.life_s must be 10 to 31536000".into(),
        );
        let mut names = std::collections::BTreeSet::new();
        for node in &self.nodes {
            must(names.insert(&node.name), format!("node {} is given twice", node.name));
            let port = node.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            must(port.is_some(), format!("node {}: address must be host:port", node.name));
        }
        must(
            (1..=3650).contains(&self.events_keep_days),
            "events_keep_days must be 1 to 3650".into(),
        );
        must(
            (1000..=100_000_000).contains(&self.events_max),
            "events_max must be 1000 to 100000000".into(),
        );
        must(
            (1..=36_500).contains(&self.audit.retention_days),
            "audit.retention_days must be 1 to 36500".into(),
        );
        must(
            (64..=1024 * 1024).contains(&self.audit.max_mib),
            "audit.max_mib must be 64 to 1048576".into(),
        );
        must(self.audit.min_days <= 36_500, "audit.min_days must be 0 to 36500".into());
        let limits = &self.limits;
        for (name, team, all) in [
            ("calls_max", limits.team_calls_max, limits.calls_max),
            ("streams_max", limits.team_streams_max, limits.streams_max),
        ] {
            must(all > 0, format!("limits.{name} must be at least 1"));
            let share = team.is_none_or(|team| (1..all).contains(&team));
            must(share, format!("limits.team_{name} must be at least 1 and less than {name}"));
        }
        must(limits.connections_max >= 16, "limits.connections_max must be at least 16".into());
        must(
            self.limits.streams_per_connection != Some(0),
            "limits.streams_per_connection must be at least 1".into(),
        );
        if let Some(ssh) = &self.ssh {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
            must(
                ssh.host.len() <= 253 && ssh.host.chars().all(plain) && !ssh.host.starts_with('-'),
                "ssh.host must be a host name or an address".into(),
            );
            must(ssh.public_port != Some(0), "ssh.public_port must be 1 to 65535".into());
            must(
                (2..=100_000).contains(&ssh.connections_max),
                "ssh.connections_max must be 2 to 100000".into(),
            );
        }
        must(self.create.creates_max > 0, "create.creates_max must be at least 1".into());
        must(self.create.patience_s > 0, "create.patience_s must be at least 1".into());
        must(self.create.deadline_s >= 30, "create.deadline_s must be at least 30".into());
        must(
            (1..=BEST).contains(&self.create.candidate_probes),
            "create.candidate_probes must be 1 to 3".into(),
        );
        for (name, rate) in self.rates.named() {
            if let Some(Err(why)) = rate.as_ref().map(|rate| rate.parse::<Rate>()) {
                must(false, why.named(format!("rates.{name}")).to_string());
            }
        }
        for (name, size) in &self.sizes {
            let fits = (1..=limit::CORES_MAX).contains(&size.cpu_cores)
                && limit::MEMORY_MIB.contains(&size.memory_mib)
                && size.disk_gib <= limit::DISK_GIB_MAX;
            let bounds = "cpu_cores must be 1 to 64, memory_mib 64 to 524288, disk_gib 0 to 16384";
            must(fits, format!("sizes.{name}: {bounds}"));
        }
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let limits = &self.placement;
        must(
            limits.memory_overcommit >= 0.1,
            "placement.memory_overcommit must be 0.1 or more".into(),
        );
        must(limits.cpu_overcommit >= 0.0, "placement.cpu_overcommit must be 0 or more".into());
        must(
            share(limits.memory_used_max)
                && share(limits.storage_free_min)
                && share(limits.assumed_cpu_use)
                && share(limits.assumed_memory_use),
            "the other values of [placement] must be 0 to 1".into(),
        );
        mistakes
    }

    /// Returns the rules of URLs, which `load` has checked.
    pub fn urls(&self) -> Urls {
        self.read_urls().expect("checked when it was loaded")
    }

    fn read_urls(&self) -> Result<Urls, String> {
        fn given<T>(
            name: &str,
            text: &str,
            read: impl FnOnce(&str) -> Result<T, String>,
        ) -> Result<Option<T>, String> {
            let read = (!text.is_empty()).then(|| read(text)).transpose();
            read.map_err(|why| format!("{name} {why}"))
        }
        let template = given("url_template", &self.url_template, UrlTemplate::new)?;
        if template.as_ref().is_some_and(UrlTemplate::is_by_name) && !self.ingress.names {
            return Err("url_template holds {name}: also set `names = true` in [ingress]".into());
        }
        Ok(Urls {
            template,
            suffix: given("container_suffix", &self.container_suffix, str::parse::<Suffix>)?,
            prefix: given(
                "container_ip_prefix",
                &self.container_ip_prefix,
                str::parse::<AddressPrefix>,
            )?,
        })
    }

    /// Returns the options of the node registry.
    pub fn node_options(&self) -> node::Options {
        node::Options {
            seeds: self.nodes.iter().map(|n| (n.name.clone(), n.address.clone())).collect(),
            discover: self.discover,
            agent_port: self.agent_port,
            limits: self.placement,
        }
    }

    /// Returns the options of creations.
    pub fn sandbox_options(&self) -> sandbox::Options {
        sandbox::Options {
            creates_max: self.create.creates_max,
            queue_max: self.create.queue_max,
            queue: Duration::from_secs(self.create.queue_s),
            patience: Duration::from_secs(self.create.patience_s),
            deadline: Duration::from_secs(self.create.deadline_s),
            candidate_probes: self.create.candidate_probes,
            sizes: self.sizes.clone(),
            egress: self.egress.default.clone(),
            exposure: Exposure {
                default: self.ingress.default_visibility,
                denied: self.ingress.denied_ports.clone(),
            },
            limits: self.limits_of_teams(),
        }
    }

    /// Returns the limits of teams without their own; `load` has checked them.
    fn limits_of_teams(&self) -> TeamLimits {
        let quota = self.quota;
        let rate = |rate: &Option<String>| {
            let rate = rate.as_ref().map(|rate| rate.parse().expect("checked when it was loaded"));
            rate.map(Limit::Max)
        };
        TeamLimits {
            sandboxes: quota.sandboxes.map(Limit::Max),
            cpu_cores: quota.cpu_cores.map(Limit::Max),
            memory_mib: quota.memory_mib.map(Limit::Max),
            disk_gib: quota.disk_gib.map(Limit::Max),
            creates: rate(&self.rates.creates),
            user_creates: rate(&self.rates.user_creates),
            egress: (self.egress.max != Egress::Open).then(|| self.egress.max.clone()),
            execs: rate(&self.rates.execs),
            running_execs: quota.running_execs.map(Limit::Max),
            // `[limits]` has the default.
            streams: None,
            output_mib: quota.output_mib.map(Limit::Max),
            events: quota.events.map(Limit::Max),
            changes: rate(&self.rates.changes),
        }
    }

    /// Returns the retention of the event log.
    pub fn event_options(&self) -> events::Options {
        let keep = Duration::from_secs(u64::from(self.events_keep_days) * 24 * 3600);
        events::Options { keep, max: self.events_max }
    }

    /// Returns the retention of the audit log.
    pub fn audit_options(&self) -> audit::Options {
        audit::Options {
            keep: Duration::from_hours(u64::from(self.audit.retention_days) * 24),
            least: Duration::from_hours(u64::from(self.audit.min_days) * 24),
            bytes_max: self.audit.max_mib << 20,
            ..audit::Options::default()
        }
    }

    /// Returns the directory of the audit log.
    pub fn audit_dir(&self) -> PathBuf {
        audit::dir(&self.data_dir)
    }

    /// Returns the lives of certificates.
    pub fn lives(&self) -> Lives {
        let mut lives = Lives::default();
        if let Some(seconds) = self.tls.life_s {
            lives.agent = Duration::from_secs(seconds);
        }
        lives
    }

    /// Returns the path of the database.
    pub fn database(&self) -> PathBuf {
        self.data_dir.join("controller.db")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packaged_example_is_valid() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/controller.toml");
        let config = Config::load(&path).expect("the example");
        assert_eq!(config.listen, default_listen());
        assert_eq!(config.sandbox_options(), sandbox::Options::default());
        assert_eq!(config.event_options(), events::Options::default());
        assert_eq!(config.audit_options(), audit::Options::default());
        assert_eq!(config.placement, Limits::default());
    }

    #[test]
    fn limits_of_teams_are_those_of_the_file() {
        let text = "url_template = \"http://{port}-{id}.x\"\n[quota]\nrunning_execs = 3\n\
                    output_mib = 64\nevents = 5000\n[rates]\nexecs = \"600/1m\"\n\
                    changes = \"60/1m\"\n";
        let config = Config::parse(Path::new("c.toml"), text).expect("valid");
        let limits = config.sandbox_options().limits;
        let expected = "running_execs=3 output_mib=64 events=5000 execs=600/1m changes=60/1m";
        assert_eq!(limits, TeamLimits::stored(expected));
    }

    #[test]
    fn urls_by_name_need_names_to_be_switched_on() {
        let read = |more: &str| {
            let text = format!("url_template = \"https://{{name}}--{{team}}.x.test\"\n{more}");
            Config::parse(Path::new("c.toml"), &text)
        };
        for more in ["", "[ingress]\nnames = false\n"] {
            let error = read(more).expect_err("not switched on").to_string();
            assert!(error.contains("names = true"), "{error}");
        }
        let config = read("[ingress]\nnames = true\n").expect("valid");
        assert_eq!(config.urls().domain().as_deref(), Some("x.test"));
    }

    #[test]
    fn egress_is_a_word_or_a_list() {
        let read = |text: &str| serde_json::from_str::<EgressRules>(text);
        let rules = read(r#"{"default": "allow=GitHub.com", "max": "none"}"#).expect("rules");
        assert_eq!(
            (rules.default.to_string(), rules.max),
            ("allow=github.com".into(), Egress::None)
        );
        for wrong in ["allow", "allow=10.0.0.1", "some"] {
            read(&format!(r#"{{"max": "{wrong}"}}"#)).expect_err(wrong);
        }
    }

    #[test]
    fn reports_all_mistakes_at_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("c.toml");
        let text = "url_template = \"x\"\ndata_dir = \"x\"\nevents_keep_days = 0\n\
                    events_max = 5\n[tls]\ncert = \"a\"\n\
                    [[node]]\nname = \"a\"\naddress = \"b\"\n[create]\npatience_s = 0\n\
                    [limits]\ncalls_max = 10\nteam_calls_max = 10\nconnections_max = 1\n\
                    [rates]\ncreates = \"10/year\"\nexecs = \"x\"\n[audit]\nretention_days = 0\nmax_mib = 1\nmin_days = 99999\n";
        std::fs::write(&path, text).expect("write");
        let error = Config::load(&path).expect_err("wrong").to_string();
        let parts = ["url_template", "data_dir", "tls.cert", "node a", "patience_s"];
        let limits = ["limits.team_calls_max", "limits.connections_max"];
        let others = ["events_keep_days", "events_max", "rates.creates", "rates.execs"];
        let audit = ["audit.retention_days", "audit.max_mib", "audit.min_days"];
        for part in parts.into_iter().chain(others).chain(limits).chain(audit) {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}
