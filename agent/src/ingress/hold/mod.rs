//! Holds requests while their sandbox wakes or boots, within bounds.
//!
//! A sandbox has one startup at a time: a task that wakes it and watches it until it runs. All requests
//! for it wait for that startup, and one that goes away ends nothing. What a team may hold, and how
//! often it may wake, is bounded, so that its visitors take nothing from others. A wake that failed is
//! remembered for a moment, so that retries cost nothing.
//!
//! When the agent stops, Caddy asks the next one about a request whose question breaks off, unless it has waited for too
//! long by then. Such a request is answered instead.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use daemon::{keyed_count::KeyedCount, sync::Mutex};
use proto::{
    id::{SandboxId, SandboxRef},
    name::Team,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Routes, State, Target,
    intent::Intent,
    interstitial::{Refusal, Stage},
    render::ASKS_AGAIN,
};

/// Longest time that any request may be held: proxies in front give up after 100 s.
pub const HOLD_MAX: Duration = Duration::from_secs(90);
/// Longest time from the stop of an agent until the next one listens.
const RESTART: Duration = Duration::from_secs(8);
/// Interval between looks at a sandbox that boots. They cost a look into memory.
const LOOK: Duration = Duration::from_millis(50);
/// Most teams whose wakes are counted; beyond that those that have all of theirs are forgotten.
const TEAMS_MAX: usize = 10_000;
/// Most sandboxes whose failed wakes are remembered.
const FAILED_MAX: usize = 10_000;

/// Bounds of held requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest time that a request is held; at most [`HOLD_MAX`].
    pub hold: Duration,
    /// Time after which a person gets a page instead.
    pub page_after: Duration,
    /// Most wakes of a team's sandboxes a minute.
    pub team_wakes: u32,
    /// Most held requests of a team.
    pub team_held: usize,
    /// Most held requests of the node.
    pub node_held: usize,
    /// Time for which a failed wake is not tried again.
    pub rest: Duration,
    /// True when WebSockets, and other requests of pages that are open, wake a sandbox too.
    pub followers_wake: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(20),
            page_after: Duration::from_millis(1500),
            team_wakes: 60,
            team_held: 500,
            node_held: 2000,
            rest: Duration::from_secs(10),
            followers_wake: false,
        }
    }
}

/// Held requests of this node. Clones share them.
#[derive(Debug, Clone)]
pub struct Holds(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    room: Semaphore,
    of_teams: KeyedCount<Team>,
    state: Mutex<Tables>,
    /// Cancelled when the agent stops.
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Tables {
    startups: HashMap<SandboxId, Startup>,
    /// Sandboxes that failed to wake or boot, and when that was.
    failed: HashMap<SandboxId, (Stage, Instant)>,
    budgets: HashMap<Team, Budget>,
}

/// Way of a sandbox from paused, or booting, to running.
#[derive(Debug, Clone)]
struct Startup {
    begun: Instant,
    stage: Stage,
    /// Result: whether it runs, or became something else.
    end: watch::Receiver<Option<bool>>,
}

/// Wakes that a team has left, and when that was counted.
#[derive(Debug, Clone, Copy)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    /// Counts one wake; else returns the time until the next one.
    fn take(&mut self, a_minute: u32, now: Instant) -> Result<(), Duration> {
        let (most, a_second) = (f64::from(a_minute), f64::from(a_minute) / 60.0);
        let gained = now.duration_since(self.at).as_secs_f64() * a_second;
        (self.left, self.at) = ((self.left + gained).min(most), now);
        if self.left >= 1.0 {
            self.left -= 1.0;
            return Ok(());
        }
        // A rate is 1 or more: a minute is the longest.
        Err(Duration::try_from_secs_f64((1.0 - self.left) / a_second).unwrap_or_default())
    }
}

impl Holds {
    /// Makes one that holds no request yet.
    pub fn new(limits: Limits) -> Self {
        let room = Semaphore::new(limits.node_held);
        let (of_teams, state) = (KeyedCount::default(), Mutex::default());
        Self(Arc::new(Shared { limits, room, of_teams, state, stop: CancellationToken::new() }))
    }

    /// Says that the agent stops: requests about which Caddy would not ask the next agent are answered at once.
    pub fn stop(&self) {
        self.0.stop.cancel();
    }

    /// Returns the longest time that `wait` takes.
    pub fn longest(&self) -> Duration {
        self.0.limits.hold
    }

    /// Holds a request for a sandbox that is paused or boots, and wakes it if it may. `Ok` when the
    /// sandbox should be looked at again. The caller has found that the request may reach it.
    ///
    /// # Errors
    /// With the reason to give to the client.
    pub async fn wait(
        &self,
        routes: &Arc<dyn Routes>,
        target: &Target,
        intent: Intent,
    ) -> Result<(), Refusal> {
        let shared = &self.0;
        // First of all: a request that cannot be held wakes nothing.
        let Ok(_room) = shared.room.try_acquire() else { return Err(Refusal::NodeWaits) };
        let limits = &shared.limits;
        let Some(_of_team) = shared.of_teams.begin(target.team.clone(), limits.team_held) else {
            return Err(Refusal::TeamWaits);
        };
        let startup = match shared.startup_of(&target.id) {
            // Somebody else wakes it: this costs nothing more.
            Some(startup) => startup,
            None => match self.begin(routes, target, intent)? {
                Some(startup) => startup,
                None => return Ok(()),
            },
        };
        let patience = if intent == Intent::Navigation {
            limits.page_after.min(limits.hold)
        } else {
            limits.hold
        };
        let Startup { begun, stage, mut end } = startup;
        let comes_up =
            async { end.wait_for(Option::is_some).await.is_ok_and(|end| *end == Some(true)) };
        let ended = tokio::select! {
            biased;
            is_up = comes_up => Some(is_up),
            () = sleep(patience) => None,
            () = shared.too_late_for_the_next(Instant::now()) => None,
        };
        match ended {
            Some(true) => Ok(()),
            Some(false) => Err(Refusal::Failed { stage, again: limits.rest }),
            None => Err(Refusal::Waits { stage, elapsed: begun.elapsed() }),
        }
    }

    /// Begins a startup, unless this request may not, or the team has had too many; `None` when the sandbox
    /// is neither paused nor boots any more.
    fn begin(
        &self,
        routes: &Arc<dyn Routes>,
        target: &Target,
        intent: Intent,
    ) -> Result<Option<Startup>, Refusal> {
        let (shared, now) = (&self.0, Instant::now());
        let exempt = shared.limits.followers_wake && matches!(intent, Intent::Follows(_));
        let (tell, end) = watch::channel(None);
        let (stage, startup) = {
            let mut tables = shared.state.lock();
            if let Some(other) = tables.startups.get(&target.id) {
                return Ok(Some(other.clone()));
            }
            // Once more: a startup may have ended since this request looked.
            let current = routes.local(SandboxRef::Id(target.id));
            let Some(stage) = current.as_ref().and_then(stage_of) else { return Ok(None) };
            let wakes = stage == Stage::Waking;
            if let Some(kind) = intent.passive().filter(|_| wakes && !exempt) {
                return Err(Refusal::Passive(kind));
            }
            tables.may_try(&target.id, now, shared.limits.rest)?;
            if wakes {
                tables.count_wake(&target.team, shared.limits.team_wakes, now)?;
            }
            let startup = Startup { begun: now, stage, end };
            tables.startups.insert(target.id, startup.clone());
            (stage, startup)
        };
        let come_up = come_up(Arc::clone(routes), target.id);
        let (shared, id) = (Arc::downgrade(shared), target.id);
        tokio::spawn(async move {
            let is_up = timeout(HOLD_MAX, come_up).await.unwrap_or(false);
            finish(&shared, id, stage, is_up);
            tell.send_replace(Some(is_up));
        });
        Ok(Some(startup))
    }
}

impl Shared {
    fn startup_of(&self, id: &SandboxId) -> Option<Startup> {
        self.state.lock().startups.get(id).cloned()
    }

    /// Waits until the agent stops, if by then a request that is held since `held` has waited for so long that Caddy
    /// would give up before the next agent listens.
    async fn too_late_for_the_next(&self, held: Instant) {
        self.stop.cancelled().await;
        if held.elapsed() + RESTART < ASKS_AGAIN {
            std::future::pending().await
        }
    }
}

impl Tables {
    /// Refuses while the last failure is recent.
    fn may_try(&mut self, id: &SandboxId, now: Instant, rest: Duration) -> Result<(), Refusal> {
        let Some((stage, at)) = self.failed.get(id).copied() else { return Ok(()) };
        match rest.checked_sub(now.duration_since(at)) {
            Some(again) if !again.is_zero() => Err(Refusal::Failed { stage, again }),
            Some(_) | None => {
                self.failed.remove(id);
                Ok(())
            }
        }
    }

    fn count_wake(&mut self, team: &Team, a_minute: u32, now: Instant) -> Result<(), Refusal> {
        if self.budgets.len() >= TEAMS_MAX && !self.budgets.contains_key(team) {
            // One that woke nothing for a minute has all of its wakes again.
            let minute = Duration::from_secs(60);
            self.budgets.retain(|_, budget| now.duration_since(budget.at) < minute);
            if self.budgets.len() >= TEAMS_MAX {
                return Err(Refusal::NodeWaits);
            }
        }
        let all = Budget { left: f64::from(a_minute), at: now };
        let budget = self.budgets.entry(team.clone()).or_insert(all);
        budget.take(a_minute, now).map_err(|again| Refusal::TooManyWakes { again })
    }
}

/// Removes a startup that has ended, and remembers a failure.
fn finish(shared: &Weak<Shared>, id: SandboxId, stage: Stage, is_up: bool) {
    let Some(shared) = shared.upgrade() else { return };
    let (now, rest) = (Instant::now(), shared.limits.rest);
    let mut tables = shared.state.lock();
    tables.startups.remove(&id);
    if !is_up {
        if tables.failed.len() >= FAILED_MAX {
            tables.failed.retain(|_, (_, at)| now.duration_since(*at) < rest);
        }
        if tables.failed.len() < FAILED_MAX {
            tables.failed.insert(id, (stage, now));
        }
    }
}

/// Returns the stage of a sandbox that may answer soon.
fn stage_of(target: &Target) -> Option<Stage> {
    match target.state {
        State::Paused { wakes: true } => Some(Stage::Waking),
        State::Booting => Some(Stage::Booting),
        State::Running if target.ip.is_none() => Some(Stage::Booting),
        State::Paused { wakes: false } | State::Running | State::Stopped | State::Gone => None,
    }
}

/// Brings a sandbox from paused or booting to running; false when it stays paused. True too when it
/// becomes anything else: the caller looks again.
async fn come_up(routes: Arc<dyn Routes>, id: SandboxId) -> bool {
    let name = SandboxRef::Id(id);
    let mut woken = false;
    loop {
        let Some(target) = routes.local(name) else { return true };
        match target.state {
            // Once: a sandbox that is paused again by then was paused on purpose.
            State::Paused { wakes: true } if !woken => {
                woken = true;
                routes.wake(name).await;
            }
            State::Paused { .. } => return false,
            State::Running if target.ip.is_some() => return true,
            State::Running | State::Booting => sleep(LOOK).await,
            State::Stopped | State::Gone => return true,
        }
    }
}

#[cfg(test)]
mod tests;
