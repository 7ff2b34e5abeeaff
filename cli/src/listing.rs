//! Lists: the flags that all verbs with a table take, and the printing of the table, as JSON or as
//! names.

use clap::Args;
use serde::Serialize;

use crate::{
    failure::Failure,
    output::{
        Output, screen,
        table::{Table, View},
    },
    terminal,
};

/// Columns and rows of a terminal that does not tell.
const WINDOW: (usize, usize) = (80, 24);

/// Flags for the columns of a table.
#[derive(Debug, Default, Clone, Args)]
pub(crate) struct Shown {
    /// Columns to show, in this order, such as id,phase; an unknown name lists all there are
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "List")]
    pub(crate) columns: Vec<String>,
    /// Leave out the headings
    #[arg(long, help_heading = "List")]
    pub(crate) no_headers: bool,
}

impl Shown {
    /// Way to show a table with these flags.
    pub(crate) fn view(&self, output: Output) -> View {
        View {
            room: output.room.filter(|_| !output.wide),
            extra: output.wide,
            colour: output.colour,
            bare: self.no_headers,
            columns: self.columns.clone(),
        }
    }
}

/// Flags of a list.
#[derive(Debug, Default, Clone, Args)]
pub(crate) struct Listing {
    /// Flags for the columns.
    #[command(flatten)]
    pub(crate) shown: Shown,
    /// Sort by this column; -COLUMN for the opposite order
    #[arg(long, value_name = "COLUMN", allow_hyphen_values = true, help_heading = "List")]
    pub(crate) sort: Option<String>,
}

impl Listing {
    /// Prints a list in the form that was asked for; `values` are its rows as JSON. A table without
    /// rows is the note `empty`.
    ///
    /// # Errors
    /// When a column is not known, or stdout cannot be written.
    pub(crate) fn print<T: Serialize>(
        &self,
        output: Output,
        mut table: Table,
        values: &[T],
        empty: &str,
    ) -> Result<(), Failure> {
        if output.json {
            let order = match &self.sort {
                Some(by) => table.order(by)?,
                None => (0..values.len()).collect(),
            };
            return output
                .value(&order.iter().filter_map(|&at| values.get(at)).collect::<Vec<_>>());
        }
        if let Some(by) = &self.sort {
            table.sort(by)?;
        }
        if output.names {
            return table.names().try_for_each(|name| output.line(name));
        }
        if table.is_empty() {
            output.note(empty);
            return Ok(());
        }
        output.styled(table.lines(&self.shown.view(output))?.join("\n"))
    }

    /// Draws a list over the one before it, on a terminal.
    ///
    /// # Errors
    /// When a column is not known, or stdout cannot be written.
    pub(crate) fn draw(&self, output: Output, mut table: Table) -> Result<(), Failure> {
        // The window may have changed.
        let size = terminal::size();
        let (room, height) = size.map_or(WINDOW, |size| (size.cols as usize, size.rows as usize));
        if let Some(by) = &self.sort {
            table.sort(by)?;
        }
        let view = View { room: Some(room), ..self.shown.view(output) };
        let headings = usize::from(!view.bare);
        output.raw(screen::frame(table.lines(&view)?, headings, height, room))
    }
}

/// Prints a table that is a part of the text of a verb.
///
/// # Errors
/// When stdout cannot be written.
pub(crate) fn table(output: Output, table: Table) -> Result<(), Failure> {
    output.styled(table.lines(&Shown::default().view(output))?.join("\n"))
}
