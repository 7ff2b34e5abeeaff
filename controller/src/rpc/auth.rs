//! Authenticates callers by bearer token, or by client certificate. The store is asked at every call: a revoked token is
//! useless at once. Its calls under way are ended by `access`.
//!
//! Callers with bad tokens must not delay the look-ups of others: a token that was valid before is
//! looked up at once, all others wait for one of a few turns.

use std::{collections::HashMap, sync::Arc};

use daemon::{peer::Client, status::Refusal, sync::Mutex};
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use proto::{Reason, name::Team, token::split};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Status;

use crate::{
    access::{Access, OpenCall},
    sandbox, store,
    token::{self, Proof, Verdict},
};

/// Concurrent look-ups of tokens that were not valid before.
const TURNS: usize = 16;
/// Most tokens in the cache of valid ones.
const KNOWN_MAX: usize = 4096;
/// Header in which the libraries of E2B send a token.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Headers that may have a token.
#[derive(Debug, Clone)]
pub(super) struct Credentials {
    authorization: Option<HeaderValue>,
    api_key: Option<HeaderValue>,
}

impl Credentials {
    /// Copies them out of a request.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let copy = |name: &HeaderName| headers.get(name).cloned();
        Self { authorization: copy(&AUTHORIZATION), api_key: copy(&API_KEY) }
    }

    /// Parses the token: a bearer token, else the one in `x-api-key`; without such a header, the client
    /// certificate of the connection. A token in a header that is not valid is refused, whatever the
    /// certificate says.
    ///
    /// # Errors
    /// When there is none, or its text does not have the form of one.
    pub(super) fn shown<'a>(&'a self, client: Option<&'a Client>) -> Result<Shown<'a>, Status> {
        let bearer = text(self.authorization.as_ref())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        if let Some(client) = client.filter(|_| bearer.is_none() && self.api_key.is_none()) {
            return Ok(Shown { id: &client.token, proof: Proof::Key(&client.key) });
        }
        let bearer = bearer.and_then(|(_, text)| split(text.trim()));
        let key = || text(self.api_key.as_ref()).and_then(|text| split(text.trim()));
        let (id, secret) = bearer.or_else(key).ok_or_else(|| invalid(SEND))?;
        Ok(Shown { id, proof: Proof::Text(secret) })
    }
}

fn text(header: Option<&HeaderValue>) -> Option<&str> {
    header.and_then(|value| value.to_str().ok())
}

/// Well-formed id and secret of a caller's token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown<'a> {
    id: &'a str,
    proof: Proof<'a>,
}

/// Looks up tokens, and caches the valid ones.
#[derive(Debug)]
pub(super) struct Tokens {
    access: Arc<Access>,
    turns: Semaphore,
    /// Tokens that were valid at their last look-up.
    known: Mutex<HashMap<String, store::Token>>,
}

impl Tokens {
    /// Begins a call with a token that is valid, which ends when the token does.
    pub(super) fn begin_call(&self, token: &store::Token) -> OpenCall {
        self.access.begin_call(token)
    }

    pub(super) fn new(access: Arc<Access>) -> Self {
        Self { access, turns: Semaphore::new(TURNS), known: Mutex::default() }
    }

    /// Returns the team of a token that was valid at its last look-up. It may be revoked since.
    pub(super) fn team(&self, shown: Shown<'_>) -> Option<Team> {
        let known = self.known.lock().get(shown.id).cloned()?;
        (self.judge(&known, shown) == Verdict::Valid).then_some(known.team)
    }

    fn judge(&self, token: &store::Token, shown: Shown<'_>) -> Verdict {
        token::verify(token, shown.proof, self.access.now_ms())
    }

    /// Waits for the turn to look up a token that was not valid before.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.acquire().await.ok()
    }

    /// Looks up a token.
    ///
    /// # Errors
    /// When there is no such token, it is revoked or has expired, or the store fails.
    pub(super) async fn verify(&self, shown: Shown<'_>) -> Result<store::Token, Status> {
        let found = self.access.token(shown.id).await.map_err(sandbox::Error::from)?;
        let verdict = found.as_ref().map_or(Verdict::Wrong, |found| self.judge(found, shown));
        let mut known = self.known.lock();
        let refused = match (verdict, found) {
            (Verdict::Valid, Some(token)) => {
                if known.len() >= KNOWN_MAX && !known.contains_key(shown.id) {
                    known.clear();
                }
                known.insert(shown.id.to_owned(), token.clone());
                drop(known);
                self.access.note_use(&token);
                return Ok(token);
            }
            (why, _) => refusal(why),
        };
        // Another caller's wrong secret must not remove the right one from the cache.
        if known.get(shown.id).is_some_and(|known| self.judge(known, shown) != Verdict::Wrong) {
            known.remove(shown.id);
        }
        Err(refused)
    }
}

const SEND: &str = "send a valid token as `authorization: Bearer pvesb_...`; an operator makes one \
                    with `sandboxctl token create`, or `pve-sandbox-controller token create`";

/// Builds the refusal of a token that is not valid, for a new call and for those under way.
pub(super) fn refusal(verdict: Verdict) -> Status {
    invalid(match verdict {
        Verdict::Revoked => "this token was revoked; use another",
        Verdict::Expired => "this token has expired; use another",
        Verdict::Valid | Verdict::Wrong => SEND,
    })
}

fn invalid(why: &str) -> Status {
    Refusal::new(Reason::TokenInvalid, why).into()
}

#[cfg(test)]
mod tests {
    use proto::token::Format;

    use super::*;

    #[test]
    fn token_is_taken_from_either_header() {
        let (id, secret) = ("0123456789ab", "f".repeat(64));
        let (plain, e2b) = (Format::Plain.text(id, &secret), Format::E2b.text(id, &secret));
        let shown = |pairs: &[(&'static str, String)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().expect("a value"));
            }
            Credentials::of(&headers).shown(None).map(|shown| shown.id.to_owned()).ok()
        };
        let known = Some(id.to_owned());
        for text in [&plain, &e2b] {
            assert_eq!(shown(&[("authorization", format!("Bearer {text}"))]), known);
            assert_eq!(shown(&[("authorization", format!("bearer  {text} "))]), known);
            assert_eq!(shown(&[("x-api-key", text.clone())]), known);
            // What a proxy or a library adds beside it.
            let basic = ("authorization", "Basic dXNlcjo=".to_owned());
            assert_eq!(shown(&[basic, ("x-api-key", text.clone())]), known);
            assert_eq!(shown(&[("authorization", format!("Basic {text}"))]), None);
            assert_eq!(shown(&[("authorization", text.clone())]), None);
        }
        assert_eq!(shown(&[]), None);
    }

    #[test]
    fn token_in_a_header_wins_over_a_client_certificate() {
        let client = Client { token: "ba9876543210".into(), key: [7; 32] };
        let text = Format::Plain.text("0123456789ab", &"f".repeat(64));
        let shown = |name: &'static str, value: String| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().expect("a value"));
            let credentials = Credentials::of(&headers);
            credentials.shown(Some(&client)).map(|shown| shown.id.to_owned()).ok()
        };
        assert_eq!(shown("user-agent", "x".into()).as_deref(), Some("ba9876543210"));
        // What a proxy adds for itself is no token.
        let basic = shown("authorization", "Basic dXNlcjo=".into());
        assert_eq!(basic.as_deref(), Some("ba9876543210"));
        let bearer = shown("authorization", format!("Bearer {text}"));
        assert_eq!(bearer.as_deref(), Some("0123456789ab"));
        assert_eq!(shown("x-api-key", text).as_deref(), Some("0123456789ab"));
        assert_eq!(shown("authorization", "Bearer nonsense".into()), None);
        assert_eq!(shown("x-api-key", "nonsense".into()), None);
    }
}
