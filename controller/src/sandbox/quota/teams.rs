//! Limits and use of teams, for operators and for the teams themselves.

use std::sync::Arc;

use proto::{
    id::Invalid,
    limits::{Limit, TeamLimits},
    name::Team,
    sandbox::v1 as wire,
};

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
        let rate = limits.creates.and_then(Limit::max);
        let history = state.histories.get(team);
        let count =
            rate.zip(history).map(|(rate, history)| history.team.count(rate, self.clock.now_ms()));
        TeamView {
            team: team.clone(),
            own: state.own.get(team).cloned().unwrap_or_default(),
            limits,
            usage: state.usage(&self.nodes.cache, team),
            creates: count.unwrap_or_default(),
        }
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
        let changed = self.tasks.spawn(async move {
            let _alone = this.quotas.changing.lock().await;
            let own = this.team(&team).own;
            let own = own.updated(&asked.limits.unwrap_or_default(), &paths)?;
            this.store.put_team_limits(&team, own.clone()).await?;
            this.quotas.set_own(&team, own.clone());
            tracing::info!(%team, limits = %own, by, "limits of a team changed");
            Ok(this.team(&team))
        });
        let gone = |_| Err(crate::sandbox::stopping());
        changed.await.unwrap_or_else(gone)
    }
}
