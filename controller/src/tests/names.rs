//! Names of sandboxes, and changes of sandboxes by field.

use std::collections::BTreeSet;

use proto::{Reason, sandbox::v1::*, update};

use super::*;

fn named(request_id: &str, name: &str) -> CreateSandboxRequest {
    CreateSandboxRequest { name: name.into(), ..request(request_id) }
}

impl Lab {
    async fn get_or_create(&self, create: CreateSandboxRequest) -> Result<Sandbox, Status> {
        let request = GetOrCreateSandboxRequest { create: Some(create) };
        let answer = self.api().get_or_create_sandbox(request).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }

    async fn rename(&self, id: &str, name: &str) -> Result<Sandbox, Status> {
        let change = Sandbox { id: id.into(), name: name.into(), ..Sandbox::default() };
        let answer = self.api().update_sandbox(update::request(change, &["name"])).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }
}

#[tokio::test(start_paused = true)]
async fn name_is_accepted_wherever_an_id_is() {
    let mut lab = Lab::new().await;
    let made = create(&mut lab.api(), named("r1", "box-1")).await.expect("made");
    assert_eq!(made.name, "box-1");
    lab.start().await;
    assert_eq!(lab.get("box-1").await.expect("after a restart").id, made.id);
    let id = || "box-1".to_owned();
    let mut api = lab.api();
    api.stop_sandbox(StopSandboxRequest { id: id(), grace: None }).await.expect("stopped");
    api.start_sandbox(StartSandboxRequest { id: id() }).await.expect("started");
    let events = WatchEventsRequest { id: id(), ..WatchEventsRequest::default() };
    api.watch_events(events).await.expect("its events");
    api.watch_sandbox(WatchSandboxRequest { id: id() }).await.expect("watched");
    let known = CompareSandboxesRequest { known_ids: vec![id()] };
    let difference = api.compare_sandboxes(known).await.expect("compared").into_inner();
    assert!(difference.missing.is_empty() && difference.unlisted.is_empty(), "{difference:?}");
    api.delete_sandbox(DeleteSandboxRequest { id: id() }).await.expect("deleted");
    assert_eq!(reason(lab.get("box-1").await), Reason::SandboxNotFound, "the name is free");
    let next = create(&mut lab.api(), named("r2", "box-1")).await.expect("made");
    assert_ne!(next.id, made.id);
}

#[tokio::test(start_paused = true)]
async fn name_of_a_living_sandbox_is_taken_in_its_team_only() {
    let lab = Lab::new().await;
    let mut api = lab.api();
    let first = create(&mut api, named("r1", "box")).await.expect("made");
    assert_eq!(create(&mut api, named("r1", "box")).await.expect("repeated").id, first.id);
    assert_eq!(reason(create(&mut api, named("r2", "box")).await), Reason::NameTaken);
    let blue = token(&lab.store, "blue", "sandbox").await;
    let other = create(&mut lab.api_as(&blue), named("r1", "box")).await.expect("another team's");
    assert_eq!(lab.get("box").await.expect("ours").id, first.id);
    let theirs = GetSandboxRequest { id: "box".into() };
    let theirs = lab.api_as(&blue).get_sandbox(theirs).await.expect("theirs").into_inner();
    assert_eq!(theirs.sandbox.expect("a sandbox").id, other.id);
    for bad in ["100001", "a--b", "-a", "a-", "A", "pvelxc-x", "cmux-1", "port-80", &"a".repeat(31)]
    {
        assert_eq!(reason(create(&mut api, named("r3", bad)).await), Reason::FieldInvalid, "{bad}");
    }
    assert_eq!(reason(lab.get("nobody").await), Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn one_of_many_concurrent_creations_gets_the_name() {
    let lab = Lab::new().await;
    let creations = (0..20).map(|n| {
        let mut api = lab.api();
        async move { create(&mut api, named(&format!("r{n}"), "box")).await }
    });
    let (made, refused): (Vec<_>, Vec<_>) =
        futures_util::future::join_all(creations).await.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (1, 19));
    for refused in refused {
        assert_eq!(reason(refused), Reason::NameTaken);
    }
    assert_eq!(lab.living().len(), 1, "nothing is left behind");
}

#[tokio::test(start_paused = true)]
async fn get_or_create_gives_all_callers_one_sandbox() {
    let lab = Lab::new().await;
    let calls = (0..20).map(|n| lab.get_or_create(named(&format!("r{n}"), "box")));
    let answers = futures_util::future::join_all(calls).await;
    let ids: BTreeSet<_> = answers.into_iter().map(|answer| answer.expect("one").id).collect();
    assert_eq!((ids.len(), lab.living().len()), (1, 1));
    let mut other = named("other", "box");
    other.metadata.insert("a".into(), "b".into());
    other.env.insert("A".into(), "b".into());
    let status = lab.get_or_create(other).await.expect_err("another body");
    assert!(status.message().contains("another metadata, env"), "{status:?}");
    assert_eq!(daemon::status::reason(&status), Some(Reason::NameTaken));
    assert_eq!(reason(lab.get_or_create(request("r")).await), Reason::FieldInvalid, "no name");
}

#[tokio::test(start_paused = true)]
async fn sandbox_is_renamed_unless_another_has_the_name() {
    let lab = Lab::new().await;
    let (one, two) = (lab.create("r1").await.expect("made"), lab.create("r2").await.expect("made"));
    assert_eq!(lab.rename(&one.id, "a").await.expect("named").name, "a");
    assert_eq!(reason(lab.rename(&two.id, "a").await), Reason::NameTaken);
    lab.rename("a", "a").await.expect("its own name");
    lab.rename("a", "b").await.expect("renamed by its name");
    assert_eq!(lab.rename(&two.id, "a").await.expect("free").name, "a");
    assert_eq!(lab.rename("b", "").await.expect("removed").name, "");
    assert_eq!(reason(lab.get("b").await), Reason::SandboxNotFound);
    let both = [&one, &two].map(|sandbox| lab.rename(&sandbox.id, "c"));
    let both = futures_util::future::join_all(both).await;
    assert_eq!(both.iter().filter(|answer| answer.is_ok()).count(), 1, "{both:?}");
}

#[tokio::test(start_paused = true)]
async fn wrong_update_reaches_no_node() {
    let lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let mut api = lab.api();
    for (id, fields) in [(&made.id[..], &[][..]), (&made.id, &["phase"]), ("", &["name"])] {
        let change = Sandbox { id: id.into(), ..Sandbox::default() };
        let answer = api.update_sandbox(update::request(change, fields)).await;
        assert_eq!(reason(answer), Reason::FieldInvalid, "{fields:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_sandboxes_with_one_name_are_a_finding_and_answer_by_id() {
    let lab = Lab::new().await;
    let (one, two) = (lab.create("r1").await.expect("made"), lab.create("r2").await.expect("made"));
    let report = |sandbox: &Sandbox, name: &str, revision| {
        let told = Sandbox { name: name.into(), revision, ..sandbox.clone() };
        lab.domain().nodes().apply(&sandbox.node.parse().expect("a node"), told);
    };
    // As nodes report them after the store was lost.
    report(&one, "box", 1 << 40);
    report(&two, "box", 1 << 40);
    assert_eq!(reason(lab.get("box").await), Reason::NameTaken);
    assert_eq!(lab.get(&one.id).await.expect("by id").id, one.id);
    let checked = lab.operator().fsck(FsckRequest {}).await.expect("checked").into_inner();
    let findings = checked.findings.iter().filter(|finding| finding.invariant() == Invariant::Name);
    assert_eq!(findings.count(), 1, "{checked:?}");
    report(&one, "other", (1 << 40) + 1);
    assert_eq!(lab.get("box").await.expect("one is left").id, two.id);
}
