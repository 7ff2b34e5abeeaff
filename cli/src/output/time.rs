//! Times in the forms for people and scripts.

use jiff::Timestamp;

/// Time in RFC 3339, to the millisecond at most.
pub fn rfc3339(time: Option<prost_types::Timestamp>) -> Option<String> {
    let time = time?;
    let time = Timestamp::new(time.seconds, time.nanos / 1_000_000 * 1_000_000).ok()?;
    Some(time.to_string())
}

/// Parses a time in RFC 3339; `None` for another text.
pub fn parsed(text: &str) -> Option<prost_types::Timestamp> {
    let time: Timestamp = text.parse().ok()?;
    Some(prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() })
}

/// Day and time to the second of a time in RFC 3339: `11-14 22:13:20`.
pub fn day_and_time(rfc3339: &str) -> String {
    rfc3339.get(5..19).unwrap_or(rfc3339).replace('T', " ")
}

/// Present time, for lines of a watch.
pub fn now() -> String {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now).to_string()
}

/// Present time, seconds since 1970.
pub fn now_seconds() -> i64 {
    Timestamp::now().as_second()
}

/// Age in one unit: `12s`, `5m`, `3h`, `2d`.
pub fn age(time: Option<prost_types::Timestamp>) -> String {
    let Some(time) = time else { return "-".into() };
    seconds(Timestamp::now().as_second().saturating_sub(time.seconds).max(0).unsigned_abs())
}

/// Time that is left until then, in one unit; empty when that is not known.
pub fn left(until: Option<prost_types::Timestamp>) -> String {
    let Some(until) = until else { return String::new() };
    match u64::try_from(until.seconds.saturating_sub(Timestamp::now().as_second())) {
        Ok(left) => seconds(left),
        Err(_) => "ended".into(),
    }
}

/// Duration in one unit.
pub fn seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_printed_with_one_unit() {
        let spans = [0, 119, 120, 7_199, 7_200, 172_799, 172_800].map(seconds);
        assert_eq!(spans, ["0s", "119s", "2m", "119m", "2h", "47h", "2d"]);
    }

    #[test]
    fn timestamps_are_rfc_3339() {
        let time = prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 };
        assert_eq!(rfc3339(Some(time)).as_deref(), Some("2023-11-14T22:13:20.123Z"));
        assert_eq!(rfc3339(None), None);
    }
}
