//! Who is it? Bearer tokens, looked up in the store with every call, so that a revoked one is
//! useless at once.
//!
//! Whoever sends bad tokens must not hold up others' look-ups: a token that was valid before is
//! looked up at once, all others wait for one of a few turns.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use daemon::status::Refusal;
use http::HeaderValue;
use proto::{Reason, name::Team};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Status;

use crate::{
    sandbox,
    store::{self, Store},
    token,
};

/// Tokens that were not valid before, looked up at a time.
const TURNS: usize = 16;
/// Tokens that are remembered as valid.
const KNOWN_MAX: usize = 4096;

/// What a caller shows: id and secret of a token, in their right form.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown<'a> {
    id: &'a str,
    secret: &'a str,
}

/// Takes the token out of an `authorization` header.
///
/// # Errors
/// When there is none, or its text has not the form of one.
pub(super) fn shown(header: Option<&HeaderValue>) -> Result<Shown<'_>, Status> {
    let text = header
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, text)| text.trim());
    let (id, secret) = text.and_then(token::split).ok_or_else(invalid)?;
    Ok(Shown { id, secret })
}

/// Looks tokens up.
#[derive(Debug)]
pub(super) struct Tokens {
    store: Arc<dyn Store>,
    turns: Semaphore,
    /// Tokens that were valid when they were looked up last.
    known: Mutex<HashMap<String, store::Token>>,
}

impl Tokens {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self { store, turns: Semaphore::new(TURNS), known: Mutex::default() }
    }

    /// The team of a token that was valid when it was looked up last: whose call it is, although it
    /// is still to be asked whether the token was revoked.
    pub(super) fn team(&self, shown: Shown<'_>) -> Option<Team> {
        let known = self.known().get(shown.id).cloned()?;
        token::verify(&known, shown.secret).then_some(known.team)
    }

    /// Waits until a token that was not valid before may be looked up.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.acquire().await.ok()
    }

    /// Looks a token up.
    ///
    /// # Errors
    /// When there is no such token, it was revoked, or the store fails.
    pub(super) async fn verify(&self, shown: Shown<'_>) -> Result<store::Token, Status> {
        let found = self.store.token(shown.id).await.map_err(sandbox::Error::from)?;
        let valid = found.filter(|found| token::verify(found, shown.secret));
        let mut known = self.known();
        let Some(token) = valid else {
            // Somebody else's wrong secret makes the right one no stranger.
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

    fn known(&self) -> MutexGuard<'_, HashMap<String, store::Token>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn invalid() -> Status {
    let message = "send a valid token as `authorization: Bearer pvesb_...`; \
                   `pve-sandbox-controller token create` makes one";
    Refusal::new(Reason::TokenInvalid, message).into()
}
