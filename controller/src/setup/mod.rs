//! `setup`: from an installed package to a controller that serves, in one command. Every step looks
//! first and does only what is missing, so the command can be repeated; a dry run only looks.

mod context;
mod join_loop;
mod machine;
mod node;
mod ownership;
mod rotate;

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use daemon::{
    doctor::reach,
    replace::{Access, replace},
    systemctl, text,
};
use proto::{name::Team, scope::Scopes, token::Format};
use toml_edit::{DocumentMut, value};

use crate::{
    access::ssh_keys,
    audit::{self, LocalCommand},
    ca,
    clock::{Clock, SystemClock},
    config::Config,
    ssh::host_key,
    store::{
        AccessStore as _, Added, TokenFilter,
        enrolments::{Enrolment, Enrolments as _},
        sqlite::Sqlite,
    },
    token,
};

use ownership::{foreign_files, give};

pub use join_loop::{Host, join_loop};
pub use rotate::Rotate;

/// Configuration that the package installs.
const PACKAGED: &str = include_str!("../../../packaging/controller.toml");
/// Unit of the controller, and the user that it runs as.
const UNIT: &str = "pve-sandbox-controller";
/// `init`, as the audit log names it; also as a step of `setup`.
pub(crate) const INIT: LocalCommand<'static> =
    LocalCommand { method: "LocalInit", object: "certificate:controller", owner: "" };
/// Name of the context that is saved.
const CONTEXT: &str = "local";

/// Arguments of `setup`.
#[derive(Debug, Args)]
pub struct Setup {
    /// Show what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Configuration file; written if it is missing.
    #[arg(long, default_value = "/etc/pve-sandbox/controller.toml")]
    config: PathBuf,
    /// Domain of the sandboxes' host names, such as sandbox.example.com.
    #[arg(long)]
    domain: Option<String>,
    /// Further names and addresses that callers use, beside those of this machine.
    #[arg(long = "name")]
    names: Vec<String>,
    /// First team, whose token is saved for `sandboxctl`.
    #[arg(long, default_value = "main")]
    team: Team,
    /// Also join the agent of this machine, if it is a PVE node; again: make what that node lacks.
    #[arg(long)]
    join: bool,
    /// Let people reach their sandboxes by SSH: listen on this address, unless the configuration says
    /// where [0.0.0.0:2222 if none is given]
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "0.0.0.0:2222")]
    ssh: Option<SocketAddr>,
    /// Start nothing.
    #[arg(long)]
    no_start: bool,
    /// Configuration of `sandboxctl` that the token is saved in [default: the one in your home].
    #[arg(long, hide = true)]
    sandboxctl_config: Option<PathBuf>,
    /// Directory of the database and the CA, for a configuration that is written now.
    #[arg(long, hide = true)]
    data_dir: Option<PathBuf>,
    /// Root below which the node of PVE is looked for.
    #[arg(long, hide = true, default_value = "/")]
    node_root: PathBuf,
}

/// Configuration as it is to be, and what is new in it.
#[derive(Debug)]
struct Planned {
    config: Config,
    text: String,
    /// Whether the file is missing or has another text.
    changes: bool,
    new_domain: Option<String>,
}

/// Tells each step as soon as it is done: a later one may take minutes, or fail.
struct Report<'a> {
    dry_run: bool,
    say: &'a mut (dyn FnMut(&str) -> Result<()> + Send),
    changed: bool,
}

impl Report<'_> {
    /// Does a step that is missing, unless this is a dry run. `what` begins with a verb.
    fn step(&mut self, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.changed = true;
        if self.dry_run {
            return self.note(&format!("would {what}"));
        }
        work().with_context(|| format!("could not {what}"))?;
        self.note(&format!("done: {what}"))
    }

    /// Does a step that the audit log of a directory of state is told of.
    async fn recorded_step(
        &mut self,
        what: &str,
        (data_dir, command): (&Path, LocalCommand<'_>),
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if self.dry_run {
            return self.step(what, || Ok(()));
        }
        let done = audit::recorded(data_dir, command, async { work() }).await;
        self.step(what, || done)
    }

    fn note(&mut self, text: &str) -> Result<()> {
        (self.say)(text)
    }
}

impl Setup {
    /// Carries out what is missing, and passes a line for people to `say` after each step. Returns
    /// whether anything was missing.
    ///
    /// # Errors
    /// When a step fails, or `say`. The command can be run again.
    pub async fn run(&self, say: &mut (dyn FnMut(&str) -> Result<()> + Send)) -> Result<bool> {
        let mut report = Report { dry_run: self.dry_run, say, changed: false };
        let planned = self.planned()?;
        let config = &planned.config;
        self.check(config)?;
        let new_certificate = self.certificates(config, &mut report).await?;
        ssh_host_key(config, &mut report)?;
        self.first_token(config, &mut report).await?;
        self.owner(config, &mut report)?;
        // Just before the restart, and what is to be said of it just after: of a run that fails before, the next one
        // still sees the change, and of one that fails later nothing is lost.
        self.configuration(&planned, &mut report).await?;
        self.unit(new_certificate || planned.changes, &mut report)?;
        self.tell_domain(&planned, &mut report).await?;
        self.node(config, &mut report).await?;
        self.other_nodes(config, &mut report).await?;
        if !report.changed {
            report.note("nothing to do: all of it is there")?;
        } else if self.dry_run {
            report.note("nothing was done: this was a dry run")?;
        }
        Ok(report.changed)
    }

    /// Reads the configuration, or takes the one of the package, and sets the domain and the SSH server in it if they
    /// are given. Writes nothing.
    fn planned(&self) -> Result<Planned> {
        let path = self.config.display();
        let there = self.config.exists();
        let before = if there { text::read(&self.config)? } else { PACKAGED.to_owned() };
        let mut document: DocumentMut = before.parse().with_context(|| format!("{path}"))?;
        // By the id: a vmid is used again, and what a browser keeps for the host is then the next sandbox's.
        let url =
            self.domain.as_ref().map(|domain| format!("https://port-{{port}}-{{id}}.{domain}"));
        let old = document.get("url_template").and_then(|old| old.as_str());
        // One with this domain stays, whatever its form.
        let new_url = url.filter(|url| old.and_then(scheme_and_domain) != scheme_and_domain(url));
        let new_domain = self.domain.clone().filter(|_| new_url.is_some());
        if let Some(url) = new_url {
            document["url_template"] = value(url);
        }
        if let (false, Some(data_dir)) = (there, &self.data_dir) {
            document["data_dir"] = value(data_dir.to_string_lossy().as_ref());
        }
        if let (Some(listen), None) = (self.ssh, document.get("ssh")) {
            document["ssh"]["listen"] = value(listen.to_string());
        }
        if document.get("listen").is_none() && machine::is_best_reached_by_ipv6() {
            // The default takes no connection of IPv6; this takes both kinds.
            document["listen"] = value("[::]:7443");
        }
        let text = document.to_string();
        let config = Config::parse(&self.config, &text)?;
        Ok(Planned { config, changes: !there || text != before, text, new_domain })
    }

    /// Checks what was asked for and what is there, before the first step: a run that cannot end changes nothing.
    fn check(&self, config: &Config) -> Result<()> {
        self.names.iter().try_for_each(|name| ca::check_name(name)).context("--name")?;
        ca::lacks(&config.data_dir)?;
        if self.join && machine::pve_node(&self.of_node(machine::MEMBERS)).is_some() {
            self.agent()?;
        }
        Ok(())
    }

    /// Writes the configuration if it is missing or changes.
    async fn configuration(&self, planned: &Planned, report: &mut Report<'_>) -> Result<()> {
        let Planned { config, text, changes, .. } = planned;
        if *changes {
            let what = format!("write {}", self.config.display());
            let method = "LocalSetupConfiguration";
            let command = LocalCommand { method, object: "configuration", owner: "" };
            let write = || {
                if let Some(dir) = self.config.parent() {
                    fs::create_dir_all(dir)?;
                }
                Ok(replace(&self.config, text.as_bytes(), Access { mode: 0o644, group: None })?)
            };
            report.recorded_step(&what, (&config.data_dir, command), write).await?;
        }
        if config.urls().without_ingress() {
            let hint = "sandboxes have no domain yet, so URLs lead to their nodes alone \
                        (docs/local.md); --domain sets url_template";
            report.note(hint)?;
        }
        Ok(())
    }

    /// Makes the CAs, and a certificate with the names of this machine. Returns true when a running controller must be
    /// restarted to use what is new.
    async fn certificates(&self, config: &Config, report: &mut Report<'_>) -> Result<bool> {
        let dir = &config.data_dir;
        // All of them: an interrupted run may have made some.
        let lacks = ca::lacks(dir)?;
        let known = ca::names(dir)?;
        let is_new = |name: &String| !known.iter().any(|old| old.eq_ignore_ascii_case(name));
        // Addresses come and go; only a name that was asked for is worth a new certificate.
        let own = if known.is_empty() { machine::names() } else { Vec::new() };
        let ip = config.listen.ip();
        let listen = (!ip.is_unspecified()).then(|| ip.to_string());
        let asked = listen.filter(|ip| !own.contains(ip)).into_iter();
        let names = own.iter().cloned().chain(asked).chain(self.names.iter().cloned());
        let names: Vec<String> = names.filter(is_new).collect();
        let (place, list) = (dir.join("ca"), names.join(", "));
        let what = match (lacks.is_empty(), list.is_empty()) {
            (true, true) => return Ok(false),
            (true, false) => format!("add {list} to the controller's certificate"),
            (false, _) if lacks.iter().any(|file| file == "ca.crt") => {
                format!("make a CA in {}, and a certificate for {list}", dir.display())
            }
            (false, true) => format!("make {} in {}", lacks.join(", "), place.display()),
            (false, false) => {
                let lacks = lacks.join(", ");
                format!("make {lacks} in {}, and a certificate for {list}", place.display())
            }
        };
        let make = || Ok(ca::init(dir, &names).map(drop)?);
        report.recorded_step(&what, (dir, INIT), make).await?;
        Ok(true)
    }

    /// Says which nodes do not know a new domain.
    async fn tell_domain(&self, planned: &Planned, report: &mut Report<'_>) -> Result<()> {
        let Some(domain) = &planned.new_domain else { return Ok(()) };
        let nodes = joined(&planned.config).await?;
        if nodes.is_empty() {
            return Ok(());
        }
        let nodes: Vec<_> = nodes.iter().map(|known| known.node.as_str()).collect();
        report.note(&format!(
            "nodes that have joined do not know the domain {domain} yet ({}): join each again by the line of \
             `sandboxctl node token NODE`; where its agent.toml has another domain, set `domain = \"{domain}\"` in \
             `[ingress]` instead, then `systemctl restart pve-sandbox-agent`",
            nodes.join(", ")
        ))
    }

    /// Makes the first token, and saves it for `sandboxctl`.
    async fn first_token(&self, config: &Config, report: &mut Report<'_>) -> Result<()> {
        let path = config.database();
        let store = match report.dry_run && !path.exists() {
            true => None,
            false => Some(
                Sqlite::open(&path).with_context(|| format!("cannot open {}", path.display()))?,
            ),
        };
        if let Some(store) = &store
            && !store.tokens(TokenFilter::default(), None, 1).await?.is_empty()
        {
            return Ok(());
        }
        let sandboxctl = self.sandboxctl_config.clone().or_else(context::usual);
        let sandboxctl = sandboxctl.context("there is no home directory to save a token in")?;
        let order = token::Order::new(self.team.clone(), Scopes::ALL);
        let issued = token::issue(order, SystemClock.now_ms());
        let text = issued.text(Format::default());
        let endpoint = format!("https://{}", reach::local(config.listen));
        let ca = ca::Files::new(&config.data_dir).ca();
        let (team, file) = (&self.team, sandboxctl.display());
        let what = format!(
            "make a token of team {team} with all scopes, and save it as the context {CONTEXT} in {file}"
        );
        report.step(&what, || {
            let saved = context::Saved { endpoint: &endpoint, ca: &ca, team, token: &text };
            Ok(context::save(&sandboxctl, CONTEXT, &saved)?)
        })?;
        if let (Some(store), false) = (&store, report.dry_run) {
            // After it is saved: a crash in between only leaves a context without a valid token.
            let (object, owner) = (format!("token:{}", issued.token.name), team.as_str());
            let command = LocalCommand { method: "LocalSetupToken", object: &object, owner };
            audit::recorded(&config.data_dir, command, async {
                let added = store.add_token(issued.token).await?;
                anyhow::ensure!(added == Added::New, "the token was not stored: {added:?}");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Gives the state to the user that the unit runs as.
    fn owner(&self, config: &Config, report: &mut Report<'_>) -> Result<()> {
        let Some(user) = machine::user(UNIT)? else { return Ok(()) };
        if foreign_files(&config.data_dir, user)?.is_empty() {
            return Ok(());
        }
        let what = format!("give {} to the user {UNIT}", config.data_dir.display());
        report.step(&what, || Ok(give(&config.data_dir, user)?))
    }

    fn unit(&self, is_changed: bool, report: &mut Report<'_>) -> Result<()> {
        if self.no_start || !systemctl::is_there() {
            return Ok(());
        }
        let asks = |verb| systemctl::run(&[verb, "--quiet", UNIT]).is_ok();
        let steps = unit_steps(asks("is-active"), asks("is-enabled"), is_changed);
        steps.into_iter().try_for_each(|(what, words)| report.step(&what, || start(words)))
    }
}

/// Returns the parts of a template beside the form of its first label.
fn scheme_and_domain(template: &str) -> Option<(&str, &str)> {
    let (scheme, host) = template.split_once("://")?;
    let (_, domain) = host.split_once('.')?;
    Some((scheme, domain))
}

/// Step of the unit, in words, and as arguments of systemctl.
type UnitStep = (String, &'static [&'static str]);

/// Returns what the unit needs. A controller reads its files at its start.
fn unit_steps(is_up: bool, is_enabled: bool, is_changed: bool) -> Vec<UnitStep> {
    let mut steps: Vec<UnitStep> = Vec::new();
    if !is_up {
        let what = format!("enable and start {UNIT}.service");
        steps.push((what, &["enable", "--now", "--quiet", UNIT]));
        return steps;
    }
    if !is_enabled {
        let what = format!("enable {UNIT}.service, so that a boot starts it");
        steps.push((what, &["enable", "--quiet", UNIT]));
    }
    if is_changed {
        let what = format!("restart {UNIT}.service, which has a new configuration or certificate");
        steps.push((what, &["restart", UNIT]));
    }
    steps
}

/// Makes the host key of the SSH server, where there is one, and tells its fingerprint.
fn ssh_host_key(config: &Config, report: &mut Report<'_>) -> Result<()> {
    if config.ssh.is_none() {
        return Ok(());
    }
    let path = host_key::path(&config.data_dir);
    if !path.exists() {
        let what = format!("make the SSH host key {}", path.display());
        report.step(&what, || Ok(host_key::load_or_make(&config.data_dir).map(drop)?))?;
    }
    if report.dry_run && !path.exists() {
        return Ok(());
    }
    let key = host_key::load_or_make(&config.data_dir)?;
    let fingerprint = ssh_keys::fingerprint_of(key.public_key());
    report.note(&format!("the SSH host key is {fingerprint} (ED25519)"))
}

/// Returns the nodes that have joined, and were neither revoked nor forgotten.
async fn joined(config: &Config) -> Result<Vec<Enrolment>> {
    let path = config.database();
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut enrolled = Sqlite::open(&path)?.enrolments().await?;
    enrolled.retain(|known| known.revoked_ms == 0 && !known.address.is_empty());
    Ok(enrolled)
}

/// Starts the unit; systemd keeps to itself why one does not start.
fn start(words: &[&str]) -> Result<()> {
    systemctl::run(words).with_context(|| format!("`journalctl -u {UNIT} -n 20` shows why"))
}

/// Gives what is below a directory to the directory's owner: what root has made there, a service that is
/// no root must be able to read.
///
/// # Errors
/// When a file cannot be looked at or given away.
pub fn give_to_owner(dir: &Path) -> io::Result<()> {
    let about = fs::metadata(dir)?;
    give(dir, (about.uid(), about.gid()))
}

/// Returns the host names of this machine, without its addresses.
pub(crate) fn host_names() -> Vec<String> {
    machine::host_names()
}

/// Puts the names of the controller's certificate in the order in which nodes use them.
pub(crate) fn best_first(names: Vec<String>, listen: IpAddr) -> Vec<String> {
    machine::best_first(names, listen)
}

/// Returns the user that the service runs as, if there is one on this machine.
pub(crate) fn service_user() -> Option<nix::unistd::Uid> {
    nix::unistd::User::from_name(UNIT).ok().flatten().map(|user| user.uid)
}

/// Lists what is below a directory and not the service's; with the numbers of the service's user, or of the
/// directory's owner where there is no such user.
///
/// # Errors
/// When the directory cannot be looked at.
pub(crate) fn foreign(dir: &Path) -> io::Result<(Vec<PathBuf>, (u32, u32))> {
    let about = fs::metadata(dir)?;
    let owner = machine::user(UNIT)?.unwrap_or((about.uid(), about.gid()));
    Ok((foreign_files(dir, owner)?, owner))
}

#[cfg(test)]
mod tests;
