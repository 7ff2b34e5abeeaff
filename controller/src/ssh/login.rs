//! Finds out who logs in, and to which sandbox: a key of a team, and any form of the name of one of the team's
//! sandboxes. Everything else gets one and the same refusal.

use proto::{id::SandboxId, name::Team, scope::Scope};
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

/// Returns true when some team has a key.
pub(super) async fn is_known(shared: &Shared, key: &PublicKey) -> bool {
    !tokens(shared, key).await.is_empty()
}

/// Looks up a login. `None` when nobody has the key, or when the user names no sandbox that it may enter.
pub(super) async fn look_up(shared: &Shared, user: &str, key: &PublicKey) -> Option<Login> {
    if user.len() > USER_MAX {
        return None;
    }
    let identify = |team: &Team| shared.sandboxes.identify(Some(team), user).map(|(id, _)| id);
    let (token, sandbox) = choose(tokens(shared, key).await, user, identify)?;
    let caller = Caller {
        team: token.team.clone(),
        token: token.id.clone(),
        user: token.user.clone(),
        scopes: token.scopes,
        permit: None,
    };
    Some(Login { caller, token, sandbox })
}

/// Returns the tokens of a key, one for each of its teams.
async fn tokens(shared: &Shared, key: &PublicKey) -> Vec<Token> {
    match shared.access.tokens_of_ssh_key(key).await {
        Ok(mut tokens) => {
            tokens.retain(|token| token.scopes.allow(Scope::Exec));
            tokens
        }
        Err(error) => {
            tracing::error!(%error, "an SSH key could not be looked up");
            Vec::new()
        }
    }
}

/// Chooses the token and the sandbox of a login. An id means one sandbox, whichever team of the key has it. A
/// name or a vmid means one of the team that has had the key for longest: anybody could add a key that is
/// public to a team of their own, and give a sandbox there the same name.
fn choose(
    mut tokens: Vec<Token>,
    user: &str,
    identify: impl Fn(&Team) -> Option<SandboxId>,
) -> Option<(Token, SandboxId)> {
    tokens.sort_by_key(|token| token.created_ms);
    let teams = if user.parse::<SandboxId>().is_ok() { tokens.len() } else { 1 };
    tokens.into_iter().take(teams).find_map(|token| {
        let sandbox = identify(&token.team)?;
        Some((token, sandbox))
    })
}

#[cfg(test)]
mod tests {
    use proto::scope::Scopes;

    use super::*;
    use crate::token::{Order, issue};

    fn token(team: &str, created_ms: u64) -> Token {
        let order = Order::new(team.parse().expect("a team"), Scopes::SANDBOX);
        issue(order, created_ms).token
    }

    #[test]
    fn name_is_one_of_the_team_that_has_the_key_for_longest() {
        let [own, strange] = [1, 2].map(|number| SandboxId::new(number, &[0; 10]));
        let tokens = || vec![token("stranger", 9), token("own", 5)];
        let of = |team: &Team| if team.as_str() == "own" { own } else { strange };
        for user in ["web", "100017", "cmux-100017"] {
            let (token, sandbox) = choose(tokens(), user, |team| Some(of(team))).expect("found");
            assert_eq!((token.team.as_str(), sandbox), ("own", own), "{user}");
            // Not even one that the first team does not have.
            let only = |team: &Team| Some(of(team)).filter(|id| *id == strange);
            assert!(choose(tokens(), user, only).is_none(), "{user}");
        }
    }

    #[test]
    fn id_is_found_in_every_team_of_the_key() {
        let id = SandboxId::new(1, &[0; 10]);
        let only = |team: &Team| (team.as_str() == "stranger").then_some(id);
        let tokens = vec![token("stranger", 9), token("own", 5)];
        let (token, sandbox) = choose(tokens, &id.to_string(), only).expect("found");
        assert_eq!((token.team.as_str(), sandbox), ("stranger", id));
        assert!(choose(Vec::new(), "web", only).is_none());
    }
}
