//! Adds, lists and removes the SSH keys of teams, and finds the teams of a key. A key is a token whose secret
//! is the key: its expiry, last use and end, which ends its sessions, are those of tokens.

use std::time::Duration;

use proto::{
    Reason,
    id::Invalid,
    name::{Team, TokenName},
    scope::{Scope, Scopes},
};
use russh::keys::{
    Algorithm, HashAlg, PublicKey,
    ssh_key::{Fingerprint, public::KeyData},
};

use super::{
    Access,
    manage::{done, issue, next_page, place},
};
use crate::{
    sandbox::{Caller, Error, Result},
    store::{self, SshKey, Token, TokenFilter},
    token::{self, Order},
};

/// Longest line of a key, bytes.
const LINE_MAX: usize = 8192;
/// Keys that are read at once where one is looked for.
const PAGE: u32 = 500;

impl Access {
    /// Adds a key to a team. Its scopes are those that a session needs: the caller must have them, too.
    ///
    /// # Errors
    /// When the line is no key of a kind that is taken, the team has the key or the name, or too many.
    pub async fn add_ssh_key(
        &self,
        caller: &Caller,
        order: Order,
        ttl: Option<Duration>,
        line: &str,
    ) -> Result<SshKey> {
        if !caller.scopes.allow(Scope::Exec) && !caller.scopes.allow(Scope::Admin) {
            let message = "a key gives the scope `exec`, and this token does not have it";
            return Err(Error::new(Reason::ScopeMissing, message));
        }
        let key = parse(line)?;
        let text = canonical(&key).ok_or_else(not_a_key)?;
        let wire = key.to_bytes().map_err(|_| not_a_key())?;
        let order = Order { scopes: [Scope::Exec].into_iter().collect::<Scopes>(), ..order };
        let mut issued = issue(order, ttl, self.now_ms())?;
        token::bind_to_ssh_key(&mut issued, &wire);
        let key = SshKey { token: issued.token, key: text, added_by: caller.token.clone() };
        done(self.store.add_ssh_key(key.clone()).await?, &key.token)?;
        let Token { id, team, name, .. } = &key.token;
        tracing::info!(key = id, %team, %name, by = caller.token, "SSH key added");
        Ok(key)
    }

    /// Returns at most `limit` keys of a team after a page's last one, and the text that continues after
    /// them, if there are more.
    ///
    /// # Errors
    /// When `after` is not such a text, or the store fails.
    pub async fn list_ssh_keys(
        &self,
        team: Team,
        include_ended: bool,
        after: &str,
        limit: u32,
    ) -> Result<(Vec<SshKey>, String)> {
        let living_ms = (!include_ended).then(|| self.now_ms());
        let filter = TokenFilter { team: Some(team), living_ms };
        let mut keys = self.store.ssh_keys(filter, place(after)?, limit + 1).await?;
        let more = keys.len() > limit as usize;
        keys.truncate(limit as usize);
        let next = keys.last().filter(|_| more).map(|last| next_page(&last.token));
        Ok((keys, next.unwrap_or_default()))
    }

    /// Removes a living key of a team by its id, name or fingerprint, and ends its sessions.
    ///
    /// # Errors
    /// TOKEN_NOT_FOUND when there is none.
    pub async fn remove_ssh_key(
        &self,
        caller: &Caller,
        named: &str,
        team: &Team,
    ) -> Result<SshKey> {
        let is_meant = |key: &SshKey| {
            key.token.id == named
                || named.parse::<TokenName>().is_ok_and(|name| key.token.name == name)
                || fingerprint(&key.token).is_some_and(|own| own == named)
        };
        let mut after = String::new();
        let found = loop {
            let (keys, next) = self.list_ssh_keys(team.clone(), false, &after, PAGE).await?;
            match keys.into_iter().find(is_meant) {
                Some(found) => break found,
                None if next.is_empty() => {
                    let message = format!("there is no SSH key {named} in team {team}");
                    return Err(Error::new(Reason::TokenNotFound, message));
                }
                None => after = next,
            }
        };
        let now_ms = self.now_ms();
        self.store.revoke_token(&found.token.id, now_ms).await?;
        tracing::info!(key = found.token.id, by = caller.token, "SSH key removed");
        self.end_calls(&found.token.id);
        Ok(SshKey { token: Token { revoked_ms: now_ms, ..found.token }, ..found })
    }

    /// Returns the living tokens of a key that somebody offers: one for each team that has it.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn tokens_of_ssh_key(&self, key: &PublicKey) -> store::Result<Vec<Token>> {
        match key.to_bytes() {
            Ok(wire) => {
                self.store.tokens_by_hash(&token::hash_of_ssh_key(&wire), self.now_ms()).await
            }
            Err(_) => Ok(Vec::new()),
        }
    }
}

/// Returns the fingerprint of a key as `ssh-keygen -l` shows it; `None` for a token of another kind.
pub fn fingerprint(token: &Token) -> Option<String> {
    let hash: [u8; 32] = token::ssh_fingerprint(token)?.try_into().ok()?;
    Some(Fingerprint::Sha256(hash).to_string())
}

/// Returns the SHA-256 of a public key as `ssh-keygen -l` shows it.
pub fn fingerprint_of(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Returns a key as a line without a comment.
pub fn canonical(key: &PublicKey) -> Option<String> {
    PublicKey::new(key.key_data().clone(), "").to_openssh().ok().map(|line| line.trim().to_owned())
}

fn not_a_key() -> Invalid {
    let what = "must be a line as in a .pub file: `ssh-ed25519 AAAA...`; \
                `ssh-keygen -t ed25519` makes a key";
    Invalid::new("public_key", what)
}

fn parse(line: &str) -> Result<PublicKey, Invalid> {
    if line.len() > LINE_MAX {
        return Err(Invalid::new("public_key", "must have at most 8192 bytes"));
    }
    if line.contains("PRIVATE KEY") {
        let what =
            "must be the public key, which is in the .pub file; keep the private key to yourself";
        return Err(Invalid::new("public_key", what));
    }
    let key = PublicKey::from_openssh(line.trim()).map_err(|_| not_a_key())?;
    let is_rsa = matches!(key.key_data(), KeyData::Rsa(_));
    let is_taken = matches!(
        key.algorithm(),
        Algorithm::Ed25519
            | Algorithm::Ecdsa { .. }
            | Algorithm::SkEd25519
            | Algorithm::SkEcdsaSha2NistP256
    );
    match (is_taken, is_rsa) {
        (true, _) => Ok(key),
        (false, true) => {
            let what = "must not be an RSA key; `ssh-keygen -t ed25519` makes one that is taken";
            Err(Invalid::new("public_key", what))
        }
        (false, false) => Err(not_a_key()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ7hRZpbuIfcQv6cJkHyVpiO94PG3hCn7GgTi5NHuIHh";

    #[test]
    fn line_of_a_key_is_taken_with_and_without_its_comment() {
        for line in [KEY.to_owned(), format!("{KEY} ada@laptop\n")] {
            let key = parse(&line).expect("a key");
            assert_eq!(canonical(&key).as_deref(), Some(KEY));
        }
    }

    #[test]
    fn other_lines_are_refused_with_what_to_do() {
        let private = "-----BEGIN OPENSSH PRIVATE KEY-----";
        for (line, word) in [
            ("", "ssh-keygen"),
            ("ssh-ed25519 AAAA", "ssh-keygen"),
            (private, ".pub"),
            (&"x".repeat(9000), "8192"),
        ] {
            let refused = parse(line).expect_err("no key").to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn fingerprint_of_the_token_is_that_of_the_key() {
        let key = parse(KEY).expect("a key");
        let order = Order::new("red".parse().expect("team"), Scopes::SANDBOX);
        let mut issued = token::issue(order, 1);
        assert_eq!(fingerprint(&issued.token), None);
        token::bind_to_ssh_key(&mut issued, &key.to_bytes().expect("bytes"));
        assert_eq!(fingerprint(&issued.token), Some(fingerprint_of(&key)));
        assert!(!token::is_of_key(&issued.token), "it is no client certificate");
    }
}
