use std::net::Ipv4Addr;

use agent::pve::{Address, Link, config_file::Ip, interface::Rate};
use proto::{id::SandboxId, spec::Size};

use super::assert_kind;
use crate::stage::{DEADLINE, Shown, Stage, mark, until};

pub(super) async fn configure_sets_our_values_and_keeps_others(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    stage.operator_sets(vmid, "tags", "kept").await;
    let settings = stage.settings();
    for _ in 0..2 {
        pve.configure(vmid, &settings).await.expect("configure");
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        let net0 = config.net0().expect("an interface");
        assert_eq!(net0.bridge, settings.bridge);
        let mac: Vec<_> = settings.mac.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(net0.mac, mac.join(":"));
        let expected = match settings.address {
            Address::Static { ip, prefix, .. } => Ip::Static(ip, prefix),
            Address::Dhcp => Ip::Dhcp,
        };
        assert_eq!(net0.ip, expected);
        assert_eq!((config.cores(), config.memory_mib()), (Some(1), 128));
        assert_eq!((config.get("swap"), config.get("onboot")), (Some("0"), Some("0")));
        assert_eq!(config.tags().collect::<Vec<_>>(), ["kept", "pve-sandbox"]);
        assert_eq!(config.mark().as_ref(), Some(&order.mark));
        assert_eq!(config.lock(), None);
    }
    stage.destroy(&order).await;
    Shown::Yes
}

/// Keeps `firewall` and `tag`: without them, isolation is lost.
pub(super) async fn configure_keeps_the_interface_settings(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    let mut settings = stage.settings();
    let bridge = settings.bridge.clone();
    let line = format!("name=eth7,bridge={bridge},firewall=1,ip=dhcp,ip6=manual,mtu=1400,rate=5.5");
    stage.operator_sets(vmid, "net0", &line).await;
    for (link, rate) in [
        (Link::default(), "5.5"),
        (Link { rate: Some(Rate::try_from(7.25).expect("a rate")), ..Link::default() }, "7.25"),
    ] {
        settings.link = link;
        pve.configure(vmid, &settings).await.expect("configure");
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        let net0 = config.get("net0").expect("an interface");
        let said = |pair: &str| net0.split(',').any(|said| said == pair);
        for pair in ["name=eth0", "firewall=1", "ip6=manual", "mtu=1400"] {
            assert!(said(pair), "{pair}: {net0}");
        }
        assert!(said(&format!("rate={rate}")), "{net0}");
        assert_eq!(net0.matches("rate=").count(), 1, "{net0}");
    }
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn resize_grows_a_disk_and_never_shrinks_it(stage: &dyn Stage) -> Shown {
    let order = stage.configured().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    let before = pve.config(vmid).await.expect("read").expect("it is there");
    let larger = before.rootfs_gib() + 3;
    for (asked, expected) in [(larger, larger), (larger, larger), (1, larger)] {
        pve.resize(vmid, asked, DEADLINE).await.expect("resize");
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        assert_eq!(config.rootfs_gib(), expected, "{asked}");
        assert_eq!((config.rootfs(), config.lock()), (before.rootfs(), None));
        assert_eq!(config.mark().as_ref(), Some(&order.mark));
    }
    // Also while it runs, where that needs no wait.
    pve.start(vmid, DEADLINE).await.expect("start");
    for _ in 0..2 {
        pve.resize(vmid, larger + 1, DEADLINE).await.expect("resize while it runs");
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        assert_eq!((config.rootfs_gib(), config.lock()), (larger + 1, None));
    }
    assert!(pve.running(vmid).await);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn limits_of_a_container_change_at_once(stage: &dyn Stage) -> Shown {
    let order = stage.configured().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    let before = pve.config(vmid).await.expect("read").expect("it is there");
    pve.start(vmid, DEADLINE).await.expect("start");
    for (cpu_cores, memory_mib) in [(2, 384), (1, 256)] {
        let size = Size { cpu_cores, memory_mib, disk_gib: 0 };
        pve.set_limits(vmid, &owner, size).await.expect("set while it runs");
        let config = pve.config(vmid).await.expect("read").expect("it is there");
        assert_eq!((config.cores(), config.memory_mib()), (Some(cpu_cores), memory_mib));
        assert_eq!((config.mark(), config.lock()), (before.mark(), None));
        assert_eq!(config.get("net0"), before.get("net0"), "nothing else changes");
        let limit = pve.usage(vmid).await.expect("it runs").memory_max_bytes;
        // 0 where the kernel counts no memory of containers.
        assert!(limit == 0 || limit == size.memory_bytes(), "{limit}");
    }
    let other = SandboxId::new(owner.created_ms(), &[9; 10]);
    let size = Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 };
    assert_kind!(pve.set_limits(vmid, &other, size).await, NotOurs);
    pve.stop(vmid, DEADLINE).await.expect("stop");
    pve.set_limits(vmid, &owner, size).await.expect("set while it is stopped");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn container_is_handed_only_to_a_node_that_sees_its_disk(
    stage: &dyn Stage,
) -> Shown {
    let order = stage.configured().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    let members = pve.cluster().await.members;
    let other = members.iter().find(|(name, member)| *name != pve.node() && member.online);
    let other = other.map(|(name, _)| name.clone());
    let Some(other) = other else {
        stage.destroy(&order).await;
        return Shown::NotHere("another node that is online");
    };
    let by_nature = stage.is_shared().await;
    if !by_nature {
        assert_kind!(pve.move_config_to(vmid, &owner, &other).await, WrongState);
        if !stage.share(true).await {
            stage.destroy(&order).await;
            return Shown::NotHere("a storage that is shared");
        }
    }
    for no_other in [pve.node().clone(), "nosuch".parse().expect("a name")] {
        assert_kind!(pve.move_config_to(vmid, &owner, &no_other).await, WrongState);
    }
    let somebody = mark(stage.fresh()).sandbox_id;
    assert_kind!(pve.move_config_to(vmid, &somebody, &other).await, NotOurs);
    let before = pve.config(vmid).await.expect("read").expect("it is there");
    for _ in 0..2 {
        pve.move_config_to(vmid, &owner, &other).await.expect("it goes");
        assert_eq!(pve.config(vmid).await.expect("read"), None);
        assert_eq!(pve.cluster().await.guests.get(&vmid), Some(&other));
    }
    stage.fetch_back(vmid, &other).await;
    assert_eq!(pve.config(vmid).await.expect("read").as_ref(), Some(&before), "byte for byte");
    pve.start(vmid, DEADLINE).await.expect("start");
    assert_kind!(pve.move_config_to(vmid, &owner, &other).await, WrongState);
    assert!(by_nature || stage.share(false).await);
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn start_and_stop_are_idempotent(stage: &dyn Stage) -> Shown {
    let order = stage.cloned().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    let settings = stage.settings();
    pve.configure(vmid, &settings).await.expect("configure");
    pve.start(vmid, DEADLINE).await.expect("start");
    assert!(pve.running(vmid).await);
    let pid = until("an init", async || pve.init(vmid).await).await;
    pve.start(vmid, DEADLINE).await.expect("start again");
    assert_eq!(pve.init(vmid).await, Some(pid), "the same init");
    assert_kind!(pve.configure(vmid, &settings).await, WrongState);
    // TEST-NET-1 belongs to nobody.
    let other = Ipv4Addr::new(192, 0, 2, 77);
    let own = match settings.address {
        Address::Static { ip, .. } => Some(ip),
        Address::Dhcp => None,
    };
    if let Some(ip) = own {
        until("its address", async || pve.has_address(vmid, ip).await.then_some(())).await;
        assert!(!pve.has_address(vmid, other).await, "another one");
    }
    pve.stop(vmid, DEADLINE).await.expect("stop");
    assert!(!pve.running(vmid).await);
    assert_eq!(pve.init(vmid).await, None);
    assert!(!pve.has_address(vmid, own.unwrap_or(other)).await);
    pve.stop(vmid, DEADLINE).await.expect("stop again");
    pve.start(vmid, DEADLINE).await.expect("start after a stop");
    let next = until("an init", async || pve.init(vmid).await).await;
    assert_ne!(next, pid);
    pve.stop(vmid, DEADLINE).await.expect("stop after a start");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn container_shuts_down_when_it_is_asked(stage: &dyn Stage) -> Shown {
    let order = stage.configured().await;
    let (pve, vmid, owner) = (stage.pve(), order.vmid, order.mark.sandbox_id);
    pve.halt(vmid, &owner).await.expect("one that does not run");
    pve.start(vmid, DEADLINE).await.expect("start");
    let init = until("an init", async || pve.init(vmid).await).await;
    assert_kind!(pve.halt(vmid, &mark(stage.fresh()).sandbox_id).await, NotOurs);
    assert_eq!(pve.init(vmid).await, Some(init), "nobody asked it");
    until("an init that takes the signal", async || pve.halt(vmid, &owner).await.ok()).await;
    until("it is down", async || (!pve.running(vmid).await).then_some(())).await;
    assert_eq!(pve.init(vmid).await, None);
    pve.stop(vmid, DEADLINE).await.expect("nothing to stop");
    pve.start(vmid, DEADLINE).await.expect("start after a shutdown");
    pve.stop(vmid, DEADLINE).await.expect("stop");
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn foreign_container_is_left_alone(stage: &dyn Stage) -> Shown {
    let (pve, foreign, copy) = (stage.pve(), stage.fresh(), stage.fresh());
    stage.by_others(foreign, "somebody's own").await;
    // A clone of a sandbox by somebody else: the description is copied, with the original number.
    stage.by_others(copy, &mark(stage.fresh()).to_string()).await;
    for vmid in [foreign, copy, stage.template()] {
        let before = stage.look(vmid).await;
        assert_kind!(pve.configure(vmid, &stage.settings()).await, NotOurs);
        assert_kind!(pve.resize(vmid, 99, DEADLINE).await, NotOurs);
        assert_kind!(pve.start(vmid, DEADLINE).await, NotOurs);
        assert_kind!(pve.stop(vmid, DEADLINE).await, NotOurs);
        assert_kind!(pve.halt(vmid, &mark(vmid).sandbox_id).await, NotOurs);
        assert_eq!(stage.look(vmid).await, before);
    }
    stage.remove(foreign).await;
    stage.remove(copy).await;
    Shown::Yes
}

pub(super) async fn missing_container_is_not_found(stage: &dyn Stage) -> Shown {
    let (pve, vmid) = (stage.pve(), stage.fresh());
    assert_eq!(pve.config(vmid).await.expect("read"), None);
    assert!(!pve.running(vmid).await);
    assert_eq!(pve.init(vmid).await, None);
    assert!(!pve.has_address(vmid, Ipv4Addr::LOCALHOST).await);
    assert_kind!(pve.configure(vmid, &stage.settings()).await, NotFound);
    assert_kind!(pve.start(vmid, DEADLINE).await, NotFound);
    assert_kind!(pve.stop(vmid, DEADLINE).await, NotFound);
    assert_kind!(pve.halt(vmid, &mark(vmid).sandbox_id).await, NotFound);
    assert_kind!(pve.unlock_template(vmid).await, NotFound);
    assert_kind!(pve.storage_room(vmid).await.map(drop), NotFound);
    Shown::Yes
}

pub(super) async fn start_stop_and_configure_respect_a_foreign_lock(stage: &dyn Stage) -> Shown {
    let order = stage.configured().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    stage.operator_sets(vmid, "lock", "backup").await;
    let before = stage.look(vmid).await;
    assert_kind!(pve.configure(vmid, &stage.settings()).await, Locked);
    assert_kind!(pve.start(vmid, DEADLINE).await, Locked);
    pve.stop(vmid, DEADLINE).await.expect("one that is stopped needs no stop, whoever locks it");
    assert_eq!(stage.look(vmid).await, before);
    stage.operator_sets(vmid, "lock", "").await;
    pve.start(vmid, DEADLINE).await.expect("start");
    stage.operator_sets(vmid, "lock", "backup").await;
    assert_kind!(pve.stop(vmid, DEADLINE).await, Locked);
    assert!(pve.running(vmid).await);
    stage.operator_sets(vmid, "lock", "").await;
    stage.destroy(&order).await;
    Shown::Yes
}

pub(super) async fn storage_room_is_reported(stage: &dyn Stage) -> Shown {
    let room = stage.pve().storage_room(stage.template()).await.expect("room");
    assert!(0 < room.free && room.free <= room.total, "{room:?}");
    let template = stage.pve().config(stage.template()).await.expect("read").expect("template");
    assert!(template.is_template() && template.mark().is_none());
    Shown::Yes
}
