//! Tokens and teams: converts the request, calls `access`, converts the answer.

use std::{collections::BTreeSet, sync::Arc};

use proto::{id::Invalid, name::Team as TeamName, sandbox::v1::*, scope::Scopes, token::Format};

use crate::{
    access::Access,
    sandbox::{Caller, Error, Result, Sandboxes, TeamView},
    store,
    token::Order,
};

/// Entries of a page, by default and at most.
const PAGE: (u32, u32) = (100, 500);

/// Parses the name of a team; empty is the caller's own.
pub(super) fn team_or_own(text: &str, caller: &Caller) -> Result<TeamName, Invalid> {
    if text.is_empty() { Ok(caller.team.clone()) } else { text.parse() }
}

fn page_size(asked: u32) -> Result<u32, Invalid> {
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

/// Lists a page of the teams that have tokens or sandboxes.
pub(super) async fn teams(
    access: &Access,
    sandboxes: &Sandboxes,
    ask: ListTeamsRequest,
) -> Result<ListTeamsResponse> {
    let size = page_size(ask.page_size)? as usize;
    let mut names: BTreeSet<TeamName> = access.teams().await?.into_iter().collect();
    names.extend(sandboxes.teams());
    let after = ask.page_token.as_str();
    let mut rest = names.into_iter().filter(|name| name.as_str() > after);
    let page: Vec<_> = rest.by_ref().take(size).collect();
    let more = rest.next().is_some();
    let last = page.last().filter(|_| more);
    let next_page_token = last.map(ToString::to_string).unwrap_or_default();
    let teams = page.iter().map(|name| team(sandboxes.team(name))).collect();
    Ok(ListTeamsResponse { teams, next_page_token })
}

/// Returns a team: the caller's own, or any to an operator.
pub(super) fn get_team(
    sandboxes: &Sandboxes,
    caller: &Caller,
    ask: &GetTeamRequest,
) -> Result<GetTeamResponse> {
    let name = team_or_own(&ask.name, caller)?;
    if name != caller.team && !caller.scopes.allow(Scope::Admin) {
        let message = "a team other than your own needs the scope `admin`";
        return Err(Error::new(Reason::ScopeMissing, message));
    }
    Ok(GetTeamResponse { team: Some(team(sandboxes.team(&name))) })
}

/// Changes the limits of a team.
pub(super) async fn update_team(
    sandboxes: &Arc<Sandboxes>,
    caller: &Caller,
    request: UpdateTeamRequest,
) -> Result<UpdateTeamResponse> {
    let changed = sandboxes.update_team(caller, request).await?;
    Ok(UpdateTeamResponse { team: Some(team(changed)) })
}

fn team(view: TeamView) -> Team {
    let TeamView { team, own, limits, usage, creates } = view;
    let usage = TeamUsage {
        sandboxes: usage.sandboxes,
        cpu_cores: usage.cpu_cores,
        memory_mib: usage.memory_mib,
        disk_gib: usage.disk_gib,
        creates,
    };
    Team {
        name: team.to_string(),
        limits: Some(own.into()),
        effective: Some(limits.into()),
        usage: Some(usage),
    }
}

fn token(token: store::Token) -> Token {
    // 0 is never.
    let time = |ms: u64| (ms != 0).then(|| super::convert::timestamp(ms));
    Token {
        certificate: crate::token::is_of_key(&token),
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
