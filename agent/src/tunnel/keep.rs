//! Upkeep of the connector by the agent: what differs of cloudflared's configuration from the settings is put back, and
//! the connector is restarted where it runs with another configuration. It reads its file at its start only, and dies
//! of SIGHUP. A restart that does not help is repeated, at growing intervals. A connector that is stopped is started
//! again, unless its unit is disabled.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc, time::Duration};

use daemon::{chain::Chain, replace::Access, text};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{
    UNIT,
    credentials::is_open,
    node::{self, Error, Node, Problem},
    render::{Origin, render},
};
use crate::{
    clock::{Clock as _, SystemClock},
    hand_edits::HandEdits,
};

/// Interval between two looks.
const LOOK: Duration = Duration::from_secs(30);
/// Wait before a restart that did not help is repeated. Each further one waits twice as long.
const AGAIN: Duration = Duration::from_secs(120);
/// Longest wait before it is repeated: each restart cuts the connections through this connector.
const AGAIN_MAX: Duration = Duration::from_secs(3600);

/// Work that one look finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Whether the file is written anew.
    pub writes: bool,
    /// Whether the connector is restarted.
    pub restarts: bool,
    /// Whether the connector was stopped, and is started.
    pub starts: bool,
}

/// Restarts of the connector that were for one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// Configuration that it was to run with.
    pub wanted: String,
    /// Number of restarts.
    pub times: u32,
    /// Time of the last one.
    pub at: Instant,
}

impl Tried {
    /// Returns true when the next restart is due.
    fn is_over(&self, now: Instant) -> bool {
        let doubled = 2u32.saturating_pow(self.times.saturating_sub(1));
        now.saturating_duration_since(self.at) >= AGAIN.saturating_mul(doubled).min(AGAIN_MAX)
    }
}

/// Decides what becomes of the file, and whether the connector is restarted. Pure. `file` is the configuration on the
/// disk, `running` that of the connector that runs, where it is known. `tried` are the restarts until now.
pub fn plan(
    wanted: &str,
    file: Option<&str>,
    running: Option<&str>,
    tried: Option<&Tried>,
    now: Instant,
) -> Work {
    let is_due = tried.is_none_or(|tried| tried.wanted != wanted || tried.is_over(now));
    Work {
        writes: file != Some(wanted),
        restarts: runs_another(wanted, running) && is_due,
        starts: false,
    }
}

fn runs_another(wanted: &str, running: Option<&str>) -> bool {
    running.is_some_and(|running| running != wanted)
}

/// Keeper of this node's configuration.
#[derive(Debug)]
pub struct Keeper {
    node: Node,
    origin: Origin,
    /// Changes by hand of the configuration that were put back.
    edits: Arc<HandEdits>,
    /// Configuration that this keeper has left in the file: from then on, another one was made by hand.
    left: Option<String>,
    /// Restarts that were asked for, and that may not have helped yet.
    tried: Option<Tried>,
    /// Problem that was logged last.
    problem: Option<Problem>,
    /// Domain that was told to have no record.
    told: Option<String>,
}

impl Keeper {
    /// Makes a keeper.
    pub fn new(node: Node, origin: Origin) -> Self {
        let edits = Arc::default();
        Self { node, origin, edits, left: None, tried: None, problem: None, told: None }
    }

    /// Records changes by hand here.
    #[must_use]
    pub fn recording(mut self, edits: Arc<HandEdits>) -> Self {
        self.edits = edits;
        self
    }

    /// Looks, now and every 30 s, until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            // What is wrong is told by the look itself, and looked at again by the next one.
            drop(stop.run_until_cancelled(self.look()).await);
        }
    }

    /// Looks once, and does what is to be done; returns that. A failure is logged once, and left for `doctor`.
    ///
    /// # Errors
    /// When something cannot be read, written or run.
    pub async fn look(&mut self) -> Result<Work, Error> {
        let done = self.work().await;
        match &done {
            // The next look tells whether the restart has helped. Until then the earlier problem stays.
            Ok(_) if self.is_pending() => {}
            Ok(_) => self.tell(None),
            Err(error) => self.tell(Some(Problem::of(error))),
        }
        done
    }

    /// Returns true while the connector runs with another configuration than the file that was left for it.
    fn is_pending(&self) -> bool {
        let running = self.node.paths().running_config();
        self.left.as_deref().is_some_and(|left| runs_another(left, running.as_deref()))
    }

    async fn work(&mut self) -> Result<Work, Error> {
        let Some(settings) = node::settings(self.node.paths())? else {
            // What a later setup writes is no change by hand.
            self.left = None;
            return Ok(Work::default());
        };
        self.close_credentials()?;
        self.tell_domain(settings.domain.as_str());
        let wanted = render(&settings, &self.origin);
        let path = self.node.paths().config();
        let file = text::read_if_there(&path).map_err(|error| Error::File(path.clone(), error))?;
        let running = self.node.paths().running_config();
        if running.as_ref() == Some(&wanted) {
            self.tried = None;
        }
        let (running, tried) = (running.as_deref(), self.tried.as_ref());
        let mut work = plan(&wanted, file.as_deref(), running, tried, Instant::now());
        let written = if work.writes {
            self.write(&wanted, file, path.clone()).await
        } else {
            self.left = Some(wanted.clone());
            Ok(())
        };
        // Without the new file a restart would read the earlier one. A connector that is stopped starts with it.
        if written.is_ok() && runs_another(&wanted, running) {
            if !work.restarts {
                let times = self.tried.as_ref().map_or(0, |tried| tried.times);
                return Err(Error::RunsAnother(times));
            }
            work.restarts = self.restart(wanted).await?;
        }
        // A unit that runs has its files, so most looks ask systemd nothing. Without both it cannot start.
        let has_files = path.exists() && self.node.paths().credentials().exists();
        let can_start = running.is_none() && has_files;
        if can_start && self.node.is_stopped().await? {
            work.starts = true;
            tracing::warn!(unit = UNIT, "cloudflared is stopped, and enabled: it is started");
            self.node.systemctl(&["start", "--no-block", UNIT]).await?;
        }
        written.map(|()| work)
    }

    /// Restarts the connector, also one that has no connection to Cloudflare yet: such a unit is not started to systemd,
    /// whose `try-restart` leaves it alone. Returns false where the unit is being stopped.
    async fn restart(&mut self, wanted: String) -> Result<bool, Error> {
        // An operator's stop lasts some seconds, and would be undone.
        if !self.node.is_up().await? {
            return Ok(false);
        }
        self.node.systemctl(&["restart", "--no-block", UNIT]).await?;
        tracing::warn!(unit = UNIT, "cloudflared runs with another configuration: it is restarted");
        // Counted last: the next look repeats a call that failed.
        let before = self.tried.take().filter(|tried| tried.wanted == wanted);
        let times = before.map_or(0, |tried| tried.times).saturating_add(1);
        self.tried = Some(Tried { wanted, times, at: Instant::now() });
        Ok(true)
    }

    /// Takes the file of the secret from others than root, where they can read it.
    fn close_credentials(&self) -> Result<(), Error> {
        let path = self.node.paths().credentials();
        // One that is missing is for `setup`.
        if is_open(&path).unwrap_or(false) {
            let private = fs::Permissions::from_mode(Access::PRIVATE.mode);
            tracing::warn!(path = %path.display(), "others than root could read the tunnel's secret: set mode 0600");
            fs::set_permissions(&path, private).map_err(|error| Error::File(path, error))?;
        }
        Ok(())
    }

    async fn write(
        &mut self,
        wanted: &str,
        found: Option<String>,
        path: PathBuf,
    ) -> Result<(), Error> {
        match self.node.validate(wanted).await {
            // Without the program nothing runs with it either.
            Ok(()) | Err(Error::Missing(_)) => {}
            Err(error) => return Err(error),
        }
        self.node.write_config(wanted)?;
        let is_edit = self.left.is_some() && self.left != found;
        self.left = Some(wanted.to_owned());
        let shown = path.display();
        match found {
            _ if is_edit => self.edits.put_back(&path, SystemClock::default().now_ms()),
            Some(_) => {
                tracing::warn!(path = %shown, "cloudflared's configuration differed from the settings and was put back")
            }
            None => tracing::info!(path = %shown, "wrote cloudflared's configuration"),
        }
        Ok(())
    }

    /// Logs a problem once, and leaves it for `doctor`.
    fn tell(&mut self, problem: Option<Problem>) {
        match &problem {
            Some(problem) if self.problem.as_ref() != Some(problem) => {
                tracing::error!(problem = problem.text, "the tunnel is not as it should be");
            }
            None if self.problem.is_some() => tracing::info!("the tunnel is as it should be again"),
            Some(_) | None => {}
        }
        if let Err(error) = node::leave_problem(self.node.paths(), problem.as_ref()) {
            let error = Chain(&error);
            tracing::warn!(%error, "could not write the file in which doctor reads this");
        }
        self.problem = problem;
    }

    /// Says once that the record of DNS is still that of another domain.
    fn tell_domain(&mut self, recorded: &str) {
        let now = self.origin.domain.as_str();
        if recorded != now && self.told.as_deref() != Some(recorded) {
            tracing::warn!(
                domain = now,
                recorded,
                "ingress.domain has changed, and the agent has no token for Cloudflare: run `pve-sandbox-agent \
                 tunnel setup` for the record of the new domain"
            );
            self.told = Some(recorded.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(wanted: &str, times: u32, at: Instant) -> Tried {
        Tried { wanted: wanted.to_owned(), times, at }
    }

    #[test]
    fn only_what_differs_is_written_or_restarted() {
        let now = Instant::now();
        let work = |file, running, tried: Option<&str>| {
            let tried = tried.map(|wanted| self::tried(wanted, 1, now));
            let Work { writes, restarts, .. } = plan("new", file, running, tried.as_ref(), now);
            (writes, restarts)
        };
        assert_eq!(work(Some("new"), Some("new"), None), (false, false));
        assert_eq!(work(Some("new"), None, None), (false, false), "nothing runs");
        assert_eq!(
            work(Some("edited"), Some("new"), None),
            (true, false),
            "nobody has read the edit"
        );
        assert_eq!(work(None, None, None), (true, false));
        assert_eq!(work(Some("old"), Some("old"), None), (true, true), "the domain has changed");
        assert_eq!(work(Some("new"), Some("old"), None), (false, true));
        assert_eq!(work(Some("new"), Some("old"), Some("new")), (false, false), "it is too early");
        assert_eq!(work(Some("new"), Some("old"), Some("older")), (false, true));
    }

    #[test]
    fn restart_that_does_not_help_is_repeated_at_growing_intervals_up_to_an_hour() {
        let at = Instant::now();
        let is_repeated = |times, wait: Duration| {
            plan("new", Some("new"), Some("old"), Some(&tried("new", times, at)), at + wait)
        };
        let second = Duration::from_secs(1);
        for (times, wait) in
            [(1, AGAIN), (2, 2 * AGAIN), (3, 4 * AGAIN), (6, AGAIN_MAX), (u32::MAX, AGAIN_MAX)]
        {
            assert!(!is_repeated(times, wait - second).restarts, "{times}");
            assert!(is_repeated(times, wait).restarts, "{times}");
        }
    }
}
