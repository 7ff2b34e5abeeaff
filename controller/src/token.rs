//! Makes and verifies bearer tokens. The id finds the row and the secret is compared by its hash in
//! constant time; only the hash is stored. `proto::token` has the forms of their text.

use daemon::mac;
use data_encoding::HEXLOWER;
use proto::{
    name::{Team, TokenName, UserLabel},
    scope::Scopes,
    token::{Format, ID_DIGITS, SECRET_DIGITS},
};
use sha2::{Digest, Sha256};

use crate::store;

/// Order for a new token.
#[derive(Debug, Clone)]
pub struct Order {
    /// Team that it is for.
    pub team: Team,
    /// Name; without one it is named by its id.
    pub name: Option<TokenName>,
    /// Label of the person or program that it is for.
    pub user: Option<UserLabel>,
    /// Calls that it allows.
    pub scopes: Scopes,
    /// Time of its expiry, milliseconds since 1970; 0 when it never expires.
    pub expires_ms: u64,
}

impl Order {
    /// Orders a token without a name, a user and an expiry.
    pub fn new(team: Team, scopes: Scopes) -> Self {
        Self { team, name: None, user: None, scopes, expires_ms: 0 }
    }
}

/// A new token. Its secret is known only now.
pub struct Issued {
    secret: String,
    /// Row for the store.
    pub token: store::Token,
}

impl Issued {
    /// Returns the text that the caller sends, such as `Authorization: Bearer ...`.
    pub fn text(&self, format: Format) -> String {
        format.text(&self.token.id, &self.secret)
    }
}

/// The secret is left out.
impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("token", &self.token).finish_non_exhaustive()
    }
}

/// Makes a token.
pub fn issue(order: Order, now_ms: u64) -> Issued {
    let (mut id, mut secret) = ([0; ID_DIGITS / 2], [0; SECRET_DIGITS / 2]);
    // Always the kernel's randomness: the random source of a simulation must never make a secret.
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    let (id, secret) = (HEXLOWER.encode(&id), HEXLOWER.encode(&secret));
    let Order { team, name, user, scopes, expires_ms } = order;
    let name = name.unwrap_or_else(|| id.parse().expect("hex digits are a name"));
    let hash = Sha256::digest(secret.as_bytes()).to_vec();
    Issued {
        secret,
        token: store::Token {
            id,
            hash,
            team,
            name,
            user,
            scopes,
            created_ms: now_ms,
            expires_ms,
            used_ms: 0,
            revoked_ms: 0,
        },
    }
}

/// First byte of the hash of a token whose secret is a key; the hash of a text has none before it.
const OF_KEY: u8 = 1;

/// Makes the token of a client certificate: its secret is the key with this SHA-256.
pub fn bind_to_key(issued: &mut Issued, key: &[u8; 32]) {
    issued.secret.clear();
    issued.token.hash = hash_of_key(key);
}

/// First byte of the hash of a token whose secret is an SSH key.
const OF_SSH_KEY: u8 = 2;

/// Returns the hash of the tokens of an SSH key; `key` is its form on the wire. No text and no client
/// certificate has such a hash.
pub fn hash_of_ssh_key(key: &[u8]) -> Vec<u8> {
    std::iter::once(OF_SSH_KEY).chain(Sha256::digest(key)).collect()
}

/// Returns the SHA-256 of the SSH key of a token; `None` for a token of another kind.
pub fn ssh_fingerprint(token: &store::Token) -> Option<&[u8]> {
    token
        .hash
        .split_first()
        .filter(|(kind, hash)| **kind == OF_SSH_KEY && hash.len() == 32)
        .map(|(_, hash)| hash)
}

/// Makes the token of an SSH key.
pub fn bind_to_ssh_key(issued: &mut Issued, key: &[u8]) {
    issued.secret.clear();
    issued.token.hash = hash_of_ssh_key(key);
}

fn hash_of_key(key: &[u8; 32]) -> Vec<u8> {
    std::iter::once(OF_KEY).chain(*key).collect()
}

/// Returns true for a token whose secret is the key of a client certificate.
pub fn is_of_key(token: &store::Token) -> bool {
    token.hash.len() == 33 && token.hash.first() == Some(&OF_KEY)
}

/// Secret that a caller shows.
#[derive(Debug, Clone, Copy)]
pub enum Proof<'a> {
    /// Text.
    Text(&'a str),
    /// SHA-256 of the public key whose private key it has shown to have.
    Key(&'a [u8; 32]),
}

/// Result of checking a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The secret is right, and the token is living.
    Valid,
    /// The secret is another token's.
    Wrong,
    /// The secret is right, and the token was revoked.
    Revoked,
    /// The secret is right, and the token has expired.
    Expired,
}

/// Checks the secret, and whether the token may still be used.
pub fn verify(token: &store::Token, proof: Proof<'_>, now_ms: u64) -> Verdict {
    let hash = match proof {
        Proof::Text(secret) => Sha256::digest(secret.as_bytes()).to_vec(),
        Proof::Key(key) => hash_of_key(key),
    };
    if mac::is_equal(&hash, &token.hash) { standing(token, now_ms) } else { Verdict::Wrong }
}

/// Returns whether a token may still be used, whoever shows it; never `Wrong`.
pub fn standing(token: &store::Token, now_ms: u64) -> Verdict {
    if token.revoked_ms != 0 {
        Verdict::Revoked
    } else if token.is_expired(now_ms) {
        Verdict::Expired
    } else {
        Verdict::Valid
    }
}

#[cfg(test)]
mod tests {
    use proto::token::split;

    use super::*;

    #[test]
    fn token_is_valid_with_its_secret_until_it_ends() {
        let order =
            Order { expires_ms: 100, ..Order::new("red".parse().expect("team"), Scopes::ALL) };
        let issued = issue(order, 1);
        for format in Format::ALL {
            let text = issued.text(format);
            let (id, secret) = split(&text).expect("a token");
            assert_eq!(id, issued.token.id);
            assert_eq!(verify(&issued.token, Proof::Text(secret), 99), Verdict::Valid);
            assert_eq!(verify(&issued.token, Proof::Text(secret), 100), Verdict::Expired);
            let revoked = store::Token { revoked_ms: 2, ..issued.token.clone() };
            assert_eq!(verify(&revoked, Proof::Text(secret), 3), Verdict::Revoked);
            // What has ended is told only to who has the secret.
            assert_eq!(verify(&revoked, Proof::Text(&"0".repeat(64)), 200), Verdict::Wrong);
            assert!(
                !text.contains(&HEXLOWER.encode(&issued.token.hash)),
                "the hash tells nothing of the secret"
            );
            assert!(!format!("{issued:?}").contains(secret));
        }
        assert_eq!(verify(&issued.token, Proof::Text(""), 1), Verdict::Wrong);
    }

    #[test]
    fn token_of_a_key_takes_no_text_and_another_token_no_key() {
        let order = || Order::new("red".parse().expect("team"), Scopes::ALL);
        let (mut of_key, of_text) = (issue(order(), 1), issue(order(), 1));
        let secret = of_key.secret.clone();
        bind_to_key(&mut of_key, &[7; 32]);
        assert!(is_of_key(&of_key.token) && !is_of_key(&of_text.token));
        assert_eq!(verify(&of_key.token, Proof::Key(&[7; 32]), 1), Verdict::Valid);
        assert_eq!(verify(&of_key.token, Proof::Key(&[8; 32]), 1), Verdict::Wrong);
        assert_eq!(verify(&of_key.token, Proof::Text(&secret), 1), Verdict::Wrong);
        let hash: [u8; 32] = of_text.token.hash.clone().try_into().expect("32 bytes");
        assert_eq!(verify(&of_text.token, Proof::Key(&hash), 1), Verdict::Wrong);
    }
}
