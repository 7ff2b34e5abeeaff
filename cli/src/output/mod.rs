//! Printing: tables and lines for people, JSON for scripts. All output to stdout goes through this
//! module, so that a closed pipe is a handled error and not a panic.

pub mod json;
pub mod table;
pub mod time;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::{
    failure::Failure,
    printable::{self, printable},
};

/// Form of the output.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether to print JSON instead of text.
    pub json: bool,
    /// Whether stdout may have colours.
    pub colour: bool,
}

impl Output {
    /// Allows colours on a terminal, unless NO_COLOR is set.
    pub fn new(json: bool) -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { json, colour: io::stdout().is_terminal() && !no_colour }
    }

    /// Prints a line on stdout, without the characters that a terminal would obey.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn line(self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.styled(printable(text.as_ref()))
    }

    /// Prints text with our own escape sequences, such as a table with colours. Foreign parts must
    /// have gone through [`printable`] before.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn styled(self, text: impl AsRef<str>) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    }

    /// Prints a value as one line of JSON.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn value(self, value: &impl Serialize) -> Result<(), Failure> {
        self.styled(printable::json(value)?)
    }

    /// Prints a note for people on stderr; nothing with --json.
    pub fn note(self, text: impl AsRef<str>) {
        if !self.json {
            // A closed stderr cannot be reported.
            io::stderr().write_all(format!("{}\n", printable(text.as_ref())).as_bytes()).ok();
        }
    }
}
