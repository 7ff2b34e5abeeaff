//! Teams: converts the request, calls the domain, converts the answer. The use of streams is known
//! here alone.

use std::{collections::BTreeSet, sync::Arc};

use proto::{limits::Limit, name::Team as TeamName, sandbox::v1::*};

use super::{
    permits::Permits,
    tokens::{page_size, team_or_own},
};
use crate::{
    access::Access,
    sandbox::{Caller, Error, Result, Sandboxes, TeamView},
};

/// Limits and use of teams.
pub(super) struct Teams<'a> {
    pub(super) sandboxes: &'a Arc<Sandboxes>,
    pub(super) permits: &'a Permits,
}

impl Teams<'_> {
    /// Lists a page of the teams that have tokens or sandboxes.
    pub(super) async fn list(
        &self,
        access: &Access,
        ask: ListTeamsRequest,
    ) -> Result<ListTeamsResponse> {
        let size = page_size(ask.page_size)? as usize;
        let mut names: BTreeSet<TeamName> = access.teams().await?.into_iter().collect();
        names.extend(self.sandboxes.teams());
        let after = ask.page_token.as_str();
        let mut rest = names.into_iter().filter(|name| name.as_str() > after);
        let page: Vec<_> = rest.by_ref().take(size).collect();
        let more = rest.next().is_some();
        let last = page.last().filter(|_| more);
        let next_page_token = last.map(ToString::to_string).unwrap_or_default();
        let events = self.sandboxes.events_kept_of_all().await?;
        let kept = |name: &TeamName| events.get(name).copied().unwrap_or_default();
        let team = |name: &TeamName| self.team(self.sandboxes.team(name), kept(name));
        let teams = page.iter().map(team).collect();
        Ok(ListTeamsResponse { teams, next_page_token })
    }

    /// Returns a team: the caller's own, or any to an operator.
    pub(super) async fn get(
        &self,
        caller: &Caller,
        ask: &GetTeamRequest,
    ) -> Result<GetTeamResponse> {
        let name = team_or_own(&ask.name, caller)?;
        if name != caller.team && !caller.scopes.allow(Scope::Admin) {
            let message = "a team other than your own needs the scope `admin`";
            return Err(Error::new(Reason::ScopeMissing, message));
        }
        let events = self.sandboxes.events_kept(&name).await?;
        Ok(GetTeamResponse { team: Some(self.team(self.sandboxes.team(&name), events)) })
    }

    /// Changes the limits of a team.
    pub(super) async fn update(
        &self,
        caller: &Caller,
        request: UpdateTeamRequest,
    ) -> Result<UpdateTeamResponse> {
        let changed = self.sandboxes.update_team(caller, request).await?;
        let events = self.sandboxes.events_kept(&changed.team).await?;
        Ok(UpdateTeamResponse { team: Some(self.team(changed, events)) })
    }

    fn team(&self, view: TeamView, events: u64) -> Team {
        let streams = self.permits.streams(&view.team);
        let mut limits = view.limits;
        limits.streams = limits.streams.or(Some(Limit::Max(self.permits.streams_max())));
        let usage = TeamUsage {
            sandboxes: view.usage.sandboxes,
            cpu_cores: view.usage.cpu_cores,
            memory_mib: view.usage.memory_mib,
            disk_gib: view.usage.disk_gib,
            creates: view.creates,
            execs: view.execs,
            running_execs: view.running_execs,
            streams,
            output_mib: view.output_mib,
            events,
            changes: view.changes,
        };
        Team {
            name: view.team.to_string(),
            limits: Some(view.own.into()),
            effective: Some(limits.into()),
            usage: Some(usage),
        }
    }
}
