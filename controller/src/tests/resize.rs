//! Changes of a sandbox's size.

use proto::{Reason, sandbox::v1::*, update};
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::{node::calls::Call, placement::Limits};

impl Lab {
    pub(super) async fn resize(
        &self,
        id: &str,
        size: Size,
        fields: &[&str],
    ) -> Result<Sandbox, Status> {
        let change = Sandbox { id: id.into(), size: Some(size), ..Sandbox::default() };
        let answer = self.api().update_sandbox(update::request(change, fields)).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }
}

#[tokio::test(start_paused = true)]
async fn size_is_changed_on_the_node_and_logged() {
    let lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let size = Size { cpu_cores: 4, memory_mib: 4096, disk_gib: 20 };
    let now = lab.resize(&made.id, size, &["size"]).await.expect("larger");
    assert_eq!(now.size, Some(size));
    let memory = Size { memory_mib: 512, cpu_cores: 9, disk_gib: 1 };
    let now = lab.resize(&made.id, memory, &["size.memory_mib"]).await.expect("less memory");
    assert_eq!(now.size, Some(Size { memory_mib: 512, ..size }), "only what the mask names");
    assert_eq!(lab.get(&made.id).await.expect("known").size, now.size);
    events::settled(&lab).await;
    let events = events::of(&lab, &made.id, 0).await;
    let resized = events.iter().filter(|event| event.kind() == EventKind::Resized);
    assert_eq!(resized.count(), 2, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn smaller_disk_and_mixed_updates_reach_no_node() {
    let lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let size = Size { disk_gib: 20, ..Size::default() };
    lab.resize(&made.id, size, &["size.disk_gib"]).await.expect("larger");
    let smaller = Size { disk_gib: 19, ..Size::default() };
    let status = lab.resize(&made.id, smaller, &["size"]).await.expect_err("smaller");
    assert!(status.message().contains("sandbox.size.disk_gib must be at least 20"), "{status}");
    for fields in [&["size", "name"][..], &["size.cpu_cores"]] {
        let refused = lab.resize(&made.id, Size { disk_gib: 21, ..Size::default() }, fields).await;
        assert_eq!(reason(refused), Reason::FieldInvalid, "{fields:?}");
    }
    assert_eq!(lab.get(&made.id).await.expect("known").size.expect("a size").disk_gib, 20);
}

impl Lab {
    /// Lab whose nodes give 4 cores and 8 GiB each.
    async fn of_small_nodes() -> Self {
        let mut lab = Self::new().await;
        lab.placement =
            Limits { cpu_overcommit: 0.5, memory_overcommit: 0.25, ..Limits::default() };
        lab.start().await;
        lab
    }

    /// Creates a sandbox with so many cores on a node.
    async fn create_on(&self, node: &str, request_id: &str, cpu_cores: u32) -> Sandbox {
        let size = Some(Size { cpu_cores, memory_mib: 512, disk_gib: 0 });
        let request = CreateSandboxRequest { node: node.into(), size, ..request(request_id) };
        create(&mut self.api(), request).await.expect("made")
    }

    async fn start_sandbox(&self, id: &str) -> Result<Sandbox, Status> {
        let request = StartSandboxRequest { id: id.into() };
        let answer = self.api().start_sandbox(request).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }

    async fn stop_sandbox(&self, id: &str) {
        let request = StopSandboxRequest { id: id.into(), ..StopSandboxRequest::default() };
        self.api().stop_sandbox(request).await.expect("stopped");
    }

    /// Waits until the node reports so many cores of its sandboxes, and nothing else is reserved there.
    async fn until_given(&self, node: &str, cores: u32) {
        let name = node.parse().expect("a node");
        let nodes = self.domain().nodes();
        let mut news = nodes.news();
        let on = nodes.get(&name).expect("a node");
        let reported = async {
            while nodes.cores_given(&on) != (f64::from(cores), 0) {
                news.changed().await.expect("nodes");
            }
        };
        let in_time = timeout(Duration::from_mins(1), reported).await;
        in_time.unwrap_or_else(|_| panic!("{:?} cores, not {cores}", nodes.cores_given(&on)));
    }
}

fn cores(cpu_cores: u32) -> Size {
    Size { cpu_cores, ..Size::default() }
}

#[tokio::test(start_paused = true)]
async fn new_size_has_the_bounds_of_its_node() {
    let lab = Lab::of_small_nodes().await;
    let id = lab.create_on("n2", "r1", 1).await.id;
    lab.create_on("n2", "r2", 2).await;
    lab.until_given("n2", 3).await;
    let memory = |memory_mib| Size { memory_mib, ..Size::default() };
    for (size, field, expected) in [
        (cores(5), "size.cpu_cores", Reason::NeverFits),
        (cores(3), "size.cpu_cores", Reason::NoCapacity),
        (memory(8 * 1024 + 1), "size.memory_mib", Reason::NeverFits),
        (memory(8 * 1024 - 511), "size.memory_mib", Reason::MemoryFull),
    ] {
        let status = lab.resize(&id, size, &[field]).await.expect_err("too large");
        assert!(status.message().starts_with("node n2 "), "{status}");
        assert_eq!(daemon::status::reason(&status), Some(expected), "{size:?}: {status}");
    }
    let has = lab.get(&id).await.expect("known").size;
    assert_eq!(has, Some(Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 }));
    lab.resize(&id, cores(2), &["size.cpu_cores"]).await.expect("fits");
    lab.resize(&id, memory(8 * 1024 - 512), &["size.memory_mib"]).await.expect("fits");
    lab.resize(&id, cores(1), &["size.cpu_cores"]).await.expect("less always fits");
}

#[tokio::test(start_paused = true)]
async fn of_sizes_that_grow_at_once_as_many_are_admitted_as_fit() {
    let lab = Lab::of_small_nodes().await;
    let mut ids = Vec::new();
    for request_id in ["r1", "r2", "r3"] {
        ids.push(lab.create_on("n1", request_id, 1).await.id);
    }
    lab.until_given("n1", 3).await;
    let grown = ids.iter().map(|id| lab.resize(id, cores(2), &["size.cpu_cores"]));
    let grown = futures_util::future::join_all(grown).await;
    let (fit, refused): (Vec<_>, Vec<_>) = grown.into_iter().partition(Result::is_ok);
    assert_eq!(fit.len(), 1, "one core was left: {refused:?}");
    for refusal in refused {
        assert_eq!(reason(refusal), Reason::NoCapacity);
    }
    // The reservation ends with a report that includes it.
    lab.until_given("n1", 4).await;
}

#[tokio::test(start_paused = true)]
async fn stopped_sandbox_starts_only_where_there_is_room() {
    let lab = Lab::of_small_nodes().await;
    let first = lab.create_on("n3", "r1", 3).await.id;
    lab.stop_sandbox(&first).await;
    lab.until_given("n3", 0).await;
    // It counts for nothing, so only what could never start is refused.
    lab.resize(&first, cores(4), &["size.cpu_cores"]).await.expect("it is stopped");
    assert_eq!(reason(lab.resize(&first, cores(5), &["size.cpu_cores"]).await), Reason::NeverFits);
    let second = lab.create_on("n3", "r2", 1).await.id;
    lab.until_given("n3", 1).await;
    assert_eq!(reason(lab.start_sandbox(&first).await), Reason::NoCapacity);
    assert_eq!(lab.get(&first).await.expect("known").phase(), Phase::Stopped);
    lab.stop_sandbox(&second).await;
    lab.until_given("n3", 0).await;
    lab.start_sandbox(&first).await.expect("there is room");
    lab.until_given("n3", 4).await;
    lab.start_sandbox(&first).await.expect("what runs needs no room");
}

impl Lab {
    /// Two stopped sandboxes of three cores each on a node that has room for one, and begins no start.
    async fn with_starts_that_wait() -> (Self, [String; 2]) {
        let lab = Self::of_small_nodes().await;
        let mut ids = [const { String::new() }; 2];
        for (id, request_id) in ids.iter_mut().zip(["r1", "r2"]) {
            *id = lab.create_on("n3", request_id, 3).await.id;
            lab.stop_sandbox(id).await;
            lab.until_given("n3", 0).await;
        }
        lab.agents[2].faults(|faults| faults.unanswered = Some(Call::StartSandbox));
        (lab, ids)
    }

    /// Asks for a start and hangs up.
    async fn start_and_hang_up(&self, id: &str) {
        let started = timeout(Duration::from_secs(1), self.start_sandbox(id)).await;
        started.expect_err("it waits");
    }

    /// Sets the phase of a sandbox on its node, in its next boot.
    fn boot(&self, id: &str, phase: Phase) {
        let agent = self.holder(id);
        let mut sandbox = agent.living().into_iter().find(|s| s.id == id).expect("it is there");
        sandbox.boot += 1;
        sandbox.set_phase(phase);
        agent.put(sandbox);
    }
}

#[tokio::test(start_paused = true)]
async fn start_that_waits_on_its_node_counts_until_it_has_begun() {
    let (lab, [waits, other]) = Lab::with_starts_that_wait().await;
    lab.start_and_hang_up(&waits).await;
    // Its own calls end without an answer meanwhile.
    sleep(Duration::from_mins(1)).await;
    assert_eq!(reason(lab.start_sandbox(&other).await), Reason::NoCapacity);
    // Whoever asks again needs no second room.
    lab.start_and_hang_up(&waits).await;
    assert_eq!(reason(lab.start_sandbox(&other).await), Reason::NoCapacity);
    // Without the reservation, as the fake counts nothing that is STARTING.
    lab.boot(&waits, Phase::Starting);
    lab.until_given("n3", 0).await;
    lab.boot(&waits, Phase::Running);
    lab.until_given("n3", 3).await;
    assert_eq!(reason(lab.start_sandbox(&other).await), Reason::NoCapacity);
}

#[tokio::test(start_paused = true)]
async fn start_is_reserved_no_longer_than_until_it_begins() {
    let (lab, [boots, _]) = Lab::with_starts_that_wait().await;
    let asked = Instant::now();
    lab.start_and_hang_up(&boots).await;
    lab.boot(&boots, Phase::Starting);
    lab.until_given("n3", 0).await;
    assert!(asked.elapsed() < Duration::from_secs(10), "the call has no answer yet");
}

#[tokio::test(start_paused = true)]
async fn start_that_never_begins_counts_no_longer_than_its_node_lets_it_wait() {
    let (lab, [waits, other]) = Lab::with_starts_that_wait().await;
    lab.start_and_hang_up(&waits).await;
    sleep(Duration::from_mins(6)).await;
    assert_eq!(reason(lab.start_sandbox(&other).await), Reason::NoCapacity);
    sleep(Duration::from_mins(1)).await;
    lab.until_given("n3", 0).await;
    lab.agents[2].faults(|faults| faults.unanswered = None);
    lab.start_sandbox(&other).await.expect("there is room");
}
