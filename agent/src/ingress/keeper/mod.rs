//! Keeps Caddy as it should be: renders its configuration, lets Caddy check it, writes it, and has Caddy
//! use it. Looks at the agent's start, after a renewal of the certificate of the ingress, and once a minute, so
//! that a change by hand is put back.
//!
//! A configuration that Caddy refuses is not written: the one before stays in use, and the reason is logged and
//! left in a file for `doctor`. So does a certificate of the operator's own that is not good; where there was none before,
//! Caddy runs without the listener that needs it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use daemon::{replace::Access, sync::Mutex};
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    caddy::{self, Proof},
    own_certificate,
    program::Caddy,
    settings::{AcmeDns, Certificate, Secure, Settings},
    switch::{self, Colour, Record, Service, Step, View},
    systemd::Services,
    version::{Generation, Version},
};
use crate::{
    clock::{Clock as _, SystemClock},
    sys::read,
};

/// Interval between two looks.
const INTERVAL: Duration = Duration::from_secs(60);
/// Pause before the next look while a switch is under way.
const AGAIN: Duration = Duration::from_secs(2);
/// Time after which a service that is busy counts as stuck. A start may take 30 s, a stop 20 s.
const BUSY_MAX: Duration = Duration::from_secs(60);
/// Problem of a service that is stuck.
const STUCK: &str = "Caddy does not come up: its service has been starting or stopping for more than a minute; \
                     see journalctl -u 'pve-sandbox-ingress*'";
/// Most steps in one look: finish an interrupted switch, switch, stop the old one.
const STEPS_MAX: usize = 4;

/// Files of the ingress.
#[derive(Debug, Clone)]
pub struct Files {
    /// Caddy's configuration.
    pub config: PathBuf,
    /// Group that may read it.
    pub group: Option<String>,
    /// Record of the Caddy that was started last.
    pub record: PathBuf,
    /// Reason why Caddy is not as it should be; absent when it is.
    pub problem: PathBuf,
}

/// State of a look at the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Looked {
    /// The configuration was as it should be.
    Current,
    /// There was none: it was written.
    Written,
    /// Another was there: it was replaced.
    Replaced,
}

/// Keeper of one node's Caddy.
#[derive(Debug)]
pub struct Keeper {
    settings: Settings,
    files: Files,
    proof: Proof,
    caddy: Caddy,
    clock: SystemClock,
    /// Services that run Caddy; `None` where somebody else starts it.
    services: Option<Arc<dyn Services>>,
    /// Last problem that was logged.
    told: Mutex<Option<String>>,
    /// Last version that was seen.
    version: Mutex<Option<Version>>,
    /// Time since which each look has found a service busy.
    busy: Mutex<Option<Instant>>,
}

impl Keeper {
    /// Makes a keeper of files alone.
    pub fn new(settings: Settings, files: Files, proof: Proof, caddy: Caddy) -> Self {
        let (told, version, busy) = (Mutex::default(), Mutex::default(), Mutex::default());
        let clock = SystemClock::default();
        Self { settings, files, proof, caddy, clock, services: None, told, version, busy }
    }

    /// Has these services run Caddy.
    #[must_use]
    pub fn served_by(mut self, services: Arc<dyn Services>) -> Self {
        self.services = Some(services);
        self
    }

    /// Returns true when a change makes Caddy use the new files.
    pub fn reaches_caddy(&self) -> bool {
        self.services.is_some()
    }

    /// Looks once a minute, and whenever `changed` is notified, until `stop`.
    pub async fn keep(self: Arc<Self>, changed: Arc<Notify>, stop: CancellationToken) {
        let mut pause = Duration::ZERO;
        loop {
            let wait = timeout(pause, changed.notified());
            if stop.run_until_cancelled(wait).await.is_none() {
                return;
            }
            // A switch that has begun ends: otherwise two Caddys would run until the next start.
            pause = if self.look().await { INTERVAL } else { AGAIN };
        }
    }

    /// Makes configuration and services as they should be. Returns false when a service is busy.
    pub async fn look(&self) -> bool {
        let version = self.see_version().await;
        let (settings, flaw) = self.usable(version).await;
        let unwritten = self.write_for(&settings, version).await.err();
        // Also with the configuration that is there: a renewed certificate is to be used.
        let (is_settled, unserved) = match self.run_it(&settings).await {
            Ok(settled) => (settled, None),
            Err(problem) => (true, Some(problem)),
        };
        self.tell(unwritten.or(flaw).or(unserved));
        is_settled
    }

    /// Ensures that the configuration is there and that of the settings.
    ///
    /// # Errors
    /// Says why it was not written. What was there stays.
    pub async fn write(&self) -> Result<Looked, String> {
        let version = self.see_version().await;
        let (settings, _) = self.usable(version).await;
        self.write_for(&settings, version).await
    }

    /// Returns the settings as far as Caddy can use them now: without the listener with a certificate of the
    /// operator's own, where there is no certificate; and what is wrong with it.
    async fn usable(&self, version: Option<Version>) -> (Settings, Option<String>) {
        let generation = version.map_or(Generation::Before, Version::generation);
        let mut settings = Settings { generation, ..self.settings.clone() };
        let Some(secure) = &settings.secure else { return (settings, None) };
        let copy = Path::new(secure.certificate.copy().as_str());
        let (is_usable, flaw) = match &secure.certificate {
            Certificate::Files(files) => {
                let (domain, now_ms) = (&settings.domain, self.clock.now_ms());
                let taken = own_certificate::refresh(files, domain, self.group(), now_ms);
                (copy.exists(), taken.err().map(|flaw| flaw.to_string()))
            }
            Certificate::Acme(acme) => match self.lack(acme, version).await {
                Ok(Some(why)) => (false, Some(why)),
                Ok(None) => {
                    let taken = own_certificate::refresh_token(&acme.token, copy, self.group());
                    (copy.exists(), taken.err().map(|flaw| flaw.to_string()))
                }
                Err(why) => (copy.exists(), Some(why)),
            },
        };
        if !is_usable {
            settings.secure = None;
        }
        let flaw = flaw.map(|why| match is_usable {
            true => format!("ingress.certificate: the one before stays in use: {why}"),
            false => format!("ingress.certificate: Caddy runs without it: {why}"),
        });
        (settings, flaw)
    }

    /// Returns why Caddy can get no certificate by itself; `None` when it can.
    ///
    /// # Errors
    /// When Caddy does not tell.
    async fn lack(
        &self,
        acme: &AcmeDns,
        version: Option<Version>,
    ) -> Result<Option<String>, String> {
        let (path, module) = (self.caddy.path.display().to_string(), acme.module());
        let version = version.ok_or_else(|| "Caddy does not tell its version".to_owned())?;
        match self.caddy.has_module(&module).await {
            Ok(false) => Ok(Some(without_module(&path, &module))),
            Ok(true) if version < Version::READS_FILES => {
                let needed = Version::READS_FILES;
                Ok(Some(format!("{path} is {version}: ACME by DNS needs {needed} or later")))
            }
            Ok(true) => Ok(None),
            Err(error) => Err(format!("Caddy does not list its modules: {error}")),
        }
    }

    fn group(&self) -> Option<&str> {
        self.files.group.as_deref()
    }

    /// Ensures that the configuration is there and that of these settings.
    async fn write_for(
        &self,
        settings: &Settings,
        version: Option<Version>,
    ) -> Result<Looked, String> {
        let path = &self.files.config;
        if version.is_none() && self.caddy.path.exists() {
            return Err("Caddy does not tell its version".to_owned());
        }
        if let Some(services) = &self.services {
            let is_low = settings.secure.as_ref().is_some_and(Secure::has_low_port);
            let permitted = services.permit_low_ports(is_low).await;
            permitted.map_err(|error| format!("ports below 1024 for Caddy: {error}"))?;
        }
        let text = caddy::text(settings, &self.proof);
        let there = match read::whole(path, read::LARGE) {
            Ok(there) if there == text.as_bytes() => return Ok(Looked::Current),
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        };
        self.make_log_dir().map_err(|error| format!("the directory of the access log: {error}"))?;
        let written = |error: io::Error| format!("{} was not written: {error}", path.display());
        let group = self.group();
        // Without a Caddy, nobody can check it.
        if version.is_some() {
            let candidate = path.with_extension("candidate.json");
            caddy::put(&candidate, &text, group).map_err(written)?;
            let checked = self.caddy.validate(&candidate).await;
            drop(fs::remove_file(&candidate));
            checked.map_err(|why| {
                format!("the configuration for Caddy was not used, and what runs goes on: {why}")
            })?;
        }
        caddy::put(path, &text, group).map_err(written)?;
        let path = path.display();
        if there {
            tracing::warn!(%path, "replaced Caddy's configuration, which was another");
            return Ok(Looked::Replaced);
        }
        tracing::info!(%path, "wrote Caddy's configuration");
        Ok(Looked::Written)
    }

    async fn see_version(&self) -> Option<Version> {
        let seen = self.caddy.version().await;
        let mut last = self.version.lock();
        match seen {
            Ok(version) => {
                if *last != Some(version) {
                    tracing::info!(%version, "Caddy is installed");
                }
                *last = Some(version);
                Some(version)
            }
            Err(error) => {
                tracing::debug!(%error, "Caddy did not tell its version");
                *last
            }
        }
    }

    /// Creates the directory of the access log for Caddy, as its unit does at each start: Caddy checks that
    /// it can write there.
    fn make_log_dir(&self) -> io::Result<()> {
        let log = self.settings.access_log.as_ref().map(|log| Path::new(log.as_str()));
        let Some(dir) = log.and_then(Path::parent).filter(|dir| !dir.exists()) else {
            return Ok(());
        };
        fs::DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
        match self.caddy.user {
            Some((user, group)) => chown(dir, Some(user), Some(group)),
            None => Ok(()),
        }
    }

    /// Has Caddy run with the present files. Returns false when a service is busy.
    async fn run_it(&self, settings: &Settings) -> Result<bool, String> {
        let Some(services) = &self.services else { return Ok(true) };
        let version = *self.version.lock();
        if version.is_none() && self.caddy.path.exists() {
            // The version is a part of the digest: what runs would look like another.
            return Ok(true);
        }
        for _ in 0..STEPS_MAX {
            let inputs = inputs(settings, &self.files.config, version);
            let Inputs { digest, changed_ms } = inputs.map_err(|error| error.to_string())?;
            let record = record(&self.files.record);
            let asked = async {
                let (blue, green) =
                    (services.state(Colour::Blue).await?, services.state(Colour::Green).await?);
                Ok::<_, io::Error>((blue, green, services.is_enabled().await?))
            };
            let (blue, green, enabled) = asked.await.map_err(|error| error.to_string())?;
            let is_busy = [&blue, &green].contains(&&Service::Busy);
            let stuck = self.is_stuck(is_busy);
            let record = record.as_ref();
            let view = View { blue, green, enabled, record, digest: &digest, changed_ms, stuck };
            match switch::decide(&view) {
                Step::Nothing if stuck => return Err(STUCK.to_owned()),
                Step::Nothing => return Ok(!is_busy),
                Step::Adopt(run) => self.note(Record { invocation: run.invocation, digest })?,
                Step::Start(colour) => self.start(&**services, colour, digest).await?,
                Step::Replace(old) => {
                    self.start(&**services, old.other(), digest).await?;
                    self.stop(&**services, old).await?;
                    tracing::info!(
                        "Caddy was replaced, to use its new configuration or certificate"
                    );
                }
                Step::Stop(colour) => {
                    if stuck {
                        tracing::warn!(
                            ?colour,
                            "a Caddy beside the one that runs does not come up"
                        );
                    }
                    self.stop(&**services, colour).await?;
                }
            }
        }
        Ok(false)
    }

    /// Notes whether a service is busy, and returns whether it has been for too long.
    fn is_stuck(&self, is_busy: bool) -> bool {
        let mut busy = self.busy.lock();
        if !is_busy {
            *busy = None;
            return false;
        }
        busy.get_or_insert_with(Instant::now).elapsed() >= BUSY_MAX
    }

    async fn start(
        &self,
        services: &dyn Services,
        colour: Colour,
        digest: String,
    ) -> Result<(), String> {
        if let Err(error) = services.start(colour).await {
            // It would be started again for ever beside the one that runs.
            drop(services.stop(colour).await);
            return Err(format!("Caddy did not start: {error}"));
        }
        match services.state(colour).await {
            Ok(Service::On(run)) => self.note(Record { invocation: run.invocation, digest }),
            Ok(Service::Off | Service::Busy) => Err("Caddy ended right after its start".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn stop(&self, services: &dyn Services, colour: Colour) -> Result<(), String> {
        let stopped = services.stop(colour).await;
        stopped.map_err(|error| format!("the previous Caddy was not stopped: {error}"))
    }

    fn note(&self, record: Record) -> Result<(), String> {
        let path = &self.files.record;
        let bytes = serde_json::to_vec(&record).map_err(|error| error.to_string())?;
        let noted = daemon::replace::replace(path, &bytes, Access::PRIVATE);
        noted.map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Logs a problem once, and leaves it for `doctor`.
    fn tell(&self, problem: Option<String>) {
        let mut told = self.told.lock();
        let path = &self.files.problem;
        match &problem {
            Some(problem) if told.as_ref() != Some(problem) => {
                tracing::error!(problem, "the ingress is not as it should be");
            }
            None if told.is_some() => tracing::info!("the ingress is as it should be again"),
            Some(_) | None => {}
        }
        let left = match &problem {
            Some(problem) => daemon::replace::replace(path, problem.as_bytes(), Access::PRIVATE),
            None => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                Ok(()) | Err(_) => Ok(()),
            },
        };
        if let Err(error) = left {
            tracing::warn!(path = %path.display(), %error, "a problem could not be left for doctor");
        }
        *told = problem;
    }
}

/// Says that Caddy has not the module for a provider, and what to do.
pub fn without_module(program: &str, module: &str) -> String {
    format!(
        "{program} was built without the module {module}, as Debian's Caddy is: install one with it \
         (https://caddyserver.com/download) there, or name a certificate that another program renews by cert and key"
    )
}

/// All that Caddy reads at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// Digest of it.
    pub digest: String,
    /// Time of its last change, milliseconds since 1970.
    pub changed_ms: u64,
}

/// Reads what Caddy reads at its start: its configuration and certificates. A new version of Caddy counts as
/// a change, too.
///
/// # Errors
/// When a file cannot be read.
pub fn inputs(settings: &Settings, config: &Path, version: Option<Version>) -> io::Result<Inputs> {
    let peers = settings.peers.iter();
    let certificates = peers.flat_map(|peers| [&peers.ca, &peers.cert, &peers.key]);
    let own = settings.secure.iter().map(|secure| secure.certificate.copy());
    let files = certificates.chain(own).map(|path| Path::new(path.as_str()));
    let (mut all, mut changed_ms) = (Sha256::new(), 0);
    for path in [config].into_iter().chain(files) {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        all.update(Sha256::digest(read::whole(path, read::LARGE).map_err(named)?));
        let modified = fs::metadata(path).and_then(|about| about.modified()).map_err(named)?;
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        changed_ms = changed_ms.max(daemon::clock::millis(since));
    }
    if let Some(version) = version {
        all.update(version.to_string());
    }
    let digest = all.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Inputs { digest, changed_ms })
}

/// Returns the record of the last start. One that cannot be read is none: the time of the start decides then.
pub fn record(path: &Path) -> Option<Record> {
    let bytes = read::whole(path, read::SMALL).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests;
