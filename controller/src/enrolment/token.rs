//! One-time tokens of nodes: `pvesj_ID_SECRET`. Only the hash of the secret is stored.

use daemon::mac;
use data_encoding::HEXLOWER;
use proto::{Reason, id::Invalid, name::NodeName};
use sha2::{Digest as _, Sha256};

use crate::{sandbox::Error, store::enrolments::NodeToken};

const PREFIX: &str = "pvesj_";
const ID_BYTES: usize = 6;
/// Length of the secret, bytes.
const SECRET_BYTES: usize = 16;
/// Usual life of a token, seconds.
pub const TTL_S: u32 = 15 * 60;
/// Lives that an operator may choose, seconds.
const TTLS_S: std::ops::RangeInclusive<u32> = 60..=24 * 60 * 60;

/// Makes a token for a node: its text, which is known only now, and its row. `ttl_s` 0 means the usual
/// life.
///
/// # Errors
/// When the life is too short or too long.
pub fn issue(node: &NodeName, ttl_s: u32, now_ms: u64) -> Result<(String, NodeToken), Invalid> {
    let ttl_s = if ttl_s == 0 { TTL_S } else { ttl_s };
    if !TTLS_S.contains(&ttl_s) {
        return Err(Invalid::new("ttl_s", "must be 60 to 86400, or 0 for 900"));
    }
    let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    let (id, secret) = (HEXLOWER.encode(&id), HEXLOWER.encode(&secret));
    let token = NodeToken {
        hash: Sha256::digest(secret.as_bytes()).to_vec(),
        node: node.clone(),
        created_ms: now_ms,
        expires_ms: now_ms + u64::from(ttl_s) * 1000,
        used_ms: 0,
        key: Vec::new(),
        id: id.clone(),
    };
    Ok((format!("{PREFIX}{id}_{secret}"), token))
}

/// Splits a token's text into id and secret; `None` when it does not have the form of one.
pub(super) fn split(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let hex = |text: &str, bytes: usize| {
        text.len() == 2 * bytes
            && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    (hex(id, ID_BYTES) && hex(secret, SECRET_BYTES)).then_some((id, secret))
}

/// Returns true when the secret belongs to this token, and the token to this node and this time. Whether
/// it is used already is decided where it is used.
pub(super) fn verify(token: &NodeToken, secret: &str, node: &NodeName, now_ms: u64) -> bool {
    let right = mac::is_equal(&Sha256::digest(secret.as_bytes()), &token.hash);
    right && token.node == *node && token.expires_ms > now_ms
}

/// One answer for every token that is not good, so that nothing is learnt from it.
pub(super) fn invalid(node: &NodeName) -> Error {
    let message = format!(
        "this token is not good for {node}: it is used, expired, of another node or unknown; \
         `sandboxctl node token {node}` makes a new one. Where {node} has joined, `pve-sandbox-agent setup` on it makes what \
         is missing"
    );
    Error::new(Reason::TokenInvalid, message)
}
