use super::*;
use crate::sandbox::tests::{id, order};

fn facts() -> Facts {
    Facts {
        stopping: false,
        scheduling: SchedulingState::Schedulable,
        quorate: true,
        renumbered: None,
        room: StorageRoom::new(10 << 30, 20 << 30),
        queued: 0,
        queued_of_team: None,
        start: Duration::from_secs(3),
        memory: None,
    }
}

#[track_caller]
fn refused(facts: Facts, expected: Reason) {
    let error = decide(&facts, &Limits::default()).expect_err(expected.name());
    assert_eq!(error.reason, expected);
    assert!(error.reason.is_node_refusal(), "another node may have room");
}

#[test]
fn refusal_has_the_most_severe_reason() {
    assert_eq!(decide(&facts(), &Limits::default()), Ok(()));
    let full = Facts { queued: 128, ..facts() };
    refused(full, Reason::QueueFull);
    let no_room = Facts { room: StorageRoom::new(1 << 29, 1 << 40), ..full };
    refused(no_room, Reason::StorageFull);
    let metadata = StorageRoom { thin_metadata: 0.96, ..facts().room };
    refused(Facts { room: metadata, ..full }, Reason::StorageFull);
    let renumbered = Facts { renumbered: Some(Renumbered { known: 1, now: 2 }), ..no_room };
    refused(renumbered, Reason::NodeNumberChanged);
    refused(Facts { quorate: false, ..renumbered }, Reason::NoQuorum);
    for scheduling in [SchedulingState::Cordoned, SchedulingState::Draining] {
        refused(Facts { quorate: false, scheduling, ..no_room }, Reason::NodeCordoned);
    }
    refused(Facts { quorate: false, stopping: true, ..no_room }, Reason::ShuttingDown);
}

#[test]
fn allocated_and_used_memory_are_bounded() {
    let memory = |asked: u64, given: u64, available: u64| {
        let [asked, given, available] = [asked, given, available].map(|gib| gib << 30);
        Facts { memory: Some(Memory { asked, given, total: 64 << 30, available }), ..facts() }
    };
    assert_eq!(decide(&memory(8, 120, 32), &Limits::default()), Ok(()), "twice what there is");
    refused(memory(9, 120, 32), Reason::MemoryFull);
    assert_eq!(decide(&memory(8, 0, 6), &Limits::default()), Ok(()));
    refused(memory(8, 0, 5), Reason::MemoryFull);
}

#[test]
fn team_takes_at_most_its_share_of_the_queue() {
    let asks = |queued, queued_of_team| Facts { queued, queued_of_team, ..facts() };
    let admitted = |facts| decide(&facts, &Limits::default()).is_ok();
    assert!(admitted(asks(63, Some(63))) && admitted(asks(127, Some(0))));
    assert!(admitted(asks(127, None)), "the team of a reservation is not known");
    // Alone it gets half of the 128 places, beside another team that has as many a third.
    refused(asks(64, Some(64)), Reason::QueueFull);
    assert!(admitted(asks(84, Some(42))));
    refused(asks(86, Some(43)), Reason::QueueFull);
    let error = decide(&asks(80, Some(60)), &Limits::default()).expect_err("more than is free");
    assert!(error.message.starts_with("60 creations of this team"), "{}", error.message);
    assert!(error.message.contains("48 free places"), "{}", error.message);
    assert_eq!(error.retry_after, Some(Duration::from_secs(3)));
    let error = decide(&asks(128, Some(30)), &Limits::default()).expect_err("full");
    assert!(error.message.starts_with("128 creations wait"), "{}", error.message);
}

#[test]
fn full_queue_refusal_has_a_retry_delay() {
    let error = decide(&Facts { queued: 128, ..facts() }, &Limits::default()).expect_err("full");
    assert_eq!(error.retry_after, Some(Duration::from_secs(3)));
}

#[test]
fn repeated_creation_recalls_the_existing_sandbox() {
    let made = |phase| Some(Summary { phase, ..Summary::from(&order(1)) });
    let recalled = |by_id, by_request| recall(&order(1), by_id, by_request);
    assert_eq!(recalled(None, None), Ok(Recall::New));
    for phase in [Phase::Creating, Phase::Running, Phase::Deleted, Phase::Failed] {
        assert_eq!(recalled(made(phase), None), Ok(Recall::Same(id(1))), "{phase:?}");
    }
    // By the request alone, a failed creation is no answer: a new try is.
    assert_eq!(recalled(None, made(Phase::Failed)), Ok(Recall::New));
    assert_eq!(recalled(None, made(Phase::Deleted)), Ok(Recall::Same(id(1))));
}
