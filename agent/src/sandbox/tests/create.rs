//! Creations: admission, idempotency, parallelism, refusals, cancellation, hang-up.

use proto::{Progress, Reason, id::SandboxRef};
use tokio::time::timeout;

use super::*;
use crate::pve::ErrorKind;

#[tokio::test(start_paused = true)]
async fn created_sandbox_has_everything_that_its_order_requests() {
    let node = Node::new().await;
    let mut order = order(1);
    order.spec.size.memory_mib = 1024;
    order.spec.services.insert("web".parse().expect("valid"), "80".parse().expect("valid"));
    let record = node.sandboxes.create(order, LONG).await.expect("admitted");
    assert_eq!(
        (record.phase, record.progress, record.boot, record.vmid.get()),
        (Phase::Running, Progress::Done, 1, 100_000)
    );
    assert_eq!(record.size, Size { cpu_cores: 1, memory_mib: 1024, disk_gib: 8 });
    assert_eq!(record.ip, Some(Ipv4Addr::new(10, 100, 1, 2)));
    assert_eq!(record.services.len(), 1);
    let guest = &node.cluster.guests()[&record.vmid];
    assert_eq!(guest.config.mark(), Some(record.mark()));
    assert_eq!((guest.config.memory_mib(), guest.config.rootfs_gib()), (1024, 8));
    let interface = guest.config.net0().expect("configured");
    assert_eq!((interface.bridge.as_str(), interface.mac.as_str()), ("vmbr0", "02:50:0A:64:01:02"));
    let tally = node.sandboxes.tally().await.expect("reads");
    assert_eq!((tally.running, tally.memory_allocated), (1, 1 << 30));
    assert!(tally.start_ms > 1900, "{tally:?}");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn smaller_disk_request_keeps_and_reports_the_templates_disk() {
    let node = Node::new().await;
    let mut small = order(1);
    small.spec.size.disk_gib = 1;
    let record = node.sandboxes.create(small, LONG).await.expect("admitted");
    assert_eq!((record.phase, record.size.disk_gib), (Phase::Running, 2), "{record:?}");
    let mut plain = order(2);
    plain.spec.size = Size::default();
    let record = node.sandboxes.create(plain, LONG).await.expect("admitted");
    assert_eq!((record.phase, record.size.disk_gib), (Phase::Running, 0), "as the snapshot says");
}

/// Steps that a creation shows after the clone, except those that take no time.
async fn steps_of(node: &Node) -> Vec<Progress> {
    node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
    let mut steps = Vec::new();
    loop {
        let record = node.record(1).await;
        if record.phase != Phase::Creating {
            assert_eq!((record.phase, record.size.disk_gib), (Phase::Running, 8), "{record:?}");
            return steps;
        }
        let counts =
            ![Progress::Queued, Progress::Clone, Progress::Probe].contains(&record.progress);
        if counts && steps.last() != Some(&record.progress) {
            steps.push(record.progress);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn disk_grows_after_the_start_unless_its_root_is_read_only() {
    let node = Node::new().await;
    let start = tokio::time::Instant::now();
    assert_eq!(steps_of(&node).await, [Progress::Configure, Progress::Start, Progress::Resize]);
    assert!(start.elapsed() < Duration::from_secs(10), "no wait for a file system");
    node.assert_sound().await;

    let node = Node::new().await;
    node.cluster.edit(&node.name, vmid(TEMPLATE), |config| {
        let line = format!("{},ro=1", config.get("rootfs").expect("a root"));
        config.set("rootfs", &line).expect("fits");
    });
    let told = [Progress::Configure, Progress::ResizeOffline, Progress::Start];
    assert_eq!(steps_of(&node).await, told, "whoever waits is told before");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn failed_disk_growth_fails_the_creation() {
    let said = || ErrorKind::Failed("Failed to update the container's filesystem".into());
    for trouble in [Trouble::Before(said()), Trouble::After(said()), Trouble::Killed] {
        let node = Node::new().await;
        node.fault(Op::Resize, trouble);
        let record = node.create(1).await;
        assert_eq!(record.phase, Phase::Failed, "{record:?}");
        node.assert_clean().await;
    }
}

#[tokio::test(start_paused = true)]
async fn repeated_order_returns_the_same_sandbox() {
    let node = Node::new().await;
    // Twice in parallel, and once more later.
    let (first, second) = tokio::join!(node.create(1), node.create(1));
    assert_eq!(first, second);
    assert_eq!(node.create(1).await, first);
    // By its request alone, as after a controller lost its disk.
    let mut twin = order(2);
    twin.spec.request_id = "r-1".parse().expect("valid");
    let answer = node.sandboxes.create(twin.clone(), LONG).await.expect("replayed");
    assert_eq!(answer, first);
    // Even after it is deleted.
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    let answer = node.sandboxes.create(twin.clone(), LONG).await.expect("replayed");
    assert_eq!((answer.id, answer.phase), (id(1), Phase::Deleted));
    let answer = node.create(1).await;
    assert_eq!(answer.phase, Phase::Deleted);
    twin.body_digest = "1".repeat(64);
    let error = node.sandboxes.create(twin, LONG).await.expect_err("another body");
    assert_eq!(error.reason, Reason::RequestIdReused);
    assert_eq!(node.containers(), [] as [u32; 0]);
}

#[tokio::test(start_paused = true)]
async fn parallel_orders_with_one_request_id_make_one_sandbox() {
    let node = Node::new().await;
    let mut twin = order(2);
    twin.spec.request_id = "r-1".parse().expect("valid");
    let (first, second) = tokio::join!(node.create(1), node.sandboxes.create(twin, LONG));
    assert_eq!(first, second.expect("joined"));
    assert_eq!(node.containers().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn parallel_creations_of_one_template_all_come_up() {
    let node = Node::with(|_| {}, Faults::default()).await;
    let creations = (1..=10).map(|number| node.create(number));
    let records = futures_util::future::join_all(creations).await;
    for record in &records {
        assert_eq!(record.phase, Phase::Running, "{record:?}");
    }
    let mut vmids: Vec<_> = records.iter().map(|record| record.vmid).collect();
    vmids.sort_unstable();
    vmids.dedup();
    assert_eq!(vmids.len(), 10);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn reservation_holds_room_for_one_creation_and_expires() {
    let node = Node::with(|options| options.limits.clone_queue_max = 1, Faults::default()).await;
    let (snapshot, size) = ("base".parse().expect("valid"), Size::default());
    node.sandboxes.reserve(&id(1), &snapshot, size).await.expect("kept");
    node.sandboxes.reserve(&id(1), &snapshot, size).await.expect("kept anew");
    let tally = node.sandboxes.tally().await.expect("reads");
    assert_eq!((tally.queued, tally.memory_allocated), (1, 512 << 20), "it is reported");
    let error = node.sandboxes.reserve(&id(2), &snapshot, size).await.expect_err("full");
    assert_eq!(error.reason, Reason::QueueFull);
    let error = node.sandboxes.create(order(2), LONG).await.expect_err("full");
    assert_eq!(error.reason, Reason::QueueFull);
    node.running(1).await;
    // A known sandbox needs no reservation, and an unused reservation expires.
    node.sandboxes.reserve(&id(1), &snapshot, size).await.expect("is here");
    node.sandboxes.reserve(&id(2), &snapshot, size).await.expect("kept");
    tokio::time::sleep(Duration::from_secs(2)).await;
    node.running(3).await;
    node.sandboxes.reserve(&id(4), &snapshot, size).await.expect("kept");
    node.sandboxes.cancel_reservation(&id(4));
    node.running(5).await;
    let other = "other".parse().expect("valid");
    let error = node.sandboxes.reserve(&id(6), &other, size).await.expect_err("not here");
    assert_eq!(error.reason, Reason::SnapshotNotFound);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn caller_hang_up_does_not_cancel_the_creation() {
    let node = Node::new().await;
    let patience = Duration::from_millis(500);
    timeout(patience, node.create(1)).await.expect_err("still being made");
    assert_eq!(node.record(1).await.phase, Phase::Creating);
    // A repeated request finds the same creation under way.
    assert_eq!(node.running(1).await.vmid, vmid(100_000));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn creation_without_a_wait_returns_the_recorded_intent() {
    let node = Node::new().await;
    let record = node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
    assert_eq!((record.phase, record.boot), (Phase::Creating, 0));
    assert!(node.journal.get(&id(1)).await.expect("reads").is_some());
    assert_eq!(node.running(1).await.boot, 1);
}

#[tokio::test(start_paused = true)]
async fn creation_skips_a_taken_vmid() {
    let node = Node::new().await;
    node.add_foreign();
    // A vmid that the cluster's list does not show yet.
    node.fault(Op::Clone, Trouble::Before(ErrorKind::VmidTaken("CT 100000 exists".into())));
    assert_eq!(node.running(1).await.vmid, vmid(100_001));
    assert_eq!(node.running(2).await.vmid, vmid(100_002));
    assert_eq!(node.running(3).await.vmid, vmid(100_004));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn creation_waits_for_a_locked_template() {
    let node = Node::new().await;
    let locked = || Trouble::Before(ErrorKind::Locked("CT is locked (disk)".into()));
    for _ in 0..5 {
        node.fault(Op::Clone, locked());
    }
    node.running(1).await;
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn refused_creation_names_its_reason() {
    let node = Node::with(|options| options.limits.clone_queue_max = 4, Faults::default()).await;
    let refused = async |order: Order| {
        let error = node.sandboxes.create(order, LONG).await.expect_err("refused");
        assert!(!error.message.is_empty());
        (error.reason, error.retry_after.is_some())
    };
    let mut unknown = order(1);
    unknown.spec.snapshot = "other".parse().expect("valid");
    assert_eq!(refused(unknown).await, (Reason::SnapshotNotFound, false));
    node.cluster.set_quorate(false);
    assert_eq!(refused(order(1)).await, (Reason::NoQuorum, true));
    node.cluster.set_quorate(true);
    node.cluster.set_pmxcfs(&node.name, false);
    assert_eq!(refused(order(1)).await, (Reason::NoQuorum, true));
    node.cluster.set_pmxcfs(&node.name, true);
    node.cluster.set_room(&node.name, 1 << 20);
    assert_eq!(refused(order(1)).await, (Reason::StorageFull, false));
    node.cluster.set_room(&node.name, 1 << 40);
    // One clones, two wait, the fourth is too many: half of the places are for other teams.
    for number in 1..=3 {
        node.sandboxes.create(order(number), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(refused(order(4)).await, (Reason::QueueFull, true));
    // A known sandbox is still answered.
    node.cluster.set_quorate(false);
    assert_eq!(node.sandboxes.create(order(1), Duration::ZERO).await.expect("known").id, id(1));
    node.cluster.set_quorate(true);
    node.tasks.stopping().cancel();
    assert_eq!(refused(order(5)).await, (Reason::ShuttingDown, true));
    assert_eq!(node.journal.all().await.expect("reads").len(), 3, "no trace of the refused");
}

#[tokio::test(start_paused = true)]
async fn one_team_leaves_places_in_a_templates_queue_to_others() {
    let node = Node::with(|options| options.limits.clone_queue_max = 4, Faults::default()).await;
    let create = async |order: Order| node.sandboxes.create(order, Duration::ZERO).await;
    // One clones, two wait.
    for number in 1..=3 {
        create(order(number)).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let error = create(order(4)).await.expect_err("it has its share");
    assert_eq!(error.reason, Reason::QueueFull);
    assert!(error.message.contains("of this team"), "{}", error.message);
    create(of_team("blue", 5)).await.expect("there is a place");
    create(of_team("blue", 6)).await.expect_err("one is left for the next team");
    create(of_team("green", 7)).await.expect("there is a place");
    assert_eq!(node.sandboxes.tally().await.expect("reads").queued, 4);
    let error = create(of_team("white", 8)).await.expect_err("full");
    assert!(error.message.starts_with("4 creations wait"), "{}", error.message);
    node.idle().await;
    create(order(4)).await.expect("there are places again");
    node.idle().await;
    assert_eq!(node.sandboxes.live().len(), 6);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn creations_of_one_team_delay_another_teams_by_about_one_turn() {
    let one_start = |options: &mut Options| options.limits.starts_max = 1;
    let timed = async |node: &Node| {
        let begun = tokio::time::Instant::now();
        let record = node.sandboxes.create(of_team("blue", 100), LONG).await.expect("admitted");
        assert_eq!(record.phase, Phase::Running, "{record:?}");
        begun.elapsed()
    };
    let alone = timed(&Node::with(one_start, Faults::default()).await).await;

    let node = Node::with(one_start, Faults::default()).await;
    for number in 1..=30 {
        node.sandboxes.create(order(number), Duration::ZERO).await.expect("admitted");
    }
    // By now many wait for the template, and many more than one for the slot.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let live = node.sandboxes.live();
    let at = |progress| live.iter().filter(|record| record.progress == progress).count();
    let (to_clone, to_start) = (at(Progress::Queued), at(Progress::Configure));
    assert!(to_clone >= 10 && to_start >= 5, "{to_clone} and {to_start} wait");
    // The turn that is under way and one more, for the clone and for the start: less than two creations.
    // First come, first served it would come after all thirty.
    let beside_many = timed(&node).await;
    assert!(beside_many < alone * 4, "{beside_many:?}, alone {alone:?}");

    node.idle().await;
    let live = node.sandboxes.live();
    let running = live.iter().filter(|record| record.phase == Phase::Running);
    assert_eq!((live.len(), running.count()), (31, 31));
    node.assert_sound().await;
}

/// Order of another team.
fn of_team(team: &str, number: u8) -> Order {
    Order { team: team.parse().expect("valid"), ..order(number) }
}

#[tokio::test(start_paused = true)]
async fn cancelled_creation_is_undone() {
    for ms in [0, 100, 1000, 2000, 3500] {
        let node = Node::new().await;
        node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(ms)).await;
        let held = node.sandboxes.cancel(&id(1), 1, LONG).await.expect("cancelled");
        let held = held.expect("heard of");
        assert_eq!(held.phase, Phase::Failed, "after {ms} ms");
        let failure = held.failure.as_ref().expect("recorded");
        assert_eq!(failure.reason, Reason::CreateCancelled);
        node.assert_clean().await;
        // The attempt stays cancelled; the next one is admitted.
        assert_eq!(node.create(1).await.phase, Phase::Failed);
        let again = Order { attempt: 2, ..order(1) };
        let record = node.sandboxes.create(again, LONG).await.expect("admitted");
        assert_eq!((record.phase, record.attempt), (Phase::Running, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn attempt_can_be_cancelled_before_it_arrives_and_while_it_runs() {
    let mut node = Node::new().await;
    assert_eq!(node.sandboxes.cancel(&id(1), 2, LONG).await, Ok(None));
    node.restart().await;
    for attempt in [1, 2] {
        let late = Order { attempt, ..order(1) };
        let error = node.sandboxes.create(late, LONG).await.expect_err("cancelled");
        assert_eq!(error.reason, Reason::CreateCancelled);
    }
    let third = Order { attempt: 3, ..order(1) };
    let record = node.sandboxes.create(third, LONG).await.expect("admitted");
    assert_eq!(record.phase, Phase::Running);
    // No attempt up to 2 is here: the third one stays.
    let held = node.sandboxes.cancel(&id(1), 2, LONG).await.expect("noted");
    assert_eq!(held.map(|held| held.phase), Some(Phase::Running));
    let held = node.sandboxes.cancel(&id(1), 3, LONG).await.expect("deleted");
    assert_eq!(held.map(|held| held.phase), Some(Phase::Deleted));
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn attempt_out_of_order_is_refused() {
    let node = Node::new().await;
    let second = Order { attempt: 2, ..order(1) };
    node.sandboxes.create(second, LONG).await.expect("admitted");
    let error = node.sandboxes.create(order(1), LONG).await.expect_err("late");
    assert_eq!(error.reason, Reason::CreateCancelled);
    let third = Order { attempt: 3, ..order(1) };
    let error = node.sandboxes.create(third.clone(), LONG).await.expect_err("too early");
    assert_eq!(error.reason, Reason::SandboxBusy);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    let error = node.sandboxes.create(third, LONG).await.expect_err("deleted is final");
    assert_eq!(error.reason, Reason::SandboxDeleted);
}

#[tokio::test(start_paused = true)]
async fn stale_epoch_is_refused_even_after_an_agent_restart() {
    let mut node = Node::new().await;
    node.sandboxes.fence(3).await.expect("first");
    assert_eq!(node.sandboxes.fence(2).await.expect_err("stale").reason, Reason::StaleEpoch);
    node.restart().await;
    assert_eq!(node.sandboxes.fence(2).await.expect_err("stale").reason, Reason::StaleEpoch);
    node.sandboxes.fence(3).await.expect("the same");
    node.sandboxes.fence(4).await.expect("a later one");
}

#[tokio::test(start_paused = true)]
async fn vmid_lookup_tells_running_from_stopped_deleted_and_unknown() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let by_vmid = SandboxRef::Vmid(record.vmid);
    assert_eq!(node.sandboxes.up(&by_vmid), Ok(Arc::clone(&record)));
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    let reason_of = |name| node.sandboxes.up(name).expect_err("not running").reason;
    assert_eq!(reason_of(&by_vmid), Reason::SandboxNotRunning);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(reason_of(&by_vmid), Reason::SandboxDeleted);
    assert_eq!(reason_of(&SandboxRef::Vmid(vmid(100_099))), Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn created_sandbox_has_our_tag_and_its_templates_tags() {
    let node = Node::new().await;
    node.cluster
        .edit(&node.name, vmid(TEMPLATE), |config| config.set("tags", "web").expect("fits"));
    let record = node.running(1).await;
    let config = node.cluster.guests()[&record.vmid].config.clone();
    assert_eq!(config.get("tags"), Some("pve-sandbox;web"));
}

#[tokio::test(start_paused = true)]
async fn a_privileged_template_is_used_only_where_the_operator_allows_it() {
    let privileged = async |allowed: bool| {
        let allow = |options: &mut Options| options.templates[0].allowed.privileged = allowed;
        let node = Node::with(allow, Faults::default()).await;
        node.cluster.edit(&node.name, vmid(TEMPLATE), |config| {
            config.remove("unprivileged");
        });
        node
    };
    let refuses = privileged(false).await;
    assert!(refuses.sandboxes.cloneable().await.is_empty());
    let error = refuses.sandboxes.create(order(1), LONG).await.expect_err("privileged");
    assert_eq!(error.reason, Reason::SnapshotNotFound);
    assert!(error.message.contains("privileged"), "{error}");
    privileged(true).await.running(1).await;
}

#[tokio::test(start_paused = true)]
async fn template_with_a_forbidden_line_is_used_only_where_the_operator_allows_it() {
    for (key, line) in
        [("hookscript", "local:snippets/x"), ("mp0", "/etc,mp=/host"), ("dev0", "/dev/kvm")]
    {
        let with = async |allowed: bool| {
            let allow = |options: &mut Options| options.templates[0].allowed.unsafe_lines = allowed;
            let node = Node::with(allow, Faults::default()).await;
            node.cluster.edit(&node.name, vmid(TEMPLATE), |config| {
                config.set(key, line).expect("fits");
            });
            node
        };
        let refuses = with(false).await;
        assert!(refuses.sandboxes.cloneable().await.is_empty(), "{key}");
        let error = refuses.sandboxes.create(order(1), LONG).await.expect_err(key);
        assert_eq!(error.reason, Reason::SnapshotNotFound, "{key}");
        assert!(error.message.contains(&format!("{key}: {line}")), "{error}");
        assert_eq!(with(true).await.sandboxes.cloneable().await.len(), 1, "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_without_its_template_is_not_offered() {
    let two = |options: &mut Options| {
        let template = options.templates[0].clone();
        options.templates.push(Template { vmid: vmid(TEMPLATE + 1), ..template.clone() });
        options.templates.push(Template {
            snapshot: "other".parse().expect("valid"),
            vmid: vmid(TEMPLATE + 2),
            ..template
        });
    };
    let node = Node::with(two, Faults::default()).await;
    let offered = async || -> Vec<u32> {
        node.sandboxes.cloneable().await.iter().map(|template| template.vmid.get()).collect()
    };
    assert_eq!(offered().await, [TEMPLATE], "the others are missing");
    // An ordinary container is no template; a clone of it would copy all of it.
    node.add_foreign();
    let config = node.cluster.guests()[&vmid(FOREIGN)].config.clone();
    node.cluster.add_guest(&node.name, vmid(TEMPLATE + 2), config, false);
    assert_eq!(offered().await, [TEMPLATE]);
    let other = Order {
        spec: Spec { snapshot: "other".parse().expect("valid"), ..order(9).spec },
        ..order(9)
    };
    let error = node.sandboxes.create(other.clone(), LONG).await.expect_err("no template");
    assert_eq!(error.reason, Reason::SnapshotNotFound);
    // The existing templates of a snapshot are used, whatever the length of their queues.
    for number in 1..=3 {
        assert_eq!(node.running(number).await.template, vmid(TEMPLATE));
    }
    node.cluster.remove(vmid(TEMPLATE + 2));
    node.cluster.add_template(&node.name, vmid(TEMPLATE + 2));
    assert_eq!(offered().await, [TEMPLATE, TEMPLATE + 2]);
    let record = node.sandboxes.create(other, LONG).await.expect("admitted");
    assert_eq!(record.template, vmid(TEMPLATE + 2));
    // While configs cannot be read, the last known state is kept.
    node.cluster.set_pmxcfs(&node.name, false);
    assert_eq!(offered().await, [TEMPLATE, TEMPLATE + 2]);
}
