//! Shares of the teams in the audit log. Pure.
//!
//! Only what is younger than the least age counts: the rest goes when the log is too large. A team may add entries
//! while it has written fewer bytes than are free, so one team alone gets half of the log, and two get a third each.
//! The bytes that an earlier process has written are nobody's, and not free: a restart gives a team room, never all.

use std::collections::BTreeMap;

/// Bytes that each team has written, by segment.
#[derive(Debug, Default)]
pub(super) struct TeamBytes {
    /// By the first line of the segment.
    segments: BTreeMap<u64, BTreeMap<String, u64>>,
    total: BTreeMap<String, u64>,
}

impl TeamBytes {
    /// Adds what teams have written to the segment with this first line.
    pub(super) fn add(&mut self, segment: u64, written: BTreeMap<String, u64>) {
        for (team, bytes) in written {
            *self.total.entry(team.clone()).or_default() += bytes;
            *self.segments.entry(segment).or_default().entry(team).or_default() += bytes;
        }
    }

    /// Forgets the segments before the one with this first line.
    pub(super) fn forget_before(&mut self, segment: u64) {
        let kept = self.segments.split_off(&segment);
        for (team, bytes) in std::mem::replace(&mut self.segments, kept).into_values().flatten() {
            if let Some(total) = self.total.get_mut(&team) {
                *total = total.saturating_sub(bytes);
                if *total == 0 {
                    self.total.remove(&team);
                }
            }
        }
    }

    /// Returns the bytes of a team.
    pub(super) fn of(&self, team: &str) -> u64 {
        self.total.get(team).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_of_a_team_are_those_of_the_segments_that_are_not_forgotten(
            writes in prop::collection::vec((1_u64..9, 0_u8..3, 1_u64..100), 0..60),
            before in 0_u64..10,
        ) {
            let mut bytes = TeamBytes::default();
            for (segment, team, written) in &writes {
                bytes.add(*segment, [(team.to_string(), *written)].into());
            }
            bytes.forget_before(before);
            for team in 0..3_u8 {
                let kept = writes.iter().filter(|(segment, of, _)| *of == team && *segment >= before);
                let kept: u64 = kept.map(|(.., written)| written).sum();
                prop_assert_eq!(bytes.of(&team.to_string()), kept);
            }
            bytes.forget_before(u64::MAX);
            prop_assert!(bytes.total.is_empty() && bytes.segments.is_empty());
        }
    }
}
