//! Tests of `events`: its output, and that it continues a broken stream.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use proto::{
    Reason,
    sandbox::v1::{Event, EventKind, event},
};
use serde_json::json;
use tonic::Status;

use crate::fake::{Behaviour, Fake, ID, refuse};

/// Log of five events, with revisions 1 to 5.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Numbers of events after which the next streams break.
    cuts: Mutex<VecDeque<usize>>,
    asked: AtomicUsize,
}

type Said = Result<(Option<Event>, u64), Status>;

impl Events {
    pub(crate) fn say(
        &self,
        after: u64,
        last: Option<u32>,
        follow: bool,
    ) -> Result<Vec<Said>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if after > 5 {
            return Err(refuse(Reason::EventsGone));
        }
        let after = last.map_or(after, |last| 5 - u64::from(last.min(5)));
        let mut said: Vec<Said> =
            (after + 1..=5).map(|revision| Ok((Some(event(revision)), revision))).collect();
        match self.cuts.lock().expect("no panic").pop_front() {
            Some(cut) => {
                said.truncate(cut);
                said.push(Err(Status::unknown("the connection broke")));
            }
            None if follow => said.push(Err(refuse(Reason::EventsGone))),
            None => said.push(Ok((None, 5))),
        }
        Ok(said)
    }
}

fn event(revision: u64) -> Event {
    let kind = match revision {
        1 => EventKind::CreateAsked,
        2 => EventKind::Created,
        3 => EventKind::NodeDown,
        4 => EventKind::NodeUp,
        _ => EventKind::Stopped,
    };
    let of_node = matches!(kind, EventKind::NodeDown | EventKind::NodeUp);
    Event {
        revision,
        at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000_000 }),
        sandbox_id: if of_node { String::new() } else { ID.into() },
        team: if of_node { String::new() } else { "lab".into() },
        node: "node2".into(),
        kind: kind.into(),
        actor: if revision < 3 { "0a1b2c3d4e5f".into() } else { "agent".into() },
        why: (revision == 5).then(|| event::Why::Cause(proto::Cause::Ttl.into())),
        detail: if revision == 5 { "its time\nis over\x1b[2J".into() } else { String::new() },
        node_revision: 7 * revision,
    }
}

async fn fake(cuts: &[usize]) -> Fake {
    let cuts = Mutex::new(cuts.iter().copied().collect());
    let events = Events { cuts, ..Events::default() };
    Fake::start(Behaviour { events, ..Behaviour::default() }).await
}

#[tokio::test]
async fn events_print_one_line_or_one_json_object_each() {
    let fake = fake(&[]).await;
    let ran = fake.run(&["events", ID, "--last", "4"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines: Vec<_> = ran.text().lines().collect();
    assert_eq!(lines.len(), 5, "{ran:?}");
    assert!(lines[0].starts_with("REVISION  AT   "), "{ran:?}");
    let expected = format!(
        "       2  2023-11-14T22:13:20.005Z  created             {ID}  node2     0a1b2c3d4e5f  -"
    );
    assert_eq!(lines[1], expected);
    assert!(lines[2].contains("node_down           -  "), "{ran:?}");
    assert!(lines[4].ends_with("agent         TTL: its time is over\u{fffd}[2J"), "{ran:?}");

    let ran = fake.run(&["events", "--since", "4", "--json"]).await;
    let expected = json!({
        "revision": 5, "at": "2023-11-14T22:13:20.005Z", "kind": "stopped", "id": ID, "team": "lab",
        "node": "node2", "actor": "agent", "reason": "TTL", "detail": "its time\nis over\u{1b}[2J",
        "node_revision": 35,
    });
    assert_eq!(ran.json(), expected);
    let ran = fake.run(&["events", "--all-teams", "--last", "1"]).await;
    assert!(ran.text().contains("  agent         lab           TTL: "), "{ran:?}");

    let ran = fake.run(&["events", "--last", "0"]).await;
    assert_eq!((ran.code, ran.text(), ran.stderr.as_str()), (Some(0), "", "no events\n"));
    assert_eq!(fake.run(&["events", "100002"]).await.code, Some(3));
    let gone = fake.run(&["events", "--since", "9"]).await;
    assert_eq!(gone.code, Some(1));
    assert!(gone.stderr.contains("(EVENTS_GONE)\nhint: "), "{gone:?}");
}

#[tokio::test]
async fn events_continue_after_the_last_revision_when_the_stream_breaks() {
    for (args, asked) in
        [(&["events", "--since", "0", "--json"][..], 4), (&["events", "--json"], 4)]
    {
        let fake = fake(&[2, 0, 1]).await;
        let ran = fake.run(args).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let revisions: Vec<_> = ran
            .text()
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).expect("json")["revision"].clone()
            })
            .collect();
        assert_eq!(revisions, [1, 2, 3, 4, 5]);
        assert_eq!(fake.behaviour.events.asked.load(Ordering::SeqCst), asked);
    }
    // With -f the stream continues until the controller refuses.
    let fake = fake(&[3, 1]).await;
    let ran = fake.run(&["events", "-f", "--since", "1"]).await;
    assert_eq!((ran.code, ran.text().lines().count()), (Some(1), 5), "{ran:?}");
    assert_eq!(ran.stderr.matches("connection lost, going on").count(), 2, "{ran:?}");
    // A controller that never sent an event is reported at once.
    let silent = crate::events::fake(&[0]).await;
    let ran = silent.run(&["events", "-f"]).await;
    assert_eq!(
        (ran.code, silent.behaviour.events.asked.load(Ordering::SeqCst)),
        (Some(1), 1),
        "{ran:?}"
    );
}
