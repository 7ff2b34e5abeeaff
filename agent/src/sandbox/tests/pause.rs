//! Pausing, resuming and waking, and everything that goes wrong on the way.

use proto::{
    Reason,
    id::SandboxRef,
    update::{Update, WakeOnPatch},
};

use super::*;
use crate::{
    journal::WakeOn,
    pve::{ErrorKind, fake::Guest, pause_lock},
    sandbox::Wake,
};

impl Node {
    async fn paused(&self, number: u8) -> Arc<Record> {
        self.running(number).await;
        let record = self.sandboxes.pause(&id(number), false, LONG).await.expect("paused");
        assert_eq!(record.phase, Phase::Paused);
        record
    }

    fn guest(&self, record: &Record) -> Guest {
        self.cluster.guests()[&record.vmid].clone()
    }

    async fn wake(&self, number: u8, by: Wake) -> Result<Arc<Record>, Error> {
        self.sandboxes.wake(&SandboxRef::Id(id(number)), by).await
    }

    /// Asserts that nothing of a pause is left on the host.
    async fn assert_awake(&self, record: &Record) {
        // The lock is removed after the answer; paused time passes by itself.
        while !self.sandboxes.busy().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.reconcile().await;
        let guest = self.guest(record);
        assert!(
            !guest.frozen && !pause_lock::is_noted(&guest.config) && guest.config.lock().is_none()
        );
        self.assert_sound().await;
    }
}

#[tokio::test(start_paused = true)]
async fn pause_and_resume_are_idempotent_and_keep_the_init_process() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let pid = node.guest(&record).pid;
    for _ in 0..2 {
        let paused = node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        assert_eq!((paused.phase, paused.boot, &paused.failure), (Phase::Paused, 1, &None));
        let guest = node.guest(&record);
        assert!(guest.frozen && pause_lock::is_held(&guest.config));
    }
    assert_eq!(node.reconcile().await, [], "it is as it is to be");
    node.assert_sound().await;
    let tally = node.sandboxes.tally().await.expect("reads");
    assert_eq!((tally.running, tally.memory_allocated), (0, 512 << 20), "its memory is kept");
    for _ in 0..2 {
        let resumed = node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
        assert_eq!((resumed.phase, resumed.boot), (Phase::Running, 1));
        assert!(!node.guest(&record).frozen);
    }
    node.assert_awake(&record).await;
    assert_eq!(node.guest(&record).pid, pid);
}

#[tokio::test(start_paused = true)]
async fn start_is_refused_while_paused_and_pause_while_stopped() {
    let node = Node::new().await;
    node.paused(1).await;
    assert!(node.sandboxes.up(&SandboxRef::Id(id(1))).is_ok(), "it is booted");
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("is up");
    assert_eq!(error.reason, Reason::SandboxPaused);
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    for error in [
        node.sandboxes.pause(&id(1), true, LONG).await.expect_err("stopped"),
        node.sandboxes.resume(&id(1), LONG).await.expect_err("stopped"),
        node.wake(1, Wake::Http).await.expect_err("stopped"),
    ] {
        assert_eq!(error.reason, Reason::SandboxNotRunning, "{error}");
    }
    let error = node.sandboxes.pause(&id(9), false, LONG).await.expect_err("nobody");
    assert_eq!(error.reason, Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn paused_sandbox_can_be_stopped_started_and_deleted() {
    let node = Node::new().await;
    let record = node.paused(1).await;
    let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!(stopped.phase, Phase::Stopped);
    node.assert_awake(&record).await;
    node.sandboxes.start(&id(1), LONG).await.expect("started");
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.reconcile().await;
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_does_not_freeze_keeps_running() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.fault(Op::Freeze, Trouble::Hangs);
    let error = node.sandboxes.pause(&id(1), false, LONG).await.expect_err("stuck");
    assert_eq!(error.reason, Reason::FreezeFailed);
    let after = node.record(1).await;
    assert_eq!(after.phase, Phase::Running);
    assert_eq!(after.failure.as_ref().expect("recorded").reason, Reason::FreezeFailed);
    node.assert_awake(&record).await;
    // The next pause succeeds.
    let paused = node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    assert_eq!((paused.phase, &paused.failure), (Phase::Paused, &None));
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_does_not_freeze_is_stopped_if_requested() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.fault(Op::Freeze, Trouble::Hangs);
    let stopped = node.sandboxes.pause(&id(1), true, LONG).await.expect("stopped");
    assert_eq!(stopped.phase, Phase::Stopped);
    assert_eq!(stopped.failure.as_ref().expect("told").reason, Reason::FreezeFailed);
    node.assert_awake(&record).await;
}

#[tokio::test(start_paused = true)]
async fn pause_leaves_a_foreign_lock_and_container_alone() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.edit(&node.name, record.vmid, |c| c.set("lock", "backup").expect("fits"));
    let error = node.sandboxes.pause(&id(1), true, LONG).await.expect_err("a backup is made");
    assert_eq!(error.reason, Reason::ContainerLocked);
    node.reconcile().await;
    assert_eq!(node.guest(&record).config.lock(), Some("backup"));
    assert!(!node.guest(&record).frozen);
    assert_eq!(node.record(1).await.phase, Phase::Running);
    node.cluster.edit(&node.name, record.vmid, |c| c.remove("lock"));
    node.cluster.edit(&node.name, record.vmid, |c| c.set_description("mine now").expect("fits"));
    let foreign = node.guest(&record);
    let error = node.sandboxes.pause(&id(1), true, LONG).await.expect_err("not ours");
    assert_eq!(error.reason, Reason::NotOurs);
    node.reconcile().await;
    assert_eq!(node.guest(&record), foreign);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn pause_and_resume_work_without_quorum_and_the_lock_follows() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.set_quorate(false);
    let paused = node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    assert_eq!(paused.phase, Phase::Paused);
    assert!(node.guest(&record).frozen && !pause_lock::is_held(&node.guest(&record).config));
    node.cluster.set_quorate(true);
    node.reconcile().await;
    assert!(node.guest(&record).frozen && pause_lock::is_held(&node.guest(&record).config));
    node.assert_sound().await;
    node.cluster.set_quorate(false);
    let resumed = node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    assert_eq!(resumed.phase, Phase::Running);
    assert!(!node.guest(&record).frozen);
    node.cluster.set_quorate(true);
    node.assert_awake(&record).await;
}

#[tokio::test(start_paused = true)]
async fn pause_survives_an_agent_restart_but_not_a_node_reboot() {
    let mut node = Node::new().await;
    let record = node.paused(1).await;
    node.restart().await;
    assert_eq!(node.reconcile().await, []);
    assert_eq!(node.record(1).await.phase, Phase::Paused);
    node.cluster.crash(&node.name);
    node.restart().await;
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!(after.phase, Phase::Stopped);
    assert_eq!(
        after.failure.as_ref().expect("told").message,
        "its node was rebooted while it was paused; its memory is gone, its disk is kept"
    );
    node.assert_awake(&record).await;
    let started = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!((started.phase, started.boot), (Phase::Running, 2));
}

#[tokio::test(start_paused = true)]
async fn wake_rule_resumes_the_sandbox_once_and_refuses_other_causes() {
    let node = Node::new().await;
    let record = node.paused(1).await;
    assert_eq!(record.wake_on, WakeOn { http: true, ssh: false, exec: true });
    let error = node.wake(1, Wake::Ssh).await.expect_err("not by ssh");
    assert_eq!(error.reason, Reason::SandboxPaused);
    let before = node.record(1).await.revision;
    let woken = futures_util::future::join_all((0..20).map(|number| {
        let by = if number % 2 == 0 { Wake::Http } else { Wake::Exec };
        node.wake(1, by)
    }));
    for woken in woken.await {
        assert_eq!(woken.expect("woken").phase, Phase::Running);
    }
    assert!(!node.guest(&record).frozen);
    assert_eq!(node.record(1).await.revision, before + 1, "it was resumed once");
    node.assert_awake(&record).await;
    let off = WakeOn { http: false, ssh: true, exec: false };
    let wake_on = WakeOnPatch { http: Some(false), ssh: Some(true), exec: Some(false) };
    let change = Update { wake_on, ..Update::default() };
    assert_eq!(node.sandboxes.update(&id(1), change).await.expect("set").wake_on, off);
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    for by in [Wake::Http, Wake::Exec] {
        assert_eq!(node.wake(1, by).await.expect_err("off").reason, Reason::SandboxPaused);
    }
    assert_eq!(node.wake(1, Wake::Ssh).await.expect("woken").phase, Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn wake_between_record_and_thaw_waits_for_the_thaw() {
    let node = Node::new().await;
    let record = node.paused(1).await;
    node.sandboxes.resume(&id(1), Duration::ZERO).await.expect("under way");
    while node.record(1).await.phase != Phase::Running {
        tokio::task::yield_now().await;
    }
    assert!(node.guest(&record).frozen, "the record is first");
    node.wake(1, Wake::Exec).await.expect("runs");
    assert!(!node.guest(&record).frozen);
}

#[tokio::test(start_paused = true)]
async fn freeze_or_thaw_by_an_operator_is_reverted() {
    let node = Node::new().await;
    let (one, two) = (node.paused(1).await, node.running(2).await);
    let pve = node.cluster.node(&node.name);
    use crate::pve::Pve;
    // A snapshot that an operator forced leaves it thawed.
    pve.thaw(one.vmid, &one.id).await.expect("thawed");
    pve.freeze(two.vmid, &two.id, LONG).await.expect("frozen");
    node.reconcile().await;
    assert!(node.guest(&one).frozen && !node.guest(&two).frozen);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn failed_thaw_is_retried_by_the_reconciler() {
    let node = Node::new().await;
    let record = node.paused(1).await;
    node.fault(Op::Thaw, Trouble::Before(ErrorKind::Failed("simulated".into())));
    node.sandboxes.resume(&id(1), LONG).await.expect_err("not thawed");
    assert_eq!(node.record(1).await.phase, Phase::Running, "that is what it is to be");
    node.assert_awake(&record).await;
}

#[tokio::test(start_paused = true)]
async fn pause_is_answered_only_once_the_sandbox_is_frozen() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.fault(Op::PauseLock, Trouble::Hangs);
    let short = Duration::from_secs(5);
    let told = node.sandboxes.pause(&id(1), false, short).await.expect_err("it hangs");
    assert_eq!(told.reason, Reason::SandboxBusy);
    assert!(!node.cluster.guests()[&record.vmid].frozen);
    node.cluster.release();
    let paused = node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    assert_eq!(paused.phase, Phase::Paused);
    assert!(node.cluster.guests()[&record.vmid].frozen);
    node.assert_sound().await;
}
