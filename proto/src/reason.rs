//! Reasons of errors: their names on the wire and their gRPC codes. docs/errors.md lists each with
//! the remedy.

use tonic::Code;

pub use crate::sandbox::v1::Reason;

/// `ErrorInfo.domain` of every error of ours.
pub const DOMAIN: &str = "pve-sandbox";

/// Prefix of each name in the enum's definition, as required by protobuf's style.
const PREFIX: &str = "REASON_";

impl Reason {
    /// Every reason but UNSPECIFIED, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (1..).map_while(|number| Self::try_from(number).ok())
    }

    /// The name that `ErrorInfo.reason` carries, UPPER_SNAKE.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches(PREFIX)
    }

    /// The reason of this name; `None` for one that is newer than this program.
    pub fn named(name: &str) -> Option<Self> {
        Self::from_str_name(&format!("{PREFIX}{name}"))
            .filter(|reason| *reason != Self::Unspecified)
    }

    /// The gRPC code that every error of this reason has.
    pub const fn code(self) -> Code {
        match self {
            Self::FieldInvalid => Code::InvalidArgument,
            Self::TokenInvalid => Code::Unauthenticated,
            Self::ScopeMissing => Code::PermissionDenied,
            Self::SandboxNotFound
            | Self::SnapshotNotFound
            | Self::ServiceNotFound
            | Self::NodeNotFound
            | Self::ExecNotFound
            | Self::FileNotFound => Code::NotFound,
            Self::RequestIdReused
            | Self::SandboxKnown
            | Self::ServiceExists
            | Self::ExecIdReused => Code::AlreadyExists,
            Self::SandboxNotRunning
            | Self::SandboxDeleted
            | Self::SandboxBusy
            | Self::CreateCancelled
            | Self::NotOurs
            | Self::ContainerUnfit
            | Self::AddressConflict
            | Self::DhcpRefused
            | Self::NotAdopted
            | Self::NotMovable
            | Self::NodeInUse
            | Self::ContainerGone
            | Self::SandboxPaused
            | Self::FreezeFailed
            | Self::FileRefused => Code::FailedPrecondition,
            Self::NoCapacity
            | Self::NodeCordoned
            | Self::NodeNumberChanged
            | Self::StorageFull
            | Self::MemoryFull
            | Self::QueueFull
            | Self::VmidsExhausted
            | Self::AddressesExhausted
            | Self::TooManyCalls
            | Self::TooLarge => Code::ResourceExhausted,
            Self::EventsGone => Code::OutOfRange,
            Self::StaleEpoch | Self::RevisionConflict | Self::ExecLost => Code::Aborted,
            Self::NodeUnreachable | Self::NoQuorum | Self::ContainerLocked | Self::ShuttingDown => {
                Code::Unavailable
            }
            Self::OutcomeUnknown | Self::ProbeTimeout => Code::DeadlineExceeded,
            Self::Unspecified
            | Self::PctFailed
            | Self::ExecFailed
            | Self::StoreFailed
            | Self::Invariant => Code::Internal,
        }
    }

    /// True when a node refuses a creation for this reason: nothing was made, and another node, or
    /// this one later, may accept it. Every other reason is a failure of the creation.
    pub const fn is_not_here_not_now(self) -> bool {
        matches!(
            self,
            Self::NoCapacity
                | Self::NodeCordoned
                | Self::NodeNumberChanged
                | Self::StorageFull
                | Self::MemoryFull
                | Self::QueueFull
                | Self::VmidsExhausted
                | Self::AddressesExhausted
                | Self::DhcpRefused
                | Self::TooManyCalls
                | Self::SandboxBusy
                | Self::NoQuorum
                | Self::NodeUnreachable
                | Self::NodeNotFound
                | Self::ShuttingDown
                | Self::SnapshotNotFound
        )
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Serializes a reason in a record by its name: an unknown name becomes UNSPECIFIED.
pub mod by_name {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Reason;

    /// Writes the name.
    ///
    /// # Errors
    /// When the serializer fails.
    pub fn serialize<S: Serializer>(reason: &Reason, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(reason.name())
    }

    /// Reads a name.
    ///
    /// # Errors
    /// When it is no text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Reason, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Ok(Reason::named(&name).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for reason in Reason::all() {
            assert_eq!(Reason::named(reason.name()), Some(reason));
        }
        assert_eq!(Reason::all().last(), Some(Reason::Invariant), "their numbers have no gap");
        assert_eq!((Reason::named("UNSPECIFIED"), Reason::named("")), (None, None));
    }

    #[test]
    fn only_faults_of_ours_are_internal() {
        let internal: Vec<_> = Reason::all()
            .filter(|reason| reason.code() == Code::Internal)
            .map(Reason::name)
            .collect();
        assert_eq!(internal, ["PCT_FAILED", "EXEC_FAILED", "STORE_FAILED", "INVARIANT"]);
    }
}
