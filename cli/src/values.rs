//! Values of arguments that several verbs take.

use std::{fmt, str::FromStr, time::Duration};

use proto::secret::HIDDEN;

/// `K=V`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Before the first `=`.
    pub(crate) key: String,
    /// After it.
    pub(crate) value: String,
}

/// The value is not shown: it may be a secret.
impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={HIDDEN}", self.key)
    }
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

/// `K=V`, or `K` alone for the value that it has here: such a value is in no command line, which others
/// on this machine can read.
pub(crate) fn variable(text: &str) -> Result<Pair, String> {
    if text.is_empty() || text.contains('=') {
        return text.parse();
    }
    match std::env::var_os(text).map(std::ffi::OsString::into_string) {
        Some(Ok(value)) => Ok(Pair { key: text.to_owned(), value }),
        Some(Err(_)) => Err("its value here is no UTF-8".into()),
        None => Err("must be KEY=VALUE, or the KEY of a variable that is set here".into()),
    }
}

/// A time, or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// For ever.
    Never,
    /// So long.
    Time(Duration),
}

/// A time with days, or `never`.
pub(crate) fn span(text: &str) -> Result<Span, String> {
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
pub(crate) fn age(text: &str) -> Result<Duration, String> {
    match span(text)? {
        Span::Time(time) => Ok(time),
        Span::Never => Err("must be a time such as 12h or 14d".into()),
    }
}

const SPAN: &str = "must be a time such as 90s, 30m, 12h or 7d, or `never`";

/// `30`, `30s`, `5m`, `2h`, `500ms`: seconds unless a unit is given.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
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

/// As `duration`, or 0.
pub(crate) fn duration_or_zero(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { duration(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_without_a_value_has_the_one_that_is_set_here() {
        let pair = |key: &str, value: &str| Pair { key: key.into(), value: value.into() };
        assert_eq!(variable("A=b=c"), Ok(pair("A", "b=c")));
        assert_eq!(variable("A="), Ok(pair("A", "")));
        let here = variable("PATH").expect("it is set");
        assert!(!here.value.is_empty() && !format!("{here:?}").contains(&here.value), "{here:?}");
        for wrong in ["", "=b", "NOT_SET_ANYWHERE_5E1F"] {
            assert!(variable(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_parsed_with_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        for wrong in ["", "s", "0", "-1s", "1x", "99999999999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
