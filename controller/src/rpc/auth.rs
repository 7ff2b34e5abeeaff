//! Authenticates callers by bearer token. The store is asked at every call: a revoked token is
//! useless at once.
//!
//! Callers with bad tokens must not delay the look-ups of others: a token that was valid before is
//! looked up at once, all others wait for one of a few turns.

use std::{collections::HashMap, sync::Arc};

use daemon::{status::Refusal, sync::Mutex};
use http::HeaderValue;
use proto::{Reason, name::Team};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Status;

use crate::{
    sandbox,
    store::{self, Store},
    token,
};

/// Concurrent look-ups of tokens that were not valid before.
const TURNS: usize = 16;
/// Most tokens in the cache of valid ones.
const KNOWN_MAX: usize = 4096;

/// Well-formed id and secret of a caller's token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown<'a> {
    id: &'a str,
    secret: &'a str,
}

/// Parses the token in an `authorization` header.
///
/// # Errors
/// When there is none, or its text does not have the form of one.
pub(super) fn shown(header: Option<&HeaderValue>) -> Result<Shown<'_>, Status> {
    let text = header
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, text)| text.trim());
    let (id, secret) = text.and_then(token::split).ok_or_else(invalid)?;
    Ok(Shown { id, secret })
}

/// Looks up tokens, and caches the valid ones.
#[derive(Debug)]
pub(super) struct Tokens {
    store: Arc<dyn Store>,
    turns: Semaphore,
    /// Tokens that were valid at their last look-up.
    known: Mutex<HashMap<String, store::Token>>,
}

impl Tokens {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self { store, turns: Semaphore::new(TURNS), known: Mutex::default() }
    }

    /// Returns the team of a token that was valid at its last look-up. It may be revoked since.
    pub(super) fn team(&self, shown: Shown<'_>) -> Option<Team> {
        let known = self.known.lock().get(shown.id).cloned()?;
        token::verify(&known, shown.secret).then_some(known.team)
    }

    /// Waits for the turn to look up a token that was not valid before.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.acquire().await.ok()
    }

    /// Looks up a token.
    ///
    /// # Errors
    /// When there is no such token, it is revoked, or the store fails.
    pub(super) async fn verify(&self, shown: Shown<'_>) -> Result<store::Token, Status> {
        let found = self.store.token(shown.id).await.map_err(sandbox::Error::from)?;
        let valid = found.filter(|found| token::verify(found, shown.secret));
        let mut known = self.known.lock();
        let Some(token) = valid else {
            // Another caller's wrong secret must not remove the right one from the cache.
            if known.get(shown.id).is_some_and(|known| token::verify(known, shown.secret)) {
                known.remove(shown.id);
            }
            return Err(invalid());
        };
        if known.len() >= KNOWN_MAX && !known.contains_key(shown.id) {
            known.clear();
        }
        known.insert(shown.id.to_owned(), token.clone());
        Ok(token)
    }
}

fn invalid() -> Status {
    let message = "send a valid token as `authorization: Bearer pvesb_...`; \
                   `pve-sandbox-controller token create` makes one";
    Refusal::new(Reason::TokenInvalid, message).into()
}
