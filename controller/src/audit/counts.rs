//! Calls that are counted and not told one by one, so that nobody fills the log. Pure.
//!
//! Those of a kind (token, method, code, reason) are counted, in one entry a minute. Refusals have the first of a
//! kind in an entry of its own.

use std::collections::BTreeMap;

use daemon::audit::{Kind, Record};

/// Kinds that are told apart at most; what is beyond is counted without its caller.
const KINDS_MAX: usize = 1024;
/// Kinds of one team that are told apart at most; what is beyond is counted for the team alone. So no team takes the
/// kinds of the others, and one that does all it can adds few entries a minute.
const TEAM_KINDS_MAX: usize = 32;

/// Kind of calls. Those that are not told apart have empty fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Of {
    // The first, so that the kinds of a team stand side by side.
    team: String,
    token: String,
    method: String,
    code: String,
    reason: String,
}

impl Of {
    fn record(record: &Record) -> Self {
        let Record { team, token, method, code, reason, .. } = record.clone();
        Self { team, token, method, code, reason }
    }

    fn team(team: &str) -> Self {
        Self { team: team.to_owned(), ..Self::default() }
    }
}

/// Calls of one kind.
#[derive(Debug, Default)]
struct Counted {
    /// Calls that have no entry yet.
    count: u64,
    user: String,
}

/// Calls since the last entries about them.
#[derive(Debug, Default)]
pub(super) struct Counts(BTreeMap<Of, Counted>);

/// Decision about a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noted {
    /// Gets an entry of its own.
    Alone,
    /// Counted with others.
    Counted,
}

impl Counts {
    /// Notes a refusal: the first of its kind is not counted.
    pub(super) fn note(&mut self, record: &Record) -> Noted {
        let of = Of::record(record);
        if self.0.contains_key(&of) || !self.has_room(&of.team) {
            self.count(record);
            return Noted::Counted;
        }
        self.0.insert(of, Counted { count: 0, user: record.user.clone() });
        Noted::Alone
    }

    /// Counts a call.
    pub(super) fn count(&mut self, record: &Record) {
        let mut of = Of::record(record);
        if !self.0.contains_key(&of) && !self.has_room(&of.team) {
            of = Of::team(&of.team);
            if !self.0.contains_key(&of) && self.0.len() >= KINDS_MAX {
                of = Of::default();
            }
        }
        let told_apart = !of.token.is_empty();
        let counted = self.0.entry(of).or_default();
        counted.count += 1;
        if told_apart {
            counted.user.clone_from(&record.user);
        }
    }

    /// Returns true when one more kind of this team can be told apart.
    fn has_room(&self, team: &str) -> bool {
        let of_team = self.0.range(Of::team(team)..).take_while(|(of, _)| of.team == team);
        self.0.len() < KINDS_MAX && of_team.take(TEAM_KINDS_MAX).count() < TEAM_KINDS_MAX
    }

    /// Returns the entries of what was counted. A kind of calls without any since the last time is forgotten.
    pub(super) fn take(&mut self, kind: Kind, now_ms: u64) -> Vec<Record> {
        self.0.retain(|_, counted| counted.count > 0);
        let entry = |(of, counted): (&Of, &mut Counted)| Record {
            team: of.team.clone(),
            token: of.token.clone(),
            user: counted.user.clone(),
            method: of.method.clone(),
            code: of.code.clone(),
            reason: of.reason.clone(),
            count: std::mem::take(&mut counted.count),
            ..Record::new(kind, now_ms)
        };
        self.0.iter_mut().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(token: &str, method: &str) -> Record {
        Record {
            team: "red".into(),
            token: token.into(),
            method: method.into(),
            reason: "SCOPE_MISSING".into(),
            ..Record::new(Kind::Call, 1)
        }
    }

    #[test]
    fn refusals_of_a_kind_are_counted_after_the_first() {
        let mut refusals = Counts::default();
        assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Alone);
        assert_eq!(refusals.note(&refusal("b", "Exec")), Noted::Alone);
        assert_eq!(refusals.note(&refusal("a", "StatFile")), Noted::Alone);
        for _ in 0..7 {
            assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Counted);
        }
        let entries = refusals.take(Kind::Refused, 9);
        let [entry] = entries.as_slice() else { panic!("{entries:?}") };
        assert_eq!((entry.token.as_str(), entry.method.as_str(), entry.count), ("a", "Exec", 7));
        assert_eq!((entry.kind, entry.at_ms), (Kind::Refused, 9));
        // One that goes on has no entry of its own again; one that paused for a minute has.
        assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Counted);
        assert_eq!(refusals.note(&refusal("b", "Exec")), Noted::Alone);
        assert_eq!(refusals.take(Kind::Refused, 10).len(), 1);
        assert!(refusals.take(Kind::Refused, 11).is_empty() && refusals.0.is_empty());
    }

    #[test]
    fn outcomes_of_one_method_are_told_apart() {
        let mut counts = Counts::default();
        let ended = |code: &str| Record {
            code: code.into(),
            reason: String::new(),
            user: "ada".into(),
            ..refusal("a", "StatFile")
        };
        counts.count(&ended("OK"));
        counts.count(&ended("CANCELLED"));
        counts.count(&ended("OK"));
        let told: Vec<_> = counts
            .take(Kind::Counted, 9)
            .into_iter()
            .map(|e| (e.kind, e.code, e.user, e.count))
            .collect();
        let one = |code: &str, count| (Kind::Counted, code.to_owned(), "ada".to_owned(), count);
        assert_eq!(told, [one("CANCELLED", 1), one("OK", 2)]);
    }

    #[test]
    fn kinds_of_a_team_are_bounded_and_take_none_from_another() {
        let mut refusals = Counts::default();
        for number in 0..TEAM_KINDS_MAX {
            assert_eq!(refusals.note(&refusal(&number.to_string(), "Exec")), Noted::Alone);
        }
        for number in 0..100 {
            assert_eq!(refusals.note(&refusal(&format!("more-{number}"), "Exec")), Noted::Counted);
        }
        let blue = Record { team: "blue".into(), ..refusal("a", "Exec") };
        assert_eq!(refusals.note(&blue), Noted::Alone);
        let entries = refusals.take(Kind::Refused, 9);
        let [rest] = entries.as_slice() else { panic!("{entries:?}") };
        let Record { team, token, method, count, .. } = rest;
        assert_eq!((team.as_str(), token.as_str(), method.as_str(), *count), ("red", "", "", 100));
    }

    #[test]
    fn all_kinds_are_bounded_and_nothing_is_left_uncounted() {
        let mut refusals = Counts::default();
        let teams = 2 * KINDS_MAX;
        for team in 0..teams {
            let team = format!("t{team}");
            for token in ["a", "a", "b"] {
                refusals.note(&Record { team: team.clone(), ..refusal(token, "Exec") });
            }
            assert!(refusals.0.len() <= KINDS_MAX + 1);
        }
        let alone = KINDS_MAX as u64;
        let counted: u64 = refusals.take(Kind::Refused, 9).iter().map(|entry| entry.count).sum();
        assert_eq!(alone + counted, 3 * teams as u64);
    }
}
