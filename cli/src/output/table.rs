//! Tables for people. Plain columns without borders: they can be read, grepped and cut.

use comfy_table::{Attribute, Cell, CellAlignment, Color, Table, presets};
use proto::sandbox::v1::Phase;

use super::{Output, json};
use crate::printable::one_line;

/// Creates a table with these headings.
pub fn new(output: Output, headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let heading = |text: &&str| {
        let cell = Cell::new(text);
        if output.colour { cell.add_attribute(Attribute::Bold) } else { cell }
    };
    table.set_header(headings.iter().map(heading));
    table
}

/// Table as text, without blanks at the ends of lines.
pub fn text(table: &Table) -> String {
    let lines = table.lines().map(|line| line.trim_end().to_owned());
    lines.collect::<Vec<_>>().join("\n")
}

/// Cell with text, or with a dash if it is empty.
pub fn cell(text: impl AsRef<str>) -> Cell {
    let text = one_line(text.as_ref());
    Cell::new(if text.is_empty() { "-".to_owned() } else { text })
}

/// Cell with a right-aligned number.
pub fn number(value: impl std::fmt::Display) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

/// Cell with a colour, if colours are allowed.
pub fn coloured(output: Output, text: impl AsRef<str>, colour: Color) -> Cell {
    let cell = cell(text);
    if output.colour { cell.fg(colour) } else { cell }
}

/// Cell with a phase, and the step of a creation.
pub fn phase(output: Output, phase: Phase, step: &str) -> Cell {
    let colour = match phase {
        Phase::Running => Color::Green,
        Phase::Creating | Phase::Starting | Phase::Stopping | Phase::Deleting => Color::Yellow,
        Phase::Paused => Color::Blue,
        Phase::Failed | Phase::Unreachable => Color::Red,
        Phase::Unspecified | Phase::Stopped | Phase::Deleted => Color::Grey,
    };
    let name = json::phase(phase);
    let text = if phase == Phase::Creating && !step.is_empty() {
        format!("{name} ({step})")
    } else {
        name.to_owned()
    };
    coloured(output, text, colour)
}

const BAR: usize = 10;

/// Cell with a share of 0 to 1 as a bar with percent.
pub fn bar(output: Output, share: f64) -> Cell {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let full = (share * BAR as f64).round() as usize;
    let text = format!("{}{} {:>3.0} %", "█".repeat(full), "░".repeat(BAR - full), share * 100.0);
    let colour = match share {
        share if share >= 0.9 => Color::Red,
        share if share >= 0.7 => Color::Yellow,
        _ => Color::Green,
    };
    coloured(output, text, colour)
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

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Output = Output { json: false, colour: false };

    #[test]
    fn bars_are_of_one_length_whatever_is_reported() {
        for share in [0.0, 0.04, 0.5, 1.0, 7.0, -1.0, f64::NAN, f64::INFINITY] {
            let text = bar(PLAIN, share).content();
            assert_eq!(text.chars().count(), BAR + 6, "{text}");
        }
    }

    #[test]
    fn tables_have_no_borders_and_nothing_that_steers_a_terminal() {
        let mut table = new(PLAIN, &["ID", "NOTE"]);
        table.add_row([cell("a"), cell("\x1b[2J\nx")]);
        assert_eq!(text(&table), " ID  NOTE\n a   \u{fffd}[2J x");
    }
}
