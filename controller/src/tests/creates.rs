//! Creations: one sandbox per request_id, whatever happens.

use proto::{Reason, sandbox::v1::*};

use super::{nodes::HeldDisk, *};
use crate::node::fake::Cut;

#[tokio::test(start_paused = true)]
async fn creates_and_explains_a_sandbox() {
    let lab = Lab::new().await;
    lab.agents[0].load(|load| (load.cpu_busy, load.psi_cpu) = (1.0, 80.0));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut request = request("r1");
    request.services = vec![HttpService { port: 8000, ..HttpService::default() }];
    request.metadata.insert("k".into(), "v".into());
    let sandbox = create(&mut lab.api(), request).await.expect("made");
    assert_eq!(
        (sandbox.phase(), sandbox.attempt, sandbox.team.as_str()),
        (Phase::Running, 1, "red")
    );
    assert_eq!(sandbox.node, "n2", "the first without burden by name");
    assert_eq!(sandbox.services[0].url, "http://port-8000-vm-200000.test:8480");

    let subject = Some(explain_placement_request::Subject::Id(sandbox.id.clone()));
    let answer = lab.api().explain_placement(ExplainPlacementRequest { subject }).await;
    let decision = answer.expect("explained").into_inner().decision.expect("a decision");
    assert_eq!((decision.node.as_str(), decision.nodes.len()), ("n2", 3));
    let hog = decision.nodes.iter().find(|verdict| verdict.node == "n1").expect("n1");
    assert!(hog.score > decision.nodes[0].score && hog.detail.contains("100 %"), "{hog:?}");

    for id in [sandbox.id.clone(), "200000".into(), "pve_lxc_200000".into(), "cmux-200000".into()] {
        assert_eq!(lab.get(&id).await.expect("by any name").id, sandbox.id);
    }
}

#[tokio::test(start_paused = true)]
async fn same_request_gives_the_same_sandbox_over_restarts() {
    let mut lab = Lab::new().await;
    let first = lab.create("r1").await.expect("made");
    assert_eq!(lab.create("r1").await.expect("again").id, first.id);
    lab.start().await;
    assert_eq!(lab.create("r1").await.expect("after a restart").id, first.id);

    let mut other = request("r1");
    other.size = Some(Size { cpu_cores: 2, memory_mib: 0, disk_gib: 0 });
    assert_eq!(reason(create(&mut lab.api(), other).await), Reason::RequestIdReused);
    // The caller's wait is not part of the request's identity.
    let mut patient = request("r1");
    patient.wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    assert_eq!(create(&mut lab.api(), patient).await.expect("same").id, first.id);
    // Deleted, it is still the same answer.
    let delete = DeleteSandboxRequest { id: first.id.clone() };
    lab.api().delete_sandbox(delete).await.expect("deleted");
    let again = lab.create("r1").await.expect("still known");
    assert_eq!((again.id, again.phase), (first.id, Phase::Deleted.into()));
    assert_eq!(lab.living().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn concurrent_calls_with_one_request_id_get_one_sandbox() {
    let lab = Lab::new().await;
    let calls = (0..20).map(|_| lab.create("r1"));
    let answers = futures_util::future::join_all(calls).await;
    let ids: std::collections::BTreeSet<_> =
        answers.into_iter().map(|answer| answer.expect("made").id).collect();
    assert_eq!((ids.len(), lab.living().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn burst_of_creations_spreads_over_the_nodes() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(2));
    }
    let names: Vec<_> = (0..30).map(|n| format!("r{n}")).collect();
    let answers = futures_util::future::join_all(names.iter().map(|name| lab.create(name))).await;
    assert!(
        answers.iter().all(|answer| answer.as_ref().is_ok_and(|s| s.phase() == Phase::Running))
    );
    let counts: Vec<_> = lab.agents.iter().map(|agent| agent.living().len()).collect();
    assert_eq!(counts, [10, 10, 10]);
}

#[tokio::test(start_paused = true)]
async fn refused_creation_goes_to_the_next_node() {
    let lab = Lab::new().await;
    for n in [0, 1] {
        let full = Some(Reason::StorageFull);
        lab.agents[n].faults(|faults| faults.refuse = full);
    }
    let sandbox = lab.create("r1").await.expect("made");
    assert_eq!((sandbox.node.as_str(), sandbox.attempt), ("n3", 3));
    let row = lab.store.get(&sandbox.id.parse().expect("id")).await.expect("store").expect("row");
    assert!(row.decision.contains("refused it a moment ago"), "{}", row.decision);
}

#[tokio::test(start_paused = true)]
async fn creation_waits_while_all_nodes_refuse() {
    let lab = Lab::new().await;
    let full = Some(Reason::QueueFull);
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = full);
    }
    let waiting = lab.create("r1").await.expect("accepted");
    assert_eq!(waiting.phase(), Phase::Creating);
    lab.agents[1].faults(|faults| faults.refuse = None);
    let sandbox = lab.until(&waiting.id, Phase::Running).await;
    assert_eq!(sandbox.node, "n2");

    // Without capacity until the end it fails, and the request_id is free again.
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = full);
    }
    let waiting = lab.create("r2").await.expect("accepted");
    let failed = lab.until(&waiting.id, Phase::Failed).await;
    assert_eq!(failed.failure.expect("why").reason(), Reason::NoCapacity);
    lab.agents[0].faults(|faults| faults.refuse = None);
    let again = lab.create("r2").await.expect("made now");
    assert!(again.id != waiting.id && again.phase() == Phase::Running);
}

/// Returns a request whose caller waits for a moment only.
fn hasty(request_id: &str) -> CreateSandboxRequest {
    let wait = Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 });
    CreateSandboxRequest { wait, ..request(request_id) }
}

#[tokio::test(start_paused = true)]
async fn creations_of_one_team_leave_places_for_another() {
    let mut lab = Lab::new().await;
    lab.options.creates_max = 4;
    lab.start().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(60));
    }
    let blue = token(&lab.store, "blue", "sandbox").await;
    let (mut red, mut blue) = (lab.api(), lab.api_as(&blue));
    let first = create(&mut red, hasty("r1")).await.expect("accepted");
    let second = create(&mut red, hasty("r2")).await.expect("accepted");
    let refused = create(&mut red, hasty("r3")).await.expect_err("half of the places");
    assert_eq!(daemon::status::reason(&refused), Some(Reason::TooManyCalls), "{refused:?}");
    assert!(daemon::status::retry_after(&refused).is_some());
    create(&mut blue, hasty("b1")).await.expect("another team's");
    // The end of a creation gives its place back.
    for id in [first.id, second.id] {
        lab.until(&id, Phase::Running).await;
    }
    create(&mut red, hasty("r3")).await.expect("accepted now");
}

#[tokio::test(start_paused = true)]
async fn team_that_waits_for_room_leaves_places_in_the_queue() {
    let mut lab = Lab::new().await;
    lab.options.queue_max = 4;
    lab.start().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = Some(Reason::QueueFull));
    }
    let blue = token(&lab.store, "blue", "sandbox").await;
    let (mut red, mut blue) = (lab.api(), lab.api_as(&blue));
    for request_id in ["r1", "r2"] {
        let waiting = create(&mut red, hasty(request_id)).await.expect("accepted");
        assert_eq!(waiting.progress(), Progress::Queued);
    }
    assert_eq!(reason(create(&mut red, hasty("r3")).await), Reason::NoCapacity);
    let waiting = create(&mut blue, hasty("b1")).await.expect("another team's");
    assert_eq!(waiting.progress(), Progress::Queued);
    lab.agents[0].faults(|faults| faults.refuse = None);
    lab.until(&waiting.id, Phase::Running).await;
}

#[tokio::test(start_paused = true)]
async fn creations_that_wait_for_room_are_not_refused_after_a_restart() {
    let mut lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = Some(Reason::QueueFull));
    }
    let mut waiting = Vec::new();
    for request_id in ["r1", "r2", "r3"] {
        waiting.push(create(&mut lab.api(), hasty(request_id)).await.expect("accepted"));
    }
    // The share of a team is one slot now.
    lab.options.queue_max = 2;
    lab.start().await;
    for creation in &waiting {
        lab.until_progress(&creation.id, Progress::Queued).await;
    }
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = None);
    }
    for creation in &waiting {
        lab.until(&creation.id, Phase::Running).await;
    }
}

#[tokio::test(start_paused = true)]
async fn creation_follows_its_node_to_the_address_that_it_joins_again_with() {
    let mut lab = Lab::new().await;
    for (node, ip) in [("n1", "10.0.0.1"), ("n2", "10.0.0.2")] {
        lab.agents[0].add_member(node, ip);
    }
    // The address of a node that is in the configuration does not change.
    lab.discover = true;
    lab.start().await;
    let settled = async |lab: &Lab| {
        lab.controller.as_ref().expect("a controller").settled(Duration::from_secs(5)).await;
    };
    let on_n2 = |request_id| CreateSandboxRequest { node: "n2".into(), ..hasty(request_id) };
    let n2 = "n2".parse().expect("a name");
    settled(&lab).await;

    lab.agents[1].faults(|faults| faults.boot = Duration::from_secs(20));
    let followed = create(&mut lab.api(), on_n2("r1")).await.expect("accepted");
    lab.agents[1].move_to("10.0.0.3:7445");
    lab.domain().registry().joined(&n2, "10.0.0.3:7445");
    let running = lab.until(&followed.id, Phase::Running).await;
    assert_eq!((running.node.as_str(), running.attempt), ("n2", 1));

    settled(&lab).await;
    lab.agents[1].faults(|faults| faults.boot = Duration::from_hours(1));
    let cancelled = create(&mut lab.api(), on_n2("r2")).await.expect("accepted");
    lab.agents[1].move_to("10.0.0.4:7445");
    let delete = DeleteSandboxRequest { id: cancelled.id.clone() };
    lab.api().delete_sandbox(delete).await.expect_err("its node does not answer");
    lab.domain().registry().joined(&n2, "10.0.0.4:7445");
    lab.until(&cancelled.id, Phase::Deleted).await;
    let living: Vec<_> = lab.agents[1].living().into_iter().map(|sandbox| sandbox.id).collect();
    assert_eq!(living, [followed.id]);
}

#[tokio::test(start_paused = true)]
async fn creation_fails_after_three_faults_with_the_first() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.fail = Some(Reason::PctFailed));
    }
    let status = lab.create("r1").await.expect_err("failed");
    assert!(status.message().contains("node n1: failed on purpose"), "{}", status.message());
    assert!(status.message().contains("all undone"));
    let tries: usize = lab.agents.iter().map(|agent| agent.received().len()).sum();
    assert!(tries >= 3 && lab.living().is_empty());
    assert_eq!(reason(lab.create("r1").await), Reason::PctFailed, "the same answer again");

    // A requested node gets one attempt.
    let asked = CreateSandboxRequest { node: "n2".into(), ..request("r2") };
    let status = create(&mut lab.api(), asked).await.expect_err("failed");
    assert!(status.message().contains("node n2: failed on purpose"), "{}", status.message());
}

#[tokio::test(start_paused = true)]
async fn lost_answer_does_not_create_twice() {
    let lab = Lab::new().await;
    for cut in [Cut::After, Cut::Before] {
        let request = format!("r{cut:?}");
        for agent in &lab.agents {
            agent.faults(|faults| faults.cut = Some(cut));
        }
        let call = lab.create(&request);
        let heal = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            for agent in &lab.agents {
                agent.faults(|faults| faults.cut = None);
            }
        };
        let (sandbox, ()) = tokio::join!(call, heal);
        let sandbox = sandbox.expect("made in the end");
        assert_eq!((sandbox.phase(), sandbox.attempt), (Phase::Running, 1), "{cut:?}");
        let of_request = lab.living().into_iter().filter(|s| s.request_id == request).count();
        assert_eq!(of_request, 1, "{cut:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn hanging_node_is_abandoned_with_a_pending_cancel() {
    let mut lab = Lab::new().await;
    // n1 accepts it, and goes down before it is up.
    lab.agents[0].faults(|faults| faults.boot = Duration::from_secs(5));
    for agent in &lab.agents[1..] {
        agent.load(|load| load.cpu_busy = 0.9);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let call = lab.create("r1");
    let kill = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        lab.agents[0].down();
    };
    let (creating, ()) = tokio::join!(call, kill);
    let creating = creating.expect("not known yet");
    assert_eq!((creating.phase(), creating.node.as_str()), (Phase::Creating, "n1"));
    let sandbox = lab.until(&creating.id, Phase::Running).await;
    assert_eq!((sandbox.node.as_str(), sandbox.attempt), ("n2", 2));
    // It came up on n1 as well. When n1 is back its attempt is cancelled first, even by a new
    // controller, and only one sandbox is left.
    assert_eq!(lab.living().len(), 2);
    lab.start().await;
    lab.agents[0].up();
    lab.controller.as_ref().expect("controller").settled(Duration::from_secs(10)).await;
    let living = lab.living();
    assert_eq!((living.len(), living[0].node.as_str()), (1, "n2"));
    assert_eq!(lab.get(&creating.id).await.expect("known").node, "n2");
}

#[tokio::test(start_paused = true)]
async fn abandoned_attempt_on_a_node_that_is_back_before_the_next_choice_is_cancelled() {
    let lab = Lab::new().await;
    for agent in &lab.agents[1..] {
        agent.load(|load| load.memory_available = 1 << 30);
    }
    lab.agents[0].faults(|faults| faults.boot = Duration::from_secs(5));
    // Long enough for a report of every node.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let asked = CreateSandboxRequest { wait, ..request("r1") };
    let made = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!((made.phase(), made.node.as_str()), (Phase::Creating, "n1"), "the others are full");
    lab.agents[0].down();
    lab.until_seen(&made.id, |view| view.node.is_empty()).await;

    // It came up there, and is reported while the creation has no node.
    lab.agents[0].load(|load| load.cordoned = true);
    lab.agents[0].up();
    let n1 = lab.agents[0].name();
    let is_up = async {
        while lab.domain().nodes().get(n1).is_none_or(|node| node.down().is_some()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), is_up).await.expect("it is back");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(lab.agents[0].living().len(), 1);
    lab.agents[1].load(|load| load.memory_available = 30 << 30);
    let sandbox = lab.until(&made.id, Phase::Running).await;
    assert_eq!((sandbox.node.as_str(), sandbox.attempt), ("n2", 2));
    let cancelled = async {
        while !lab.agents[0].living().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), cancelled).await.expect("cancelled");
    assert_eq!(lab.get(&made.id).await.expect("known").node, "n2");
}

#[tokio::test(start_paused = true)]
async fn restart_finishes_a_creation_under_way() {
    let mut lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(30));
    }
    let quick =
        CreateSandboxRequest { wait: Some(prost_types::Duration::default()), ..request("r1") };
    let accepted = create(&mut lab.api(), quick).await.expect("accepted");
    assert_eq!(accepted.phase(), Phase::Creating);
    tokio::time::sleep(Duration::from_secs(1)).await;
    lab.start().await;
    let sandbox = lab.until(&accepted.id, Phase::Running).await;
    assert_eq!((sandbox.attempt, lab.living().len()), (1, 1));
    assert_eq!(lab.create("r1").await.expect("the same").id, accepted.id);
}

#[tokio::test(start_paused = true)]
async fn creation_continues_when_the_caller_hangs_up() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(3));
    }
    let hung_up = tokio::time::timeout(Duration::from_secs(1), lab.create("r1")).await;
    assert!(hung_up.is_err());
    let id = lab.living()[0].id.clone();
    lab.until(&id, Phase::Running).await;
    assert_eq!(lab.create("r1").await.expect("the same").id, id);
}

#[tokio::test(start_paused = true)]
async fn creation_under_way_can_be_deleted() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(60));
    }
    let quick = |name: &str| CreateSandboxRequest {
        wait: Some(prost_types::Duration::default()),
        ..request(name)
    };
    let accepted = create(&mut lab.api(), quick("r1")).await.expect("accepted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let delete = DeleteSandboxRequest { id: accepted.id.clone() };
    let deleted = lab.api().delete_sandbox(delete.clone()).await.expect("deleted").into_inner();
    assert_eq!(deleted.sandbox.expect("sandbox").phase(), Phase::Deleted);
    assert!(lab.living().is_empty());
    lab.api().delete_sandbox(delete).await.expect("twice is once");
    assert_eq!(reason(lab.create("r1").await), Reason::CreateCancelled);

    // In the queue too.
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = Some(Reason::QueueFull));
    }
    let queued = create(&mut lab.api(), quick("r2")).await.expect("accepted");
    let delete = DeleteSandboxRequest { id: queued.id };
    lab.api().delete_sandbox(delete).await.expect("deleted");

    // On a node that is down it cannot be cancelled now, and is when the node is back.
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = None);
    }
    let accepted = create(&mut lab.api(), quick("r3")).await.expect("accepted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let holder = lab.holder(&accepted.id).clone();
    holder.down();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let delete = DeleteSandboxRequest { id: accepted.id.clone() };
    assert_eq!(reason(lab.api().delete_sandbox(delete).await), Reason::NodeUnreachable);
    holder.up();
    lab.until(&accepted.id, Phase::Deleted).await;
    assert!(lab.living().is_empty());
}

#[tokio::test(start_paused = true)]
async fn deletion_of_a_creation_under_way_goes_on_when_its_caller_hangs_up() {
    // The creation goes on for long, or it comes up before the store has written down that nobody wants it.
    for boot in [Duration::from_mins(1), Duration::from_secs(4)] {
        let disk = Arc::new(HeldDisk::default());
        let lab = Lab::over(Arc::new(Memory::on(Arc::clone(&disk) as _))).await;
        for agent in &lab.agents {
            agent.faults(|faults| faults.boot = boot);
        }
        let wait = Some(prost_types::Duration::default());
        let asked = CreateSandboxRequest { wait, ..request("r1") };
        let made = create(&mut lab.api(), asked).await.expect("accepted");
        assert_eq!(made.phase(), Phase::Creating);
        tokio::time::sleep(Duration::from_secs(1)).await;
        disk.0.send_replace(true);
        let mut api = lab.api();
        let delete = api.delete_sandbox(DeleteSandboxRequest { id: made.id.clone() });
        let hung_up = tokio::time::timeout(Duration::from_secs(1), delete).await;
        hung_up.expect_err("the store waits for its disk");
        tokio::time::sleep(Duration::from_secs(10)).await;
        disk.0.send_replace(false);
        lab.until(&made.id, Phase::Deleted).await;
        assert_eq!(lab.living(), [], "{boot:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn deletions_of_one_creation_whose_callers_hang_up_are_one_deletion() {
    let disk = Arc::new(HeldDisk::default());
    let lab = Lab::over(Arc::new(Memory::on(Arc::clone(&disk) as _))).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_mins(1));
    }
    let wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait, ..request("r1") };
    let made = create(&mut lab.api(), asked).await.expect("accepted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    disk.0.send_replace(true);
    let channel = lab.channel();
    let hung_up = (0..100).map(|_| async {
        let mut api: Api =
            SandboxServiceClient::with_interceptor(channel.clone(), bearer(&lab.red));
        let delete = api.delete_sandbox(DeleteSandboxRequest { id: made.id.clone() });
        let answer = tokio::time::timeout(Duration::from_secs(1), delete).await;
        answer.expect_err("the store waits for its disk");
    });
    futures_util::future::join_all(hung_up).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    disk.0.send_replace(false);
    lab.until(&made.id, Phase::Deleted).await;
    super::events::settled(&lab).await;
    let events = super::events::of(&lab, &made.id, 0).await;
    let asked = events.iter().filter(|event| event.kind() == EventKind::DeleteAsked);
    assert_eq!((asked.count(), lab.living()), (1, vec![]));
}

#[tokio::test(start_paused = true)]
async fn preset_sets_the_size_and_labels_choose_the_node() {
    let mut lab = Lab::new().await;
    let small = proto::spec::Size { cpu_cores: 2, memory_mib: 1024, disk_gib: 0 };
    lab.options.sizes = [("small".parse().expect("valid"), small)].into();
    lab.start().await;
    lab.agents[2].load(|load| load.labels = vec!["gpu".into()]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let label = |labels: &str| vec![labels.to_owned()];
    let ask = |key: &str, preset: &str, placement: Placement| CreateSandboxRequest {
        size_preset: preset.into(),
        placement: Some(placement),
        ..request(key)
    };
    let gpu = Placement { require: label("gpu"), ..Placement::default() };
    let made = create(&mut lab.api(), ask("r1", "small", gpu.clone())).await.expect("made");
    assert_eq!((made.node.as_str(), made.size), ("n3", Some(small.into())));
    let again = create(&mut lab.api(), ask("r1", "small", gpu)).await.expect("the same");
    assert_eq!(again.id, made.id);
    let without = Placement { forbid: label("gpu"), ..Placement::default() };
    for key in ["r2", "r3", "r4", "r5"] {
        let made = create(&mut lab.api(), ask(key, "", without.clone())).await.expect("made");
        assert_ne!(made.node, "n3");
    }
    let tpu = Placement { require: label("tpu"), ..Placement::default() };
    let refused = create(&mut lab.api(), ask("r6", "", tpu)).await;
    assert_eq!(reason(refused), Reason::NeverFits, "no node has it, and none will in a moment");
    let refused = create(&mut lab.api(), ask("r7", "huge", Placement::default())).await;
    assert_eq!(reason(refused), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn reservations_choose_by_fresh_reports() {
    let mut lab = Lab::new().await;
    lab.options.candidate_probes = 3;
    lab.start().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let made = async |key: &str| create(&mut lab.api(), request(key)).await.expect("made");
    // Since its last report one node has become busy, and another refuses everything.
    lab.agents[0].load(|load| load.cpu_busy = 0.9);
    let busy = Reason::MemoryFull;
    lab.agents[1].faults(|faults| faults.refuse = Some(busy));
    let first = made("r1").await;
    assert_eq!(first.node, "n3");
    let subject = Some(explain_placement_request::Subject::Id(first.id.clone()));
    let answer = lab.api().explain_placement(ExplainPlacementRequest { subject }).await;
    let explained = answer.expect("explained").into_inner().decision.expect("a decision").nodes;
    let verdict = |node: &str| explained.iter().find(|verdict| verdict.node == node).expect("told");
    assert_eq!(verdict("n2").filtered(), Filtered::NoReservation);
    assert!(verdict("n2").detail.contains("refused on purpose"), "{explained:?}");
    assert!(verdict("n1").score > verdict("n3").score, "{explained:?}");
    for agent in &lab.agents {
        let given_back = async {
            while !agent.reservations().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(1), given_back).await.expect("given back");
    }
    // A node that does not answer at once is not waited for.
    lab.agents[0].faults(|faults| faults.hang = true);
    let before = tokio::time::Instant::now();
    assert_eq!(made("r2").await.node, "n3");
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    // Without any reservation, the nodes are asked for the creation itself.
    for agent in &lab.agents {
        agent.faults(|faults| (faults.refuse, faults.hang) = (Some(busy), false));
    }
    let no_wait = Some(prost_types::Duration::default());
    let waits = CreateSandboxRequest { wait: no_wait, ..request("r3") };
    let waits = create(&mut lab.api(), waits).await.expect("accepted");
    tokio::time::sleep(Duration::from_secs(3)).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = None);
    }
    lab.until(&waits.id, Phase::Running).await;
}

#[tokio::test(start_paused = true)]
async fn cordoned_node_that_is_asked_for_by_name_refuses_at_once() {
    let lab = Lab::new().await;
    lab.agents[0].load(|load| load.cordoned = true);
    let begun = tokio::time::Instant::now();
    let there = CreateSandboxRequest { node: "n1".into(), ..request("r1") };
    let status = create(&mut lab.api(), there).await.expect_err("cordoned");
    assert!(begun.elapsed() < Duration::from_secs(5), "it waited in a queue");
    assert_eq!(daemon::status::reason(&status), Some(Reason::NodeCordoned));
    assert!(status.message().contains("n1"), "{status:?}");
    assert_ne!(lab.create("r2").await.expect("elsewhere").node, "n1");
}

#[tokio::test(start_paused = true)]
async fn impossible_request_is_refused_at_once() {
    let lab = Lab::new().await;
    let try_it = async |change: fn(&mut CreateSandboxRequest)| {
        let mut request = request("r1");
        change(&mut request);
        reason(create(&mut lab.api(), request).await)
    };
    assert_eq!(try_it(|r| r.snapshot_id = "nope".into()).await, Reason::SnapshotNotFound);
    assert_eq!(try_it(|r| r.node = "n9".into()).await, Reason::NodeNotFound);
    let huge = Size { cpu_cores: 1, memory_mib: 500_000, disk_gib: 0 };
    assert_eq!(huge.memory_mib, 500_000);
    let large = |r: &mut CreateSandboxRequest| {
        r.size = Some(Size { cpu_cores: 1, memory_mib: 500_000, disk_gib: 0 });
    };
    assert_eq!(try_it(large).await, Reason::NeverFits);
    for bad in [
        (|r| r.request_id = "a\nb".into()) as fn(&mut CreateSandboxRequest),
        |r| r.snapshot_id = "--force".into(),
        |r| r.wait = Some(prost_types::Duration { seconds: 21, nanos: 0 }),
        |r| r.wait = Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        |r| drop(r.metadata.insert("k".into(), "a\nb".into())),
        |r| {
            r.services = vec![HttpService {
                name: "x".into(),
                port: 1,
                url: "http://x".into(),
                ..Default::default()
            }]
        },
        |r| r.services = vec![HttpService { name: "x\n".into(), port: 1, ..Default::default() }],
    ] {
        assert_eq!(try_it(bad).await, Reason::FieldInvalid);
    }
    assert!(lab.store.all().await.expect("store").is_empty(), "nothing of it is remembered");

    for agent in &lab.agents {
        agent.load(|load| load.quorate = false);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(reason(lab.create("r1").await), Reason::NoQuorum);
    for agent in &lab.agents {
        agent.down();
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(reason(lab.create("r1").await), Reason::NodeUnreachable);
}

#[tokio::test(start_paused = true)]
async fn unsent_attempt_goes_to_another_node_at_once() {
    let lab = Lab::new().await;
    for agent in &lab.agents[1..] {
        agent.load(|load| load.cpu_busy = 0.9);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The watch is still open when n1 stops listening; then its connection breaks.
    lab.agents[0].down();
    let sandbox = lab.create("r1").await.expect("made elsewhere");
    assert_eq!((sandbox.node.as_str(), sandbox.phase()), ("n2", Phase::Running));
    assert!(lab.agents[0].received().is_empty());
}
