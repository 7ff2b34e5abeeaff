//! Nodes that joined, in SQL.

use proto::name::NodeName;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{
    Result,
    enrolments::{Admission, Enrolment, Enrolments, Issued, NodeToken},
    rows::parsed,
    sqlite::Sqlite,
};

fn to_token(row: &Row<'_>) -> rusqlite::Result<NodeToken> {
    Ok(NodeToken {
        id: row.get(0)?,
        hash: row.get(1)?,
        node: parsed(row, 2)?,
        created_ms: row.get(3)?,
        expires_ms: row.get(4)?,
        used_ms: row.get(5)?,
        key: row.get(6)?,
    })
}

fn to_enrolment(row: &Row<'_>) -> rusqlite::Result<Enrolment> {
    let serials: Option<String> = row.get(6)?;
    Ok(Enrolment {
        node: parsed(row, 0)?,
        address: row.get(1)?,
        pool: row.get(2)?,
        joined_ms: row.get(3)?,
        revoked_ms: row.get(4)?,
        only_listed: row.get(5)?,
        serials: serials.iter().flat_map(|all| all.split(',')).map(str::to_owned).collect(),
    })
}

fn add(db: &Connection, node: &NodeName, issued: &Issued, now_ms: u64) -> rusqlite::Result<()> {
    db.prepare_cached(
        "DELETE FROM certificates WHERE node = ?1 AND not_after_ms <= ?2 AND serial IS NOT ?3",
    )?
    .execute(params![node.as_str(), now_ms, issued.in_use])?;
    db.prepare_cached("INSERT INTO certificates VALUES (?1, ?2, ?3)")?
        .execute(params![issued.serial, node.as_str(), issued.not_after_ms])
        .map(drop)
}

fn admit(db: &Connection, admission: &Admission) -> rusqlite::Result<bool> {
    let Admission { token, key, node, address, pool, issued, now_ms } = admission;
    let used = db
        .prepare_cached(
            "UPDATE node_tokens SET used_ms = ?2, key = ?3 WHERE id = ?1 AND node = ?4 \
             AND expires_ms > ?2 AND (used_ms = 0 OR key = ?3)",
        )?
        .execute(params![token, now_ms, key, node.as_str()])?;
    if used == 0 {
        return Ok(false);
    }
    db.prepare_cached(
        "INSERT INTO enrolments (node, address, pool, joined_ms) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (node) DO UPDATE SET address = ?2, pool = ?3, joined_ms = ?4, revoked_ms = 0",
    )?
    .execute(params![node.as_str(), address, pool, now_ms])?;
    db.prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, ?2)")?
        .execute(params![node.as_str(), address])?;
    add(db, node, issued, *now_ms)?;
    Ok(true)
}

fn revoke(db: &Connection, node: &NodeName, now_ms: u64) -> rusqlite::Result<()> {
    let node = node.as_str();
    db.prepare_cached("DELETE FROM node_tokens WHERE node = ?1")?.execute([node])?;
    db.prepare_cached("DELETE FROM certificates WHERE node = ?1")?.execute([node])?;
    db.prepare_cached(
        "INSERT INTO enrolments (node, address, pool, joined_ms, revoked_ms, only_listed) \
         VALUES (?1, '', '', 0, ?2, 1) \
         ON CONFLICT (node) DO UPDATE SET revoked_ms = ?2, only_listed = 1",
    )?
    .execute(params![node, now_ms])
    .map(drop)
}

#[async_trait::async_trait]
impl Enrolments for Sqlite {
    /// Any handle may do this, as with tokens of callers: `setup` makes the first one.
    async fn add_node_token(&self, token: NodeToken) -> Result<()> {
        self.write(move |db| {
            db.prepare_cached(
                "DELETE FROM node_tokens WHERE expires_ms < ?1 OR (used_ms = 0 AND node = ?2)",
            )?
            .execute(params![token.created_ms, token.node.as_str()])?;
            db.prepare_cached("INSERT INTO node_tokens VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
                .execute(params![
                    token.id,
                    token.hash,
                    token.node.as_str(),
                    token.created_ms,
                    token.expires_ms,
                    token.used_ms,
                    token.key
                ])
                .map(drop)
        })
        .await
    }

    async fn node_token(&self, id: &str) -> Result<Option<NodeToken>> {
        let id = id.to_owned();
        self.read(move |db| {
            db.prepare_cached(
                "SELECT id, hash, node, created_ms, expires_ms, used_ms, key FROM node_tokens \
                 WHERE id = ?1",
            )?
            .query_row([id], to_token)
            .optional()
        })
        .await
    }

    async fn admit(&self, admission: Admission) -> Result<bool> {
        self.write_as_claimed(move |db| admit(db, &admission)).await
    }

    async fn enrolments(&self) -> Result<Vec<Enrolment>> {
        self.read(|db| {
            db.prepare_cached(
                "SELECT node, address, pool, joined_ms, revoked_ms, only_listed, (SELECT \
                 group_concat(serial) FROM certificates WHERE certificates.node = \
                 enrolments.node) FROM enrolments ORDER BY node",
            )?
            .query_map([], to_enrolment)?
            .collect()
        })
        .await
    }

    async fn add_certificate(&self, node: &NodeName, issued: Issued, now_ms: u64) -> Result<bool> {
        let node = node.clone();
        self.write_as_claimed(move |db| {
            let revoked = db
                .prepare_cached("SELECT 1 FROM enrolments WHERE node = ?1 AND revoked_ms > 0")?
                .exists([node.as_str()])?;
            if !revoked {
                add(db, &node, &issued, now_ms)?;
            }
            Ok(!revoked)
        })
        .await
    }

    async fn revoke_node(&self, node: &NodeName, now_ms: u64) -> Result<()> {
        let node = node.clone();
        self.write_as_claimed(move |db| revoke(db, &node, now_ms)).await
    }
}
