//! Isolation: a sandbox has its rules before it starts, keeps them, and loses them with its end.

use proto::{Cause, Reason};

use super::*;
use crate::{
    firewall::{Grounds, Rules, memory::MemoryFirewall},
    pve::ContainerConfig,
};

fn grounds() -> Grounds {
    Grounds {
        gateway: [10, 100, 1, 1].into(),
        name_servers: Default::default(),
        dhcp_server: None,
        closed: Default::default(),
        reach: Default::default(),
        connections: None,
        name_connections: None,
    }
}

impl Node {
    fn isolated(&self) -> Arc<MemoryFirewall> {
        let firewall = Arc::new(MemoryFirewall::default());
        let shared: Arc<dyn crate::firewall::Firewall> = firewall.clone();
        self.sandboxes.isolate_by(shared, grounds());
        firewall
    }
}

fn vmids(rules: &Rules) -> Vec<u32> {
    rules.sandboxes.keys().map(|vmid| vmid.get()).collect()
}

#[tokio::test(start_paused = true)]
async fn sandbox_has_its_rules_from_its_start_to_its_end() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let record = node.running(1).await;
    let rules = firewall.rules().expect("applied");
    assert_eq!(vmids(&rules), [record.vmid.get()]);
    let entry = &rules.sandboxes[&record.vmid];
    assert_eq!((entry.ip, entry.dhcp), (record.ip, false));
    let [.., last] = record.ip.expect("an address").octets();
    assert_eq!(entry.mac, Some([0x02, 0x50, 10, 100, 1, last]));

    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    assert_eq!(vmids(&firewall.rules().expect("applied")), [record.vmid.get()]);
    node.sandboxes.delete(&record.id, LONG).await.expect("deleted");
    assert_eq!(vmids(&firewall.rules().expect("applied")), [] as [u32; 0]);
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn sandbox_does_not_start_without_its_rules() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let record = node.running(1).await;
    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    firewall.set_failing(true);
    let failed = node.create(2).await;
    assert_eq!(failed.phase, Phase::Failed);
    assert_eq!(failed.failure.as_ref().expect("why").reason, Reason::IsolationFailed);
    // What runs goes on; a node that is known to be broken refuses at once.
    node.sandboxes.enforce_isolation().await;
    let refused = node.sandboxes.create(order(3), LONG).await.expect_err("refused");
    assert_eq!(refused.reason, Reason::IsolationFailed);
    let (findings, _) = node.sandboxes.check().await;
    assert!(findings.iter().any(|f| f.detail.contains("not in force")), "{findings:?}");
    // Rules that are missing need no change for a sandbox to be refused.
    firewall.flush();
    let refused = node.sandboxes.start(&record.id, LONG).await.expect_err("refused");
    assert_eq!(refused.reason, Reason::IsolationFailed);
    assert_eq!(node.record(1).await.phase, Phase::Stopped);

    firewall.set_failing(false);
    node.sandboxes.enforce_isolation().await;
    node.sandboxes.start(&record.id, LONG).await.expect("started");
    assert_eq!(node.running(3).await.phase, Phase::Running);
    drop(node.sandboxes.check().await);
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn rules_that_somebody_removed_are_put_back_and_told_once() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let record = node.running(1).await;
    firewall.flush();
    node.reconcile().await;
    assert_eq!(vmids(&firewall.rules().expect("put back")), [record.vmid.get()]);
    let told = |findings: &[crate::sandbox::drift::fsck::Finding]| {
        findings.iter().filter(|f| f.detail.contains("put back")).count()
    };
    assert_eq!(told(&node.sandboxes.check().await.0), 1);
    assert_eq!(told(&node.sandboxes.check().await.0), 0);
}

#[tokio::test(start_paused = true)]
async fn rules_are_there_again_after_a_restart_of_the_agent() {
    let mut node = Node::new().await;
    node.isolated();
    let record = node.running(1).await;
    node.restart().await;
    let firewall = node.isolated();
    node.sandboxes.enforce_isolation().await;
    assert_eq!(vmids(&firewall.rules().expect("applied")), [record.vmid.get()]);
}

#[tokio::test(start_paused = true)]
async fn container_under_a_number_that_is_not_cloned_yet_is_not_filtered() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let taken = ContainerConfig::parse(b"hostname: somebody\nrootfs: local-zfs:subvol-x\n");
    node.cluster.add_guest(&node.other(), vmid(100_000), taken, false);
    let record = node.running(1).await;
    assert_ne!(record.vmid, vmid(100_000));
    assert_eq!(vmids(&firewall.rules().expect("applied")), [record.vmid.get()]);
}

#[tokio::test(start_paused = true)]
async fn adopted_container_is_isolated_as_found_and_let_go_with_its_release() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let line = "net0: name=eth0,bridge=vmbr7,gw=10.9.0.1,hwaddr=BC:24:11:00:00:07,ip=10.9.0.7/24";
    let text = super::adopt::CMUX.replace("net0: name=eth0,bridge=vmbr0,ip=10.9.0.7/24", line);
    node.add_cmux(&text, true);
    let (record, _) =
        node.sandboxes.adopt(super::adopt::adoption(), false, LONG).await.expect("adopted");
    let rules = firewall.rules().expect("applied");
    let entry = &rules.sandboxes[&record.vmid];
    assert_eq!(entry.mac, Some([0xBC, 0x24, 0x11, 0, 0, 7]));
    assert_eq!(entry.ip, Some(Ipv4Addr::new(10, 9, 0, 7)));
    assert!(rules.bridges.contains("vmbr7") && rules.routers.contains(&[10, 9, 0, 1].into()));
    let released = node.sandboxes.release(&record.id, LONG).await.expect("released");
    assert_eq!(released.cause, Cause::Released);
    assert_eq!(vmids(&firewall.rules().expect("applied")), [] as [u32; 0]);
}

#[tokio::test(start_paused = true)]
async fn container_with_an_interface_that_is_not_filtered_is_refused() {
    let node = Node::new().await;
    let text = format!("{}net1: name=eth1,bridge=vmbr1,ip=dhcp\n", super::adopt::CMUX);
    node.add_cmux(&text, true);
    let could = node.sandboxes.adopt(super::adopt::adoption(), true, LONG).await;
    assert!(could.is_ok(), "isolation is off");
    node.isolated();
    let refused = node.sandboxes.adopt(super::adopt::adoption(), true, LONG).await;
    let refused = refused.expect_err("refused");
    assert_eq!(refused.reason, Reason::ContainerUnfit);
    assert!(refused.message.contains("net1"), "{}", refused.message);
}

#[tokio::test(start_paused = true)]
async fn sandbox_with_an_interface_that_is_not_filtered_is_not_closed() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let record = node.running(1).await;
    // An operator has added it while the sandbox runs.
    node.cluster.edit(&node.name, record.vmid, |config| {
        config.set("net1", "name=eth1,bridge=vmbr1,ip=dhcp").expect("a line");
    });
    let refused = node.sandboxes.update(&record.id, egress(Egress::None)).await;
    assert_eq!(refused.expect_err("it would not be").reason, Reason::ContainerUnfit);
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::Open));
    node.cluster.edit(&node.name, record.vmid, |config| config.remove("net1"));
    node.sandboxes.update(&record.id, egress(Egress::None)).await.expect("closed");
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::None));
}

impl Node {
    /// Reach of the sandbox of the record by the rules.
    fn lets_reach(&self, firewall: &MemoryFirewall, record: &Record) -> Option<Egress> {
        let rules = firewall.rules()?;
        rules.sandboxes.get(&record.vmid).map(|entry| entry.egress.clone())
    }
}

fn egress(egress: Egress) -> proto::update::Update {
    proto::update::Update { egress: Some(Some(egress)), ..Default::default() }
}

#[tokio::test(start_paused = true)]
async fn closed_sandbox_is_closed_from_its_start_and_after_a_restart_of_the_agent() {
    let mut node = Node::new().await;
    let firewall = node.isolated();
    let mut closed = order(1);
    closed.spec.egress = Some(Egress::None);
    let record = node.sandboxes.create(closed, LONG).await.expect("made");
    let open = node.running(2).await;
    assert_eq!((record.phase, &record.egress), (Phase::Running, &Egress::None));
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::None));
    assert_eq!(node.lets_reach(&firewall, &open), Some(Egress::Open));

    node.restart().await;
    let firewall = node.isolated();
    node.reconcile().await;
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::None));
    assert_eq!(node.lets_reach(&firewall, &open), Some(Egress::Open));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn egress_of_a_running_sandbox_can_be_changed() {
    let node = Node::new().await;
    let firewall = node.isolated();
    let record = node.running(1).await;
    let closed = node.sandboxes.update(&record.id, egress(Egress::None)).await.expect("closed");
    assert_eq!(closed.egress, Egress::None);
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::None));
    node.sandboxes.update(&record.id, egress(Egress::Open)).await.expect("open");
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::Open));

    // A change that does not take effect is an error, and is made by the next pass.
    firewall.set_failing(true);
    let error = node.sandboxes.update(&record.id, egress(Egress::None)).await.expect_err("failed");
    assert_eq!(error.reason, Reason::IsolationFailed);
    firewall.set_failing(false);
    node.reconcile().await;
    assert_eq!(node.lets_reach(&firewall, &record), Some(Egress::None));
}

fn list(names: &str) -> Egress {
    format!("allow={names}").parse().expect("a list")
}

fn listed(number: u8, names: &str) -> Order {
    let mut order = order(number);
    order.spec.egress = Some(list(names));
    order
}

#[tokio::test(start_paused = true)]
async fn sandbox_with_a_list_needs_a_resolver_that_answers() {
    let mut node = Node::new().await;
    let firewall = node.isolated();
    for resolver in [false, true] {
        if resolver {
            node.sandboxes.expect_resolver();
        }
        assert_eq!(node.sandboxes.filters_egress(), resolver);
        let error = node.sandboxes.create(listed(1, "a.b"), LONG).await.expect_err("refused");
        assert_eq!(error.reason, Reason::IsolationFailed);
    }
    node.sandboxes.resolver_answers(true);
    let record = node.sandboxes.create(listed(1, "a.b,*.c.d"), LONG).await.expect("made");
    assert_eq!(node.lets_reach(&firewall, &record), Some(list("*.c.d,a.b")));
    let ip = record.lease().expect("an address");
    let (id, known, _) = node.sandboxes.allow_list_of(ip).expect("a list");
    assert!(id == record.id && known.allows("a.b"));
    let open = node.running(2).await;
    assert_eq!(node.sandboxes.allow_list_of(open.lease().expect("an address")), None);

    // It runs on without answers, which is told; and it is what it was after a restart.
    node.sandboxes.resolver_answers(false);
    let (findings, _) = node.sandboxes.check().await;
    assert!(findings.iter().any(|one| one.detail.contains("allow-list")), "{findings:?}");
    node.restart().await;
    let firewall = node.isolated();
    node.sandboxes.expect_resolver();
    node.reconcile().await;
    assert_eq!(node.lets_reach(&firewall, &record), Some(list("*.c.d,a.b")));
    assert_eq!(node.lets_reach(&firewall, &open), Some(Egress::Open));
}

#[tokio::test(start_paused = true)]
async fn addresses_follow_the_list_of_a_running_sandbox() {
    let node = Node::new().await;
    let firewall = node.isolated();
    node.sandboxes.expect_resolver();
    node.sandboxes.resolver_answers(true);
    let record = node.sandboxes.create(listed(1, "a.b,c.d"), LONG).await.expect("made");
    let sandbox = record.lease().expect("an address");
    let grant = |name: &str, last: u8| crate::firewall::Grant {
        sandbox,
        name: name.to_owned(),
        address: [93, 184, 216, last].into(),
    };
    node.sandboxes.allow(&[grant("a.b", 1), grant("c.d", 2), grant("e.f", 3)]).await.expect("some");
    let allowed = || firewall.allowed(sandbox).iter().map(|ip| ip.octets()[3]).collect::<Vec<_>>();
    assert_eq!(allowed(), [1, 2]);
    let tighter = node.sandboxes.update(&record.id, egress(list("c.d"))).await.expect("tighter");
    assert_eq!(tighter.egress, list("c.d"));
    assert_eq!(allowed(), [2]);
    node.sandboxes.update(&record.id, egress(Egress::Open)).await.expect("open");
    node.sandboxes.update(&record.id, egress(list("c.d"))).await.expect("closed again");
    assert_eq!(allowed(), [] as [u8; 0]);
    assert!(node.sandboxes.is_within_reach([93, 184, 216, 1].into()));
    assert!(!node.sandboxes.is_within_reach([10, 0, 0, 5].into()));
    assert!(!node.sandboxes.is_within_reach([169, 254, 169, 254].into()));
}

#[tokio::test(start_paused = true)]
async fn node_without_isolation_closes_no_sandbox() {
    let node = Node::new().await;
    let mut closed = order(1);
    closed.spec.egress = Some(Egress::None);
    let error = node.sandboxes.create(closed, LONG).await.expect_err("refused");
    assert_eq!(error.reason, Reason::IsolationFailed);
    let record = node.running(2).await;
    let error = node.sandboxes.update(&record.id, egress(Egress::None)).await.expect_err("refused");
    assert_eq!(error.reason, Reason::IsolationFailed);

    // One that was closed before isolation was switched off runs on, is told, and does not start.
    let close = |record: &mut Record| record.egress = Egress::None;
    node.sandboxes.records.change(&record.id, close).await.expect("written");
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert!(finding.detail.contains("egress"), "{finding:?}");
    node.sandboxes.stop(&record.id, LONG).await.expect("stopped");
    let error = node.sandboxes.start(&record.id, LONG).await.expect_err("refused");
    assert_eq!(error.reason, Reason::IsolationFailed);
}

#[tokio::test(start_paused = true)]
async fn addresses_of_nodes_on_all_links_are_out_of_reach() {
    let node = Node::new().await;
    let firewall = node.isolated();
    node.running(1).await;
    let closed = |ip: &str| {
        let rules = firewall.rules().expect("applied");
        rules.grounds.closed.contains(&format!("{ip}/32").parse().expect("a network"))
    };
    assert!(!closed("203.0.113.12"));
    node.cluster.add_link([203, 0, 113, 12].into());
    node.reconcile().await;
    assert!(closed("203.0.113.12"));
}

#[tokio::test(start_paused = true)]
async fn kernel_that_cannot_count_connections_is_a_finding() {
    let node = Node::new().await;
    let firewall = node.isolated();
    node.running(1).await;
    node.assert_sound().await;
    firewall.set_cannot_count();
    let (findings, _) = node.sandboxes.check().await;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!(finding.invariant, proto::Invariant::Unchecked);
    assert!(finding.detail.contains("nft_connlimit"), "{finding:?}");
}
