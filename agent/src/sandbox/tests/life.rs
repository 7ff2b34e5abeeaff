//! Start, stop, delete, ports, and how the reconciler handles what it finds.

use proto::{Invariant, Reason, id::SandboxRef, visibility::Visibility};

use super::*;
use crate::{
    pve::{ErrorKind, fake::Guest},
    sandbox::{
        access::expose::Reach,
        exec::{Execs, shims::Shims},
    },
};

/// Opens a port for everybody.
const PUBLIC: Reach = Reach { wanted: None, default: Visibility::Public };

#[tokio::test(start_paused = true)]
async fn stop_and_start_are_idempotent_and_count_boots() {
    let node = Node::new().await;
    let record = node.running(1).await;
    for _ in 0..2 {
        let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        assert_eq!((stopped.phase, stopped.boot), (Phase::Stopped, 1));
    }
    assert!(node.cluster.guests()[&record.vmid].pid.is_none());
    node.assert_sound().await;
    for _ in 0..2 {
        let started = node.sandboxes.start(&id(1), LONG).await.expect("started");
        assert_eq!((started.phase, started.boot, started.ip), (Phase::Running, 2, record.ip));
    }
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn failed_start_leaves_the_sandbox_stopped() {
    let node = Node::new().await;
    node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.fault(Op::Start, Trouble::After(ErrorKind::Failed("startup failed".into())));
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("fails");
    assert!(error.message.contains("startup failed"), "{error}");
    let record = node.record(1).await;
    assert_eq!(record.phase, Phase::Stopped);
    assert!(record.failure.is_some());
    node.assert_sound().await;
    let record = node.sandboxes.start(&id(1), LONG).await.expect("starts");
    assert_eq!((record.phase, record.boot, &record.failure), (Phase::Running, 3, &None));
}

#[tokio::test(start_paused = true)]
async fn delete_works_from_every_phase_and_is_idempotent() {
    for ms in [0, 500, 1500, 3000, 20_000] {
        let node = Node::new().await;
        node.sandboxes.create(order(1), Duration::ZERO).await.expect("admitted");
        tokio::time::sleep(Duration::from_millis(ms)).await;
        for _ in 0..2 {
            let gone = node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
            assert_eq!(gone.phase, Phase::Deleted, "after {ms} ms");
        }
        node.assert_clean().await;
    }
    let node = Node::new().await;
    node.running(1).await;
    // While it stops, and while it starts.
    node.sandboxes.stop(&id(1), Duration::ZERO).await.expect("under way");
    node.sandboxes.start(&id(1), Duration::ZERO).await.expect("under way");
    let gone = node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(gone.phase, Phase::Deleted);
    node.assert_clean().await;
    let error = node.sandboxes.delete(&id(9), LONG).await.expect_err("never heard of");
    assert_eq!(error.reason, Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn failed_delete_is_finished_by_the_reconciler() {
    let node = Node::new().await;
    node.running(1).await;
    node.fault(Op::Destroy, Trouble::Before(ErrorKind::Locked("CT is locked (backup)".into())));
    let error = node.sandboxes.delete(&id(1), LONG).await.expect_err("locked");
    assert_eq!(error.reason, Reason::ContainerLocked);
    assert_eq!(node.record(1).await.phase, Phase::Deleting);
    let running = node.sandboxes.up(&SandboxRef::Id(id(1)));
    assert_eq!(running.expect_err("going").reason, Reason::SandboxDeleted);
    node.reconcile().await;
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_container_that_lost_its_mark_is_never_destroyed() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.edit(&node.name, record.vmid, |config| {
        config.set_description("mine now").expect("fits");
    });
    let error = node.sandboxes.delete(&id(1), LONG).await.expect_err("not ours");
    assert_eq!(error.reason, Reason::NotOurs);
    node.reconciler().pass().await;
    assert_eq!(node.containers(), [100_000]);
    assert_eq!(node.record(1).await.phase, Phase::Deleting);
}

#[tokio::test(start_paused = true)]
async fn container_that_lost_its_mark_is_neither_stopped_nor_started() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.edit(&node.name, record.vmid, |config| {
        config.set_description("mine now").expect("fits");
    });
    let foreign = node.cluster.guests()[&record.vmid].clone();
    node.reconcile().await;
    let noted = node.record(1).await;
    let failure = noted.failure.as_ref().map(|failure| failure.reason);
    assert_eq!((noted.phase, failure), (Phase::Stopped, Some(Reason::NotOurs)));
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("not ours");
    assert_eq!(error.reason, Reason::NotOurs);
    node.sandboxes.stop(&id(1), LONG).await.expect("is stopped");
    assert_eq!(node.cluster.guests()[&record.vmid], foreign);
}

#[tokio::test(start_paused = true)]
async fn ports_are_exposed_and_hidden_by_name() {
    let mut node = Node::new().await;
    node.running(1).await;
    let (web, port) = ("web".parse::<proto::name::ServiceName>().expect("valid"), |n: u32| {
        proto::name::Port::try_from(n).expect("a port")
    });
    for _ in 0..2 {
        let record =
            node.sandboxes.expose(&id(1), web.clone(), port(80), PUBLIC).await.expect("opened");
        assert_eq!(record.services.get(&web), Some(&port(80)));
    }
    let error =
        node.sandboxes.expose(&id(1), web.clone(), port(81), PUBLIC).await.expect_err("taken");
    assert_eq!(error.reason, Reason::ServiceExists);
    node.restart().await;
    assert_eq!(node.record(1).await.services.len(), 1);
    let (record, closed) = node.sandboxes.hide(&id(1), web.clone()).await.expect("closed");
    assert!(record.services.is_empty());
    assert_eq!(closed, [(web.clone(), port(80))].into());
    let error = node.sandboxes.hide(&id(1), web.clone()).await.expect_err("not there");
    assert_eq!(error.reason, Reason::ServiceNotFound);
    for number in 1..=32 {
        let name = format!("s{number}").parse().expect("valid");
        node.sandboxes.expose(&id(1), name, port(number), PUBLIC).await.expect("opened");
    }
    let error =
        node.sandboxes.expose(&id(1), web.clone(), port(99), PUBLIC).await.expect_err("full");
    assert_eq!(error.reason, Reason::FieldInvalid);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    let error = node.sandboxes.expose(&id(1), web, port(99), PUBLIC).await.expect_err("gone");
    assert_eq!(error.reason, Reason::SandboxDeleted);
}

#[tokio::test(start_paused = true)]
async fn hiding_a_name_closes_its_port_under_all_names_and_no_other() {
    let name = |text: &str| text.parse::<proto::name::ServiceName>().expect("valid");
    let port = |number: u32| proto::name::Port::try_from(number).expect("a port");
    // By either name, and by a name that looks like the number of another one's port.
    for (hidden, closed) in [
        ("web", ["web", "www"].as_slice()),
        ("www", &["web", "www"]),
        ("81", &["81", "api"]),
        ("82", &["82"]),
    ] {
        let mut node = Node::new().await;
        node.running(1).await;
        let all = [("web", 80), ("www", 80), ("81", 8081), ("api", 8081), ("82", 81)];
        for (service, number) in all {
            node.sandboxes
                .expose(&id(1), name(service), port(number), PUBLIC)
                .await
                .expect("opened");
        }
        node.restart().await;
        let (record, gone) = node.sandboxes.hide(&id(1), name(hidden)).await.expect("closed");
        assert_eq!(gone.keys().map(ToString::to_string).collect::<Vec<_>>(), closed, "{hidden}");
        let number = *gone.values().next().expect("one");
        assert!(record.services.values().all(|open| *open != number), "{hidden}: {record:?}");
        assert_eq!(record.services.len() + gone.len(), all.len());
        node.restart().await;
        assert_eq!(node.record(1).await.services, record.services);
        let again = node.sandboxes.hide(&id(1), name(closed[0])).await;
        assert_eq!(again.expect_err("is closed").reason, Reason::ServiceNotFound, "{hidden}");
        // Opened again, it has only the new name.
        let (again, number) = (name("again"), number);
        let record =
            node.sandboxes.expose(&id(1), again.clone(), number, PUBLIC).await.expect("opened");
        let names = record.services.iter().filter(|(_, open)| **open == number);
        assert_eq!(names.map(|(name, _)| name).collect::<Vec<_>>(), [&again]);
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_found_down_is_recorded_as_stopped() {
    let node = Node::new().await;
    node.running(1).await;
    node.running(2).await;
    node.cluster.crash(&node.name);
    node.reconcile().await;
    for number in [1, 2] {
        let record = node.record(number).await;
        assert_eq!(record.phase, Phase::Stopped);
        assert!(record.failure.is_some());
        let record = node.sandboxes.start(&id(number), LONG).await.expect("starts");
        assert_eq!((record.phase, record.boot), (Phase::Running, 2));
    }
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn marked_container_without_a_record_is_quarantined() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let mut mark = record.mark();
    mark.sandbox_id = id(77);
    mark.vmid = vmid(100_050);
    let mut config = node.cluster.guests()[&record.vmid].config.clone();
    config.set_description(&mark.to_string()).expect("fits");
    node.cluster.add_guest(&node.name, vmid(100_050), config, false);
    let actions = node.reconciler().pass().await;
    assert_eq!(actions, [Action::Quarantine { vmid: vmid(100_050), mark }]);
    assert_eq!(node.containers(), [100_000, 100_050]);
    let (findings, _) = node.sandboxes.check().await;
    assert_eq!(findings.iter().map(|f| f.invariant).collect::<Vec<_>>(), [Invariant::I1]);
}

#[tokio::test(start_paused = true)]
async fn container_that_returns_after_its_deletion_is_destroyed() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let config = node.cluster.guests()[&record.vmid].config.clone();
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    // pmxcfs lost its last writes in a power cut.
    node.cluster.add_guest(&node.name, record.vmid, config, false);
    let mut reconciler = node.reconciler();
    assert_eq!(reconciler.pass().await, [], "once may be a moment's");
    let sweep = Action::DestroyOrphan { id: record.id, vmid: record.vmid };
    assert_eq!(reconciler.pass().await, [sweep]);
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn tombstones_are_forgotten_after_a_day() {
    let node = Node::new().await;
    node.running(1).await;
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.clock.forward(Duration::from_secs(23 * 3600));
    assert_eq!(node.reconcile().await, []);
    node.clock.forward(Duration::from_secs(2 * 3600));
    assert_eq!(node.reconcile().await.len(), 1);
    let error = node.sandboxes.get(&SandboxRef::Id(id(1))).await.expect_err("forgotten");
    assert_eq!(error.reason, Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn pages_list_every_sandbox_once() {
    let node = Node::new().await;
    for number in 1..=5 {
        node.running(number).await;
    }
    for number in [2, 4] {
        node.sandboxes.delete(&id(number), LONG).await.expect("deleted");
    }
    let (mut after, mut seen) = (None, Vec::new());
    loop {
        let (page, next) = node.sandboxes.page(after, 2).await.expect("reads");
        seen.extend(page.iter().map(|record| record.id));
        after = next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, [1, 2, 3, 4, 5].map(id));
}

/// Shims that report these sandboxes as running.
#[derive(Debug)]
struct Run(std::collections::BTreeSet<SandboxId>);

#[async_trait::async_trait]
impl Shims for Run {
    async fn find(&self, _: &Record) -> Option<tokio::net::UnixStream> {
        None
    }

    async fn start(&self, _: &Record) -> std::io::Result<tokio::net::UnixStream> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    async fn running(&self) -> std::collections::BTreeSet<SandboxId> {
        self.0.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn shim_that_outlives_its_sandbox_is_reported() {
    let node = Node::new().await;
    node.running(1).await;
    let shims = Arc::new(Run([id(1), id(2)].into()));
    let execs = Execs::new(Arc::clone(&node.sandboxes), shims);
    let subjects = |findings: Vec<crate::sandbox::drift::fsck::Finding>| -> Vec<String> {
        findings.into_iter().map(|finding| finding.subject).collect()
    };
    assert_eq!(subjects(execs.check().await), [id(2).to_string()], "nobody knows that one");
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(subjects(execs.check().await), [id(2).to_string()], "it has time to see that");
    node.clock.forward(Duration::from_secs(61));
    assert_eq!(subjects(execs.check().await), [id(1).to_string(), id(2).to_string()]);
}

#[tokio::test(start_paused = true)]
async fn sandboxes_that_never_get_ready_keep_no_slots_from_other_teams() {
    let node = Node::new().await;
    for number in 1..=6 {
        node.running(number).await;
        node.sandboxes.stop(&id(number), LONG).await.expect("stopped");
    }
    let of_blue = Order { team: "blue".parse().expect("valid"), ..order(7) };
    let blue = node.sandboxes.create(of_blue, LONG).await.expect("admitted");
    node.sandboxes.stop(&blue.id, LONG).await.expect("stopped");
    // From here on none gets its address within the time for its answer.
    node.cluster.set_pace(Pace { boot: LONG, ..Pace::RECORDED });
    for number in 1..=6 {
        node.sandboxes.start(&id(number), Duration::ZERO).await.expect("known");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = tokio::time::Instant::now();
    node.sandboxes.start(&blue.id, Duration::ZERO).await.expect("known");
    let of_others = |guest: &Guest| guest.config.mark() != Some(blue.mark());
    let own = until_all(&node, begun, |guest| guest.pid.is_some() || of_others(guest)).await;
    assert!(own < Duration::from_secs(5), "{own:?}: a slot was left for it");
    let starts = |guest: &Guest| guest.pid.is_some() || guest.config.is_template();
    let all = until_all(&node, begun, starts).await;
    assert!(all < Duration::from_secs(20), "{all:?}: those that boot have given theirs back");
}

/// Waits until all guests are so, for less than a sandbox's time to answer; returns the time since `begun`.
async fn until_all(
    node: &Node,
    begun: tokio::time::Instant,
    are: impl Fn(&Guest) -> bool,
) -> Duration {
    while !node.cluster.guests().values().all(&are) {
        assert!(begun.elapsed() < node.options.limits.answer, "still not started");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    begun.elapsed()
}
