//! Limits of teams: how much they have at once, and how often they create, change and run commands.
//!
//! What a team has is a sum over the cache of sandboxes, which is kept as sandboxes change. What is
//! admitted and not in the cache yet is kept here, under one lock with the decision, so that of many
//! parallel creations no more are admitted than fit. Times of creations are remembered, and after a
//! restart are those of the store's rows.

mod egress;
mod execs;
mod history;
mod teams;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use daemon::sync::Mutex;
use proto::{
    Reason,
    id::SandboxId,
    limits::{Limit, Rate, TeamLimits},
    name::{Team, UserLabel},
    spec::Size,
};

use self::history::{History, Times};
use super::Error;
use crate::inventory::{Cache, Usage};

pub(super) use egress::{can_keep_to, why_not_kept};
pub(super) use execs::AdmittedExec;
pub use teams::TeamView;

/// Time after which a caller at a quota may ask again. When there is room, nobody knows: somebody has to delete
/// something.
const QUOTA_RETRY: Duration = Duration::from_secs(30);

/// Limit that would be exceeded, for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    /// Name of the limit, as `TeamLimits` has it.
    pub limit: &'static str,
    /// Use at the moment.
    pub used: u64,
    /// Most that is allowed.
    pub max: u64,
}

/// Limits of all teams, and what counts towards them.
#[derive(Debug)]
pub(super) struct Quotas {
    defaults: TeamLimits,
    state: Mutex<State>,
    /// Lock of changes of limits.
    pub(super) changing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Limits of teams that differ from the defaults.
    own: BTreeMap<Team, TeamLimits>,
    /// Sizes that were admitted and may not be in the cache yet, by the number of the admission.
    admitted: BTreeMap<u64, (Team, SandboxId, Size)>,
    last: u64,
    histories: BTreeMap<Team, History>,
    /// Starts of commands of the teams that have a rate for them.
    execs: BTreeMap<Team, Times>,
    /// Changes of sandboxes of the teams that have a rate for them.
    changes: BTreeMap<Team, Times>,
}

/// Rate in words.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Name of the limit.
    limit: &'static str,
    /// Allowed action, as in "may create".
    may: &'static str,
    /// The same, as in "has created".
    has: &'static str,
}

const CREATES: Pace = Pace { limit: "creates", may: "create", has: "created" };

/// Team and user of a creation, and its time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Creator<'a> {
    pub(super) team: &'a Team,
    pub(super) user: Option<&'a UserLabel>,
    /// Time of the creation, milliseconds since 1970.
    pub(super) at_ms: u64,
}

/// An admission, which counts until it is dropped. By then the cache has the size.
#[derive(Debug)]
pub(super) struct Admitted {
    quotas: Arc<Quotas>,
    number: u64,
    /// Creation to take out of the rates again, unless it was made.
    unmade: Option<(Team, Option<UserLabel>, u64)>,
}

impl Admitted {
    /// Keeps the creation in the rates: it was recorded.
    pub(super) fn made(mut self) {
        self.unmade = None;
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut state = self.quotas.state.lock();
        state.admitted.remove(&self.number);
        if let Some((team, user, at_ms)) = &self.unmade
            && let Some(history) = state.histories.get_mut(team)
        {
            history.remove(user.as_ref(), *at_ms);
        }
    }
}

impl Quotas {
    pub(super) fn new(defaults: TeamLimits) -> Self {
        Self { defaults, state: Mutex::default(), changing: tokio::sync::Mutex::default() }
    }

    /// Sets the limits of a team that differ from the defaults.
    pub(super) fn set_own(&self, team: &Team, own: TeamLimits) {
        let mut state = self.state.lock();
        if own == TeamLimits::default() {
            state.own.remove(team);
        } else {
            state.own.insert(team.clone(), own);
        }
    }

    /// Adds a creation from before the start to the rates. The clock may have been set back since.
    pub(super) fn recall(&self, creator: Creator<'_>, now_ms: u64) {
        let mut state = self.state.lock();
        let history = state.histories.entry(creator.team.clone()).or_default();
        history.add(creator.user, creator.at_ms.min(now_ms));
    }

    /// Returns true when a team has any limit.
    pub(super) fn is_limited(&self, team: &Team) -> bool {
        self.state.lock().limits(team, &self.defaults) != TeamLimits::default()
    }

    /// Admits a creation, or says which limit it would exceed.
    ///
    /// # Errors
    /// QUOTA_EXCEEDED or RATE_EXCEEDED.
    pub(super) fn admit_creation(
        self: &Arc<Self>,
        cache: &Cache,
        creator: Creator<'_>,
        (id, size): (SandboxId, Size),
    ) -> Result<Admitted, Error> {
        let Creator { team, user, at_ms } = creator;
        let mut state = self.state.lock();
        let limits = state.limits(team, &self.defaults);
        check_usage(team, &limits, state.usage(cache, team), Usage::of(size))?;
        let history = state.histories.entry(team.clone()).or_default();
        history.set_back(user, at_ms);
        check_rate(&format!("team {team}"), CREATES, limits.creates, &history.team, at_ms)?;
        if let Some(user) = user {
            let (who, none) = (format!("user {user} of team {team}"), Times::default());
            let times = history.of_user(user).unwrap_or(&none);
            let pace = Pace { limit: "user_creates", ..CREATES };
            check_rate(&who, pace, limits.user_creates, times, at_ms)?;
        }
        history.add(user, at_ms);
        let number = state.admit(team, id, size);
        let unmade = Some((team.clone(), user.cloned(), at_ms));
        Ok(Admitted { quotas: self.clone(), number, unmade })
    }

    /// Admits a new size of a sandbox, as far as it grows.
    ///
    /// # Errors
    /// QUOTA_EXCEEDED.
    pub(super) fn admit_size(
        self: &Arc<Self>,
        cache: &Cache,
        team: &Team,
        id: SandboxId,
        (from, to): (Size, Size),
    ) -> Result<Admitted, Error> {
        let mut state = self.state.lock();
        let limits = state.limits(team, &self.defaults);
        check_usage(team, &limits, state.usage(cache, team), Usage::growth(from, to))?;
        let number = state.admit(team, id, to);
        Ok(Admitted { quotas: self.clone(), number, unmade: None })
    }
}

impl State {
    /// Returns the limits that count for a team.
    fn limits(&self, team: &Team, defaults: &TeamLimits) -> TeamLimits {
        self.own.get(team).cloned().unwrap_or_default().or(defaults.clone())
    }

    fn usage(&self, cache: &Cache, team: &Team) -> Usage {
        let of_team = self.admitted.values().filter(|(of, ..)| of == team);
        cache.usage(team, of_team.map(|(_, id, size)| (*id, *size)))
    }

    fn admit(&mut self, team: &Team, id: SandboxId, size: Size) -> u64 {
        self.last += 1;
        self.admitted.insert(self.last, (team.clone(), id, size));
        self.last
    }
}

/// Checks that a team may have more than it uses. What does not grow is not checked: a team that is
/// over a limit that was lowered may still change other things.
fn check_usage(team: &Team, limits: &TeamLimits, used: Usage, more: Usage) -> Result<(), Error> {
    let checks = [
        ("sandboxes", "sandboxes", limits.sandboxes, used.sandboxes, more.sandboxes),
        ("cpu_cores", "cores", limits.cpu_cores, used.cpu_cores, more.cpu_cores),
        ("memory_mib", "MiB of memory", limits.memory_mib, used.memory_mib, more.memory_mib),
        ("disk_gib", "GiB of disk", limits.disk_gib, used.disk_gib, more.disk_gib),
    ];
    for (limit, unit, max, used, more) in checks {
        let Some(max) = max.and_then(Limit::max).filter(|_| more > 0) else { continue };
        if used.saturating_add(more) > max {
            let message = format!(
                "team {team} may have {max} {unit}, has {used}, and this would add {more}: \
                 delete what is not needed, or ask an operator for a higher limit"
            );
            let exceeded = Some(Box::new(Exceeded { limit, used, max }));
            return Err(Error {
                exceeded,
                ..Error::new(Reason::QuotaExceeded, message).retry(QUOTA_RETRY)
            });
        }
    }
    Ok(())
}

fn check_rate(
    who: &str,
    Pace { limit, may, has }: Pace,
    rate: Option<Limit<Rate>>,
    times: &Times,
    now_ms: u64,
) -> Result<(), Error> {
    let Some(rate) = rate.and_then(Limit::max) else { return Ok(()) };
    let Some(wait_ms) = times.wait_ms(rate, now_ms) else { return Ok(()) };
    let wait = Duration::from_millis(wait_ms);
    let (used, max) = (times.count(rate, now_ms).into(), rate.count.into());
    let message = format!(
        "{who} may {may} {rate}, and has {has} {used} in this time: the next is possible in {} s",
        wait_ms.div_ceil(1000)
    );
    let exceeded = Some(Box::new(Exceeded { limit, used, max }));
    Err(Error { exceeded, ..Error::new(Reason::RateExceeded, message).retry(wait) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * 3_600_000;

    #[test]
    fn clock_that_was_ahead_holds_up_a_team_for_a_window_at_most() {
        let limits = TeamLimits::stored("creates=10/1h user_creates=10/1h");
        let (team, user) = ("red".parse().expect("team"), "ada".parse().expect("user"));
        let (cache, size) = (Cache::default(), Size::default());
        let creator = |at_ms| Creator { team: &team, user: Some(&user), at_ms };
        let (now_ms, hour_ms) = (1000 * DAY_MS, 3_600_000);
        let ahead_ms = now_ms + 30 * DAY_MS;
        for is_restarted in [false, true] {
            let quotas = Arc::new(Quotas::new(limits.clone()));
            let create = |at_ms, number| {
                let id = SandboxId::new(at_ms, &[number; 10]);
                quotas.admit_creation(&cache, creator(at_ms), (id, size)).map(Admitted::made)
            };
            for number in 0..10 {
                match is_restarted {
                    true => quotas.recall(creator(ahead_ms), now_ms),
                    false => create(ahead_ms, number).expect("within the rate"),
                }
            }
            let refused = create(now_ms, 10).expect_err("ten in this hour");
            assert_eq!(refused.retry_after, Some(Duration::from_millis(hour_ms)));
            for number in 11..21 {
                create(now_ms + hour_ms, number).expect("an hour later");
            }
            create(now_ms + hour_ms, 21).expect_err("each of them counts");
        }
    }
}
