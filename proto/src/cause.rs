//! Names of the values of the enums `Cause` and `Progress`, and questions about a step.

pub use crate::sandbox::v1::{Cause, Progress};

impl Cause {
    /// No cause: a caller requested the change.
    pub const ASKED: Self = Self::Unspecified;

    /// Returns the name in UPPER_SNAKE; empty for [`Cause::ASKED`].
    pub fn name(self) -> &'static str {
        if self == Self::ASKED { "" } else { self.as_str_name().trim_start_matches("CAUSE_") }
    }

    /// Returns the cause with this name; `None` for one of a later version.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::ASKED),
            name => Self::from_str_name(&format!("CAUSE_{name}")).filter(|c| *c != Self::ASKED),
        }
    }
}

impl Progress {
    /// Returns the name in lower case; empty when no step is known.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "",
            Self::Placing => "placing",
            Self::Queued => "queued",
            Self::Clone => "clone",
            Self::Configure => "configure",
            Self::ResizeOffline => "resize_offline",
            Self::Start => "start",
            Self::Resize => "resize",
            Self::Probe => "probe",
            Self::Done => "done",
            Self::Adopt => "adopt",
            Self::Release => "release",
            Self::Export => "export",
            Self::Import => "import",
            Self::Files => "files",
        }
    }

    /// Returns true while a container becomes a sandbox of this node.
    pub const fn is_adopting(self) -> bool {
        matches!(self, Self::Adopt | Self::Import)
    }

    /// Returns true while a clone is under way, which holds PVE's lock on the template.
    pub const fn is_cloning(self) -> bool {
        matches!(self, Self::Clone)
    }

    /// Returns true when the clone is known to exist: a container with the sandbox's vmid must then
    /// be the sandbox's own.
    pub const fn is_past_clone(self) -> bool {
        !matches!(self, Self::Queued | Self::Clone)
    }
}

#[cfg(test)]
mod tests {
    use prost::{Message as _, encoding::string};

    use super::*;
    use crate::sandbox::v1::{Phase, Sandbox};

    #[test]
    fn sandbox_stored_by_an_older_version_is_decoded() {
        let sandbox = Sandbox { id: "a".into(), phase: Phase::Failed.into(), ..Sandbox::default() };
        let mut stored = sandbox.encode_to_vec();
        // The step and the cause were texts, under these numbers.
        string::encode(18, &"done".to_owned(), &mut stored);
        string::encode(20, &"ttl".to_owned(), &mut stored);
        assert_eq!(Sandbox::decode(&stored[..]), Ok(sandbox));
    }

    #[test]
    fn cause_names_round_trip() {
        for cause in (0..).map_while(|number| Cause::try_from(number).ok()) {
            assert_eq!(Cause::named(cause.name()), Some(cause));
        }
        assert_eq!((Cause::Ttl.name(), Cause::ASKED.name()), ("TTL", ""));
        assert_eq!((Cause::named("NEWER"), Cause::named("UNSPECIFIED")), (None, None));
    }
}
