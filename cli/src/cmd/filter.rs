//! `--filter KEY=VALUE`: which sandboxes to list. The API takes most conditions; all of them are checked here
//! again, because it cannot take each of them.

use std::{collections::BTreeMap, str::FromStr};

use proto::sandbox::v1::{Phase, Sandbox, SandboxFilter};

use crate::output::json;

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Phase, such as `running`.
    Phase(Phase),
    /// Node by its name.
    Node(String),
    /// Snapshot that it was created from.
    Snapshot(String),
    /// Beginning of its name.
    Name(String),
    /// Beginning of its id, with or without `pvelxc-`.
    Id(String),
    /// Metadata pair.
    Meta(String, String),
}

const KEYS: &str = "must be KEY=VALUE with the key phase, node, snapshot, name, id or meta.NAME";

/// Phases that can be asked for.
const PHASES: &[Phase] = &[
    Phase::Creating,
    Phase::Running,
    Phase::Paused,
    Phase::Starting,
    Phase::Stopping,
    Phase::Stopped,
    Phase::Deleting,
    Phase::Deleted,
    Phase::Failed,
    Phase::Unreachable,
];
/// Longest beginning of a name that the API takes.
const PREFIX_MAX: usize = 30;
/// Most pairs of metadata that the API takes.
const PAIRS_MAX: usize = 32;

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or(KEYS)?;
        let owned = value.to_owned();
        match key {
            "phase" => {
                let named = |phase: &&Phase| json::phase(**phase).eq_ignore_ascii_case(value);
                PHASES.iter().find(named).map(|phase| Self::Phase(*phase)).ok_or_else(|| {
                    let names: Vec<_> = PHASES.iter().map(|phase| json::phase(*phase)).collect();
                    format!("the phase must be one of {}", names.join(", "))
                })
            }
            "node" => Ok(Self::Node(owned)),
            "snapshot" => Ok(Self::Snapshot(owned)),
            "name" => Ok(Self::Name(owned)),
            "id" => Ok(Self::Id(owned)),
            _ => match key.strip_prefix("meta.") {
                Some(name) if !name.is_empty() => Ok(Self::Meta(name.to_owned(), owned)),
                _ => Err(KEYS.into()),
            },
        }
    }
}

impl Condition {
    /// Whether it is fulfilled.
    fn holds(&self, sandbox: &Sandbox) -> bool {
        match self {
            Self::Phase(phase) => sandbox.phase() == *phase,
            Self::Node(node) => &sandbox.node == node,
            Self::Snapshot(snapshot) => &sandbox.snapshot_id == snapshot,
            Self::Name(start) => sandbox.name.starts_with(start),
            Self::Id(start) => {
                let digits = sandbox.id.split_once('-').map_or("", |(_, digits)| digits);
                sandbox.id.starts_with(start) || digits.starts_with(start)
            }
            Self::Meta(name, value) => sandbox.metadata.get(name) == Some(value),
        }
    }

    /// Whether one of several values is enough: the two are about the same thing.
    fn is_alike(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Meta(key, _), Self::Meta(other, _)) => key == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

/// The conditions that the API takes. Of alternatives it takes phases only.
pub(super) fn of_api(conditions: &[Condition]) -> SandboxFilter {
    let mut filter = SandboxFilter::default();
    let mut pairs = BTreeMap::new();
    for condition in conditions {
        match condition {
            Condition::Phase(phase) => filter.phases.push((*phase).into()),
            Condition::Meta(key, value) if is_alone(conditions, condition) => {
                pairs.insert(key.clone(), value.clone());
            }
            Condition::Meta(..) => {}
            Condition::Node(node) => filter.node = only(conditions, condition, node),
            Condition::Snapshot(id) => filter.snapshot_id = only(conditions, condition, id),
            Condition::Name(start) => filter.name_prefix = only(conditions, condition, start),
            Condition::Id(_) => {}
        }
    }
    filter.phases.sort_unstable();
    filter.phases.dedup();
    if filter.name_prefix.len() > PREFIX_MAX {
        filter.name_prefix.clear();
    }
    filter.metadata = pairs.into_iter().take(PAIRS_MAX).collect();
    filter
}

/// Value of a condition, or nothing where there are alternatives to it.
fn only(conditions: &[Condition], condition: &Condition, value: &str) -> String {
    if is_alone(conditions, condition) { value.to_owned() } else { String::new() }
}

/// Whether a condition has no alternatives.
fn is_alone(conditions: &[Condition], condition: &Condition) -> bool {
    conditions.iter().all(|other| other == condition || !condition.is_alike(other))
}

/// All phases, also those of sandboxes that have ended.
pub(super) fn all_phases() -> Vec<i32> {
    PHASES.iter().map(|phase| (*phase).into()).collect()
}

/// Whether a sandbox fulfils all conditions; of several about one thing, one is enough.
pub(super) fn matches(conditions: &[Condition], sandbox: &Sandbox) -> bool {
    conditions.iter().all(|condition| {
        conditions
            .iter()
            .any(|other| (other == condition || condition.is_alike(other)) && other.holds(sandbox))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(words: &str) -> Vec<Condition> {
        words.split(' ').map(|word| word.parse().expect(word)).collect()
    }

    #[test]
    fn api_takes_what_it_can_and_the_rest_stays_here() {
        let filter = of_api(&conditions(
            "phase=running phase=stopped node=pve1 snapshot=small name=web meta.user=ada id=01h4",
        ));
        assert_eq!(filter.phases, [i32::from(Phase::Running), Phase::Stopped.into()]);
        assert_eq!((filter.node.as_str(), filter.snapshot_id.as_str()), ("pve1", "small"));
        assert_eq!((filter.name_prefix.as_str(), filter.metadata["user"].as_str()), ("web", "ada"));
        let filter = of_api(&conditions("node=pve1 node=pve2 name=a name=a"));
        assert_eq!((filter.node.as_str(), filter.name_prefix.as_str()), ("", "a"), "alternatives");
        let long = format!("name={}", "a".repeat(31));
        assert_eq!(of_api(&conditions(&long)), SandboxFilter::default());
    }

    #[test]
    fn conditions_of_one_key_are_alternatives_and_others_add_up() {
        let sandbox = Sandbox {
            id: "pvelxc-01h455vb4peh5vsknk084sn02q".into(),
            node: "pve2".into(),
            phase: Phase::Running.into(),
            metadata: [("user", "ada"), ("job", "7")].map(|(k, v)| (k.into(), v.into())).into(),
            ..Sandbox::default()
        };
        let holds = |words: &str| matches(&conditions(words), &sandbox);
        for yes in [
            "phase=running",
            "phase=Stopped phase=running node=pve2",
            "meta.user=ada meta.job=7",
            "id=01h4",
            "id=pvelxc-01",
        ] {
            assert!(holds(yes), "{yes}");
        }
        for no in ["phase=stopped", "phase=running node=pve1", "meta.user=ada meta.job=8", "id=2q"]
        {
            assert!(!holds(no), "{no}");
        }
        for wrong in ["phase", "phase=up", "colour=red", "meta.=x", "=x"] {
            assert!(wrong.parse::<Condition>().is_err(), "{wrong}");
        }
        assert!(matches(&[], &sandbox));
    }
}
