//! Time to live, idleness, and retention, by the clock that only moves forward.

use proto::{Cause, lifetime::Action};
use tokio::time::Instant;

use super::*;
use crate::sandbox::{
    core::operations::{Entry, OperationKind},
    exec::{Execs, shims::NoShims},
    lifetime::expiry_loop::Expiry,
};

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

fn with(number: u8, patch: LifetimePatch) -> Order {
    let mut order = order(number);
    order.spec.lifetime = patch;
    order
}

fn ttl(time: Duration, action: Action) -> LifetimePatch {
    LifetimePatch { ttl: Some(time), ttl_action: Some(action), ..LifetimePatch::default() }
}

fn idle(time: Duration, action: Action) -> LifetimePatch {
    LifetimePatch { idle: Some(time), idle_action: Some(action), ..LifetimePatch::default() }
}

impl Node {
    fn expiry(&self) -> Expiry {
        let execs = Execs::new(Arc::clone(&self.sandboxes), Arc::new(NoShims));
        Expiry::new(Arc::clone(&self.sandboxes), execs)
    }

    /// Advances both clocks.
    async fn pass_time(&self, time: Duration) {
        self.clock.forward(time);
        tokio::time::advance(time).await;
        // A resume removes its lock after its answer.
        while !self.sandboxes.busy().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn run(&self, order: Order) -> Arc<Record> {
        let record = self.sandboxes.create(order, LONG).await.expect("made");
        assert_eq!(record.phase, Phase::Running);
        record
    }
}

#[tokio::test(start_paused = true)]
async fn expired_sandbox_is_paused_stopped_or_deleted_with_its_cause() {
    let node = Node::new().await;
    for (number, action) in [(1, Action::Pause), (2, Action::Stop), (3, Action::Delete)] {
        node.run(with(number, ttl(HOUR, action))).await;
    }
    node.run(order(4)).await;
    let mut expiry = node.expiry();
    assert_eq!(expiry.pass().await, []);
    node.pass_time(HOUR).await;
    assert_eq!(expiry.pass().await.len(), 3);
    for (number, phase) in [(1, Phase::Paused), (2, Phase::Stopped), (3, Phase::Deleted)] {
        let record = node.record(number).await;
        assert_eq!((record.phase, record.cause), (phase, Cause::Ttl));
    }
    assert_eq!(node.record(4).await.phase, Phase::Running, "it lives for ever");
    assert_eq!(expiry.pass().await, [], "once is enough");
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn resumed_or_started_sandbox_gets_its_full_ttl_again() {
    let node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Pause))).await;
    node.run(with(2, ttl(HOUR, Action::Stop))).await;
    let mut expiry = node.expiry();
    node.pass_time(HOUR).await;
    assert_eq!(expiry.pass().await.len(), 2);
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.sandboxes.start(&id(2), LONG).await.expect("started");
    node.pass_time(HOUR - Duration::from_secs(60)).await;
    assert_eq!(expiry.pass().await, []);
    assert_eq!(node.record(1).await.cause, Cause::ASKED, "somebody asked for that");
    node.pass_time(Duration::from_secs(61)).await;
    assert_eq!(expiry.pass().await.len(), 2);
    // Before the expiry a resume changes nothing.
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
    node.pass_time(HOUR / 2).await;
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    node.pass_time(HOUR / 2).await;
    assert_eq!(expiry.pass().await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn lifetime_can_be_extended_and_its_action_changed() {
    let node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Delete))).await;
    let mut expiry = node.expiry();
    node.pass_time(HOUR - Duration::from_secs(1)).await;
    node.sandboxes.update(&id(1), lives(ttl(HOUR, Action::Stop))).await.expect("extended");
    node.pass_time(HOUR - Duration::from_secs(1)).await;
    assert_eq!(expiry.pass().await, []);
    node.pass_time(Duration::from_secs(2)).await;
    assert_eq!(expiry.pass().await.len(), 1);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
    node.sandboxes.start(&id(1), LONG).await.expect("started");
    let for_ever = LifetimePatch { ttl: Some(Duration::ZERO), ..LifetimePatch::default() };
    node.sandboxes.update(&id(1), lives(for_ever)).await.expect("set");
    node.pass_time(HOUR * 99).await;
    assert_eq!(expiry.pass().await, []);
    let error = node.sandboxes.update(&id(9), lives(for_ever)).await.expect_err("nobody");
    assert_eq!(error.reason, Reason::SandboxNotFound);
}

#[tokio::test(start_paused = true)]
async fn sandbox_extended_at_the_last_moment_does_not_expire() {
    let node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Delete))).await;
    node.pass_time(HOUR).await;
    let [(_, due)] = node.sandboxes.due()[..] else { panic!("one is due") };
    node.sandboxes.update(&id(1), lives(ttl(HOUR, Action::Delete))).await.expect("extended");
    node.sandboxes.expire(&id(1), due, LONG).await.expect("nothing is to be done");
    assert_eq!(node.record(1).await.phase, Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn what_a_caller_asks_for_is_done_though_it_joins_an_expiry_that_is_not_due_any_more() {
    // Also of a caller who does not wait for the end.
    for wait in [LONG, Duration::ZERO] {
        for (action, phase) in [
            (Action::Pause, Phase::Paused),
            (Action::Stop, Phase::Stopped),
            (Action::Delete, Phase::Deleted),
        ] {
            let node = Node::new().await;
            node.run(with(1, ttl(HOUR, action))).await;
            node.pass_time(HOUR).await;
            let [(_, due)] = node.sandboxes.due()[..] else { panic!("one is due") };
            let Entry::New(other, _) = node.sandboxes.operations.enter(id(1), OperationKind::Look)
            else {
                panic!("nothing is under way")
            };
            let turn = other.context().turn(Instant::now() + LONG).await.expect("free");
            node.sandboxes.expire(&id(1), due, Duration::ZERO).await.expect("under way");
            node.sandboxes.update(&id(1), lives(ttl(HOUR, action))).await.expect("extended");
            let asked = async {
                match action {
                    Action::Pause => node.sandboxes.pause(&id(1), false, wait).await,
                    Action::Stop => node.sandboxes.stop(&id(1), wait).await,
                    Action::Delete => node.sandboxes.delete(&id(1), wait).await,
                }
            };
            let end_other = async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                drop((turn, other));
            };
            let (answer, ()) = tokio::join!(asked, end_other);
            let answer = answer.expect("accepted").phase;
            assert_eq!(answer, if wait.is_zero() { Phase::Running } else { phase }, "{action:?}");
            node.idle().await;
            let record = node.record(1).await;
            assert_eq!((record.phase, record.cause), (phase, Cause::ASKED), "{action:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_is_idle_without_use_and_without_traffic() {
    let node = Node::with(silent_below(1024), Faults::default()).await;
    let record = node.run(with(1, idle(HOUR, Action::Pause))).await;
    let mut expiry = node.expiry();
    node.pass_time(HOUR / 2).await;
    node.sandboxes.wake(&SandboxRef::Id(id(1)), crate::sandbox::Wake::Exec).await.expect("runs");
    node.pass_time(HOUR / 2 + Duration::from_secs(1)).await;
    assert_eq!(expiry.pass().await, [], "a command was run in it");
    node.cluster.transfer(record.vmid, 9000);
    node.pass_time(HOUR / 2).await;
    assert_eq!(expiry.pass().await, [], "a connection moved bytes");
    node.cluster.disconnect(record.vmid);
    node.pass_time(HOUR - Duration::from_secs(1)).await;
    assert_eq!(expiry.pass().await, [], "one did");
    node.pass_time(Duration::from_secs(1)).await;
    assert_eq!(expiry.pass().await.len(), 1);
    let record = node.record(1).await;
    assert_eq!((record.phase, record.cause), (Phase::Paused, Cause::Idle));
    node.sandboxes.resume(&id(1), LONG).await.expect("resumed");
    assert_eq!(expiry.pass().await, [], "that was a use");
}

/// A node whose silent connections move this many bytes a minute at most.
fn silent_below(bytes: u64) -> impl FnOnce(&mut Options) {
    move |options: &mut Options| options.lifetimes.silent_bytes = bytes
}

#[tokio::test(start_paused = true)]
async fn silent_connection_does_not_keep_a_sandbox_from_being_idle() {
    let node = Node::with(silent_below(1024), Faults::default()).await;
    let record = node.run(with(1, idle(MINUTE * 10, Action::Pause))).await;
    let mut expiry = node.expiry();
    node.cluster.transfer(record.vmid, 50_000);
    assert_eq!(expiry.pass().await, []);
    for _ in 0..30 {
        // Somebody types; pings alone would be less.
        node.cluster.transfer(record.vmid, 2000);
        node.pass_time(MINUTE).await;
        assert_eq!(expiry.pass().await, [], "it moves bytes");
    }
    for minute in 1..=10 {
        node.cluster.transfer(record.vmid, 400);
        node.pass_time(MINUTE).await;
        assert_eq!(expiry.pass().await.len(), usize::from(minute == 10), "minute {minute}");
    }
    assert_eq!(node.record(1).await.cause, Cause::Idle);
}

#[tokio::test(start_paused = true)]
async fn open_connection_counts_where_the_node_says_so() {
    let node = Node::with(silent_below(0), Faults::default()).await;
    let record = node.run(with(1, idle(MINUTE * 10, Action::Pause))).await;
    let mut expiry = node.expiry();
    node.cluster.transfer(record.vmid, 0);
    for _ in 0..30 {
        node.pass_time(MINUTE).await;
        assert_eq!(expiry.pass().await, [], "it is open");
    }
    node.cluster.disconnect(record.vmid);
    node.pass_time(MINUTE * 10).await;
    assert_eq!(expiry.pass().await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn cpu_use_keeps_a_sandbox_from_being_idle_if_its_rule_says_so() {
    let node = Node::with(silent_below(1024), Faults::default()).await;
    let rule = |number, cpu| {
        with(number, LifetimePatch { idle_cpu: Some(cpu), ..idle(MINUTE * 10, Action::Pause) })
    };
    let works = node.run(rule(1, 20)).await;
    let unlooked = node.run(rule(2, 0)).await;
    let mut expiry = node.expiry();
    assert_eq!(expiry.pass().await, []);
    let work = async |share: u32| {
        for vmid in [works.vmid, unlooked.vmid] {
            node.cluster.use_cpu(vmid, MINUTE * share / 100);
        }
        node.pass_time(MINUTE).await;
    };
    for minute in 1..=30 {
        work(30).await;
        let done = expiry.pass().await;
        assert_eq!(done.len(), usize::from(minute == 10), "minute {minute}: {done:?}");
    }
    assert_eq!(node.record(2).await.phase, Phase::Paused, "its CPU use is not looked at");
    assert_eq!(node.record(1).await.phase, Phase::Running);
    for _ in 0..9 {
        work(10).await;
        assert_eq!(expiry.pass().await, [], "not long enough");
    }
    work(10).await;
    assert_eq!(expiry.pass().await.len(), 1, "a tenth of a core is below its rule");
    // The rule can be changed.
    let off = LifetimePatch { idle_cpu: Some(0), ..LifetimePatch::default() };
    node.sandboxes.update(&id(1), lives(off)).await.expect("set");
    assert_eq!(node.record(1).await.lifetime.idle_cpu, 0);
}

#[tokio::test(start_paused = true)]
async fn agent_restart_keeps_the_ttl_and_restarts_the_idle_time() {
    let mut node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Stop))).await;
    node.run(with(2, idle(HOUR, Action::Stop))).await;
    node.pass_time(HOUR).await;
    node.restart().await;
    assert_eq!(node.expiry().pass().await.len(), 1);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);
    assert_eq!(node.record(2).await.phase, Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn wall_clock_jump_neither_expires_nor_extends_a_sandbox() {
    let node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Stop))).await;
    let mut expiry = node.expiry();
    node.clock.jump(9 * 3600);
    assert_eq!(expiry.pass().await, [], "an hour has not passed");
    node.clock.jump(-18 * 3600);
    node.pass_time(HOUR).await;
    assert_eq!(expiry.pass().await.len(), 1, "now it has");
}

#[tokio::test(start_paused = true)]
async fn sandbox_kept_too_long_is_stopped_then_deleted_unless_exempt() {
    let change = |options: &mut Options| {
        options.lifetimes = Lifetimes {
            default: idle(HOUR, Action::Pause),
            silent_bytes: 1024,
            paused_max: HOUR * 20,
            stopped_max: HOUR * 24,
            exempt: Some(("keep".into(), "true".into())),
        };
    };
    let node = Node::with(change, Faults::default()).await;
    node.run(order(1)).await;
    let mut kept = order(2);
    kept.spec.metadata.insert("keep".into(), "true".into());
    node.run(kept).await;
    let mut expiry = node.expiry();
    node.pass_time(HOUR).await;
    assert_eq!(expiry.pass().await.len(), 2, "the default counts for both");
    node.pass_time(HOUR * 20).await;
    assert_eq!(expiry.pass().await.len(), 1);
    let record = node.record(1).await;
    assert_eq!((record.phase, record.cause), (Phase::Stopped, Cause::RetentionExceeded));
    node.pass_time(HOUR * 24).await;
    assert_eq!(expiry.pass().await.len(), 1);
    assert_eq!(node.record(1).await.phase, Phase::Deleted);
    assert_eq!(node.record(2).await.phase, Phase::Paused);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn expired_sandbox_that_cannot_be_paused_is_retried_later() {
    let node = Node::new().await;
    node.run(with(1, ttl(HOUR, Action::Pause))).await;
    node.fault(Op::Freeze, Trouble::Hangs);
    let mut expiry = node.expiry();
    node.pass_time(HOUR).await;
    assert_eq!(expiry.pass().await, []);
    let record = node.record(1).await;
    assert_eq!(record.phase, Phase::Running);
    assert_eq!(record.failure.as_ref().expect("told").reason, Reason::FreezeFailed);
    assert_eq!(expiry.pass().await, [], "not at once");
    node.pass_time(Duration::from_secs(61)).await;
    assert_eq!(expiry.pass().await.len(), 1);
    assert_eq!(node.record(1).await.phase, Phase::Paused);
}
