//! The log of events, as it is stored.

use proto::{
    Cause, Reason,
    id::SandboxId,
    name::{NodeName, Team},
    sandbox::v1::EventKind,
};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When the controller learned of it.
    pub at_ms: u64,
    /// Sandbox that it is about.
    pub sandbox: Option<SandboxId>,
    /// Owner of the sandbox.
    pub team: Option<Team>,
    /// Where it happened.
    pub node: Option<NodeName>,
    /// What happened.
    pub kind: EventKind,
    /// Who wanted it.
    pub actor: String,
    /// Why it happened.
    pub why: Why,
    /// A sentence.
    pub detail: String,
    /// The node's journal revision that says so; 0 when no journal does.
    pub node_revision: u64,
    /// Its name among all events: what is said again under the same name is not written twice.
    pub once: Option<String>,
}

/// Which events are looked at. Nothing set: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this team.
    pub team: Option<Team>,
    /// Of this sandbox.
    pub sandbox: Option<SandboxId>,
}

impl Filter {
    /// Whether an event is to be seen.
    pub(super) fn admits(&self, event: &Event) -> bool {
        (self.team.is_none() || self.team == event.team)
            && (self.sandbox.is_none() || self.sandbox == event.sandbox)
    }
}

/// A page of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventPage {
    /// With their revisions, in order.
    pub events: Vec<(u64, Event)>,
    /// Events up to this revision are not kept any more; 0: all are.
    pub gone: u64,
    /// Everything up to here is in this page or in those before.
    pub seen: u64,
    /// There is nothing behind this page yet.
    pub whole: bool,
}

/// Why something happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Why {
    /// Somebody asked for it, or nobody says why.
    #[default]
    Unsaid,
    /// The reason of a failure.
    Reason(Reason),
    /// What led to it without anybody asking.
    Cause(Cause),
}

impl Why {
    /// How it is stored: a name of either enum; they have none in common.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unsaid => "",
            Self::Reason(reason) => reason.name(),
            Self::Cause(cause) => cause.name(),
        }
    }

    /// By its name; one that a later version wrote reads as unsaid.
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
        Self::Reason(reason)
    }
}

impl From<Cause> for Why {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::ASKED => Self::Unsaid,
            cause => Self::Cause(cause),
        }
    }
}

const PREFIX: &str = "EVENT_KIND_";

/// How a kind is stored.
pub(super) fn kind_name(kind: EventKind) -> &'static str {
    let name = kind.as_str_name();
    name.strip_prefix(PREFIX).unwrap_or(name)
}

/// A kind by its name; one that a later version wrote reads as unspecified.
pub(super) fn kind_named(name: &str) -> EventKind {
    EventKind::from_str_name(&format!("{PREFIX}{name}")).unwrap_or_default()
}
