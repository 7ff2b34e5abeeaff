//! Findings of the commands `doctor` and `check-config`: one shape, one form for people and one for
//! programs. `certificate` checks a certificate and its files, `reach` asks what listens at an address.

pub mod certificate;
pub mod reach;
mod render;

use serde::Serialize;

/// Columns of the form for people.
pub const ROOM: usize = 80;

/// Verdict of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is to be done.
    Ok,
    /// Something will fail later, or could not be looked at.
    Warning,
    /// Something does not work now.
    Failed,
}

impl State {
    /// Returns the word for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Name of the check, such as `certificate`; it stays the same.
    pub name: &'static str,
    /// Object that was looked at: a file, an address, a name.
    pub subject: String,
    /// Verdict.
    pub state: State,
    /// Observation, one sentence.
    pub found: String,
    /// Command or edit that mends it; none where nothing is to be done.
    pub remedy: Option<String>,
}

impl Check {
    /// Makes a check that found nothing wrong.
    pub fn ok(name: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        let (subject, found) = (subject.into(), found.into());
        Self { name, subject, state: State::Ok, found, remedy: None }
    }

    /// Makes a check that found what will fail later.
    pub fn warning(
        name: &'static str,
        subject: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { state: State::Warning, remedy, ..Self::ok(name, subject, found) }
    }

    /// Makes a check that found what does not work.
    pub fn failed(
        name: &'static str,
        subject: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { state: State::Failed, remedy, ..Self::ok(name, subject, found) }
    }
}

/// Results of all checks, in the order in which they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Results.
    pub checks: Vec<Check>,
}

impl Report {
    /// Makes a report.
    pub fn new(checks: Vec<Check>) -> Self {
        Self { checks }
    }

    /// Returns true when a check has failed.
    pub fn has_failed(&self) -> bool {
        self.count(State::Failed) > 0
    }

    /// Returns the checks that found something.
    pub fn findings(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.state != State::Ok)
    }

    /// Counts the checks with a verdict.
    pub fn count(&self, state: State) -> usize {
        self.checks.iter().filter(|check| check.state == state).count()
    }

    /// Returns the form for people: a line for each check and the remedy below it, in lines of [`ROOM`]
    /// columns.
    pub fn text(&self) -> String {
        render::text(self)
    }

    /// Returns the form for programs: one object in JSON, whose fields stay the same.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "failed": self.count(State::Failed),
            "warnings": self.count(State::Warning),
            "checks": self.checks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_in_json_has_stable_fields() {
        let report = Report::new(vec![
            Check::ok("clock", "NTP", "it is synchronised"),
            Check::failed("quorum", "pve1", "there is none", "pvecm status"),
        ]);
        assert!(report.has_failed() && report.findings().count() == 1);
        let expected = serde_json::json!({
            "failed": 1, "warnings": 0, "checks": [
                { "name": "clock", "subject": "NTP", "state": "ok", "found": "it is synchronised",
                  "remedy": null },
                { "name": "quorum", "subject": "pve1", "state": "failed", "found": "there is none",
                  "remedy": "pvecm status" },
            ],
        });
        assert_eq!(report.json(), expected);
    }
}
