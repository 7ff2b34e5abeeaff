//! The log of what happened: who asked for what, and what the system did by itself. It is written
//! behind, in order, by one task; whoever must know that something is in it waits for that.
//!
//! ```text
//!  call, job, link --- say ---------+
//!  what a node says -- observe -----+--> queue --> store (one write with what was seen) --> last
//!                      (derive)                                                              |
//!  a reader: a page from the store, then wait for `last` <-----------------------------------+
//! ```
//! That a creation was asked for and that it came up is written with its row, so that a creation is
//! two writes and waits for no third.
//! What must hold: no state of a sandbox is remembered before the events that led to it, so after a
//! crash the next word of its node means what is missing; a reader is given pages of the store and
//! nothing is held for it.

mod derive;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

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

/// Who did what nobody asked for: a node's agent.
pub const AGENT: &str = "agent";
/// The same: the controller.
pub const CONTROLLER: &str = "controller";

/// Events that may wait to be written. While the store fails, those beyond it are only counted.
const QUEUE_MAX: usize = 16 * 1024;
/// Bytes of a sentence.
const DETAIL_MAX: usize = 1024;
/// How long it may take until something is written.
const WRITTEN: Duration = Duration::from_secs(15);

/// How much is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// For how long.
    pub keep: Duration,
    /// At most so many.
    pub max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { keep: Duration::from_hours(30 * 24), max: 1_000_000 }
    }
}

/// The log.
#[derive(Debug)]
pub struct Log {
    clock: Arc<dyn Clock>,
    queue: Mutex<Queue>,
    waiting: Notify,
    /// How many of those that were ever queued are written.
    written: watch::Sender<u64>,
    /// The last revision.
    last: watch::Sender<u64>,
    /// Who asked for what has not come about yet. One entry a sandbox and kind, gone with the
    /// sandbox.
    asked: Mutex<BTreeMap<(SandboxId, EventKind), String>>,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    /// Ever queued.
    queued: u64,
    /// Found no room.
    missing: u64,
}

impl Log {
    /// With nothing that waits.
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

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> MutexGuard<'_, BTreeMap<(SandboxId, EventKind), String>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event of now, still without what only some have.
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

    /// To be written, after all that was said before.
    pub fn say(&self, mut event: Event) {
        truncate(&mut event.detail);
        let mut queue = self.queue();
        if queue.events.len() >= QUEUE_MAX {
            if queue.missing == 0 {
                tracing::error!("the log of events cannot be written; events are being left out");
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

    /// A caller wants something of a sandbox, and these kinds of events will be its doing.
    pub fn ask(&self, id: SandboxId, effects: &[EventKind], actor: &str) {
        let mut asked = self.asked();
        asked.extend(effects.iter().map(|effect| ((id, *effect), actor.to_owned())));
    }

    /// It came to nothing, or was so already.
    pub fn unask(&self, id: &SandboxId, effects: &[EventKind]) {
        let mut asked = self.asked();
        for effect in effects {
            asked.remove(&(*id, *effect));
        }
    }

    /// Who asked for what has now come about.
    pub fn asker(&self, id: &SandboxId, kind: EventKind) -> Option<String> {
        let mut asked = self.asked();
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

    /// A node's word on a sandbox: says what it means. Must be called in the order in which it is
    /// taken, before it is remembered.
    pub fn observe(&self, told: &Told<'_>, old: Option<&Sandbox>, new: &Sandbox) {
        self.meaning(told, old, new).into_iter().for_each(|event| self.say(event));
    }

    /// What a node's word on a sandbox means, for who writes it together with that.
    pub fn meaning(&self, told: &Told<'_>, old: Option<&Sandbox>, new: &Sandbox) -> Vec<Event> {
        let meant = |Change { kind, why, mut detail, unasked }| {
            // Who wanted the same did not do it.
            let asker = self.asker(&told.id, kind).filter(|_| !unasked);
            truncate(&mut detail);
            Event {
                sandbox: Some(told.id),
                team: Some(told.team.clone()),
                node: Some(told.node.clone()),
                why,
                detail,
                node_revision: new.revision,
                once: Some(told.once(&new.revision.to_string(), kind)),
                ..self.event(kind, asker.unwrap_or_else(|| AGENT.to_owned()))
            }
        };
        derive(old, new).into_iter().map(meant).collect()
    }

    /// A node does not know a sandbox any more.
    pub fn lost(&self, told: &Told<'_>) {
        let kind = EventKind::Lost;
        self.say(Event {
            sandbox: Some(told.id),
            team: Some(told.team.clone()),
            node: Some(told.node.clone()),
            detail: "its node does not know it any more".into(),
            // Until the journal is another, a restart of ours is no reason to say it again.
            once: Some(told.once(&told.id.to_string(), kind)),
            ..self.event(kind, CONTROLLER)
        });
    }

    /// What waits to be written, in order. It stays there until `wrote`.
    pub fn pending(&self) -> Vec<Event> {
        self.queue().events.iter().cloned().collect()
    }

    /// Waits until something waits.
    pub async fn waits(&self) {
        while self.queue().events.is_empty() {
            self.waiting.notified().await;
        }
    }

    /// The first `count` of what waited are in the store, whose last revision is this.
    pub fn wrote(&self, count: usize, last: u64) {
        drop(self.queue().events.drain(..count));
        self.written.send_modify(|written| *written += count as u64);
        self.reached(last);
    }

    /// The store has events up to this revision.
    pub fn reached(&self, last: u64) {
        self.last.send_if_modified(|known| {
            let news = last > *known;
            *known = last.max(*known);
            news
        });
    }

    /// Waits until all that has been said by now is written.
    ///
    /// # Errors
    /// When that takes too long: the store fails.
    pub async fn flushed(&self) -> Result<(), store::Error> {
        let queued = self.queue().queued;
        let mut written = self.written.subscribe();
        match timeout(WRITTEN, written.wait_for(|written| *written >= queued)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                Err(store::Error::Failed("the log of events is not written".into()))
            }
        }
    }

    /// Changes with the last revision.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

/// Whose word it is, and on what.
#[derive(Debug)]
pub struct Told<'a> {
    /// Sandbox.
    pub id: SandboxId,
    /// Its owner.
    pub team: &'a Team,
    /// Node that says it.
    pub node: &'a NodeName,
    /// The journal that its revisions are of.
    pub journal: &'a str,
}

impl Told<'_> {
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
    fn what_finds_no_room_is_counted_and_told() {
        let log = log();
        for _ in 0..QUEUE_MAX + 7 {
            log.say(log.event(EventKind::NodeUp, CONTROLLER));
        }
        assert_eq!(log.pending().len(), QUEUE_MAX);
        log.wrote(QUEUE_MAX, 5);
        log.say(log.event(EventKind::NodeDown, CONTROLLER));
        let pending = log.pending();
        let kinds: Vec<_> = pending.iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventKind::EventsLost, EventKind::NodeDown]);
        assert!(pending[0].detail.starts_with("7 events"), "{}", pending[0].detail);
    }

    #[test]
    fn what_was_asked_for_is_the_callers_doing_and_the_rest_the_agents() {
        let log = log();
        let (team, node) = ("red".parse().expect("team"), "n1".parse().expect("node"));
        let told = Told { id: id(1), team: &team, node: &node, journal: "j" };
        let at = |phase: proto::sandbox::v1::Phase, revision| Sandbox {
            phase: phase.into(),
            revision,
            ..Sandbox::default()
        };
        use proto::sandbox::v1::Phase::{Deleted, Paused, Running};
        log.ask(id(1), &[EventKind::Paused], "abc");
        log.ask(id(2), &[EventKind::Resumed], "other");
        log.observe(&told, Some(&at(Running, 1)), &at(Paused, 2));
        log.observe(&told, Some(&at(Paused, 2)), &at(Running, 3));
        log.observe(&told, Some(&at(Running, 3)), &at(Paused, 4));
        log.ask(id(1), &[EventKind::Stopped], "abc");
        log.observe(&told, Some(&at(Paused, 4)), &at(Deleted, 5));
        let actors: Vec<_> = log.pending().into_iter().map(|event| event.actor).collect();
        assert_eq!(actors, ["abc", AGENT, AGENT, AGENT]);
        assert_eq!(log.asked().len(), 1, "with the sandbox goes what was asked of it");
        let once: Vec<_> = log.pending().into_iter().filter_map(|event| event.once).collect();
        assert_eq!(once[0], "n1 j 2 EVENT_KIND_PAUSED");
    }

    #[test]
    fn a_sentence_is_cut_between_characters() {
        let mut detail = "ä".repeat(DETAIL_MAX);
        detail.insert(0, 'x');
        truncate(&mut detail);
        assert!(detail.len() < DETAIL_MAX && detail.ends_with('ä'), "{}", detail.len());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_write_is_told_or_gives_up() {
        let log = log();
        log.flushed().await.expect("nothing waits");
        log.say(log.event(EventKind::NodeUp, CONTROLLER));
        log.flushed().await.expect_err("nobody writes");
        let (flushed, ()) = tokio::join!(log.flushed(), async {
            log.waits().await;
            log.wrote(1, 9);
        });
        flushed.expect("written");
        assert_eq!(*log.news().borrow(), 9);
    }
}
