//! Reasons of errors: their names in `ErrorInfo` and their gRPC codes. docs/errors.md lists each
//! with its remedy.

use tonic::Code;

pub use crate::sandbox::v1::Reason;

/// Value of `ErrorInfo.domain` in every error of this product.
pub const DOMAIN: &str = "pve-sandbox";

/// Largest number of a reason; not all below it are in use.
const NUMBERS_MAX: i32 = 127;

/// Prefix of each name in the enum's definition, which the style guide of protobuf requires.
const PREFIX: &str = "REASON_";

impl Reason {
    /// Returns every reason except UNSPECIFIED, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (1..=NUMBERS_MAX).filter_map(|number| Self::try_from(number).ok())
    }

    /// Returns the name for `ErrorInfo.reason`, in UPPER_SNAKE.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches(PREFIX)
    }

    /// Returns the reason with this name; `None` for one of a later version.
    pub fn named(name: &str) -> Option<Self> {
        Self::from_str_name(&format!("{PREFIX}{name}"))
            .filter(|reason| *reason != Self::Unspecified)
    }

    /// Returns the gRPC code that every error with this reason has.
    pub const fn code(self) -> Code {
        match self {
            Self::FieldInvalid => Code::InvalidArgument,
            Self::TokenInvalid => Code::Unauthenticated,
            Self::ScopeMissing | Self::EgressRefused | Self::PortDenied => Code::PermissionDenied,
            Self::SandboxNotFound
            | Self::SnapshotNotFound
            | Self::ServiceNotFound
            | Self::NodeNotFound
            | Self::ExecNotFound
            | Self::TokenNotFound
            | Self::FileNotFound => Code::NotFound,
            Self::RequestIdReused
            | Self::SandboxKnown
            | Self::ServiceExists
            | Self::NameTaken
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
            | Self::NodeRevoked
            | Self::ContainerGone
            | Self::SandboxPaused
            | Self::FreezeFailed
            | Self::NeverFits
            | Self::MemoryInUse
            | Self::EnvLost
            | Self::AccessKind
            | Self::VisibilityUnsupported
            | Self::NotListening
            | Self::ForwardRefused
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
            | Self::QuotaExceeded
            | Self::RateExceeded
            | Self::TooLarge => Code::ResourceExhausted,
            Self::EventsGone => Code::OutOfRange,
            Self::StaleEpoch | Self::RevisionConflict | Self::ExecLost | Self::ForwardLost => {
                Code::Aborted
            }
            Self::NodeUnreachable
            | Self::NoQuorum
            | Self::ContainerLocked
            | Self::IsolationFailed
            | Self::LimitsFailed
            | Self::ShuttingDown => Code::Unavailable,
            Self::OutcomeUnknown | Self::ProbeTimeout => Code::DeadlineExceeded,
            Self::Unspecified
            | Self::PctFailed
            | Self::ExecFailed
            | Self::StoreFailed
            | Self::Invariant => Code::Internal,
        }
    }

    /// Returns true for a reason with which the same call may succeed later.
    pub fn is_temporary(self) -> bool {
        matches!(self.code(), Code::Unavailable | Code::ResourceExhausted)
            && !matches!(self, Self::TooLarge | Self::QuotaExceeded)
    }

    /// Returns true for a reason with which a node only refuses a creation: nothing was made, and
    /// another node, or this one later, may accept it. Every other reason is a failure of the
    /// creation.
    pub const fn is_node_refusal(self) -> bool {
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
                | Self::IsolationFailed
                | Self::SnapshotNotFound
        )
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Serialization of a reason in a record by its name. An unknown name is read as UNSPECIFIED.
pub mod by_name {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Reason;

    /// Writes the name of a reason.
    ///
    /// # Errors
    /// When the serializer fails.
    pub fn serialize<S: Serializer>(reason: &Reason, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(reason.name())
    }

    /// Reads a reason by its name.
    ///
    /// # Errors
    /// When the value is not a text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Reason, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Ok(Reason::named(&name).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_names_round_trip() {
        for reason in Reason::all() {
            assert_eq!(Reason::named(reason.name()), Some(reason));
        }
        assert_eq!(
            Reason::all().last(),
            Some(Reason::NodeRevoked),
            "none is larger than NUMBERS_MAX"
        );
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
