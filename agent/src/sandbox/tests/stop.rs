//! Stopping gently: what a sandbox gets to shut down by itself, and what ends that time early.

use proto::sandbox::v1::StopResult;
use tokio::time::Instant;

use super::*;
use crate::pve::ErrorKind;

const MINUTE: Duration = Duration::from_secs(60);

impl Node {
    /// Makes a running sandbox whose init ignores that it is asked to shut down.
    async fn stubborn(&self, number: u8) -> Arc<Record> {
        let record = self.running(number).await;
        self.cluster.make_stubborn(record.vmid);
        record
    }

    /// Lets a stop with a long time to shut down begin.
    async fn being_stopped(&self, number: u8) -> Arc<Record> {
        self.stubborn(number).await;
        let wait = Duration::from_secs(1);
        let record =
            self.sandboxes.stop_within(&id(number), MINUTE, wait).await.expect("under way");
        assert_eq!(record.phase, Phase::Stopping);
        record
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_shuts_down_is_not_killed() {
    let node = Node::new().await;
    node.running(1).await;
    let begun = Instant::now();
    let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!((stopped.phase, stopped.stop_result), (Phase::Stopped, StopResult::ShutDown));
    assert!(begun.elapsed() < node.options.limits.grace, "it is not waited for longer");
    assert_eq!((&stopped.halt_by, &stopped.failure), (&None, &None));
    node.assert_sound().await;
    let started = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!(started.stop_result, StopResult::Unspecified, "it is not stopped any more");
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_does_not_shut_down_in_time_is_killed() {
    let node = Node::new().await;
    let record = node.stubborn(1).await;
    let begun = Instant::now();
    let stopped = node.sandboxes.stop_within(&id(1), MINUTE, LONG).await.expect("stopped");
    assert_eq!((stopped.phase, stopped.stop_result), (Phase::Stopped, StopResult::Killed));
    let took = begun.elapsed();
    assert!(MINUTE <= took && took < MINUTE * 2, "{took:?}");
    assert!(node.cluster.guests()[&record.vmid].pid.is_none());
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn grace_of_zero_asks_nobody() {
    let node = Node::new().await;
    node.running(1).await;
    node.fault(Op::Halt, Trouble::Hangs);
    let begun = Instant::now();
    let stopped = node.sandboxes.stop_within(&id(1), Duration::ZERO, LONG).await.expect("stopped");
    assert_eq!(stopped.stop_result, StopResult::Killed);
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_cannot_be_asked_is_killed() {
    let node = Node::new().await;
    node.running(1).await;
    node.fault(Op::Halt, Trouble::Before(ErrorKind::Failed("no such process".into())));
    let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!(stopped.stop_result, StopResult::Killed);
}

#[tokio::test(start_paused = true)]
async fn paused_sandbox_is_thawed_to_shut_down() {
    let node = Node::new().await;
    node.running(1).await;
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!(stopped.stop_result, StopResult::ShutDown);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn deletion_does_not_wait_for_a_shutdown() {
    let node = Node::new().await;
    node.being_stopped(1).await;
    let begun = Instant::now();
    let gone = node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(gone.phase, Phase::Deleted);
    assert!(begun.elapsed() < MINUTE / 2, "{:?}", begun.elapsed());
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn second_stop_may_shorten_the_time_and_never_lengthens_it() {
    let node = Node::new().await;
    let first = node.being_stopped(1).await;
    let longer = node.sandboxes.stop_within(&id(1), MINUTE * 5, Duration::ZERO).await;
    assert_eq!(longer.expect("under way").halt_by, first.halt_by);
    let default = node.sandboxes.stop(&id(1), Duration::ZERO).await;
    assert_eq!(default.expect("under way").halt_by, first.halt_by);
    let begun = Instant::now();
    let stopped = node.sandboxes.stop_within(&id(1), Duration::ZERO, LONG).await.expect("stopped");
    assert_eq!((stopped.phase, stopped.stop_result), (Phase::Stopped, StopResult::Killed));
    assert!(begun.elapsed() < MINUTE / 2, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn start_waits_for_the_shutdown() {
    let node = Node::new().await;
    node.being_stopped(1).await;
    let started = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!((started.phase, started.boot), (Phase::Running, 2));
}

#[tokio::test(start_paused = true)]
async fn agent_that_is_killed_meanwhile_goes_on_with_what_is_left_of_the_time() {
    let mut node = Node::new().await;
    node.being_stopped(1).await;
    node.clock.forward(MINUTE / 2);
    node.restart().await;
    let begun = Instant::now();
    node.reconcile().await;
    let stopped = node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!((stopped.phase, stopped.stop_result), (Phase::Stopped, StopResult::Killed));
    let took = begun.elapsed();
    assert!(MINUTE / 3 < took && took < MINUTE, "{took:?}");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_ended_while_nobody_looked_has_no_known_result() {
    let mut node = Node::new().await;
    let record = node.being_stopped(1).await;
    node.cluster.switch(record.vmid, false);
    node.restart().await;
    node.reconcile().await;
    let stopped = node.record(1).await;
    assert_eq!((stopped.phase, stopped.stop_result), (Phase::Stopped, StopResult::Unspecified));
}

#[tokio::test(start_paused = true)]
async fn stop_goes_on_when_a_lock_comes_in_after_the_sandbox_was_asked_to_shut_down() {
    let node = Node::new().await;
    node.stubborn(1).await;
    node.fault(Op::Stop, Trouble::Before(ErrorKind::Locked("CT is locked (backup)".into())));
    let error = node.sandboxes.stop(&id(1), LONG).await.expect_err("locked");
    assert!(error.message.contains("tried again"), "{error}");
    assert_eq!(node.record(1).await.phase, Phase::Stopping, "its services have ended");
    node.reconcile().await;
    node.idle().await;
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
}
