//! Keeps Caddy as it should be: renders its configuration, lets Caddy check it, writes it, and has Caddy
//! use it. Looks at the agent's start, after a renewal of the certificate of the ingress, and once a minute, so
//! that a change by hand is put back.
//!
//! A configuration that Caddy refuses is not written: the one before stays in use, and the reason is logged and
//! left in a file for `doctor`. So does a certificate of the operator's own that is not good; where there was none before,
//! Caddy runs without the listener that needs it.
//!
//! Caddy checks no address before it starts. So where none comes up with that listener (another program has its port, or
//! the address is not on this host), a configuration without it is written at once: a boot, or a start after a crash,
//! must not fail with it. The listener is tried again later.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use daemon::{replace::Access, sync::Mutex};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    caddy::{self, Proof},
    own_certificate,
    program::Caddy,
    settings::{Secure, Settings},
    switch::{self, Colour, Record, Service, Step, View},
    systemd::Services,
    version::Version,
};
use crate::{
    clock::{Clock as _, SystemClock},
    hand_edits::HandEdits,
    sys::read,
};

mod certificate;
mod inputs;

pub use certificate::without_module;
pub use inputs::{Inputs, inputs, record};

/// Interval between two looks.
const INTERVAL: Duration = Duration::from_secs(60);
/// Pause before the next look while a switch is under way.
const AGAIN: Duration = Duration::from_secs(2);
/// Time after which a service that is busy counts as stuck. A start may take 30 s, a stop 20 s.
const BUSY_MAX: Duration = Duration::from_secs(60);
/// Problem of a service that is stuck.
const STUCK: &str = "Caddy does not come up: its service has been starting or stopping for more than a minute; \
                     see journalctl -u 'pve-sandbox-ingress*'";
/// Pause before the listener with a certificate of the operator's own is tried again.
const RETRY: Duration = Duration::from_secs(600);
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
    /// Changes by hand of the configuration that were put back.
    edits: Arc<HandEdits>,
    /// Configuration that this keeper has left in the file: from then on, another one was made by hand. What an
    /// earlier agent has left may differ because of the settings.
    left: Mutex<Option<String>>,
    /// Last problem that was logged.
    told: Mutex<Option<String>>,
    /// Last version that was seen.
    version: Mutex<Option<Version>>,
    /// Time since which each look has found a service busy.
    busy: Mutex<Option<Instant>>,
    /// Failure of the listener with a certificate of the operator's own, while it is not tried.
    rest: Mutex<Option<Rest>>,
    /// Cancelled when the agent stops.
    stop: CancellationToken,
}

/// Pause in which Caddy gets no listener with a certificate of the operator's own.
#[derive(Debug)]
struct Rest {
    since: Instant,
    /// Reason, for the operator.
    why: String,
}

/// Reason why Caddy does not run with the present files.
#[derive(Debug)]
enum Unserved {
    /// A Caddy did not come up with them.
    Down(String),
    /// Something else failed.
    Other(String),
}

impl From<String> for Unserved {
    fn from(why: String) -> Self {
        Self::Other(why)
    }
}

/// Result of writing a configuration and having it used.
#[derive(Debug)]
struct Applied {
    /// Reason why it was not written.
    unwritten: Option<String>,
    /// False when a service is busy.
    ran: Result<bool, Unserved>,
}

impl Keeper {
    /// Makes a keeper of files alone.
    pub fn new(settings: Settings, files: Files, proof: Proof, caddy: Caddy) -> Self {
        let (told, version, left) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (busy, rest) = (Mutex::default(), Mutex::default());
        let (clock, stop) = (SystemClock::default(), CancellationToken::new());
        Self {
            settings,
            files,
            proof,
            caddy,
            clock,
            services: None,
            edits: Arc::default(),
            left,
            told,
            version,
            busy,
            rest,
            stop,
        }
    }

    /// Has these services run Caddy.
    #[must_use]
    pub fn served_by(mut self, services: Arc<dyn Services>) -> Self {
        self.services = Some(services);
        self
    }

    /// Records changes by hand here.
    #[must_use]
    pub fn recording(mut self, edits: Arc<HandEdits>) -> Self {
        self.edits = edits;
        self
    }

    /// Has it begin nothing more once the agent stops.
    #[must_use]
    pub fn until(mut self, stop: CancellationToken) -> Self {
        self.stop = stop;
        self
    }

    /// Returns true when a change makes Caddy use the new files.
    pub fn reaches_caddy(&self) -> bool {
        self.services.is_some()
    }

    /// Looks once a minute, and whenever `changed` is notified, until the agent stops.
    pub async fn keep(self: Arc<Self>, changed: Arc<Notify>) {
        let mut pause = Duration::ZERO;
        loop {
            let wait = timeout(pause, changed.notified());
            if self.stop.run_until_cancelled(wait).await.is_none() {
                return;
            }
            // A switch that has begun ends: otherwise two Caddys would run until the next start.
            pause = if self.look().await { INTERVAL } else { AGAIN };
        }
    }

    /// Makes configuration and services as they should be. Returns false when a service is busy.
    pub async fn look(&self) -> bool {
        let version = self.see_version().await;
        let (wanted, flaw) = self.usable(version).await;
        let mut resting = if wanted.secure.is_some() { self.resting() } else { None };
        let mut applied = match resting {
            Some(_) => self.apply(&wanted.without_secure(), version, true).await,
            None => self.apply(&wanted, version, false).await,
        };
        if let Err(Unserved::Down(why)) = &applied.ran
            && resting.is_none()
            && wanted.secure.is_some()
        {
            resting = Some(self.begin_rest(why));
            applied = self.apply(&wanted.without_secure(), version, true).await;
        }
        if matches!(applied.ran, Err(Unserved::Down(_))) {
            // The listener is not to blame.
            *self.rest.lock() = None;
        }
        let Applied { unwritten, ran } = applied;
        let (is_settled, unserved) = match ran {
            Ok(settled) => (settled, None),
            Err(Unserved::Down(problem) | Unserved::Other(problem)) => (true, Some(problem)),
        };
        let mut problem = unwritten.or(resting).or(flaw).or(unserved);
        if is_settled && problem.is_none() {
            problem = self.remove_unused_copies().err().map(|error| error.to_string());
        }
        self.tell(problem);
        is_settled
    }

    /// Writes the configuration of these settings, and has Caddy run with it.
    async fn apply(
        &self,
        settings: &Settings,
        version: Option<Version>,
        is_fallback: bool,
    ) -> Applied {
        let mut unwritten = self.write_for(settings, version).await.err();
        // Only when the file that needs them is gone. A Caddy that runs keeps what it has until its end.
        if unwritten.is_none() && !is_fallback && !has_low_port(settings) {
            unwritten = self.permit_low_ports(false).await.err();
        }
        // Also with the configuration that is there: a renewed certificate is to be used.
        Applied { unwritten, ran: self.run_it(settings, is_fallback).await }
    }

    /// Returns why the listener with a certificate of the operator's own is not tried now.
    fn resting(&self) -> Option<String> {
        let mut rest = self.rest.lock();
        rest.take_if(|rest| rest.since.elapsed() >= RETRY);
        rest.as_ref().map(|rest| rest.why.clone())
    }

    /// Begins a pause in which that listener is not tried, and returns the reason for the operator.
    fn begin_rest(&self, why: &str) -> String {
        // A service that was stuck is started with another configuration now.
        *self.busy.lock() = None;
        let why = format!(
            "ingress.certificate: no Caddy comes up with its listeners, so the configuration is one without them, \
             and they are tried again in ten minutes: {why}"
        );
        *self.rest.lock() = Some(Rest { since: Instant::now(), why: why.clone() });
        why
    }

    /// Removes copies of a key or a token that no setting uses any more. Caddy reads them only when it starts.
    fn remove_unused_copies(&self) -> io::Result<()> {
        let own = self.settings.secure.as_ref().map(|secure| secure.certificate.copy());
        let used = own.map(|copy| Path::new(copy.as_str()));
        own_certificate::remove_unused(&self.files.config, used)
    }

    async fn permit_low_ports(&self, allow: bool) -> Result<(), String> {
        let Some(services) = &self.services else { return Ok(()) };
        let permitted = services.permit_low_ports(allow).await;
        permitted.map_err(|error| format!("ports below 1024 for Caddy: {error}"))
    }

    /// Ensures that the configuration is there and that of the settings. Where services run Caddy, it has the listener
    /// with a certificate of the operator's own only if the last Caddy came up with it: a boot may start a service
    /// before the first look, which tries it.
    ///
    /// # Errors
    /// Says why it was not written. What was there stays.
    pub async fn write(&self) -> Result<Looked, String> {
        let version = self.see_version().await;
        let (mut settings, _) = self.usable(version).await;
        if self.services.is_some() && !self.has_come_up(&settings) {
            settings.secure = None;
        }
        self.write_for(&settings, version).await
    }

    /// Returns whether the configuration of these settings is there, and the last Caddy that came up had the listener
    /// with a certificate of the operator's own.
    fn has_come_up(&self, settings: &Settings) -> bool {
        let there = read::whole(&self.files.config, read::LARGE);
        there.is_ok_and(|there| there == caddy::text(settings, &self.proof).as_bytes())
            && record(&self.files.record).is_some_and(|record| record.secure)
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
        if has_low_port(settings) {
            // Before the write: whoever starts Caddy with the new file needs them.
            self.permit_low_ports(true).await?;
        }
        let text = caddy::text(settings, &self.proof);
        let found = match read::whole(path, read::LARGE) {
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Whatever it is, it is not ours.
            Err(_) => Some(Vec::new()),
        };
        if found.as_deref() == Some(text.as_bytes()) {
            *self.left.lock() = Some(text);
            return Ok(Looked::Current);
        }
        let is_edit = {
            let left = self.left.lock();
            left.as_ref().is_some_and(|left| found.as_deref() != Some(left.as_bytes()))
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
        *self.left.lock() = Some(text);
        let shown = path.display();
        match &found {
            _ if is_edit => self.edits.put_back(path, self.clock.now_ms()),
            Some(_) => {
                tracing::warn!(path = %shown, "Caddy's configuration file differed and was replaced")
            }
            None => tracing::info!(path = %shown, "wrote Caddy's configuration"),
        }
        Ok(if found.is_some() { Looked::Replaced } else { Looked::Written })
    }

    async fn see_version(&self) -> Option<Version> {
        let seen = self.caddy.version().await;
        let mut last = self.version.lock();
        match seen {
            Ok(version) => {
                if *last != Some(version) {
                    tracing::info!(%version, "Caddy's version was read");
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

    /// Has Caddy run with the present files. Returns false when a service is busy. With a configuration that is a
    /// fallback, a Caddy that runs with the listener which the fallback has not stays: only the next start is without it.
    async fn run_it(&self, settings: &Settings, is_fallback: bool) -> Result<bool, Unserved> {
        let Some(services) = &self.services else { return Ok(true) };
        let version = *self.version.lock();
        if version.is_none() && self.caddy.path.exists() {
            // The version is a part of the digest: what runs would look like another.
            return Ok(true);
        }
        let secure = settings.secure.is_some();
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
            let step = switch::decide(&view);
            // systemd starts no Caddy before the agent has stopped, and the agent would wait for that.
            if self.stop.is_cancelled() && matches!(step, Step::Start(_) | Step::Replace(_)) {
                return Ok(true);
            }
            match step {
                Step::Nothing if stuck => return Err(Unserved::Down(STUCK.to_owned())),
                Step::Nothing => return Ok(!is_busy),
                Step::Adopt(run) => {
                    self.note(Record { invocation: run.invocation, digest, secure })?;
                }
                Step::Start(colour) => self.start(&**services, colour, digest, secure).await?,
                Step::Replace(old) if is_fallback && runs_secure(&view, old) => return Ok(true),
                Step::Replace(old) => {
                    self.start(&**services, old.other(), digest, secure).await?;
                    self.stop(&**services, old).await?;
                    tracing::info!(
                        "Caddy was replaced, to use its new configuration or certificate"
                    );
                }
                Step::Stop(colour) => {
                    if stuck {
                        tracing::warn!(
                            ?colour,
                            "the replacement Caddy did not start; the running one stays"
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
        secure: bool,
    ) -> Result<(), Unserved> {
        if let Err(error) = services.start(colour).await {
            // It would be started again for ever beside the one that runs.
            drop(services.stop(colour).await);
            return Err(Unserved::Down(format!("Caddy did not start: {error}")));
        }
        match services.state(colour).await {
            Ok(Service::On(run)) => {
                let noted = self.note(Record { invocation: run.invocation, digest, secure });
                noted.map_err(Unserved::Other)
            }
            Ok(Service::Off | Service::Busy) => {
                Err(Unserved::Down("Caddy ended right after its start".to_owned()))
            }
            Err(error) => Err(Unserved::Other(error.to_string())),
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
            tracing::warn!(path = %path.display(), %error, "could not write the file in which doctor reads this");
        }
        *told = problem;
    }
}

/// Returns whether a port of these settings is one of those that need a capability.
fn has_low_port(settings: &Settings) -> bool {
    settings.secure.as_ref().is_some_and(Secure::has_low_port)
}

/// Returns whether this service runs a Caddy that was started with the listener with a certificate of the operator's own.
fn runs_secure(view: &View<'_>, colour: Colour) -> bool {
    let service = match colour {
        Colour::Blue => &view.blue,
        Colour::Green => &view.green,
    };
    let Service::On(run) = service else { return false };
    view.record.is_some_and(|record| record.secure && record.invocation == run.invocation)
}

#[cfg(test)]
mod tests;
