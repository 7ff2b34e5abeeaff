use agent::pve::{CloneOrder, volume};

use super::assert_kind;
use crate::stage::{DEADLINE, Shown, Stage, mark, until};

pub(super) async fn cloned_container_has_its_mark_and_its_volume(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    let config = pve.config(vmid).await.expect("read").expect("it is there");
    assert_eq!(config.mark().as_ref(), Some(&order.mark));
    assert_eq!(config.hostname(), Some(order.mark.sandbox_id.to_string().as_str()));
    assert_eq!(config.lock(), None);
    assert!(!config.is_template());
    let rootfs = config.rootfs().expect("a volume").to_owned();
    let volumes = pve.volumes(vmid).await.expect("volumes");
    let [volume] = volumes.as_slice() else { panic!("{volumes:?}") };
    // For a linked clone, some of PVE's tools also write the base, and some storages a directory.
    assert_eq!(volume::key(&rootfs), volume::key(volume), "{rootfs} is {volume}");
    assert!(!pve.running(vmid).await);
    assert_eq!(pve.init(vmid).await, None);
    assert_eq!(pve.configs().await.expect("list").get(&vmid), Some(&config));
    assert_eq!(pve.cluster().await.guests.get(&vmid), Some(pve.node()));
    let template = pve.config(stage.template()).await.expect("read").expect("the template");
    assert_eq!(template.lock(), None);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn mark_is_written_before_the_volume(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.slow_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let pve = stage.pve();
    // PVE's very first write is only the lock; the next one shows the owner.
    let first = until("a config", async || {
        let config = pve.config(order.vmid).await.expect("read");
        config.filter(|config| config.to_bytes() != b"lock: create\n")
    });
    let (cloned, first) = tokio::join!(pve.clone_template(&order, DEADLINE), first);
    cloned.expect("clone");
    assert_eq!(first.mark().as_ref(), Some(&order.mark), "{first:?}");
    assert_eq!(first.lock(), Some("create"));
    assert_eq!(first.rootfs(), None);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn second_clone_of_a_busy_template_is_refused(stage: &dyn Stage) -> Shown {
    let (first, second) = (stage.order(), stage.order());
    if !stage.slow_next_clone(first.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let pve = stage.pve();
    let late = async {
        until("the template's lock", async || {
            let template = pve.config(stage.template()).await.expect("read");
            template.filter(|config| config.lock() == Some("disk"))
        })
        .await;
        pve.clone_template(&second, DEADLINE).await
    };
    let (one, two) = tokio::join!(pve.clone_template(&first, DEADLINE), late);
    one.expect("the first");
    assert_kind!(two, Locked);
    stage.nothing_left(second.vmid).await;
    // Once the first clone is done, the next one works.
    pve.clone_template(&second, DEADLINE).await.expect("the second, later");
    stage.destroy(&first).await;
    stage.destroy(&second).await;
    Shown::Yes
}

pub(super) async fn clone_to_a_taken_vmid_is_refused(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let before = stage.look(order.vmid).await;
    let other = CloneOrder { mark: mark(order.vmid), ..order.clone() };
    assert_kind!(stage.pve().clone_template(&other, DEADLINE).await, VmidTaken);
    assert_eq!(stage.look(order.vmid).await, before);
    let template = stage.pve().config(stage.template()).await.expect("read").expect("template");
    assert_eq!(template.lock(), None);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn clone_of_a_missing_or_ordinary_container_is_refused(
    stage: &dyn Stage,
) -> Shown {
    let pve = stage.pve();
    let order = CloneOrder { template: stage.fresh(), ..stage.order() };
    assert_kind!(pve.clone_template(&order, DEADLINE).await, NotFound);
    stage.nothing_left(order.vmid).await;
    let ordinary = stage.cloned().await;
    let order = CloneOrder { template: ordinary.vmid, ..stage.order() };
    assert_kind!(pve.clone_template(&order, DEADLINE).await, WrongState);
    stage.nothing_left(order.vmid).await;
    stage.destroy(&ordinary).await;
    Shown::Yes
}

pub(super) async fn clone_continues_without_its_caller(stage: &dyn Stage) -> Shown {
    let order = stage.order();
    if !stage.slow_next_clone(order.vmid).await {
        return Shown::NotHere("a clone that takes its time");
    }
    let pve = stage.pve();
    tokio::select! {
        _ = pve.clone_template(&order, DEADLINE) => panic!("it takes its time"),
        _ = until("a config", async || pve.config(order.vmid).await.expect("read")) => {}
    }
    let whole = until("a whole clone", async || {
        let config = pve.config(order.vmid).await.expect("read").expect("it is there");
        (config.lock().is_none() && config.rootfs().is_some()).then_some(config)
    });
    assert_eq!(whole.await.mark().as_ref(), Some(&order.mark));
    stage.destroy(&order).await;
    Shown::Yes
}
