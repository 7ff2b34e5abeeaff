//! One test suite for both journals, which must behave the same.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use daemon::disk::SoundDisk;
use proto::{
    id::{SandboxId, Vmid},
    spec::{Network, Size},
};

use super::{
    Error, Failure, Intent, Journal, Lifetime, MemoryJournal, Node, Phase, Pools, Record,
    SqliteJournal, WakeOn,
    scheduling::{Scheduling, SchedulingState},
};
use crate::clock::Moment;

pub(crate) fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

pub(crate) fn id(number: u8) -> SandboxId {
    SandboxId::new(1_700_000_000_000 + u64::from(number), &[number; 10])
}

pub(crate) fn pools() -> Pools {
    Pools {
        vmids: (vmid(1000), vmid(1003)),
        addresses: (Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 4)),
        address_quarantine_ms: 1000,
    }
}

pub(crate) fn record(number: u8) -> Record {
    Record {
        id: id(number),
        vmid: vmid(100),
        template: vmid(9000),
        team: "acme".parse().expect("valid"),
        request_id: format!("r-{number}").parse().expect("valid"),
        body_digest: "0".repeat(64),
        attempt: 1,
        phase: Phase::Creating,
        progress: proto::Progress::Queued,
        snapshot: "base".parse().expect("valid"),
        size: Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 },
        network: Network::Static,
        egress: Default::default(),
        ip: None,
        ip_granted: false,
        further_ips: Vec::new(),
        services: [("web".parse().expect("valid"), "80".parse().expect("valid"))].into(),
        access: crate::journal::Access::default(),
        name: None,
        metadata: [("a".into(), "b".into())].into(),
        env: [("A".into(), "b\nc".into())].into(),
        env_lost: false,
        boot: 0,
        created_ms: 7,
        started_ms: 0,
        ended_ms: 0,
        wake_on: WakeOn::default(),
        lifetime: Lifetime::default(),
        since: Moment::default(),
        init: None,
        halt_by: None,
        resizing: None,
        disk_unfinished: false,
        stop_result: proto::sandbox::v1::StopResult::Unspecified,
        cause: proto::Cause::ASKED,
        adopted: false,
        moved_to: None,
        volumes: Default::default(),
        failure: None,
        revision: 0,
    }
}

pub(crate) fn intent(number: u8) -> Intent {
    Intent {
        record: record(number),
        lease_address: true,
        taken: BTreeSet::new(),
        taken_ips: BTreeSet::new(),
    }
}

/// Journal under test, with the directory of its file.
struct Subject {
    journal: Arc<dyn Journal>,
    _dir: Option<tempfile::TempDir>,
}

impl std::ops::Deref for Subject {
    type Target = dyn Journal;

    fn deref(&self) -> &Self::Target {
        &*self.journal
    }
}

fn memory(pools: Pools) -> Subject {
    let journal = Arc::new(MemoryJournal::new("memory", pools, Arc::new(SoundDisk)));
    Subject { journal, _dir: None }
}

fn sqlite(pools: Pools) -> Subject {
    let dir = tempfile::tempdir().expect("a directory");
    let journal = SqliteJournal::open(&dir.path().join("journal.sqlite"), pools).expect("opens");
    Subject { journal: Arc::new(journal), _dir: Some(dir) }
}

/// Runs each check with both journals.
macro_rules! suite {
    ($($check:ident),* $(,)?) => {
        mod over_memory { $(#[tokio::test] async fn $check() { super::$check(super::memory).await; })* }
        mod over_sqlite { $(#[tokio::test] async fn $check() { super::$check(super::sqlite).await; })* }
    };
}

suite!(
    leases_rotate_and_skip_taken_vmids,
    attempt_begins_only_once,
    begin_fails_when_no_vmid_is_left,
    released_address_rests_before_it_is_leased_again,
    taken_vmid_is_replaced_by_the_next_free_one,
    update_with_an_old_revision_is_refused,
    changes_are_listed_in_revision_order,
    old_tombstones_and_cancellations_are_forgotten,
    epoch_never_decreases,
    cordon_and_drain_orders_are_stored,
    node_name_and_number_are_stored,
    highest_cancelled_attempt_is_stored,
    watchers_are_notified_of_record_changes_only,
    request_id_is_unique_among_live_records,
    imported_record_gets_an_address_of_this_node,
    dhcp_address_is_a_lease_only_while_running,
    concurrent_writers_get_distinct_leases_and_revisions,
);

async fn end(journal: &Subject, record: &Record, phase: Phase, ended_ms: u64) -> Record {
    let record = Record { phase, ended_ms, ..record.clone() };
    journal.update(&record).await.expect("ends")
}

async fn leases_rotate_and_skip_taken_vmids(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let taken = BTreeSet::from([vmid(1001)]);
    let mut leased = Vec::new();
    for number in 1..=3 {
        let intent = Intent { taken: taken.clone(), ..intent(number) };
        let record = journal.begin(intent, 0).await.expect("room");
        leased.push((record.vmid.get(), record.ip.expect("leased").octets()[3]));
        assert_eq!(record.revision, u64::from(number));
    }
    assert_eq!(leased, [(1000, 2), (1002, 3), (1003, 4)]);
    // The first vmid is free again, and so is 1001: the ring continues behind the last one, past
    // the tombstone, and returns to it only when nothing else is left.
    let first = journal.get(&id(1)).await.expect("reads").expect("there");
    end(&journal, &first, Phase::Deleted, 5).await;
    let next = journal.begin(Intent { lease_address: false, ..intent(4) }, 0).await.expect("room");
    assert_eq!((next.vmid, next.ip), (vmid(1001), None));
    let last = journal.begin(Intent { lease_address: false, ..intent(5) }, 0).await.expect("room");
    assert_eq!(last.vmid, vmid(1000));
}

async fn attempt_begins_only_once(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let first = journal.begin(intent(1), 0).await.expect("room");
    assert_eq!(
        journal.begin(intent(1), 0).await.expect_err("is there"),
        Error::Conflict { id: id(1), expected: 0, found: 1 }
    );
    let failed = end(&journal, &first, Phase::Failed, 1).await;
    assert_eq!(
        journal.begin(intent(1), 0).await.expect_err("the same attempt"),
        Error::Conflict { id: id(1), expected: 0, found: failed.revision }
    );
    let mut again = intent(1);
    again.record.attempt = 2;
    let second = journal.begin(again, 0).await.expect("a later attempt");
    assert_eq!((second.attempt, second.phase, second.failure), (2, Phase::Creating, None));
    assert_eq!(journal.all().await.expect("reads").len(), 1);
}

async fn begin_fails_when_no_vmid_is_left(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let plain = |number| Intent { lease_address: false, ..intent(number) };
    for number in 1..=4 {
        journal.begin(plain(number), 0).await.expect("room");
    }
    assert_eq!(journal.room(0).await.expect("reads"), (0, 3));
    assert_eq!(
        journal.begin(plain(5), 0).await.expect_err("full"),
        Error::VmidsExhausted { first: vmid(1000), last: vmid(1003) }
    );
    assert_eq!(journal.revision().await.expect("reads"), 4);
}

async fn released_address_rests_before_it_is_leased_again(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    for number in 1..=3 {
        journal.begin(intent(number), 0).await.expect("room");
    }
    assert_eq!(journal.begin(intent(4), 0).await.expect_err("full"), Error::AddressesExhausted);
    // The failed request took no vmid.
    assert_eq!(journal.room(0).await.expect("reads"), (1, 0));
    let first = journal.get(&id(1)).await.expect("reads").expect("there");
    end(&journal, &first, Phase::Deleted, 500).await;
    assert_eq!(
        journal.begin(intent(4), 1499).await.expect_err("in quarantine"),
        Error::AddressesExhausted
    );
    assert_eq!(journal.room(1499).await.expect("reads"), (2, 0));
    assert_eq!(journal.room(1500).await.expect("reads"), (2, 1));
    let fourth = journal.begin(intent(4), 1500).await.expect("rested");
    assert_eq!(fourth.ip, Some(Ipv4Addr::new(10, 0, 0, 2)));
}

async fn taken_vmid_is_replaced_by_the_next_free_one(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let record = journal.begin(intent(1), 0).await.expect("room");
    let taken = BTreeSet::from([vmid(1001)]);
    let moved = journal.next_vmid(&record, taken).await.expect("room");
    assert_eq!((moved.vmid, moved.ip, moved.revision), (vmid(1002), record.ip, 2));
    assert!(matches!(
        journal.next_vmid(&record, BTreeSet::new()).await,
        Err(Error::Conflict { expected: 1, found: 2, .. })
    ));
    assert_eq!(journal.get(&id(1)).await.expect("reads"), Some(moved));
}

async fn update_with_an_old_revision_is_refused(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let old = journal.begin(intent(1), 0).await.expect("room");
    let failure = Failure {
        reason: proto::Reason::PctFailed,
        message: "no\nway".into(),
        rollback: String::new(),
    };
    let changed = Record { phase: Phase::Undoing, failure: Some(failure), ..old.clone() };
    let new = journal.update(&changed).await.expect("current");
    assert_eq!(new, Record { revision: 2, ..changed });
    assert_eq!(journal.get(&id(1)).await.expect("reads").as_ref(), Some(&new));
    assert_eq!(
        journal.update(&old).await.expect_err("old"),
        Error::Conflict { id: id(1), expected: 1, found: 2 }
    );
    assert_eq!(
        journal.update(&record(9)).await.expect_err("never begun"),
        Error::Conflict { id: id(9), expected: 0, found: 0 }
    );
}

async fn changes_are_listed_in_revision_order(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let first = journal.begin(intent(2), 0).await.expect("room");
    journal.begin(intent(1), 0).await.expect("room");
    journal.update(&first).await.expect("current");
    let ids = |records: Vec<Record>| records.iter().map(|r| r.id).collect::<Vec<_>>();
    assert_eq!(ids(journal.changed_since(0, 10).await.expect("reads")), [id(1), id(2)]);
    assert_eq!(ids(journal.changed_since(2, 10).await.expect("reads")), [id(2)]);
    assert_eq!(ids(journal.changed_since(0, 1).await.expect("reads")), [id(1)]);
    assert_eq!(ids(journal.all().await.expect("reads")), [id(1), id(2)]);
}

async fn old_tombstones_and_cancellations_are_forgotten(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let first = journal.begin(intent(1), 0).await.expect("room");
    let second = journal.begin(intent(2), 0).await.expect("room");
    journal.begin(intent(3), 0).await.expect("room");
    journal.cancel(&id(8), 1, 100).await.expect("written");
    journal.cancel(&id(9), 1, 300).await.expect("written");
    end(&journal, &second, Phase::Failed, 200).await;
    end(&journal, &first, Phase::Deleted, 100).await;
    assert_eq!(journal.forget(100).await.expect("written"), 0);
    assert_eq!(journal.horizon().await.expect("reads"), 0);
    assert_eq!(journal.forget(200).await.expect("written"), 1);
    assert_eq!(journal.horizon().await.expect("reads"), 5);
    assert_eq!(journal.get(&id(1)).await.expect("reads"), None);
    assert_eq!(journal.cancelled(&id(8)).await.expect("reads"), 0);
    assert_eq!(journal.cancelled(&id(9)).await.expect("reads"), 1);
    assert_eq!(journal.forget(9999).await.expect("written"), 1);
    assert_eq!(journal.all().await.expect("reads").len(), 1);
    assert_eq!(journal.revision().await.expect("reads"), 5);
}

async fn epoch_never_decreases(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    for (asked, highest) in [(0, 0), (3, 3), (2, 3), (0, 3), (4, 4)] {
        assert_eq!(journal.epoch(asked).await.expect("written"), highest);
    }
}

async fn cordon_and_drain_orders_are_stored(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    assert_eq!(journal.scheduling().await.expect("reads"), Scheduling::default());
    for wanted in
        [SchedulingState::Draining, SchedulingState::Cordoned, SchedulingState::Schedulable]
    {
        let order = Scheduling { state: wanted, why: "disks \"x\"".into(), since_ms: 7 };
        journal.set_scheduling(&order).await.expect("written");
        assert_eq!(journal.scheduling().await.expect("reads"), order);
    }
}

async fn node_name_and_number_are_stored(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    assert_eq!(journal.node().await.expect("reads"), None);
    for number in [1, 3] {
        let node = Node { name: "pve1".parse().expect("a name"), number };
        journal.set_node(&node).await.expect("written");
        assert_eq!(journal.node().await.expect("reads"), Some(node));
    }
}

async fn highest_cancelled_attempt_is_stored(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    assert_eq!(journal.cancelled(&id(1)).await.expect("reads"), 0);
    for (attempt, highest) in [(2, 2), (1, 2), (3, 3)] {
        journal.cancel(&id(1), attempt, 0).await.expect("written");
        assert_eq!(journal.cancelled(&id(1)).await.expect("reads"), highest);
    }
}

async fn watchers_are_notified_of_record_changes_only(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let mut watcher = journal.watch();
    assert_eq!(*watcher.borrow_and_update(), 0);
    journal.begin(intent(1), 0).await.expect("room");
    tokio::time::timeout(std::time::Duration::from_secs(5), watcher.changed())
        .await
        .expect("woken")
        .expect("open");
    assert_eq!(*watcher.borrow_and_update(), 1);
    journal.epoch(1).await.expect("written");
    assert!(!watcher.has_changed().expect("open"), "no record was changed");
}

async fn request_id_is_unique_among_live_records(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let first = journal.begin(intent(1), 0).await.expect("room");
    let twin = || {
        let mut twin = intent(2);
        twin.record.request_id = "r-1".parse().expect("valid");
        twin
    };
    assert!(matches!(journal.begin(twin(), 0).await, Err(Error::Storage(_))));
    assert_eq!(journal.all().await.expect("reads"), std::slice::from_ref(&first));
    end(&journal, &first, Phase::Failed, 1).await;
    journal.begin(twin(), 0).await.expect("the first has ended");
}

async fn imported_record_gets_an_address_of_this_node(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let strange = Ipv4Addr::new(10, 0, 0, 2);
    let there = Record {
        vmid: vmid(5000),
        phase: Phase::Stopped,
        ip: Some(Ipv4Addr::new(10, 9, 9, 9)),
        ..record(1)
    };
    let import = async |record: &Record| journal.import(record, BTreeSet::from([strange]), 5).await;
    let here = import(&there).await.expect("taken over");
    assert_eq!((here.vmid, here.ip), (vmid(5000), Some(Ipv4Addr::new(10, 0, 0, 3))));
    assert!(matches!(import(&there).await, Err(Error::Conflict { .. })), "it is here");
    let other = Record { vmid: vmid(5001), request_id: here.request_id.clone(), ..record(2) };
    assert!(matches!(import(&other).await, Err(Error::Conflict { .. })), "its request is");
    assert_eq!(journal.room(5).await.expect("reads").1, 2, "what was refused leases nothing");
    let dynamic = Record { vmid: vmid(5002), network: Network::Dhcp, ip: None, ..record(3) };
    assert_eq!(import(&dynamic).await.expect("taken over").ip, None);
    // Replaces the tombstone of a sandbox that was released or moved, and no other.
    let left = Record { cause: proto::Cause::Moved, ..here };
    let left = end(&journal, &left, Phase::Deleted, 10).await;
    assert_eq!(import(&there).await.expect("back again").vmid, left.vmid);
    let deleted = journal.get(&id(3)).await.expect("reads").expect("there");
    end(&journal, &deleted, Phase::Deleted, 10).await;
    assert!(matches!(import(&dynamic).await, Err(Error::Conflict { .. })), "deleted is deleted");
    let later = Record { attempt: dynamic.attempt + 1, ..dynamic };
    import(&later).await.expect("over an attempt before it");
}

async fn dhcp_address_is_a_lease_only_while_running(make: fn(Pools) -> Subject) {
    let journal = make(pools());
    let begin = async |number: u8| {
        let mut asked = Intent { lease_address: false, ..intent(number) };
        asked.record.network = Network::Dhcp;
        journal.begin(asked, 0).await.expect("room")
    };
    let fixed = journal.begin(intent(1), 0).await.expect("room");
    let (first, second) = (begin(2).await, begin(3).await);
    assert_eq!(first.lease(), None);
    let given = Ipv4Addr::new(10, 0, 0, 3);
    let with = |record: &Record, ip: Option<Ipv4Addr>| Record {
        ip,
        ip_granted: true,
        phase: Phase::Running,
        ..record.clone()
    };
    // Neither an address of the pool nor one that DHCP gave to another sandbox.
    let taken = Error::AddressTaken { ip: fixed.ip.expect("leased") };
    assert_eq!(journal.update(&with(&first, fixed.ip)).await, Err(taken));
    let first = journal.update(&with(&first, Some(given))).await.expect("free");
    let taken = Err(Error::AddressTaken { ip: given });
    assert_eq!(journal.update(&with(&second, Some(given))).await, taken);
    // The pool skips it too: 10.0.0.2 and 10.0.0.3 are taken.
    let fixed = journal.begin(intent(4), 0).await.expect("room");
    assert_eq!(fixed.ip, Some(Ipv4Addr::new(10, 0, 0, 4)));
    // An address written by an older version is no lease.
    let believed = Record { ip_granted: false, ..with(&second, Some(given)) };
    let second = journal.update(&believed).await.expect("nothing is leased");
    assert_eq!(second.lease(), None);
    // A DHCP server may give a stopped sandbox's address to others.
    let stopped = Record { phase: Phase::Stopped, ..first.clone() };
    let stopped = journal.update(&stopped).await.expect("written");
    let second = journal.update(&with(&second, Some(given))).await.expect("free again");
    assert_eq!((stopped.lease(), second.lease()), (None, Some(given)));
    let up = Record { phase: Phase::Running, ..stopped };
    assert_eq!(journal.update(&up).await, Err(Error::AddressTaken { ip: given }));
    end(&journal, &second, Phase::Deleted, 1).await;
    journal.update(&up).await.expect("free again");
}

async fn concurrent_writers_get_distinct_leases_and_revisions(make: fn(Pools) -> Subject) {
    let wide = Pools {
        vmids: (vmid(1000), vmid(1199)),
        addresses: (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 200)),
        address_quarantine_ms: 0,
    };
    let subject = make(wide);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..200 {
        let journal = Arc::clone(&subject.journal);
        tasks.spawn(async move {
            let record = journal.begin(intent(number), 0).await.expect("room");
            // Every fourth update conflicts and must leave no trace.
            if number % 4 == 0 {
                journal.update(&Record { revision: 9999, ..record }).await.expect_err("conflict");
            }
        });
    }
    tasks.join_all().await;
    let all = subject.all().await.expect("reads");
    let distinct = |values: Vec<u64>| values.into_iter().collect::<BTreeSet<_>>().len();
    assert_eq!(distinct(all.iter().map(|r| r.vmid.get().into()).collect()), 200);
    assert_eq!(
        distinct(all.iter().map(|r| u32::from(r.ip.expect("leased")).into()).collect()),
        200
    );
    assert_eq!(distinct(all.iter().map(|r| r.revision).collect()), 200);
    assert_eq!(subject.revision().await.expect("reads"), 200);
    assert_eq!(subject.room(0).await.expect("reads"), (0, 0));
}
