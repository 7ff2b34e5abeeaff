use super::*;
use crate::sandbox::tests::{id, order};

fn facts() -> Facts {
    Facts {
        stopping: false,
        intake: Intake::Open,
        quorate: true,
        room: StorageRoom { free: 10 << 30, total: 20 << 30 },
        queued: 0,
        start: Duration::from_secs(3),
        memory: None,
    }
}

#[track_caller]
fn refused(facts: Facts, reason: &str) {
    let error = decide(&facts, &Limits::default()).expect_err(reason);
    assert_eq!(error.reason, reason);
}

#[test]
fn the_gravest_reason_comes_first() {
    assert_eq!(decide(&facts(), &Limits::default()), Ok(()));
    let full = Facts { queued: 64, ..facts() };
    refused(full, reason::QUEUE_FULL);
    let no_room = Facts { room: StorageRoom { free: 1 << 29, total: 1 << 40 }, ..full };
    refused(no_room, reason::STORAGE_FULL);
    refused(Facts { quorate: false, ..no_room }, reason::NO_QUORUM);
    for intake in [Intake::Cordoned, Intake::Draining] {
        refused(Facts { quorate: false, intake, ..no_room }, reason::NODE_CORDONED);
    }
    refused(Facts { quorate: false, stopping: true, ..no_room }, reason::SHUTTING_DOWN);
}

#[test]
fn what_is_handed_out_and_what_is_used_have_a_bound() {
    let memory = |asked: u64, given: u64, available: u64| {
        let [asked, given, available] = [asked, given, available].map(|gib| gib << 30);
        Facts { memory: Some(Memory { asked, given, total: 64 << 30, available }), ..facts() }
    };
    assert_eq!(decide(&memory(8, 120, 32), &Limits::default()), Ok(()), "twice what there is");
    refused(memory(9, 120, 32), reason::MEMORY_FULL);
    assert_eq!(decide(&memory(8, 0, 6), &Limits::default()), Ok(()));
    refused(memory(8, 0, 5), reason::MEMORY_FULL);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let error = decide(&Facts { queued: 64, ..facts() }, &Limits::default()).expect_err("full");
    assert_eq!(error.retry_after, Some(Duration::from_secs(3)));
}

#[test]
fn what_was_made_is_recalled() {
    let made = |phase| Some(Summary { phase, ..Summary::from(&order(1)) });
    let recalled = |by_id, by_request| recall(&order(1), by_id, by_request);
    assert_eq!(recalled(None, None), Ok(Recall::New));
    for phase in [Phase::Creating, Phase::Running, Phase::Deleted, Phase::Failed] {
        assert_eq!(recalled(made(phase), None), Ok(Recall::Same(id(1))), "{phase:?}");
    }
    // Of a request alone, a failure is no answer: another try is.
    assert_eq!(recalled(None, made(Phase::Failed)), Ok(Recall::New));
    assert_eq!(recalled(None, made(Phase::Deleted)), Ok(Recall::Same(id(1))));
}

#[test]
fn seats_are_counted_wherever_their_tasks_end() {
    let gate = Gate::default();
    let template = crate::sandbox::tests::vmid(9000);
    let mut first = gate.hold().admit(&order(1), 5, template);
    let second = gate.hold().admit(&order(2), 7, template);
    assert_eq!((gate.counts(), gate.queued(template)), ((2, 0), 2));
    assert_eq!(gate.hold().memory(), 12);
    first.starts();
    first.starts();
    let started = gate.start();
    assert_eq!((gate.counts(), gate.queued(template)), ((1, 2), 1));
    assert_eq!(gate.creation(&id(2)).map(|creation| creation.attempt), Some(1));
    drop((first, second, started));
    assert_eq!((gate.counts(), gate.creation(&id(2))), ((0, 0), None));
}

#[test]
fn the_median_start_is_of_the_latest() {
    let gate = Gate::default();
    assert_eq!(gate.start_ms(), 0);
    for seconds in 1..=32 {
        gate.took(Duration::from_secs(seconds));
    }
    assert_eq!(gate.start_ms(), 25_000);
}
