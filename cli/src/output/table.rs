//! Tables for people: plain columns without borders, which can be read, grepped and cut. On a
//! terminal a row takes one line; elsewhere every value is printed in full.

use std::cmp::Ordering;

use proto::sandbox::v1::Phase;

use super::{
    json,
    layout::{self, Column, Shown},
    short, text, time,
};
use crate::{failure::Failure, printable::one_line};

/// Colour of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Broken.
    Red,
    /// All is well.
    Green,
    /// Under way, or soon full.
    Yellow,
    /// At rest.
    Blue,
    /// Over.
    Grey,
}

impl Colour {
    fn code(self) -> u8 {
        match self {
            Self::Red => 31,
            Self::Green => 32,
            Self::Yellow => 33,
            Self::Blue => 34,
            Self::Grey => 90,
        }
    }
}

/// Value in a table.
#[derive(Debug, Clone)]
pub struct Cell {
    /// Whole value, on one line.
    text: String,
    /// Form for a column that is too narrow.
    short: Option<String>,
    colour: Option<Colour>,
    /// Number that rows are sorted by; none: by the text.
    number: Option<f64>,
}

impl Cell {
    /// Sets the form for a column that is too narrow.
    #[must_use]
    pub fn short(mut self, text: impl Into<String>) -> Self {
        self.short = Some(text.into());
        self
    }

    /// Sets the colour.
    #[must_use]
    pub fn colour(mut self, colour: Colour) -> Self {
        self.colour = Some(colour);
        self
    }

    /// Sets the number that rows are sorted by.
    #[must_use]
    pub fn number(mut self, number: f64) -> Self {
        self.number = Some(number);
        self
    }

    /// Form that fits a column of this width.
    fn fitting(&self, room: usize) -> String {
        match &self.short {
            Some(short) if text::width(&self.text) > room => text::cut(short, room),
            _ => text::cut(&self.text, room),
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        match (self.number, other.number) {
            (Some(a), Some(b)) => a.total_cmp(&b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => self.text.cmp(&other.text),
        }
    }
}

/// Cell with text, or with a dash if it is empty.
pub fn cell(text: impl AsRef<str>) -> Cell {
    let text = one_line(text.as_ref());
    let text = if text.is_empty() { "-".to_owned() } else { text };
    Cell { text, short: None, colour: None, number: None }
}

/// Cell with a number.
pub fn number(value: u64) -> Cell {
    cell(value.to_string()).number(value as f64)
}

/// Cell with a vmid, or with a dash if there is none.
pub fn vmid(vmid: u32) -> Cell {
    if vmid == 0 { cell("") } else { number(vmid.into()) }
}

/// Cell with a number of bytes in GiB or MiB.
pub fn size(value: u64) -> Cell {
    cell(bytes(value)).number(value as f64)
}

/// Cell with the time since an event, in one unit.
pub fn age(since: Option<prost_types::Timestamp>) -> Cell {
    let age = cell(time::age(since));
    // The younger come first.
    match since {
        Some(since) => age.number(-(since.seconds as f64)),
        None => age,
    }
}

/// Cell with a phase, and the step of a creation.
pub fn phase(phase: Phase, step: &str) -> Cell {
    let colour = match phase {
        Phase::Running => Colour::Green,
        Phase::Creating | Phase::Starting | Phase::Stopping | Phase::Deleting => Colour::Yellow,
        Phase::Paused => Colour::Blue,
        Phase::Failed | Phase::Unreachable => Colour::Red,
        Phase::Unspecified | Phase::Stopped | Phase::Deleted => Colour::Grey,
    };
    let name = json::phase(phase);
    let whole = match step {
        step if phase == Phase::Creating && !step.is_empty() => format!("{name} ({step})"),
        _ => name.to_owned(),
    };
    cell(whole).short(name).colour(colour)
}

const BAR: usize = 10;

/// Cell with a share of 0 to 1 as a bar with percent.
pub fn bar(share: f64) -> Cell {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let full = (share * BAR as f64).round() as usize;
    let percent = format!("{:>3.0} %", share * 100.0);
    let whole = format!("{}{} {percent}", "█".repeat(full), "░".repeat(BAR - full));
    let colour = match share {
        share if share >= 0.9 => Colour::Red,
        share if share >= 0.7 => Colour::Yellow,
        _ => Colour::Green,
    };
    cell(whole).short(percent).colour(colour).number(share)
}

/// Bytes in GiB or MiB.
pub fn bytes(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes >= 10 * 1024 * MIB {
        format!("{} GiB", bytes / (1024 * MIB))
    } else if bytes >= 1024 * MIB {
        format!("{:.1} GiB", bytes as f64 / (1024 * MIB) as f64)
    } else {
        format!("{} MiB", bytes / MIB)
    }
}

/// Way to show a table.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Columns of the terminal that a row must fit; none prints every value in full.
    pub room: Option<usize>,
    /// Whether to show the extra columns, too.
    pub extra: bool,
    /// Whether to print colours.
    pub colour: bool,
    /// Whether to leave out the headings.
    pub bare: bool,
    /// Names of the columns to show; empty: the usual ones.
    pub columns: Vec<String>,
}

impl View {
    /// Places of the columns to show.
    ///
    /// # Errors
    /// When there is no column of a name.
    fn chosen(&self, columns: &[Column]) -> Result<Vec<usize>, Failure> {
        if self.columns.is_empty() {
            let usual = |at: &usize| self.extra || !columns[*at].is_extra();
            return Ok((0..columns.len()).filter(usual).collect());
        }
        self.columns.iter().map(|name| place(columns, name)).collect()
    }
}

/// Finds a column by its name.
fn place(columns: &[Column], name: &str) -> Result<usize, Failure> {
    let wanted = name.trim().to_lowercase();
    columns.iter().position(|column| column.name() == wanted).ok_or_else(|| {
        let names: Vec<_> = columns.iter().map(Column::name).collect();
        Failure::usage(
            format!("there is no column {name:?}"),
            format!("the columns are {}", names.join(", ")),
        )
    })
}

/// Table with its rows.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// Creates a table without rows.
    pub fn new(columns: &[Column]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, with a cell for each column.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// Places of the rows in the order of a column; `-NAME` is the opposite order.
    ///
    /// # Errors
    /// When there is no such column.
    pub fn order(&self, by: &str) -> Result<Vec<usize>, Failure> {
        let (name, reverse) = by.strip_prefix('-').map_or((by, false), |name| (name, true));
        let column = place(&self.columns, name)?;
        let mut order: Vec<_> = (0..self.rows.len()).collect();
        order.sort_by(|a, b| {
            let order = self.rows[*a][column].compare(&self.rows[*b][column]);
            if reverse { order.reverse() } else { order }
        });
        Ok(order)
    }

    /// Sorts the rows by a column.
    ///
    /// # Errors
    /// When there is no such column.
    pub fn sort(&mut self, by: &str) -> Result<(), Failure> {
        let order = self.order(by)?;
        self.rows = order.iter().map(|&at| self.rows[at].clone()).collect();
        Ok(())
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whole values of the first column, which names the rows.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().filter_map(|row| row.first()).map(|cell| cell.text.as_str())
    }

    /// Lines of the table, the headings first.
    ///
    /// # Errors
    /// When the view names a column that there is not.
    pub fn lines(mut self, view: &View) -> Result<Vec<String>, Failure> {
        if view.room.is_some() {
            self.shorten_ids();
        }
        let naturals = self.naturals();
        let named = !view.columns.is_empty();
        let lines = Lines::new(&self.columns, &naturals, view, named)?;
        let heading = (!view.bare).then(|| lines.heading());
        let rows = self.rows.iter().flat_map(|row| lines.row(row));
        Ok(heading.into_iter().chain(rows).collect())
    }

    fn shorten_ids(&mut self) {
        for (at, column) in self.columns.iter().enumerate() {
            let Some(part) = column.id_part() else { continue };
            let ids: Vec<_> = self.rows.iter().map(|row| row[at].text.clone()).collect();
            for (row, short) in self.rows.iter_mut().zip(short::shorten(&ids, part)) {
                row[at].text = short;
            }
        }
    }

    /// Widths of the whole values and headings.
    fn naturals(&self) -> Vec<usize> {
        let of = |at: usize| {
            let values = self.rows.iter().map(|row| text::width(&row[at].text));
            values.chain([text::width(self.columns[at].heading)]).max().unwrap_or(0)
        };
        (0..self.columns.len()).map(of).collect()
    }
}

/// Lines of a table whose widths are known, also before its rows are.
#[derive(Debug)]
pub struct Lines {
    columns: Vec<Column>,
    shown: Vec<Shown>,
    /// Whether values are cut to their columns.
    fitted: bool,
    colour: bool,
}

impl Lines {
    /// Chooses the columns and their widths; `naturals` are the widths of whole values. Columns that
    /// the user has `named` are never dropped.
    ///
    /// # Errors
    /// When the view names a column that there is not.
    pub fn new(
        columns: &[Column],
        naturals: &[usize],
        view: &View,
        named: bool,
    ) -> Result<Self, Failure> {
        let chosen = view.chosen(columns)?;
        let shown = match view.room {
            Some(room) => layout::fit(columns, &chosen, naturals, room, named),
            None => chosen.iter().map(|&at| Shown { at, width: naturals[at] }).collect(),
        };
        let columns = columns.to_vec();
        Ok(Self { columns, shown, fitted: view.room.is_some(), colour: view.colour })
    }

    /// Line of the headings.
    pub fn heading(&self) -> String {
        let cells = self.shown.iter().enumerate().map(|(place, shown)| {
            let column = &self.columns[shown.at];
            let heading = match self.fitted {
                true => text::cut(column.heading, shown.width),
                false => column.heading.to_owned(),
            };
            self.padded(place, &heading, self.colour.then_some(1))
        });
        layout::join(&cells.collect::<Vec<_>>())
    }

    /// Lines of a row: one, or more where a value goes on.
    pub fn row(&self, cells: &[Cell]) -> Vec<String> {
        let mut columns: Vec<Vec<String>> = Vec::new();
        for shown in &self.shown {
            let cell = &cells[shown.at];
            columns.push(if !self.fitted {
                vec![cell.text.clone()]
            } else if self.columns[shown.at].folds() {
                text::fold(&cell.text, shown.width)
            } else {
                vec![cell.fitting(shown.width)]
            });
        }
        let height = columns.iter().map(Vec::len).max().unwrap_or(0);
        let line = |number: usize| {
            let cells = columns.iter().enumerate().map(|(place, values)| {
                let value = values.get(number).map_or("", String::as_str);
                let colour = cells[self.shown[place].at].colour.filter(|_| self.colour);
                self.padded(place, value, colour.map(Colour::code))
            });
            layout::join(&cells.collect::<Vec<_>>())
        };
        (0..height).map(line).collect()
    }

    /// Value padded to the width of its column, with an attribute of the terminal.
    fn padded(&self, place: usize, value: &str, attribute: Option<u8>) -> String {
        let Shown { at, width } = self.shown[place];
        let padded = text::pad(value, width, self.columns[at].is_right());
        match attribute {
            Some(code) if !value.is_empty() => {
                padded.replacen(value, &format!("\x1b[{code}m{value}\x1b[0m"), 1)
            }
            _ => padded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::layout::Fit, *};

    fn table() -> Table {
        let columns = [
            Column::new("ID"),
            Column::new("SIZE").rank(1).right(),
            Column::new("NOTE").fit(Fit::Fold(8)),
            Column::new("MORE").extra(),
        ];
        let mut table = Table::new(&columns);
        table.row(vec![cell("b"), size(1 << 40), cell("a long note of five words"), cell("x")]);
        table.row(vec![cell("a"), size(1 << 20), cell("\x1b[2J\ny"), cell("")]);
        table
    }

    fn text(view: &View) -> String {
        table().lines(view).expect("known columns").join("\n")
    }

    #[test]
    fn values_are_whole_where_there_is_no_terminal() {
        let expected = "ID      SIZE  NOTE\nb   1024 GiB  a long note of five words\n\
                        a      1 MiB  \u{fffd}[2J y";
        assert_eq!(text(&View::default()), expected);
        let wide = text(&View { extra: true, ..View::default() });
        assert!(wide.contains("five words  x"), "{wide}");
    }

    #[test]
    fn values_go_on_in_further_lines_of_their_column() {
        let expected = "ID      SIZE  NOTE\nb   1024 GiB  a long note\n              of five\n              words\n\
                        a      1 MiB  \u{fffd}[2J y";
        assert_eq!(text(&View { room: Some(25), ..View::default() }), expected);
        let narrow = text(&View { room: Some(12), bare: true, ..View::default() });
        assert_eq!(narrow, "b   a long\n    note of\n    five\n    words\na   \u{fffd}[2J y");
    }

    #[test]
    fn columns_are_chosen_and_rows_sorted_by_name() {
        let mut table = table();
        table.sort("-id").expect("a column");
        assert_eq!(table.names().collect::<Vec<_>>(), ["b", "a"]);
        table.sort("size").expect("a column");
        assert_eq!(table.names().collect::<Vec<_>>(), ["a", "b"], "by the number of bytes");
        let view = View { columns: vec!["more".into(), "Id".into()], ..View::default() };
        assert_eq!(text(&view), "MORE  ID\nx     b\n-     a");
        let wrong = View { columns: vec!["color".into()], ..View::default() };
        let failure = self::table().lines(&wrong).expect_err("unknown").to_string();
        assert!(failure.contains("the columns are id, size, note, more"), "{failure}");
    }

    #[test]
    fn bars_have_one_length_for_any_value() {
        for share in [0.0, 0.04, 0.5, 1.0, 7.0, -1.0, f64::NAN, f64::INFINITY] {
            let text = bar(share).text;
            assert_eq!(text.chars().count(), BAR + 6, "{text}");
        }
    }

    #[test]
    fn colours_do_not_change_the_widths() {
        let plain = text(&View { room: Some(40), ..View::default() });
        let coloured = text(&View { room: Some(40), colour: true, ..View::default() });
        assert!(coloured.starts_with("\x1b[1mID\x1b[0m"), "{coloured:?}");
        assert_eq!(coloured.replace("\x1b[1m", "").replace("\x1b[0m", ""), plain);
    }
}
