//! Printing: tables and lines for people, JSON for scripts. All output to stdout goes through this
//! module, so that a closed pipe is a handled error and not a panic.

pub mod json;
pub mod layout;
pub mod screen;
pub mod short;
pub mod table;
pub mod text;
pub mod time;

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::{
    failure::Failure,
    printable::{self, printable},
    terminal,
};

/// Form of the output, as `-o` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// All columns with whole values, however long the lines are
    Wide,
    /// JSON, as with --json
    Json,
    /// Ids or names only, one a line
    Name,
}

/// Way to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether to print JSON instead of text.
    pub json: bool,
    /// Whether stdout may have colours.
    pub colour: bool,
    /// Whether to print all columns, with whole values.
    pub wide: bool,
    /// Whether to print names only.
    pub names: bool,
    /// Columns of the terminal; none when stdout is no terminal.
    pub room: Option<usize>,
}

/// Columns of a terminal that does not tell.
const ROOM: usize = 80;

impl Output {
    /// Allows colours on a terminal, unless NO_COLOR is set.
    pub fn new(json: bool, form: Option<Form>) -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let shown = io::stdout().is_terminal();
        let size = terminal::size();
        Self {
            json: json || form == Some(Form::Json),
            colour: shown && !no_colour,
            wide: form == Some(Form::Wide),
            names: form == Some(Form::Name),
            room: shown.then(|| size.map_or(ROOM, |size| size.cols as usize)),
        }
    }

    /// Prints text or JSON without regard to a terminal.
    pub fn plain(json: bool) -> Self {
        Self { json, colour: false, wide: false, names: false, room: None }
    }

    /// Prints a line on stdout, without the characters that a terminal would obey.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn line(self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.styled(printable(text.as_ref()))
    }

    /// Prints a sentence, on a terminal in lines that fit it.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn sentence(self, text: impl AsRef<str>) -> Result<(), Failure> {
        match self.room {
            Some(room) => self.line(text::fold(text.as_ref(), room).join("\n")),
            None => self.line(text),
        }
    }

    /// Prints text with our own escape sequences, such as a table with colours. Foreign parts must
    /// have gone through [`printable`] before.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn styled(self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.raw(format!("{}\n", text.as_ref()))
    }

    /// Prints bytes as they are, for a file.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        Ok(out.flush()?)
    }

    /// Prints text like [`Output::styled`], and leaves the cursor at its end.
    ///
    /// # Errors
    /// When stdout is closed or cannot be written.
    pub fn raw(self, text: impl AsRef<str>) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
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
