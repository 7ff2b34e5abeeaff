//! Printing: tables and lines for people, JSON for scripts. All that goes to stdout goes through
//! here, so that a closed pipe is an error that is handled and not a panic.

pub mod json;
pub mod table;
pub mod time;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::{
    failure::Failure,
    printable::{self, printable},
};

/// Where and how to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// JSON instead of words.
    pub json: bool,
    /// Colours may be used on stdout.
    pub colour: bool,
}

impl Output {
    /// Colours on a terminal, unless NO_COLOR says no.
    pub fn new(json: bool) -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { json, colour: io::stdout().is_terminal() && !no_colour }
    }

    /// Prints a line on stdout, without what a terminal would obey.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn line(self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.styled(printable(text.as_ref()))
    }

    /// Prints text whose escape sequences are our own, such as a table with colours. Whatever comes
    /// from elsewhere has gone through [`printable`] before it was put in.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn styled(self, text: impl AsRef<str>) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    }

    /// A value as one line of JSON.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn value(self, value: &impl Serialize) -> Result<(), Failure> {
        self.styled(printable::json(value)?)
    }

    /// Something for people beside the result, on stderr; nothing with --json.
    pub fn note(self, text: impl AsRef<str>) {
        if !self.json {
            // Nobody is left to tell when stderr is closed.
            io::stderr().write_all(format!("{}\n", printable(text.as_ref())).as_bytes()).ok();
        }
    }
}
