//! Points in time in messages.

/// Converts milliseconds since 1970 to a timestamp. Every such number fits.
pub fn timestamp(ms: u64) -> prost_types::Timestamp {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(ms % 1000).unwrap_or_default() * 1_000_000;
    prost_types::Timestamp { seconds, nanos }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn timestamp_is_the_same_time() {
        for ms in [0, 1, 999, 1000, 1_700_000_000_123] {
            let time: prost_types::Timestamp = (UNIX_EPOCH + Duration::from_millis(ms)).into();
            assert_eq!(timestamp(ms), time);
        }
        assert_eq!(timestamp(u64::MAX).seconds, i64::try_from(u64::MAX / 1000).expect("fits"));
    }
}
