//! Sandboxes that reboot or end from inside.

use proto::{Cause, lifetime::Action, sandbox::v1::StopResult};

use super::*;

impl Node {
    /// Reboots a container from inside; `away` later it runs again.
    async fn reboots_itself(&self, record: &Record, away: Duration) {
        self.cluster.switch(record.vmid, false);
        let (cluster, vmid) = (self.cluster.clone(), record.vmid);
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            cluster.switch(vmid, true);
        });
    }
}

#[tokio::test(start_paused = true)]
async fn reboot_from_inside_counts_a_boot_and_keeps_the_time_to_live() {
    let node = Node::new().await;
    let mut mortal = order(1);
    mortal.spec.lifetime.ttl = Some(Duration::from_secs(3600));
    mortal.spec.lifetime.ttl_action = Some(Action::Stop);
    let record = node.sandboxes.create(mortal, LONG).await.expect("made");
    assert_eq!(node.sandboxes.look_at_boots().await, [], "its init is known since it came up");
    node.clock.forward(Duration::from_secs(60));
    node.reboots_itself(&record, Duration::ZERO).await;
    assert_eq!(node.sandboxes.look_at_boots().await, [id(1)]);
    node.idle().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot, after.cause), (Phase::Running, 2, Cause::Rebooted));
    assert_eq!(after.lifetime.expires, record.lifetime.expires, "nobody lives on by rebooting");
    assert_eq!((after.ip, &after.failure), (record.ip, &None));
    assert_eq!(node.sandboxes.look_at_boots().await, []);
    assert_eq!(node.reconcile().await, []);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn container_that_is_away_for_a_moment_is_not_taken_for_stopped() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.reboots_itself(&record, Duration::from_secs(2)).await;
    node.sandboxes.look_at_boots().await;
    assert_eq!(node.record(1).await.phase, Phase::Running);
    node.idle().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot, after.cause), (Phase::Running, 2, Cause::Rebooted));
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_powers_itself_off_is_stopped_within_seconds() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.switch(record.vmid, false);
    node.sandboxes.look_at_boots().await;
    node.idle().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot, after.cause), (Phase::Stopped, 1, Cause::FoundDown));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn reboot_while_the_agent_was_down_is_noticed() {
    let mut node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.switch(record.vmid, false);
    node.cluster.switch(record.vmid, true);
    node.restart().await;
    assert_eq!(node.sandboxes.look_at_boots().await, [id(1)]);
    node.idle().await;
    assert_eq!(node.record(1).await.boot, 2);
}

#[tokio::test(start_paused = true)]
async fn paused_and_stopped_sandboxes_are_not_looked_at() {
    let node = Node::new().await;
    node.running(1).await;
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.running(2).await;
    node.sandboxes.stop(&id(2), LONG).await.expect("stopped");
    assert_eq!(node.sandboxes.look_at_boots().await, []);
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_reboots_out_of_its_stop_is_stopped_again() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    // Its init rebooted where it was asked to shut down: on PVE that is a stop and a start.
    node.cluster.switch(record.vmid, true);
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.stop_result), (Phase::Stopped, StopResult::Killed));
    assert!(node.cluster.guests()[&record.vmid].pid.is_none());
    // Later it is an operator who starts it.
    node.clock.forward(Duration::from_secs(60));
    node.cluster.switch(record.vmid, true);
    node.reconcile().await;
    assert_eq!(node.record(1).await.phase, Phase::Running);
}
