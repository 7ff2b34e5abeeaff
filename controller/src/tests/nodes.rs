//! Nodes that come and go.

use proto::{Reason, sandbox::v1::*};

use super::*;
use crate::node::calls::Call;

#[tokio::test(start_paused = true)]
async fn sandboxes_of_a_down_node_are_unreachable_and_not_gone() {
    let mut lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let holder = lab.holder(&sandbox.id).clone();
    holder.down();
    lab.until(&sandbox.id, Phase::Unreachable).await;
    let delete = DeleteSandboxRequest { id: sandbox.id.clone() };
    assert_eq!(reason(lab.api().delete_sandbox(delete.clone()).await), Reason::NodeUnreachable);
    let stop = StopSandboxRequest { id: sandbox.id.clone(), grace: None };
    assert_eq!(reason(lab.api().stop_sandbox(stop).await), Reason::NodeUnreachable);

    // A controller that starts while the node is down knows the sandbox, by its vmid too.
    tokio::time::sleep(Duration::from_secs(2)).await;
    lab.start().await;
    let view = lab.get(&sandbox.vmid.to_string()).await.expect("known");
    assert_eq!((view.id.as_str(), view.phase()), (sandbox.id.as_str(), Phase::Unreachable));
    let nodes = lab.operator().list_nodes(ListNodesRequest {}).await.expect("nodes").into_inner();
    let ready: Vec<_> = nodes.nodes.iter().map(|node| node.ready).collect();
    assert_eq!(ready.iter().filter(|ready| **ready).count(), 2);
    let fsck = lab.operator().fsck(FsckRequest {}).await.expect("fsck").into_inner();
    assert_eq!((fsck.nodes, fsck.findings[0].invariant()), (2, Invariant::Unchecked));

    holder.up();
    lab.until(&sandbox.id, Phase::Running).await;
    lab.api().delete_sandbox(delete).await.expect("deleted");
    let fsck = lab.operator().fsck(FsckRequest {}).await.expect("fsck").into_inner();
    assert_eq!((fsck.nodes, fsck.findings.len()), (3, 0), "{:?}", fsck.findings);
}

#[tokio::test(start_paused = true)]
async fn compare_and_prune_stay_within_the_team() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let other = lab.create("r2").await.expect("made");
    let compare = |ids: &[&str]| CompareSandboxesRequest {
        known_ids: ids.iter().map(ToString::to_string).collect(),
    };
    let ids = [sandbox.vmid.to_string(), "100999".into(), "no id".into()];
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let found = lab.api().compare_sandboxes(compare(&ids)).await.expect("compared").into_inner();
    assert_eq!(found.unlisted.iter().map(|one| &one.id).collect::<Vec<_>>(), [&other.id]);
    assert_eq!((found.missing, found.complete), (vec!["100999".into(), "no id".into()], true));
    let stranger = token(&lab.store, "others", "sandbox").await;
    let mut api = lab.api_as(&stranger);
    let found = api.compare_sandboxes(compare(&[&sandbox.id])).await.expect("theirs").into_inner();
    assert!(found.unlisted.is_empty() && found.missing == [sandbox.id.clone()], "{found:?}");

    let prune = |hours: i64, dry_run| PruneSandboxesRequest {
        older_than: Some(prost_types::Duration { seconds: hours * 3600, nanos: 0 }),
        paused: false,
        dry_run,
    };
    assert_eq!(reason(lab.api().prune_sandboxes(prune(0, true)).await), Reason::FieldInvalid);
    let mut stopped = lab.holder(&sandbox.id).living()[0].clone();
    let holder = lab.holder(&stopped.id).clone();
    stopped.set_phase(Phase::Stopped);
    stopped.since = Some(prost_types::Timestamp { seconds: 1_600_000_000, nanos: 0 });
    let id = stopped.id.clone();
    holder.put(stopped);
    lab.until(&id, Phase::Stopped).await;
    let told = lab.api().prune_sandboxes(prune(1, true)).await.expect("told").into_inner();
    assert_eq!(told.sandboxes.len(), 1);
    assert_eq!(lab.get(&id).await.expect("there").phase(), Phase::Stopped);
    let theirs = api.prune_sandboxes(prune(1, false)).await.expect("theirs").into_inner();
    assert!(theirs.sandboxes.is_empty(), "another team's are not touched");
    let done = lab.api().prune_sandboxes(prune(1, false)).await.expect("done").into_inner();
    assert!(done.sandboxes[0].deleted, "{done:?}");
    assert_eq!(lab.get(&id).await.expect("a tombstone").phase(), Phase::Deleted);
    let again = lab.api().prune_sandboxes(prune(1, false)).await.expect("done").into_inner();
    assert!(again.sandboxes.is_empty(), "what runs is not old");
}

#[tokio::test(start_paused = true)]
async fn watch_resumes_after_a_cut() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let holder = lab.holder(&sandbox.id).clone();
    holder.down();
    // Meanwhile it is stopped there.
    let mut stopped = holder.living()[0].clone();
    stopped.set_phase(Phase::Stopped);
    holder.put(stopped);
    holder.up();
    lab.until(&sandbox.id, Phase::Stopped).await;
}

#[tokio::test(start_paused = true)]
async fn lost_journal_is_noticed_and_deletes_nothing() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let holder = lab.holder(&sandbox.id).clone();
    holder.lose_journal();
    lab.net.cut(holder.name());
    lab.until(&sandbox.id, Phase::Unreachable).await;
    let fsck = lab.operator().fsck(FsckRequest {}).await.expect("fsck").into_inner();
    assert_eq!(fsck.findings[0].invariant(), Invariant::I2);
    // The owner can still delete it.
    let delete = DeleteSandboxRequest { id: sandbox.id.clone() };
    lab.api().delete_sandbox(delete).await.expect("deleted");
    assert_eq!(lab.get(&sandbox.id).await.expect("a tombstone").phase(), Phase::Deleted);
}

#[tokio::test(start_paused = true)]
async fn lost_store_is_rebuilt_from_the_nodes() {
    let mut lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let epoch = lab.agents[0].epoch();
    lab.store = Arc::new(Memory::new());
    lab.red = token(&lab.store, "red", "sandbox").await;
    lab.start().await;
    assert_eq!(lab.get(&sandbox.id).await.expect("known").phase(), Phase::Running);
    assert_eq!(lab.create("r1").await.expect("the same").id, sandbox.id);
    // Its epoch started at 1 again and was raised above what the agents had seen.
    assert!(lab.agents.iter().all(|agent| agent.epoch() > epoch));
}

#[tokio::test(start_paused = true)]
async fn lost_store_creates_nothing_before_every_node_has_reported() {
    let mut lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let holder = lab.holder(&sandbox.id).clone();
    holder.down();
    lab.store = Arc::new(Memory::new());
    lab.red = token(&lab.store, "red", "sandbox").await;
    lab.start().await;
    assert_eq!(reason(lab.create("r1").await), Reason::NodeUnreachable, "it is on that node");
    holder.up();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(lab.create("r1").await.expect("the same").id, sandbox.id);
    lab.create("r2").await.expect("and others are made");
    // A node that is down delays nobody when nothing was lost.
    holder.down();
    lab.start().await;
    lab.create("r3").await.expect("made elsewhere");
}

#[tokio::test(start_paused = true)]
async fn replaced_controller_is_fenced() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.set_epoch(1000);
    }
    assert_eq!(reason(lab.create("r1").await), Reason::StaleEpoch);
    assert_eq!(reason(lab.create("r2").await), Reason::StaleEpoch);
    assert!(lab.living().is_empty());
}

#[tokio::test(start_paused = true)]
async fn call_without_an_answer_keeps_new_work_away() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let holder = lab.holder(&sandbox.id).clone();
    holder.faults(|faults| faults.unanswered = Some(Call::SetScheduling));
    let cordon = CordonNodeRequest { node: holder.name().to_string(), why: String::new() };
    assert_eq!(reason(lab.operator().cordon_node(cordon).await), Reason::OutcomeUnknown);
    let status = lab.domain().nodes().statuses();
    let status = status.iter().find(|status| status.name == *holder.name()).expect("listed");
    assert!(status.not_ready.as_deref().is_some_and(|why| why.contains("time out")), "{status:?}");
    let asked = CreateSandboxRequest { node: holder.name().to_string(), ..request("r2") };
    assert_eq!(reason(create(&mut lab.api(), asked).await), Reason::NodeUnreachable);
}

#[tokio::test(start_paused = true)]
async fn discovered_nodes_are_stored() {
    let mut lab = Lab::new().await;
    lab.agents[0].add_member("n1", "10.0.0.1");
    lab.agents[0].add_member("n2", "10.0.0.2");
    lab.agents[0].add_member("n3", "");
    lab.discover = true;
    let names = |lab: &Lab| -> Vec<_> {
        let statuses = lab.domain().nodes().statuses();
        statuses.into_iter().map(|s| (s.name.to_string(), s.address)).collect()
    };
    lab.start().await;
    lab.controller.as_ref().expect("controller").settled(Duration::from_secs(5)).await;
    let n2 = ("n2".to_owned(), "10.0.0.2:7445".to_owned());
    assert_eq!(names(&lab), [("n1".to_owned(), String::new()), n2.clone()], "n3 is offline");
    // With the seed node down the others are known all the same.
    lab.agents[0].down();
    lab.start().await;
    assert_eq!(names(&lab)[1], n2);
    let sandbox = lab.create("r1").await.expect("made");
    assert_eq!(sandbox.node, "n2");
}

#[tokio::test(start_paused = true)]
async fn same_seed_gives_the_same_history() {
    let history = async || {
        let lab = Lab::new().await;
        let mut ids = Vec::new();
        for n in 0..6 {
            let sandbox = lab.create(&format!("r{n}")).await.expect("made");
            ids.push((sandbox.id, sandbox.node));
        }
        ids
    };
    assert_eq!(history().await, history().await);
}

#[tokio::test]
async fn creation_works_over_sqlite() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("c.db");
    let open = || Arc::new(crate::store::sqlite::Sqlite::open(&path).expect("store"));
    let mut lab = Lab::over(open()).await;
    let sandbox = lab.create("r1").await.expect("made");
    lab.controller = None;
    lab.store = open();
    lab.start().await;
    assert_eq!(lab.create("r1").await.expect("the same").id, sandbox.id);
}
