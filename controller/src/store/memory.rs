//! Store in memory. A clone of the `Arc` outlives a controller, as a disk does.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use daemon::{
    disk::{Disk, SoundDisk},
    sync::Mutex,
};
use proto::{
    id::SandboxId,
    limits::TeamLimits,
    name::{NodeName, RequestId, Team},
    sandbox::v1::EventKind,
};

use super::{
    Begun, Choice, Error, Event, EventPage, FILES_BYTES_MAX, Filter, KnownState, Result, Row,
    State, Store, Token, enrolment_tables::Tables as Enrolled,
};

/// Store in maps with a fixed order.
#[derive(Debug)]
pub struct Memory {
    pub(super) tables: Arc<Mutex<Tables>>,
    pub(super) enrolments: Arc<Mutex<Enrolled>>,
    disk: Arc<dyn Disk>,
    mutation: Option<Mutation>,
    /// Epoch that this handle has claimed; 0: none.
    claimed: AtomicU64,
    /// Transactions through this handle.
    transactions: AtomicU64,
}

impl Default for Memory {
    fn default() -> Self {
        Self::on(Arc::new(SoundDisk))
    }
}

/// Deliberate fault of the store, which shows that the simulation detects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Request ids are never taken.
    Requests,
    /// The choice of a node is confirmed and not stored.
    Choices,
    /// A replaced handle can still write.
    Claim,
    /// Unknown sandboxes on nodes are not stored.
    Found,
    /// Paused events are left out of the log.
    Pauses,
    /// Duplicates are logged again; and "came up" is a write of its own, so that a crash between it
    /// and the creation's row repeats it.
    Again,
    /// Events are written one write after their states.
    Behind,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Tables {
    pub(super) rows: BTreeMap<SandboxId, Row>,
    /// Files of creations under way, with their team.
    files: BTreeMap<SandboxId, (Team, Vec<u8>)>,
    /// Those of them that cannot be read, because the key is lost.
    sealed: BTreeSet<SandboxId>,
    cancels: BTreeMap<(NodeName, SandboxId), u32>,
    /// Delayed events of `Mutation::Behind`.
    unwritten: Vec<Event>,
    pub(super) tokens: BTreeMap<String, Token>,
    /// SSH keys by their tokens, and the tokens that added them.
    pub(super) ssh_keys: BTreeMap<String, (String, String)>,
    pub(super) limits: BTreeMap<Team, TeamLimits>,
    nodes: BTreeMap<NodeName, String>,
    epoch: u64,
    pub(super) events: BTreeMap<u64, Event>,
    /// Deduplication keys of the events that have one.
    pub(super) once: BTreeSet<String>,
    /// Last revision.
    pub(super) revision: u64,
    /// Last revision that was removed of a team, or of no team.
    pub(super) gone_of: BTreeMap<Option<Team>, u64>,
}

impl Tables {
    fn holder(&self, team: &Team, request: &RequestId) -> Option<&Row> {
        self.rows
            .values()
            .find(|row| !row.released && row.team == *team && row.request_id == *request)
    }
}

impl Memory {
    /// Creates an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an empty store on this disk.
    pub fn on(disk: Arc<dyn Disk>) -> Self {
        Self {
            tables: Arc::default(),
            enrolments: Arc::default(),
            disk,
            mutation: None,
            claimed: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
        }
    }

    /// Returns another handle on the same store, as another process has.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self {
            tables: Arc::clone(&self.tables),
            enrolments: Arc::clone(&self.enrolments),
            ..self.like()
        }
    }

    /// Returns a copy, as a backup is: later writes are not in it.
    #[must_use]
    pub fn copy(&self) -> Self {
        let (tables, enrolments) = (self.tables.lock().clone(), self.enrolments.lock().clone());
        Self {
            tables: Arc::new(Mutex::new(tables)),
            enrolments: Arc::new(Mutex::new(enrolments)),
            ..self.like()
        }
    }

    /// Returns an empty store on the same disk, as after the loss of its data.
    #[must_use]
    pub fn like(&self) -> Self {
        Self { mutation: self.mutation, ..Self::on(Arc::clone(&self.disk)) }
    }

    /// Makes the requests and files of all creations unreadable, as the loss of the controller's key does.
    pub fn lose_key(&self) {
        let mut tables = self.tables.lock();
        tables.rows.values_mut().for_each(|row| row.request = Vec::new().into());
        tables.sealed = tables.files.keys().copied().collect();
    }

    /// Returns the number of transactions through this handle, but for those about enrolments.
    pub fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }

    /// Locks the tables for a transaction.
    pub(super) fn tables(&self) -> MutexGuard<'_, Tables> {
        self.transactions.fetch_add(1, Ordering::Relaxed);
        self.tables.lock()
    }

    async fn write<T: Send>(&self, work: impl FnOnce(&mut Tables) -> T + Send) -> Result<T> {
        self.disk.before_sync().await;
        let done = work(&mut *self.claimed_tables()?);
        self.disk.after_sync().await;
        Ok(done)
    }

    /// Locks the tables for a write, unless another handle has claimed the store later.
    pub(super) fn claimed_tables(&self) -> Result<MutexGuard<'_, Tables>> {
        let tables = self.tables();
        let claimed = self.claimed.load(Ordering::Acquire);
        let replaced = claimed > 0 && tables.epoch > claimed && !self.has(Mutation::Claim);
        if replaced { Err(Error::Replaced) } else { Ok(tables) }
    }

    /// Returns this store with a fault.
    #[must_use]
    pub fn lapsing(self, mutation: Mutation) -> Self {
        Self { mutation: Some(mutation), ..self }
    }

    /// Returns the events to write, after the fault.
    fn lapsed(&self, tables: &mut Tables, mut events: Vec<Event>) -> Vec<Event> {
        if self.has(Mutation::Pauses) {
            events.retain(|event| event.kind != EventKind::Paused);
        }
        if self.has(Mutation::Again) {
            for event in &mut events {
                event.once = None;
            }
        }
        if self.has(Mutation::Behind) {
            events = std::mem::replace(&mut tables.unwritten, events);
        }
        events
    }

    fn has(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }
}

#[async_trait::async_trait]
impl Store for Memory {
    async fn begin(&self, mut row: Row, files: Option<Vec<u8>>, asked: Event) -> Result<Begun> {
        if self.has(Mutation::Choices) {
            (row.node, row.attempt) = (None, 0);
        }
        row.released |= self.has(Mutation::Requests);
        self.write(|tables| {
            if let Some(holder) = tables.holder(&row.team, &row.request_id) {
                return Begun::Taken(Box::new(holder.clone()));
            }
            if let Some(files) = files {
                let kept = tables.files.values();
                let bytes = |of: &Team| {
                    let of_team = kept.clone().filter(|(team, _)| team == of);
                    of_team.map(|(_, files)| files.len() as u64).sum::<u64>()
                };
                let all: u64 = kept.clone().map(|(_, files)| files.len() as u64).sum();
                let (more, (team_max, all_max)) = (files.len() as u64, FILES_BYTES_MAX);
                if bytes(&row.team) + more > team_max || all + more > all_max {
                    return Begun::Full;
                }
                tables.files.insert(row.id, (row.team.clone(), files));
            }
            tables.rows.insert(row.id, row);
            Begun::New(tables.append(vec![asked]))
        })
        .await
    }

    async fn by_request(&self, team: &Team, request: &RequestId) -> Result<Option<Row>> {
        Ok(self.tables().holder(team, request).cloned())
    }

    async fn files(&self, id: &SandboxId) -> Result<Option<Vec<u8>>> {
        let tables = self.tables();
        if tables.sealed.contains(id) && tables.files.contains_key(id) {
            return Err(Error::Failed("the files are not sealed with this key".to_owned()));
        }
        Ok(tables.files.get(id).map(|(_, files)| files.clone()))
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Row>> {
        Ok(self.tables().rows.get(id).cloned())
    }

    async fn after(&self, id: Option<SandboxId>, limit: u32) -> Result<Vec<Row>> {
        let from = id.map_or(Bound::Unbounded, Bound::Excluded);
        let tables = self.tables();
        let rows = tables.rows.range((from, Bound::Unbounded));
        Ok(rows.take(limit as usize).map(|(_, row)| row.clone()).collect())
    }

    async fn choose(&self, id: &SandboxId, choice: Choice) -> Result<bool> {
        self.write(|tables| {
            let row = tables.rows.get_mut(id).filter(|row| row.state == State::Placing);
            let Some(row) = row else { return false };
            row.node = Some(choice.node);
            row.attempt = choice.attempt;
            row.decision = choice.decision;
            if let Some((node, attempt)) = choice.abandoned {
                tables.cancels.insert((node, *id), attempt);
            }
            true
        })
        .await
    }

    async fn done(&self, id: &SandboxId, last: Vec<u8>, mut events: Vec<Event>) -> Result<u64> {
        if self.has(Mutation::Again) {
            let first = std::mem::take(&mut events);
            self.write(|tables| {
                let first = self.lapsed(tables, first);
                tables.append(first)
            })
            .await?;
        }
        self.write(|tables| {
            if let Some(row) = tables.rows.get_mut(id) {
                (row.state, row.last) = (State::Done, last);
            }
            tables.files.remove(id);
            let events = self.lapsed(tables, events);
            tables.append(events)
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
        self.write(|tables| {
            if let Some(row) = tables.rows.get_mut(id) {
                (row.state, row.last) = (State::Failed, last);
                (row.released, row.ended_ms) = (released, now_ms);
            }
            tables.files.remove(id);
        })
        .await
    }

    async fn cancel(&self, id: &SandboxId) -> Result<()> {
        self.write(|tables| {
            if let Some(row) = tables.rows.get_mut(id) {
                row.cancelled = true;
            }
        })
        .await
    }

    async fn put_states(&self, states: Vec<KnownState>, events: Vec<Event>) -> Result<u64> {
        let mut tables = self.claimed_tables()?;
        for seen in states {
            if let Some(row) = tables.rows.get_mut(&seen.id) {
                if row.state == State::Done {
                    row.last = seen.last;
                    row.ended_ms = seen.ended_ms;
                }
                continue;
            }
            if self.has(Mutation::Found) {
                continue;
            }
            let taken = tables.holder(&seen.team, &seen.request_id).is_some();
            tables.rows.insert(
                seen.id,
                Row {
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
            );
        }
        let events = self.lapsed(&mut tables, events);
        Ok(tables.append(events))
    }

    async fn events(&self, after: u64, filter: Filter, limit: u32) -> Result<EventPage> {
        Ok(self.tables().page(after, &filter, limit))
    }

    async fn before_last(&self, filter: Filter, count: u32) -> Result<u64> {
        Ok(self.tables().before_last(&filter, count))
    }

    async fn event_hours(&self, newest: u32) -> Result<Vec<u64>> {
        Ok(self.tables().event_hours(newest))
    }

    async fn prune_events(&self, before_ms: u64, limit: u32) -> Result<u64> {
        Ok(self.claimed_tables()?.prune(before_ms, limit))
    }

    async fn drop_events(&self, share: Option<Team>, count: u32) -> Result<()> {
        self.claimed_tables()?.drop_oldest(share, count);
        Ok(())
    }

    async fn event_counts(&self) -> Result<Vec<(Option<Team>, u64)>> {
        Ok(self.tables().counts())
    }

    async fn events_of_team(&self, team: &Team) -> Result<u64> {
        let tables = self.tables();
        let of_team = tables.events.values().filter(|event| event.team.as_ref() == Some(team));
        Ok(of_team.count() as u64)
    }

    async fn forget(&self, before_ms: u64) -> Result<Vec<SandboxId>> {
        let mut tables = self.claimed_tables()?;
        let old: Vec<_> = tables
            .rows
            .values()
            .filter(|row| row.ended_ms > 0 && row.ended_ms < before_ms)
            .map(|row| row.id)
            .collect();
        for id in &old {
            tables.rows.remove(id);
        }
        let Tables { rows, cancels, nodes, .. } = &mut *tables;
        let is_forgotten = |node: &NodeName| nodes.get(node).is_some_and(String::is_empty);
        cancels.retain(|(node, id), _| rows.contains_key(id) || !is_forgotten(node));
        Ok(old)
    }

    async fn pending_cancels(&self, node: &NodeName) -> Result<Vec<(SandboxId, u32)>> {
        let tables = self.tables();
        let of_node = tables.cancels.iter().filter(|((of, _), _)| of == node);
        Ok(of_node.map(|((_, id), attempt)| (*id, *attempt)).collect())
    }

    async fn cancel_delivered(&self, node: &NodeName, id: &SandboxId, attempt: u32) -> Result<()> {
        self.write(|tables| {
            let key = (node.clone(), *id);
            if tables.cancels.get(&key).is_some_and(|pending| *pending <= attempt) {
                tables.cancels.remove(&key);
            }
        })
        .await
    }

    async fn put_node(&self, name: &NodeName, address: &str) -> Result<()> {
        self.tables().nodes.insert(name.clone(), address.to_owned());
        Ok(())
    }

    async fn forget_node(&self, name: &NodeName) -> Result<()> {
        let mut tables = self.tables();
        tables.nodes.insert(name.clone(), String::new());
        self.enrolments.lock().forget(name);
        Ok(())
    }

    async fn forgotten_nodes(&self) -> Result<Vec<NodeName>> {
        let tables = self.tables();
        let forgotten = tables.nodes.iter().filter(|(_, address)| address.is_empty());
        Ok(forgotten.map(|(name, _)| name.clone()).collect())
    }

    async fn nodes(&self) -> Result<Vec<(NodeName, String)>> {
        let tables = self.tables();
        let known = tables.nodes.iter().filter(|(_, address)| !address.is_empty());
        Ok(known.map(|(name, address)| (name.clone(), address.clone())).collect())
    }

    async fn claim(&self) -> Result<u64> {
        let mut tables = self.tables();
        tables.unwritten.clear();
        tables.epoch += 1;
        self.claimed.store(tables.epoch, Ordering::Release);
        Ok(tables.epoch)
    }

    async fn raise(&self, least: u64) -> Result<u64> {
        let mut tables = self.claimed_tables()?;
        tables.epoch = tables.epoch.max(least);
        self.claimed.store(tables.epoch, Ordering::Release);
        Ok(tables.epoch)
    }
}
