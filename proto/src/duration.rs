//! Durations in messages. Callers choose the two numbers; the conversion of `prost_types` overflows
//! for some of them.

use std::time::Duration;

use crate::id::Invalid;

/// Converts a duration of a message; `None` when it is negative.
pub fn read(duration: prost_types::Duration) -> Option<Duration> {
    let (seconds, nanos) = (duration.seconds.try_into().ok()?, duration.nanos.try_into().ok()?);
    Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanos))
}

/// Parses a time of one unit, such as `90s`, `30m`, `12h` or `7d`; `None` for 0, and for any other
/// text.
pub fn parse(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<u64>().ok().filter(|&number| digits && number > 0)?;
    number.checked_mul(seconds).map(Duration::from_secs)
}

/// Converts a duration of a request; `None` when there is none.
///
/// # Errors
/// When it is negative. The error names `field`.
pub fn check(
    field: &'static str,
    asked: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Invalid> {
    let checked = |asked| read(asked).ok_or_else(|| Invalid::new(field, "must not be negative"));
    asked.map(checked).transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_two_numbers_are_a_duration_or_refused(seconds: i64, nanos: i32) {
            let read = read(prost_types::Duration { seconds, nanos });
            prop_assert_eq!(read.is_some(), seconds >= 0 && nanos >= 0);
        }
    }

    #[test]
    fn times_of_one_unit_are_parsed() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(parse(text), Some(Duration::from_secs(seconds)));
        }
        for text in ["", "s", "0s", "5", "+5s", "-5s", "1.5h", "5 s", "5ä", "99999999999999999d"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn extreme_durations_do_not_overflow() {
        let of = |seconds, nanos| read(prost_types::Duration { seconds, nanos });
        assert_eq!(of(1, 5), Some(Duration::new(1, 5)));
        assert!(of(i64::MAX, i32::MAX).is_some());
        for (seconds, nanos) in [(-1, 0), (0, -1), (i64::MIN, 0), (i64::MIN, i32::MIN), (1, -1)] {
            assert_eq!(of(seconds, nanos), None);
        }
    }
}
