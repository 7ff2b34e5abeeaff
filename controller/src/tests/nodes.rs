//! Nodes that come and go.

use std::io;

use daemon::disk::Disk;
use proto::{Reason, name::NodeName, sandbox::v1::*};
use tokio::{sync::watch, time::timeout};

use super::{events::settled, *};
use crate::{
    node::{Connector, Lane, Nodes, calls::Call},
    store::Filter,
};

/// Disk whose syncs wait while it is held.
#[derive(Debug, Default)]
pub(super) struct HeldDisk(pub(super) watch::Sender<bool>);

#[async_trait::async_trait]
impl Disk for HeldDisk {
    async fn before_sync(&self) {
        self.0.subscribe().wait_for(|held| !held).await.expect("the disk lives");
    }

    async fn after_sync(&self) {}
}

/// Address that no connector can use.
const UNUSABLE: &str = "no address";

/// Connector that knows at once that an address can never work, as the one over TLS does.
#[derive(Debug)]
struct Strict(Dialler);

impl Connector for Strict {
    fn channel(&self, node: &NodeName, address: &str, lane: Lane) -> io::Result<Channel> {
        if address == UNUSABLE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.0.channel(node, address, lane)
    }
}

/// Waits until a node is connected, or is not.
async fn until_up(nodes: &Nodes, name: &NodeName, up: bool) {
    let mut news = nodes.news();
    let reached = async {
        while nodes.get(name).is_some_and(|node| node.down().is_none()) != up {
            news.changed().await.expect("the registry lives");
        }
    };
    timeout(Duration::from_secs(30), reached)
        .await
        .unwrap_or_else(|_| panic!("{name}: not up={up}"));
}

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
async fn changes_by_hand_of_a_file_are_one_event_in_ten_minutes_also_over_a_restart() {
    let mut lab = Lab::new().await;
    let edit = |file: &str, seconds| ConfigEdit {
        file: file.into(),
        put_back_at: Some(prost_types::Timestamp { seconds, nanos: 0 }),
    };
    let caddy = "/etc/pve-sandbox/caddy.json";
    let logged = async |lab: &Lab| {
        // Long enough for a report of every node.
        tokio::time::sleep(Duration::from_secs(5)).await;
        settled(lab).await;
        let page = lab.store.events(0, Filter::default(), 1000).await.expect("read");
        let events = page.events.into_iter().map(|(_, event)| event);
        let put_back = events.filter(|event| event.kind == EventKind::ConfigPutBack);
        let shown = |event: crate::store::Event| {
            assert_eq!((event.team, event.sandbox), (None, None));
            format!("{} {}", event.node.expect("a node"), event.detail)
        };
        put_back.map(shown).collect::<Vec<_>>()
    };
    assert_eq!(logged(&lab).await, [""; 0]);
    lab.agents[0].load(|load| load.config_edits = vec![edit(caddy, 10)]);
    let first = format!("n1 {caddy} was changed by hand");
    assert_eq!(logged(&lab).await, [first.as_str()]);
    lab.start().await;
    assert_eq!(logged(&lab).await, [first.as_str()], "the new controller hears of it again");
    // The same file once more, and one whose path is longer than any.
    let long = "/".repeat(513);
    lab.agents[0].load(|load| load.config_edits = vec![edit(caddy, 20), edit(&long, 20)]);
    assert_eq!(logged(&lab).await, [first.as_str(), first.as_str()]);
    // Something writes the file again and again.
    for seconds in 30..40 {
        lab.agents[0].load(|load| load.config_edits = vec![edit(caddy, seconds)]);
        assert_eq!(logged(&lab).await.len(), 2);
    }
    // It goes on, and another file is changed in the same way.
    tokio::time::sleep(Duration::from_mins(10)).await;
    let other = "/etc/cloudflared/config.yml";
    lab.agents[0].load(|load| load.config_edits = vec![edit(caddy, 40), edit(other, 40)]);
    let last = logged(&lab).await.split_off(2);
    assert_eq!(last, [first.clone(), format!("n1 {other} was changed by hand")]);
}

#[tokio::test(start_paused = true)]
async fn creation_on_a_node_that_left_the_configuration_ends_when_the_node_is_forgotten() {
    let mut lab = Lab::new().await;
    for agent in &lab.agents[..2] {
        agent.load(|load| load.memory_available = 1 << 30);
    }
    lab.agents[2].faults(|faults| faults.boot = Duration::from_hours(1));
    // Long enough for a report of every node.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let asked = CreateSandboxRequest { wait, ..request("r1") };
    let made = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!((made.phase(), made.node.as_str()), (Phase::Creating, "n3"), "the others are full");

    lab.agents.pop().expect("the third").down();
    lab.start().await;
    lab.until_progress(&made.id, Progress::Queued).await;
    // No other node had room in time, so the first one is asked again.
    lab.until_seen(&made.id, |view| view.node == "n3").await;
    let forget = ForgetNodeRequest { node: "n3".into(), lost: false, dry_run: false };
    lab.operator().forget_node(forget).await.expect("forgotten");
    let failed = lab.until(&made.id, Phase::Failed).await;
    assert_eq!(failed.failure.expect("why").reason(), Reason::NoCapacity);
}

#[tokio::test(start_paused = true)]
async fn forgotten_node_that_joins_again_before_its_cancel_is_stored_is_sent_it() {
    let disk = Arc::new(HeldDisk::default());
    let lab = Lab::over(Arc::new(Memory::on(Arc::clone(&disk) as _))).await;
    let nodes = lab.domain().registry();
    let n4 = FakeAgent::start(&lab.net, "n4", 400_000, &[SNAPSHOT]);
    n4.faults(|faults| faults.boot = Duration::from_hours(1));
    nodes.joined(n4.name(), "10.0.0.4:7445");
    until_up(&nodes, n4.name(), true).await;
    // Long enough for a report.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let asked = CreateSandboxRequest { wait, node: "n4".into(), ..request("r1") };
    let made = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!((made.phase(), n4.living().len()), (Phase::Creating, 1));

    n4.down();
    until_up(&nodes, n4.name(), false).await;
    disk.0.send_replace(true);
    nodes.forget(n4.name()).await.expect("forgotten");
    // Long enough for the creation to find no other node: it has asked for one, and waits for the disk.
    tokio::time::sleep(Duration::from_secs(10)).await;
    n4.up();
    nodes.joined(n4.name(), "10.0.0.4:7445");
    until_up(&nodes, n4.name(), true).await;
    // The session began without the cancel, and the creation has not ended.
    assert_eq!(lab.store.pending_cancels(n4.name()).await.expect("a store"), []);
    assert_ne!(lab.get(&made.id).await.expect("known").phase(), Phase::Failed);
    assert_eq!(n4.living().len(), 1);

    disk.0.send_replace(false);
    lab.until(&made.id, Phase::Failed).await;
    let cancelled = async {
        while !n4.living().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_mins(1), cancelled)
        .await
        .expect("cancelled over the session that it has");
}

#[tokio::test(start_paused = true)]
async fn sandbox_whose_node_is_forgotten_just_before_its_creation_ends_is_not_left_alive() {
    let lab = Lab::new().await;
    let (nodes, n9) = (lab.domain().registry(), "n9".parse().expect("name"));
    let id = proto::id::SandboxId::new(1, &[9; 10]);
    let mut up = Sandbox {
        id: id.to_string(),
        node: "n9".into(),
        team: "red".into(),
        attempt: 1,
        revision: 1,
        ..Sandbox::default()
    };
    up.set_phase(Phase::Running);
    nodes.cache.begin(id, "red".parse().expect("team"), up.clone());
    nodes.forget(&n9).await.expect("forgotten");
    let state = || nodes.cache.get(&SandboxRef::Id(id)).expect("known");
    assert!(state().creating, "its task ends it");
    nodes.settle(&id, up);
    let sandbox = state().sandbox;
    assert_eq!((sandbox.phase(), sandbox.cause()), (Phase::Deleted, proto::Cause::NodeLost));
    assert_eq!(nodes.cache.count_on(&n9), 0);
}

#[tokio::test(start_paused = true)]
async fn forgotten_node_that_is_configured_again_is_not_forgotten_any_more() {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let n1 = "n1".parse().expect("name");
    store.forget_node(&n1).await.expect("forgotten");
    let options = node::Options {
        seeds: vec![(n1.clone(), "10.0.0.1:7445".into())],
        discover: false,
        agent_port: 7445,
        limits: crate::placement::Limits::default(),
    };
    let clock = Arc::new(PausedClock(tokio::time::Instant::now()));
    let nodes = node::registry::Nodes::start(
        options,
        Arc::new(Dialler(Net::new())),
        store.clone(),
        (clock, Arc::new(Seeded(AtomicU64::new(1)))),
        (tokio_util::task::TaskTracker::new(), tokio_util::sync::CancellationToken::new()),
    );
    let nodes = nodes.await.expect("nodes");
    assert!(nodes.get(&n1).is_some() && !nodes.is_forgotten(&n1));
    assert_eq!(store.forgotten_nodes().await.expect("read"), [], "its pending cancels are kept");
}

#[tokio::test(start_paused = true)]
async fn node_that_joins_with_another_address_is_known_at_every_moment() {
    let lab = Lab::new().await;
    let (nodes, n9) = (lab.domain().registry(), "n9".parse().expect("name"));
    nodes.joined(&n9, "10.0.0.1:7445");
    let over = std::sync::atomic::AtomicBool::new(false);
    let gaps = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut gaps = 0;
            while !over.load(Ordering::Acquire) {
                gaps += usize::from(nodes.get(&n9).is_none());
            }
            gaps
        });
        for port in 1..1000 {
            nodes.joined(&n9, &format!("10.0.0.1:{port}"));
        }
        over.store(true, Ordering::Release);
        watch.join().expect("it ended")
    });
    assert_eq!(gaps, 0);
    assert_eq!(nodes.get(&n9).expect("known").address, "10.0.0.1:999");
}

#[tokio::test(start_paused = true)]
async fn node_that_joins_with_an_address_that_can_never_work_stays_connected_at_the_old_one() {
    let net = Net::new();
    let n9 = FakeAgent::start(&net, "n9", 900_000, &[SNAPSHOT]);
    let options = node::Options {
        seeds: Vec::new(),
        discover: false,
        agent_port: 7445,
        limits: crate::placement::Limits::default(),
    };
    let nodes = Nodes::start(
        options,
        Arc::new(Strict(Dialler(net))),
        Arc::new(Memory::new()),
        (Arc::new(PausedClock(tokio::time::Instant::now())), Arc::new(Seeded(AtomicU64::new(1)))),
        (tokio_util::task::TaskTracker::new(), tokio_util::sync::CancellationToken::new()),
    );
    let nodes = nodes.await.expect("nodes");
    nodes.loaded();
    nodes.joined(n9.name(), "10.0.0.9:7445");
    until_up(&nodes, n9.name(), true).await;
    let before = nodes.get(n9.name()).expect("known");

    nodes.joined(n9.name(), UNUSABLE);
    let after = nodes.get(n9.name()).expect("still known");
    assert_eq!(after.address, "10.0.0.9:7445");
    assert!(Arc::ptr_eq(&before, &after), "its connection is the same");
    // The watch on it goes on.
    n9.down();
    until_up(&nodes, n9.name(), false).await;
    n9.up();
    until_up(&nodes, n9.name(), true).await;
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
