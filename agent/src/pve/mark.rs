//! The mark: our block in a container's description. It names the owner from the first write of
//! the config on, replicates with pmxcfs and is seen in the GUI. A copy: the journal is the truth.
//!
//! One line of its own, so that foreign lines of the description survive:
//! `pve-sandbox:v1 id=pvelxc-... vmid=100000 attempt=1 team=acme request=r-1`

use std::{fmt, str::FromStr};

use proto::{
    id::{SandboxId, Vmid},
    name::{RequestId, Team},
};

const HEAD: &str = "pve-sandbox:v1";
/// What marks of all versions begin with.
const FAMILY: &str = "pve-sandbox:";

/// Who a container is. Holds identity, never secrets: anyone with VM.Audit can read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// The container that the mark was written for. Another number than the container's own means
    /// that somebody cloned ours: foreign.
    pub vmid: Vmid,
    /// The controller's try.
    pub attempt: u32,
    /// Owner.
    pub team: Team,
    /// The owner's idempotency key.
    pub request_id: RequestId,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sandbox_id, vmid, attempt, team, request_id } = self;
        write!(
            f,
            "{HEAD} id={sandbox_id} vmid={vmid} attempt={attempt} team={team} request={request_id}"
        )
    }
}

/// The text is no mark of a version that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a mark")]
pub struct NotAMark;

impl FromStr for Mark {
    type Err = NotAMark;

    fn from_str(line: &str) -> Result<Self, NotAMark> {
        let mut words = line.split(' ');
        if words.next() != Some(HEAD) {
            return Err(NotAMark);
        }
        let mut fields = std::collections::BTreeMap::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or(NotAMark)?;
            // Twice the same key is somebody's edit; keys of a later version are passed over.
            if fields.insert(key, value).is_some() {
                return Err(NotAMark);
            }
        }
        let field = |key| fields.get(key).copied().ok_or(NotAMark);
        Ok(Self {
            sandbox_id: field("id")?.parse().map_err(|_| NotAMark)?,
            vmid: field("vmid")?.parse().map_err(|_| NotAMark)?,
            attempt: field("attempt")?.parse().map_err(|_| NotAMark)?,
            team: field("team")?.parse().map_err(|_| NotAMark)?,
            request_id: field("request")?.parse().map_err(|_| NotAMark)?,
        })
    }
}

impl Mark {
    /// True for a line that is a mark, or would be one for another version.
    pub fn resembles(line: &str) -> bool {
        line.trim_start().starts_with(FAMILY)
    }

    /// The mark in a (decoded) description. Two marks are none: somebody edited it.
    pub fn find(description: &str) -> Option<Self> {
        let mut marks = description.lines().filter_map(|line| line.parse().ok());
        let mark = marks.next()?;
        marks.next().is_none().then_some(mark)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mark(random: [u8; 10], vmid: u32, attempt: u32) -> Mark {
        Mark {
            sandbox_id: SandboxId::new(1_700_000_000_000, &random),
            vmid: Vmid::try_from(vmid).expect("in range"),
            attempt,
            team: "acme".parse().expect("valid"),
            request_id: "r-1".parse().expect("valid"),
        }
    }

    proptest! {
        #[test]
        fn a_mark_is_found_among_foreign_lines(
            random: [u8; 10], vmid in 100u32..999_999_999, attempt: u32, foreign in "[^\r]{0,60}",
        ) {
            prop_assume!(!foreign.contains(HEAD));
            let mark = mark(random, vmid, attempt);
            prop_assert_eq!(Mark::find(&format!("{foreign}\n{mark}\n{foreign}\n")), Some(mark));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = Mark::find(&text);
        }
    }

    #[test]
    fn two_marks_are_none() {
        let mark = mark([0; 10], 100, 1);
        assert_eq!(Mark::find(&format!("{mark}\n{mark}")), None);
        assert_eq!(Mark::find(&format!("{mark} id=x")), None);
        assert_eq!(Mark::find(&format!("{mark} later=1")), Some(mark));
    }
}
