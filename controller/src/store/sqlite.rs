//! Store in one SQLite file. Requests that wait share one fsync.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use daemon::{
    group_commit::{self, Bounds, Handle},
    seal::{Db, Key, OVERHEAD},
};
use proto::{
    id::SandboxId,
    name::{NodeName, RequestId, Team, UserLabel},
};
use rusqlite::{Connection, OptionalExtension, named_params, params};

use super::{
    Begun, Choice, Error, Event, EventPage, FILES_BYTES_MAX, Filter, KnownState, Result, Row,
    State, Store,
    rows::{parsed, state, to_row},
    sealed, sqlite_events as events, sqlite_retention as retention,
};

/// Schema changes in order; the file's `user_version` is the number of those applied.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_start.sql"),
    include_str!("migrations/0002_events.sql"),
    include_str!("migrations/0003_files.sql"),
    include_str!("migrations/0004_token_names.sql"),
    include_str!("migrations/0005_quotas.sql"),
    include_str!("migrations/0006_enrolments.sql"),
    include_str!("migrations/0007_sealed.sql"),
    include_str!("migrations/0008_event_shares.sql"),
    include_str!("migrations/0009_ssh_keys.sql"),
    include_str!("migrations/0010_counts.sql"),
];
/// Bounds of the queues.
const BOUNDS: Bounds = Bounds { queue: 4096, group: 256 };
/// Pages of 4 KiB in the write-ahead log at which it is checkpointed. With SQLite's default of 1000
/// a few hundred creations fill it, and the pages that all of them change are written each time.
const LOG_PAGES: u32 = 8000;
/// Size of the cache of prepared statements: enough for all.
const STATEMENTS: usize = 64;

/// Store in a SQLite file. Its threads end when it is dropped.
#[derive(Debug)]
pub struct Sqlite {
    write: Handle,
    read: Handle,
    /// Reads tokens alone. Each call looks its own up, and must not wait for a page of another team's events.
    read_tokens: Handle,
    key: Arc<Key>,
    /// Epoch that this handle has claimed; 0: none.
    claimed: Arc<AtomicU64>,
}

impl Sqlite {
    /// Opens the file; creates it or migrates its schema where needed. The controller's key,
    /// `secret.key`, is beside it.
    ///
    /// # Errors
    /// When it cannot be opened, or a later version of the program has written it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut writer = group_commit::open(path, LOG_PAGES).map_err(failed)?;
        let key = Arc::new(sealed::key_beside(path)?);
        migrate(&mut writer, &key)?;
        sealed::scrub(&writer);
        sealed::tell_lost(&Db { connection: &writer, key: &key }).map_err(failed)?;
        let reader = group_commit::open_to_read(path).map_err(failed)?;
        let token_reader = group_commit::open_to_read(path).map_err(failed)?;
        for db in [&writer, &reader, &token_reader] {
            db.set_prepared_statement_cache_capacity(STATEMENTS);
        }
        let write = Handle::writer("store-write", writer, BOUNDS, ()).map_err(failed)?;
        let read = Handle::reader("store-read", reader, BOUNDS.queue).map_err(failed)?;
        let read_tokens = Handle::reader("store-tokens", token_reader, BOUNDS.queue);
        let read_tokens = read_tokens.map_err(failed)?;
        Ok(Self { write, read, read_tokens, key, claimed: Arc::default() })
    }

    pub(super) async fn write<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    {
        let key = Arc::clone(&self.key);
        let work = move |connection: &Connection| work(&Db { connection, key: &key });
        self.write.run(work).await.map_err(failed)?.map_err(failed)
    }

    /// Writes, unless another handle has claimed the store since this one did.
    pub(super) async fn write_as_claimed<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    {
        let claimed = Arc::clone(&self.claimed);
        let written = self.write(move |db| {
            let claimed = claimed.load(Ordering::Acquire);
            let replaced = claimed > 0 && epoch(db)? > claimed;
            if replaced { Ok(None) } else { work(db).map(Some) }
        });
        written.await?.ok_or(Error::Replaced)
    }

    pub(super) async fn read<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    {
        let key = Arc::clone(&self.key);
        let work = move |connection: &Connection| work(&Db { connection, key: &key });
        self.read.run(work).await.map_err(failed)?.map_err(failed)
    }

    /// Looks up tokens by a key. Only what takes no time that grows with anything runs here.
    pub(super) async fn look_up_tokens<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.read_tokens.run(work).await.map_err(failed)?.map_err(failed)
    }
}

fn epoch(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT value FROM epoch")?.query_row([], |row| row.get(0))
}

fn raise(db: &Connection, least: u64) -> rusqlite::Result<u64> {
    db.prepare_cached("UPDATE epoch SET value = max(value, ?1) RETURNING value")?
        .query_row([least], |row| row.get(0))
}

pub(super) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(error.to_string())
}

fn migrate(connection: &mut Connection, key: &Key) -> Result<()> {
    // Exclusive, so that a command and the daemon may start at the same time.
    let transaction = connection
        .transaction_with_behavior(rusqlite::TransactionBehavior::Exclusive)
        .map_err(failed)?;
    let version: usize =
        transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    if version > MIGRATIONS.len() {
        return Err(Error::Failed(format!(
            "the file has schema version {version}, this program knows {}: use a later program",
            MIGRATIONS.len()
        )));
    }
    for (at, sql) in MIGRATIONS.iter().enumerate().skip(version) {
        transaction.execute_batch(sql).map_err(failed)?;
        transaction.pragma_update(None, "user_version", at + 1).map_err(failed)?;
    }
    sealed::seal_the_plain(&Db { connection: &transaction, key }, version).map_err(failed)?;
    transaction.commit().map_err(failed)
}

const COLUMNS: &str = "id, team, request_id, digest, request, state, node, attempt, decision, \
                       cancelled, released, created_ms, ended_ms, last, user";

fn insert(connection: &Db<'_>, row: &Row) -> rusqlite::Result<()> {
    let id = row.id.to_string();
    let request = sealed::seal_request(connection.key, &id, &row.request)?;
    connection
        .prepare_cached(
            "INSERT INTO sandboxes (id, team, request_id, digest, request, state, node, attempt, \
             decision, cancelled, released, created_ms, ended_ms, last, user) VALUES (:id, :team, \
             :request_id, :digest, :request, :state, :node, :attempt, :decision, :cancelled, \
             :released, :created_ms, :ended_ms, :last, :user)",
        )?
        .execute(named_params! {
            ":id": id, ":team": row.team.as_str(),
            ":request_id": row.request_id.as_str(), ":digest": row.digest,
            ":request": request, ":state": state(row.state),
            ":node": row.node.as_ref().map(NodeName::as_str), ":attempt": row.attempt,
            ":decision": row.decision, ":cancelled": row.cancelled, ":released": row.released,
            ":created_ms": row.created_ms, ":ended_ms": row.ended_ms, ":last": row.last,
            ":user": row.user.as_ref().map_or("", UserLabel::as_str),
        })
        .map(drop)
}

/// Keeps the files of a creation. False when there would be too many.
fn add_files(connection: &Db<'_>, row: &Row, files: &[u8]) -> rusqlite::Result<bool> {
    // SQLite reads no content for its length, and there are few rows.
    let kept = |team: Option<&str>| {
        connection
            .prepare_cached(
                "SELECT coalesce(sum(length(content) - ?2), 0) FROM files \
                 WHERE team = ?1 OR ?1 IS NULL",
            )?
            .query_row(params![team, OVERHEAD], |row| row.get::<_, u64>(0))
    };
    let (of_team, of_all) = FILES_BYTES_MAX;
    let more = files.len() as u64;
    if kept(Some(row.team.as_str()))? + more > of_team || kept(None)? + more > of_all {
        return Ok(false);
    }
    let id = row.id.to_string();
    let content = sealed::seal_files(connection.key, &id, files)?;
    connection
        .prepare_cached("INSERT INTO files (id, team, content) VALUES (?1, ?2, ?3)")?
        .execute(params![id, row.team.as_str(), content])?;
    Ok(true)
}

fn drop_files(connection: &Connection, id: &str) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM files WHERE id = ?1")?.execute([id]).map(drop)
}

fn holder(connection: &Db<'_>, team: &str, request: &str) -> rusqlite::Result<Option<Row>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sandboxes WHERE team = ?1 AND request_id = ?2 AND released = 0"
        ))?
        .query_row(params![team, request], |row| to_row(row, connection.key))
        .optional()
}

fn put_states(connection: &Db<'_>, seen: KnownState) -> rusqlite::Result<()> {
    let id = seen.id.to_string();
    let known = connection
        .prepare_cached("SELECT state FROM sandboxes WHERE id = ?1")?
        .query_row([&id], |row| row.get::<_, String>(0))
        .optional()?;
    match known.as_deref() {
        Some("done") => connection
            .prepare_cached("UPDATE sandboxes SET last = ?2, ended_ms = ?3 WHERE id = ?1")?
            .execute(params![id, seen.last, seen.ended_ms])
            .map(drop),
        Some(_) => Ok(()),
        None => {
            let taken = holder(connection, seen.team.as_str(), seen.request_id.as_str())?.is_some();
            insert(
                connection,
                &Row {
                    id: seen.id,
                    team: seen.team,
                    user: None,
                    request_id: seen.request_id,
                    digest: String::new(),
                    request: Vec::new().into(),
                    state: State::Done,
                    node: Some(seen.node),
                    attempt: seen.attempt,
                    decision: String::new(),
                    cancelled: false,
                    released: taken,
                    created_ms: seen.created_ms,
                    ended_ms: seen.ended_ms,
                    last: seen.last,
                },
            )
        }
    }
}

#[async_trait::async_trait]
impl Store for Sqlite {
    async fn begin(&self, row: Row, files: Option<Vec<u8>>, asked: Event) -> Result<Begun> {
        self.write_as_claimed(move |db| {
            if let Some(holder) = holder(db, row.team.as_str(), row.request_id.as_str())? {
                return Ok(Begun::Taken(Box::new(holder)));
            }
            if let Some(files) = files
                && !add_files(db, &row, &files)?
            {
                return Ok(Begun::Full);
            }
            insert(db, &row)?;
            events::append(db, &[asked]).map(Begun::New)
        })
        .await
    }

    async fn files(&self, id: &SandboxId) -> Result<Option<Vec<u8>>> {
        let id = id.to_string();
        self.read(move |db| {
            db.prepare_cached("SELECT content FROM files WHERE id = ?1")?
                .query_row([&id], |row| sealed::open_files(db.key, &id, &row.get::<_, Vec<u8>>(0)?))
                .optional()
        })
        .await
    }

    async fn by_request(&self, team: &Team, request: &RequestId) -> Result<Option<Row>> {
        let (team, request) = (team.clone(), request.clone());
        self.read(move |db| holder(db, team.as_str(), request.as_str())).await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Row>> {
        let id = id.to_string();
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1"))?
                .query_row([id], |row| to_row(row, db.key))
                .optional()
        })
        .await
    }

    async fn after(&self, id: Option<SandboxId>, limit: u32) -> Result<Vec<Row>> {
        let after = id.map(|id| id.to_string()).unwrap_or_default();
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sandboxes WHERE id > ?1 ORDER BY id LIMIT ?2"
            ))?
            .query_map(params![after, limit], |row| to_row(row, db.key))?
            .collect()
        })
        .await
    }

    async fn choose(&self, id: &SandboxId, choice: Choice) -> Result<bool> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            let changed = db
                .prepare_cached(
                    "UPDATE sandboxes SET node = ?2, attempt = ?3, decision = ?4 \
                     WHERE id = ?1 AND state = 'placing'",
                )?
                .execute(params![id, choice.node.as_str(), choice.attempt, choice.decision])?;
            if let (1, Some((node, attempt))) = (changed, choice.abandoned) {
                db.prepare_cached("INSERT OR REPLACE INTO cancels VALUES (?1, ?2, ?3)")?
                    .execute(params![node.as_str(), id, attempt])?;
            }
            Ok(changed == 1)
        })
        .await
    }

    async fn done(&self, id: &SandboxId, last: Vec<u8>, events: Vec<Event>) -> Result<u64> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached("UPDATE sandboxes SET state = 'done', last = ?2 WHERE id = ?1")?
                .execute(params![id, last])?;
            drop_files(db, &id)?;
            events::append(db, &events)
        })
        .await
    }

    async fn failed(
        &self,
        id: &SandboxId,
        last: Vec<u8>,
        released: bool,
        now_ms: u64,
    ) -> Result<()> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached(
                "UPDATE sandboxes SET state = 'failed', last = ?2, released = ?3, ended_ms = ?4 \
                 WHERE id = ?1",
            )?
            .execute(params![id, last, released, now_ms])?;
            drop_files(db, &id)
        })
        .await
    }

    async fn cancel(&self, id: &SandboxId) -> Result<()> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached("UPDATE sandboxes SET cancelled = 1 WHERE id = ?1")?
                .execute([id])
                .map(drop)
        })
        .await
    }

    async fn put_states(&self, states: Vec<KnownState>, events: Vec<Event>) -> Result<u64> {
        self.write_as_claimed(move |db| {
            states.into_iter().try_for_each(|seen| put_states(db, seen))?;
            events::append(db, &events)
        })
        .await
    }

    async fn events(&self, after: u64, filter: Filter, limit: u32) -> Result<EventPage> {
        self.read(move |db| events::page(db, after, &filter, limit)).await
    }

    async fn before_last(&self, filter: Filter, count: u32) -> Result<u64> {
        self.read(move |db| events::before_last(db, &filter, count)).await
    }

    async fn event_hours(&self, newest: u32) -> Result<Vec<u64>> {
        self.read(move |db| retention::hours(db, newest)).await
    }

    async fn prune_events(&self, before_ms: u64, limit: u32) -> Result<u64> {
        self.write_as_claimed(move |db| retention::prune(db, before_ms, limit)).await
    }

    async fn drop_events(&self, share: Option<Team>, count: u32) -> Result<()> {
        self.write_as_claimed(move |db| retention::drop_oldest(db, share.as_ref(), count)).await
    }

    async fn event_counts(&self) -> Result<Vec<(Option<Team>, u64)>> {
        self.read(|db| retention::counts(db)).await
    }

    async fn events_of_team(&self, team: &Team) -> Result<u64> {
        let team = team.clone();
        self.read(move |db| retention::count_of(db, &team)).await
    }

    async fn forget(&self, before_ms: u64) -> Result<Vec<SandboxId>> {
        self.write_as_claimed(move |db| {
            db.prepare_cached(
                "DELETE FROM sandboxes WHERE ended_ms > 0 AND ended_ms < ?1 RETURNING id",
            )?
            .query_map([before_ms], |row| parsed(row, 0))?
            .collect::<rusqlite::Result<Vec<_>>>()
            .and_then(|mut ids: Vec<SandboxId>| {
                ids.sort_unstable();
                // A forgotten node may never come back to be told of them.
                db.prepare_cached(
                    "DELETE FROM cancels WHERE node IN (SELECT name FROM nodes WHERE address = '') \
                     AND id NOT IN (SELECT id FROM sandboxes)",
                )?
                .execute([])?;
                Ok(ids)
            })
        })
        .await
    }

    async fn pending_cancels(&self, node: &NodeName) -> Result<Vec<(SandboxId, u32)>> {
        let node = node.clone();
        self.read(move |db| {
            db.prepare_cached("SELECT id, attempt FROM cancels WHERE node = ?1 ORDER BY id")?
                .query_map([node.as_str()], |row| Ok((parsed(row, 0)?, row.get(1)?)))?
                .collect()
        })
        .await
    }

    async fn cancel_delivered(&self, node: &NodeName, id: &SandboxId, attempt: u32) -> Result<()> {
        let (node, id) = (node.clone(), id.to_string());
        self.write_as_claimed(move |db| {
            db.prepare_cached("DELETE FROM cancels WHERE node = ?1 AND id = ?2 AND attempt <= ?3")?
                .execute(params![node.as_str(), id, attempt])
                .map(drop)
        })
        .await
    }

    async fn put_node(&self, name: &NodeName, address: &str) -> Result<()> {
        let (name, address) = (name.clone(), address.to_owned());
        self.write(move |db| {
            db.prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, ?2)")?
                .execute(params![name.as_str(), address])
                .map(drop)
        })
        .await
    }

    /// A forgotten node has no address.
    async fn forget_node(&self, name: &NodeName) -> Result<()> {
        let name = name.clone();
        self.write(move |db| {
            db.prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, '')")?
                .execute([name.as_str()])?;
            db.prepare_cached("UPDATE enrolments SET address = '', pool = '' WHERE node = ?1")?
                .execute([name.as_str()])
                .map(drop)
        })
        .await
    }

    async fn forgotten_nodes(&self) -> Result<Vec<NodeName>> {
        self.read(|db| {
            db.prepare_cached("SELECT name FROM nodes WHERE address = '' ORDER BY name")?
                .query_map([], |row| parsed(row, 0))?
                .collect()
        })
        .await
    }

    async fn nodes(&self) -> Result<Vec<(NodeName, String)>> {
        self.read(|db| {
            db.prepare_cached("SELECT name, address FROM nodes WHERE address <> '' ORDER BY name")?
                .query_map([], |row| Ok((parsed(row, 0)?, row.get(1)?)))?
                .collect()
        })
        .await
    }

    async fn claim(&self) -> Result<u64> {
        let claimed = Arc::clone(&self.claimed);
        self.write(move |db| {
            let epoch = raise(db, epoch(db)? + 1)?;
            // Before the next write of this handle compares it.
            claimed.store(epoch, Ordering::Release);
            Ok(epoch)
        })
        .await
    }

    async fn raise(&self, least: u64) -> Result<u64> {
        let claimed = Arc::clone(&self.claimed);
        self.write_as_claimed(move |db| {
            let epoch = raise(db, least)?;
            claimed.store(epoch, Ordering::Release);
            Ok(epoch)
        })
        .await
    }
}
