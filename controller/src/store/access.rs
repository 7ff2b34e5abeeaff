//! Stored tokens, and limits of teams. Any handle can write tokens: a command makes one beside a
//! running controller.

use proto::{
    limits::TeamLimits,
    name::{Team, TokenName, UserLabel},
    scope::Scopes,
};

use super::Result;

/// Time for which a token that is revoked or expired is kept, milliseconds: the event log names it.
pub(super) const DEAD_TOKENS_KEPT_MS: u64 = 90 * 24 * 3600 * 1000;
/// Most tokens of a team that are kept after their end: making and revoking one again and again must not make the
/// look at the others slow.
pub(super) const DEAD_TOKENS_MAX: usize = 1000;
/// Most tokens of a team that are neither revoked nor expired.
pub(super) const TOKENS_MAX: u32 = 1000;

/// A bearer token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Public id.
    pub id: String,
    /// SHA-256 of the secret.
    pub hash: Vec<u8>,
    /// Team that it belongs to.
    pub team: Team,
    /// Name, unique among the living tokens of the team.
    pub name: TokenName,
    /// Label of the person or program that it was made for.
    pub user: Option<UserLabel>,
    /// Calls that it allows.
    pub scopes: Scopes,
    /// Time of its issue, milliseconds since 1970.
    pub created_ms: u64,
    /// Time of its expiry, milliseconds since 1970; 0 when it never expires.
    pub expires_ms: u64,
    /// Time of its last use, milliseconds since 1970, up to a minute old; 0 before the first.
    pub used_ms: u64,
    /// Time of its revocation; 0 while it is valid.
    pub revoked_ms: u64,
}

impl Token {
    /// Returns true when the token is neither revoked nor expired.
    pub const fn is_living(&self, now_ms: u64) -> bool {
        self.revoked_ms == 0 && !self.is_expired(now_ms)
    }

    /// Returns true when its time is over.
    pub const fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_ms != 0 && self.expires_ms <= now_ms
    }
}

/// Result of adding a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// The token is stored.
    New,
    /// A living token of the team has the name.
    NameTaken,
    /// A living token of the team has the SSH key.
    KeyTaken,
    /// The team has as many living tokens as it may.
    Full,
}

/// SSH key of a team. Its token has the team, the label, the scopes and the times; the hash of the token is
/// that of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshKey {
    /// Token of the key.
    pub token: Token,
    /// Algorithm and key, as in a line of `authorized_keys`.
    pub key: String,
    /// Public id of the token by which it was added.
    pub added_by: String,
}

/// Most living tokens that one look-up of an SSH key returns: a key may be in several teams.
pub(super) const SAME_KEY_MAX: usize = 64;

/// Place in the list of tokens, which is ordered by the time of their issue and by id.
pub type TokenPlace = (u64, String);

/// Tokens that a page of the list has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenFilter {
    /// Only those of this team.
    pub team: Option<Team>,
    /// Only those that are living at this time, milliseconds since 1970.
    pub living_ms: Option<u64>,
}

impl TokenFilter {
    /// Returns true when a token matches.
    pub(super) fn admits(&self, token: &Token) -> bool {
        self.team.as_ref().is_none_or(|team| *team == token.team)
            && self.living_ms.is_none_or(|now_ms| token.is_living(now_ms))
    }
}

/// The part of the store about tokens and teams. Every method is one transaction.
#[async_trait::async_trait]
pub trait AccessStore: Send + Sync + std::fmt::Debug {
    /// Adds a token, and removes those that have been revoked or expired for long.
    async fn add_token(&self, token: Token) -> Result<Added>;

    /// Returns one token, revoked or not.
    async fn token(&self, id: &str) -> Result<Option<Token>>;

    /// Returns those of these tokens that there are, revoked or not, in any order.
    async fn tokens_by_id(&self, ids: Vec<String>) -> Result<Vec<Token>>;

    /// Returns the living token of a team with this name.
    async fn token_named(
        &self,
        team: &Team,
        name: &TokenName,
        now_ms: u64,
    ) -> Result<Option<Token>>;

    /// Returns at most `limit` tokens after a place in the list.
    async fn tokens(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<Token>>;

    /// Revokes a token. False when there is none.
    async fn revoke_token(&self, id: &str, now_ms: u64) -> Result<bool>;

    /// Records when tokens were last used; an earlier time than the known one changes nothing.
    async fn tokens_used(&self, used: Vec<(String, u64)>) -> Result<()>;

    /// Adds an SSH key with its token, as `add_token` does.
    async fn add_ssh_key(&self, key: SshKey) -> Result<Added>;

    /// Returns the tokens with this hash that are living, the oldest first, 64 at most.
    async fn tokens_by_hash(&self, hash: &[u8], now_ms: u64) -> Result<Vec<Token>>;

    /// Returns at most `limit` SSH keys after a place in the list of tokens.
    async fn ssh_keys(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<SshKey>>;

    /// Stores the limits of a team that differ from the configuration's. Only the handle that has
    /// claimed the store can.
    async fn put_team_limits(&self, team: &Team, limits: TeamLimits) -> Result<()>;

    /// Returns the stored limits of all teams, ordered by name.
    async fn team_limits(&self) -> Result<Vec<(Team, TeamLimits)>>;

    /// Returns the teams that have tokens, ordered by name.
    async fn token_teams(&self) -> Result<Vec<Team>>;
}
