//! Names that callers give their sandboxes, and locks of them and of request_ids. One is unique among the living sandboxes of a team; the
//! controller sees to that, since a node knows its own sandboxes only.

use std::hash::{DefaultHasher, Hash, Hasher};

use daemon::keyed_lock::Guard;
use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
    name::{RequestId, SandboxName, Team},
};

use super::{Error, Sandboxes};

impl Sandboxes {
    /// Reserves a name until the guard is dropped.
    ///
    /// # Errors
    /// NAME_TAKEN when a living sandbox other than `own` has it.
    pub(super) async fn name_for(
        &self,
        team: &Team,
        name: &SandboxName,
        own: Option<SandboxId>,
    ) -> Result<Guard<u64>, Error> {
        let guard = self.lock_name(team, name).await;
        let others = self.nodes.cache.named(team, name);
        match others.iter().find(|id| Some(**id) != own) {
            Some(id) => Err(taken(name, id, "give another name, or rename that one")),
            None => Ok(guard),
        }
    }

    /// Locks a name. Two names may share a lock, which costs them only time.
    pub(super) async fn lock_name(&self, team: &Team, name: &SandboxName) -> Guard<u64> {
        let mut hasher = DefaultHasher::new();
        (team, name).hash(&mut hasher);
        self.names.lock(hasher.finish()).await
    }

    /// Locks a request_id of a team, in the same way.
    pub(super) async fn lock_request(&self, team: &Team, request: &RequestId) -> Guard<u64> {
        let mut hasher = DefaultHasher::new();
        (team, request).hash(&mut hasher);
        self.requests.lock(hasher.finish()).await
    }

    /// Returns id and owner of the sandbox that a caller names; `None`, where there is none or several
    /// have the name. Without a team, the sandbox may be anybody's.
    pub fn identify(&self, team: Option<&Team>, text: &str) -> Option<(SandboxId, Team)> {
        let cache = &self.nodes.cache;
        let entry = match team {
            Some(team) => cache.get_of(team, &self.reference(team, text).ok()?),
            None => cache.get(&text.parse().ok()?),
        };
        entry.map(|entry| (entry.id, entry.team))
    }

    /// Reads a caller's name of a sandbox, in any form.
    ///
    /// # Errors
    /// When it has none of the forms, when no living sandbox of the team has this name, or several
    /// have it.
    pub(super) fn reference(&self, team: &Team, text: &str) -> Result<SandboxRef, Error> {
        let invalid = match text.parse::<SandboxRef>() {
            Ok(reference) => return Ok(reference),
            Err(invalid) => invalid,
        };
        let Ok(name) = text.parse::<SandboxName>() else { return Err(invalid.into()) };
        match &self.nodes.cache.named(team, &name)[..] {
            [] => {
                let message = format!("there is no sandbox {name} in this team");
                Err(Error::new(Reason::SandboxNotFound, message))
            }
            [id] => Ok(SandboxRef::Id(*id)),
            // After the store was lost and rebuilt from nodes, for example.
            [id, others @ ..] => Err(taken(
                &name,
                id,
                &format!("and {} more: use their ids, and rename all but one", others.len()),
            )),
        }
    }
}

/// Builds the error about a name that a sandbox has.
pub(super) fn taken(name: &SandboxName, id: &SandboxId, what: &str) -> Error {
    let mut error = Error::new(Reason::NameTaken, format!("{id} is named {name}; {what}"));
    error.sandbox_id = Some(id.to_string());
    error
}
