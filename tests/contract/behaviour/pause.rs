use std::collections::BTreeSet;

use agent::pve::{CloneOrder, pause_lock};
use proto::id::SandboxId;

use super::assert_kind;
use crate::stage::{DEADLINE, Shown, Stage, mark, until};

impl dyn Stage + '_ {
    /// Creates a clone with settings and starts it.
    pub(super) async fn started(&self) -> CloneOrder {
        let order = self.configured().await;
        self.pve().start(order.vmid, DEADLINE).await.expect("start");
        until("an init", async || self.pve().init(order.vmid).await).await;
        // Processes of a boot come and go by themselves.
        self.at_rest(order.vmid).await;
        order
    }

    async fn held(&self, order: &CloneOrder) -> bool {
        let config = self.pve().config(order.vmid).await.expect("read").expect("it is there");
        pause_lock::is_held(&config)
    }
}

fn owner(order: &CloneOrder) -> SandboxId {
    order.mark.sandbox_id
}

pub(super) async fn frozen_container_keeps_its_processes_and_continues(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, owner(&order));
    let before = stage.look(vmid).await;
    let pid = pve.init(vmid).await;
    let mut frozen = None;
    for _ in 0..2 {
        pve.freeze(vmid, &owner, DEADLINE).await.expect("freeze");
        // No process ends and none starts.
        let processes: BTreeSet<u32> = pve.processes(vmid).await.into_iter().collect();
        assert_eq!(frozen.get_or_insert(processes.clone()), &processes);
        assert!(pve.frozen(vmid).await && pve.running(vmid).await);
        assert!(pve.usage(vmid).await.expect("it runs").frozen);
    }
    assert_eq!(pve.init(vmid).await, pid);
    for _ in 0..2 {
        pve.thaw(vmid, &owner).await.expect("thaw");
        assert!(!pve.frozen(vmid).await && pve.running(vmid).await);
        assert!(!pve.usage(vmid).await.expect("it runs").frozen);
    }
    assert_eq!(pve.init(vmid).await, pid, "the same init");
    assert_eq!(stage.look(vmid).await, before, "nothing of it was written");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn snapshot_is_refused_while_the_lock_is_held(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, owner(&order));
    let before = pve.config(vmid).await.expect("read");
    for _ in 0..2 {
        pve.acquire_pause_lock(vmid, &owner).await.expect("locked");
        assert!(stage.held(&order).await);
    }
    pve.freeze(vmid, &owner, DEADLINE).await.expect("freeze");
    let refused = stage.snapshot(vmid).await.expect_err("it would hang");
    assert!(refused.contains("CT is locked (backup)"), "{refused}");
    assert!(pve.frozen(vmid).await);
    pve.thaw(vmid, &owner).await.expect("thaw");
    for _ in 0..2 {
        pve.release_pause_lock(vmid, &owner).await.expect("release");
        assert_eq!(pve.config(vmid).await.expect("read"), before, "as it was, byte for byte");
    }
    stage.snapshot(vmid).await.expect("nobody holds it");
    // A foreign lock is neither taken over nor removed.
    stage.operator_sets(vmid, "lock", "backup").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.acquire_pause_lock(vmid, &owner).await, Locked);
    pve.release_pause_lock(vmid, &owner).await.expect("there is none of ours");
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "lock", "").await;
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn pause_leaves_a_container_of_another_owner_alone(stage: &dyn Stage) -> Shown {
    let ours = stage.started().await;
    let (pve, foreign, copy) = (stage.pve(), stage.fresh(), stage.fresh());
    stage.by_others(foreign, "somebody's own").await;
    stage.by_others(copy, &ours.mark.to_string()).await;
    let nobody = mark(ours.vmid).sandbox_id;
    let cases = [
        (ours.vmid, nobody),
        (foreign, owner(&ours)),
        (copy, owner(&ours)),
        (stage.template(), owner(&ours)),
    ];
    for (vmid, owner) in cases {
        let before = stage.look(vmid).await;
        assert_kind!(pve.acquire_pause_lock(vmid, &owner).await, NotOurs);
        assert_kind!(pve.freeze(vmid, &owner, DEADLINE).await, NotOurs);
        assert_kind!(pve.thaw(vmid, &owner).await, NotOurs);
        assert_kind!(pve.release_pause_lock(vmid, &owner).await, NotOurs);
        assert!(!pve.frozen(vmid).await);
        assert_eq!(stage.look(vmid).await, before);
    }
    let missing = stage.fresh();
    assert_kind!(pve.freeze(missing, &owner(&ours), DEADLINE).await, NotFound);
    pve.stop(ours.vmid, DEADLINE).await.expect("stop");
    assert_kind!(pve.freeze(ours.vmid, &owner(&ours), DEADLINE).await, WrongState);
    pve.thaw(ours.vmid, &owner(&ours)).await.expect("there is nothing to thaw");
    assert_eq!(pve.usage(ours.vmid).await, None);
    stage.destroy(&ours).await;
    stage.remove(foreign).await;
    stage.remove(copy).await;
    Shown::Yes
}

pub(super) async fn paused_container_can_be_stopped_started_and_destroyed(
    stage: &dyn Stage,
) -> Shown {
    let order = stage.started().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, owner(&order));
    let pause = async || {
        pve.acquire_pause_lock(vmid, &owner).await.expect("locked");
        pve.freeze(vmid, &owner, DEADLINE).await.expect("freeze");
    };
    pause().await;
    pve.stop(vmid, DEADLINE).await.expect("stop");
    assert!(!pve.running(vmid).await && !stage.held(&order).await);
    // A lock that outlived a reboot blocks nobody.
    pve.acquire_pause_lock(vmid, &owner).await.expect("locked");
    pve.start(vmid, DEADLINE).await.expect("start");
    assert!(pve.running(vmid).await && !stage.held(&order).await);
    until("an init", async || pve.init(vmid).await).await;
    pause().await;
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn container_is_frozen_and_thawed_without_quorum(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, owner(&order));
    if !stage.set_quorate(false).await {
        stage.destroy(&order).await;
        return Shown::NotHere("a cluster without quorum");
    }
    until("no quorum", async || (!pve.cluster().await.quorate).then_some(())).await;
    assert_kind!(pve.acquire_pause_lock(vmid, &owner).await, NoQuorum);
    pve.freeze(vmid, &owner, DEADLINE).await.expect("freeze");
    assert!(pve.frozen(vmid).await);
    pve.release_pause_lock(vmid, &owner).await.expect("there is nothing to give back");
    pve.thaw(vmid, &owner).await.expect("thaw");
    stage.set_quorate(true).await;
    until("quorum", async || pve.cluster().await.quorate.then_some(())).await;
    stage.destroy(&order).await;
    Shown::Yes
}
