//! Changes of a sandbox's size.

use proto::{Progress, Reason};

use super::*;
use crate::{
    load::HostLoad,
    pve::{ContainerConfig, ErrorKind, fake::KernelLimits},
    sandbox::lifecycle::resize::Resize,
};

fn size(cpu_cores: u32, memory_mib: u32, disk_gib: u32) -> Size {
    Size { cpu_cores, memory_mib, disk_gib }
}

impl Node {
    async fn resize(&self, number: u8, size: Size) -> Result<Arc<Record>> {
        let asked = Resize { size, revision: None };
        self.sandboxes.resize(&id(number), asked, LONG).await
    }

    /// Size that the container of the record has.
    fn given(&self, record: &Record) -> (Option<u32>, u32, u32) {
        let config = self.cluster.guests()[&record.vmid].config.clone();
        (config.cores(), config.memory_mib(), config.rootfs_gib())
    }

    /// Checks that the kernel holds the container to what its record says.
    fn assert_limits(&self, record: &Record) {
        let has = self.cluster.guests()[&record.vmid].limits;
        let Size { cpu_cores, memory_mib, .. } = record.size;
        assert_eq!(has, KernelLimits { cores: Some(cpu_cores), memory_mib });
    }

    async fn intend(&self, progress: Progress) {
        let change = move |record: &mut Record| record.progress = progress;
        self.sandboxes.records.change(&id(1), change).await.expect("written");
    }

    async fn reason(&self, number: u8, size: Size) -> Reason {
        self.resize(number, size).await.expect_err("refused").reason
    }
}

#[tokio::test(start_paused = true)]
async fn running_and_stopped_sandboxes_change_their_size() {
    let node = Node::new().await;
    let before = node.running(1).await;
    let record = node.resize(1, size(3, 2048, 0)).await.expect("larger");
    assert_eq!(record.size, size(3, 2048, before.size.disk_gib));
    assert_eq!(node.given(&record), (Some(3), 2048, 8));
    assert_eq!((record.phase, record.boot, record.resizing), (Phase::Running, 1, None));
    let record = node.resize(1, size(0, 512, 9)).await.expect("less memory, more disk");
    assert_eq!((record.size, node.given(&record)), (size(3, 512, 9), (Some(3), 512, 9)));
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    let record = node.resize(1, size(1, 0, 12)).await.expect("stopped");
    assert_eq!((record.size, node.given(&record)), (size(1, 512, 12), (Some(1), 512, 12)));
    let again = node.resize(1, size(1, 512, 12)).await.expect("has it");
    assert_eq!(again.revision, record.revision, "nothing to write");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn wrong_sizes_and_phases_change_nothing() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let error = node.resize(1, size(0, 0, 7)).await.expect_err("smaller disk");
    assert_eq!(error.field.as_deref(), Some("sandbox.size.disk_gib"));
    assert!(error.message.contains("at least 8"), "{error}");
    let stale = Resize { size: size(2, 0, 0), revision: Some(record.revision + 1) };
    let error = node.sandboxes.resize(&id(1), stale, LONG).await.expect_err("another revision");
    assert_eq!(error.reason, Reason::RevisionConflict);
    assert_eq!(node.record(1).await, record);
    node.cluster.use_memory(record.vmid, 600 << 20);
    assert_eq!(node.reason(1, size(0, 599, 0)).await, Reason::MemoryInUse);
    node.resize(1, size(0, 600, 0)).await.expect("just enough");
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    assert_eq!(node.reason(1, size(0, 700, 0)).await, Reason::SandboxPaused);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.reason(1, size(0, 700, 0)).await, Reason::SandboxDeleted);
    assert_eq!(node.reason(2, size(0, 700, 0)).await, Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn growth_is_admitted_as_a_creation_is() {
    let node = Node::new().await;
    let first = node.running(1).await;
    node.running(2).await;
    let total = 4 * first.size.memory_bytes();
    let host = HostLoad { memory_total: total, memory_available: total, ..HostLoad::default() };
    let (_sender, load) = tokio::sync::watch::channel(host);
    node.sandboxes.watch_host(load);
    let unit = first.size.memory_mib;
    // Twice the host's memory may be given away: 8 units, of which two are.
    assert_eq!(node.reason(1, size(0, 9 * unit, 0)).await, Reason::NeverFits);
    assert_eq!(node.reason(1, size(0, 8 * unit, 0)).await, Reason::MemoryFull);
    let all = futures_util::future::join(
        node.resize(1, size(0, 4 * unit, 0)),
        node.resize(2, size(0, 5 * unit, 0)),
    );
    let (one, two) = all.await;
    assert_eq!([one, two].iter().filter(|grown| grown.is_ok()).count(), 1, "only one fits");
    assert!(node.sandboxes.memory_given() <= 2 * total);
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!(node.reason(1, size(0, 8 * unit, 0)).await, Reason::MemoryFull);
}

#[tokio::test(start_paused = true)]
async fn stopped_sandbox_starts_only_where_its_memory_fits() {
    let node = Node::new().await;
    let first = node.running(1).await;
    node.running(2).await;
    let total = first.size.memory_bytes();
    let host = HostLoad { memory_total: total, memory_available: total, ..HostLoad::default() };
    let (_sender, load) = tokio::sync::watch::channel(host);
    node.sandboxes.watch_host(load);
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    let unit = first.size.memory_mib;
    // Twice the host's memory may be given away. What the first has left goes to the second.
    node.resize(2, size(0, 2 * unit, 0)).await.expect("fits");
    let before = node.record(1).await;
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("full");
    assert_eq!(error.reason, Reason::MemoryFull, "{error}");
    assert_eq!(node.record(1).await, before, "nothing was begun");
    node.resize(2, size(0, unit, 0)).await.expect("less");
    node.sandboxes.start(&id(1), LONG).await.expect("there is room");
    assert_eq!(node.sandboxes.memory_given(), 2 * total);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn limits_that_failed_once_are_set_again() {
    let mut node = Node::new().await;
    node.running(1).await;
    let failed = || ErrorKind::Failed("it broke".into());
    let troubles = [Trouble::Before(failed()), Trouble::After(failed()), Trouble::Killed];
    for (cpu_cores, trouble) in (2..).zip(troubles) {
        node.fault(Op::Set, trouble.clone());
        let record = node.resize(1, size(cpu_cores, 2048, 9)).await.expect("the second time");
        assert_eq!(record.size, size(cpu_cores, 2048, 9), "{trouble:?}");
        assert_eq!(node.given(&record), (Some(cpu_cores), 2048, 9), "{trouble:?}");
        node.assert_limits(&record);
    }
    // An agent that ends while `pct` sets them.
    node.fault(Op::Set, Trouble::Killed);
    node.fault(Op::Set, Trouble::Before(ErrorKind::NoQuorum("none".into())));
    assert_eq!(node.reason(1, size(1, 512, 0)).await, Reason::NoQuorum);
    assert_eq!(node.record(1).await.resizing, Some(size(1, 512, 9)), "to be settled");
    node.restart().await;
    node.reconcile().await;
    let record = node.record(1).await;
    assert_eq!((record.size, record.resizing), (size(1, 512, 9), None));
    node.assert_limits(&record);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn limits_that_pve_does_not_set_stay_as_they_are() {
    let node = Node::new().await;
    let before = node.running(1).await;
    for _ in 0..2 {
        node.fault(Op::Set, Trouble::Before(ErrorKind::Failed("it broke".into())));
    }
    assert_eq!(node.reason(1, size(4, 2048, 9)).await, Reason::PctFailed);
    let record = node.record(1).await;
    assert_eq!(record.size, Size { disk_gib: 9, ..before.size }, "the disk had grown before");
    assert_eq!((record.resizing, record.progress), (None, Progress::Done));
    node.assert_limits(&record);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn growth_that_was_cut_short_is_finished_by_another() {
    let mut node = Node::new().await;
    node.running(1).await;
    node.fault(Op::Resize, Trouble::Killed);
    assert_eq!(node.reason(1, size(0, 0, 12)).await, Reason::PctFailed);
    node.restart().await;
    assert_eq!(node.record(1).await.size.disk_gib, 12, "as the config says");
    let error = node.resize(1, size(0, 0, 12)).await.expect_err("it may not be finished");
    assert!(error.message.contains("must be more than 12"), "{error}");
    let record = node.resize(1, size(0, 0, 13)).await.expect("finished");
    assert_eq!((record.size.disk_gib, record.disk_unfinished), (13, false));
    node.resize(1, size(0, 0, 13)).await.expect("has it");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn size_that_an_operator_gave_stays_unless_another_is_asked_for() {
    let node = Node::new().await;
    let before = node.running(1).await;
    let give = |mib: &str| {
        node.cluster.edit(&node.name, before.vmid, |config| {
            config.set("memory", mib).expect("one line");
        });
    };
    give("4096");
    node.cluster.use_memory(before.vmid, 3 << 30);
    let record = node.resize(1, size(2, 0, 0)).await.expect("cores alone");
    assert_eq!((record.size.memory_mib, node.given(&record).1), (4096, 4096));
    assert_eq!(node.reason(1, size(0, 2048, 0)).await, Reason::MemoryInUse);
    node.cluster.use_memory(before.vmid, 64 << 20);
    give("1024");
    let record = node.resize(1, size(0, 1024, 0)).await.expect("has it");
    assert_eq!(record.size.memory_mib, 1024, "the record follows");
    give("512");
    let record = node.resize(1, size(0, 1024, 0)).await.expect("given again");
    assert_eq!(node.given(&record).1, 1024);
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_is_handed_over_keeps_its_intent() {
    let node = Node::new().await;
    node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    for progress in [Progress::Export, Progress::Release] {
        node.intend(progress).await;
        assert_eq!(node.reason(1, size(2, 0, 0)).await, Reason::SandboxBusy, "{progress:?}");
        assert_eq!(node.record(1).await.progress, progress);
    }
    node.intend(Progress::Import).await;
    let record = node.resize(1, size(2, 0, 0)).await.expect("connected first");
    assert_eq!((record.progress, node.given(&record).0), (Progress::Done, Some(2)));
}

#[tokio::test(start_paused = true)]
async fn locked_container_keeps_its_size() {
    let node = Node::new().await;
    let before = node.running(1).await;
    let lock = |config: &mut ContainerConfig| config.set("lock", "backup").expect("one line");
    node.cluster.edit(&node.name, before.vmid, lock);
    assert_eq!(node.reason(1, size(2, 2048, 9)).await, Reason::ContainerLocked);
    let record = node.record(1).await;
    assert_eq!((record.size, record.resizing), (before.size, None));
}

#[tokio::test(start_paused = true)]
async fn storage_without_room_grows_no_disk() {
    let node = Node::new().await;
    let before = node.running(1).await;
    node.cluster.set_room(&node.name, 0);
    assert_eq!(node.reason(1, size(0, 0, 12)).await, Reason::StorageFull);
    assert_eq!(node.record(1).await.size, before.size);
    node.resize(1, size(2, 0, 0)).await.expect("needs no room");
}

#[tokio::test(start_paused = true)]
async fn different_sizes_at_the_same_time_are_given_one_after_the_other() {
    let node = Node::new().await;
    node.running(1).await;
    let asked = (1..=5).map(|n| node.resize(1, size(n, 0, 0)));
    for (n, given) in (1..).zip(futures_util::future::join_all(asked).await) {
        assert_eq!(given.expect("given").size.cpu_cores, n, "each caller sees what it asked for");
    }
    node.assert_sound().await;
}
