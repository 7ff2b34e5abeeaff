//! The event log: who requested what, and what the system did by itself. One task writes it behind,
//! in order; a caller that needs an event to be durable waits for that.
//!
//! ```text
//!  call, creation, link -- append --+
//!  report of a node -- observe -----+--> queue --> store (one write with the states) --> last
//!                      (derive)                                                           |
//!  a reader: a page from the store, then wait for `last` <--------------------------------+
//! ```
//! The events "creation requested" and "creation came up" are written with the creation's row, so
//! that a creation is two writes and waits for no third.
//! Invariants: no state of a sandbox is stored before the events that led to it, so after a crash
//! the next report of its node yields the missing ones; a reader gets pages of the store and needs
//! no buffer here.

mod derive;
mod retention;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use daemon::sync::Mutex;
use proto::{
    id::SandboxId,
    name::{NodeName, Team},
    sandbox::v1::{EventKind, Sandbox},
};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    clock::Clock,
    store::Why,
    store::{self, Event},
};

pub use derive::{Change, derive};
pub use retention::surplus;

/// Actor of what a node's agent did by itself.
pub const AGENT: &str = "agent";
/// Actor of what the controller did by itself.
pub const CONTROLLER: &str = "controller";

/// Most queued events. While the store fails, further ones are only counted.
const QUEUE_MAX: usize = 16 * 1024;
/// Largest `detail`, bytes.
const DETAIL_MAX: usize = 1024;
/// Longest wait for the writer.
const WRITTEN: Duration = Duration::from_secs(15);

/// Retention of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Longest age of an event.
    pub keep: Duration,
    /// Most events. Beyond them, the teams that have the most lose their oldest.
    pub max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { keep: Duration::from_hours(30 * 24), max: 1_000_000 }
    }
}

/// The event log: its write queue, and the callers behind expected events.
#[derive(Debug)]
pub struct Log {
    clock: Arc<dyn Clock>,
    queue: Mutex<Queue>,
    waiting: Notify,
    /// Number of events written since the start.
    written: watch::Sender<u64>,
    /// Last revision.
    last: watch::Sender<u64>,
    /// Actors of requested changes that have not happened yet. One entry per sandbox and kind,
    /// removed with the sandbox.
    asked: Mutex<BTreeMap<(SandboxId, EventKind), String>>,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    /// Number of events ever queued.
    queued: u64,
    /// Number of events dropped because the queue was full.
    missing: u64,
}

impl Log {
    /// Creates a log with an empty queue.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            queue: Mutex::default(),
            waiting: Notify::new(),
            written: watch::channel(0).0,
            last: watch::channel(0).0,
            asked: Mutex::default(),
        }
    }

    /// Builds an event of now, without the optional fields.
    pub fn event(&self, kind: EventKind, actor: impl Into<String>) -> Event {
        Event {
            at_ms: self.clock.now_ms(),
            sandbox: None,
            team: None,
            node: None,
            kind,
            actor: actor.into(),
            why: Why::Unsaid,
            detail: String::new(),
            node_revision: 0,
            once: None,
        }
    }

    /// Queues an event behind all earlier ones.
    pub fn append(&self, mut event: Event) {
        truncate(&mut event.detail);
        let mut queue = self.queue.lock();
        if queue.events.len() >= QUEUE_MAX {
            if queue.missing == 0 {
                tracing::error!("event log cannot be written, events are dropped");
            }
            queue.missing += 1;
            return;
        }
        let missing = std::mem::take(&mut queue.missing);
        if missing > 0 {
            let detail = format!("{missing} events could not be written");
            let gap = Event { detail, ..self.event(EventKind::EventsLost, CONTROLLER) };
            queue.events.push_back(gap);
            queue.queued += 1;
        }
        queue.events.push_back(event);
        queue.queued += 1;
        drop(queue);
        self.waiting.notify_one();
    }

    /// Records that a caller requested a change: events of these kinds are attributed to it.
    pub fn ask(&self, id: SandboxId, effects: &[EventKind], actor: &str) {
        let mut asked = self.asked.lock();
        asked.extend(effects.iter().map(|effect| ((id, *effect), actor.to_owned())));
    }

    /// Drops the record of a request that failed or changed nothing.
    pub fn unask(&self, id: &SandboxId, effects: &[EventKind]) {
        let mut asked = self.asked.lock();
        for effect in effects {
            asked.remove(&(*id, *effect));
        }
    }

    /// Takes the actor who requested what has now happened.
    pub fn attributed_to(&self, id: &SandboxId, kind: EventKind) -> Option<String> {
        let mut asked = self.asked.lock();
        let actor = asked.remove(&(*id, kind));
        if matches!(kind, EventKind::Deleted | EventKind::CreateFailed) {
            let of_it: Vec<_> = asked
                .range((*id, EventKind::Unspecified)..)
                .take_while(|((other, _), _)| other == id)
                .map(|(key, _)| *key)
                .collect();
            for key in of_it {
                asked.remove(&key);
            }
        }
        actor
    }

    /// Queues the events of a node's report. Call in the order of the reports, before the state is
    /// stored.
    pub fn observe(&self, source: &Source<'_>, old: Option<&Sandbox>, new: &Sandbox) {
        self.meaning(source, old, new).into_iter().for_each(|event| self.append(event));
    }

    /// Returns the events of a node's report, for a caller that writes them itself.
    pub fn meaning(&self, source: &Source<'_>, old: Option<&Sandbox>, new: &Sandbox) -> Vec<Event> {
        let meant = |Change { kind, why, mut detail, unasked }| {
            // A caller who requested the same did not cause it.
            let attributed_to = self.attributed_to(&source.id, kind).filter(|_| !unasked);
            truncate(&mut detail);
            Event {
                sandbox: Some(source.id),
                team: Some(source.team.clone()),
                node: Some(source.node.clone()),
                why,
                detail,
                node_revision: new.revision,
                once: Some(source.once(&new.revision.to_string(), kind)),
                ..self.event(kind, attributed_to.unwrap_or_else(|| AGENT.to_owned()))
            }
        };
        derive(old, new).into_iter().map(meant).collect()
    }

    /// Logs that a node has lost a sandbox.
    pub fn lost(&self, source: &Source<'_>) {
        let kind = EventKind::Lost;
        self.append(Event {
            sandbox: Some(source.id),
            team: Some(source.team.clone()),
            node: Some(source.node.clone()),
            detail: "its node does not know it any more".into(),
            // Same key until the journal changes: logged once, across restarts.
            once: Some(source.once(&source.id.to_string(), kind)),
            ..self.event(kind, CONTROLLER)
        });
    }

    /// Returns the queued events in order. They stay queued until `wrote`.
    pub fn pending(&self) -> Vec<Event> {
        self.queue.lock().events.iter().cloned().collect()
    }

    /// Waits until an event is queued.
    pub async fn waits(&self) {
        while self.queue.lock().events.is_empty() {
            self.waiting.notified().await;
        }
    }

    /// Removes the first `count` queued events, which are stored; `last` is the last revision.
    pub fn wrote(&self, count: usize, last: u64) {
        drop(self.queue.lock().events.drain(..count));
        self.written.send_modify(|written| *written += count as u64);
        self.reached(last);
    }

    /// Records the store's last revision.
    pub fn reached(&self, last: u64) {
        self.last.send_if_modified(|known| {
            let news = last > *known;
            *known = last.max(*known);
            news
        });
    }

    /// Waits until all events queued so far are written.
    ///
    /// # Errors
    /// When that takes too long: the store fails.
    pub async fn flushed(&self) -> Result<(), store::Error> {
        let queued = self.queue.lock().queued;
        let mut written = self.written.subscribe();
        match timeout(WRITTEN, written.wait_for(|written| *written >= queued)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                Err(store::Error::Failed("the log of events is not written".into()))
            }
        }
    }

    /// Returns the last revision as a watch channel.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

/// Source of a report: node, journal and sandbox.
#[derive(Debug)]
pub struct Source<'a> {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Team of the sandbox.
    pub team: &'a Team,
    /// Node that reports it.
    pub node: &'a NodeName,
    /// Journal of the node's revisions.
    pub journal: &'a str,
}

impl Source<'_> {
    fn once(&self, what: &str, kind: EventKind) -> String {
        format!("{} {} {what} {}", self.node, self.journal, kind.as_str_name())
    }
}

fn truncate(detail: &mut String) {
    let mut end = DETAIL_MAX.min(detail.len());
    while !detail.is_char_boundary(end) {
        end -= 1;
    }
    detail.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    fn log() -> Log {
        Log::new(Arc::new(SystemClock))
    }

    fn id(n: u8) -> SandboxId {
        SandboxId::new(u64::from(n), &[n; 10])
    }

    #[test]
    fn full_queue_counts_and_reports_dropped_events() {
        let log = log();
        for _ in 0..QUEUE_MAX + 7 {
            log.append(log.event(EventKind::NodeUp, CONTROLLER));
        }
        assert_eq!(log.pending().len(), QUEUE_MAX);
        log.wrote(QUEUE_MAX, 5);
        log.append(log.event(EventKind::NodeDown, CONTROLLER));
        let pending = log.pending();
        let kinds: Vec<_> = pending.iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventKind::EventsLost, EventKind::NodeDown]);
        assert!(pending[0].detail.starts_with("7 events"), "{}", pending[0].detail);
    }

    #[test]
    fn requested_changes_are_attributed_to_the_caller() {
        let log = log();
        let (team, node) = ("red".parse().expect("team"), "n1".parse().expect("node"));
        let source = Source { id: id(1), team: &team, node: &node, journal: "j" };
        let at = |phase: proto::sandbox::v1::Phase, revision| Sandbox {
            phase: phase.into(),
            revision,
            ..Sandbox::default()
        };
        use proto::sandbox::v1::Phase::{Deleted, Paused, Running};
        log.ask(id(1), &[EventKind::Paused], "abc");
        log.ask(id(2), &[EventKind::Resumed], "other");
        log.observe(&source, Some(&at(Running, 1)), &at(Paused, 2));
        log.observe(&source, Some(&at(Paused, 2)), &at(Running, 3));
        log.observe(&source, Some(&at(Running, 3)), &at(Paused, 4));
        log.ask(id(1), &[EventKind::Stopped], "abc");
        log.observe(&source, Some(&at(Paused, 4)), &at(Deleted, 5));
        let actors: Vec<_> = log.pending().into_iter().map(|event| event.actor).collect();
        assert_eq!(actors, ["abc", AGENT, AGENT, AGENT]);
        assert_eq!(log.asked.lock().len(), 1, "with the sandbox goes what was asked of it");
        let once: Vec<_> = log.pending().into_iter().filter_map(|event| event.once).collect();
        assert_eq!(once[0], "n1 j 2 EVENT_KIND_PAUSED");
    }

    #[test]
    fn long_detail_is_cut_between_characters() {
        let mut detail = "ä".repeat(DETAIL_MAX);
        detail.insert(0, 'x');
        truncate(&mut detail);
        assert!(detail.len() < DETAIL_MAX && detail.ends_with('ä'), "{}", detail.len());
    }

    #[tokio::test(start_paused = true)]
    async fn flush_waits_for_the_writer_up_to_a_limit() {
        let log = log();
        log.flushed().await.expect("nothing waits");
        log.append(log.event(EventKind::NodeUp, CONTROLLER));
        log.flushed().await.expect_err("nobody writes");
        let (flushed, ()) = tokio::join!(log.flushed(), async {
            log.waits().await;
            log.wrote(1, 9);
        });
        flushed.expect("written");
        assert_eq!(*log.news().borrow(), 9);
    }
}
