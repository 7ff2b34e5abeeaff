//! The mark: our line in a container's description. It names the owner before the first volume is
//! made (only PVE's `lock: create` is written before it), replicates with pmxcfs and is visible in
//! the GUI. A copy: the journal is the truth.
//!
//! The mark has a line of its own, so that foreign lines of the description survive:
//! `pve-sandbox:v1 id=pvelxc-... vmid=100000 attempt=1 team=acme request=r-1`

use std::{fmt, str::FromStr};

use proto::{
    id::{SandboxId, Vmid},
    name::{RequestId, Team},
};

const HEAD: &str = "pve-sandbox:v1";
/// Prefix of marks of all versions.
const FAMILY: &str = "pve-sandbox:";

/// Identity of a container. Never holds secrets: anyone with VM.Audit can read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// Container that the mark was written for. If it differs from the container's own vmid, the
    /// container is a clone of ours that somebody made: foreign.
    pub vmid: Vmid,
    /// Attempt of the controller.
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

/// Error: the text is not a mark of a known version.
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
            // A repeated key means that somebody edited it; keys of a later version are ignored.
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
    /// True for a line that is a mark of any version.
    pub fn resembles(line: &str) -> bool {
        line.trim_start().starts_with(FAMILY)
    }

    /// Finds the mark in a (decoded) description. `None` when there are two: somebody edited it.
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
        fn finding_a_mark_in_any_text_does_not_panic(text: String) {
            let _ = Mark::find(&text);
        }
    }

    #[test]
    fn two_marks_count_as_none() {
        let mark = mark([0; 10], 100, 1);
        assert_eq!(Mark::find(&format!("{mark}\n{mark}")), None);
        assert_eq!(Mark::find(&format!("{mark} id=x")), None);
        assert_eq!(Mark::find(&format!("{mark} later=1")), Some(mark));
    }
}
