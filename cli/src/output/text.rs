//! Widths of text on a terminal: measuring, cutting, padding and folding.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Mark at the end of text that was cut.
const CUT: char = '…';

/// Number of columns that the text takes on a terminal.
pub fn width(text: &str) -> usize {
    text.width()
}

/// Cuts the text to at most `room` columns; what was cut ends with `…`.
pub fn cut(text: &str, room: usize) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    let Some(room) = room.checked_sub(1) else { return String::new() };
    let end = fitting(text, room);
    let mut kept = text[..end].trim_end().to_owned();
    kept.push(CUT);
    kept
}

/// Number of bytes of the longest beginning that takes at most `room` columns.
fn fitting(text: &str, room: usize) -> usize {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += c.width().unwrap_or(0);
        if used > room {
            return at;
        }
    }
    text.len()
}

/// Pads the text with blanks, on the left for numbers.
pub fn pad(text: &str, room: usize, right: bool) -> String {
    let blanks = " ".repeat(room.saturating_sub(width(text)));
    if right { format!("{blanks}{text}") } else { format!("{text}{blanks}") }
}

/// Breaks the text into lines of at most `room` columns, between words where that is possible.
pub fn fold(text: &str, room: usize) -> Vec<String> {
    let room = room.max(1);
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word = word;
        let line = lines.last_mut().expect("never empty");
        let gap = usize::from(!line.is_empty());
        if width(line) + gap + width(word) <= room {
            line.push_str(if gap == 1 { " " } else { "" });
            line.push_str(word);
            continue;
        }
        if !line.is_empty() {
            lines.push(String::new());
        }
        while width(word) > room {
            // A character may be wider than the room.
            let first = word.chars().next().map_or(0, char::len_utf8);
            let end = fitting(word, room).max(first);
            lines.last_mut().expect("never empty").push_str(&word[..end]);
            lines.push(String::new());
            word = &word[end..];
        }
        lines.last_mut().expect("never empty").push_str(word);
    }
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cut_and_folded_text_fits(words in "[a-zé日🚀 ]{0,60}", room in 2_usize..30) {
            prop_assert!(width(&cut(&words, room)) <= room);
            for line in fold(&words, room) {
                prop_assert!(width(&line) <= room, "{:?}", line);
            }
            let all: String = fold(&words, room).concat().replace(' ', "");
            prop_assert_eq!(all, words.replace(' ', ""));
        }
    }

    #[test]
    fn text_is_cut_with_a_mark_and_padded_by_columns() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("日本語", 4), "日…");
        assert_eq!(pad("日", 4, false), "日  ");
        assert_eq!(pad("7", 3, true), "  7");
        assert_eq!(fold("one two three", 7), ["one two", "three"]);
        assert_eq!(fold("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
    }
}
