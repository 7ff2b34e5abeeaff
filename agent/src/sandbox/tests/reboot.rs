//! Node that loses its power: running sandboxes run again, paused ones are stopped, and ones that
//! expired meanwhile do not start.

use proto::{Cause, Reason};

use super::*;
use crate::{
    clock::Moment,
    pve::ErrorKind,
    sandbox::{exec::shims::NoShims, lifetime::expiry_loop::Expiry},
};

fn pid(node: &Node, record: &Record) -> Option<u32> {
    node.cluster.guests()[&record.vmid].pid
}

#[tokio::test(start_paused = true)]
async fn running_sandbox_restarts_after_a_reboot_with_its_lifetime() {
    let mut node = Node::new().await;
    let mut mortal = order(1);
    mortal.spec.lifetime.ttl = Some(Duration::from_secs(8 * 3600));
    let record = node.sandboxes.create(mortal, LONG).await.expect("admitted");
    node.clock.forward(Duration::from_secs(3600));
    node.reboot().await;
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot), (Phase::Running, record.boot + 1));
    assert_eq!((after.cause, &after.failure), (Cause::NodeRebooted, &None));
    assert_eq!((after.ip, &after.lifetime), (record.ip, &record.lifetime));
    assert!(pid(&node, &after).is_some());
    let onboot = node.cluster.guests()[&record.vmid].config.get("onboot").map(str::to_owned);
    assert_eq!(onboot.as_deref(), Some("0"), "PVE starts none of them by itself");
    node.assert_sound().await;
    // A second reboot is not the same as one: each boot of the node counts.
    node.reboot().await;
    node.reconcile().await;
    assert_eq!(node.record(1).await.boot, record.boot + 2);
    assert_eq!(node.reconcile().await, []);
}

#[tokio::test(start_paused = true)]
async fn paused_or_stopped_sandbox_is_stopped_after_a_reboot() {
    let mut node = Node::new().await;
    node.running(1).await;
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.running(2).await;
    node.sandboxes.stop(&id(2), LONG).await.expect("stopped");
    node.reboot().await;
    node.reconcile().await;
    let paused = node.record(1).await;
    assert_eq!((paused.phase, paused.cause), (Phase::Stopped, Cause::FoundDown));
    assert!(paused.failure.as_ref().expect("told").message.contains("while it was paused"));
    let stopped = node.record(2).await;
    assert_eq!((stopped.phase, &stopped.failure, stopped.boot), (Phase::Stopped, &None, 1));
    node.assert_sound().await;
    let started = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!(started.phase, Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn sandbox_stays_stopped_after_a_reboot_if_the_rule_is_keep() {
    let keep = |options: &mut Options| options.on_reboot = OnReboot::Keep;
    let mut node = Node::with(keep, Faults::default()).await;
    node.running(1).await;
    node.reboot().await;
    node.reconcile().await;
    let kept = node.record(1).await;
    assert_eq!((kept.phase, kept.boot), (Phase::Stopped, 1));
    assert!(kept.failure.as_ref().expect("told").message.contains("on_reboot"), "{kept:?}");
    assert_eq!(node.reconcile().await, []);
    node.sandboxes.start(&id(1), LONG).await.expect("started");
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_expired_during_a_reboot_does_not_start() {
    use proto::lifetime::Action;
    for (action, end) in [
        (Action::Delete, Phase::Deleted),
        (Action::Stop, Phase::Stopped),
        (Action::Pause, Phase::Stopped),
    ] {
        let mut node = Node::new().await;
        let mut mortal = order(1);
        mortal.spec.lifetime.ttl = Some(Duration::from_secs(600));
        mortal.spec.lifetime.ttl_action = Some(action);
        node.sandboxes.create(mortal, LONG).await.expect("admitted");
        node.clock.forward(Duration::from_secs(660));
        node.reboot().await;
        let execs = crate::sandbox::exec::Execs::new(node.sandboxes.clone(), Arc::new(NoShims));
        let mut expiry = Expiry::new(node.sandboxes.clone(), execs);
        // In either order of the two passes, and long before the wall clock is trusted.
        expiry.pass().await;
        node.reconcile().await;
        let after = node.record(1).await;
        assert_eq!((after.phase, after.boot), (Phase::Stopped, 1), "{action:?}");
        assert_eq!(after.cause, Cause::Ttl);
        node.clock.forward(Duration::from_secs(360));
        expiry.pass().await;
        node.reconcile().await;
        assert_eq!(node.record(1).await.phase, end, "{action:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn failed_start_after_a_reboot_is_recorded_and_not_retried() {
    let mut node = Node::new().await;
    node.running(1).await;
    node.running(2).await;
    node.fault(Op::Start, Trouble::Before(ErrorKind::Failed("no such bridge".into())));
    node.reboot().await;
    node.reconcile().await;
    let records = [node.record(1).await, node.record(2).await];
    let phases: BTreeMap<_, _> =
        records.iter().map(|record| (format!("{:?}", record.phase), record)).collect();
    let failed = phases["Stopped"].failure.as_ref().expect("told");
    assert!(failed.message.contains("no such bridge"), "{failed:?}");
    assert_eq!(phases["Running"].boot, 2);
    assert_eq!(node.reconcile().await, [], "nobody tries again");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn start_after_a_reboot_waits_for_quorum() {
    let mut node = Node::new().await;
    node.running(1).await;
    node.cluster.set_quorate(false);
    node.reboot().await;
    assert_eq!(node.reconcile().await, []);
    assert_eq!(node.record(1).await.phase, Phase::Running, "nothing is concluded yet");
    node.cluster.set_quorate(true);
    // Quorum is lost again right before the start.
    node.fault(Op::Start, Trouble::Before(ErrorKind::NoQuorum("no quorum".into())));
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot), (Phase::Running, 2));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn start_after_a_reboot_survives_a_crash_before_it() {
    let mut node = Node::new().await;
    let mut mortal = order(1);
    mortal.spec.lifetime.ttl = Some(Duration::from_secs(4000));
    let record = node.sandboxes.create(mortal, LONG).await.expect("admitted");
    node.reboot().await;
    node.reconciler().pass().await;
    assert_eq!(node.record(1).await.phase, Phase::Starting, "the intent is there");
    node.restart().await;
    node.reboot().await;
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot), (Phase::Running, record.boot + 1));
    assert_eq!(after.lifetime, record.lifetime, "its time goes on as it was");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_started_by_pve_after_a_reboot_is_in_its_next_boot() {
    let mut node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.crash(&node.name);
    node.cluster.switch(record.vmid, true);
    node.clock.reboot();
    node.restart().await;
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!((after.phase, after.boot), (Phase::Running, record.boot + 1));
    assert_eq!(after.cause, Cause::FoundUp);
    assert_eq!(node.reconcile().await, [], "it is noted once");
}

#[tokio::test(start_paused = true)]
async fn sandbox_is_not_restarted_without_evidence_of_a_reboot() {
    let node = Node::new().await;
    let record = node.running(1).await;
    node.cluster.switch(record.vmid, false);
    node.reconcile().await;
    assert_eq!(node.record(1).await.phase, Phase::Stopped);

    let mut node = Node::new().await;
    node.running(1).await;
    let forgetful = Record { since: Moment::default(), ..Record::clone(&*node.record(1).await) };
    node.journal.update(&forgetful).await.expect("written");
    node.reboot().await;
    node.reconcile().await;
    let after = node.record(1).await;
    assert_eq!(after.phase, Phase::Stopped, "a version before did not say since when");
    assert_eq!(after.failure.as_ref().expect("told").reason, Reason::SandboxNotRunning);
}

#[tokio::test(start_paused = true)]
async fn only_a_few_sandboxes_start_at_once_after_a_reboot() {
    let few = |options: &mut Options| options.limits.starts_max = 2;
    let mut node = Node::with(few, Faults::default()).await;
    for number in 1..=12 {
        node.running(number).await;
    }
    node.reboot().await;
    let sandboxes = node.sandboxes.clone();
    let watched = tokio::spawn(async move {
        let mut most = 0;
        loop {
            let live = sandboxes.live();
            let starting = sandboxes.tally().await.expect("reads").starting;
            most = most.max(starting);
            if live.iter().all(|record| record.phase == Phase::Running && record.boot == 2) {
                return most;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    node.reconcile().await;
    let most = watched.await.expect("no panic");
    assert!((1..=4).contains(&most), "{most} at once");
    node.assert_sound().await;
}
