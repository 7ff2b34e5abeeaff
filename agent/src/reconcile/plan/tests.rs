use proptest::prelude::*;

use super::*;
use crate::{
    journal::{
        Failure,
        conformance::{id, record, vmid},
    },
    sandbox::drift::detect::Drift,
};

const TEMPLATE: u32 = 9000;

/// Container under a vmid.
#[derive(Debug, Clone, Copy)]
enum Stands {
    Nothing,
    /// Container of this sandbox.
    Ours(u8),
    /// Copy of this sandbox's container.
    Copy(u8),
    /// Foreign container without a mark.
    Foreign,
}

#[derive(Debug, Clone, Default)]
struct World {
    records: Vec<(u8, u32, Phase, bool)>,
    stands: Vec<(u32, Stands, bool)>,
    /// True, for the containers from 100 on, when frozen, and when locked by a pause.
    pauses: Vec<(bool, bool)>,
    /// Failures recorded by `Look`, by sandbox.
    noted: BTreeMap<SandboxId, Failure>,
    /// Sandboxes with a change of their size that was cut short.
    resizing: BTreeSet<u8>,
    quorate: bool,
    template_lock: Option<&'static str>,
    dead_clone: bool,
}

const PHASES: [Phase; 10] = [
    Phase::Creating,
    Phase::Undoing,
    Phase::Running,
    Phase::Paused,
    Phase::Starting,
    Phase::Stopping,
    Phase::Stopped,
    Phase::Deleting,
    Phase::Deleted,
    Phase::Failed,
];

fn world() -> impl Strategy<Value = World> {
    let stands = prop_oneof![
        Just(Stands::Nothing),
        (0u8..8).prop_map(Stands::Ours),
        (0u8..8).prop_map(Stands::Copy),
        Just(Stands::Foreign),
    ];
    (
        prop::collection::vec((prop::sample::select(&PHASES[..]), any::<bool>()), 0..6),
        prop::collection::vec((stands, any::<bool>()), 0..8),
        prop::collection::vec(any::<(bool, bool)>(), 8),
        prop::collection::btree_set(0u8..6, 0..3),
        any::<bool>(),
        prop::sample::select(&[None, Some("disk"), Some("backup")][..]),
        any::<bool>(),
    )
        .prop_map(|(records, stands, pauses, resizing, quorate, template_lock, dead_clone)| {
            World {
                pauses,
                resizing,
                noted: BTreeMap::new(),
                records: (0u8..)
                    .zip(records)
                    .map(|(n, (phase, busy))| (n, 100 + u32::from(n), phase, busy))
                    .collect(),
                stands: (100..).zip(stands).map(|(n, (stands, runs))| (n, stands, runs)).collect(),
                quorate,
                template_lock,
                dead_clone,
            }
        })
}

fn of(number: u8, on: u32, phase: Phase) -> Record {
    let ended_ms = u64::from(phase.ended()) * 10;
    Record { vmid: vmid(on), phase, ended_ms, ..record(number) }
}

fn split(world: &World) -> (Intended, Observed) {
    let mut intended = Intended { forget_before_ms: 5, ..Intended::default() };
    for &(number, on, phase, busy) in &world.records {
        let mut record = of(number, on, phase);
        record.failure = world.noted.get(&record.id).cloned();
        record.resizing = world.resizing.contains(&number).then_some(record.size);
        if busy {
            intended.busy.insert(record.id);
        }
        if phase.ended() {
            intended.ended.push(Tombstone::from(&record));
        } else {
            intended.live.push(Arc::new(record));
        }
    }
    if world.dead_clone {
        intended.dead_clones.insert(vmid(TEMPLATE));
    }
    let mut observed = Observed::default();
    observed.cluster.quorate = world.quorate;
    let mut put = |on: u32, mark: Option<Mark>, running: bool, lock: Option<&str>| {
        let template = on == TEMPLATE;
        let lock = lock.map(str::to_owned);
        let at = usize::try_from(on - 100).expect("fits");
        let (frozen, held) = world.pauses.get(at).copied().unwrap_or_default();
        let (frozen, noted) = (frozen && running, held);
        let container =
            Container { mark, template, lock, running, frozen, held, noted, ..Default::default() };
        observed.containers.insert(vmid(on), container);
    };
    for &(on, stands, runs) in &world.stands {
        match stands {
            Stands::Nothing => {}
            Stands::Ours(number) => {
                put(on, Some(of(number, on, Phase::Running).mark()), runs, None)
            }
            Stands::Copy(number) => {
                put(on, Some(of(number, on + 500, Phase::Running).mark()), runs, None);
            }
            Stands::Foreign => put(on, None, runs, None),
        }
    }
    put(TEMPLATE, None, false, world.template_lock);
    (intended, observed)
}

/// Simulates successful operations. Panics when one would touch a container that is not ours, as
/// `destroy_owned` refuses to.
fn apply(world: &mut World, actions: &[Action]) {
    for action in actions {
        let mut set = |id_: &SandboxId, to: Phase, goes: bool, runs: bool| {
            let record =
                world.records.iter_mut().find(|r| id(r.0) == *id_).expect("in the journal");
            record.2 = to;
            let (number, on) = (record.0, record.1);
            let ours = |s: &&mut (u32, Stands, bool)| {
                s.0 == on && matches!(s.1, Stands::Ours(n) if n == number)
            };
            match world.stands.iter_mut().find(ours) {
                Some(stands) => {
                    stands.1 = if goes { Stands::Nothing } else { stands.1 };
                    stands.2 = runs;
                    if let Some(pause) = world.pauses.get_mut(usize::from(number)) {
                        *pause = (to == Phase::Paused, to == Phase::Paused);
                    }
                }
                // A container that does not exist cannot be started: the record is stopped again.
                None if runs => record.2 = Phase::Stopped,
                None => {}
            }
        };
        match action {
            Action::EnforcePause(id_) => {
                let record = world.records.iter().find(|r| id(r.0) == *id_).expect("a record");
                let paused = record.2 == Phase::Paused;
                world.pauses[usize::from(record.0)] = (paused, paused);
            }
            Action::Undo(id) => set(id, Phase::Failed, true, false),
            Action::Delete(id) => set(id, Phase::Deleted, true, false),
            Action::Stop(id) => set(id, Phase::Stopped, false, false),
            Action::RecordDrift(id_) => {
                let (intended, observed) = split(world);
                let record = intended.live.iter().find(|record| record.id == *id_);
                let record = record.expect("it lives");
                let seen = detect_drift(record, &place(record, &observed), &intended.life);
                let seen = seen.expect("something new");
                let at = world.records.iter_mut().find(|r| id(r.0) == *id_).expect("a record");
                match seen {
                    Drift::Up => at.2 = Phase::Running,
                    Drift::Fit => {}
                    Drift::Rebooted | Drift::RebootedItself | Drift::Expired(_) => {
                        panic!("nothing was rebooted")
                    }
                    Drift::Down(reason, message) | Drift::Unfit(reason, message) => {
                        at.2 = Phase::Stopped;
                        let rollback = String::new();
                        let failure = Failure { reason, message, rollback };
                        world.noted.insert(*id_, failure);
                        continue;
                    }
                }
                world.noted.remove(id_);
            }
            Action::Adopt(_) | Action::Release(_) | Action::Unmark { .. } => {
                panic!("nobody adopted anything")
            }
            Action::SettleSize(id_) => world.resizing.retain(|number| id(*number) != *id_),
            Action::Start(id) => set(id, Phase::Running, false, true),
            Action::DestroyOrphan { id, .. } => set(id, Phase::Deleted, true, false),
            Action::RemoveRemnant(_) => panic!("every number has its tombstone"),
            Action::Unlock(_) => world.template_lock = None,
            Action::Quarantine { .. } | Action::TooManyOrphans { .. } | Action::Forget { .. } => {}
        }
    }
}

fn acts(action: &Action) -> bool {
    !matches!(
        action,
        Action::Quarantine { .. } | Action::TooManyOrphans { .. } | Action::Forget { .. }
    )
}

/// Returns what is planned after three passes. What one pass finds out may ask for more: that a container runs, then
/// a pause that is half done, then its size.
fn left_after_three_passes(world: &mut World) -> Vec<Action> {
    for _ in 0..3 {
        let (intended, observed) = split(world);
        apply(world, &plan(&intended, &observed));
    }
    let (intended, observed) = split(world);
    plan(&intended, &observed)
}

proptest! {
    #[test]
    fn plan_leaves_nothing_to_do_after_three_passes(mut world in world()) {
        let left = left_after_three_passes(&mut world);
        prop_assert!(!left.iter().any(acts), "{:?}", left);
    }

    #[test]
    fn without_quorum_nothing_is_planned(world in world()) {
        let (intended, observed) = split(&World { quorate: false, ..world });
        prop_assert_eq!(plan(&intended, &observed), []);
    }

    #[test]
    fn only_known_sandboxes_that_are_not_busy_are_touched(world in world()) {
        let (intended, observed) = split(&world);
        for action in plan(&intended, &observed) {
            let touched = match &action {
                Action::Undo(id) | Action::Delete(id) | Action::Stop(id) | Action::Start(id)
                | Action::RecordDrift(id) | Action::EnforcePause(id) | Action::Adopt(id)
                | Action::Release(id) | Action::SettleSize(id) | Action::Unmark { id, .. } => *id,
                Action::DestroyOrphan { id, vmid } => {
                    // The mark, the vmid, and a tombstone with both must match.
                    let mark = observed.containers[vmid].mark.clone().expect("marked");
                    prop_assert_eq!((mark.sandbox_id, mark.vmid), (*id, *vmid));
                    prop_assert!(intended.ended.iter().any(|t| t.id == *id && t.vmid == *vmid));
                    *id
                }
                Action::Unlock(template) => {
                    prop_assert!(intended.dead_clones.contains(template));
                    continue;
                }
                Action::RemoveRemnant(_)
                | Action::Quarantine { .. }
                | Action::TooManyOrphans { .. }
                | Action::Forget { .. } => continue,
            };
            prop_assert!(!intended.busy.contains(&touched));
            let live = intended.live.iter().map(|record| record.id);
            let ended = intended.ended.iter().map(|tombstone| tombstone.id);
            prop_assert!(live.chain(ended).any(|id| id == touched), "{:?}", action);
        }
    }

    #[test]
    fn only_the_lock_of_our_own_dead_clone_is_removed(world in world()) {
        let (intended, observed) = split(&world);
        let unlocks = plan(&intended, &observed).contains(&Action::Unlock(vmid(TEMPLATE)));
        let may = world.quorate && world.dead_clone && world.template_lock == Some("disk");
        prop_assert_eq!(unlocks, may);
    }
}

#[test]
fn container_that_runs_after_all_with_half_a_pause_and_half_a_size_is_settled() {
    let mut world = World {
        records: vec![(0, 100, Phase::Stopped, false)],
        stands: vec![(100, Stands::Ours(0), true)],
        pauses: vec![(false, true)],
        resizing: [0].into(),
        quorate: true,
        ..World::default()
    };
    assert_eq!(left_after_three_passes(&mut world), []);
}

#[test]
fn half_done_pause_or_resume_is_enforced() {
    let plan_of = |phase, runs, pause| {
        let world = World {
            records: vec![(0, 100, phase, false)],
            stands: vec![(100, Stands::Ours(0), runs)],
            pauses: vec![pause],
            quorate: true,
            ..World::default()
        };
        let (intended, observed) = split(&world);
        plan(&intended, &observed)
    };
    let enforced = [Action::EnforcePause(id(0))];
    assert_eq!(plan_of(Phase::Paused, true, (true, true)), []);
    assert_eq!(plan_of(Phase::Running, true, (false, false)), []);
    for half in [(false, false), (true, false), (false, true)] {
        assert_eq!(plan_of(Phase::Paused, true, half), enforced, "{half:?}");
    }
    for half in [(true, true), (true, false), (false, true)] {
        assert_eq!(plan_of(Phase::Running, true, half), enforced, "{half:?}");
    }
    assert_eq!(plan_of(Phase::Stopped, false, (false, true)), enforced);
    // After a reboot the container is down, and that comes first.
    assert_eq!(plan_of(Phase::Paused, false, (false, true)), [Action::RecordDrift(id(0))]);
}

#[test]
fn interrupted_change_of_size_is_settled_where_the_container_can_be_changed() {
    for phase in [Phase::Running, Phase::Stopped, Phase::Paused, Phase::Deleting] {
        let (runs, paused) = (phase.is_up(), phase == Phase::Paused);
        let world = World {
            records: vec![(0, 100, phase, false)],
            stands: vec![(100, Stands::Ours(0), runs)],
            pauses: vec![(paused, paused)],
            quorate: true,
            ..World::default()
        };
        let (mut intended, observed) = split(&world);
        let record = Record::clone(&intended.live[0]);
        intended.live[0] = Arc::new(Record { resizing: Some(record.size), ..record });
        let settles = plan(&intended, &observed).contains(&Action::SettleSize(id(0)));
        assert_eq!(settles, matches!(phase, Phase::Running | Phase::Stopped), "{phase:?}");
        let nowhere = Observed { containers: BTreeMap::new(), ..observed };
        assert!(!plan(&intended, &nowhere).contains(&Action::SettleSize(id(0))), "{phase:?}");
    }
}

#[test]
fn too_many_orphans_are_reported_and_not_destroyed() {
    let plan_of = |orphans: u8| {
        let world = World {
            records: (0..orphans).map(|n| (n, 100 + u32::from(n), Phase::Deleted, false)).collect(),
            stands: (0..orphans).map(|n| (100 + u32::from(n), Stands::Ours(n), false)).collect(),
            pauses: vec![],
            quorate: true,
            ..World::default()
        };
        let (intended, observed) = split(&world);
        plan(&intended, &observed)
    };
    assert_eq!(plan_of(5).len(), 5);
    assert_eq!(plan_of(6), [Action::TooManyOrphans { orphans: 6, marked: 6 }]);
}

#[test]
fn plan_ignores_a_container_with_a_copied_mark() {
    let world = World {
        records: vec![],
        stands: vec![(100, Stands::Copy(1), true)],
        pauses: vec![(true, true)],
        quorate: true,
        ..World::default()
    };
    let (intended, observed) = split(&world);
    assert_eq!(plan(&intended, &observed), []);
}

#[test]
fn remnants_of_ended_attempts_are_destroyed() {
    let seen = |on: u32, attempt: u32| {
        let mark = Mark { attempt, ..of(0, on, Phase::Running).mark() };
        (vmid(on), Container { mark: Some(mark), ..Container::default() })
    };
    let planned = |record: Record, containers: Vec<(Vmid, Container)>| {
        let mut intended = Intended::default();
        if record.phase.ended() {
            intended.ended.push(Tombstone::from(&record));
        } else {
            intended.live.push(Arc::new(record));
        }
        let mut observed = Observed::default();
        observed.cluster.quorate = true;
        observed.containers.extend(containers);
        plan(&intended, &observed)
    };
    let second = |on, phase| Record { attempt: 2, ..of(0, on, phase) };
    let orphan = [Action::DestroyOrphan { id: id(0), vmid: vmid(100) }];
    // A power cut brings back the first attempt's container, while the second lives and after it
    // ended.
    let lives = planned(second(101, Phase::Stopped), vec![seen(100, 1), seen(101, 2)]);
    assert_eq!(lives, orphan);
    assert_eq!(planned(second(101, Phase::Failed), vec![seen(100, 1)]), orphan);
    // A later attempt, or the same one under another vmid, must not be swept.
    for attempt in [2, 3] {
        let odd = planned(second(101, Phase::Stopped), vec![seen(100, attempt), seen(101, 2)]);
        assert!(matches!(odd[..], [Action::Quarantine { .. }]), "{odd:?}");
    }
    // A sandbox that has moved to another node must not be harmed here; an earlier attempt is over.
    let moved = |on| Record { cause: proto::Cause::Moved, ..second(on, Phase::Deleted) };
    let back = planned(moved(101), vec![seen(100, 1), seen(101, 2)]);
    assert!(
        matches!(back[..], [Action::DestroyOrphan { .. }, Action::Quarantine { .. }]),
        "{back:?}"
    );
    // An interrupted destruction leaves a vmid and a lock.
    let gutted = || (vmid(100), Container { gutted: true, ..Container::default() });
    assert_eq!(planned(second(100, Phase::Deleted), vec![gutted()]), orphan);
    assert_eq!(planned(second(101, Phase::Deleted), vec![gutted()]), [], "somebody else's");
}

#[test]
fn remnant_of_a_destruction_under_our_vmid_needs_no_record() {
    // A power cut brought back an earlier attempt's container, and its removal was interrupted,
    // while the later attempt has the record.
    let planned = |at: u32, record: Option<Record>| {
        let mut intended = Intended { vmids: Some((vmid(100), vmid(199))), ..Intended::default() };
        intended.live.extend(record.map(Arc::new));
        let mut observed = Observed::default();
        observed.cluster.quorate = true;
        let gutted = Container { gutted: true, ..Container::default() };
        observed.containers.insert(vmid(at), gutted);
        plan(&intended, &observed)
    };
    assert_eq!(planned(100, None), [Action::RemoveRemnant(vmid(100))]);
    assert_eq!(planned(200, None), [], "not our number");
    let deleting = planned(100, Some(of(0, 100, Phase::Deleting)));
    assert_eq!(deleting, [Action::Delete(id(0))], "its record has it");
}
