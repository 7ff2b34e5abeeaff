//! Deletes sandboxes that have been stopped for long, and compares sandboxes with a caller's list.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use proto::{
    id::Invalid,
    name::Team,
    sandbox::v1::{Phase, PruneSandboxesRequest, PrunedSandbox, Sandbox},
};

use super::each::{Each, Witness};
use crate::{
    inventory::Page,
    sandbox::{Caller, Result, Sandboxes},
};

/// Shortest allowed age.
const LEAST: Duration = Duration::from_secs(3600);
/// Most deletions of one call.
const PRUNED_MAX: usize = 200;
/// Concurrent deletions.
const PARALLEL: usize = 8;
/// Most ids of one comparison.
const KNOWN_MAX: usize = 10_000;
/// Most unlisted sandboxes in an answer.
const UNLISTED_MAX: usize = 1000;

/// Difference between the team's sandboxes and the caller's list.
#[derive(Debug, Default)]
pub struct Difference {
    /// Living sandboxes that are not in the list.
    pub unlisted: Vec<Sandbox>,
    /// Ids in the list without a living sandbox.
    pub missing: Vec<String>,
    /// Whether every node is up, so that nothing is unknown.
    pub complete: bool,
}

impl Sandboxes {
    /// Deletes sandboxes of the team that have been stopped, or with `paused` also paused, for
    /// longer than `older_than`. `witness` hears what becomes of each.
    ///
    /// # Errors
    /// When the time is less than an hour. A sandbox that cannot be deleted does not fail the call.
    pub async fn prune(
        self: &Arc<Self>,
        caller: &Caller,
        request: PruneSandboxesRequest,
        witness: Witness<'_>,
    ) -> Result<Vec<PrunedSandbox>> {
        let PruneSandboxesRequest { older_than, paused, dry_run } = request;
        let least = || Invalid::new("older_than", "must be given, and be an hour or more");
        let age = older_than.and_then(proto::duration::read).ok_or_else(least)?;
        if age < LEAST {
            return Err(least().into());
        }
        if !dry_run {
            self.may_change()?;
        }
        let age = daemon::clock::millis(age);
        let before = self.clock.now_ms().saturating_sub(age);
        let (own, _) = self.nodes.cache.page(&caller.team, &Page::ALL);
        let old = old(own, before, paused);
        Ok(stream::iter(old)
            .map(|sandbox| async move {
                if dry_run {
                    return PrunedSandbox { sandbox: Some(sandbox), ..PrunedSandbox::default() };
                }
                let each = Each::new(witness, sandbox.id.clone(), caller.team.clone());
                let done = self.delete(caller, &sandbox.id).await;
                each.end(&done);
                PrunedSandbox {
                    deleted: done.is_ok(),
                    error: done.err().map(|error| error.to_string()).unwrap_or_default(),
                    sandbox: Some(sandbox),
                }
            })
            .buffered(PARALLEL)
            .collect()
            .await)
    }

    /// Compares the team's sandboxes with a caller's list. An id of no sandbox of it is missing.
    ///
    /// # Errors
    /// When the list is too long.
    pub fn compare(&self, team: &Team, known: &[String]) -> Result<Difference> {
        if known.len() > KNOWN_MAX {
            return Err(Invalid::new("known_ids", "must be at most 10000").into());
        }
        let cache = &self.nodes.cache;
        let mut listed: BTreeSet<String> = BTreeSet::new();
        let mut missing = Vec::new();
        for text in known {
            let name = self.reference(team, text).ok();
            let entry = name.and_then(|name| cache.get_of(team, &name));
            match entry.filter(|entry| !entry.ended()) {
                Some(entry) => drop(listed.insert(entry.id.to_string())),
                None => missing.push(text.clone()),
            }
        }
        let (own, _) = cache.page(team, &Page::ALL);
        let unlisted = own.into_iter().filter(|sandbox| !listed.contains(&sandbox.id));
        Ok(Difference {
            unlisted: unlisted.take(UNLISTED_MAX).collect(),
            missing,
            complete: self.nodes.all().iter().all(|node| node.down().is_none()),
        })
    }
}

/// Returns sandboxes that have been stopped, or paused, since before `before_ms`; oldest first.
fn old(sandboxes: Vec<Sandbox>, before_ms: u64, paused: bool) -> Vec<Sandbox> {
    let since = |sandbox: &Sandbox| {
        let since = sandbox.since?;
        let seconds = u64::try_from(since.seconds).ok()?;
        Some(seconds * 1000 + u64::try_from(since.nanos).ok()? / 1_000_000)
    };
    let mut old: Vec<(u64, Sandbox)> = sandboxes
        .into_iter()
        .filter(|sandbox| match sandbox.phase() {
            Phase::Stopped => true,
            Phase::Paused => paused,
            Phase::Unspecified
            | Phase::Creating
            | Phase::Running
            | Phase::Starting
            | Phase::Stopping
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed
            | Phase::Unreachable => false,
        })
        // With an unknown start time the sandbox is left alone.
        .filter_map(|sandbox| Some((since(&sandbox)?, sandbox)))
        .filter(|(since, _)| *since < before_ms)
        .collect();
    old.sort_by(|a, b| (a.0, &a.1.id).cmp(&(b.0, &b.1.id)));
    old.truncate(PRUNED_MAX);
    old.into_iter().map(|(_, sandbox)| sandbox).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prunes_only_what_is_known_to_be_stopped_long_enough() {
        let of = |id: &str, phase: Phase, since: Option<i64>| Sandbox {
            id: id.into(),
            phase: phase.into(),
            since: since.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 }),
            ..Sandbox::default()
        };
        let all = vec![
            of("young", Phase::Stopped, Some(100)),
            of("older", Phase::Stopped, Some(20)),
            of("oldest", Phase::Stopped, Some(10)),
            of("paused", Phase::Paused, Some(10)),
            of("running", Phase::Running, Some(10)),
            of("unreachable", Phase::Unreachable, Some(10)),
            of("unknown", Phase::Stopped, None),
        ];
        let ids = |paused| -> Vec<String> {
            old(all.clone(), 100_000, paused).into_iter().map(|sandbox| sandbox.id).collect()
        };
        assert_eq!(ids(false), ["oldest", "older"]);
        assert_eq!(ids(true), ["oldest", "paused", "older"]);
    }
}
