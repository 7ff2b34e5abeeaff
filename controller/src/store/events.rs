//! Types of the stored event log.

use proto::{
    Cause, Reason,
    id::SandboxId,
    name::{NodeName, Team},
    sandbox::v1::EventKind,
};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Time at which the controller learned of it, milliseconds since 1970.
    pub at_ms: u64,
    /// Id of its sandbox.
    pub sandbox: Option<SandboxId>,
    /// Team of the sandbox.
    pub team: Option<Team>,
    /// Node on which it happened.
    pub node: Option<NodeName>,
    /// Kind of the event.
    pub kind: EventKind,
    /// Caller or component that caused it.
    pub actor: String,
    /// One of `proto::reason`, or another constant; empty where there is none.
    pub why: Why,
    /// Details for people.
    pub detail: String,
    /// Revision in the node's journal that it comes from; 0 without one.
    pub node_revision: u64,
    /// Deduplication key: an event whose key exists is skipped.
    pub once: Option<String>,
}

/// Filter of events. Without a field set, all match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only of this team.
    pub team: Option<Team>,
    /// Only of this sandbox.
    pub sandbox: Option<SandboxId>,
}

impl Filter {
    /// Returns true when an event matches.
    pub(super) fn admits(&self, event: &Event) -> bool {
        (self.team.is_none() || self.team == event.team)
            && (self.sandbox.is_none() || self.sandbox == event.sandbox)
    }
}

/// A page of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventPage {
    /// Events with their revisions, in order.
    pub events: Vec<(u64, Event)>,
    /// Revision up to which events that match may be no longer kept; 0: all are kept.
    pub gone: u64,
    /// Revision up to which this page and earlier ones contain all events.
    pub seen: u64,
    /// Whether no event follows this page yet.
    pub whole: bool,
}

/// Reason or cause of an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Why {
    /// A caller asked for it, or the reason is not known.
    #[default]
    Unsaid,
    /// The reason of a failure.
    Reason(Reason),
    /// The cause, where nobody asked for it.
    Cause(Cause),
}

impl Why {
    /// Name in the store. The two enums have no name in common.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unsaid => "",
            Self::Reason(reason) => reason.name(),
            Self::Cause(cause) => cause.name(),
        }
    }

    /// Parses a stored name; one that a later version wrote reads as unsaid.
    pub(super) fn named(name: &str) -> Self {
        let cause = match name {
            "" => return Self::Unsaid,
            // As versions before wrote it.
            "KEPT_TOO_LONG" => Some(Cause::RetentionExceeded),
            name => Cause::named(name),
        };
        match (Reason::named(name), cause) {
            (Some(reason), _) => Self::Reason(reason),
            (None, Some(cause)) => Self::Cause(cause),
            (None, None) => Self::Unsaid,
        }
    }
}

impl From<Reason> for Why {
    fn from(reason: Reason) -> Self {
        if reason == Reason::Unspecified { Self::Unsaid } else { Self::Reason(reason) }
    }
}

impl From<Cause> for Why {
    fn from(cause: Cause) -> Self {
        if cause == Cause::ASKED { Self::Unsaid } else { Self::Cause(cause) }
    }
}

const PREFIX: &str = "EVENT_KIND_";

/// Returns the stored name of a kind.
pub(super) fn kind_name(kind: EventKind) -> &'static str {
    let name = kind.as_str_name();
    name.strip_prefix(PREFIX).unwrap_or(name)
}

/// Parses a stored kind; one that a later version wrote becomes unspecified.
pub(super) fn kind_named(name: &str) -> EventKind {
    EventKind::from_str_name(&format!("{PREFIX}{name}")).unwrap_or_default()
}
