//! `events`: prints one line per event. A broken stream continues after the last revision, so that
//! no event is repeated or lost.

use std::time::Duration;

use proto::sandbox::v1::{
    Event, WatchAllEventsRequest, WatchAllEventsResponse, WatchEventsRequest, WatchEventsResponse,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use crate::{
    args::Events,
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, time},
    printable::one_line,
};

/// Longest absence of the controller.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(500);
/// Silence after which the stream counts as broken: the controller sends a keep-alive every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

pub(super) async fn run(
    controller: Controller,
    events: Events,
    output: Output,
) -> Result<u8, Failure> {
    let mut reader = Reader {
        place: events.since.map_or(Place::Last(events.last), Place::After),
        printed: false,
        controller,
        events,
        output,
    };
    let mut lost: Option<Instant> = None;
    loop {
        let mut heard = false;
        let failure = match reader.once(&mut heard).await {
            // A controller that never answered is reported at once.
            Err(failure) if failure.transient && (heard || lost.is_some()) => failure,
            ended => {
                ended?;
                if !reader.printed {
                    output.note("no events");
                }
                return Ok(0);
            }
        };
        if heard {
            lost = None;
        }
        let since = *lost.get_or_insert_with(|| {
            output.note(format!("connection lost, going on ... ({})", failure.message));
            Instant::now()
        });
        if since.elapsed() >= PATIENCE {
            return Err(match reader.place {
                Place::After(revision) => failure.hint(format!(
                    "`sandboxctl events --since {revision}` goes on where this ended"
                )),
                Place::Last(_) => failure,
            });
        }
        sleep(AGAIN).await;
    }
}

/// Position to begin at.
enum Place {
    After(u64),
    Last(u32),
}

struct Reader {
    controller: Controller,
    events: Events,
    place: Place,
    /// Whether a line, and with it the headings, was printed.
    printed: bool,
    output: Output,
}

enum Stream {
    Team(Streaming<WatchEventsResponse>),
    All(Streaming<WatchAllEventsResponse>),
}

impl Stream {
    /// Returns an event or none, and the position after it; `None` at the end.
    async fn next(&mut self) -> Result<Option<(Option<Event>, u64)>, Failure> {
        let next = async {
            Ok::<_, Failure>(match self {
                Self::Team(stream) => {
                    stream.message().await?.map(|said| (said.event, said.revision))
                }
                Self::All(stream) => {
                    stream.message().await?.map(|said| (said.event, said.revision))
                }
            })
        };
        match timeout(SILENCE, next).await {
            Ok(next) => next,
            Err(_) => Err(Failure::deadline("the controller gave no sign of life", SILENCE)),
        }
    }
}

impl Reader {
    async fn open(&self) -> Result<Stream, Failure> {
        let (after_revision, last) = match self.place {
            Place::After(revision) => (revision, None),
            Place::Last(last) => (0, Some(last)),
        };
        let (id, follow) = (self.events.id.clone().unwrap_or_default(), self.events.follow);
        let Controller { mut sandboxes, mut operator } = self.controller.clone();
        Ok(if self.events.all_teams {
            let request = WatchAllEventsRequest { after_revision, id, follow, last };
            Stream::All(answer(operator.watch_all_events(request)).await?)
        } else {
            let request = WatchEventsRequest { after_revision, id, follow, last };
            Stream::Team(answer(sandboxes.watch_events(request)).await?)
        })
    }

    /// Prints events until the stream ends as it should.
    async fn once(&mut self, heard: &mut bool) -> Result<(), Failure> {
        let mut stream = self.open().await?;
        let mut whole = false;
        while let Some((event, revision)) = stream.next().await? {
            *heard = true;
            // A keep-alive: all events up to now have arrived.
            whole = event.is_none();
            if let Some(event) = event {
                self.print(&event)?;
            }
            self.place = Place::After(revision);
        }
        if whole && !self.events.follow {
            return Ok(());
        }
        let message = "the controller ended the stream before its end";
        Err(Failure { transient: true, ..Failure::local(message) })
    }

    fn print(&mut self, event: &Event) -> Result<(), Failure> {
        if self.output.json {
            self.printed = true;
            return self.output.value(&json::event(event));
        }
        if !std::mem::replace(&mut self.printed, true) {
            let headings = ["REVISION", "AT", "KIND", "ID", "NODE", "ACTOR", "TEAM", "WHY"];
            self.output.line(self.line(headings.map(String::from)))?;
        }
        let why =
            [json::why(event), event.detail.as_str()].into_iter().filter(|word| !word.is_empty());
        let why = why.collect::<Vec<_>>().join(": ");
        self.output.line(self.line([
            event.revision.to_string(),
            time::rfc3339(event.at).unwrap_or_default(),
            json::event_kind(event.kind()),
            event.sandbox_id.clone(),
            event.node.clone(),
            event.actor.clone(),
            event.team.clone(),
            why,
        ]))
    }

    /// Formats fixed-width columns: a table would have to know the later lines.
    fn line(&self, cells: [String; 8]) -> String {
        let [revision, at, kind, id, node, actor, team, why] = cells.map(|cell| match cell {
            empty if empty.is_empty() => "-".to_owned(),
            cell => one_line(&cell),
        });
        let team = if self.events.all_teams { format!("{team:<12}  ") } else { String::new() };
        format!(
            "{revision:>8}  {at:<24}  {kind:<18}  {id:<33}  {node:<8}  {actor:<12}  {team}{why}"
        )
    }
}
