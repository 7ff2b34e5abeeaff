//! Interface of a sandbox: what comes from its template, its snapshot's configuration, and itself.

use proto::Reason;

use super::*;
use crate::{
    pve::{Link, interface::Rate},
    reconcile::Action,
};

impl Node {
    fn template_says(&self, key: &str, line: &str) {
        let set = |config: &mut crate::pve::ContainerConfig| config.set(key, line).expect("fits");
        self.cluster.edit(&self.name, vmid(TEMPLATE), set);
    }

    fn net0(&self, record: &Record) -> String {
        let guest = &self.cluster.guests()[&record.vmid];
        guest.config.get("net0").expect("an interface").to_owned()
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_keeps_the_isolation_settings_of_its_template() {
    let node = Node::new().await;
    let line = "name=eth0,bridge=vmbr3,firewall=1,gw=192.0.2.1,hwaddr=BC:24:11:00:00:01,\
        host-managed=1,ip=192.0.2.9/24,ip6=auto,mtu=1400,rate=5,tag=42,trunks=1;2,type=veth,new=1";
    node.template_says("net0", line);
    let record = node.running(1).await;
    let expected = "name=eth0,bridge=vmbr0,hwaddr=02:50:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,\
        firewall=1,host-managed=1,ip6=auto,mtu=1400,rate=5,tag=42,trunks=1;2,type=veth,new=1";
    assert_eq!(node.net0(&record), expected);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn snapshot_link_settings_override_those_of_the_template() {
    let change = |options: &mut Options| {
        let rate = Some(Rate::try_from(12.5).expect("a rate"));
        options.templates[0].link = Link { tag: Some(7), rate, firewall: Some(true) };
        options.templates[0].bridge = Some("vmbr9".into());
    };
    let node = Node::with(change, Faults::default()).await;
    node.template_says("net0", "name=eth0,bridge=vmbr0,firewall=0,ip=dhcp,tag=42,mtu=1400");
    let record = node.running(1).await;
    let expected = "name=eth0,bridge=vmbr9,hwaddr=02:50:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,\
        firewall=1,rate=12.5,tag=7,mtu=1400,type=veth";
    assert_eq!(node.net0(&record), expected);
}

#[tokio::test(start_paused = true)]
async fn template_with_a_shared_address_is_refused_with_its_line() {
    for (key, line) in [
        ("net1", "name=eth1,bridge=vmbr1,hwaddr=BC:24:11:00:00:02,ip=10.0.0.5/24,type=veth"),
        ("net1", "name=eth1,bridge=vmbr1,ip=dhcp,ip6=fd00::5/64"),
        ("net7", "name=eth7,bridge=vmbr1,ip=10.0.0.5/24"),
        ("net0", "name=eth0,bridge=vmbr0,ip=dhcp,ip6=fd00::5/64"),
    ] {
        let node = Node::new().await;
        node.template_says(key, line);
        let error = node.sandboxes.create(order(1), LONG).await.expect_err("refused");
        assert_eq!(error.reason, Reason::ContainerUnfit, "{error}");
        assert!(error.message.contains(&format!("{key}: {line}")), "{error}");
        assert!(error.message.contains("base"), "{error}");
        assert_eq!(node.reconcile().await, [] as [Action; 0]);
        assert_eq!(node.containers(), [] as [u32; 0]);
        let (findings, _) = node.sandboxes.check().await;
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].detail.contains(line), "{findings:?}");
        // Once it is corrected, it can be used.
        node.template_says(key, "name=eth1,bridge=vmbr1,ip=dhcp");
        node.running(2).await;
        node.assert_sound().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_a_container_that_is_no_template_is_refused() {
    let node = Node::new().await;
    node.cluster.edit(&node.name, vmid(TEMPLATE), |config| config.remove("template"));
    let error = node.sandboxes.create(order(1), LONG).await.expect_err("refused");
    assert_eq!(error.reason, Reason::SnapshotNotFound, "{error}");
    assert!(error.to_string().contains("is an ordinary container"), "{error}");
}
