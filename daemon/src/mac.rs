//! Keyed checksums: HMAC-SHA-256 of what this machine gives away and later believes.

use std::io;

use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac, rand};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a checksum.
pub const TAG_BYTES: usize = 32;

/// Returns a random key.
///
/// # Errors
/// When the system has no random numbers.
pub fn random_key() -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    rand::fill(&mut key).map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(key)
}

/// Returns the checksum of a text.
pub fn tag(key: &[u8; KEY_BYTES], text: &[u8]) -> [u8; TAG_BYTES] {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    let mut bytes = [0; TAG_BYTES];
    bytes.copy_from_slice(tag.as_ref());
    bytes
}

/// Returns true for the checksum of a text; compares in constant time.
pub fn is_tag(key: &[u8; KEY_BYTES], text: &[u8], tag: &[u8]) -> bool {
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, key), text, tag).is_ok()
}

/// Compares secrets in constant time: stopping at the first difference would reveal how much matches.
pub fn is_equal(a: &[u8], b: &[u8]) -> bool {
    verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_belongs_to_its_key_and_text() {
        let (key, other) = (random_key().expect("random"), random_key().expect("random"));
        assert_ne!(key, other);
        let of = tag(&key, b"text");
        assert!(is_tag(&key, b"text", &of));
        assert!(!is_tag(&other, b"text", &of));
        assert!(!is_tag(&key, b"texT", &of));
        assert!(!is_tag(&key, b"text", &of[..31]) && !is_tag(&key, b"text", b""));
    }

    #[test]
    fn secrets_are_equal_only_as_a_whole() {
        assert!(is_equal(b"secret", b"secret") && is_equal(b"", b""));
        for other in [&b"secreT"[..], b"Secret", b"secre", b"secrets", b""] {
            assert!(!is_equal(b"secret", other), "{other:?}");
        }
    }

    #[test]
    fn checksum_is_that_of_the_standard() {
        // Case 2 of RFC 4231, whose key is padded with zeros as HMAC does.
        let mut key = [0; KEY_BYTES];
        key[..4].copy_from_slice(b"Jefe");
        let expected = [0x5b, 0xdc, 0xc1, 0x46, 0xbf, 0x60, 0x75, 0x4e];
        assert_eq!(tag(&key, b"what do ya want for nothing?")[..8], expected);
    }
}
