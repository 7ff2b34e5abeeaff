//! Limits of commands: how often a team starts them, how many run, and how much of their output the
//! nodes keep. Starts are counted in memory, so that no command waits for the store.

use std::{sync::Arc, time::Duration};

use proto::{Reason, limits::Limit, name::Team};

use super::{Exceeded, Pace, QUOTA_RETRY, Quotas, check_rate};
use crate::{
    inventory::commands::{Commands, End, Place, Running},
    sandbox::{Error, Result},
};

const MIB: u64 = 1 << 20;
/// Time after which a caller with too many commands may ask again: many commands are short.
const RUNNING_RETRY: Duration = Duration::from_secs(5);

/// Admitted start of a command, which counts until it is ended or dropped.
#[derive(Debug)]
pub(in crate::sandbox) struct AdmittedExec {
    running: Running,
    /// Time of the start in the team's rate, to take it out again if nothing has run.
    counted: Option<(Arc<Quotas>, Team, u64)>,
}

impl AdmittedExec {
    /// Ends the start: what has not run does not count.
    pub(in crate::sandbox) fn end(self, end: End) {
        let Self { running, counted } = self;
        if let (End::NeverRan, Some((quotas, team, at_ms))) = (end, counted) {
            let mut state = quotas.state.lock();
            if let Some(times) = state.execs.get_mut(&team) {
                times.remove(at_ms);
            }
        }
        running.end(end);
    }
}

impl Quotas {
    /// Admits the start of a command. One that is known under its name is not started again, and
    /// neither counts nor is refused.
    ///
    /// # Errors
    /// QUOTA_EXCEEDED or RATE_EXCEEDED.
    pub(in crate::sandbox) fn admit_exec(
        self: &Arc<Self>,
        commands: &Arc<Commands>,
        place: Place,
        now_ms: u64,
    ) -> Result<AdmittedExec> {
        // One decision at a time: of parallel starts no more pass than there is room for.
        let mut state = self.state.lock();
        if let Some(running) = commands.join(&place) {
            return Ok(AdmittedExec { running, counted: None });
        }
        let team = place.team.clone();
        let limits = state.limits(&team, &self.defaults);
        let used = commands.of_team(&team);
        check_output(&team, limits.output_mib, used.kept_bytes)?;
        check_running(&team, limits.running_execs, used.running)?;
        let mut counted = None;
        if limits.execs.and_then(Limit::max).is_some() {
            let times = state.execs.entry(team.clone()).or_default();
            times.set_back(now_ms);
            let pace = Pace { limit: "execs", may: "start commands", has: "started" };
            check_rate(&format!("team {team}"), pace, limits.execs, times, now_ms)?;
            times.add(now_ms);
            counted = Some((Arc::clone(self), team, now_ms));
        } else {
            state.execs.remove(&team);
        }
        Ok(AdmittedExec { running: commands.begin(place), counted })
    }

    /// Admits a change of a sandbox that there is; one that is not bounded only counts.
    ///
    /// # Errors
    /// RATE_EXCEEDED.
    pub(in crate::sandbox) fn admit_change(
        &self,
        team: &Team,
        now_ms: u64,
        is_bounded: bool,
    ) -> Result<()> {
        let mut state = self.state.lock();
        let limit = state.limits(team, &self.defaults).changes;
        if limit.and_then(Limit::max).is_none() {
            state.changes.remove(team);
            return Ok(());
        }
        let times = state.changes.entry(team.clone()).or_default();
        times.set_back(now_ms);
        let pace = Pace { limit: "changes", may: "change sandboxes", has: "changed" };
        if is_bounded {
            check_rate(&format!("team {team}"), pace, limit, times, now_ms)?;
        }
        times.add(now_ms);
        Ok(())
    }

    /// Removes a change that its node refused.
    pub(in crate::sandbox) fn take_back_change(&self, team: &Team, at_ms: u64) {
        if let Some(times) = self.state.lock().changes.get_mut(team) {
            times.remove(at_ms);
        }
    }

    /// Returns the most events that are kept of a team, if it has a limit.
    pub(in crate::sandbox) fn events_max(&self, team: &Team) -> Option<u64> {
        self.state.lock().limits(team, &self.defaults).events.and_then(Limit::max)
    }
}

/// Rounds bytes up to MiB.
pub(super) fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

fn check_output(team: &Team, limit: Option<Limit<u64>>, kept_bytes: u64) -> Result<()> {
    let Some(max) = limit.and_then(Limit::max) else { return Ok(()) };
    if kept_bytes < max.saturating_mul(MIB) {
        return Ok(());
    }
    let used = mib(kept_bytes);
    let message = format!(
        "team {team} may have {max} MiB of output kept, and has {used}: delete or stop sandboxes, or \
         wait, because the output of a command goes an hour after its end; or ask an operator for a \
         higher limit"
    );
    Err(exceeded(Exceeded { limit: "output_mib", used, max }, message).retry(QUOTA_RETRY))
}

fn check_running(team: &Team, limit: Option<Limit<u64>>, used: u64) -> Result<()> {
    let Some(max) = limit.and_then(Limit::max).filter(|max| used >= *max) else { return Ok(()) };
    let message = format!(
        "team {team} may have {max} commands running, and has {used}: wait until one ends, or end \
         one, or ask an operator for a higher limit"
    );
    Err(exceeded(Exceeded { limit: "running_execs", used, max }, message).retry(RUNNING_RETRY))
}

fn exceeded(exceeded: Exceeded, message: String) -> Error {
    let exceeded = Some(Box::new(exceeded));
    Error { exceeded, ..Error::new(Reason::QuotaExceeded, message) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::{id::SandboxId, limits::TeamLimits};

    use super::*;

    fn place(exec_id: Option<&str>) -> Place {
        Place {
            node: "n1".parse().expect("node"),
            team: "red".parse().expect("team"),
            sandbox: SandboxId::new(1, &[1; 10]),
            exec_id: exec_id.map(ToOwned::to_owned),
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Wait(u64),
        Start(Option<u8>),
        End(usize, End),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let end = prop_oneof![Just(End::NeverRan), Just(End::Ended(true)), Just(End::MayRun)];
        let one = prop_oneof![
            (0_u64..2000).prop_map(Step::Wait),
            prop::option::of(0_u8..6).prop_map(Step::Start),
            prop::option::of(0_u8..6).prop_map(Step::Start),
            (any::<usize>(), end).prop_map(|(n, end)| Step::End(n, end)),
        ];
        prop::collection::vec(one, 1..80)
    }

    proptest! {
        #[test]
        fn starts_stay_within_the_rate_and_the_number_that_may_run(
            steps in steps(),
            (rate, running) in (1_u64..5, 1_u64..5),
        ) {
            let limits = TeamLimits::stored(&format!("execs={rate}/3s running_execs={running}"));
            let (quotas, commands) = (Arc::new(Quotas::new(limits)), Arc::<Commands>::default());
            let (mut now_ms, mut held) = (1_000_000, Vec::new());
            // Times at which something was started that was not taken back.
            let mut started: Vec<u64> = Vec::new();
            for step in steps {
                match step {
                    Step::Wait(ms) => now_ms += ms,
                    Step::Start(name) => {
                        let name = name.map(|name| format!("e{name}"));
                        let place = place(name.as_deref());
                        let known = commands.join(&place).is_some();
                        match quotas.admit_exec(&commands, place, now_ms) {
                            Ok(admitted) => {
                                prop_assert_eq!(admitted.counted.is_none(), known);
                                started.extend((!known).then_some(now_ms));
                                held.push(admitted);
                            }
                            Err(error) => {
                                prop_assert!(!known, "what is known is not refused");
                                prop_assert!(error.exceeded.is_some());
                                prop_assert!(error.retry_after.is_some());
                            }
                        }
                    }
                    Step::End(n, end) if !held.is_empty() => {
                        let one = held.swap_remove(n % held.len());
                        if let (End::NeverRan, Some((_, _, at_ms))) = (end, &one.counted) {
                            let place = started.iter().position(|at| at == at_ms);
                            started.remove(place.expect("it was started"));
                        }
                        one.end(end);
                    }
                    Step::End(..) => {}
                }
                let within = started.iter().filter(|at| **at + 3000 > now_ms).count() as u64;
                prop_assert!(within <= rate, "{within} of {rate}");
                let team = place(None).team;
                prop_assert!(commands.of_team(&team).running <= running);
                prop_assert_eq!(commands.miscounted(), []);
            }
        }
    }

    #[test]
    fn kept_output_over_the_limit_is_refused_with_what_helps() {
        let team: Team = "red".parse().expect("team");
        let limit = Some(Limit::Max(2));
        assert!(check_output(&team, limit, 2 * MIB - 1).is_ok());
        let error = check_output(&team, limit, 2 * MIB + 1).expect_err("over");
        let exceeded = error.exceeded.expect("which");
        assert_eq!((exceeded.limit, exceeded.used, exceeded.max), ("output_mib", 3, 2));
        assert_eq!((error.reason, error.retry_after), (Reason::QuotaExceeded, Some(QUOTA_RETRY)));
        assert!(error.message.contains("delete or stop sandboxes"), "{}", error.message);
        assert!(check_output(&team, Some(Limit::Max(0)), 0).is_err(), "0 allows none");
        assert!(check_output(&team, Some(Limit::Unlimited), u64::MAX).is_ok());
    }
}
