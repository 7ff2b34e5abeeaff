//! This node's part of the tunnel: the files that cloudflared reads, its unit, and what it says of itself.

use std::{
    fs::{self, DirBuilder},
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use daemon::{
    chain::Chain,
    replace::{Access, replace},
    systemctl, text,
    web::Client,
};
use http::Request;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{UNIT, credentials::Credentials, settings::Settings};
use crate::{
    config::Config,
    run::{Exit, Finished, Program, Runner},
    tunnel::render::Origin,
};

/// Longest run of `cloudflared` or `systemctl`.
const RUN: Duration = Duration::from_secs(20);
/// Longest wait for an answer about readiness.
const ASK: Duration = Duration::from_secs(3);
/// Most bytes of that answer.
const ANSWER_MAX: usize = 4096;
/// Interval between two questions.
const POLL: Duration = Duration::from_millis(200);
/// Text of a refused configuration that is shown, characters.
const SHOWN_MAX: usize = 500;

/// Places on this host. Below another root in tests.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Directory of the files.
    pub dir: PathBuf,
    /// Program of the connector.
    pub cloudflared: PathBuf,
    /// Program that starts units.
    pub systemctl: PathBuf,
    /// Directory that is there when systemd runs this machine.
    pub systemd: PathBuf,
    /// Files that the running unit was given.
    pub given: PathBuf,
}

impl Paths {
    /// Returns the places on a node with this configuration.
    pub fn of_host(config: &Config) -> Self {
        Self::beside(&config.ingress.caddy_config)
    }

    /// Returns the places on a node: the files are beside Caddy's configuration.
    pub fn beside(caddy_config: &Path) -> Self {
        let etc = caddy_config.parent();
        Self {
            dir: etc.unwrap_or(Path::new("/etc/pve-sandbox")).join("tunnel"),
            cloudflared: "/usr/bin/cloudflared".into(),
            systemctl: "/usr/bin/systemctl".into(),
            systemd: "/run/systemd/system".into(),
            given: format!("/run/credentials/{UNIT}.service").into(),
        }
    }

    /// Returns the file of the settings.
    pub fn settings(&self) -> PathBuf {
        self.dir.join("settings.json")
    }

    /// Returns cloudflared's configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }

    /// Returns the file of the tunnel's secret.
    pub fn credentials(&self) -> PathBuf {
        self.dir.join(CREDENTIALS)
    }

    /// Returns the file where the agent says why the connector is not as it should be; absent when it is.
    pub fn problem(&self) -> PathBuf {
        self.dir.join("problem")
    }

    /// Returns true when a connector runs, and with another secret than this. Where that is not known, it does not.
    pub fn runs_other_secret(&self, credentials: &Credentials) -> bool {
        let running = Credentials::read(&self.given.join(CREDENTIALS));
        running.is_some_and(|running| running != *credentials)
    }

    /// Reads the configuration that the running connector was started with; `None` where that is not known.
    pub fn running_config(&self) -> Option<String> {
        text::read_if_there(&self.given.join(CONFIG)).ok().flatten()
    }
}

/// Name of cloudflared's configuration.
const CONFIG: &str = "config.yml";
/// Name of the file of the tunnel's secret.
const CREDENTIALS: &str = "credentials.json";

/// Reason why a step on this node failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no cloudflared.
    #[error("this node has no cloudflared ({0})\n{INSTALL}")]
    Missing(PathBuf),
    /// A file cannot be used.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// A program could not be run.
    #[error("{0} did not end as it must")]
    Run(&'static str, #[source] crate::run::Error),
    /// A program failed.
    #[error("{what} failed: {text}")]
    Failed {
        /// Command.
        what: String,
        /// Its own words.
        text: String,
    },
    /// The connector was restarted, and has not taken the configuration.
    #[error(
        "cloudflared still runs with another configuration than that of the settings, restarts so far: {0}; \
         journalctl -u {UNIT} -n 20 shows its log; the agent restarts it again, within an hour at most"
    )]
    RunsAnother(u32),
    /// cloudflared refuses the configuration.
    #[error("cloudflared does not accept the configuration: {0}")]
    Invalid(String),
}

/// Problem of the connector that the agent leaves for `doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Reason.
    pub text: String,
    /// Whether cloudflared refuses the configuration.
    pub is_refusal: bool,
}

impl Problem {
    /// Describes an error.
    pub fn of(error: &Error) -> Self {
        let is_refusal = matches!(error, Error::Invalid(_));
        Self { text: Chain(error).to_string(), is_refusal }
    }

    /// Reads the one that was left; `None` where all went well.
    pub fn read(paths: &Paths) -> Option<Self> {
        let text = text::read_if_there(&paths.problem()).ok().flatten()?;
        serde_json::from_str(&text).ok()
    }
}

/// Leaves a problem for `doctor`, or removes the one before.
///
/// # Errors
/// When its file cannot be written or removed.
pub fn leave_problem(paths: &Paths, problem: Option<&Problem>) -> Result<(), Error> {
    let path = paths.problem();
    let done = match problem.map(serde_json::to_vec) {
        Some(Ok(text)) => replace(&path, &text, Access::PRIVATE),
        Some(Err(error)) => Err(error.into()),
        None => match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        },
    };
    done.map_err(|error| Error::File(path, error))
}

/// Commands that install cloudflared.
pub const INSTALL: &str = "\
install it from Cloudflare's apt repository, then run this again:
  curl -fsSL https://pkg.cloudflare.com/cloudflare-main.gpg \\
    -o /usr/share/keyrings/cloudflare-main.gpg
  echo 'deb [signed-by=/usr/share/keyrings/cloudflare-main.gpg] \\
    https://pkg.cloudflare.com/cloudflared any main' \\
    > /etc/apt/sources.list.d/cloudflared.list
  apt-get update && apt-get install cloudflared";

/// Answer of cloudflared about its connections.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ready {
    /// Connections to Cloudflare.
    #[serde(default, rename = "readyConnections")]
    pub connections: u32,
    /// Name of this connector, which each start has anew.
    #[serde(default, rename = "connectorId")]
    pub connector: String,
}

/// This node; see the module.
#[derive(Debug, Clone)]
pub struct Node {
    paths: Paths,
    runner: Runner,
}

impl Node {
    /// Makes one whose programs are run by `runner`.
    pub fn new(paths: Paths, runner: Runner) -> Self {
        Self { paths, runner }
    }

    /// Returns the places.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Makes the directory of the files.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_dir(&self) -> Result<(), Error> {
        let dir = &self.paths.dir;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| Error::File(dir.clone(), error))
    }

    /// Lets cloudflared check a configuration, which is written beside the one in use.
    ///
    /// # Errors
    /// When it does not accept it, or cannot be run.
    pub async fn validate(&self, config: &str) -> Result<(), Error> {
        let draft = self.paths.dir.join("draft.yml");
        let file = |error| Error::File(draft.clone(), error);
        replace(&draft, config.as_bytes(), Access::PRIVATE).map_err(file)?;
        let text = draft.display().to_string();
        let done = self.cloudflared(&["--config", &text, "tunnel", "ingress", "validate"]).await;
        fs::remove_file(&draft).map_err(file)?;
        let done = done?;
        if done.exit == Exit::Code(0) { Ok(()) } else { Err(Error::Invalid(said(&done))) }
    }

    /// Writes cloudflared's configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_config(&self, config: &str) -> Result<(), Error> {
        let path = self.paths.config();
        let written = replace(&path, config.as_bytes(), Access::PRIVATE);
        written.map_err(|error| Error::File(path, error))
    }

    /// Runs `systemctl` with these words.
    ///
    /// # Errors
    /// When it fails.
    pub async fn systemctl(&self, words: &[&str]) -> Result<(), Error> {
        let done = self.run(&self.paths.systemctl, words).await?;
        match done.exit {
            Exit::Code(0) => Ok(()),
            Exit::Code(_) | Exit::Signal(_) => {
                Err(failed(&format!("systemctl {}", words.join(" ")), &done))
            }
        }
    }

    /// Returns true when the unit starts with the machine, and neither runs nor is about to: somebody has stopped it.
    ///
    /// # Errors
    /// When systemd cannot be asked.
    pub async fn is_stopped(&self) -> Result<bool, Error> {
        if !["inactive", "failed"].contains(&self.active_state().await?.as_str()) {
            return Ok(false);
        }
        let enabled = self.run(&self.paths.systemctl, &["is-enabled", "--quiet", UNIT]).await?;
        Ok(enabled.exit == Exit::Code(0))
    }

    /// Returns true when the unit runs or is being started, and not when it is being stopped.
    ///
    /// # Errors
    /// When systemd cannot be asked.
    pub async fn is_up(&self) -> Result<bool, Error> {
        let state = self.active_state().await?;
        Ok(RUNS.contains(&state.as_str()) || STARTS.contains(&state.as_str()))
    }

    /// Returns the state of the unit by systemd's word for it; none without systemd.
    async fn active_state(&self) -> Result<String, Error> {
        if !has_systemd(&self.paths) {
            return Ok(String::new());
        }
        let asked = self.run(&self.paths.systemctl, &["is-active", UNIT]).await?;
        Ok(asked.stdout.trim().to_owned())
    }

    async fn cloudflared(&self, words: &[&str]) -> Result<Finished, Error> {
        if !self.paths.cloudflared.exists() {
            return Err(Error::Missing(self.paths.cloudflared.clone()));
        }
        self.run(&self.paths.cloudflared, words).await
    }

    async fn run(&self, program: &Path, words: &[&str]) -> Result<Finished, Error> {
        let arguments = words.iter().map(Into::into).collect();
        let program = Program { path: program.to_owned(), arguments };
        let ran = self.runner.run(program, Instant::now() + RUN).await;
        ran.map_err(|error| Error::Run("a program", error))
    }
}

/// Returns true when systemd runs this machine.
pub fn has_systemd(paths: &Paths) -> bool {
    paths.systemd.is_dir() && paths.systemctl.exists()
}

/// Systemd's words for a unit that runs.
const RUNS: &[&str] = &["active", "reloading", "refreshing"];
/// Systemd's words for a unit that is being started. That is a connector without a connection to Cloudflare since its
/// start, or one that has ended and is started again by itself.
const STARTS: &[&str] = &["activating"];

/// State of the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UnitState {
    /// Whether it runs, and was connected to Cloudflare since its start.
    pub is_active: bool,
    /// Whether it is being started.
    pub is_starting: bool,
    /// Whether it starts with the machine.
    pub is_enabled: bool,
}

impl UnitState {
    /// Returns true when it runs or is being started.
    pub fn is_up(self) -> bool {
        self.is_active || self.is_starting
    }
}

/// Asks for the state of the unit; `None` without systemd.
pub async fn unit_state(paths: &Paths) -> Option<UnitState> {
    if !has_systemd(paths) {
        return None;
    }
    let ask = async |word: &str| systemctl::ask(&paths.systemctl, &[word, UNIT], ASK).await.ok();
    let (active, enabled) = (ask("is-active").await?, ask("is-enabled").await?);
    let state = active.stdout.trim();
    Some(UnitState {
        is_active: RUNS.contains(&state),
        is_starting: STARTS.contains(&state),
        is_enabled: enabled.success,
    })
}

/// Reads the version of cloudflared.
///
/// # Errors
/// When there is none, or it does not run.
pub async fn version(paths: &Paths) -> Result<Version, Error> {
    let program = &paths.cloudflared;
    if !program.exists() {
        return Err(Error::Missing(program.clone()));
    }
    let file = |error| Error::File(program.clone(), error);
    let answer = systemctl::ask(program, &["--version"], RUN).await.map_err(file)?;
    Version::parse(&answer.stdout)
        .ok_or_else(|| file(io::Error::other("it does not tell its version")))
}

/// Removes the files of the tunnel, the settings last: until then a repeated call finds what is left. Returns
/// what was there.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_files(paths: &Paths) -> Result<Vec<PathBuf>, Error> {
    let draft = paths.dir.join("draft.yml");
    let mut gone = Vec::new();
    for path in [draft, paths.problem(), paths.config(), paths.credentials(), paths.settings()] {
        match fs::remove_file(&path) {
            Ok(()) => gone.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::File(path, error)),
        }
    }
    match fs::remove_dir(&paths.dir) {
        Ok(()) => gone.push(paths.dir.clone()),
        // Another file in it is not ours.
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty]
                .contains(&error.kind()) => {}
        Err(error) => return Err(Error::File(paths.dir.clone(), error)),
    }
    Ok(gone)
}

/// Asks the connector at an address whether it is connected; `None` when nothing answers.
pub async fn ready(at: SocketAddr) -> Option<Ready> {
    let web = Client::without_tls(ASK, ANSWER_MAX);
    let request = Request::get(format!("http://{at}/ready")).body(Bytes::new()).ok()?;
    let answer = web.send(request, None).await.ok()?;
    serde_json::from_slice(&answer.body).ok()
}

/// Waits until the connector is connected; `None` when the time is over.
pub async fn until_ready(at: SocketAddr, limit: Duration) -> Option<Ready> {
    let until = Instant::now() + limit;
    loop {
        if let Some(ready) = ready(at).await.filter(|ready| ready.connections > 0) {
            return Some(ready);
        }
        if Instant::now() + POLL > until {
            return None;
        }
        sleep(POLL).await;
    }
}

/// Returns what cloudflared's configuration follows; `None` without a domain.
pub fn origin(config: &Config) -> Option<Origin> {
    let domain = config.ingress.domain.as_deref()?.parse().ok()?;
    let public = &config.ingress.public;
    let own = public.iter().find(|address| address.ip().is_loopback()).or(public.first())?;
    Some(Origin { domain, caddy: daemon::doctor::reach::local(*own), ca: config.tls.ca.clone() })
}

/// Reads the settings of this node's connector.
///
/// # Errors
/// When they cannot be read.
pub fn settings(paths: &Paths) -> Result<Option<Settings>, Error> {
    let path = paths.settings();
    Settings::read(&path).map_err(|error| Error::File(path, error))
}

fn failed(what: &str, done: &Finished) -> Error {
    Error::Failed { what: what.to_owned(), text: said(done) }
}

/// Returns the words of a program, on one line.
fn said(done: &Finished) -> String {
    let text = format!("{} {}", done.stderr.trim(), done.stdout.trim());
    let words: Vec<_> = text.split_whitespace().collect();
    let text: String =
        words.join(" ").chars().filter(|c| !c.is_control()).take(SHOWN_MAX).collect();
    if text.is_empty() { format!("it said nothing ({})", done.exit) } else { text }
}

/// Version of cloudflared: the year and the month of its release, and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Year.
    pub year: u32,
    /// Month, from 1.
    pub month: u32,
    /// Number of the release in the month.
    pub patch: u32,
}

impl Version {
    /// Reads what `cloudflared --version` prints.
    pub fn parse(text: &str) -> Option<Self> {
        let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
        let mut parts = version.split(['.', '-']).map(str::parse);
        let mut next = || parts.next().and_then(Result::ok);
        let (year, month, patch) = (next()?, next()?, next()?);
        let is_date = (2018..3000).contains(&year) && (1..=12).contains(&month);
        is_date.then_some(Self { year, month, patch })
    }

    /// Returns the whole months between its release and a time, milliseconds since 1970.
    pub fn months_before(self, now_ms: u64) -> u32 {
        // Mean length of a month; the verdict is about a year.
        const MONTH_MS: u64 = 2_629_746_000;
        let now = u32::try_from(now_ms / MONTH_MS).unwrap_or(u32::MAX);
        now.saturating_sub((self.year - 1970) * 12 + self.month - 1)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.year, self.month, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_from_what_cloudflared_prints() {
        let version = Version::parse("cloudflared version 2026.8.2 (built 2026-08-27-1200 UTC)\n");
        assert_eq!(version, Some(Version { year: 2026, month: 8, patch: 2 }));
        for bad in ["", "cloudflared version DEV", "cloudflared version 3.4.5", "2026.8.2"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
        let version = version.expect("read");
        assert_eq!(version.to_string(), "2026.8.2");
        // 2026-11-30.
        assert_eq!(version.months_before(1_796_000_000_000), 3);
        assert_eq!(version.months_before(0), 0);
    }

    #[test]
    fn program_that_said_nothing_is_told_by_how_it_ended() {
        let silent = |exit| {
            let done = Finished { exit, stdout: String::new(), stderr: "\n".to_owned() };
            said(&done)
        };
        assert_eq!(silent(Exit::Code(1)), "it said nothing (exit code 1)");
        assert_eq!(silent(Exit::Signal(9)), "it said nothing (signal 9)");
    }
}
