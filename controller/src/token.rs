//! Bearer tokens: `pvesb_ID_SECRET`. The id finds the row and the secret is compared by its hash in
//! constant time; only the hash is stored.

use proto::name::Team;
use sha2::{Digest, Sha256};

use crate::store;

const PREFIX: &str = "pvesb_";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;

/// A new token. Its text is known only now.
#[derive(Debug)]
pub struct Issued {
    /// Text that the caller sends as `Authorization: Bearer ...`.
    pub text: String,
    /// Row for the store.
    pub token: store::Token,
}

/// Makes a token for a team.
pub fn issue(team: Team, scopes: &str, now_ms: u64) -> Issued {
    let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
    // Always the kernel's randomness: the random source of a simulation must never make a secret.
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    let (id, secret) = (hex(&id), hex(&secret));
    Issued {
        text: format!("{PREFIX}{id}_{secret}"),
        token: store::Token {
            hash: Sha256::digest(secret.as_bytes()).to_vec(),
            id,
            team,
            scopes: scopes.to_owned(),
            created_ms: now_ms,
            revoked_ms: 0,
        },
    }
}

/// Splits a token's text into id and secret; `None` when it does not have the form of one.
pub fn split(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let hex = |text: &str, bytes: usize| {
        text.len() == 2 * bytes
            && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    (hex(id, ID_BYTES) && hex(secret, SECRET_BYTES)).then_some((id, secret))
}

/// Returns true when the secret belongs to this token and the token is not revoked.
pub fn verify(token: &store::Token, secret: &str) -> bool {
    let hash = Sha256::digest(secret.as_bytes());
    let same = same(&hash, &token.hash);
    same && token.revoked_ms == 0
}

/// Compares in constant time: stopping at the first difference would reveal how much matches.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    std::hint::black_box(difference) == 0
}

/// Encodes bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_valid_with_its_secret_until_it_is_revoked() {
        let Issued { text, mut token } = issue("red".parse().expect("team"), "sandbox", 1);
        let (id, secret) = split(&text).expect("a token");
        assert_eq!(id, token.id);
        assert!(verify(&token, secret));
        assert!(!verify(&token, &"0".repeat(64)) && !verify(&token, ""));
        token.revoked_ms = 2;
        assert!(!verify(&token, secret));
        assert!(!text.contains(&hex(&token.hash)), "the hash tells nothing of the secret");
    }

    #[test]
    fn malformed_tokens_are_refused() {
        for text in ["", "pvesb_", "pvesb_a_b", "Bearer x", "pvesb_00_00\n"] {
            assert_eq!(split(text), None, "{text:?}");
        }
    }
}
