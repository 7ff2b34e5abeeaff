//! SSH keys: converts the request, calls `access`, converts the answer.

use proto::{
    name::{Team as TeamName, UserLabel},
    sandbox::v1::*,
    scope::Scopes,
    time::timestamp,
};

use super::tokens::{page_size, team_or_own};
use crate::{
    access::{Access, ssh_keys},
    sandbox::{Caller, Error, Result},
    store,
    token::Order,
};

/// Parses the name of a team: the caller's own, or any to an operator.
fn team(text: &str, caller: &Caller) -> Result<TeamName> {
    let team = team_or_own(text, caller)?;
    if team != caller.team && !caller.scopes.allow(Scope::Admin) {
        let message = "a team other than your own needs the scope `admin`";
        return Err(Error::new(Reason::ScopeMissing, message));
    }
    Ok(team)
}

/// Chooses the user of a key, in whose name its sessions are recorded: an operator names anybody, and a caller
/// without a user names whom it acts for. Another caller's keys are its own user's.
fn user(text: &str, caller: &Caller) -> Result<Option<UserLabel>> {
    let named: Option<UserLabel> = (!text.is_empty()).then(|| text.parse()).transpose()?;
    let own = caller.user.as_ref().filter(|_| !caller.scopes.allow(Scope::Admin));
    match (own, named) {
        (None, named) => Ok(named),
        (Some(own), Some(named)) if named != *own => {
            let message = format!("a key of a user other than {own} needs the scope `admin`");
            Err(Error::new(Reason::ScopeMissing, message))
        }
        (Some(own), Some(_) | None) => Ok(Some(own.clone())),
    }
}

/// Adds a key.
pub(super) async fn add(
    access: &Access,
    caller: &Caller,
    ask: AddSshKeyRequest,
) -> Result<AddSshKeyResponse> {
    let ttl = proto::duration::check("ttl", ask.ttl)?;
    let order = Order {
        team: team(&ask.team, caller)?,
        name: (!ask.name.is_empty()).then(|| ask.name.parse()).transpose()?,
        user: user(&ask.user, caller)?,
        scopes: Scopes::default(),
        expires_ms: 0,
    };
    let added = access.add_ssh_key(caller, order, ttl, &ask.public_key).await?;
    Ok(AddSshKeyResponse { key: Some(key(added)) })
}

/// Lists a page of keys.
pub(super) async fn list(
    access: &Access,
    caller: &Caller,
    ask: ListSshKeysRequest,
) -> Result<ListSshKeysResponse> {
    let (team, size) = (team(&ask.team, caller)?, page_size(ask.page_size)?);
    let listed = access.list_ssh_keys(team, ask.include_ended, &ask.page_token, size);
    let (keys, next_page_token) = listed.await?;
    Ok(ListSshKeysResponse { keys: keys.into_iter().map(key).collect(), next_page_token })
}

/// Removes a key.
pub(super) async fn remove(
    access: &Access,
    caller: &Caller,
    ask: RemoveSshKeyRequest,
) -> Result<RemoveSshKeyResponse> {
    let team = team(&ask.team, caller)?;
    let removed = access.remove_ssh_key(caller, &ask.key, &team).await?;
    Ok(RemoveSshKeyResponse { key: Some(key(removed)) })
}

fn key(key: store::SshKey) -> SshKey {
    let store::SshKey { token, key, added_by } = key;
    // 0 is never.
    let time = |ms: u64| (ms != 0).then(|| timestamp(ms));
    SshKey {
        fingerprint: ssh_keys::fingerprint(&token).unwrap_or_default(),
        id: token.id,
        name: token.name.to_string(),
        team: token.team.to_string(),
        user: token.user.as_ref().map(ToString::to_string).unwrap_or_default(),
        public_key: key,
        added_by,
        created_at: time(token.created_ms),
        expires_at: time(token.expires_ms),
        used_at: time(token.used_ms),
        removed_at: time(token.revoked_ms),
    }
}
