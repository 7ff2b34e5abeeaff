//! Reads the event log: the stored events, then new ones. Pages are read from the store at the
//! reader's speed; for a slow reader only its position is kept.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use proto::{
    Reason,
    id::{Invalid, SandboxId, SandboxRef},
    name::Team,
};
use tokio::{sync::watch::Receiver, time::timeout};

use crate::{
    sandbox::{Error, RETRY, Sandboxes},
    store::{Event, Filter},
};

/// Time without an event after which a heartbeat is sent.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Events in one read of the store.
const PAGE: u32 = 256;
/// Largest `last` of a request.
const LAST_MAX: u32 = 10_000;

/// Query of the event log.
#[derive(Debug, Clone)]
pub struct EventQuery {
    /// Team of the events; `None`: those of all teams and of the nodes.
    pub team: Option<Team>,
    /// Sandbox, by any form of its name; empty: all.
    pub id: String,
    /// Only events after this revision; 0: all that are kept.
    pub after_revision: u64,
    /// Number of the newest events to start with, instead of a revision.
    pub last: Option<u32>,
    /// Whether the stream continues with new events.
    pub follow: bool,
}

/// An event with its revision, or a heartbeat.
#[derive(Debug)]
pub struct EventItem {
    /// Event with its revision; `None`: a heartbeat.
    pub event: Option<(u64, Event)>,
    /// Revision up to which all events have been sent.
    pub revision: u64,
}

struct Reader {
    sandboxes: Arc<Sandboxes>,
    filter: Filter,
    news: Receiver<u64>,
    follow: bool,
    /// Events that are read and not sent yet: one page at most.
    page: VecDeque<(u64, Event)>,
    /// Revision up to which the store has been read.
    seen: u64,
    /// Whether all events that `news` has announced are read.
    up_to_date: bool,
    /// Whether a heartbeat has been sent since the last event.
    heartbeat_sent: bool,
    over: bool,
}

impl Sandboxes {
    /// Streams the requested events in the order of the log.
    ///
    /// # Errors
    /// EVENTS_GONE when some of them are not kept any more, now or when the reader is too slow;
    /// when there is no such sandbox, and when both a revision and a number are given.
    pub async fn events(
        self: &Arc<Self>,
        query: EventQuery,
    ) -> Result<impl Stream<Item = Result<EventItem, Error>> + Send + use<>, Error> {
        if query.last.is_some() && query.after_revision > 0 {
            return Err(Invalid::new("last", "must not be given with after_revision").into());
        }
        if query.last.is_some_and(|last| last > LAST_MAX) {
            return Err(Invalid::new("last", "must be 10000 at most").into());
        }
        let sandbox = match query.id.as_str() {
            "" => None,
            id => Some(self.named_in_log(query.team.as_ref(), id).await?),
        };
        let filter = Filter { team: query.team, sandbox };
        let seen = match query.last {
            Some(last) => self.store.before_last(filter.clone(), last).await?,
            None => query.after_revision,
        };
        let mut reader = Reader {
            sandboxes: self.clone(),
            filter,
            news: self.log().news(),
            follow: query.follow,
            page: VecDeque::new(),
            seen,
            up_to_date: false,
            heartbeat_sent: false,
            over: false,
        };
        // Read now, so that a refusal is the call's own error, not an item of its stream.
        reader.read().await?;
        Ok(stream::unfold(reader, |mut reader| async move {
            let next = reader.next().await?;
            Some((next, reader))
        }))
    }

    /// Resolves a sandbox by its name. One that is no longer in the cache is known by its events.
    async fn named_in_log(&self, team: Option<&Team>, id: &str) -> Result<SandboxId, Error> {
        let name = match team {
            Some(team) => self.reference(team, id)?,
            None => id.parse()?,
        };
        let cache = &self.nodes.cache;
        let known = team.map_or_else(|| cache.get(&name), |team| cache.get_of(team, &name));
        if let Some(entry) = known {
            return Ok(entry.id);
        }
        let SandboxRef::Id(sandbox) = name else { return Err(Error::not_found(&name)) };
        let filter = Filter { team: team.cloned(), sandbox: Some(sandbox) };
        let page = self.store.events(0, filter, 1).await?;
        if page.events.is_empty() { Err(Error::not_found(&name)) } else { Ok(sandbox) }
    }
}

impl Reader {
    async fn read(&mut self) -> Result<(), Error> {
        self.news.mark_unchanged();
        let page = self.sandboxes.store.events(self.seen, self.filter.clone(), PAGE).await?;
        // A reader without a position starts with the oldest event that is kept.
        if self.seen > 0 && self.seen < page.gone {
            let first = page.gone + 1;
            let message = format!(
                "events after revision {} are not kept any more, only those from {first} on",
                self.seen
            );
            return Err(Error::new(Reason::EventsGone, message));
        }
        (self.seen, self.up_to_date) = (page.seen, page.whole);
        self.page = page.events.into();
        Ok(())
    }

    async fn next(&mut self) -> Option<Result<EventItem, Error>> {
        loop {
            if self.over {
                return None;
            }
            if let Some((revision, event)) = self.page.pop_front() {
                self.heartbeat_sent = false;
                return Some(Ok(EventItem { event: Some((revision, event)), revision }));
            }
            if !self.up_to_date {
                if let Err(error) = self.read().await {
                    self.over = true;
                    return Some(Err(error));
                }
                continue;
            }
            if !self.heartbeat_sent {
                self.heartbeat_sent = true;
                self.over = !self.follow;
                return Some(Ok(EventItem { event: None, revision: self.seen }));
            }
            tokio::select! {
                changed = timeout(HEARTBEAT, self.news.changed()) => match changed {
                    Ok(_) => self.up_to_date = false,
                    Err(_) => self.heartbeat_sent = false,
                },
                () = self.sandboxes.stop.cancelled() => {
                    self.over = true;
                    let error = Error::new(Reason::ShuttingDown, "the controller is stopping");
                    return Some(Err(error.retry(RETRY)));
                }
            }
        }
    }
}
