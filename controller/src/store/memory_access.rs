//! Tokens and limits of teams in memory.

use proto::{
    limits::TeamLimits,
    name::{Team, TokenName},
};

use super::{
    Result,
    access::{
        AccessStore, Added, DEAD_TOKENS_KEPT_MS, DEAD_TOKENS_MAX, SAME_KEY_MAX, SshKey, TOKENS_MAX,
        Token, TokenFilter, TokenPlace,
    },
    memory::{Memory, Tables},
};

fn place(token: &Token) -> TokenPlace {
    (token.created_ms, token.id.clone())
}

fn add(tables: &mut Tables, token: Token) -> Added {
    let now_ms = token.created_ms;
    let before_ms = now_ms.saturating_sub(DEAD_TOKENS_KEPT_MS);
    let old = |end_ms: u64| end_ms > 0 && end_ms < before_ms;
    tables.tokens.retain(|_, known| !old(known.revoked_ms) && !old(known.expires_ms));
    let is_dead = |known: &&Token| known.team == token.team && !known.is_living(now_ms);
    let mut dead: Vec<_> = tables.tokens.values().filter(is_dead).map(place).collect();
    dead.sort_unstable();
    let surplus = dead.len().saturating_sub(DEAD_TOKENS_MAX);
    for (_, id) in dead.drain(..surplus) {
        tables.tokens.remove(&id);
    }
    let of_team = |known: &&Token| known.team == token.team && known.is_living(now_ms);
    let living = tables.tokens.values().filter(of_team);
    if living.clone().any(|known| known.name == token.name) {
        return Added::NameTaken;
    }
    if living.count() >= TOKENS_MAX as usize {
        return Added::Full;
    }
    tables.tokens.insert(token.id.clone(), token);
    Added::New
}

fn page(
    tables: &Tables,
    filter: &TokenFilter,
    after: Option<TokenPlace>,
    limit: u32,
    wanted: impl Fn(&Token) -> bool,
) -> Vec<Token> {
    let after = after.unwrap_or_default();
    let found = tables.tokens.values().filter(|token| filter.admits(token) && wanted(token));
    let mut found: Vec<_> = found.filter(|token| place(token) > after).cloned().collect();
    found.sort_by_key(place);
    found.truncate(limit as usize);
    found
}

#[async_trait::async_trait]
impl AccessStore for Memory {
    async fn add_token(&self, token: Token) -> Result<Added> {
        Ok(add(&mut self.tables(), token))
    }

    async fn token(&self, id: &str) -> Result<Option<Token>> {
        Ok(self.tables().tokens.get(id).cloned())
    }

    async fn tokens_by_id(&self, ids: Vec<String>) -> Result<Vec<Token>> {
        let tables = self.tables();
        Ok(ids.iter().filter_map(|id| tables.tokens.get(id)).cloned().collect())
    }

    async fn token_named(
        &self,
        team: &Team,
        name: &TokenName,
        now_ms: u64,
    ) -> Result<Option<Token>> {
        let tables = self.tables();
        let mut living = tables.tokens.values().filter(|known| known.is_living(now_ms));
        Ok(living.find(|known| known.team == *team && known.name == *name).cloned())
    }

    async fn tokens(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<Token>> {
        Ok(page(&self.tables(), &filter, after, limit, |_| true))
    }

    async fn revoke_token(&self, id: &str, now_ms: u64) -> Result<bool> {
        let mut tables = self.tables();
        let token = tables.tokens.get_mut(id);
        let found = token.is_some();
        if let Some(token) = token.filter(|token| token.revoked_ms == 0) {
            token.revoked_ms = now_ms;
        }
        Ok(found)
    }

    async fn tokens_used(&self, used: Vec<(String, u64)>) -> Result<()> {
        let mut tables = self.tables();
        for (id, used_ms) in used {
            if let Some(token) = tables.tokens.get_mut(&id) {
                token.used_ms = token.used_ms.max(used_ms);
            }
        }
        Ok(())
    }

    async fn add_ssh_key(&self, key: SshKey) -> Result<Added> {
        let SshKey { token, key, added_by } = key;
        let mut tables = self.tables();
        let now_ms = token.created_ms;
        let mut same = tables.tokens.values().filter(|known| known.hash == token.hash);
        if same.any(|known| known.team == token.team && known.is_living(now_ms)) {
            return Ok(Added::KeyTaken);
        }
        let id = token.id.clone();
        let added = add(&mut tables, token);
        if added == Added::New {
            tables.ssh_keys.insert(id, (key, added_by));
        }
        let Tables { tokens, ssh_keys, .. } = &mut *tables;
        ssh_keys.retain(|id, _| tokens.contains_key(id));
        Ok(added)
    }

    async fn tokens_by_hash(&self, hash: &[u8], now_ms: u64) -> Result<Vec<Token>> {
        let tables = self.tables();
        let living = TokenFilter { team: None, living_ms: Some(now_ms) };
        let limit = u32::try_from(SAME_KEY_MAX).unwrap_or(u32::MAX);
        Ok(page(&tables, &living, None, limit, |token| token.hash == hash))
    }

    async fn ssh_keys(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<SshKey>> {
        let tables = self.tables();
        let is_key = |token: &Token| tables.ssh_keys.contains_key(&token.id);
        let found = page(&tables, &filter, after, limit, is_key).into_iter();
        Ok(found
            .filter_map(|token| {
                let (key, added_by) = tables.ssh_keys.get(&token.id)?.clone();
                Some(SshKey { token, key, added_by })
            })
            .collect())
    }

    async fn put_team_limits(&self, team: &Team, limits: TeamLimits) -> Result<()> {
        self.claimed_tables()?.limits.insert(team.clone(), limits);
        Ok(())
    }

    async fn team_limits(&self) -> Result<Vec<(Team, TeamLimits)>> {
        let tables = self.tables();
        Ok(tables.limits.iter().map(|(team, limits)| (team.clone(), limits.clone())).collect())
    }

    async fn token_teams(&self) -> Result<Vec<Team>> {
        let tables = self.tables();
        let teams: std::collections::BTreeSet<_> =
            tables.tokens.values().map(|token| token.team.clone()).collect();
        Ok(teams.into_iter().collect())
    }
}
