//! Tokens and limits of teams in SQL.

use proto::{
    limits::TeamLimits,
    name::{Team, TokenName, UserLabel},
};
use rusqlite::{Connection, OptionalExtension, named_params, params};

use super::{
    Result,
    access::{
        AccessStore, Added, DEAD_TOKENS_KEPT_MS, DEAD_TOKENS_MAX, SAME_KEY_MAX, SshKey, TOKENS_MAX,
        Token, TokenFilter, TokenPlace,
    },
    rows::parsed,
    sqlite::Sqlite,
};

const COLUMNS: &str = "id, hash, team, scopes, created_ms, revoked_ms, name, user, expires_ms, \
                       used_ms";
/// Condition of a token that is living at `:now_ms`.
pub(super) const LIVING: &str = "revoked_ms = 0 AND (expires_ms = 0 OR expires_ms > :now_ms)";

fn to_token(row: &rusqlite::Row<'_>) -> rusqlite::Result<Token> {
    let user: String = row.get(7)?;
    Ok(Token {
        id: row.get(0)?,
        hash: row.get(1)?,
        team: parsed(row, 2)?,
        scopes: proto::scope::Scopes::stored(&row.get::<_, String>(3)?),
        created_ms: row.get(4)?,
        revoked_ms: row.get(5)?,
        name: parsed(row, 6)?,
        user: (!user.is_empty()).then(|| parsed(row, 7)).transpose()?,
        expires_ms: row.get(8)?,
        used_ms: row.get(9)?,
    })
}

fn named(db: &Connection, team: &str, name: &str, now_ms: u64) -> rusqlite::Result<Option<Token>> {
    db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM tokens WHERE team = :team AND name = :name AND {LIVING}"
    ))?
    .query_row(named_params! { ":team": team, ":name": name, ":now_ms": now_ms }, to_token)
    .optional()
}

/// Removes tokens that have ended long ago, and the oldest of a team that has ended too many.
fn remove_dead(db: &Connection, team: &str, now_ms: u64) -> rusqlite::Result<()> {
    let before_ms = now_ms.saturating_sub(DEAD_TOKENS_KEPT_MS);
    // Two texts, so that each takes its index.
    for old in [
        "DELETE FROM tokens WHERE revoked_ms > 0 AND revoked_ms < ?1",
        "DELETE FROM tokens WHERE expires_ms > 0 AND expires_ms < ?1",
    ] {
        db.prepare_cached(old)?.execute([before_ms])?;
    }
    db.prepare_cached(&format!(
        "DELETE FROM tokens WHERE id IN (SELECT id FROM tokens WHERE team = :team AND NOT ({LIVING}) \
         ORDER BY created_ms DESC, id DESC LIMIT -1 OFFSET {DEAD_TOKENS_MAX})"
    ))?
    .execute(named_params! { ":team": team, ":now_ms": now_ms })
    .map(drop)
}

fn add(db: &Connection, token: &Token) -> rusqlite::Result<Added> {
    let (team, now_ms) = (token.team.as_str(), token.created_ms);
    remove_dead(db, team, now_ms)?;
    if named(db, team, token.name.as_str(), now_ms)?.is_some() {
        return Ok(Added::NameTaken);
    }
    let living: u32 = db
        .prepare_cached(&format!("SELECT count(*) FROM tokens WHERE team = :team AND {LIVING}"))?
        .query_row(named_params! { ":team": team, ":now_ms": now_ms }, |row| row.get(0))?;
    if living >= TOKENS_MAX {
        return Ok(Added::Full);
    }
    db.prepare_cached(&format!(
        "INSERT INTO tokens ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"
    ))?
    .execute(params![
        token.id,
        token.hash,
        team,
        token.scopes.to_string(),
        now_ms,
        token.revoked_ms,
        token.name.as_str(),
        token.user.as_ref().map_or("", UserLabel::as_str),
        token.expires_ms,
        token.used_ms,
    ])?;
    Ok(Added::New)
}

fn page(
    db: &Connection,
    filter: &TokenFilter,
    after: Option<TokenPlace>,
    limit: u32,
) -> rusqlite::Result<Vec<Token>> {
    let text = format!("SELECT {COLUMNS} FROM tokens WHERE (created_ms, id) > (:created_ms, :id)");
    page_of(db, text, filter, after, limit, to_token)
}

fn page_of<T>(
    db: &Connection,
    mut text: String,
    filter: &TokenFilter,
    after: Option<TokenPlace>,
    limit: u32,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    let (created_ms, id) = after.unwrap_or_default();
    let mut values: Vec<(&str, &dyn rusqlite::ToSql)> =
        vec![(":created_ms", &created_ms), (":id", &id), (":limit", &limit)];
    let team = filter.team.as_ref().map(Team::as_str);
    if let Some(team) = &team {
        text.push_str(" AND team = :team");
        values.push((":team", team));
    }
    if let Some(now_ms) = &filter.living_ms {
        text.push_str(" AND ");
        text.push_str(LIVING);
        values.push((":now_ms", now_ms));
    }
    text.push_str(" ORDER BY created_ms, id LIMIT :limit");
    db.prepare_cached(&text)?.query_map(values.as_slice(), read)?.collect()
}

fn add_ssh_key(db: &Connection, key: &SshKey) -> rusqlite::Result<Added> {
    let SshKey { token, key, added_by } = key;
    let taken = db
        .prepare_cached(&format!(
            "SELECT 1 FROM tokens WHERE hash = :hash AND team = :team AND {LIVING}"
        ))?
        .exists(named_params! {
            ":hash": token.hash, ":team": token.team.as_str(), ":now_ms": token.created_ms,
        })?;
    if taken {
        return Ok(Added::KeyTaken);
    }
    let added = add(db, token)?;
    if added == Added::New {
        db.prepare_cached("INSERT INTO ssh_keys (token, key, added_by) VALUES (?1, ?2, ?3)")?
            .execute([&token.id, key, added_by])?;
    }
    Ok(added)
}

#[async_trait::async_trait]
impl AccessStore for Sqlite {
    async fn add_token(&self, token: Token) -> Result<Added> {
        self.write(move |db| add(db, &token)).await
    }

    async fn token(&self, id: &str) -> Result<Option<Token>> {
        let id = id.to_owned();
        self.look_up_tokens(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM tokens WHERE id = ?1"))?
                .query_row([id], to_token)
                .optional()
        })
        .await
    }

    async fn tokens_by_id(&self, ids: Vec<String>) -> Result<Vec<Token>> {
        let ids = serde_json::json!(ids).to_string();
        self.look_up_tokens(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM tokens WHERE id IN (SELECT value FROM json_each(?1))"
            ))?
            .query_map([&ids], to_token)?
            .collect()
        })
        .await
    }

    async fn token_named(
        &self,
        team: &Team,
        name: &TokenName,
        now_ms: u64,
    ) -> Result<Option<Token>> {
        let (team, name) = (team.clone(), name.clone());
        self.read(move |db| named(db, team.as_str(), name.as_str(), now_ms)).await
    }

    async fn tokens(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<Token>> {
        self.read(move |db| page(db, &filter, after, limit)).await
    }

    async fn revoke_token(&self, id: &str, now_ms: u64) -> Result<bool> {
        let id = id.to_owned();
        self.write(move |db| {
            db.prepare_cached(
                "UPDATE tokens SET revoked_ms = ?2 WHERE id = ?1 AND revoked_ms = 0",
            )?
            .execute(params![id, now_ms])?;
            db.prepare_cached("SELECT 1 FROM tokens WHERE id = ?1")?.exists([id])
        })
        .await
    }

    async fn tokens_used(&self, used: Vec<(String, u64)>) -> Result<()> {
        self.write(move |db| {
            let mut update =
                db.prepare_cached("UPDATE tokens SET used_ms = ?2 WHERE id = ?1 AND used_ms < ?2")?;
            used.iter().try_for_each(|(id, used_ms)| update.execute(params![id, used_ms]).map(drop))
        })
        .await
    }

    async fn add_ssh_key(&self, key: SshKey) -> Result<Added> {
        self.write(move |db| add_ssh_key(db, &key)).await
    }

    async fn tokens_by_hash(&self, hash: &[u8], now_ms: u64) -> Result<Vec<Token>> {
        let hash = hash.to_owned();
        self.look_up_tokens(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM tokens WHERE hash = :hash AND {LIVING} \
                 ORDER BY created_ms, id LIMIT {SAME_KEY_MAX}"
            ))?
            .query_map(named_params! { ":hash": hash, ":now_ms": now_ms }, to_token)?
            .collect()
        })
        .await
    }

    async fn ssh_keys(
        &self,
        filter: TokenFilter,
        after: Option<TokenPlace>,
        limit: u32,
    ) -> Result<Vec<SshKey>> {
        self.read(move |db| {
            let text = format!(
                "SELECT {COLUMNS}, key, added_by FROM tokens JOIN ssh_keys ON token = id \
                 WHERE (created_ms, id) > (:created_ms, :id)"
            );
            page_of(db, text, &filter, after, limit, |row| {
                let (token, key, added_by) = (to_token(row)?, row.get(10)?, row.get(11)?);
                Ok(SshKey { token, key, added_by })
            })
        })
        .await
    }

    async fn put_team_limits(&self, team: &Team, limits: TeamLimits) -> Result<()> {
        let team = team.clone();
        self.write_as_claimed(move |db| {
            db.prepare_cached("INSERT OR REPLACE INTO teams (name, limits) VALUES (?1, ?2)")?
                .execute([team.as_str(), &limits.to_string()])
                .map(drop)
        })
        .await
    }

    async fn team_limits(&self) -> Result<Vec<(Team, TeamLimits)>> {
        self.read(|db| {
            db.prepare_cached("SELECT name, limits FROM teams ORDER BY name")?
                .query_map([], |row| {
                    Ok((parsed(row, 0)?, TeamLimits::stored(&row.get::<_, String>(1)?)))
                })?
                .collect()
        })
        .await
    }

    async fn token_teams(&self) -> Result<Vec<Team>> {
        self.read(|db| {
            db.prepare_cached("SELECT DISTINCT team FROM tokens ORDER BY team")?
                .query_map([], |row| parsed(row, 0))?
                .collect()
        })
        .await
    }
}
