//! One suite for both stores.

use proto::name::NodeName;

use super::{
    Store,
    enrolments::{Admission, Enrolment, Enrolments as _, Issued, NodeToken},
    memory::Memory,
    sqlite::Sqlite,
};

fn name(text: &str) -> NodeName {
    text.parse().expect("a name")
}

fn token(id: &str, node: &str, created_ms: u64) -> NodeToken {
    NodeToken {
        id: id.into(),
        hash: vec![1, 2],
        node: name(node),
        created_ms,
        expires_ms: created_ms + 900,
        used_ms: 0,
        key: vec![],
    }
}

fn admission(token: &str, node: &str, key: u8, now_ms: u64) -> Admission {
    Admission {
        token: token.into(),
        key: vec![key],
        node: name(node),
        address: format!("{node}:7445"),
        pool: "10.100.1.0/24".into(),
        issued: Issued {
            serial: format!("{token}{key}{now_ms}"),
            not_after_ms: now_ms + 5000,
            in_use: None,
        },
        now_ms,
    }
}

async fn one(store: &dyn Store, node: &str) -> Enrolment {
    let all = store.enrolments().await.expect("read");
    all.into_iter().find(|known| known.node == name(node)).expect("it is there")
}

async fn tokens_are_used_once(store: &dyn Store) {
    store.add_node_token(token("t1", "n1", 1000)).await.expect("added");
    assert_eq!(store.node_token("t1").await.expect("read"), Some(token("t1", "n1", 1000)));
    assert_eq!(store.node_token("t0").await.expect("read"), None);
    let admit = async |admission| store.admit(admission).await.expect("answered");
    assert!(!admit(admission("t0", "n1", 1, 1100)).await, "unknown");
    assert!(!admit(admission("t1", "n2", 1, 1100)).await, "of another node");
    assert!(!admit(admission("t1", "n1", 1, 1900)).await, "expired");
    assert!(store.enrolments().await.expect("read").is_empty(), "nothing was written");
    assert!(admit(admission("t1", "n1", 1, 1100)).await);
    assert!(!admit(admission("t1", "n1", 2, 1200)).await, "used for other key");
    assert!(admit(admission("t1", "n1", 1, 1300)).await, "the answer was lost");
    let known = one(store, "n1").await;
    assert_eq!((known.joined_ms, known.serials.len()), (1300, 2));
    assert_eq!(store.nodes().await.expect("read"), [(name("n1"), "n1:7445".to_owned())]);
}

async fn new_token_voids_the_unused_ones_of_its_node(store: &dyn Store) {
    store.add_node_token(token("a", "n3", 2000)).await.expect("added");
    store.add_node_token(token("b", "n4", 2000)).await.expect("added");
    store.add_node_token(token("c", "n3", 2001)).await.expect("added");
    let there = async |id| store.node_token(id).await.expect("read").is_some();
    assert!(!there("a").await && there("b").await && there("c").await);
    assert!(!there("t1").await, "it ended before");
}

async fn revoked_node_keeps_no_certificate(store: &dyn Store) {
    let issued =
        |serial: &str, at| Issued { serial: serial.into(), not_after_ms: at, in_use: None };
    let add =
        async |issued| store.add_certificate(&name("n1"), issued, 3000).await.expect("answered");
    assert!(add(issued("s1", 9000)).await);
    store.revoke_node(&name("n1"), 3100).await.expect("revoked");
    assert!(!add(issued("s2", 9000)).await);
    let known = one(store, "n1").await;
    assert_eq!((known.revoked_ms, known.only_listed, known.serials.len()), (3100, true, 0));
    // One that never joined can be revoked, too.
    store.revoke_node(&name("n9"), 3100).await.expect("revoked");
    assert!(one(store, "n9").await.only_listed);
    // Again with a new token: only what it gets from now on counts.
    store.add_node_token(token("d", "n1", 3200)).await.expect("added");
    assert!(store.admit(admission("d", "n1", 4, 3300)).await.expect("answered"));
    let known = one(store, "n1").await;
    assert_eq!((known.revoked_ms, known.only_listed), (0, true));
    assert_eq!(known.serials, ["d43300"]);
    // What has ended is removed with the next one, unless the node uses it.
    let next = Issued { in_use: Some("d43300".into()), ..issued("s2", 99_000) };
    assert!(store.add_certificate(&name("n1"), next, 9000).await.expect("added"));
    assert_eq!(one(store, "n1").await.serials, ["d43300", "s2"]);
    assert!(store.add_certificate(&name("n1"), issued("s3", 99_000), 9000).await.expect("added"));
    assert_eq!(one(store, "n1").await.serials, ["s2", "s3"]);
}

async fn forgotten_node_leaves_its_addresses(store: &dyn Store) {
    store.forget_node(&name("n1")).await.expect("forgotten");
    let known = one(store, "n1").await;
    assert_eq!((known.address.as_str(), known.pool.as_str()), ("", ""));
    assert!(known.only_listed, "what was revoked stays revoked");
}

async fn suite(store: &dyn Store) {
    tokens_are_used_once(store).await;
    new_token_voids_the_unused_ones_of_its_node(store).await;
    revoked_node_keeps_no_certificate(store).await;
    forgotten_node_leaves_its_addresses(store).await;
}

#[tokio::test]
async fn enrolments_in_memory() {
    suite(&Memory::new()).await;
}

#[tokio::test]
async fn enrolments_in_sqlite() {
    let dir = tempfile::tempdir().expect("tempdir");
    suite(&Sqlite::open(&dir.path().join("c.db")).expect("opened")).await;
}

#[tokio::test]
async fn of_two_uses_of_a_token_at_once_one_wins() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Sqlite::open(&dir.path().join("c.db")).expect("opened");
    store.add_node_token(token("t1", "n1", 1000)).await.expect("added");
    let admit = |key| store.admit(admission("t1", "n1", key, 1100));
    let (first, second) = tokio::join!(admit(1), admit(2));
    let (first, second) = (first.expect("answered"), second.expect("answered"));
    assert!(first != second, "{first} {second}");
}
