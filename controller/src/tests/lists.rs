//! Lists with filters, and watching many sandboxes.

use std::collections::BTreeMap;

use proto::{Reason, sandbox::v1::*, update};
use tokio_stream::StreamExt;

use super::*;

type Stream = tonic::Streaming<WatchSandboxesResponse>;

fn with(request_id: &str, key: &str) -> CreateSandboxRequest {
    CreateSandboxRequest {
        name: format!("{key}-{request_id}"),
        metadata: [("key".into(), key.into())].into(),
        ..request(request_id)
    }
}

fn of_key(key: &str) -> Option<SandboxFilter> {
    Some(SandboxFilter { metadata: [("key".into(), key.into())].into(), ..Default::default() })
}

impl Lab {
    /// Reads all pages of a list, of two sandboxes each.
    async fn pages(&self, asked: ListSandboxesRequest) -> Vec<String> {
        let (mut ids, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListSandboxesRequest { page_size: 2, page_token, ..asked.clone() };
            let page = self.api().list_sandboxes(request).await.expect("listed").into_inner();
            assert!(page.sandboxes.len() <= 2);
            ids.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.id));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return ids;
            }
        }
    }

    async fn watch_many(&self, filter: Option<SandboxFilter>) -> Stream {
        let request = WatchSandboxesRequest { filter };
        self.api().watch_sandboxes(request).await.expect("watched").into_inner()
    }
}

/// Reads messages until the first states are complete.
async fn first_states(stream: &mut Stream) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let message = stream.next().await.expect("more").expect("a message");
        if message.synced {
            assert_eq!(message.sandbox, None);
            return ids;
        }
        ids.push(message.sandbox.expect("a sandbox").id);
    }
}

#[tokio::test(start_paused = true)]
async fn pages_of_a_filtered_list_hold_each_sandbox_once_in_either_order() {
    let lab = Lab::new().await;
    let mut api = lab.api();
    let (mut wanted, mut all) = (Vec::new(), Vec::new());
    for n in 0..9 {
        let key = if n % 2 == 0 { "even" } else { "odd" };
        let id = create(&mut api, with(&format!("r{n}"), key)).await.expect("made").id;
        all.push(id.clone());
        wanted.extend((n % 2 == 0).then_some(id));
    }
    // Made in one moment of the paused clock, they are ordered by the rest of their ids.
    all.sort();
    wanted.sort();
    assert_eq!(lab.pages(ListSandboxesRequest::default()).await, all);
    let even = ListSandboxesRequest { filter: of_key("even"), ..Default::default() };
    assert_eq!(lab.pages(even.clone()).await, wanted);
    let newest = SandboxOrder::NewestFirst.into();
    let backwards = ListSandboxesRequest { order: newest, ..even };
    wanted.reverse();
    assert_eq!(lab.pages(backwards).await, wanted);
    let named = SandboxFilter { name_prefix: "odd-".into(), ..Default::default() };
    let named = ListSandboxesRequest { filter: Some(named), ..Default::default() };
    assert_eq!(lab.pages(named).await.len(), 4);
    api.delete_sandbox(DeleteSandboxRequest { id: all[0].clone() }).await.expect("deleted");
    let deleted = SandboxFilter { phases: vec![Phase::Deleted.into()], ..Default::default() };
    let deleted = ListSandboxesRequest { filter: Some(deleted), ..Default::default() };
    assert_eq!(lab.pages(deleted).await, all[..1]);
    let wrong = ListSandboxesRequest { order: 9, ..Default::default() };
    assert_eq!(reason(api.list_sandboxes(wrong).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn usage_of_more_sandboxes_than_a_page_comes_in_pages() {
    let lab = Lab::new().await;
    for n in 0..5 {
        lab.create(&format!("r{n}")).await.expect("made");
    }
    let (mut found, mut page_token) = (Vec::new(), String::new());
    for page in 0.. {
        let request = GetUsageRequest { page_size: 2, page_token, ..Default::default() };
        let answer = lab.api().get_usage(request).await.expect("measured").into_inner();
        found.extend(answer.usages.into_iter().map(|usage| usage.id));
        page_token = answer.next_page_token;
        assert!(page < 3, "an end comes");
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, lab.pages(ListSandboxesRequest::default()).await);
    let both = GetUsageRequest { ids: vec!["a".into()], page_size: 1, ..Default::default() };
    assert_eq!(reason(lab.api().get_usage(both).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn watch_of_many_tells_first_states_then_changes_of_what_fulfils_the_filter() {
    let lab = Lab::new().await;
    let mut api = lab.api();
    let one = create(&mut api, with("r1", "a")).await.expect("made").id;
    let two = create(&mut api, with("r2", "b")).await.expect("made").id;
    let mut stream = lab.watch_many(of_key("a")).await;
    assert_eq!(first_states(&mut stream).await, std::slice::from_ref(&one));
    let mut next = async || stream.next().await.expect("more").expect("a message");
    // One that comes to fulfil it, and one that stops to.
    let set = |id: &str, key: &str| {
        let metadata = [("key".to_owned(), key.to_owned())].into();
        update::request(
            Sandbox { id: id.into(), metadata, ..Default::default() },
            &["metadata.key"],
        )
    };
    api.update_sandbox(set(&two, "a")).await.expect("set");
    let message = next().await;
    assert_eq!((message.sandbox.expect("a sandbox").id, message.gone), (two.clone(), false));
    api.update_sandbox(set(&one, "b")).await.expect("set");
    let message = next().await;
    assert_eq!((message.sandbox.expect("a sandbox").id, message.gone), (one.clone(), true));
    api.update_sandbox(set(&one, "c")).await.expect("set");
    api.delete_sandbox(DeleteSandboxRequest { id: two.clone() }).await.expect("deleted");
    loop {
        let message = next().await;
        let sandbox = message.sandbox.expect("a sandbox");
        assert_eq!(sandbox.id, two, "the other one does not count");
        if message.gone {
            assert_eq!(sandbox.phase(), Phase::Deleted);
            break;
        }
    }
    let silent = next().await;
    assert_eq!(silent, WatchSandboxesResponse::default(), "a heartbeat");
}

#[tokio::test(start_paused = true)]
async fn slow_watcher_of_many_gets_the_last_state_of_each() {
    let lab = Lab::new().await;
    let mut stream = lab.watch_many(None).await;
    assert_eq!(first_states(&mut stream).await, [""; 0]);
    let made = lab.create("r1").await.expect("made");
    let cache = &lab.domain().nodes().cache;
    // More changes than are kept for a reader.
    for n in 0..5000 {
        let metadata = [("n".to_owned(), n.to_string())].into();
        let changed = Sandbox { metadata, revision: (1 << 40) + n, ..made.clone() };
        lab.domain().nodes().apply(&made.node.parse().expect("a node"), changed);
    }
    let entry = cache.get(&made.id.parse().expect("an id")).expect("known");
    let last = cache.view(&entry);
    let mut seen = BTreeMap::new();
    while seen.get(&made.id) != Some(&last.metadata) {
        let message = stream.next().await.expect("more").expect("a message");
        let sandbox = message.sandbox.expect("no heartbeat before the last state");
        seen.insert(sandbox.id, sandbox.metadata);
    }
}

#[tokio::test(start_paused = true)]
async fn another_teams_sandboxes_are_neither_listed_nor_watched() {
    let lab = Lab::new().await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut stream = lab.watch_many(None).await;
    first_states(&mut stream).await;
    create(&mut lab.api_as(&blue), request("r1")).await.expect("made");
    let message = stream.next().await.expect("more").expect("a message");
    assert_eq!(message, WatchSandboxesResponse::default(), "a heartbeat, and nothing before");
    assert_eq!(lab.pages(ListSandboxesRequest::default()).await, [""; 0]);
}
