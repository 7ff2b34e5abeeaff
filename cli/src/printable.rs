//! Makes foreign text safe to print: names, metadata, command lines and messages come from tenants,
//! and a terminal obeys some characters instead of showing them.

use std::{fmt::Write as _, io};

use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};

/// Replacement for a character that would control the terminal or be invisible.
const REPLACEMENT: char = '\u{fffd}';

/// Replaces characters that a terminal would obey or hide: control characters, marks that reorder
/// text, and characters without width. Keeps line feeds and tabs.
pub fn printable(text: &str) -> String {
    let keep = |c: char| matches!(c, '\n' | '\t') || !is_hidden(c);
    text.chars().map(|c| if keep(c) { c } else { REPLACEMENT }).collect()
}

/// Like [`printable`], on one line.
pub fn one_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], " ")
}

/// True for a character that a terminal does not show as itself. The ranges are the control
/// characters, the line separators, and Unicode's `Default_Ignorable_Code_Point`
/// (DerivedCoreProperties.txt), which contains all marks of the bidirectional algorithm.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}'
            | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Writes a value as JSON on one line with every hidden character escaped: a parser reads the same
/// text, and a terminal obeys none of it.
///
/// # Errors
/// When the value cannot be written as JSON.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, EscapeHidden))?;
    String::from_utf8(bytes).map_err(|error| serde_json::Error::io(io::Error::other(error)))
}

/// Breaks JSON on one line into indented lines.
pub fn indented(json: &str) -> String {
    let mut text = String::with_capacity(json.len() * 2);
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    let mut chars = json.chars().peekable();
    while let Some(c) = chars.next() {
        if quoted {
            text.push(c);
            (quoted, escaped) = (escaped || c != '"', !escaped && c == '\\');
            continue;
        }
        let broken = |text: &mut String, depth: usize| {
            text.push('\n');
            text.extend(std::iter::repeat_n("  ", depth));
        };
        match c {
            '{' | '[' if matches!(chars.peek(), Some('}' | ']')) => {
                text.push(c);
                text.extend(chars.next());
            }
            '{' | '[' => {
                depth += 1;
                text.push(c);
                broken(&mut text, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                broken(&mut text, depth);
                text.push(c);
            }
            ',' => {
                text.push(c);
                broken(&mut text, depth);
            }
            ':' => text.push_str(": "),
            _ => {
                quoted = c == '"';
                text.push(c);
            }
        }
    }
    text
}

struct EscapeHidden;

impl Formatter for EscapeHidden {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: io::Write + ?Sized,
    {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_hidden(*c)) {
            writer.write_all(&rest.as_bytes()[..at])?;
            let mut escaped = String::new();
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(escaped, "\\u{unit:04x}").map_err(io::Error::other)?;
            }
            writer.write_all(escaped.as_bytes())?;
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()>
    where
        W: io::Write + ?Sized,
    {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_in_any_language_stays_as_it_is() {
        for text in ["naïve café", "日本語", "العربية", "हिन्दी", "🚀 done", "a\tb\nc"]
        {
            assert_eq!(printable(text), text);
            assert_eq!(
                serde_json::from_str::<String>(&json(&text).expect("JSON")).expect("JSON"),
                text
            );
        }
    }

    #[test]
    fn hidden_characters_are_replaced() {
        for text in [
            "\u{1b}[2J",
            "\r",
            "\u{7f}",
            "\u{9b}",
            "\u{200b}",
            "\u{200d}",
            "\u{202e}",
            "\u{2066}",
            "\u{feff}",
            "\u{ad}",
            "\u{2028}",
            "\u{e0041}",
            "\u{61c}",
            "\u{3164}",
            "\u{fe0f}",
        ] {
            let shown = printable(text);
            assert!(shown.starts_with(REPLACEMENT), "{:?} is shown as {shown:?}", text);
        }
        assert_eq!(one_line("a\nb\tc\u{202e}d"), "a b c\u{fffd}d");
    }

    #[test]
    fn indented_json_has_a_value_on_each_line() {
        let json = r#"{"a":[1,{"b":"x,{}: \\\"y"}],"c":{},"d":[]}"#;
        let expected = "{\n  \"a\": [\n    1,\n    {\n      \"b\": \"x,{}: \\\\\\\"y\"\n    }\n  ],\n  \"c\": {},\n  \"d\": []\n}";
        assert_eq!(indented(json), expected);
    }

    proptest! {
        #[test]
        fn indented_json_is_the_same_value(text in any::<String>(), other in "[\\\\\",{}:\\[\\]]{0,20}") {
            let value = serde_json::json!({ "a": [text, { "b": other }], "c": {} });
            let shown = indented(&json(&value).expect("JSON"));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), value);
        }

        #[test]
        fn hidden_characters_are_not_printed_and_json_reads_back_the_same(text in any::<String>()) {
            prop_assert!(!one_line(&text).chars().any(is_hidden));
            let json = json(&text).expect("JSON");
            prop_assert!(!json.chars().any(is_hidden), "{:?}", json);
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), text);
        }
    }
}
