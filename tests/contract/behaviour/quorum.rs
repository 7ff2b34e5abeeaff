use proto::spec::Size;

use super::assert_kind;
use crate::stage::{DEADLINE, Shown, Stage, until};

pub(super) async fn changes_are_refused_without_quorum(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let (running, stopped) = (stage.configured().await, stage.cloned().await);
    let pve = stage.pve();
    pve.start(running.vmid, DEADLINE).await.expect("start");
    if !stage.set_quorate(false).await {
        stage.destroy(&running).await;
        stage.destroy(&stopped).await;
        return Shown::NotHere("a cluster without quorum");
    }
    until("no quorum", async || (!pve.cluster().await.quorate).then_some(())).await;
    let before = stage.look(stopped.vmid).await;
    let owner = stopped.mark.sandbox_id;
    assert_kind!(pve.clone_template(&stage.order(), DEADLINE).await, NoQuorum);
    assert_kind!(pve.configure(stopped.vmid, &stage.settings()).await, NoQuorum);
    let other = "node2".parse().expect("a name");
    assert_kind!(pve.move_config_to(stopped.vmid, &owner, &other).await, NoQuorum);
    assert_kind!(pve.resize(stopped.vmid, 99, DEADLINE).await, NoQuorum);
    let size = Size { cpu_cores: 1, memory_mib: 256, disk_gib: 0 };
    assert_kind!(pve.set_limits(stopped.vmid, &stopped.mark.sandbox_id, size).await, NoQuorum);
    assert_kind!(pve.start(stopped.vmid, DEADLINE).await, NoQuorum);
    assert_kind!(pve.destroy_owned(stopped.vmid, &owner, &own, DEADLINE).await, NoQuorum);
    assert_kind!(pve.unlock_template(stage.template()).await, NoQuorum);
    assert_eq!(stage.look(stopped.vmid).await, before, "the volume too");
    // Reads continue to work, and so does a stop.
    assert!(pve.configs().await.expect("list").contains_key(&running.vmid));
    assert!(pve.running(running.vmid).await);
    pve.stop(running.vmid, DEADLINE).await.expect("stop");
    assert!(!pve.running(running.vmid).await);
    assert!(stage.set_quorate(true).await);
    until("quorum", async || pve.cluster().await.quorate.then_some(())).await;
    stage.destroy(&running).await;
    stage.destroy(&stopped).await;
    Shown::Yes
}

pub(super) async fn reads_and_changes_are_refused_without_pmxcfs(stage: &dyn Stage) -> Shown {
    let own = stage.own().await;
    let order = stage.cloned().await;
    let pve = stage.pve();
    if !stage.set_pmxcfs(false).await {
        stage.destroy(&order).await;
        return Shown::NotHere("a node whose pmxcfs is down");
    }
    until("no pmxcfs", async || pve.cluster().await.members.is_empty().then_some(())).await;
    let cluster = pve.cluster().await;
    assert!(!cluster.quorate && cluster.guests.is_empty());
    // An empty /etc/pve does not mean that there are no containers.
    assert_kind!(pve.config(order.vmid).await.map(drop), NoQuorum);
    assert_kind!(pve.configs().await.map(drop), NoQuorum);
    assert_kind!(pve.start(order.vmid, DEADLINE).await, NoQuorum);
    let owner = order.mark.sandbox_id;
    assert_kind!(pve.destroy_owned(order.vmid, &owner, &own, DEADLINE).await, NoQuorum);
    assert!(stage.set_pmxcfs(true).await);
    until("pmxcfs", async || pve.cluster().await.quorate.then_some(())).await;
    stage.destroy(&order).await;
    Shown::Yes
}
