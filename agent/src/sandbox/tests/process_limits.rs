//! Limits on processes: in force before anything runs in a sandbox, and again after each boot.

use proto::{Invariant, Reason};

use super::*;
use crate::pve::fake::Limiting;

impl Node {
    /// Limit that the kernel holds the container of the record to.
    fn processes_max(&self, record: &Record) -> Option<u32> {
        self.cluster.guests()[&record.vmid].processes_max
    }

    /// Ends the boot of a container behind the agent's back, and begins another.
    fn reboots(&self, record: &Record) {
        self.cluster.switch(record.vmid, false);
        self.cluster.switch(record.vmid, true);
        assert_eq!(self.processes_max(record), None, "the kernel has forgotten it");
    }
}

#[tokio::test(start_paused = true)]
async fn every_boot_is_limited() {
    let node = Node::with(|options| options.limits.processes = 77, Faults::default()).await;
    let record = node.running(1).await;
    assert_eq!(node.processes_max(&record), Some(77));

    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.sandboxes.start(&record.id, LONG).await.expect("started");
    assert_eq!(node.processes_max(&record), Some(77), "a start");

    node.reboots(&record);
    assert_eq!(node.sandboxes.look_at_boots().await, [id(1)]);
    node.idle().await;
    assert_eq!(node.processes_max(&record), Some(77), "a reboot from inside");

    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.cluster.switch(record.vmid, true);
    node.clock.forward(Duration::from_secs(60));
    node.reconcile().await;
    node.idle().await;
    assert_eq!(node.processes_max(&record), Some(77), "a start by an operator");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandboxes_of_an_older_agent_are_limited_by_the_next_pass() {
    let mut node = Node::new().await;
    node.cluster.set_limiting(Limiting::NoController);
    let record = node.running(1).await;
    node.cluster.set_limiting(Limiting::Works);
    node.restart().await;
    assert_eq!(node.processes_max(&record), None);
    node.reconcile().await;
    assert_eq!(node.processes_max(&record), Some(Limits::default().processes));
}

#[tokio::test(start_paused = true)]
async fn sandbox_whose_limit_cannot_be_written_does_not_start() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    node.cluster.set_limiting(Limiting::Fails);
    let error = node.sandboxes.start(&record.id, LONG).await.expect_err("not limited");
    assert_eq!(error.reason, Reason::LimitsFailed);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
    let failed = node.create(2).await;
    assert_eq!(failed.phase, Phase::Failed, "{failed:?}");
    assert_eq!(failed.failure.as_ref().map(|why| why.reason), Some(Reason::LimitsFailed));
    node.cluster.set_limiting(Limiting::Works);
    node.sandboxes.start(&record.id, LONG).await.expect("started");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_runs_without_its_limit_is_a_finding() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.set_limiting(Limiting::Fails);
    node.reconcile().await;
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!(finding.invariant, Invariant::Unchecked);
    assert_eq!(finding.subject, record.id.to_string());
    node.cluster.set_limiting(Limiting::Works);
    node.reconcile().await;
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn kernel_without_the_controller_starts_sandboxes_and_is_a_finding() {
    let node = Node::new().await;
    node.cluster.set_limiting(Limiting::NoController);
    let record = node.running(1).await;
    assert_eq!(node.processes_max(&record), None);
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!(finding.invariant, Invariant::Unchecked);
    assert!(finding.detail.contains("pids"), "{finding:?}");
}
