//! Types of argument values.

use std::{path::PathBuf, str::FromStr, time::Duration};

/// `K=V`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Before the first `=`.
    pub key: String,
    /// After it.
    pub value: String,
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("must be KEY=VALUE".into()),
        }
    }
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here(PathBuf),
    /// In a sandbox.
    Sandbox {
        /// Any form of its name.
        id: String,
        /// Absolute path.
        path: String,
    },
    /// Our stdin or stdout.
    Stream,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some((id, path)) if !id.is_empty() && !id.contains(['/', '.']) => {
                if !path.starts_with('/') {
                    return Err("the path in the sandbox must be absolute: ID:/path".into());
                }
                Ok(Self::Sandbox { id: id.to_owned(), path: path.to_owned() })
            }
            _ if text == "-" => Ok(Self::Stream),
            _ if text.is_empty() => Err("must not be empty".into()),
            _ => Ok(Self::Here(text.into())),
        }
    }
}

/// `TERM`, `SIGTERM` or `15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalNumber(pub u32);

impl FromStr for SignalNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            let ok = (1..=31).contains(&number);
            return ok.then_some(Self(number)).ok_or_else(|| "must be 1 to 31".into());
        }
        let name = text.to_ascii_uppercase();
        let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
        let signal: nix::sys::signal::Signal =
            name.parse().map_err(|_| "must be a signal, such as TERM, KILL, HUP or 9")?;
        Ok(Self((signal as i32).unsigned_abs()))
    }
}

/// `NAME=PORT` or `PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Empty: the controller names it after the port.
    pub name: String,
    /// Port inside the sandbox.
    pub port: u32,
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, port) = text.split_once('=').unwrap_or(("", text));
        let port = port.parse().ok().filter(|port| (1..=65535).contains(port));
        let port = port.ok_or("must be NAME=PORT or PORT, with a port of 1 to 65535")?;
        Ok(Self { name: name.to_owned(), port })
    }
}

/// `on` or `off`.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("must be on or off".into()),
    }
}

/// A time, or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// For ever.
    Never,
    /// So long.
    Time(Duration),
}

/// A time with days, or `never`.
pub(super) fn span(text: &str) -> Result<Span, String> {
    if text == "never" {
        return Ok(Span::Never);
    }
    let days = text.strip_suffix('d').map(|days| days.parse::<u64>().ok());
    let time = match days {
        Some(days) => days.filter(|&days| (1..=36_500).contains(&days)).map(|d| d * 24 * 3600),
        None => return duration(text).map(Span::Time).map_err(|_| SPAN.into()),
    };
    time.map(|seconds| Span::Time(Duration::from_secs(seconds))).ok_or_else(|| SPAN.into())
}

/// A time with days.
pub(super) fn age(text: &str) -> Result<Duration, String> {
    match span(text)? {
        Span::Time(time) => Ok(time),
        Span::Never => Err("must be a time such as 12h or 14d".into()),
    }
}

const SPAN: &str = "must be a time such as 90s, 30m, 12h or 7d, or `never`";

/// `30`, `30s`, `5m`, `2h`, `500ms`: seconds unless a unit is given.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let (number, unit) = (digits.parse::<u64>(), &text[digits.len()..]);
    let ms = match unit {
        "ms" => Some(1),
        "" | "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    number
        .ok()
        .zip(ms)
        .and_then(|(number, ms)| number.checked_mul(ms))
        .filter(|&ms| ms > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| "must be a time such as 500ms, 30s, 5m or 2h".into())
}
