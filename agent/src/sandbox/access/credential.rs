//! Credentials for open ports: what a link, a token and a session's cookie say. Pure.
//!
//! ```text
//!  sbx | l, t or s | 1_ | base64url( port (2 bytes) | generation (8) | expiry (8) | user | HMAC-SHA-256 (32) )
//! ```
//! The HMAC also covers the purpose and the sandbox, under a key that only this sandbox's agent has. So nothing
//! is kept about a credential: it is believed as long as its port has the same generation.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use daemon::mac::{self, TAG_BYTES};
use proto::{
    id::SandboxId,
    name::{Port, UserLabel},
};

use crate::journal::AccessKey;

/// Longest credential, in bytes; a longer text is not decoded.
const TEXT_MAX: usize = 200;
/// Bytes in front of the user.
const HEAD: usize = 2 + 8 + 8;
/// Sets these HMACs apart from any other use of the key.
const CONTEXT: &[u8] = b"pve-sandbox access 1\0";

/// Use that a credential is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Begins a session of a browser.
    Link,
    /// Lets a program in.
    Token,
    /// Is a session: the value of a cookie.
    Session,
}

impl Purpose {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Link => "sbxl1_",
            Self::Token => "sbxt1_",
            Self::Session => "sbxs1_",
        }
    }
}

/// Credential for a port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// Use that it is good for.
    pub purpose: Purpose,
    /// The port.
    pub port: Port,
    /// Generation of the port's credentials that it belongs to.
    pub generation: u64,
    /// Time from which on it is refused, seconds since 1970.
    pub expires_s: u64,
    /// Label of the user that it was made for.
    pub user: Option<UserLabel>,
}

impl Credential {
    /// Writes and signs it.
    pub fn sign(&self, key: &AccessKey, id: &SandboxId) -> String {
        let user = self.user.as_ref().map_or("", UserLabel::as_str);
        let mut bytes = Vec::with_capacity(HEAD + user.len() + TAG_BYTES);
        bytes.extend_from_slice(&self.port.get().to_be_bytes());
        bytes.extend_from_slice(&self.generation.to_be_bytes());
        bytes.extend_from_slice(&self.expires_s.to_be_bytes());
        bytes.extend_from_slice(user.as_bytes());
        let tag = mac::tag(key, &signed(self.purpose, id, &bytes));
        bytes.extend_from_slice(&tag);
        let mut text = self.purpose.prefix().to_owned();
        URL_SAFE_NO_PAD.encode_string(&bytes, &mut text);
        text
    }

    /// Reads a credential of a purpose; `None` for any text that this key has not signed for this sandbox and
    /// purpose.
    pub fn read(text: &[u8], purpose: Purpose, key: &AccessKey, id: &SandboxId) -> Option<Self> {
        if text.len() > TEXT_MAX {
            return None;
        }
        let body = text.strip_prefix(purpose.prefix().as_bytes())?;
        let bytes = URL_SAFE_NO_PAD.decode(body).ok()?;
        let (bytes, tag) = bytes.split_last_chunk::<TAG_BYTES>()?;
        if !mac::is_tag(key, &signed(purpose, id, bytes), tag) {
            return None;
        }
        let (port, rest) = bytes.split_first_chunk()?;
        let (generation, rest) = rest.split_first_chunk()?;
        let (expires_s, user) = rest.split_first_chunk()?;
        let user = match user {
            [] => None,
            user => Some(std::str::from_utf8(user).ok()?.parse().ok()?),
        };
        Some(Self {
            purpose,
            port: Port::try_from(u32::from(u16::from_be_bytes(*port))).ok()?,
            generation: u64::from_be_bytes(*generation),
            expires_s: u64::from_be_bytes(*expires_s),
            user,
        })
    }

    /// True when it opens this port, with this generation, at this time.
    pub fn is_good_for(&self, port: Port, generation: u64, now_s: u64) -> bool {
        (self.port, self.generation) == (port, generation) && now_s < self.expires_s
    }
}

fn signed(purpose: Purpose, id: &SandboxId, bytes: &[u8]) -> Vec<u8> {
    let id = id.to_string();
    [CONTEXT, purpose.prefix().as_bytes(), id.as_bytes(), bytes].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> AccessKey {
        AccessKey::new([byte; 32])
    }

    fn id(byte: u8) -> SandboxId {
        SandboxId::new(1, &[byte; 10])
    }

    fn credential(user: Option<&str>) -> Credential {
        Credential {
            purpose: Purpose::Link,
            port: Port::try_from(8000).expect("a port"),
            generation: 7,
            expires_s: 1000,
            user: user.map(|user| user.parse().expect("a label")),
        }
    }

    #[test]
    fn credential_is_read_by_its_sandbox_key_and_purpose_alone() {
        for user in [None, Some("ada+1@example.com"), Some("x".repeat(63).as_str())] {
            let made = credential(user);
            let text = made.sign(&key(1), &id(1));
            assert!(text.len() <= TEXT_MAX, "{text}");
            let text = text.as_bytes();
            assert_eq!(Credential::read(text, Purpose::Link, &key(1), &id(1)), Some(made));
            assert_eq!(Credential::read(text, Purpose::Link, &key(2), &id(1)), None);
            assert_eq!(Credential::read(text, Purpose::Link, &key(1), &id(2)), None);
            for purpose in [Purpose::Token, Purpose::Session] {
                assert_eq!(Credential::read(text, purpose, &key(1), &id(1)), None);
                let renamed = [purpose.prefix().as_bytes(), &text[6..]].concat();
                assert_eq!(Credential::read(&renamed, purpose, &key(1), &id(1)), None);
            }
        }
    }

    #[test]
    fn credential_ends_with_its_time_its_generation_and_its_port() {
        let made = credential(None);
        let (port, other) = (made.port, Port::try_from(8001).expect("a port"));
        assert!(made.is_good_for(port, 7, 999));
        assert!(!made.is_good_for(port, 7, 1000));
        assert!(!made.is_good_for(port, 8, 999));
        assert!(!made.is_good_for(other, 7, 999));
    }

    proptest! {
        #[test]
        fn changed_credential_is_refused(at in any::<prop::sample::Index>(), byte: u8) {
            let mut text = credential(Some("ada")).sign(&key(1), &id(1)).into_bytes();
            let at = at.index(text.len());
            prop_assume!(text[at] != byte);
            text[at] = byte;
            prop_assert_eq!(Credential::read(&text, Purpose::Link, &key(1), &id(1)), None);
        }

        #[test]
        fn any_bytes_are_refused(text in proptest::collection::vec(any::<u8>(), 0..300), prefixed: bool) {
            let start: &[u8] = if prefixed { b"sbxs1_" } else { b"" };
            let text = [start, &text].concat();
            prop_assert_eq!(Credential::read(&text, Purpose::Session, &key(1), &id(1)), None);
        }
    }
}
