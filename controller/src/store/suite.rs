//! One suite for both stores.

use proto::sandbox::v1::EventKind;

use super::{
    memory::Memory,
    sqlite::{MIGRATIONS, Sqlite},
    *,
};

/// Schema version from which on the events of each share are counted as they come and go.
const COUNTED_FROM: usize = 10;

pub(super) fn id(n: u8) -> SandboxId {
    SandboxId::new(1000 + u64::from(n), &[n; 10])
}

pub(super) fn row(n: u8, request: &str) -> Row {
    Row {
        id: id(n),
        team: "red".parse().expect("team"),
        user: n.is_multiple_of(2).then(|| "ada".parse().expect("user")),
        request_id: request.parse().expect("request"),
        digest: format!("d{n}"),
        request: vec![1, 2, 3].into(),
        state: State::Placing,
        node: Some("n1".parse().expect("node")),
        attempt: 1,
        decision: "{}".into(),
        cancelled: false,
        released: false,
        created_ms: 5,
        ended_ms: 0,
        last: vec![],
    }
}

fn node(name: &str) -> NodeName {
    name.parse().expect("node")
}

fn seen(n: u8, ended_ms: u64) -> KnownState {
    let row = row(n, &format!("r{n}"));
    KnownState {
        id: row.id,
        team: row.team,
        request_id: row.request_id,
        node: node("n1"),
        attempt: 1,
        created_ms: 5,
        ended_ms,
        last: vec![9],
    }
}

pub(super) fn event(n: u8, kind: EventKind) -> Event {
    Event {
        at_ms: 100 * u64::from(n),
        sandbox: Some(id(n)),
        team: Some("red".parse().expect("team")),
        node: Some(node("n1")),
        kind,
        actor: "agent".into(),
        why: proto::Reason::PctFailed.into(),
        detail: "d".into(),
        node_revision: u64::from(n),
        once: None,
    }
}

async fn begin(store: &dyn Store, row: Row) -> Result<Begun, Error> {
    let asked = Event { sandbox: Some(row.id), ..event(1, EventKind::CreateAsked) };
    store.begin(row, None, asked).await
}

/// Needs a store without events.
async fn log_of_events(store: &dyn Store) -> Result<(), Error> {
    let all = Filter::default;
    assert_eq!(
        store.events(0, all(), 10).await?,
        EventPage { whole: true, ..EventPage::default() }
    );
    assert_eq!(store.before_last(all(), 0).await?, 0);

    let blue = Event { team: Some("blue".parse().expect("team")), ..event(2, EventKind::Paused) };
    let of_node = Event { sandbox: None, team: None, ..event(3, EventKind::NodeDown) };
    let named = Event { once: Some("n1 j 4".into()), ..event(4, EventKind::Stopped) };
    let first = vec![event(1, EventKind::Created), blue.clone(), of_node.clone(), named.clone()];
    assert_eq!(store.put_states(vec![], first).await?, 4);
    // The same key again: in another write, and twice in one.
    let other = Event { once: Some("n1 j 5".into()), ..event(5, EventKind::Started) };
    let again = vec![named.clone(), other.clone(), other.clone(), event(1, EventKind::Deleted)];
    assert_eq!(store.put_states(vec![], again).await?, 6);

    let page = store.events(0, all(), 10).await?;
    let revisions: Vec<_> = page.events.iter().map(|(revision, _)| *revision).collect();
    assert_eq!((revisions, page.gone, page.seen, page.whole), ((1..=6).collect(), 0, 6, true));
    let written: Vec<_> = page.events.into_iter().map(|(_, event)| event).collect();
    let deleted = event(1, EventKind::Deleted);
    let expected = [event(1, EventKind::Created), blue.clone(), of_node, named, other, deleted];
    assert_eq!(written, expected);

    // Pages, and the events that a team sees.
    let red = || Filter { team: Some("red".parse().expect("team")), sandbox: None };
    let page = store.events(0, red(), 2).await?;
    assert_eq!((page.events.len(), page.seen, page.whole), (2, 4, false));
    let page = store.events(page.seen, red(), 3).await?;
    assert_eq!((page.events.len(), page.seen, page.whole), (2, 6, true));
    let one = || Filter { sandbox: Some(id(1)), ..red() };
    let page = store.events(0, one(), 10).await?;
    assert_eq!(page.events.iter().map(|(revision, _)| *revision).collect::<Vec<_>>(), [1, 6]);
    let theirs = Filter { sandbox: Some(id(2)), ..red() };
    assert_eq!(store.events(0, theirs, 10).await?.events, []);
    for (filter, count, before) in
        [(all(), 0, 6), (all(), 2, 4), (all(), 99, 0), (red(), 3, 3), (one(), 1, 5), (one(), 9, 0)]
    {
        assert_eq!(store.before_last(filter.clone(), count).await?, before, "{filter:?} {count}");
    }

    // The oldest events go first, in batches; a young one protects those after it.
    assert_eq!(store.prune_events(300, 1).await?, 1);
    assert_eq!(store.prune_events(300, 10).await?, 1);
    assert_eq!(store.prune_events(300, 10).await?, 0);
    let page = store.events(2, all(), 10).await?;
    assert_eq!((page.gone, page.events.len()), (2, 4));
    // Of one team alone: what others have, and where they may continue, stays.
    let (red_team, blue_team) = (red().team, "blue".parse().ok());
    assert_eq!(store.event_counts().await?, [(red_team.clone(), 3), (None, 1)]);
    store.drop_events(red_team.clone(), 2).await?;
    assert_eq!(store.event_counts().await?, [(red_team.clone(), 1), (None, 1)]);
    let team = red_team.clone().expect("a team");
    assert_eq!(store.events_of_team(&team).await?, 1);
    assert_eq!(store.events_of_team(&"green".parse().expect("team")).await?, 0);
    let gone = async |team| {
        let page = store.events(0, Filter { team, sandbox: None }, 10).await?;
        Ok::<_, Error>((page.gone, page.events.len()))
    };
    assert_eq!(gone(red_team.clone()).await?, (5, 1));
    assert_eq!(gone(blue_team.clone()).await?, (2, 0));
    assert_eq!(gone(None).await?, (5, 2), "who sees all teams misses those of one");
    assert_eq!(gone("green".parse().ok()).await?, (0, 0), "nothing of it was ever removed");
    let kept_of = async |n, team| {
        let page = store.events(0, Filter { team, sandbox: Some(id(n)) }, 10).await?;
        Ok::<_, Error>((page.gone, page.events.len()))
    };
    for team in [None, red_team.clone()] {
        assert_eq!(kept_of(1, team).await?, (5, 1), "its first event may be missing");
    }
    store.drop_events(None, 9).await?;
    store.drop_events(blue_team.clone(), 9).await?;
    assert_eq!((gone(blue_team).await?, gone(None).await?), ((2, 0), (5, 1)));
    assert_eq!(store.prune_events(u64::MAX / 2, 10).await?, 1);
    let page = store.events(0, all(), 10).await?;
    assert_eq!((page.gone, page.seen, page.events), (6, 6, vec![]));
    // Revisions continue although nothing is left; a key that is free again can be used.
    let named = Event { once: Some("n1 j 4".into()), ..event(4, EventKind::Stopped) };
    assert_eq!(store.put_states(vec![], vec![named]).await?, 7);
    // Acceptance is logged in the same write.
    let Begun::New(revision) = begin(store, row(40, "r40")).await? else { panic!("new") };
    let page = store.events(7, all(), 10).await?;
    assert_eq!(page.events.len(), 1);
    assert_eq!((page.events[0].0, page.events[0].1.sandbox), (revision, Some(id(40))));
    // One sandbox: its log has its beginning, or ends before what others of its team have lost.
    let later = [
        Event { team: "green".parse().ok(), ..event(42, EventKind::Created) },
        event(43, EventKind::Created),
        event(44, EventKind::CreateAsked),
        event(43, EventKind::Paused),
    ];
    let last = store.put_states(vec![], later.to_vec()).await?;
    assert_eq!(kept_of(43, None).await?, (6, 2));
    // The oldest three of the team, the last of which is of sandbox 43.
    store.drop_events(red_team.clone(), 3).await?;
    assert_eq!(kept_of(43, None).await?, (last - 2, 1));
    assert_eq!(kept_of(44, None).await?, (0, 1), "it begins with its creation");
    assert_eq!(kept_of(42, None).await?, (0, 1), "another team's losses");
    let revision = last;
    assert!(matches!(begin(store, row(41, "r40")).await?, Begun::Taken(_)));
    assert_eq!(store.before_last(all(), 0).await?, revision, "nothing was accepted");
    store.failed(&id(40), vec![], true, 50).await?;
    assert_eq!(store.forget(60).await?, [id(40)]);
    Ok(())
}

async fn files_of_creations(store: &dyn Store) -> Result<(), Error> {
    let asked = || event(1, EventKind::CreateAsked);
    let begun = |n: u8, team: &str, bytes: u64| {
        let row = Row { team: team.parse().expect("team"), ..row(n, &format!("f{n}")) };
        let files = vec![n; usize::try_from(bytes).expect("fits")];
        store.begin(row, Some(files), asked())
    };
    let (of_team, of_all) = FILES_BYTES_MAX;
    assert!(matches!(begun(80, "red", of_team - 1).await?, Begun::New(_)));
    assert_eq!(store.files(&id(80)).await?.map(|files| files.len() as u64), Some(of_team - 1));
    assert_eq!(begun(81, "red", 2).await?, Begun::Full);
    assert_eq!((store.get(&id(81)).await?, store.files(&id(81)).await?), (None, None));
    assert!(matches!(begun(82, "red", 1).await?, Begun::New(_)));
    let teams = u8::try_from(of_all / of_team).expect("few");
    for n in 1..teams {
        assert!(matches!(begun(82 + n, &format!("t{n}"), of_team).await?, Begun::New(_)));
    }
    assert_eq!(begun(99, "blue", 1).await?, Begun::Full, "all teams together");
    // Both ends drop the files.
    store.done(&id(80), vec![], vec![]).await?;
    store.failed(&id(82), vec![], true, 50).await?;
    assert_eq!((store.files(&id(80)).await?, store.files(&id(82)).await?), (None, None));
    assert!(matches!(begun(99, "blue", 1).await?, Begun::New(_)));
    Ok(())
}

async fn creations(store: &dyn Store) -> Result<(), Error> {
    assert!(matches!(begin(store, row(1, "r1")).await?, Begun::New(_)));
    let Begun::Taken(taken) = begin(store, row(2, "r1")).await? else { panic!("taken") };
    assert_eq!(*taken, row(1, "r1"));
    // Another team's key is another key.
    let other = Row { team: "blue".parse().expect("team"), ..row(3, "r1") };
    assert!(matches!(begin(store, other.clone()).await?, Begun::New(_)));
    assert_eq!(store.by_request(&other.team, &other.request_id).await?, Some(other));

    let choice = Choice {
        node: node("n2"),
        attempt: 2,
        decision: "{2}".into(),
        abandoned: Some((node("n1"), 1)),
    };
    assert!(store.choose(&id(1), choice.clone()).await?);
    let chosen = store.get(&id(1)).await?.expect("row");
    assert_eq!((chosen.node, chosen.attempt, chosen.decision), (Some(node("n2")), 2, "{2}".into()));
    assert_eq!(store.pending_cancels(&node("n1")).await?, [(id(1), 1)]);
    store.cancel_delivered(&node("n1"), &id(1), 1).await?;
    assert_eq!(store.pending_cancels(&node("n1")).await?, []);

    store.cancel(&id(1)).await?;
    let told = store.done(&id(1), vec![7], vec![event(1, EventKind::Created)]).await?;
    let log = store.events(told - 1, Filter::default(), 10).await?;
    let kinds: Vec<_> = log.events.iter().map(|(at, event)| (*at, event.kind)).collect();
    assert_eq!(kinds, [(told, EventKind::Created)], "in the same write");
    let done = store.get(&id(1)).await?.expect("row");
    assert_eq!((done.state, done.last, done.cancelled), (State::Done, vec![7], true));
    assert!(!store.choose(&id(1), choice).await?, "not being placed any more");

    // A failure that frees the key lets it be used again; both rows stay.
    assert!(matches!(begin(store, row(4, "r4")).await?, Begun::New(_)));
    store.failed(&id(4), vec![4], true, 50).await?;
    assert!(matches!(begin(store, row(5, "r4")).await?, Begun::New(_)));
    store.failed(&id(5), vec![5], false, 60).await?;
    assert!(matches!(begin(store, row(6, "r4")).await?, Begun::Taken(_)));
    assert_eq!(store.get(&id(6)).await?, None);

    assert_eq!(store.forget(60).await?, [id(4)]);
    let left: Vec<_> = store.all().await?.into_iter().map(|row| row.id).collect();
    assert_eq!(left, [id(1), id(3), id(5)]);
    Ok(())
}

async fn memory_of_nodes(store: &dyn Store) -> Result<(), Error> {
    // Unknown before: the row is rebuilt, without a digest.
    store.put_states(vec![seen(11, 0)], vec![]).await?;
    let rebuilt = store.get(&id(11)).await?.expect("row");
    assert_eq!((rebuilt.state, rebuilt.digest.as_str(), rebuilt.last), (State::Done, "", vec![9]));
    store.put_states(vec![seen(11, 70)], vec![]).await?;
    assert_eq!(store.get(&id(11)).await?.expect("row").ended_ms, 70);
    // During a creation the controller's own state stays.
    begin(store, row(12, "r12")).await?;
    store.put_states(vec![seen(12, 0)], vec![]).await?;
    assert_eq!(store.get(&id(12)).await?, Some(row(12, "r12")));
    // Another creation holds the key: the rebuilt row does not take it.
    let clash = KnownState { request_id: "r12".parse().expect("request"), ..seen(13, 0) };
    store.put_states(vec![clash], vec![]).await?;
    assert!(store.get(&id(13)).await?.expect("row").released);
    Ok(())
}

async fn the_rest(store: &dyn Store) -> Result<(), Error> {
    store.put_node(&node("n2"), "b:1").await?;
    store.put_node(&node("n1"), "a:1").await?;
    store.put_node(&node("n2"), "c:1").await?;
    let expected = [(node("n1"), "a:1".to_owned()), (node("n2"), "c:1".to_owned())];
    assert_eq!(store.nodes().await?, expected);

    assert_eq!(store.claim().await?, 1);
    assert_eq!(store.raise(7).await?, 7);
    assert_eq!(store.raise(3).await?, 7, "it never falls");
    Ok(())
}

/// A node that is forgotten once more, as after a crash, and comes back must still cancel what it was creating. One
/// that never comes back must not keep its cancels in the store for ever.
async fn cancels_of_forgotten_nodes(store: &dyn Store) -> Result<(), Error> {
    begin(store, row(90, "r90")).await?;
    for (abandoned, attempt) in [("n8", 1), ("n9", 2)] {
        let abandoned = Some((node(abandoned), attempt));
        let choice = Choice { node: node("n7"), attempt: 3, decision: String::new(), abandoned };
        assert!(store.choose(&id(90), choice).await?);
    }
    store.forget_node(&node("n9")).await?;
    store.forget_node(&node("n9")).await?;
    store.failed(&id(90), vec![], true, 50).await?;
    store.forget(50).await?;
    assert_eq!(store.pending_cancels(&node("n9")).await?, [(id(90), 2)]);
    assert!(store.forget(51).await?.contains(&id(90)));
    assert_eq!(store.pending_cancels(&node("n9")).await?, []);
    assert_eq!(store.pending_cancels(&node("n8")).await?, [(id(90), 1)], "of a node that is known");
    Ok(())
}

async fn suite(store: &dyn Store) {
    log_of_events(store).await.expect("log of events");
    creations(store).await.expect("creations");
    memory_of_nodes(store).await.expect("memory of nodes");
    the_rest(store).await.expect("the rest");
    files_of_creations(store).await.expect("files");
    cancels_of_forgotten_nodes(store).await.expect("cancels of forgotten nodes");
}

#[tokio::test]
async fn memory_store_passes_the_suite() {
    suite(&Memory::new()).await;
}

#[tokio::test]
async fn sqlite_store_passes_the_suite_and_keeps_its_data() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let store = Sqlite::open(&path).expect("open");
    suite(&store).await;
    let before = store.all().await.expect("all");
    drop(store);
    let store = Sqlite::open(&path).expect("open again");
    assert_eq!(store.all().await.expect("all"), before);
    assert_eq!(store.claim().await.expect("claimed"), 8);
    // Even when all events are removed, no revision is assigned again.
    let last = store.before_last(Filter::default(), 0).await.expect("last");
    while store.prune_events(u64::MAX / 2, 100).await.expect("pruned") > 0 {}
    drop(store);
    let store = Sqlite::open(&path).expect("open once more");
    let next = store.put_states(vec![], vec![event(1, EventKind::NodeUp)]).await;
    assert!(last > 7 && next.expect("written") == last + 1);
}

/// A handle that was replaced can change nothing; one that never claimed can.
async fn claimed_twice(first: &dyn Store, second: &dyn Store) {
    let asked = |n| event(n, EventKind::CreateAsked);
    first.claim().await.expect("claimed");
    let begun = first.begin(row(1, "r1"), None, asked(1)).await.expect("begun");
    assert!(matches!(begun, Begun::New(_)));
    second.claim().await.expect("claimed");
    let before = second.all().await.expect("all");
    let choice =
        || Choice { node: node("n2"), attempt: 2, decision: String::new(), abandoned: None };
    let refused = [
        first.begin(row(2, "r2"), None, asked(2)).await.map(drop),
        first.choose(&id(1), choice()).await.map(drop),
        first.done(&id(1), vec![1], vec![asked(1)]).await.map(drop),
        first.failed(&id(1), vec![1], true, 9).await,
        first.cancel(&id(1)).await,
        first.put_states(vec![seen(3, 0)], vec![asked(3)]).await.map(drop),
        first.prune_events(u64::MAX / 2, 100).await.map(drop),
        first.drop_events(None, 100).await,
        first.forget(u64::MAX / 2).await.map(drop),
        first.cancel_delivered(&node("n1"), &id(1), 1).await,
        first.raise(1000).await.map(drop),
        first.put_team_limits(&row(1, "r1").team, proto::limits::TeamLimits::default()).await,
    ];
    assert_eq!(refused, [const { Err(Error::Replaced) }; 12]);
    assert_eq!(second.all().await.expect("all"), before);
    let token = super::suite_access::token("red", 1);
    first.add_token(token).await.expect("a token is no change of the controller's");
    assert!(second.choose(&id(1), choice()).await.expect("written"));
}

#[tokio::test]
async fn replaced_controller_writes_nothing() {
    let store = Memory::new();
    claimed_twice(&store, &store.beside()).await;
    let dir = tempfile::tempdir().expect("tempdir");
    let open = || Sqlite::open(&dir.path().join("c.db")).expect("open");
    claimed_twice(&open(), &open()).await;
}

#[tokio::test]
async fn file_of_the_first_schema_is_migrated() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let raw = rusqlite::Connection::open(&path).expect("open");
    raw.execute_batch(include_str!("migrations/0001_start.sql")).expect("made");
    raw.pragma_update(None, "user_version", 1).expect("set");
    drop(raw);
    let store = Sqlite::open(&path).expect("brought up to date");
    assert_eq!(store.before_last(Filter::default(), 0).await.expect("last"), 0);
    begin(&store, row(1, "r1")).await.expect("begun");
    assert_eq!(store.events(0, Filter::default(), 9).await.expect("page").events.len(), 1);
}

#[tokio::test]
async fn hours_of_the_newest_events_come_latest_first() {
    let dir = tempfile::tempdir().expect("tempdir");
    let sqlite = Sqlite::open(&dir.path().join("c.db")).expect("open");
    let memory = Memory::new();
    let stores: [&dyn Store; 2] = [&memory, &sqlite];
    for store in stores {
        let hours = async |newest| store.event_hours(newest).await.expect("read");
        assert_eq!(hours(9).await, [0_u64; 0]);
        let at = |hour: u64| Event { at_ms: hour * HOUR_MS + 1, ..event(1, EventKind::Paused) };
        store.put_states(vec![], [3, 7, 5, 7].map(at).to_vec()).await.expect("written");
        assert_eq!(hours(9).await, [7, 5, 3]);
        assert_eq!(hours(2).await, [7, 5], "of the last two");
    }
}

/// Counts the events of each share one by one.
fn recount(path: &std::path::Path) -> Vec<(String, u64)> {
    let raw = rusqlite::Connection::open(path).expect("open");
    let sql = "SELECT coalesce(team, '-'), count(*) FROM events GROUP BY team ORDER BY 1";
    let mut counts = raw.prepare(sql).expect("a query");
    let counts = counts.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
    counts.collect::<rusqlite::Result<_>>().expect("read")
}

#[tokio::test]
async fn numbers_of_events_are_those_of_a_recount_after_every_change() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    // Events from before the numbers were kept.
    let raw = rusqlite::Connection::open(&path).expect("open");
    for sql in &MIGRATIONS[..COUNTED_FROM - 1] {
        raw.execute_batch(sql).expect("made");
    }
    raw.pragma_update(None, "user_version", COUNTED_FROM - 1).expect("set");
    raw.execute_batch(
        "INSERT INTO events (at_ms, team, kind, actor, reason, detail, node_revision) VALUES \
         (1, 'red', 'CREATED', '', '', '', 0), (2, 'red', 'CREATED', '', '', '', 0), \
         (3, NULL, 'NODE_UP', '', '', '', 0)",
    )
    .expect("filled");
    drop(raw);
    let store = Sqlite::open(&path).expect("migrated");
    store.claim().await.expect("claimed");
    let check = async |expected: &[(&str, u64)]| {
        let expected: Vec<_> =
            expected.iter().map(|(share, count)| ((*share).to_owned(), *count)).collect();
        assert_eq!(recount(&path), expected);
        let mut counts: Vec<_> = store.event_counts().await.expect("counts");
        let has_of_nodes = counts.last().is_some_and(|(team, _)| team.is_none());
        counts.rotate_right(usize::from(has_of_nodes));
        let share = |team: Option<Team>| team.map_or("-".to_owned(), |team| team.to_string());
        let counts: Vec<_> = counts.into_iter().map(|(team, count)| (share(team), count)).collect();
        assert_eq!(counts, expected);
        for (team, count) in expected.iter().filter(|(share, _)| share != "-") {
            let team = team.parse().expect("team");
            assert_eq!(store.events_of_team(&team).await.expect("count"), *count);
        }
    };
    check(&[("-", 1), ("red", 2)]).await;
    let blue = Event { team: "blue".parse().ok(), ..event(4, EventKind::Paused) };
    let once = Event { once: Some("a".into()), ..event(5, EventKind::Stopped) };
    let events = vec![blue, once.clone(), once];
    store.put_states(vec![], events).await.expect("written");
    check(&[("-", 1), ("blue", 1), ("red", 3)]).await;
    store.drop_events("red".parse().ok(), 1).await.expect("dropped");
    check(&[("-", 1), ("blue", 1), ("red", 2)]).await;
    store.prune_events(300, 10).await.expect("pruned");
    check(&[("blue", 1), ("red", 1)]).await;
    store.prune_events(u64::MAX / 2, 10).await.expect("pruned");
    check(&[]).await;
}

#[tokio::test]
async fn concurrent_writers_share_commits_and_fail_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = std::sync::Arc::new(Sqlite::open(&dir.path().join("c.db")).expect("open"));
    let tasks = tokio_util::task::TaskTracker::new();
    let mut answers = Vec::new();
    for n in 0..100u8 {
        let store = store.clone();
        // Two rows of one id with different keys: the second breaks the primary key.
        let row = Row { id: id(n / 2), ..row(0, &format!("r{n}")) };
        answers.push(tasks.spawn(async move { begin(&*store, row).await.is_ok() }));
    }
    let mut good = 0;
    for answer in answers {
        good += usize::from(answer.await.expect("task"));
    }
    assert_eq!((good, store.all().await.expect("all").len()), (50, 50));
}

#[test]
fn file_of_a_later_schema_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let raw = rusqlite::Connection::open(&path).expect("open");
    raw.pragma_update(None, "user_version", 99).expect("set");
    drop(raw);
    let error = Sqlite::open(&path).expect_err("too new");
    assert!(error.to_string().contains("version 99"), "{error}");
}
