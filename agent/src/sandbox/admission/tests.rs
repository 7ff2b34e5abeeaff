use super::*;
use crate::sandbox::tests::{id, order};

fn facts() -> Facts {
    Facts {
        stopping: false,
        intake: Intake::Open,
        quorate: true,
        renumbered: None,
        room: StorageRoom::new(10 << 30, 20 << 30),
        queued: 0,
        start: Duration::from_secs(3),
        memory: None,
    }
}

#[track_caller]
fn refused(facts: Facts, expected: Reason) {
    let error = decide(&facts, &Limits::default()).expect_err(expected.name());
    assert_eq!(error.reason, expected);
    assert!(error.reason.is_not_here_not_now(), "another node may have room");
}

#[test]
fn the_gravest_reason_comes_first() {
    assert_eq!(decide(&facts(), &Limits::default()), Ok(()));
    let full = Facts { queued: 64, ..facts() };
    refused(full, Reason::QueueFull);
    let no_room = Facts { room: StorageRoom::new(1 << 29, 1 << 40), ..full };
    refused(no_room, Reason::StorageFull);
    let metadata = StorageRoom { thin_metadata: 0.96, ..facts().room };
    refused(Facts { room: metadata, ..full }, Reason::StorageFull);
    let renumbered = Facts { renumbered: Some(Renumbered { known: 1, now: 2 }), ..no_room };
    refused(renumbered, Reason::NodeNumberChanged);
    refused(Facts { quorate: false, ..renumbered }, Reason::NoQuorum);
    for intake in [Intake::Cordoned, Intake::Draining] {
        refused(Facts { quorate: false, intake, ..no_room }, Reason::NodeCordoned);
    }
    refused(Facts { quorate: false, stopping: true, ..no_room }, Reason::ShuttingDown);
}

#[test]
fn what_is_handed_out_and_what_is_used_have_a_bound() {
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
    // By the request alone, a failed creation is no answer: a new try is.
    assert_eq!(recalled(None, made(Phase::Failed)), Ok(Recall::New));
    assert_eq!(recalled(None, made(Phase::Deleted)), Ok(Recall::Same(id(1))));
}

#[test]
fn seats_are_counted_wherever_their_tasks_end() {
    let gate = Gate::default();
    let template = crate::sandbox::tests::vmid(9000);
    let mut first = gate.hold(&order(1).id).admit(&order(1), 5, template);
    let second = gate.hold(&order(2).id).admit(&order(2), 7, template);
    assert_eq!((gate.counts(), gate.queued(template)), ((2, 0), 2));
    assert_eq!(gate.hold(&order(9).id).memory(), 12);
    first.starts();
    first.starts();
    let started = gate.start();
    assert_eq!((gate.counts(), gate.queued(template)), ((1, 2), 1));
    assert_eq!(gate.creation(&id(2)).map(|creation| creation.attempt), Some(1));
    drop((first, second, started));
    assert_eq!((gate.counts(), gate.creation(&id(2))), ((0, 0), None));
}

#[tokio::test(start_paused = true)]
async fn a_kept_seat_counts_until_it_is_taken_given_back_or_too_old() {
    let gate = Gate::default();
    let template = crate::sandbox::tests::vmid(9000);
    let size = Size { cpu_cores: 2, memory_mib: 64, disk_gib: 0 };
    let full = |gate: &Gate| (gate.counts().0, gate.queued(template), gate.kept().len());
    for number in [1, 2, 3] {
        gate.hold(&id(number)).keep(id(number), size, template);
    }
    assert_eq!(full(&gate), (3, 3, 3));
    assert_eq!(gate.hold(&id(1)).memory(), 2 * size.memory_bytes(), "the own one does not count");
    gate.give_back(&id(2));
    let seat = gate.hold(&id(3)).admit(&order(3), size.memory_bytes(), template);
    assert_eq!(full(&gate), (1, 1, 0), "that of the creation alone");
    gate.hold(&id(4)).keep(id(4), size, template);
    tokio::time::advance(SEAT_KEPT - Duration::from_millis(1)).await;
    assert_eq!(full(&gate), (2, 2, 1));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(full(&gate), (1, 1, 0));
    drop(seat);
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
