//! Refusals of known callers, so that a token which may do little cannot fill the log. Pure.
//!
//! The first of a kind (token, method, reason) in a minute has an entry of its own. The others are counted,
//! in one entry a minute.

use std::collections::BTreeMap;

use daemon::audit::{Kind, Record};

/// Kinds that are told apart at most; what is beyond is counted without its caller.
const KINDS_MAX: usize = 1024;

/// Token, method and reason.
type Of = (String, String, String);

/// Refusals since the last entries about them.
#[derive(Debug, Default)]
pub(super) struct Refusals(BTreeMap<Of, Counted>);

#[derive(Debug)]
struct Counted {
    /// Refusals that have no entry yet.
    count: u64,
    team: String,
    user: String,
    code: String,
}

/// Decision about a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noted {
    /// Gets an entry of its own.
    Alone,
    /// Counted with others of its kind.
    Counted,
    /// Counted with those of all callers.
    TooMany,
}

impl Refusals {
    /// Notes a refusal.
    pub(super) fn note(&mut self, record: &Record) -> Noted {
        let of = (record.token.clone(), record.method.clone(), record.reason.clone());
        if let Some(known) = self.0.get_mut(&of) {
            known.count += 1;
            return Noted::Counted;
        }
        if self.0.len() >= KINDS_MAX {
            return Noted::TooMany;
        }
        let Record { team, user, code, .. } = record.clone();
        self.0.insert(of, Counted { count: 0, team, user, code });
        Noted::Alone
    }

    /// Returns the entries of what was counted. A kind without any since the last time is forgotten.
    pub(super) fn take(&mut self, now_ms: u64) -> Vec<Record> {
        self.0.retain(|_, counted| counted.count > 0);
        let entry = |((token, method, reason), counted): (&Of, &mut Counted)| Record {
            team: counted.team.clone(),
            token: token.clone(),
            user: counted.user.clone(),
            method: method.clone(),
            code: counted.code.clone(),
            reason: reason.clone(),
            count: std::mem::take(&mut counted.count),
            ..Record::new(Kind::Refused, now_ms)
        };
        self.0.iter_mut().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(token: &str, method: &str) -> Record {
        Record {
            token: token.into(),
            method: method.into(),
            reason: "SCOPE_MISSING".into(),
            ..Record::new(Kind::Call, 1)
        }
    }

    #[test]
    fn refusals_of_a_kind_are_counted_after_the_first() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Alone);
        assert_eq!(refusals.note(&refusal("b", "Exec")), Noted::Alone);
        assert_eq!(refusals.note(&refusal("a", "StatFile")), Noted::Alone);
        for _ in 0..7 {
            assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Counted);
        }
        let entries = refusals.take(9);
        let [entry] = entries.as_slice() else { panic!("{entries:?}") };
        assert_eq!((entry.token.as_str(), entry.method.as_str(), entry.count), ("a", "Exec", 7));
        assert_eq!((entry.kind, entry.at_ms), (Kind::Refused, 9));
        // One that goes on has no entry of its own again; one that paused for a minute has.
        assert_eq!(refusals.note(&refusal("a", "Exec")), Noted::Counted);
        assert_eq!(refusals.note(&refusal("b", "Exec")), Noted::Alone);
        assert_eq!(refusals.take(10).len(), 1);
        assert!(refusals.take(11).is_empty() && refusals.0.is_empty());
    }

    #[test]
    fn kinds_are_bounded() {
        let mut refusals = Refusals::default();
        for number in 0..KINDS_MAX {
            assert_eq!(refusals.note(&refusal(&number.to_string(), "Exec")), Noted::Alone);
        }
        assert_eq!(refusals.note(&refusal("more", "Exec")), Noted::TooMany);
        assert_eq!(refusals.note(&refusal("0", "Exec")), Noted::Counted);
        assert_eq!(refusals.0.len(), KINDS_MAX);
    }
}
