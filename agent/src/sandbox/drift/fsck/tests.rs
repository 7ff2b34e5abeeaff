use super::*;
use crate::{
    journal::conformance::{id, record, vmid},
    sandbox::drift::observe::Container,
};

fn of(number: u8, on: u32, phase: Phase) -> Arc<Record> {
    Arc::new(Record { vmid: vmid(on), phase, ip: None, ..record(number) })
}

fn container(record: &Record, running: bool) -> Container {
    let volumes = vec![format!("local:subvol-{}-disk-0", record.vmid)];
    Container { mark: Some(record.mark()), running, volumes, ..Container::default() }
}

/// Running sandbox 1 on vmid 100, without findings.
fn well() -> (Intended, Observed) {
    let record = of(1, 100, Phase::Running);
    let mut observed = Observed::default();
    observed.cluster.quorate = true;
    observed.containers.insert(record.vmid, container(&record, true));
    observed.volumes.insert(record.vmid, vec!["local:subvol-100-disk-0".into()]);
    (Intended { live: vec![record], ..Intended::default() }, observed)
}

#[track_caller]
fn finds(expected: &[Invariant], change: impl FnOnce(&mut Intended, &mut Observed)) {
    let (mut intended, mut observed) = well();
    change(&mut intended, &mut observed);
    let found: Vec<_> = findings(&intended, &observed).iter().map(|f| f.invariant).collect();
    assert_eq!(found, expected);
}

#[test]
fn sound_node_has_no_findings() {
    finds(&[], |_, _| {});
}

#[test]
fn without_quorum_fsck_reports_only_unchecked() {
    finds(&[Invariant::Unchecked], |_, observed| {
        *observed = Observed::default();
    });
}

#[test]
fn only_paused_sandboxes_may_be_frozen_and_locked() {
    let with = |phase, frozen, held, noted| {
        move |intended: &mut Intended, observed: &mut Observed| {
            intended.live = vec![of(1, 100, phase)];
            for container in observed.containers.values_mut() {
                container.running = phase != Phase::Stopped;
                (container.frozen, container.held, container.noted) = (frozen, held, noted);
            }
        }
    };
    finds(&[], with(Phase::Paused, true, true, true));
    finds(&[Invariant::I13], with(Phase::Paused, false, true, true));
    finds(&[Invariant::I13], with(Phase::Paused, true, false, true));
    finds(&[Invariant::I13], with(Phase::Paused, true, false, false));
    finds(&[Invariant::I13], with(Phase::Running, true, false, false));
    finds(&[Invariant::I13], with(Phase::Running, false, true, true));
    finds(&[Invariant::I13], with(Phase::Running, false, false, true));
    finds(&[Invariant::I13], with(Phase::Stopped, false, true, true));
    finds(&[Invariant::I12], |intended, observed| {
        with(Phase::Paused, true, true, true)(intended, observed);
        observed.containers.values_mut().for_each(|container| container.running = false);
    });
}

#[test]
fn every_kind_of_damage_is_found() {
    finds(&[Invariant::I2], |_, observed| observed.containers.clear());
    finds(&[Invariant::I2], |_, observed| observed.volumes.clear());
    finds(&[Invariant::I5], |_, observed| {
        observed.containers.values_mut().for_each(|container| container.mark = None);
    });
    finds(&[Invariant::I12], |_, observed| {
        observed.containers.values_mut().for_each(|container| container.running = false);
    });
    finds(&[Invariant::I9], |intended, _| intended.live = vec![of(1, 100, Phase::Deleting)]);
    finds(&[Invariant::I3], |intended, observed| {
        let twin = of(2, 100, Phase::Creating);
        intended.busy.insert(twin.id);
        intended.live.push(twin);
        observed.volumes.insert(vmid(100), vec!["local:subvol-100-disk-0".into()]);
    });
    // Its volume is gone, and somebody else's is there.
    finds(&[Invariant::I2, Invariant::I1], |_, observed| {
        observed.volumes.insert(vmid(100), vec!["local:subvol-100-disk-7".into()]);
    });
}

#[test]
fn finding_about_an_abandoned_operation_names_the_phase_in_words() {
    let (mut intended, observed) = well();
    intended.live = vec![of(1, 100, Phase::Deleting)];
    let details: Vec<_> =
        findings(&intended, &observed).into_iter().map(|found| found.detail).collect();
    assert_eq!(details, ["it is being deleted, and no operation works on it"]);
}

#[test]
fn sandbox_with_an_operation_under_way_is_not_checked() {
    finds(&[], |intended, observed| {
        observed.containers.clear();
        intended.busy.insert(id(1));
    });
}

#[test]
fn remnants_of_ended_sandboxes_are_reported() {
    let end = |intended: &mut Intended| {
        let dead = Record::clone(&intended.live[0]);
        intended.live.clear();
        intended.ended = vec![Tombstone::from(&Record { phase: Phase::Deleted, ..dead })];
    };
    // Its container; then only its volumes; then volumes of the new owner of the vmid.
    finds(&[Invariant::I1], |intended, _| end(intended));
    finds(&[Invariant::I1], |intended, observed| {
        end(intended);
        observed.containers.clear();
    });
    finds(&[], |intended, observed| {
        end(intended);
        observed.containers.clear();
        observed.cluster.guests.insert(vmid(100), "node1".parse().expect("valid"));
    });
    finds(&[Invariant::I1], |intended, _| intended.live.clear());
    // The remnant of an interrupted destruction carries no mark.
    finds(&[Invariant::I1], |intended, observed| {
        end(intended);
        observed.volumes.clear();
        let gutted = Container { gutted: true, ..Container::default() };
        observed.containers.insert(vmid(100), gutted);
    });
    // A second container with the mark of a live sandbox.
    finds(&[Invariant::I1], |intended, observed| {
        let mark = Record { vmid: vmid(101), ..Record::clone(&intended.live[0]) }.mark();
        let twin = Container { mark: Some(mark), ..Container::default() };
        observed.containers.insert(vmid(101), twin);
    });
}

#[test]
fn only_volumes_that_no_sandbox_made_are_reported() {
    let stray = |on: u32, disk: u32| vec![format!("local:subvol-{on}-disk-{disk}")];
    let add = |observed: &mut Observed, on: u32, disk: u32| {
        observed.volumes.entry(vmid(on)).or_default().extend(stray(on, disk));
    };
    // Next to a live sandbox's volume, unless an operation works on it, or the volume is its own.
    finds(&[Invariant::I1], |_, observed| add(observed, 100, 7));
    finds(&[], |intended, observed| {
        add(observed, 100, 7);
        intended.busy.insert(id(1));
    });
    finds(&[], |intended, observed| {
        add(observed, 100, 1);
        let volumes = OwnVolumes { named: stray(100, 1), ..OwnVolumes::default() };
        intended.live = vec![Arc::new(Record { volumes, ..Record::clone(&intended.live[0]) })];
    });
    // With a free vmid of ours; not with a foreign vmid, nor one of a creation under way.
    let ours = Some((vmid(100), vmid(199)));
    finds(&[Invariant::I1], |intended, observed| {
        intended.range = ours;
        add(observed, 150, 0);
    });
    finds(&[], |intended, observed| {
        intended.range = ours;
        add(observed, 250, 0);
    });
    finds(&[], |intended, observed| {
        intended.range = ours;
        add(observed, 150, 0);
        intended.used.insert(vmid(150));
    });
    finds(&[], |intended, observed| {
        intended.range = ours;
        add(observed, 150, 0);
        observed.cluster.guests.insert(vmid(150), "node2".parse().expect("valid"));
    });
    // The leftover of an ended sandbox is reported once.
    finds(&[Invariant::I1], |intended, observed| {
        intended.range = ours;
        add(observed, 150, 0);
        let dead = of(2, 150, Phase::Deleted);
        intended.ended = vec![Tombstone::from(&*dead)];
        let made = OwnVolumes { named: stray(150, 0), ..OwnVolumes::default() };
        intended.made.insert(dead.id, made);
    });
}
