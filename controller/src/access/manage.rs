//! Makes, lists and revokes tokens, and lists teams.

use std::time::Duration;

use proto::{
    Reason,
    id::Invalid,
    name::{Team, TokenName},
};

use super::Access;
use crate::{
    ca,
    sandbox::{Caller, Error, Result},
    store::{Added, Token, TokenFilter, TokenPlace},
    token::{self, Issued, Order},
};

/// Longest time to live of a token: 10 years.
const TTL_MAX: Duration = Duration::from_hours(10 * 365 * 24);
/// Retry hint where a team has too many tokens, which only a revocation changes.
const FULL: Duration = Duration::from_mins(1);

impl Access {
    /// Makes a token. `ttl`: the time after which it expires; `None`: never. With a certificate request
    /// (`csr`, PEM) it is a client certificate, which is returned, too.
    ///
    /// # Errors
    /// When the order is wrong, a living token of the team has the name, or the team has too many.
    pub async fn create_token(
        &self,
        caller: &Caller,
        order: Order,
        ttl: Option<Duration>,
        csr: Option<&str>,
    ) -> Result<(Issued, Option<String>)> {
        let now_ms = self.now_ms();
        let mut issued = issue(order, ttl, now_ms)?;
        let certificate = csr.map(|csr| self.sign(&mut issued, ttl, csr)).transpose()?;
        let Token { id, team, name, user, scopes, .. } = &issued.token;
        done(self.store.add_token(issued.token.clone()).await?, &issued.token)?;
        tracing::info!(token = id, %team, %name, %scopes, by = caller.token,
            user = user.as_ref().map(tracing::field::display),
            certificate = certificate.is_some(), "token made");
        Ok((issued, certificate))
    }

    /// Makes a client certificate of a new token.
    fn sign(&self, issued: &mut Issued, ttl: Option<Duration>, csr: &str) -> Result<String> {
        let signer = self.signer.get().ok_or_else(|| {
            let message = "this controller has no CA for client certificates; its log says why";
            Error::new(Reason::StoreFailed, message)
        })?;
        let signed = signer.sign(&issued.token.id, ttl, csr).map_err(|error| match error {
            ca::Error::Request(why) => {
                tracing::debug!(why, "certificate request refused");
                let wrong = "must be a request for an ECDSA key on P-256, of 8192 bytes at most";
                Invalid::new("csr", wrong).into()
            }
            error @ (ca::Error::File { .. }
            | ca::Error::Broken { .. }
            | ca::Error::Missing(_)
            | ca::Error::Name(_)
            | ca::Error::Authority(_)
            | ca::Error::Ended
            | ca::Error::Certificate(_)) => {
                tracing::error!(error = %daemon::chain::Chain(&error), "could not sign a certificate");
                Error::new(Reason::StoreFailed, "the controller's CA failed; see its log")
            }
        })?;
        token::bind_to_key(issued, &signed.key);
        Ok(signed.pem)
    }

    /// Returns at most `limit` tokens after a page's last one, and the text that continues after
    /// them, if there are more.
    ///
    /// # Errors
    /// When `after` is not such a text, or the store fails.
    pub async fn list_tokens(
        &self,
        team: Option<Team>,
        include_ended: bool,
        after: &str,
        limit: u32,
    ) -> Result<(Vec<Token>, String)> {
        let living_ms = (!include_ended).then(|| self.now_ms());
        let after = place(after)?;
        let filter = TokenFilter { team, living_ms };
        let mut tokens = self.store.tokens(filter, after, limit + 1).await?;
        let more = tokens.len() > limit as usize;
        tokens.truncate(limit as usize);
        let next = tokens.last().filter(|_| more).map(next_page).unwrap_or_default();
        Ok((tokens, next))
    }

    /// Revokes a token by its id, or a living one by its name in a team, and ends its calls.
    ///
    /// # Errors
    /// TOKEN_NOT_FOUND when there is none.
    pub async fn revoke_token(&self, caller: &Caller, named: &str, team: &Team) -> Result<Token> {
        let now_ms = self.now_ms();
        let none = || {
            let message =
                format!("there is no token {named} in team {team}, and none with this id");
            Error::new(Reason::TokenNotFound, message)
        };
        let by_id = self.store.token(named).await?;
        let known = match (by_id, named.parse::<TokenName>()) {
            (Some(token), _) => Some(token),
            (None, Ok(name)) => self.store.token_named(team, &name, now_ms).await?,
            (None, Err(invalid)) => return Err(invalid.into()),
        };
        let id = known.ok_or_else(none)?.id;
        self.store.revoke_token(&id, now_ms).await?;
        tracing::info!(token = id, by = caller.token, "token revoked");
        let revoked = self.store.token(&id).await;
        // Last, without a wait behind it: a token that revokes itself gets its answer.
        self.end_calls(&id);
        revoked?.ok_or_else(none)
    }

    /// Returns the teams that have tokens, ordered by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn teams(&self) -> Result<Vec<Team>> {
        Ok(self.store.token_teams().await?)
    }
}

/// Makes a token that is not stored yet.
pub(super) fn issue(order: Order, ttl: Option<Duration>, now_ms: u64) -> Result<Issued, Invalid> {
    if ttl.is_some_and(|ttl| ttl < Duration::from_secs(1) || ttl > TTL_MAX) {
        return Err(Invalid::new("ttl", "must be 1 s to 10 years"));
    }
    if order.name.as_ref().is_some_and(is_like_an_id) {
        return Err(Invalid::new("name", "must not be 12 hex digits, which are an id"));
    }
    let expires_ms = ttl.map_or(0, |ttl| now_ms.saturating_add(daemon::clock::millis(ttl)));
    Ok(token::issue(Order { expires_ms, ..order }, now_ms))
}

/// Turns what the store says of a new token into the caller's error.
pub(super) fn done(added: Added, token: &Token) -> Result<()> {
    let Token { team, name, .. } = token;
    let taken = |message| Err(Error::new(Reason::NameTaken, message));
    match added {
        Added::New => Ok(()),
        Added::NameTaken => taken(format!("team {team} has a living token or key named {name}")),
        Added::KeyTaken => taken(format!("team {team} has this SSH key already")),
        Added::Full => {
            let message = format!("team {team} has too many living tokens and keys; revoke some");
            Err(Error::new(Reason::TooManyCalls, message).retry(FULL))
        }
    }
}

/// Parses the text of the page before.
pub(super) fn place(after: &str) -> Result<Option<TokenPlace>, Invalid> {
    match after.split_once('-') {
        None if after.is_empty() => Ok(None),
        Some((created_ms, id)) if id.len() <= 64 => {
            Ok(Some((created_ms.parse().map_err(|_| not_a_page())?, id.to_owned())))
        }
        None | Some(_) => Err(not_a_page()),
    }
}

/// Returns the text of the page after a token.
pub(super) fn next_page(last: &Token) -> String {
    format!("{}-{}", last.created_ms, last.id)
}

fn is_like_an_id(name: &TokenName) -> bool {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.as_str().len() == proto::token::ID_DIGITS && name.as_str().bytes().all(hex)
}

fn not_a_page() -> Invalid {
    Invalid::new("page_token", "must be the next_page_token of an answer")
}
