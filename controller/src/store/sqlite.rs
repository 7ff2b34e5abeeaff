//! Store in one SQLite file. One thread writes: it takes all queued requests, runs each in a
//! savepoint of its own and commits them together, so that many callers share one fsync. Another
//! thread reads, on a connection of its own.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use proto::{
    id::SandboxId,
    name::{NodeName, RequestId, Team},
};
use rusqlite::{Connection, OpenFlags, OptionalExtension, named_params, params};
use tokio::sync::{mpsc, oneshot};

use super::{
    Begun, Choice, Error, Event, EventPage, Filter, Row, Seen, State, Store, Token,
    rows::{parsed, state, to_row, to_token},
    sqlite_events as events,
};

/// Schema changes in order; the file's `user_version` is the number of those applied.
const MIGRATIONS: &[&str] =
    &[include_str!("migrations/0001_start.sql"), include_str!("migrations/0002_events.sql")];
/// Most requests in one commit.
const GROUP_MAX: usize = 256;
/// Most queued requests.
const QUEUE_MAX: usize = 4096;
/// Pages of 4 KiB in the write-ahead log at which it is checkpointed. With SQLite's default of 1000
/// a few hundred creations fill it, and the pages that all of them change are written each time.
const LOG_PAGES: u32 = 8000;
/// Size of the cache of prepared statements: enough for all.
const STATEMENTS: usize = 64;
/// Longest wait for another process (`token create`) that writes.
const BUSY: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce(&Connection) -> Result<Reply, rusqlite::Error> + Send>;
/// Answers the caller. Called after the commit, with false when the commit failed.
type Reply = Box<dyn FnOnce(bool) + Send>;

/// Store in a SQLite file. Its threads end when it is dropped.
#[derive(Debug)]
pub struct Sqlite {
    write: mpsc::Sender<Queued>,
    read: mpsc::Sender<Queued>,
    /// Epoch that this handle has claimed; 0: none.
    claimed: Arc<AtomicU64>,
}

struct Queued {
    job: Job,
    failed: Box<dyn FnOnce(String) + Send>,
}

impl std::fmt::Debug for Queued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queued")
    }
}

impl Sqlite {
    /// Opens the file; creates it or migrates its schema where needed.
    ///
    /// # Errors
    /// When it cannot be opened, or a later version of the program has written it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // The file has the hashes of tokens: readable by its owner only, from its creation on.
        let options = || OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        options()
            .map_err(|error| Error::Failed(format!("cannot open {}: {error}", path.display())))?;
        let mut writer = connect(path, OpenFlags::default())?;
        migrate(&mut writer)?;
        let reader =
            connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        let (write, writes) = mpsc::channel(QUEUE_MAX);
        let (read, reads) = mpsc::channel(QUEUE_MAX);
        spawn("store-write", move || write_loop(&mut writer, writes))?;
        spawn("store-read", move || read_loop(&reader, reads))?;
        Ok(Self { write, read, claimed: Arc::default() })
    }

    async fn write<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        submit(&self.write, work).await
    }

    /// Writes, unless another handle has claimed the store since this one did.
    async fn write_as_claimed<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let claimed = Arc::clone(&self.claimed);
        let written = self.write(move |db| {
            let claimed = claimed.load(Ordering::Acquire);
            let replaced = claimed > 0 && epoch(db)? > claimed;
            if replaced { Ok(None) } else { work(db).map(Some) }
        });
        written.await?.ok_or(Error::Replaced)
    }

    async fn read<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        submit(&self.read, work).await
    }
}

fn epoch(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT value FROM epoch")?.query_row([], |row| row.get(0))
}

fn raise(db: &Connection, least: u64) -> rusqlite::Result<u64> {
    db.prepare_cached("UPDATE epoch SET value = max(value, ?1) RETURNING value")?
        .query_row([least], |row| row.get(0))
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(error.to_string())
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Error> {
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(BUSY).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    if !flags.contains(OpenFlags::SQLITE_OPEN_READ_ONLY) {
        let mode: String = connection
            .query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))
            .map_err(failed)?;
        if mode != "wal" {
            return Err(Error::Failed(format!("{} cannot use a write-ahead log", path.display())));
        }
        // NORMAL would lose the last commits at a power cut.
        connection.execute_batch("PRAGMA synchronous = FULL").map_err(failed)?;
        connection.pragma_update(None, "wal_autocheckpoint", LOG_PAGES).map_err(failed)?;
    }
    Ok(connection)
}

fn migrate(connection: &mut Connection) -> Result<(), Error> {
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
    transaction.commit().map_err(failed)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(failed)
}

async fn submit<T, F>(to: &mpsc::Sender<Queued>, work: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
{
    let (answer, answered) = oneshot::channel::<Result<T, String>>();
    let (refuse, refused) = oneshot::channel::<String>();
    let job: Job = Box::new(move |connection| {
        let value = work(connection)?;
        let reply: Reply = Box::new(move |committed| {
            let result = if committed { Ok(value) } else { Err("the commit failed".to_owned()) };
            // The caller may have gone.
            drop(answer.send(result));
        });
        Ok(reply)
    });
    let failed = Box::new(move |why| drop(refuse.send(why)));
    to.send(Queued { job, failed })
        .await
        .map_err(|_| Error::Failed("its thread has ended".into()))?;
    match answered.await {
        Ok(result) => result.map_err(Error::Failed),
        // The answer's sender was dropped with the job: the job failed, or the thread died.
        Err(_) => {
            Err(Error::Failed(refused.await.unwrap_or_else(|_| "its thread has ended".into())))
        }
    }
}

fn write_loop(connection: &mut Connection, mut queue: mpsc::Receiver<Queued>) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    while queue.blocking_recv_many(&mut group, GROUP_MAX) > 0 {
        let mut replies = Vec::with_capacity(group.len());
        if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
            for queued in group.drain(..) {
                (queued.failed)(error.to_string());
            }
            continue;
        }
        for queued in group.drain(..) {
            let result = match connection.savepoint() {
                Ok(savepoint) => {
                    (queued.job)(&savepoint).and_then(|reply| savepoint.commit().map(|()| reply))
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(reply) => replies.push(reply),
                Err(error) => (queued.failed)(error.to_string()),
            }
        }
        let committed = match connection.execute_batch("COMMIT") {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "could not commit to the store");
                if let Err(error) = connection.execute_batch("ROLLBACK") {
                    tracing::error!(%error, "could not roll the store back");
                }
                false
            }
        };
        for reply in replies {
            reply(committed);
        }
    }
}

fn read_loop(connection: &Connection, mut queue: mpsc::Receiver<Queued>) {
    while let Some(queued) = queue.blocking_recv() {
        match (queued.job)(connection) {
            Ok(reply) => reply(true),
            Err(error) => (queued.failed)(error.to_string()),
        }
    }
}

const COLUMNS: &str = "id, team, request_id, digest, request, state, node, attempt, decision, \
                       cancelled, released, created_ms, ended_ms, last";

fn insert(connection: &Connection, row: &Row) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO sandboxes (id, team, request_id, digest, request, state, node, attempt, \
             decision, cancelled, released, created_ms, ended_ms, last) VALUES (:id, :team, \
             :request_id, :digest, :request, :state, :node, :attempt, :decision, :cancelled, \
             :released, :created_ms, :ended_ms, :last)",
        )?
        .execute(named_params! {
            ":id": row.id.to_string(), ":team": row.team.as_str(),
            ":request_id": row.request_id.as_str(), ":digest": row.digest,
            ":request": row.request, ":state": state(row.state),
            ":node": row.node.as_ref().map(NodeName::as_str), ":attempt": row.attempt,
            ":decision": row.decision, ":cancelled": row.cancelled, ":released": row.released,
            ":created_ms": row.created_ms, ":ended_ms": row.ended_ms, ":last": row.last,
        })
        .map(drop)
}

fn holder(connection: &Connection, team: &str, request: &str) -> rusqlite::Result<Option<Row>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sandboxes WHERE team = ?1 AND request_id = ?2 AND released = 0"
        ))?
        .query_row(params![team, request], to_row)
        .optional()
}

fn remember(connection: &Connection, seen: Seen) -> rusqlite::Result<()> {
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
                    request_id: seen.request_id,
                    digest: String::new(),
                    request: Vec::new(),
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

const TOKEN_COLUMNS: &str = "id, hash, team, scopes, created_ms, revoked_ms";

#[async_trait::async_trait]
impl Store for Sqlite {
    async fn begin(&self, row: Row, asked: Event) -> Result<Begun, Error> {
        self.write_as_claimed(move |db| {
            match holder(db, row.team.as_str(), row.request_id.as_str())? {
                Some(holder) => Ok(Begun::Taken(Box::new(holder))),
                None => {
                    insert(db, &row)?;
                    events::append(db, &[asked]).map(Begun::New)
                }
            }
        })
        .await
    }

    async fn by_request(&self, team: &Team, request: &RequestId) -> Result<Option<Row>, Error> {
        let (team, request) = (team.clone(), request.clone());
        self.read(move |db| holder(db, team.as_str(), request.as_str())).await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Row>, Error> {
        let id = id.to_string();
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1"))?
                .query_row([id], to_row)
                .optional()
        })
        .await
    }

    async fn after(&self, id: Option<SandboxId>, limit: u32) -> Result<Vec<Row>, Error> {
        let after = id.map(|id| id.to_string()).unwrap_or_default();
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sandboxes WHERE id > ?1 ORDER BY id LIMIT ?2"
            ))?
            .query_map(params![after, limit], to_row)?
            .collect()
        })
        .await
    }

    async fn choose(&self, id: &SandboxId, choice: Choice) -> Result<bool, Error> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            let changed = db
                .prepare_cached(
                    "UPDATE sandboxes SET node = ?2, attempt = ?3, decision = ?4 \
                     WHERE id = ?1 AND state = 'placing'",
                )?
                .execute(params![id, choice.node.as_str(), choice.attempt, choice.decision])?;
            if let (1, Some((node, attempt))) = (changed, choice.leave) {
                db.prepare_cached("INSERT OR REPLACE INTO cancels VALUES (?1, ?2, ?3)")?
                    .execute(params![node.as_str(), id, attempt])?;
            }
            Ok(changed == 1)
        })
        .await
    }

    async fn done(&self, id: &SandboxId, last: Vec<u8>, events: Vec<Event>) -> Result<u64, Error> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached("UPDATE sandboxes SET state = 'done', last = ?2 WHERE id = ?1")?
                .execute(params![id, last])?;
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
    ) -> Result<(), Error> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached(
                "UPDATE sandboxes SET state = 'failed', last = ?2, released = ?3, ended_ms = ?4 \
                 WHERE id = ?1",
            )?
            .execute(params![id, last, released, now_ms])
            .map(drop)
        })
        .await
    }

    async fn cancel(&self, id: &SandboxId) -> Result<(), Error> {
        let id = id.to_string();
        self.write_as_claimed(move |db| {
            db.prepare_cached("UPDATE sandboxes SET cancelled = 1 WHERE id = ?1")?
                .execute([id])
                .map(drop)
        })
        .await
    }

    async fn remember(&self, seen: Vec<Seen>, events: Vec<Event>) -> Result<u64, Error> {
        self.write_as_claimed(move |db| {
            seen.into_iter().try_for_each(|seen| remember(db, seen))?;
            events::append(db, &events)
        })
        .await
    }

    async fn events(&self, after: u64, filter: Filter, limit: u32) -> Result<EventPage, Error> {
        self.read(move |db| events::page(db, after, &filter, limit)).await
    }

    async fn before_last(&self, filter: Filter, count: u32) -> Result<u64, Error> {
        self.read(move |db| events::before_last(db, &filter, count)).await
    }

    async fn prune_events(&self, before_ms: u64, max: u64, limit: u32) -> Result<u64, Error> {
        self.write_as_claimed(move |db| events::prune(db, before_ms, max, limit)).await
    }

    async fn forget(&self, before_ms: u64) -> Result<Vec<SandboxId>, Error> {
        self.write_as_claimed(move |db| {
            db.prepare_cached(
                "DELETE FROM sandboxes WHERE ended_ms > 0 AND ended_ms < ?1 RETURNING id",
            )?
            .query_map([before_ms], |row| parsed(row, 0))?
            .collect::<rusqlite::Result<Vec<_>>>()
            .map(|mut ids: Vec<SandboxId>| {
                ids.sort_unstable();
                ids
            })
        })
        .await
    }

    async fn pending_cancels(&self, node: &NodeName) -> Result<Vec<(SandboxId, u32)>, Error> {
        let node = node.clone();
        self.read(move |db| {
            db.prepare_cached("SELECT id, attempt FROM cancels WHERE node = ?1 ORDER BY id")?
                .query_map([node.as_str()], |row| Ok((parsed(row, 0)?, row.get(1)?)))?
                .collect()
        })
        .await
    }

    async fn cancel_delivered(
        &self,
        node: &NodeName,
        id: &SandboxId,
        attempt: u32,
    ) -> Result<(), Error> {
        let (node, id) = (node.clone(), id.to_string());
        self.write_as_claimed(move |db| {
            db.prepare_cached("DELETE FROM cancels WHERE node = ?1 AND id = ?2 AND attempt <= ?3")?
                .execute(params![node.as_str(), id, attempt])
                .map(drop)
        })
        .await
    }

    async fn add_token(&self, token: Token) -> Result<(), Error> {
        self.write(move |db| {
            db.prepare_cached("INSERT INTO tokens VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
                .execute(params![
                    token.id,
                    token.hash,
                    token.team.as_str(),
                    token.scopes,
                    token.created_ms,
                    token.revoked_ms
                ])
                .map(drop)
        })
        .await
    }

    async fn token(&self, id: &str) -> Result<Option<Token>, Error> {
        let id = id.to_owned();
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {TOKEN_COLUMNS} FROM tokens WHERE id = ?1"))?
                .query_row([id], to_token)
                .optional()
        })
        .await
    }

    async fn tokens(&self) -> Result<Vec<Token>, Error> {
        self.read(|db| {
            db.prepare_cached(&format!(
                "SELECT {TOKEN_COLUMNS} FROM tokens ORDER BY created_ms, id"
            ))?
            .query_map([], to_token)?
            .collect()
        })
        .await
    }

    async fn revoke_token(&self, id: &str, now_ms: u64) -> Result<bool, Error> {
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

    async fn put_node(&self, name: &NodeName, address: &str) -> Result<(), Error> {
        let (name, address) = (name.clone(), address.to_owned());
        self.write(move |db| {
            db.prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, ?2)")?
                .execute(params![name.as_str(), address])
                .map(drop)
        })
        .await
    }

    /// A forgotten node has no address.
    async fn forget_node(&self, name: &NodeName) -> Result<(), Error> {
        let name = name.clone();
        self.write(move |db| {
            db.prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, '')")?
                .execute([name.as_str()])?;
            db.prepare_cached("DELETE FROM cancels WHERE node = ?1")?
                .execute([name.as_str()])
                .map(drop)
        })
        .await
    }

    async fn forgotten_nodes(&self) -> Result<Vec<NodeName>, Error> {
        self.read(|db| {
            db.prepare_cached("SELECT name FROM nodes WHERE address = '' ORDER BY name")?
                .query_map([], |row| parsed(row, 0))?
                .collect()
        })
        .await
    }

    async fn nodes(&self) -> Result<Vec<(NodeName, String)>, Error> {
        self.read(|db| {
            db.prepare_cached("SELECT name, address FROM nodes WHERE address <> '' ORDER BY name")?
                .query_map([], |row| Ok((parsed(row, 0)?, row.get(1)?)))?
                .collect()
        })
        .await
    }

    async fn claim(&self) -> Result<u64, Error> {
        let claimed = Arc::clone(&self.claimed);
        self.write(move |db| {
            let epoch = raise(db, epoch(db)? + 1)?;
            // Before the next write of this handle compares it.
            claimed.store(epoch, Ordering::Release);
            Ok(epoch)
        })
        .await
    }

    async fn raise(&self, least: u64) -> Result<u64, Error> {
        let claimed = Arc::clone(&self.claimed);
        self.write_as_claimed(move |db| {
            let epoch = raise(db, least)?;
            claimed.store(epoch, Ordering::Release);
            Ok(epoch)
        })
        .await
    }
}
