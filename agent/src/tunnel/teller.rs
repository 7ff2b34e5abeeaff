//! Tells an operator of each change, made or only planned, and of what is right already.

/// Prints a line for people.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// Teller of changes, done or only planned.
pub(super) struct Teller<'a> {
    say: Say<'a>,
    /// Whether changes are only told.
    pub(super) dry_run: bool,
    /// Number of changes.
    pub(super) changes: usize,
}

impl<'a> Teller<'a> {
    /// Makes one that has told nothing yet.
    pub(super) fn new(say: Say<'a>, dry_run: bool) -> Self {
        Self { say, dry_run, changes: 0 }
    }

    /// Says that something is right already.
    pub(super) fn fine(&mut self, what: &str) {
        (self.say)(&format!("ok     {what}"));
    }

    /// Says something that the operator should know.
    pub(super) fn note(&mut self, what: &str) {
        (self.say)(&format!("note   {what}"));
    }

    /// Says a line as it is.
    pub(super) fn line(&mut self, line: &str) {
        (self.say)(line);
    }

    /// Tells of a change; returns whether it is to be made. It is told before: a failure names the next one.
    pub(super) fn makes(&mut self, what: &str) -> bool {
        self.changes += 1;
        let word = if self.dry_run { "would" } else { "change" };
        (self.say)(&format!("{word:<6} {what}"));
        !self.dry_run
    }
}
