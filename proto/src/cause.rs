//! Names of the enums `Cause` and `Progress`.

pub use crate::sandbox::v1::{Cause, Progress};

impl Cause {
    /// Somebody asked for the change.
    pub const ASKED: Self = Self::Unspecified;

    /// The name, UPPER_SNAKE; empty for [`Cause::ASKED`].
    pub fn name(self) -> &'static str {
        if self == Self::ASKED { "" } else { self.as_str_name().trim_start_matches("CAUSE_") }
    }

    /// The cause of this name; `None` for one that is newer than this program.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::ASKED),
            name => Self::from_str_name(&format!("CAUSE_{name}")).filter(|c| *c != Self::ASKED),
        }
    }
}

impl Progress {
    /// The name in lower case; empty when no step is known.
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
        }
    }

    /// True while a container becomes a sandbox of this node.
    pub const fn is_adopting(self) -> bool {
        matches!(self, Self::Adopt | Self::Import)
    }

    /// True while a clone is under way, which holds PVE's lock on the template.
    pub const fn is_cloning(self) -> bool {
        matches!(self, Self::Clone)
    }

    /// True when the clone is known to have been made: what stands under the vmid must be ours.
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
    fn a_sandbox_that_an_older_version_stored_is_still_read() {
        let sandbox = Sandbox { id: "a".into(), phase: Phase::Failed.into(), ..Sandbox::default() };
        let mut stored = sandbox.encode_to_vec();
        // The step and the cause were texts, under these numbers.
        string::encode(18, &"done".to_owned(), &mut stored);
        string::encode(20, &"ttl".to_owned(), &mut stored);
        assert_eq!(Sandbox::decode(&stored[..]), Ok(sandbox));
    }

    #[test]
    fn names_of_causes_go_there_and_back() {
        for cause in (0..).map_while(|number| Cause::try_from(number).ok()) {
            assert_eq!(Cause::named(cause.name()), Some(cause));
        }
        assert_eq!((Cause::Ttl.name(), Cause::ASKED.name()), ("TTL", ""));
        assert_eq!((Cause::named("NEWER"), Cause::named("UNSPECIFIED")), (None, None));
    }
}
