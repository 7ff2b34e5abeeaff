//! Finds out who logs in, and to which sandbox: a key of a team, and any form of the name of one of the team's
//! sandboxes. Everything else gets one and the same refusal.

use proto::{id::SandboxId, scope::Scope};
use russh::keys::PublicKey;

use super::Shared;
use crate::{sandbox::Caller, store::Token};

/// Longest user name that is looked up, bytes.
const USER_MAX: usize = 128;

/// Key that has been shown to be the client's, and the sandbox that it may enter.
#[derive(Debug, Clone)]
pub(super) struct Login {
    pub(super) caller: Caller,
    pub(super) token: Token,
    pub(super) sandbox: SandboxId,
}

/// Looks up a login. `None` when nobody has the key, when none of its teams has the sandbox, or when several
/// teams of the key have a sandbox of this name.
pub(super) async fn look_up(shared: &Shared, user: &str, key: &PublicKey) -> Option<Login> {
    if user.len() > USER_MAX {
        return None;
    }
    let tokens = match shared.access.tokens_of_ssh_key(key).await {
        Ok(tokens) => tokens,
        Err(error) => {
            tracing::error!(%error, "an SSH key could not be looked up");
            return None;
        }
    };
    let may = tokens.into_iter().filter(|token| token.scopes.allow(Scope::Exec));
    let mut found = may.filter_map(|token| {
        let (sandbox, _) = shared.sandboxes.identify(Some(&token.team), user)?;
        Some((token, sandbox))
    });
    match (found.next(), found.next()) {
        (Some((token, sandbox)), None) => {
            let caller = Caller {
                team: token.team.clone(),
                token: token.id.clone(),
                user: token.user.clone(),
                scopes: token.scopes,
            };
            Some(Login { caller, token, sandbox })
        }
        _ => None,
    }
}
