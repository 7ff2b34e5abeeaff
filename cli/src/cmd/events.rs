//! `events`: prints one line per event. A broken stream continues after the last revision, so that
//! no event is repeated or lost.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{
    Event, WatchAllEventsRequest, WatchAllEventsResponse, WatchEventsRequest, WatchEventsResponse,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    listing::Shown,
    output::{
        Output, json,
        layout::{Column, Fit},
        table::{self, Cell, Lines},
        time,
    },
};

/// Arguments of `events`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl events                     the last 50 of the team
  sandboxctl events ID --since 0        all that is kept of one sandbox
  sandboxctl events -f --last 0 --json  what comes, one object a line
  sandboxctl events -f --since 4711     what came after that one, and what comes

With -f it goes on until Ctrl-C. When the connection breaks, it reconnects for
up to 60 s; no event is repeated or left out.")]
pub(crate) struct Events {
    /// Sandbox: its name, its id or a part of it from either end, a vmid, @current or @last; one that is long
    /// gone by its whole id [default: all of the team]
    #[arg(value_name = "ID")]
    pub(super) id: Option<String>,
    /// Go on with what happens from now
    #[arg(short, long)]
    follow: bool,
    /// Begin after this revision; 0: with the oldest that is kept
    #[arg(long, value_name = "REVISION", conflicts_with = "last")]
    since: Option<u64>,
    /// Begin with the last N
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    last: u32,
    /// Events of all teams and of the nodes; needs an operator's token
    #[arg(long)]
    all_teams: bool,
    /// Flags for the columns.
    #[command(flatten)]
    shown: Shown,
}

/// Columns, with the team's only where there are several.
const COLUMNS: &[Column] = &[
    Column::new("REVISION").rank(6).right(),
    Column::new("AT"),
    Column::new("KIND"),
    Column::new("ID").rank(1),
    Column::new("NODE").rank(2).fit(Fit::Cut(8)),
    Column::new("ACTOR").rank(5).fit(Fit::Cut(12)),
    Column::new("TEAM").rank(3).fit(Fit::Cut(8)),
    Column::new("WHY").fit(Fit::Cut(20)),
];
/// Widths of the columns: the later lines are not known yet.
const WIDTHS: [usize; 8] = [8, 24, 18, 33, 8, 12, 12, 0];
/// Widths on a terminal, where times and ids are short, and why it happened takes what is left.
const WIDTHS_SHORT: [usize; 8] = [8, 14, 18, 8, 12, 12, 12, 1000];
/// Digits of an id that are shown on a terminal.
const ID_DIGITS: usize = 8;

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
    let lines = lines(&events, output)?;
    let mut reader = Reader {
        lines,
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
    lines: Lines,
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
            Err(_) => Err(Failure::deadline("the controller sent nothing", SILENCE)),
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
        let Controller { mut sandboxes, mut operator, .. } = self.controller.clone();
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
        let message = "the controller ended the stream too early";
        Err(Failure { transient: true, ..Failure::local(message) })
    }

    fn print(&mut self, event: &Event) -> Result<(), Failure> {
        if self.output.json {
            self.printed = true;
            return self.output.value(&json::event(event));
        }
        if !std::mem::replace(&mut self.printed, true) && !self.events.shown.no_headers {
            self.output.styled(self.lines.heading())?;
        }
        let short = self.output.room.is_some() && !self.output.wide;
        self.output.styled(self.lines.row(&cells(event, short)).join("\n"))
    }
}

/// Columns and widths of the lines.
fn lines(events: &Events, output: Output) -> Result<Lines, Failure> {
    let mut view = events.shown.view(output);
    let widths = if view.room.is_some() { &WIDTHS_SHORT } else { &WIDTHS };
    if view.columns.is_empty() && !events.all_teams {
        view.columns = COLUMNS.iter().map(Column::name).filter(|name| name != "team").collect();
        return Lines::new(COLUMNS, widths, &view, false);
    }
    let named = !view.columns.is_empty();
    Lines::new(COLUMNS, widths, &view, named)
}

/// Values of an event; the times and ids for people are short.
fn cells(event: &Event, short: bool) -> Vec<Cell> {
    let why = [json::why(event), event.detail.as_str()].into_iter().filter(|word| !word.is_empty());
    let why = why.collect::<Vec<_>>().join(": ");
    let at = time::rfc3339(event.at).unwrap_or_default();
    let (at, id) = match short {
        true => (time::day_and_time(&at), end_of(&event.sandbox_id)),
        false => (at, event.sandbox_id.as_str()),
    };
    vec![
        table::number(event.revision),
        table::cell(at),
        table::cell(json::event_kind(event.kind())),
        table::cell(id),
        table::cell(&event.node),
        table::cell(&event.actor),
        table::cell(&event.team),
        table::cell(why),
    ]
}

/// Last digits of an id, by which it can be named.
fn end_of(id: &str) -> &str {
    id.len().checked_sub(ID_DIGITS).and_then(|start| id.get(start..)).unwrap_or(id)
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::parse, *};

    /// Lines with long values for a window of this width, for the screens.
    pub(in crate::cmd) fn screen(line: &str, room: usize) -> String {
        let events: Events = parse(line).expect(line);
        let output = Output { room: Some(room), ..Output::plain(false) };
        let lines = lines(&events, output).expect("known columns");
        let event = Event {
            revision: 1_234_567,
            at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000_000 }),
            sandbox_id: "pvelxc-06g1t7q8hk0fjf1k8m2v3n4p5q".into(),
            team: "platform-engineering".into(),
            node: "pve-frankfurt-rack-12".into(),
            kind: proto::sandbox::v1::EventKind::CreateAsked.into(),
            actor: "0a1b2c3d4e5f".into(),
            detail: "6144 MiB are wanted and 512 MiB are left of 65536 MiB on this node".into(),
            ..Event::default()
        };
        [vec![lines.heading()], lines.row(&cells(&event, true))].concat().join("\n")
    }

    #[test]
    fn events_take_since_or_last_but_not_both() {
        let events: Events = parse("").expect("no argument is needed");
        assert_eq!((events.last, events.since, events.follow), (50, None, false));
        let events: Events = parse("100001 -f --since 0 --all-teams").expect("all of it");
        assert_eq!((events.id.as_deref(), events.since), (Some("100001"), Some(0)));
        assert!(events.follow && events.all_teams);
        for wrong in ["--since 5 --last 5", "--last 10001"] {
            assert!(parse::<Events>(wrong).is_err(), "{wrong}");
        }
    }
}
