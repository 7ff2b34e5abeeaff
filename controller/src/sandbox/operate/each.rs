//! Sandboxes of a call that changes many of them: the end of each is told on its own, for the audit log.

use proto::name::Team;

use crate::sandbox::{Error, Result};

/// Outcome for one of the sandboxes.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The change is made.
    Done,
    /// The change is refused, or failed.
    Failed(&'a Error),
    /// The call was given up meanwhile; what it had begun goes on.
    Unknown,
}

/// Hears the id of a sandbox, its team and the outcome.
pub type Witness<'a> = &'a (dyn Fn(&str, &Team, Outcome<'_>) + Send + Sync);

/// One of the sandboxes, from before its change on.
pub(super) struct Each<'a> {
    witness: Witness<'a>,
    id: String,
    team: Team,
    told: bool,
}

impl<'a> Each<'a> {
    pub(super) fn new(witness: Witness<'a>, id: String, team: Team) -> Self {
        Self { witness, id, team, told: false }
    }

    /// Tells the outcome.
    pub(super) fn end<T>(mut self, done: &Result<T>) {
        self.told = true;
        let outcome = match done {
            Ok(_) => Outcome::Done,
            Err(error) => Outcome::Failed(error),
        };
        (self.witness)(&self.id, &self.team, outcome);
    }
}

impl Drop for Each<'_> {
    fn drop(&mut self) {
        if !self.told {
            (self.witness)(&self.id, &self.team, Outcome::Unknown);
        }
    }
}

#[cfg(test)]
mod tests {
    use daemon::sync::Mutex;
    use proto::Reason;

    use super::*;

    #[test]
    fn every_sandbox_is_told_once_also_when_the_call_is_given_up() {
        let told = Mutex::new(Vec::new());
        let witness = |id: &str, team: &Team, outcome: Outcome<'_>| {
            let outcome = match outcome {
                Outcome::Done => "done".to_owned(),
                Outcome::Failed(error) => error.reason.name().to_owned(),
                Outcome::Unknown => "unknown".to_owned(),
            };
            told.lock().push(format!("{id} {team} {outcome}"));
        };
        let each = |id: &str| Each::new(&witness, id.to_owned(), "red".parse().expect("team"));
        each("a").end(&Ok(()));
        each("b").end::<()>(&Err(Error::new(Reason::NodeUnreachable, "away")));
        drop(each("c"));
        assert_eq!(*told.lock(), ["a red done", "b red NODE_UNREACHABLE", "c red unknown"]);
    }
}
