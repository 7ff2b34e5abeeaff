//! The event log: who sees what, and that a broken stream can be continued.

use std::collections::BTreeSet;

use prost::Message;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::*;
use crate::store::Filter;

async fn watch(
    api: &mut Api,
    request: WatchEventsRequest,
) -> Result<Streaming<WatchEventsResponse>, Status> {
    Ok(api.watch_events(request).await?.into_inner())
}

/// Reads all events kept after a revision; also returns the revision to continue from.
async fn read(api: &mut Api, request: WatchEventsRequest) -> (Vec<Event>, u64) {
    let mut stream = watch(api, request).await.expect("read");
    let (mut events, mut seen) = (Vec::new(), 0);
    while let Some(answer) = stream.next().await {
        let WatchEventsResponse { event, revision } = answer.expect("no error");
        assert!(revision >= seen, "it never goes back");
        seen = revision;
        events.extend(event);
    }
    (events, seen)
}

pub(super) async fn of(lab: &Lab, id: &str, after_revision: u64) -> Vec<Event> {
    let request = WatchEventsRequest { id: id.into(), after_revision, ..Default::default() };
    read(&mut lab.api(), request).await.0
}

fn reason_of(event: &Event) -> Option<Reason> {
    match event.why? {
        event::Why::Reason(reason) => Reason::try_from(reason).ok(),
        event::Why::Cause(_) => None,
    }
}

fn kinds(events: &[Event]) -> Vec<EventKind> {
    events.iter().map(Event::kind).collect()
}

/// Waits until the log is written; a controller dropped without `stop` would not do that.
pub(super) async fn settled(lab: &Lab) {
    lab.domain().nodes().log.flushed().await.expect("written");
}

impl Lab {
    fn actor(&self) -> String {
        proto::token::split(&self.red).expect("a token").0.to_owned()
    }

    async fn pause(&self, id: &str) {
        let request = PauseSandboxRequest { id: id.into(), or_stop: false };
        self.api().pause_sandbox(request).await.expect("paused");
    }

    async fn resume(&self, id: &str) {
        let request = ResumeSandboxRequest { id: id.into() };
        self.api().resume_sandbox(request).await.expect("resumed");
    }

    async fn delete(&self, id: &str) {
        let request = DeleteSandboxRequest { id: id.into() };
        self.api().delete_sandbox(request).await.expect("deleted");
    }
}

#[tokio::test(start_paused = true)]
async fn logs_a_life_in_order_with_its_actors() {
    use EventKind as E;
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = sandbox.id.clone();
    lab.pause(&id).await;
    lab.resume(&id).await;
    let expose =
        ExposeHttpServiceRequest { id: id.clone(), name: "web".into(), port: 80, visibility: 0 };
    lab.api().expose_http_service(expose).await.expect("exposed");
    let hide = HideHttpServiceRequest { id: id.clone(), name: "web".into() };
    lab.api().hide_http_service(hide).await.expect("hidden");
    lab.api()
        .stop_sandbox(StopSandboxRequest { id: id.clone(), grace: None })
        .await
        .expect("stopped");
    lab.api().start_sandbox(StartSandboxRequest { id: id.clone() }).await.expect("started");
    // No caller requests this one.
    let holder = lab.holder(&id).clone();
    let mut stopped = holder.living()[0].clone();
    stopped.set_phase(Phase::Stopped);
    stopped.failure = Some(Failure { reason: Reason::PctFailed.into(), ..Failure::default() });
    holder.put(stopped);
    lab.until(&id, Phase::Stopped).await;
    lab.delete(&id).await;
    // Nothing can be requested of a deleted sandbox.
    lab.delete(&id).await;

    let events = of(&lab, &id, 0).await;
    let (me, agent) = (lab.actor(), "agent".to_owned());
    let expected = [
        (E::CreateAsked, &me),
        (E::Created, &me),
        (E::PauseAsked, &me),
        (E::Paused, &me),
        (E::ResumeAsked, &me),
        (E::Resumed, &me),
        (E::Exposed, &me),
        (E::Hidden, &me),
        (E::StopAsked, &me),
        (E::Stopped, &me),
        (E::StartAsked, &me),
        (E::Started, &me),
        (E::Stopped, &agent),
        (E::DeleteAsked, &me),
        (E::Deleted, &me),
    ];
    let told: Vec<_> = events.iter().map(|event| (event.kind(), &event.actor)).collect();
    assert_eq!(told, expected);
    assert!(events.is_sorted_by(|a, b| a.revision < b.revision));
    assert!(events.iter().all(|e| e.sandbox_id == id && e.team == "red" && e.node == sandbox.node));
    assert!(events.iter().all(|event| event.at.is_some()));
    assert_eq!(
        (events[6].detail.as_str(), reason_of(&events[12])),
        ("web (port 80, team)", Some(Reason::PctFailed))
    );
    let says = |event: &Event| {
        event.kind() != E::CreateAsked && !event.kind().as_str_name().ends_with("ASKED")
    };
    assert!(events.iter().all(|event| (event.node_revision > 0) == says(event)));

    // By its vmid, and from any revision in between.
    assert_eq!(of(&lab, &sandbox.vmid.to_string(), 0).await, events);
    assert_eq!(of(&lab, &id, events[3].revision).await, events[4..]);
    let last = WatchEventsRequest { id: id.clone(), last: Some(2), ..Default::default() };
    assert_eq!(read(&mut lab.api(), last).await.0, events[13..]);
}

#[tokio::test(start_paused = true)]
async fn events_of_another_team_never_show() {
    let lab = Lab::new().await;
    let ours = lab.create("r1").await.expect("made").id;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut api = lab.api_as(&blue);
    let theirs = create(&mut api, request("r1")).await.expect("made").id;
    lab.agents[0].down();
    tokio::time::sleep(Duration::from_secs(2)).await;
    settled(&lab).await;
    let (events, _) = read(&mut api, WatchEventsRequest::default()).await;
    assert_eq!(kinds(&events), [EventKind::CreateAsked, EventKind::Created]);
    assert!(events.iter().all(|event| event.sandbox_id == theirs && event.team == "blue"));
    let foreign = WatchEventsRequest { id: ours.clone(), ..Default::default() };
    assert_eq!(reason(watch(&mut api, foreign).await), Reason::SandboxNotFound);

    // An operator sees all events, and those of the nodes.
    let mut operator = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&blue));
    let answer = operator.watch_all_events(WatchAllEventsRequest::default()).await;
    assert_eq!(reason(answer), Reason::ScopeMissing);
    let answer = lab.operator().watch_all_events(WatchAllEventsRequest::default()).await;
    let events: Vec<_> = answer
        .expect("read")
        .into_inner()
        .filter_map(|answer| answer.expect("no error").event)
        .collect()
        .await;
    let teams: BTreeSet<_> = events.iter().map(|event| event.team.as_str()).collect();
    assert_eq!(teams, BTreeSet::from(["", "blue", "red"]));
    let of_node = |kind| {
        let of_it = events.iter().filter(|event| event.kind() == kind);
        of_it.map(|event| (event.node.as_str(), event.actor.as_str())).collect::<Vec<_>>()
    };
    assert_eq!(of_node(EventKind::NodeUp).len(), 3);
    assert_eq!(of_node(EventKind::NodeDown), [("n1", "controller")]);
    let one = WatchAllEventsRequest { id: ours, ..Default::default() };
    let of_ours = lab.operator().watch_all_events(one).await.expect("read").into_inner();
    assert_eq!(of_ours.collect::<Vec<_>>().await.len(), 3, "two, and the end");
}

#[tokio::test(start_paused = true)]
async fn restart_leaves_no_gap_and_no_double_event() {
    use EventKind as E;
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    lab.pause(&id).await;
    let (before, seen) = read(&mut lab.api(), WatchEventsRequest::default()).await;
    assert_eq!(kinds(&before), [E::CreateAsked, E::Created, E::PauseAsked, E::Paused]);
    // The controller crashes several times; meanwhile the node changes the sandbox.
    let holder = lab.holder(&id).clone();
    for phase in [Phase::Running, Phase::Stopped, Phase::Stopped] {
        lab.controller = None;
        let mut sandbox = holder.living()[0].clone();
        if sandbox.phase() != phase {
            sandbox.set_phase(phase);
            holder.put(sandbox);
        }
        lab.start().await;
    }
    // The node reports everything again, as a whole inventory.
    lab.net.cut(holder.name());
    tokio::time::sleep(Duration::from_secs(3)).await;
    settled(&lab).await;
    let after = of(&lab, "", seen).await;
    assert_eq!(kinds(&after), [E::Resumed, E::Stopped]);
    assert!(after.iter().all(|event| event.actor == "agent" && event.revision > seen));
    // Read at once or in two parts: the same.
    assert_eq!(of(&lab, "", 0).await, [before, after].concat());
}

/// A crash between the write of an event and the next write: a repeated report adds no event.
#[tokio::test(start_paused = true)]
async fn repeated_report_is_not_logged_again() {
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    lab.pause(&id).await;
    lab.resume(&id).await;
    let before = of(&lab, &id, 0).await;
    // The row has its former state, as if only the events had been written.
    let row = lab.store.get(&id.parse().expect("id")).await.expect("read").expect("a row");
    let mut old = Sandbox::decode(row.last.as_slice()).expect("a sandbox");
    old.set_phase(Phase::Paused);
    let seen = crate::store::KnownState {
        id: row.id,
        team: row.team,
        request_id: row.request_id,
        node: row.node.expect("a node"),
        attempt: row.attempt,
        created_ms: row.created_ms,
        ended_ms: 0,
        last: old.encode_to_vec(),
    };
    lab.store.put_states(vec![seen], vec![]).await.expect("written");
    lab.start().await;
    settled(&lab).await;
    assert_eq!(of(&lab, &id, 0).await, before);
}

#[tokio::test(start_paused = true)]
async fn pruned_events_are_reported_with_the_first_kept_revision() {
    let mut lab = Lab::new().await;
    lab.events.max = 10;
    lab.start().await;
    let id = lab.create("r1").await.expect("made").id;
    for _ in 0..10 {
        lab.pause(&id).await;
        lab.resume(&id).await;
    }
    let whole = of(&lab, "", 0).await;
    assert_eq!(whole.len(), 42);
    // The retention task is due.
    tokio::time::sleep(Duration::from_secs(700)).await;
    let kept = of(&lab, "", 0).await;
    // The nodes' events have a share of their own.
    assert!((5..=10).contains(&kept.len()), "{}", kept.len());
    assert!(whole.ends_with(&kept), "from 0 on there is no error, only what there is");
    let early = WatchEventsRequest { after_revision: whole[5].revision, ..Default::default() };
    let error = watch(&mut lab.api(), early).await.expect_err("gone");
    assert_eq!(error.code(), tonic::Code::OutOfRange);
    assert!(error.message().contains(&format!("from {} on", kept[0].revision)), "{error}");
    assert_eq!(reason(Err::<(), _>(error)), Reason::EventsGone);
    assert_eq!(of(&lab, "", kept[0].revision - 1).await, kept, "nothing is missing here");

    // A team without events for long misses nothing: its revision advanced with the log.
    let blue = token(&lab.store, "blue", "sandbox").await;
    let (none, seen) = read(&mut lab.api_as(&blue), WatchEventsRequest::default()).await;
    assert_eq!((none.len(), seen), (0, kept[kept.len() - 1].revision));

    let both =
        WatchEventsRequest { after_revision: 3, last: Some(3), ..WatchEventsRequest::default() };
    assert_eq!(reason(watch(&mut lab.api(), both).await), Reason::FieldInvalid);
    let many = WatchEventsRequest { last: Some(10_001), ..WatchEventsRequest::default() };
    assert_eq!(reason(watch(&mut lab.api(), many).await), Reason::FieldInvalid);
    let nobody = WatchEventsRequest { id: "100999".into(), ..WatchEventsRequest::default() };
    assert_eq!(reason(watch(&mut lab.api(), nobody).await), Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn noisy_team_does_not_evict_events_of_others() {
    let mut lab = Lab::new().await;
    lab.events.max = 60;
    lab.start().await;
    let id = lab.create("r1").await.expect("made").id;
    let blue = token(&lab.store, "blue", "sandbox").await;
    create(&mut lab.api_as(&blue), request("r1")).await.expect("made");
    let theirs = read(&mut lab.api_as(&blue), WatchEventsRequest::default()).await.0;
    let nodes = |events: Vec<(Option<proto::name::Team>, u64)>| {
        events.into_iter().find(|(team, _)| team.is_none())
    };
    let of_nodes = nodes(lab.store.event_counts().await.expect("counts"));
    for _ in 0..50 {
        lab.pause(&id).await;
        lab.resume(&id).await;
    }
    let mut follower = lab.api_as(&blue);
    let from = WatchEventsRequest { after_revision: theirs[0].revision, ..Default::default() };
    for restart in [false, true] {
        if restart {
            lab.start().await;
            follower = lab.api_as(&blue);
        }
        tokio::time::sleep(Duration::from_secs(700)).await;
        let kept = read(&mut lab.api_as(&blue), WatchEventsRequest::default()).await.0;
        assert_eq!(kept, theirs, "all of another team's");
        // Nothing is missing behind a place in the log that only the noisy team has lost.
        let rest = read(&mut follower, from.clone()).await.0;
        assert_eq!(rest, theirs[1..]);
    }
    let counts = lab.store.event_counts().await.expect("counts");
    assert!(nodes(counts.clone()).map(|(_, count)| count) >= of_nodes.map(|(_, count)| count));
    assert!(counts.iter().map(|(_, count)| count).sum::<u64>() <= 60, "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn follower_gets_new_events_and_heartbeats() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let from_now = WatchEventsRequest { follow: true, last: Some(0), ..Default::default() };
    let mut stream = watch(&mut lab.api(), from_now).await.expect("read");
    let mut next = async || stream.next().await.expect("goes on").expect("no error");
    let greeting = next().await;
    assert_eq!(greeting.event, None);
    let begun = tokio::time::Instant::now();
    assert_eq!(next().await, greeting);
    assert_eq!(begun.elapsed().as_secs(), 15);
    lab.pause(&id).await;
    let mut events = Vec::new();
    while events.len() < 2 {
        events.extend(next().await.event);
    }
    assert_eq!(kinds(&events), [EventKind::PauseAsked, EventKind::Paused]);
    assert!(events[0].revision > greeting.revision);
}

/// Nothing is buffered for a reader that does not read: it gets what it missed, or EVENTS_GONE.
#[tokio::test(start_paused = true)]
async fn slow_reader_holds_no_events_in_memory() {
    let mut lab = Lab::new().await;
    lab.events.max = 3000;
    lab.start().await;
    let follow = || WatchEventsRequest { follow: true, after_revision: 1, ..Default::default() };
    let mut patient = watch(&mut lab.api(), follow()).await.expect("read");
    let mut stuck = watch(&mut lab.api(), follow()).await.expect("read");
    let log = &lab.domain().nodes().log;
    let fill = async |count: usize| {
        for _ in 0..count {
            let team = Some("red".parse().expect("team"));
            let detail = "x".repeat(1000);
            log.append(crate::store::Event { team, detail, ..log.event(EventKind::Paused, "x") });
        }
        log.flushed().await.expect("written");
    };
    fill(2000).await;
    let mut revisions = Vec::new();
    while revisions.len() < 2000 {
        let answer = patient.next().await.expect("goes on").expect("no error");
        revisions.extend(answer.event.map(|event| event.revision));
    }
    assert!(revisions.is_sorted_by(|a, b| a < b));
    for _ in 0..4 {
        fill(2000).await;
    }
    tokio::time::sleep(Duration::from_secs(700)).await;
    let kept = lab.store.events(0, Filter::default(), 10_000).await.expect("read");
    assert!(kept.events.len() <= 3000, "{}", kept.events.len());
    let mut heard = 0;
    let error = loop {
        match stuck.next().await.expect("it is told") {
            Ok(_) => heard += 1,
            Err(error) => break error,
        }
    };
    // Of 10000 events it got those in the flow-control windows of its connection.
    assert!(heard < 5000, "{heard}");
    assert_eq!(reason(Err::<(), _>(error)), Reason::EventsGone);
}

#[tokio::test(start_paused = true)]
async fn logs_a_retried_and_a_failed_creation() {
    use EventKind as E;
    let lab = Lab::new().await;
    let asked = CreateSandboxRequest { node: "n1".into(), ..request("r0") };
    lab.agents[0].faults(|faults| faults.fail = Some(Reason::PctFailed));
    let failed = create(&mut lab.api(), asked).await;
    assert!(failed.is_err());
    let (events, seen) = read(&mut lab.api(), WatchEventsRequest::default()).await;
    let told: Vec<_> = events.iter().map(|event| (event.kind(), reason_of(event))).collect();
    assert_eq!(told, [(E::CreateAsked, None), (E::CreateFailed, Some(Reason::PctFailed))]);

    for agent in &lab.agents[1..] {
        agent.load(|load| load.cpu_busy = 0.9);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sandbox = lab.create("r1").await.expect("made");
    let events = of(&lab, "", seen).await;
    assert_eq!(kinds(&events), [E::CreateAsked, E::AttemptMoved, E::Created]);
    assert_eq!((events[0].node.as_str(), events[1].node.as_str()), ("n1", sandbox.node.as_str()));
    assert_eq!(
        (reason_of(&events[1]), events[1].actor.as_str()),
        (Some(Reason::PctFailed), "controller")
    );
}

#[tokio::test(start_paused = true)]
async fn logs_the_cancel_of_an_abandoned_attempt() {
    let lab = Lab::new().await;
    lab.agents[0].faults(|faults| faults.cut = Some(node::fake::Cut::After));
    for agent in &lab.agents[1..] {
        agent.load(|load| load.cpu_busy = 0.9);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait, ..request("r1") };
    let id = create(&mut lab.api(), asked).await.expect("accepted").id;
    tokio::time::sleep(Duration::from_millis(200)).await;
    lab.agents[0].down();
    lab.until(&id, Phase::Running).await;
    lab.agents[0].faults(|faults| faults.cut = None);
    lab.agents[0].up();
    tokio::time::sleep(Duration::from_secs(5)).await;
    settled(&lab).await;
    let events = of(&lab, &id, 0).await;
    use EventKind as E;
    let expected = [E::CreateAsked, E::AttemptMoved, E::Created, E::AttemptCancelled];
    assert_eq!(kinds(&events), expected);
    assert_eq!(
        (reason_of(&events[1]), events[3].node.as_str()),
        (Some(Reason::NodeUnreachable), "n1")
    );
}

#[tokio::test(start_paused = true)]
async fn lost_sandbox_is_logged_once() {
    use EventKind as E;
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let holder = lab.holder(&id).clone();
    let sandbox = holder.living()[0].clone();
    holder.lose_journal();
    lab.net.cut(holder.name());
    lab.until(&id, Phase::Unreachable).await;
    lab.start().await;
    settled(&lab).await;
    assert_eq!(kinds(&of(&lab, &id, 0).await), [E::CreateAsked, E::Created, E::Lost]);
    // The sandbox reappears, and then its owner deletes it.
    holder.put(sandbox);
    lab.until(&id, Phase::Running).await;
    lab.delete(&id).await;
    let told = kinds(&of(&lab, &id, 0).await);
    assert_eq!(told[3..], [E::Found, E::DeleteAsked, E::Deleted]);
}

#[tokio::test(start_paused = true)]
async fn stop_writes_all_events() {
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let (_, seen) = read(&mut lab.api(), WatchEventsRequest::default()).await;
    let mut stopped = lab.holder(&id).living()[0].clone();
    stopped.set_phase(Phase::Stopped);
    let controller = lab.controller.take().expect("a controller");
    let log = &controller.sandboxes().nodes().log;
    let team = Some("red".parse().expect("team"));
    log.append(crate::store::Event { team, ..log.event(EventKind::Paused, "x") });
    controller.stop().await;
    lab.start().await;
    assert_eq!(kinds(&of(&lab, "", seen).await), [EventKind::Paused]);
}

#[tokio::test]
async fn event_log_works_over_sqlite() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let open = || Arc::new(crate::store::sqlite::Sqlite::open(&path).expect("store"));
    let mut lab = Lab::over(open()).await;
    let id = lab.create("r1").await.expect("made").id;
    lab.pause(&id).await;
    let before = of(&lab, "", 0).await;
    lab.controller = None;
    lab.store = open();
    lab.start().await;
    lab.resume(&id).await;
    let after = of(&lab, "", 0).await;
    assert_eq!(after[..4], before);
    assert_eq!(kinds(&after[4..]), [EventKind::ResumeAsked, EventKind::Resumed]);
}
