//! Tokens: converts the request, calls `access`, converts the answer.

use proto::{
    id::Invalid, name::Team as TeamName, sandbox::v1::*, scope::Scopes, time::timestamp,
    token::Format,
};

use crate::{
    access::Access,
    sandbox::{Caller, Result},
    store,
    token::Order,
};

/// Entries of a page, by default and at most.
const PAGE: (u32, u32) = (100, 500);

/// Parses the name of a team; empty is the caller's own.
pub(super) fn team_or_own(text: &str, caller: &Caller) -> Result<TeamName, Invalid> {
    if text.is_empty() { Ok(caller.team.clone()) } else { text.parse() }
}

pub(super) fn page_size(asked: u32) -> Result<u32, Invalid> {
    let (default, max) = PAGE;
    match asked {
        0 => Ok(default),
        size if size <= max => Ok(size),
        _ => Err(Invalid::new("page_size", "must be at most 500")),
    }
}

/// Makes a token.
pub(super) async fn create(
    access: &Access,
    caller: &Caller,
    request: CreateTokenRequest,
) -> Result<CreateTokenResponse> {
    let known = |number: &i32| Scope::try_from(*number).ok().filter(|s| *s != Scope::Unspecified);
    let scopes: Option<Scopes> = request.scopes.iter().map(known).collect();
    let scopes = scopes.ok_or_else(|| Invalid::new("scopes", "must be known"))?;
    let ttl = proto::duration::check("ttl", request.ttl)?;
    let order = Order {
        team: team_or_own(&request.team, caller)?,
        name: (!request.name.is_empty()).then(|| request.name.parse()).transpose()?,
        user: (!request.user.is_empty()).then(|| request.user.parse()).transpose()?,
        scopes: if scopes.is_empty() { Scopes::SANDBOX } else { scopes },
        expires_ms: 0,
    };
    let csr = Some(request.csr.as_str()).filter(|csr| !csr.is_empty());
    let (issued, certificate) = access.create_token(caller, order, ttl, csr).await?;
    let text = match certificate {
        Some(_) => String::new(),
        None => issued.text(Format::Plain),
    };
    let certificate = certificate.unwrap_or_default();
    Ok(CreateTokenResponse { token: Some(token(issued.token)), text, certificate })
}

/// Lists a page of tokens.
pub(super) async fn list(access: &Access, ask: ListTokensRequest) -> Result<ListTokensResponse> {
    let ListTokensRequest { team, include_ended, page_size: size, page_token } = ask;
    let team = (!team.is_empty()).then(|| team.parse()).transpose()?;
    let size = page_size(size)?;
    let (tokens, next) = access.list_tokens(team, include_ended, &page_token, size).await?;
    let tokens = tokens.into_iter().map(token).collect();
    Ok(ListTokensResponse { tokens, next_page_token: next })
}

/// Revokes a token.
pub(super) async fn revoke(
    access: &Access,
    caller: &Caller,
    ask: RevokeTokenRequest,
) -> Result<RevokeTokenResponse> {
    let team = team_or_own(&ask.team, caller)?;
    let revoked = access.revoke_token(caller, &ask.token, &team).await?;
    Ok(RevokeTokenResponse { token: Some(token(revoked)) })
}

fn token(token: store::Token) -> Token {
    // 0 is never.
    let time = |ms: u64| (ms != 0).then(|| timestamp(ms));
    Token {
        certificate: crate::token::is_of_key(&token),
        ssh_key: crate::token::ssh_fingerprint(&token).is_some(),
        id: token.id,
        name: token.name.to_string(),
        team: token.team.to_string(),
        user: token.user.as_ref().map(ToString::to_string).unwrap_or_default(),
        scopes: token.scopes.iter().map(Into::into).collect(),
        created_at: time(token.created_ms),
        expires_at: time(token.expires_ms),
        used_at: time(token.used_ms),
        revoked_at: time(token.revoked_ms),
    }
}
