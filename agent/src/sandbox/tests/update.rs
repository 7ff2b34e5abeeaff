//! Changes of a sandbox's name, metadata and rules.

use proto::{
    lifetime::{Action, LifetimePatch},
    update::{Update, WakeOnPatch},
};

use super::*;

fn renamed(name: &str) -> Update {
    Update { name: Some(Some(name.parse().expect("valid"))), ..Update::default() }
}

#[tokio::test(start_paused = true)]
async fn update_changes_what_it_names_and_nothing_else() {
    let node = Node::new().await;
    let before = node.running(1).await;
    let update = Update {
        pairs: [("a".to_owned(), Some("1".to_owned()))].into(),
        wake_on: WakeOnPatch { http: Some(false), ..WakeOnPatch::default() },
        lifetime: LifetimePatch { ttl_action: Some(Action::Stop), ..LifetimePatch::default() },
        ..renamed("box-1")
    };
    let after = node.sandboxes.update(&id(1), update).await.expect("changed");
    let mut wanted = Record { revision: after.revision, ..Record::clone(&before) };
    wanted.name = "box-1".parse().ok();
    wanted.metadata.insert("a".into(), "1".into());
    wanted.wake_on.http = false;
    wanted.lifetime.ttl_action = Action::Stop;
    assert_eq!(*after, wanted);
    let removed = Update { name: Some(None), ..Update::default() };
    assert_eq!(node.sandboxes.update(&id(1), removed).await.expect("changed").name, None);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn update_of_another_revision_is_refused() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let based_on = |revision| Update { revision: Some(revision), ..renamed("x") };
    let changed = node.sandboxes.update(&id(1), based_on(record.revision)).await.expect("changed");
    let error = node.sandboxes.update(&id(1), based_on(record.revision)).await.expect_err("old");
    assert_eq!(error.reason, proto::Reason::RevisionConflict);
    assert_eq!(node.record(1).await.revision, changed.revision, "nothing was written");
    node.sandboxes.update(&id(1), based_on(changed.revision)).await.expect("changed again");
}

#[tokio::test(start_paused = true)]
async fn update_that_would_leave_too_much_metadata_changes_nothing() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let full = (0..32).map(|n| (format!("k{n}"), String::new())).collect();
    let full = Update { metadata: Some(full), ..Update::default() };
    node.sandboxes.update(&id(1), full).await.expect("32 pairs");
    let one_more =
        Update { pairs: [("more".to_owned(), Some(String::new()))].into(), ..renamed("x") };
    let error = node.sandboxes.update(&id(1), one_more).await.expect_err("33 pairs");
    assert_eq!(error.reason, proto::Reason::FieldInvalid);
    assert_eq!(node.record(1).await.name, record.name);
}

#[tokio::test(start_paused = true)]
async fn concurrent_updates_of_different_fields_are_all_kept() {
    let node = Node::new().await;
    node.running(1).await;
    let updates = (0..20).map(|n| {
        let pairs = [(format!("k{n}"), Some(n.to_string()))].into();
        let (sandboxes, id) = (node.sandboxes.clone(), id(1));
        async move { sandboxes.update(&id, Update { pairs, ..Update::default() }).await }
    });
    for updated in futures_util::future::join_all(updates).await {
        updated.expect("changed");
    }
    let metadata = &node.record(1).await.metadata;
    assert!((0..20).all(|n| metadata.get(&format!("k{n}")) == Some(&n.to_string())));
}
