//! The percent encoding of descriptions.

use std::fmt::Write as _;

/// Encodes one line of a description as in the file: control characters, `%`, `:` and every byte
/// outside ASCII become `%XX`.
#[must_use]
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if !(0x20..0x7f).contains(&byte) || byte == b'%' || byte == b':' {
            // Writing to a String cannot fail.
            crate::failure::ignore(write!(out, "%{byte:02X}"));
        } else {
            out.push(char::from(byte));
        }
    }
    out
}

/// Decodes an encoded line; a `%` that starts no code stays.
#[must_use]
pub fn decode(line: &str) -> String {
    let bytes = line.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'%').then(|| line.get(at + 1..at + 3)).flatten();
        match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_encoded_as_recorded() {
        assert_eq!(encode("line2: x=1 % # äö"), "line2%3A x=1 %25 # %C3%A4%C3%B6");
        assert_eq!(encode("\ttab & <b>"), "%09tab & <b>");
        assert_eq!(encode(r#"{"k":"v"}"#), r#"{"k"%3A"v"}"#);
    }

    #[test]
    fn description_encoding_round_trips() {
        for text in ["", "a%zz", "100%", "äöü 🙂", "{\"id\":\"x\"}", "\u{7f}\u{1}"] {
            assert_eq!(decode(&encode(text)), text);
        }
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%é"), "%é");
    }
}
