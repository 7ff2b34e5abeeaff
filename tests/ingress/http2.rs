//! HTTP/2 by hand, one request per connection: the test controls every field, also those that no library sends.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

/// Longest wait for the end of a request.
const DEADLINE: Duration = Duration::from_secs(30);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Kinds of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
/// Flags of frames.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A request: its fields in their order, pseudo-headers among them.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) fields: Vec<(String, String)>,
    /// Body; `None`: the stream ends with its headers.
    pub(crate) body: Option<String>,
    /// Fields after the body.
    pub(crate) trailers: Vec<(String, String)>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// First byte of its headers: the status 200 is 0x88, as the static table has it.
    pub(crate) status: u8,
    pub(crate) body: String,
}

impl Request {
    /// Creates a GET request.
    pub(crate) fn get(authority: &str, path: &str) -> Self {
        let fields =
            [(":method", "GET"), (":scheme", "https"), (":authority", authority), (":path", path)];
        let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { fields, body: None, trailers: Vec::new() }
    }

    /// Adds a field.
    pub(crate) fn add(&mut self, name: &str, value: impl Into<String>) {
        self.fields.push((name.to_owned(), value.into()));
    }

    /// Adds a field in front of all others.
    pub(crate) fn add_first(&mut self, name: &str, value: impl Into<String>) {
        self.fields.insert(0, (name.to_owned(), value.into()));
    }

    /// Removes a field.
    pub(crate) fn remove(&mut self, name: &str) {
        self.fields.retain(|(other, _)| other != name);
    }

    /// Gives a field another value, where it is.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        let own = self.fields.iter_mut().filter(|(other, _)| other == name);
        own.for_each(|(_, own)| own.clone_from(&value));
    }

    /// Returns the value of a field.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    fn bytes(&self) -> Vec<u8> {
        let Self { fields, body, trailers } = self;
        let end = |is_last: bool| if is_last { END_STREAM } else { 0 };
        let (has_body, has_trailers) = (body.is_some(), !trailers.is_empty());
        let mut all = PREFACE.to_vec();
        push_frame(&mut all, SETTINGS, 0, 0, b"");
        let flags = END_HEADERS | end(!has_body && !has_trailers);
        push_frame(&mut all, HEADERS, flags, 1, &block(fields));
        if let Some(body) = body {
            push_frame(&mut all, DATA, end(!has_trailers), 1, body.as_bytes());
        }
        if has_trailers {
            push_frame(&mut all, HEADERS, END_HEADERS | END_STREAM, 1, &block(trailers));
        }
        all
    }

    /// Sends it on a new connection. `None`: the stream or the connection was ended instead of an answer.
    pub(crate) async fn send(&self, stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<Answer> {
        timeout(DEADLINE, self.exchange(stream)).await.expect("an end in time")
    }

    async fn exchange(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<Answer> {
        // The server may end the connection early.
        drop(stream.write_all(&self.bytes()).await);
        drop(stream.flush().await);
        let (mut status, mut body) = (0, Vec::new());
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.ok()?;
            let [a, b, c, kind, flags, ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            stream.read_exact(&mut payload).await.ok()?;
            match kind {
                HEADERS => status = *payload.first()?,
                DATA => body.extend(payload),
                RESET | GOAWAY => return None,
                _ => continue,
            }
            if flags & END_STREAM != 0 {
                return Some(Answer { status, body: String::from_utf8_lossy(&body).into_owned() });
            }
        }
    }
}

fn push_frame(all: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    all.extend_from_slice(&length[1..]);
    all.extend_from_slice(&[kind, flags]);
    all.extend_from_slice(&stream.to_be_bytes());
    all.extend_from_slice(payload);
}

/// Writes fields as literals with new names, which no table changes.
fn block(fields: &[(String, String)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        push_text(&mut block, name);
        push_text(&mut block, value);
    }
    block
}

/// Writes a text without Huffman's code: its length is an integer with a prefix of seven bits.
fn push_text(block: &mut Vec<u8>, text: &str) {
    const PREFIX: usize = 0x7f;
    let mut rest = text.len();
    if rest >= PREFIX {
        block.push(0x7f);
        rest -= PREFIX;
        while rest >= 0x80 {
            block.push(0x80 | u8::try_from(rest % 0x80).expect("seven bits"));
            rest /= 0x80;
        }
    }
    block.push(u8::try_from(rest).expect("seven bits"));
    block.extend_from_slice(text.as_bytes());
}
