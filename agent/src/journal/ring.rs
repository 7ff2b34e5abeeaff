//! The order in which vmids and addresses are leased: in a ring, so that recently used ones come
//! last. Pure.

/// Walks the ring `first..=last` from behind `cursor` and returns the first free number.
pub(super) fn next<E>(
    (first, last): (u32, u32),
    cursor: Option<u32>,
    mut free: impl FnMut(u32) -> Result<bool, E>,
) -> Result<Option<u32>, E> {
    let start = match cursor {
        Some(cursor) if cursor >= first && cursor < last => cursor + 1,
        // The cursor is unset, at the end, or of an earlier range.
        Some(_) | None => first,
    };
    for number in (start..=last).chain(first..start) {
        if free(number)? {
            return Ok(Some(number));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn next_free(range: (u32, u32), cursor: Option<u32>, busy: &[u32]) -> Option<u32> {
        let Ok(found) = next(range, cursor, |n| Ok::<_, Infallible>(!busy.contains(&n)));
        found
    }

    #[test]
    fn next_free_number_wraps_around_the_range() {
        assert_eq!(next_free((5, 8), None, &[]), Some(5));
        assert_eq!(next_free((5, 8), Some(5), &[6]), Some(7));
        assert_eq!(next_free((5, 8), Some(8), &[]), Some(5));
        assert_eq!(next_free((5, 8), Some(99), &[]), Some(5));
        assert_eq!(next_free((5, 8), Some(6), &[7, 8, 5]), Some(6));
        assert_eq!(next_free((5, 8), Some(6), &[5, 6, 7, 8]), None);
    }

    proptest! {
        #[test]
        fn next_free_number_is_free_and_in_range_and_found_if_there_is_one(
            first in 0u32..50, len in 0u32..50, cursor: Option<u8>,
            busy in proptest::collection::vec(0u32..100, 0..100),
        ) {
            let range = (first, first + len);
            match next_free(range, cursor.map(u32::from), &busy) {
                Some(found) => {
                    prop_assert!((range.0..=range.1).contains(&found));
                    prop_assert!(!busy.contains(&found));
                }
                None => prop_assert!((range.0..=range.1).all(|n| busy.contains(&n))),
            }
        }
    }
}
