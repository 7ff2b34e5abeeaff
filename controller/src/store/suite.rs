//! One suite over both stores.

use super::{memory::Memory, sqlite::Sqlite, *};

fn id(n: u8) -> SandboxId {
    SandboxId::new(1000 + u64::from(n), &[n; 10])
}

fn row(n: u8, request: &str) -> Row {
    Row {
        id: id(n),
        team: "red".parse().expect("team"),
        request_id: request.parse().expect("request"),
        digest: format!("d{n}"),
        request: vec![1, 2, 3],
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

fn seen(n: u8, ended_ms: u64) -> Seen {
    let row = row(n, &format!("r{n}"));
    Seen {
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

async fn creations(store: &dyn Store) -> Result<(), Error> {
    assert_eq!(store.begin(row(1, "r1")).await?, Begun::New);
    let Begun::Taken(taken) = store.begin(row(2, "r1")).await? else { panic!("taken") };
    assert_eq!(*taken, row(1, "r1"));
    // Another team's key is another key.
    let other = Row { team: "blue".parse().expect("team"), ..row(3, "r1") };
    assert_eq!(store.begin(other.clone()).await?, Begun::New);
    assert_eq!(store.by_request(&other.team, &other.request_id).await?, Some(other));

    let choice = Choice {
        node: node("n2"),
        attempt: 2,
        decision: "{2}".into(),
        leave: Some((node("n1"), 1)),
    };
    assert!(store.choose(&id(1), choice.clone()).await?);
    let chosen = store.get(&id(1)).await?.expect("row");
    assert_eq!((chosen.node, chosen.attempt, chosen.decision), (Some(node("n2")), 2, "{2}".into()));
    assert_eq!(store.owed(&node("n1")).await?, [(id(1), 1)]);
    store.paid(&node("n1"), &id(1), 1).await?;
    assert_eq!(store.owed(&node("n1")).await?, []);

    store.cancel(&id(1)).await?;
    store.done(&id(1), vec![7]).await?;
    let done = store.get(&id(1)).await?.expect("row");
    assert_eq!((done.state, done.last, done.cancelled), (State::Done, vec![7], true));
    assert!(!store.choose(&id(1), choice).await?, "not being placed any more");

    // A failure that frees the key lets it be used again; both rows stay.
    assert_eq!(store.begin(row(4, "r4")).await?, Begun::New);
    store.failed(&id(4), vec![4], true, 50).await?;
    assert_eq!(store.begin(row(5, "r4")).await?, Begun::New);
    store.failed(&id(5), vec![5], false, 60).await?;
    assert!(matches!(store.begin(row(6, "r4")).await?, Begun::Taken(_)));
    assert_eq!(store.get(&id(6)).await?, None);

    assert_eq!(store.forget(60).await?, [id(4)]);
    let left: Vec<_> = store.all().await?.into_iter().map(|row| row.id).collect();
    assert_eq!(left, [id(1), id(3), id(5)]);
    Ok(())
}

async fn memory_of_nodes(store: &dyn Store) -> Result<(), Error> {
    // Unknown before: the row is rebuilt, without a digest.
    store.remember(vec![seen(11, 0)]).await?;
    let rebuilt = store.get(&id(11)).await?.expect("row");
    assert_eq!((rebuilt.state, rebuilt.digest.as_str(), rebuilt.last), (State::Done, "", vec![9]));
    store.remember(vec![seen(11, 70)]).await?;
    assert_eq!(store.get(&id(11)).await?.expect("row").ended_ms, 70);
    // In the middle of a creation the controller's own word stands.
    store.begin(row(12, "r12")).await?;
    store.remember(vec![seen(12, 0)]).await?;
    assert_eq!(store.get(&id(12)).await?, Some(row(12, "r12")));
    // The key is held by another: the rebuilt row does not take it away.
    let clash = Seen { request_id: "r12".parse().expect("request"), ..seen(13, 0) };
    store.remember(vec![clash]).await?;
    assert!(store.get(&id(13)).await?.expect("row").released);
    Ok(())
}

async fn the_rest(store: &dyn Store) -> Result<(), Error> {
    let token = Token {
        id: "a".into(),
        hash: vec![1; 32],
        team: "red".parse().expect("team"),
        scopes: "sandbox".into(),
        created_ms: 1,
        revoked_ms: 0,
    };
    store.add_token(token.clone()).await?;
    assert_eq!(store.token("a").await?, Some(token));
    assert_eq!(store.token("b").await?, None);
    assert!(store.revoke_token("a", 9).await? && !store.revoke_token("b", 9).await?);
    assert!(store.revoke_token("a", 10).await?, "twice is once");
    assert_eq!(store.tokens().await?[0].revoked_ms, 9);

    store.put_node(&node("n2"), "b:1").await?;
    store.put_node(&node("n1"), "a:1").await?;
    store.put_node(&node("n2"), "c:1").await?;
    let expected = [(node("n1"), "a:1".to_owned()), (node("n2"), "c:1".to_owned())];
    assert_eq!(store.nodes().await?, expected);

    assert_eq!(store.epoch(0).await?, 0);
    assert_eq!(store.epoch(7).await?, 7);
    assert_eq!(store.epoch(3).await?, 7, "it never falls");
    Ok(())
}

async fn suite(store: &dyn Store) {
    creations(store).await.expect("creations");
    memory_of_nodes(store).await.expect("memory of nodes");
    the_rest(store).await.expect("the rest");
}

#[tokio::test]
async fn memory_passes() {
    suite(&Memory::new()).await;
}

#[tokio::test]
async fn sqlite_passes_and_keeps_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let store = Sqlite::open(&path).expect("open");
    suite(&store).await;
    let before = store.all().await.expect("all");
    drop(store);
    let store = Sqlite::open(&path).expect("open again");
    assert_eq!(store.all().await.expect("all"), before);
    assert_eq!(store.epoch(0).await.expect("epoch"), 7);
}

#[tokio::test]
async fn many_writers_share_commits_and_a_bad_one_fails_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = std::sync::Arc::new(Sqlite::open(&dir.path().join("c.db")).expect("open"));
    let tasks = tokio_util::task::TaskTracker::new();
    let mut answers = Vec::new();
    for n in 0..100u8 {
        let store = store.clone();
        // Two rows of one id with different keys: the second breaks the primary key.
        let row = Row { id: id(n / 2), ..row(0, &format!("r{n}")) };
        answers.push(tasks.spawn(async move { store.begin(row).await.is_ok() }));
    }
    let mut good = 0;
    for answer in answers {
        good += usize::from(answer.await.expect("task"));
    }
    assert_eq!((good, store.all().await.expect("all").len()), (50, 50));
}

#[test]
fn a_later_schema_is_left_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let raw = rusqlite::Connection::open(&path).expect("open");
    raw.pragma_update(None, "user_version", 99).expect("set");
    drop(raw);
    let error = Sqlite::open(&path).expect_err("too new");
    assert!(error.to_string().contains("version 99"), "{error}");
}
