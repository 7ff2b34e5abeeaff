use std::time::Duration;

use agent::pve::{ErrorKind, OwnVolumes, volume};
use proto::id::SandboxId;

use super::assert_kind;
use crate::stage::{DEADLINE, Moment, Shown, Stage, mark, until};

pub(super) async fn destroy_is_idempotent(stage: &dyn Stage) -> Shown {
    let (pve, never) = (stage.pve(), stage.order());
    let own = stage.own().await;
    let nobody = never.mark.sandbox_id;
    pve.destroy_owned(never.vmid, &nobody, &own, DEADLINE).await.expect("nothing there");
    let order = stage.cloned().await;
    stage.destroy(&order).await;
    stage.destroy(&order).await;
    // The number can be used again.
    pve.clone_template(&order, DEADLINE).await.expect("clone again");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn running_container_is_stopped_before_it_is_destroyed(
    stage: &dyn Stage,
) -> Shown {
    let order = stage.configured().await;
    stage.pve().start(order.vmid, DEADLINE).await.expect("start");
    assert!(stage.pve().running(order.vmid).await);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn destroy_of_a_container_of_another_owner_is_refused(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let pve = stage.pve();
    let ours = stage.cloned().await;
    let (foreign, copy) = (stage.fresh(), stage.fresh());
    stage.by_others(foreign, "somebody's own").await;
    stage.by_others(copy, &ours.mark.to_string()).await;
    let nobody = SandboxId::new(1, &[9; 10]);
    let cases = [
        // A correct mark, but another sandbox is requested.
        (ours.vmid, nobody),
        // No mark.
        (foreign, ours.mark.sandbox_id),
        // The requested mark, in a copy with another number.
        (copy, ours.mark.sandbox_id),
        (stage.template(), ours.mark.sandbox_id),
    ];
    for (vmid, owner) in cases {
        let before = stage.look(vmid).await;
        assert_kind!(pve.destroy_owned(vmid, &owner, &own, DEADLINE).await, NotOurs);
        assert_eq!(stage.look(vmid).await, before);
    }
    stage.destroy(&ours).await;
    stage.remove(foreign).await;
    stage.remove(copy).await;
    Shown::Yes
}

pub(super) async fn destroy_of_a_protected_or_locked_container_is_refused(
    stage: &dyn Stage,
) -> Shown {
    let own = stage.own().await;
    let order = stage.cloned().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    stage.operator_sets(vmid, "protection", "1").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.destroy_owned(vmid, &owner, &own, DEADLINE).await, WrongState);
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "protection", "0").await;
    stage.operator_sets(vmid, "lock", "backup").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.destroy_owned(vmid, &owner, &own, DEADLINE).await, Locked);
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "lock", "").await;
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn a_killed_clone_is_cleaned_up(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let order = stage.order();
    if !stage.kill_next_clone(order.vmid, Moment::Volume).await {
        return Shown::NotHere("a clone that is killed half-way");
    }
    let pve = stage.pve();
    pve.clone_template(&order, DEADLINE).await.expect_err("it is killed");
    let config = pve.config(order.vmid).await.expect("read").expect("the half of it");
    assert_eq!((config.lock(), config.rootfs()), (Some("create"), None));
    assert_eq!(config.mark().as_ref(), Some(&order.mark), "it names its owner");
    assert_eq!(pve.volumes(order.vmid).await.expect("volumes").len(), 1, "that no config names");
    // The template's lock stays, and a clone by somebody else is refused.
    let next = stage.order();
    assert_kind!(pve.clone_template(&next, DEADLINE).await, Locked);
    let stranger = mark(order.vmid).sandbox_id;
    assert_kind!(pve.destroy_owned(order.vmid, &stranger, &own, DEADLINE).await, NotOurs);
    stage.destroy(&order).await;
    pve.unlock_template(stage.template()).await.expect("unlock");
    pve.clone_template(&next, DEADLINE).await.expect("clone");
    stage.destroy(&next).await;
    Shown::Yes
}

pub(super) async fn a_clone_killed_at_once_is_cleaned_up(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.kill_next_clone(order.vmid, Moment::FirstWrite).await {
        return Shown::NotHere("a clone that is killed after its first write");
    }
    let pve = stage.pve();
    pve.clone_template(&order, DEADLINE).await.expect_err("it is killed");
    let config = pve.config(order.vmid).await.expect("read").expect("its first write");
    assert_eq!((config.lock(), config.mark()), (Some("create"), None));
    stage.destroy(&order).await;
    pve.unlock_template(stage.template()).await.expect("unlock");
    let next = stage.cloned().await;
    stage.destroy(&next).await;
    Shown::Yes
}

pub(super) async fn a_clone_killed_while_mounted_is_cleaned_up(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.kill_next_clone(order.vmid, Moment::Mounted).await {
        return Shown::NotHere("a clone that is killed while its volume is mounted");
    }
    let pve = stage.pve();
    pve.clone_template(&order, DEADLINE).await.expect_err("it is killed");
    stage.destroy(&order).await;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    assert!(!mounts.contains(&format!("/{}/rootfs", order.vmid)), "{mounts}");
    pve.unlock_template(stage.template()).await.expect("unlock");
    let next = stage.cloned().await;
    stage.destroy(&next).await;
    Shown::Yes
}

pub(super) async fn a_killed_destruction_is_finished(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let order = stage.cloned().await;
    if !stage.kill_next_destroy(order.vmid).await {
        stage.destroy(&order).await;
        return Shown::NotHere("a destruction that is killed half-way");
    }
    let (pve, owner) = (stage.pve(), order.mark.sandbox_id);
    // An implementation that notices the kill may finish the destruction by itself.
    if pve.destroy_owned(order.vmid, &owner, &own, DEADLINE).await.is_err() {
        assert!(pve.config(order.vmid).await.expect("read").is_some());
        assert_eq!(pve.volumes(order.vmid).await.expect("volumes"), [""; 0]);
    }
    stage.destroy(&order).await;
    Shown::Yes
}

/// Destroys while a `pct clone` of a killed agent still runs. The next agent must not take the
/// container's absence, so far, for the end of the clone.
pub(super) async fn destroy_waits_for_the_clone_of_an_earlier_agent(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let early = stage.order();
    let late = stage.order();
    let pve = stage.pve();
    for (order, wait) in [(&early, false), (&late, true)] {
        if !stage.slow_next_clone(order.vmid).await {
            return Shown::NotHere("a clone that takes its time");
        }
        let later = async {
            if wait {
                until("a config", async || pve.config(order.vmid).await.expect("read")).await;
            } else {
                // Long enough for the start, not for a write.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let owner = order.mark.sandbox_id;
            stage.another_life().destroy_owned(order.vmid, &owner, &own, DEADLINE).await
        };
        let (_, destroyed) = tokio::join!(pve.clone_template(order, DEADLINE), later);
        destroyed.expect("destroy");
        stage.nothing_left(order.vmid).await;
    }
    Shown::Yes
}

pub(super) async fn template_is_not_unlocked_while_its_clone_runs(stage: &dyn Stage) -> Shown {
    let pve = stage.pve();
    pve.unlock_template(stage.template()).await.expect("nothing to unlock");
    let order = stage.order();
    if !stage.slow_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let early = async {
        until("the template's lock", async || {
            let template = pve.config(stage.template()).await.expect("read");
            template.filter(|config| config.lock() == Some("disk"))
        })
        .await;
        pve.unlock_template(stage.template()).await
    };
    let (cloned, unlocked) = tokio::join!(pve.clone_template(&order, DEADLINE), early);
    cloned.expect("clone");
    assert_kind!(unlocked, Locked);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn clone_terminated_at_its_deadline_is_cleaned_up(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.slow_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let pve = stage.pve();
    let kind = super::refused(pve.clone_template(&order, Duration::from_millis(500)).await);
    assert!(matches!(kind, ErrorKind::Deadline(_)), "{kind:?}");
    stage.destroy(&order).await;
    // The clone was told to end, not killed: it removed its lock from the template.
    let next = stage.cloned().await;
    stage.destroy(&next).await;
    Shown::Yes
}

/// Deletes a sandbox with an operator's volume under its number that no config names.
pub(super) async fn destroy_spares_a_foreign_volume(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    let config = pve.config(vmid).await.expect("read").expect("it is there");
    let named = OwnVolumes { named: config.own_volumes(vmid), ..OwnVolumes::default() };
    assert_eq!(named.named.len(), 1, "{config:?}");
    let stray = stage.allocate(vmid).await;
    let key = volume::key(&stray).expect("a volume");
    let there = async || {
        let volumes = pve.volumes(vmid).await.expect("volumes");
        volumes.iter().filter_map(|volume| volume::key(volume)).collect::<Vec<_>>()
    };
    assert!(there().await.contains(&key), "{key}");
    for own in [&named, &named, &OwnVolumes::default()] {
        pve.destroy_owned(vmid, &owner, own, DEADLINE).await.expect("destroy");
        assert_eq!(pve.config(vmid).await.expect("read"), None);
        assert_eq!(there().await, std::slice::from_ref(&key));
    }
    // The volume is visible before the next clone to that number, and in the list of all volumes.
    let site = pve.clone_site(stage.template(), vmid).await.expect("a look");
    let seen: Vec<_> = site.volumes.iter().filter_map(|volume| volume::key(volume)).collect();
    assert_eq!(seen, std::slice::from_ref(&key));
    let all = pve.all_volumes().await.expect("a look");
    assert_eq!(all.get(&vmid), Some(&site.volumes));
    stage.free(&stray).await;
    stage.nothing_left(vmid).await;
    Shown::Yes
}

/// Identifies a killed clone by its config, and its volume by the volumes that existed before.
pub(super) async fn volume_of_a_killed_clone_is_removed_only_if_it_is_owned(
    stage: &dyn Stage,
) -> Shown {
    let order = stage.order();
    if !stage.kill_next_clone(order.vmid, Moment::Volume).await {
        return Shown::NotHere("a clone that is killed half-way");
    }
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    let site = pve.clone_site(order.template, vmid).await.expect("a look");
    assert_eq!(site.volumes, [""; 0]);
    pve.clone_template(&order, DEADLINE).await.expect_err("it is killed");
    let nothing = OwnVolumes::default();
    pve.destroy_owned(vmid, &owner, &nothing, DEADLINE).await.expect("destroy");
    assert_eq!(pve.config(vmid).await.expect("read"), None);
    assert_eq!(pve.volumes(vmid).await.expect("volumes").len(), 1, "whose it is, nobody said");
    let elsewhere = OwnVolumes::cloned_to(vec!["elsewhere".into()]);
    pve.destroy_owned(vmid, &owner, &elsewhere, DEADLINE).await.expect("destroy");
    assert_eq!(pve.volumes(vmid).await.expect("volumes").len(), 1, "it is on no such storage");
    let own = OwnVolumes::cloned_to(site.storages);
    pve.destroy_owned(vmid, &owner, &own, DEADLINE).await.expect("destroy");
    stage.nothing_left(vmid).await;
    pve.unlock_template(stage.template()).await.expect("unlock");
    Shown::Yes
}
