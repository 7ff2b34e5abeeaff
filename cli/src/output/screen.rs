//! A table that is drawn again and again on a terminal.

use super::text;

/// Escape sequence that moves to the top left.
const HOME: &str = "\x1b[H";
/// Escape sequence that clears the rest of a line.
const CLEAR_LINE: &str = "\x1b[K";
/// Escape sequence that clears what is below.
const CLEAR_BELOW: &str = "\x1b[J";

/// Frame that replaces the one before it: at most `height` lines, `headings` of which stay in any
/// case. The last line tells how many more there are.
pub fn frame(lines: Vec<String>, headings: usize, height: usize, room: usize) -> String {
    // The cursor stands in the last line.
    let height = height.saturating_sub(1).max(headings + 1);
    let count = lines.len();
    let mut shown: Vec<String> = lines;
    if count > height {
        let kept = height - 1;
        shown.truncate(kept);
        let more = format!("... {} more than the window has room for", count - kept);
        shown.push(text::cut(&more, room));
    }
    let body: String = shown.iter().map(|line| format!("{line}{CLEAR_LINE}\n")).collect();
    format!("{HOME}{body}{CLEAR_BELOW}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_never_scrolls_the_window() {
        for (rows, height) in [(0, 24), (22, 24), (23, 24), (500, 24), (500, 3), (3, 1)] {
            let lines: Vec<_> = (0..=rows).map(|n| format!("row {n}")).collect();
            let frame = frame(lines, 1, height, 80);
            let breaks = frame.matches('\n').count();
            assert!(breaks < height.max(3), "{rows} rows in {height}: {breaks}");
            assert!(frame.contains("row 0"), "the headings stay");
            assert_eq!(frame.contains("more"), rows + 1 > height.saturating_sub(1).max(2));
        }
        let many: Vec<_> = (0..101).map(|n| n.to_string()).collect();
        assert!(frame(many, 1, 12, 80).contains("... 91 more"));
    }
}
