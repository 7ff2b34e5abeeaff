//! Output of a command as JSON for `logs --json`: an object for each line, or for a part of one, with its
//! offset. What is not UTF-8 is base64.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

/// Splits one of the two outputs into objects.
#[derive(Debug)]
pub(crate) struct LogLines {
    stream: &'static str,
    /// Beginning of a character whose rest has not come yet.
    rest: Vec<u8>,
}

impl LogLines {
    /// Begins with the output of this name.
    pub(crate) fn new(stream: &'static str) -> Self {
        Self { stream, rest: Vec::new() }
    }

    /// Objects for bytes that begin at this offset.
    pub(crate) fn take(&mut self, offset: u64, bytes: &[u8]) -> Vec<Value> {
        let mut at = offset.saturating_sub(self.rest.len() as u64);
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(bytes);
        let whole = all.len() - unfinished(&all);
        self.rest = all.split_off(whole);
        let mut values = Vec::new();
        for line in all.split_inclusive(|&byte| byte == b'\n') {
            values.push(self.value(at, line));
            at += line.len() as u64;
        }
        values
    }

    /// Object for what is left at the end, which is no whole character.
    pub(crate) fn end(&mut self, offset: u64) -> Option<Value> {
        let rest = std::mem::take(&mut self.rest);
        let at = offset.saturating_sub(rest.len() as u64);
        (!rest.is_empty()).then(|| self.value(at, &rest))
    }

    fn value(&self, offset: u64, bytes: &[u8]) -> Value {
        let stream = self.stream;
        match std::str::from_utf8(bytes) {
            Ok(text) => json!({ "stream": stream, "offset": offset, "text": text }),
            Err(_) => {
                json!({ "stream": stream, "offset": offset, "base64": STANDARD.encode(bytes) })
            }
        }
    }
}

/// Number of bytes at the end that begin a character.
fn unfinished(bytes: &[u8]) -> usize {
    let last = bytes.utf8_chunks().last();
    let invalid = last.map_or(&[][..], |chunk| chunk.invalid());
    // An error in the middle is an error; at the end it may be a beginning.
    match std::str::from_utf8(invalid) {
        Err(error) if error.error_len().is_none() => invalid.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_parts_of_lines_have_their_offsets() {
        let mut lines = LogLines::new("stdout");
        let told = lines.take(10, b"one\ntwo");
        assert_eq!(told[0], json!({ "stream": "stdout", "offset": 10, "text": "one\n" }));
        assert_eq!(told[1], json!({ "stream": "stdout", "offset": 14, "text": "two" }));
        assert_eq!(lines.take(17, b"\n")[0]["text"], "\n");
    }

    #[test]
    fn character_in_two_parts_is_put_together() {
        let mut lines = LogLines::new("stderr");
        assert_eq!(lines.take(0, &[b'a', 0xc3])[0]["text"], "a");
        let told = lines.take(2, &[0xa4, b'b']);
        assert_eq!((&told[0]["offset"], &told[0]["text"]), (&json!(1), &json!("äb")));
        assert!(lines.take(4, &[0xe2, 0x82]).is_empty());
        let rest = lines.end(6).expect("some is left");
        assert_eq!((&rest["offset"], &rest["base64"]), (&json!(4), &json!("4oI=")));
        assert_eq!(lines.end(6), None);
    }

    #[test]
    fn bytes_that_are_no_text_are_base64() {
        let told = LogLines::new("stdout").take(0, &[0, 0xff, b'\n', b'x']);
        assert_eq!(told[0], json!({ "stream": "stdout", "offset": 0, "base64": "AP8K" }));
        assert_eq!(told[1]["text"], "x");
    }
}
