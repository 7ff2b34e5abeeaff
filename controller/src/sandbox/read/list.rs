//! Reads sandboxes: one, or pages of those that fulfil a filter.

use proto::{
    id::{Invalid, SandboxId},
    name::{NodeName, SnapshotId, Team},
    sandbox::v1::{ListSandboxesRequest, Phase, Sandbox, SandboxFilter, SandboxOrder},
    spec::limit::METADATA_MAX,
};

use crate::{
    inventory::Page,
    sandbox::{Error, Sandboxes},
};

const PAGE_DEFAULT: u32 = 200;
const PAGE_MAX: u32 = 1000;
/// Most phases: as many as there are.
const PHASES_MAX: usize = 10;
/// Longest beginning of a name.
const PREFIX_BYTES_MAX: usize = 30;

/// Checked conditions on sandboxes.
#[derive(Debug, Clone, Default)]
pub(in crate::sandbox) struct Filter(SandboxFilter);

impl TryFrom<Option<SandboxFilter>> for Filter {
    type Error = Invalid;

    fn try_from(asked: Option<SandboxFilter>) -> Result<Self, Invalid> {
        let asked = asked.unwrap_or_default();
        let known = |phase: &i32| Phase::try_from(*phase).is_ok_and(|p| p != Phase::Unspecified);
        if asked.phases.len() > PHASES_MAX {
            return Err(Invalid::new("filter.phases", "must be at most 10"));
        }
        if !asked.phases.iter().all(known) {
            return Err(Invalid::new("filter.phases", "must be phases other than UNSPECIFIED"));
        }
        if !asked.node.is_empty() {
            asked.node.parse::<NodeName>()?;
        }
        if !asked.snapshot_id.is_empty() {
            asked.snapshot_id.parse::<SnapshotId>()?;
        }
        if asked.name_prefix.len() > PREFIX_BYTES_MAX {
            return Err(Invalid::new("filter.name_prefix", "must be at most 30 characters"));
        }
        if asked.metadata.len() > METADATA_MAX {
            return Err(Invalid::new("filter.metadata", "must be at most 32 pairs"));
        }
        Ok(Self(asked))
    }
}

impl Filter {
    /// Returns true when the sandbox fulfils all conditions.
    pub(in crate::sandbox) fn matches(&self, sandbox: &Sandbox) -> bool {
        let Self(wanted) = self;
        let is = |wanted: &str, has: &str| wanted.is_empty() || wanted == has;
        (wanted.phases.is_empty() || wanted.phases.contains(&sandbox.phase))
            && is(&wanted.node, &sandbox.node)
            && is(&wanted.snapshot_id, &sandbox.snapshot_id)
            && sandbox.name.starts_with(&wanted.name_prefix)
            && wanted.metadata.iter().all(|(key, value)| sandbox.metadata.get(key) == Some(value))
    }

    /// Returns true when deleted or failed sandboxes are asked for by their phase.
    pub(in crate::sandbox) fn wants_ended(&self) -> bool {
        let ended = |phase: &i32| Phase::try_from(*phase).is_ok_and(Phase::has_ended);
        self.0.phases.iter().any(ended)
    }
}

/// Reads the token of the previous page: the id of its last sandbox.
pub(in crate::sandbox) fn after(token: &str) -> Result<Option<SandboxId>, Invalid> {
    let bad = |_| Invalid::new("page_token", "must be the token of the page before");
    (!token.is_empty()).then(|| token.parse().map_err(bad)).transpose()
}

/// Page of sandboxes with the token of the next page, which is empty on the last.
type SandboxPage = (Vec<Sandbox>, String);

impl Sandboxes {
    /// Returns one sandbox.
    ///
    /// # Errors
    /// When there is none of this name in the team.
    pub fn get(&self, team: &Team, id: &str) -> Result<Sandbox, Error> {
        self.find(team, id).map(|entry| self.nodes.cache.view(&entry))
    }

    /// Returns a page of the team's sandboxes.
    ///
    /// # Errors
    /// When the size is out of range, a condition is wrong, or the token is not one of ours.
    pub fn list(&self, team: &Team, asked: ListSandboxesRequest) -> Result<SandboxPage, Error> {
        let newest_first = match SandboxOrder::try_from(asked.order) {
            Ok(SandboxOrder::Unspecified) => false,
            Ok(SandboxOrder::NewestFirst) => true,
            Err(_) => return Err(Invalid::new("order", "must be NEWEST_FIRST, or unset").into()),
        };
        let limit = match asked.page_size {
            0 => PAGE_DEFAULT,
            size if size <= PAGE_MAX => size,
            _ => return Err(Invalid::new("page_size", "must be 1 to 1000, or 0 for 200").into()),
        };
        let filter = Filter::try_from(asked.filter)?;
        let page = Page {
            after: after(&asked.page_token)?,
            limit: limit as usize,
            include_ended: asked.include_ended || filter.wants_ended(),
            newest_first,
            filter: &|sandbox| filter.matches(sandbox),
        };
        let (sandboxes, more) = self.nodes.cache.page(team, &page);
        let next = sandboxes.last().filter(|_| more).map(|last| last.id.clone());
        Ok((sandboxes, next.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_wants_all_of_its_conditions() {
        let sandbox = Sandbox {
            phase: Phase::Running.into(),
            node: "n1".into(),
            snapshot_id: "s1".into(),
            name: "web-1".into(),
            metadata: [("a".into(), "1".into()), ("b".into(), "2".into())].into(),
            ..Sandbox::default()
        };
        let all = SandboxFilter {
            phases: vec![Phase::Stopped.into(), Phase::Running.into()],
            node: "n1".into(),
            snapshot_id: "s1".into(),
            name_prefix: "web".into(),
            metadata: [("a".into(), "1".into())].into(),
        };
        let matches = |filter: &SandboxFilter| {
            Filter::try_from(Some(filter.clone())).expect("valid").matches(&sandbox)
        };
        assert!(matches(&all) && matches(&SandboxFilter::default()));
        for change in [
            (|f| f.phases = vec![Phase::Paused.into()]) as fn(&mut SandboxFilter),
            |f| f.node = "n2".into(),
            |f| f.snapshot_id = "s".into(),
            |f| f.name_prefix = "eb".into(),
            |f| drop(f.metadata.insert("b".into(), "1".into())),
            |f| drop(f.metadata.insert("c".into(), String::new())),
        ] {
            let mut filter = all.clone();
            change(&mut filter);
            assert!(!matches(&filter), "{filter:?}");
        }
    }

    #[test]
    fn wrong_condition_is_named() {
        for (field, change) in [
            ("filter.phases", (|f| f.phases = vec![0]) as fn(&mut SandboxFilter)),
            ("filter.phases", |f| f.phases = vec![99]),
            ("filter.phases", |f| f.phases = vec![Phase::Running.into(); 11]),
            ("node", |f| f.node = "a b".into()),
            ("snapshot_id", |f| f.snapshot_id = "a b".into()),
            ("filter.name_prefix", |f| f.name_prefix = "a".repeat(31)),
            ("filter.metadata", |f| {
                f.metadata = (0..33).map(|n| (n.to_string(), String::new())).collect()
            }),
        ] {
            let mut filter = SandboxFilter::default();
            change(&mut filter);
            assert_eq!(Filter::try_from(Some(filter)).expect_err(field).what, field);
        }
    }
}
