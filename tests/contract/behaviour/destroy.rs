use std::time::Duration;

use agent::pve::ErrorKind;
use proto::id::SandboxId;

use super::assert_kind;
use crate::stage::{DEADLINE, Shown, Stage, mark, until};

pub(super) async fn it_is_idempotent(stage: &dyn Stage) -> Shown {
    let (pve, never) = (stage.pve(), stage.order());
    pve.destroy_owned(never.vmid, &never.mark.sandbox_id, DEADLINE).await.expect("nothing there");
    let order = stage.cloned().await;
    stage.destroy(&order).await;
    stage.destroy(&order).await;
    // The number can be used again.
    pve.clone_template(&order, DEADLINE).await.expect("clone again");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn what_runs_is_stopped_first(stage: &dyn Stage) -> Shown {
    let order = stage.configured().await;
    stage.pve().start(order.vmid, DEADLINE).await.expect("start");
    assert!(stage.pve().running(order.vmid).await);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn what_is_not_the_owners_is_refused(stage: &dyn Stage) -> Shown {
    let pve = stage.pve();
    let ours = stage.cloned().await;
    let (foreign, copy) = (stage.fresh(), stage.fresh());
    stage.by_others(foreign, "somebody's own").await;
    stage.by_others(copy, &ours.mark.to_string()).await;
    let nobody = SandboxId::new(1, &[9; 10]);
    let cases = [
        // The right mark, and another one is asked for.
        (ours.vmid, nobody),
        // No mark.
        (foreign, ours.mark.sandbox_id),
        // The mark that is asked for, in a copy with another number.
        (copy, ours.mark.sandbox_id),
        (stage.template(), ours.mark.sandbox_id),
    ];
    for (vmid, owner) in cases {
        let before = stage.look(vmid).await;
        assert_kind!(pve.destroy_owned(vmid, &owner, DEADLINE).await, NotOurs);
        assert_eq!(stage.look(vmid).await, before);
    }
    stage.destroy(&ours).await;
    stage.remove(foreign).await;
    stage.remove(copy).await;
    Shown::Yes
}

pub(super) async fn what_is_protected_or_locked_is_refused(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    stage.operator_sets(vmid, "protection", "1").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.destroy_owned(vmid, &owner, DEADLINE).await, WrongState);
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "protection", "0").await;
    stage.operator_sets(vmid, "lock", "backup").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.destroy_owned(vmid, &owner, DEADLINE).await, Locked);
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "lock", "").await;
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn a_killed_clone_is_cleaned_up(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.kill_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that is killed half-way");
    }
    let pve = stage.pve();
    pve.clone_template(&order, DEADLINE).await.expect_err("it is killed");
    let config = pve.config(order.vmid).await.expect("read").expect("the half of it");
    assert_eq!((config.lock(), config.rootfs()), (Some("create"), None));
    assert_eq!(config.mark().as_ref(), Some(&order.mark), "it names its owner");
    assert_eq!(pve.volumes(order.vmid).await.expect("volumes").len(), 1, "that no config names");
    // The template's lock stands, and somebody else's clone of it is refused.
    let next = stage.order();
    assert_kind!(pve.clone_template(&next, DEADLINE).await, Locked);
    let stranger = mark(order.vmid).sandbox_id;
    assert_kind!(pve.destroy_owned(order.vmid, &stranger, DEADLINE).await, NotOurs);
    stage.destroy(&order).await;
    pve.unlock_template(stage.template()).await.expect("unlock");
    pve.clone_template(&next, DEADLINE).await.expect("clone");
    stage.destroy(&next).await;
    Shown::Yes
}

pub(super) async fn a_template_is_unlocked_only_from_the_dead(stage: &dyn Stage) -> Shown {
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

pub(super) async fn a_clone_that_was_told_to_stop_leaves_nothing(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.slow_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let pve = stage.pve();
    let kind = super::refused(pve.clone_template(&order, Duration::from_millis(500)).await);
    assert!(matches!(kind, ErrorKind::Deadline(_)), "{kind:?}");
    stage.destroy(&order).await;
    // It was told, not killed: it took its lock off the template.
    let next = stage.cloned().await;
    stage.destroy(&next).await;
    Shown::Yes
}
