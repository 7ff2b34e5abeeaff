//! `setup`: from an installed package to a controller that serves, in one command. Every step looks
//! first and does only what is missing, so the command can be repeated; a dry run only looks.

mod context;
mod join_loop;
mod machine;
mod node;
mod rotate;

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use daemon::{
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

pub use join_loop::{Host, join_loop};
pub use rotate::Rotate;

/// Configuration that the package installs.
const PACKAGED: &str = include_str!("../../../packaging/controller.toml");
/// Unit of the controller, and the user that it runs as.
const UNIT: &str = "pve-sandbox-controller";
/// Name of the context that is saved.
const CONTEXT: &str = "local";

/// Arguments of `setup`.
#[derive(Debug, Args)]
pub struct Setup {
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// The configuration; written if it is missing.
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
        let (config, new_ssh) = self.configuration(&mut report)?;
        let new_names = self.certificates(&config, &mut report)?;
        ssh_host_key(&config, &mut report)?;
        self.first_token(&config, &mut report).await?;
        self.owner(&config, &mut report)?;
        self.unit(new_names || new_ssh, &mut report)?;
        self.node(&config, &mut report).await?;
        self.other_nodes(&config, &mut report).await?;
        if !report.changed {
            report.note("nothing to do: all of it is there")?;
        } else if self.dry_run {
            report.note("nothing was done: this was a dry run")?;
        }
        Ok(report.changed)
    }

    /// Writes the configuration if it is missing, and the domain and the SSH server if they are given.
    /// Returns true with it when the SSH server is new.
    fn configuration(&self, report: &mut Report<'_>) -> Result<(Config, bool)> {
        let path = self.config.display();
        let there = self.config.exists();
        let before = if there { text::read(&self.config)? } else { PACKAGED.to_owned() };
        let mut document: DocumentMut = before.parse().with_context(|| format!("{path}"))?;
        if let Some(domain) = &self.domain {
            let url = format!("https://port-{{port}}-vm-{{vmid}}.{domain}");
            if document.get("url_template").is_none_or(|old| old.as_str() != Some(&url)) {
                document["url_template"] = value(url);
            }
        }
        if let (false, Some(data_dir)) = (there, &self.data_dir) {
            document["data_dir"] = value(data_dir.to_string_lossy().as_ref());
        }
        let new_ssh = self.ssh.filter(|_| document.get("ssh").is_none());
        if let Some(listen) = new_ssh {
            document["ssh"]["listen"] = value(listen.to_string());
        }
        let text = document.to_string();
        // Checked before it is written.
        let config = Config::parse(&self.config, &text)?;
        if !there || text != before {
            report.step(&format!("write {path}"), || {
                if let Some(dir) = self.config.parent() {
                    fs::create_dir_all(dir)?;
                }
                Ok(replace(&self.config, text.as_bytes(), Access { mode: 0o644, group: None })?)
            })?;
        }
        if config.urls().without_ingress() {
            let hint = "sandboxes have no domain yet, so URLs lead to their nodes alone \
                        (docs/local.md); --domain sets url_template";
            report.note(hint)?;
        }
        Ok((config, new_ssh.is_some()))
    }

    /// Makes the CA, and a certificate with the names of this machine. Returns true when a running
    /// controller must be restarted to show new names.
    fn certificates(&self, config: &Config, report: &mut Report<'_>) -> Result<bool> {
        let files = ca::Files::new(&config.data_dir);
        let known = ca::names(&config.data_dir)?;
        let wanted = machine::names().into_iter().chain(self.names.iter().cloned());
        let is_new = |name: &String| !known.iter().any(|old| old.eq_ignore_ascii_case(name));
        let missing: Vec<String> = wanted.filter(is_new).collect();
        let dir = &config.data_dir;
        // All of them: an interrupted run may have made some, and `init` makes what is missing.
        let all = [files.ca(), files.certificate(), files.key()];
        let cas = ["ca.key", "ingress-ca.crt", "ingress-ca.key", "client-ca.crt", "client-ca.key"]
            .map(|name| dir.join("ca").join(name));
        if !all.iter().chain(&cas).all(|file| file.exists()) {
            let what = format!(
                "make a CA in {}, and a certificate for {}",
                dir.display(),
                missing.join(", ")
            );
            report.step(&what, || Ok(ca::init(dir, &missing).map(drop)?))?;
            return Ok(false);
        }
        // Addresses come and go; only a name that was asked for is worth a new certificate.
        let asked: Vec<String> = self.names.iter().filter(|name| is_new(name)).cloned().collect();
        if asked.is_empty() {
            return Ok(false);
        }
        let what = format!("add {} to the controller's certificate", asked.join(", "));
        report.step(&what, || Ok(ca::init(dir, &asked).map(drop)?))?;
        Ok(true)
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
        let endpoint = format!("https://127.0.0.1:{}", config.listen.port());
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
        let foreign = machine::foreign_files(&config.data_dir, user)?;
        if foreign.is_empty() {
            return Ok(());
        }
        let what = format!("give {} to the user {UNIT}", config.data_dir.display());
        report.step(&what, || Ok(machine::give(&foreign, user)?))
    }

    fn unit(&self, is_changed: bool, report: &mut Report<'_>) -> Result<()> {
        if self.no_start || !systemctl::is_there() {
            return Ok(());
        }
        let is_up = systemctl::run(&["is-active", "--quiet", UNIT]).is_ok();
        if is_up && is_changed {
            let what = format!("restart {UNIT}.service, which has new names or an SSH server");
            return report.step(&what, || start(&["restart", UNIT]));
        }
        if is_up {
            return Ok(());
        }
        let what = format!("enable and start {UNIT}.service");
        report.step(&what, || start(&["enable", "--now", "--quiet", UNIT]))
    }
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
    let owner = (about.uid(), about.gid());
    machine::give(&machine::foreign_files(dir, owner)?, owner)
}

/// Returns the host names of this machine, without its addresses.
pub(crate) fn host_names() -> Vec<String> {
    let names = machine::names().into_iter();
    names.filter(|name| name.parse::<std::net::IpAddr>().is_err()).collect()
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
    Ok((machine::foreign_files(dir, owner)?, owner))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(dir: &Path, dry_run: bool) -> Setup {
        Setup {
            dry_run,
            config: dir.join("etc/controller.toml"),
            domain: Some("sandbox.test".into()),
            names: vec!["api.test".into()],
            team: "main".parse().expect("team"),
            join: false,
            no_start: true,
            ssh: None,
            sandboxctl_config: Some(dir.join("home/config.toml")),
            data_dir: Some(dir.join("data")),
            node_root: dir.join("node"),
        }
    }

    /// Runs the setup; returns whether anything was missing, and what it said.
    async fn run(setup: &Setup) -> (bool, String) {
        let mut said = String::new();
        let mut say = |line: &str| {
            said.push_str(line);
            said.push('\n');
            Ok(())
        };
        let changed = setup.run(&mut say).await.expect("set up");
        (changed, said)
    }

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).map_or(0, Iterator::count)
    }

    #[tokio::test]
    async fn second_run_changes_nothing_and_a_dry_run_never_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let (missing, said) = run(&setup(dir.path(), true)).await;
        assert!(missing && said.contains("would make a CA"), "{said}");
        assert_eq!(entries(dir.path()), 0, "a dry run writes nothing");

        let (missing, said) = run(&setup(dir.path(), false)).await;
        assert!(missing && said.contains("done: make a CA"), "{said}");
        let config =
            Config::load(&dir.path().join("etc/controller.toml")).expect("a configuration");
        assert_eq!(config.urls().domain().as_deref(), Some("sandbox.test"));
        let names = ca::names(&config.data_dir).expect("names");
        assert!(names.contains(&"api.test".to_owned()) && names.len() > 5, "{names:?}");

        // The token that is saved is good.
        let saved = fs::read_to_string(dir.path().join("home/tokens/local")).expect("a token");
        let (id, secret) = proto::token::split(saved.trim()).expect("a token");
        let store = Sqlite::open(&config.database()).expect("opened");
        let known = store.token(id).await.expect("read").expect("it is there");
        let secret = token::Proof::Text(secret);
        assert_eq!(token::verify(&known, secret, SystemClock.now_ms()), token::Verdict::Valid);
        assert_eq!(known.scopes, Scopes::ALL);
        let context = fs::read_to_string(dir.path().join("home/config.toml")).expect("a context");
        assert!(
            context.contains("context = \"local\"") && context.contains("127.0.0.1:7443"),
            "{context}"
        );
        drop(store);

        let certificate = fs::read(dir.path().join("data/ca/controller.crt")).expect("there");
        let (missing, said) = run(&setup(dir.path(), false)).await;
        assert!(!missing && said.contains("nothing to do"), "{said}");
        assert_eq!(
            fs::read(dir.path().join("data/ca/controller.crt")).expect("there"),
            certificate
        );

        // A new name is added; the others stay.
        let more = Setup { names: vec!["new.test".into()], ..setup(dir.path(), false) };
        assert!(run(&more).await.0);
        let all = ca::names(&config.data_dir).expect("names");
        assert_eq!(all.len(), names.len() + 1, "{all:?}");
    }

    #[tokio::test]
    async fn ssh_server_is_switched_on_once_and_its_host_key_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        run(&setup(dir.path(), false)).await;
        let path = dir.path().join("etc/controller.toml");
        assert!(Config::load(&path).expect("a configuration").ssh.is_none(), "off by default");
        let with = Setup { ssh: "0.0.0.0:2200".parse().ok(), ..setup(dir.path(), false) };
        let (missing, said) = run(&with).await;
        assert!(missing && said.contains("make the SSH host key"), "{said}");
        let fingerprint = said.split("SHA256:").nth(1).expect("a fingerprint").to_owned();
        let (missing, said) = run(&with).await;
        assert!(!missing && said.contains(fingerprint.trim()), "{said}");
        let ssh = Config::load(&path).expect("a configuration").ssh.expect("on");
        assert_eq!((ssh.listen.port(), ssh.connections_max), (2200, 1024));
    }

    #[tokio::test]
    async fn configuration_of_the_operator_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("etc/controller.toml");
        fs::create_dir_all(dir.path().join("etc")).expect("made");
        let data = dir.path().join("elsewhere");
        let mine = format!(
            "# mine\nurl_template = \"https://port-{{port}}-vm-{{vmid}}.mine.test\"\ndata_dir = {data:?}\n"
        );
        fs::write(&path, &mine).expect("written");
        let setup = Setup { domain: None, ..setup(dir.path(), false) };
        run(&setup).await;
        assert_eq!(fs::read_to_string(&path).expect("read"), mine);
        assert!(data.join("ca/ca.crt").exists());
    }
}
