//! Limits and use of teams, for operators and for the teams themselves.

use std::{collections::BTreeMap, sync::Arc};

use proto::{
    id::Invalid,
    limits::{Limit, Rate, TeamLimits},
    name::Team,
    sandbox::v1 as wire,
};

use super::{execs::mib, history::Times};
use crate::{
    inventory::Usage,
    sandbox::{Caller, Result, Sandboxes},
};

/// Limits of a team, and what it uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeamView {
    /// Name of the team.
    pub team: Team,
    /// Limits that differ from the defaults.
    pub own: TeamLimits,
    /// Limits that count.
    pub limits: TeamLimits,
    /// Sums of its living sandboxes.
    pub usage: Usage,
    /// Creations in the window of its rate; 0 without a rate.
    pub creates: u32,
    /// Starts of commands, likewise.
    pub execs: u32,
    /// Changes of sandboxes, likewise.
    pub changes: u32,
    /// Commands that run.
    pub running_execs: u64,
    /// Output that the nodes keep of its commands, MiB.
    pub output_mib: u64,
}

impl Sandboxes {
    /// Returns the teams that have living sandboxes, or limits of their own, in no order.
    pub fn teams(&self) -> Vec<Team> {
        let mut teams = self.nodes.cache.teams();
        teams.extend(self.quotas.state.lock().own.keys().cloned());
        teams
    }

    /// Returns the limits and the use of a team, which may have nothing.
    pub fn team(&self, team: &Team) -> TeamView {
        let state = self.quotas.state.lock();
        let limits = state.limits(team, &self.quotas.defaults);
        let now_ms = self.clock.now_ms();
        let count = |rate: Option<Limit<Rate>>, times: Option<&Times>| {
            let both = rate.and_then(Limit::max).zip(times);
            both.map(|(rate, times)| times.count(rate, now_ms)).unwrap_or_default()
        };
        let commands = self.nodes.commands.of_team(team);
        TeamView {
            team: team.clone(),
            own: state.own.get(team).cloned().unwrap_or_default(),
            usage: state.usage(&self.nodes.cache, team),
            creates: count(limits.creates, state.histories.get(team).map(|of| &of.team)),
            execs: count(limits.execs, state.execs.get(team)),
            changes: count(limits.changes, state.changes.get(team)),
            running_execs: commands.running,
            output_mib: mib(commands.kept_bytes),
            limits,
        }
    }

    /// Returns the most streams of a team, if it has a limit beside that of the configuration.
    pub fn streams_max(&self, team: &Team) -> Option<Limit<u64>> {
        self.quotas.state.lock().limits(team, &self.quotas.defaults).streams
    }

    /// Returns the number of events that are kept of a team.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn events_kept(&self, team: &Team) -> Result<u64> {
        Ok(self.store.events_of_team(team).await?)
    }

    /// Returns the numbers of events that are kept of all teams.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn events_kept_of_all(&self) -> Result<BTreeMap<Team, u64>> {
        let counts = self.store.event_counts().await?.into_iter();
        Ok(counts.filter_map(|(team, count)| Some((team?, count))).collect())
    }

    /// Changes the limits of a team. They count from the next creation on; what the team has stays.
    ///
    /// # Errors
    /// When the request is wrong, a later controller is in charge, or the store fails.
    pub async fn update_team(
        self: &Arc<Self>,
        caller: &Caller,
        request: wire::UpdateTeamRequest,
    ) -> Result<TeamView> {
        let asked = request.team.unwrap_or_default();
        let team: Team = asked.name.parse().map_err(|why: Invalid| why.named("team.name"))?;
        let paths = request.update_mask.unwrap_or_default().paths;
        self.may_change()?;
        // A task of its own: what is stored counts, also when the caller hangs up.
        let (this, by) = (self.clone(), caller.token.clone());
        let changed = self.to_its_end(caller.permit.clone(), async move {
            let _alone = this.quotas.changing.lock().await;
            let own = this.team(&team).own;
            let own = own.updated(&asked.limits.unwrap_or_default(), &paths)?;
            this.store.put_team_limits(&team, own.clone()).await?;
            this.quotas.set_own(&team, own.clone());
            tracing::info!(%team, limits = %own, by, "limits of a team changed");
            Ok(this.team(&team))
        });
        changed.await
    }
}
