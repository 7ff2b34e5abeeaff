//! Addresses: leases, replies from DHCP, and changes of a container's net0 by operators.

use std::{collections::HashMap, sync::Mutex};

use proto::Invariant;

use super::{
    adopt::{CMUX, adoption},
    log_lines::LogLines,
    *,
};
use crate::sandbox::lifecycle::address::{DhcpReplies, Mac, Reply};
use tokio::time::Instant;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 1);
/// Further address of the host itself.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 200);

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 100, 1, last)
}

/// DHCP server: addresses by MAC, each seen at one time, or whenever it is asked for.
#[derive(Debug, Default)]
struct Server {
    gives: Mutex<HashMap<Mac, (Ipv4Addr, Option<Instant>)>>,
    fails: Mutex<Option<String>>,
}

impl Server {
    fn give(&self, mac: Mac, ip: Ipv4Addr) {
        self.gives.lock().expect("no panic").insert(mac, (ip, None));
    }

    fn gave(&self, mac: Mac, ip: Ipv4Addr) {
        self.gives.lock().expect("no panic").insert(mac, (ip, Some(Instant::now())));
    }
}

impl DhcpReplies for Server {
    fn ready(&self) -> Result<(), String> {
        self.fails.lock().expect("no panic").clone().map_or(Ok(()), Err)
    }

    fn last(&self, mac: Mac) -> Option<Reply> {
        let gives = self.gives.lock().expect("no panic");
        let (ip, seen) = gives.get(&mac)?;
        Some(Reply { ip: *ip, seen: seen.unwrap_or_else(Instant::now) })
    }
}

/// MAC of the sandbox with this vmid under DHCP.
fn mac(vmid: u32) -> Mac {
    let [a, b, c, d] = vmid.to_be_bytes();
    [0x02, 0x51, a, b, c, d]
}

fn asks(number: u8) -> Order {
    let mut order = order(number);
    order.spec.network = Network::Dhcp;
    order
}

async fn node(dhcp: Dhcp) -> (Node, Arc<Server>) {
    let change = |options: &mut Options| {
        options.network.dhcp = dhcp;
        options.network.own = vec![OWN];
    };
    let node = Node::with(change, Faults::default()).await;
    let server = Arc::new(Server::default());
    node.sandboxes.watch_dhcp(Arc::clone(&server) as Arc<dyn DhcpReplies>);
    (node, server)
}

impl Node {
    async fn asking(&self, number: u8) -> Arc<Record> {
        let record = self.sandboxes.create(asks(number), LONG).await.expect("admitted");
        assert_eq!(record.phase, Phase::Running, "{record:?}");
        record
    }

    async fn finds(&self) -> Vec<Invariant> {
        let (findings, _) = self.sandboxes.check().await;
        findings.iter().map(|finding| finding.invariant).collect()
    }

    /// Rewrites net0, as an operator would.
    fn connect(&self, vmid: Vmid, change: impl Fn(&str) -> String) {
        self.cluster.edit(&self.name, vmid, |config| {
            let net0 = change(config.get("net0").expect("connected"));
            config.set("net0", &net0).expect("fits");
        });
    }

    async fn refuses(&self, order: Order) -> Reason {
        self.sandboxes.create(order, LONG).await.expect_err("refused").reason
    }
}

#[tokio::test(start_paused = true)]
async fn dhcp_is_refused_unless_allowed_and_replies_are_visible() {
    let (allows_none, _) = node(Dhcp::Refused).await;
    assert_eq!(allows_none.refuses(asks(1)).await, Reason::DhcpRefused);
    let (fails, server) = node(Dhcp::OnRequest).await;
    *server.fails.lock().expect("no panic") = Some("vmbr0 has no uplink".into());
    let error = fails.sandboxes.create(asks(1), LONG).await.expect_err("cannot be seen");
    assert_eq!(
        (error.reason, error.message.as_str()),
        (Reason::DhcpRefused, "vmbr0 has no uplink")
    );
    let unseen = Node::with(|o| o.network.dhcp = Dhcp::All, Faults::default()).await;
    assert_eq!(unseen.refuses(order(1)).await, Reason::DhcpRefused, "nobody watches");
    let elsewhere = Node::with(
        |options| {
            options.network.dhcp = Dhcp::All;
            options.templates[0].bridge = Some("vmbr5".into());
        },
        Faults::default(),
    );
    let elsewhere = elsewhere.await;
    elsewhere.sandboxes.watch_dhcp(Arc::new(Server::default()));
    assert_eq!(elsewhere.refuses(order(1)).await, Reason::DhcpRefused, "on another bridge");
    for node in [allows_none, fails, unseen, elsewhere] {
        assert!(node.sandboxes.live().is_empty(), "nothing was begun");
        node.assert_clean().await;
    }
    let (node, _) = node(Dhcp::OnRequest).await;
    let record = node.running(1).await;
    assert_eq!(
        (record.network, record.ip),
        (Network::Static, Some(ip(2))),
        "others are leased one"
    );
}

#[tokio::test(start_paused = true)]
async fn dhcp_lease_is_the_address_given_in_this_boot() {
    let (mut node, server) = node(Dhcp::All).await;
    server.give(mac(100_000), ip(40));
    let record = node.sandboxes.create(order(1), LONG).await.expect("admitted");
    assert_eq!((record.phase, record.network), (Phase::Running, Network::Dhcp));
    assert_eq!(record.lease(), Some(ip(40)));
    node.assert_sound().await;
    // A renewal with another address is reported, and not used.
    server.gave(mac(100_000), ip(41));
    assert_eq!(node.finds().await, [Invariant::I5]);
    assert_eq!(node.record(1).await.lease(), Some(ip(40)));
    node.restart().await;
    node.sandboxes.watch_dhcp(Arc::clone(&server) as Arc<dyn DhcpReplies>);
    assert_eq!(node.record(1).await.lease(), Some(ip(40)), "for the whole boot");
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    assert_eq!(node.record(1).await.lease(), None);
    // In the next boot, an earlier reply does not count.
    let error = node.sandboxes.start(&id(1), LONG).await.expect_err("no reply");
    assert_eq!(error.reason, Reason::ProbeTimeout, "{error}");
    assert_eq!(node.record(1).await.lease(), None);
    server.give(mac(100_000), ip(41));
    let record = node.sandboxes.start(&id(1), LONG).await.expect("starts");
    assert_eq!(record.lease(), Some(ip(41)));
    node.assert_sound().await;
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    node.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn dhcp_address_in_use_or_outside_the_network_fails_the_creation() {
    let (node, server) = node(Dhcp::OnRequest).await;
    let fixed = node.running(1).await;
    server.give(mac(100_001), ip(40));
    let given = node.asking(2).await;
    assert_eq!(given.lease(), Some(ip(40)));
    let stranger =
        b"hostname: x\nnet0: name=eth0,bridge=vmbr0,ip=dhcp\nnet1: name=eth1,bridge=vmbr0,\
        ip=10.100.1.60/24\n";
    let stranger = crate::pve::ContainerConfig::parse(stranger);
    node.cluster.add_guest(&node.name, vmid(500), stranger, false);
    node.reconciler().pass().await;
    let unfit = [
        fixed.ip.expect("leased"),
        ip(40),
        ip(60),
        GATEWAY,
        OWN,
        ip(0),
        ip(255),
        Ipv4Addr::new(10, 9, 0, 7),
        Ipv4Addr::LOCALHOST,
    ];
    for (number, ip) in (3..).zip(unfit) {
        // Vmids are leased one after another.
        server.give(mac(99_999 + u32::from(number)), ip);
        let record = node.sandboxes.create(asks(number), LONG).await.expect("admitted");
        let failure = record.failure.as_ref().map(|failure| failure.reason);
        assert_eq!((record.phase, failure), (Phase::Failed, Some(Reason::AddressConflict)), "{ip}");
        let why = record.failure.as_ref().map(|failure| failure.message.as_str());
        let others = [1, 2].map(|other| id(other).to_string());
        let names = |why: &str| others.iter().any(|other| why.contains(other.as_str()));
        assert!(!why.is_some_and(names), "who has it is nobody else's business: {why:?}");
    }
    assert_eq!(node.record(1).await.lease(), fixed.ip);
    assert_eq!(node.record(2).await.lease(), Some(ip(40)));
    // The stopped sandbox frees its address.
    node.sandboxes.stop(&id(2), LONG).await.expect("stopped");
    server.give(mac(100_011), ip(40));
    assert_eq!(node.asking(99).await.lease(), Some(ip(40)));
    let error = node.sandboxes.start(&id(2), LONG).await.expect_err("is another's now");
    assert_eq!(error.reason, Reason::AddressConflict);
}

#[tokio::test(start_paused = true)]
async fn address_stored_by_an_older_version_is_no_lease() {
    let (node, server) = node(Dhcp::All).await;
    server.give(mac(100_000), ip(40));
    node.sandboxes.create(order(1), LONG).await.expect("admitted");
    // As written by the older version that read the container's own table.
    let before = node.record(1).await;
    let believed = Record { ip: Some(ip(2)), ip_granted: false, ..Record::clone(&before) };
    let json = serde_json::to_value(&believed).expect("serializes");
    let mut json = json.as_object().expect("an object").clone();
    json.remove("ip_granted");
    let read: Record = serde_json::from_value(json.into()).expect("reads");
    assert_eq!((read.ip, read.lease()), (Some(ip(2)), None));
}

#[tokio::test(start_paused = true)]
async fn sandbox_started_by_an_operator_gets_its_lease_from_dhcp() {
    let (node, server) = node(Dhcp::All).await;
    server.give(mac(100_000), ip(40));
    node.sandboxes.create(order(1), LONG).await.expect("admitted");
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.clock.forward(Duration::from_secs(60));
    server.gives.lock().expect("no panic").clear();
    node.cluster.switch(vmid(100_000), true);
    node.reconcile().await;
    let record = node.record(1).await;
    assert_eq!((record.phase, record.lease()), (Phase::Running, None), "no reply was seen");
    let follow = tokio::spawn(Arc::clone(&node.sandboxes).follow_dhcp());
    server.gave(mac(100_000), GATEWAY);
    let lines = LogLines::default();
    {
        let _counts = lines.count_here();
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    assert_eq!(node.record(1).await.lease(), None, "not what it must not have");
    assert_eq!(lines.count(), 1, "that is logged once");
    server.gave(mac(100_000), ip(43));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(node.record(1).await.lease(), Some(ip(43)));
    server.gave(mac(100_000), ip(44));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(node.record(1).await.lease(), Some(ip(43)), "and it stays");
    follow.abort();
}

#[tokio::test(start_paused = true)]
async fn sandbox_with_a_changed_net0_is_reported_and_not_started() {
    let to_another_address = |net0: &str| net0.replace("ip=10.100.1.2/", "ip=10.100.1.3/");
    let to_another_bridge = |net0: &str| net0.replace("vmbr0", "vmbr1");
    let to_another_mac = |net0: &str| net0.replace("hwaddr=02", "hwaddr=06");
    let to_dhcp = |net0: &str| net0.replace("ip=10.100.1.2/24,gw=10.100.1.1", "ip=dhcp");
    let changes: [fn(&str) -> String; 4] =
        [to_another_address, to_another_bridge, to_another_mac, to_dhcp];
    for change in changes {
        let node = Node::new().await;
        let record = node.running(1).await;
        let before = node.cluster.guests()[&record.vmid].config.clone();
        node.connect(record.vmid, change);
        let after = node.cluster.guests()[&record.vmid].config.clone();
        assert_ne!(before, after);
        assert_eq!(node.finds().await, [Invariant::I5]);
        assert_eq!(node.reconcile().await, [], "it runs on");
        assert_eq!(node.record(1).await.lease(), record.ip, "at the address that it has leased");
        node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        let error = node.sandboxes.start(&id(1), LONG).await.expect_err("is another's");
        assert_eq!(error.reason, Reason::AddressConflict);
        let record = node.record(1).await;
        let failure = record.failure.as_ref().expect("told");
        assert_eq!((record.phase, failure.reason), (Phase::Stopped, error.reason));
        assert!(failure.message.contains("ip=10.100.1.2/24"), "what to put back: {failure:?}");
        assert_eq!(node.cluster.guests()[&record.vmid].pid, None, "not started");
        node.cluster.edit(&node.name, record.vmid, |config| *config = before.clone());
        node.sandboxes.start(&id(1), LONG).await.expect("starts");
        node.assert_sound().await;
    }
}

#[tokio::test(start_paused = true)]
async fn foreign_container_with_the_address_of_a_sandbox_is_reported() {
    let node = Node::new().await;
    let record = node.running(1).await;
    let clone = node.cluster.guests()[&record.vmid].config.clone();
    let second =
        "hostname: x\nnet0: bridge=vmbr1,ip=dhcp\nnet1: name=eth1,bridge=vmbr0,ip=10.100.1.2/24\n";
    let second = crate::pve::ContainerConfig::parse(second.as_bytes());
    for theirs in [clone.clone(), second] {
        node.cluster.add_guest(&node.name, vmid(500), theirs, false);
        assert_eq!(node.finds().await, [Invariant::I3]);
        node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        let error = node.sandboxes.start(&id(1), LONG).await.expect_err("it has its address");
        assert_eq!(error.reason, Reason::AddressConflict);
        assert!(error.message.contains("container 500") && error.message.contains("10.100.1.2"));
        node.cluster.remove(vmid(500));
        node.sandboxes.start(&id(1), LONG).await.expect("starts");
        node.assert_sound().await;
    }
    // A template is never started.
    let mut template = clone;
    template.set("template", "1").expect("fits");
    node.cluster.add_guest(&node.name, vmid(500), template, false);
    node.assert_sound().await;
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.sandboxes.start(&id(1), LONG).await.expect("starts");
}

/// Connected by DHCP, like containers of the predecessor.
fn by_dhcp() -> String {
    CMUX.replace("bridge=vmbr0,ip=10.9.0.7/24", "bridge=vmbr0,hwaddr=BC:24:11:00:00:07,ip=dhcp")
}

const CMUX_MAC: Mac = [0xbc, 0x24, 0x11, 0, 0, 7];

#[tokio::test(start_paused = true)]
async fn a_container_with_dhcp_is_adopted_only_where_dhcp_is_allowed() {
    let (refused, _) = node(Dhcp::Refused).await;
    let before = refused.add_cmux(&by_dhcp(), true);
    for dry_run in [true, false] {
        let error = refused.sandboxes.adopt(adoption(), dry_run, LONG).await.expect_err("dhcp");
        assert_eq!(error.reason, Reason::DhcpRefused);
        assert!(error.message.contains("pct set 207 --net0"), "{error}");
    }
    refused.assert_unchanged(&before);
    let (elsewhere, _) = node(Dhcp::OnRequest).await;
    let before = elsewhere.add_cmux(&by_dhcp().replace("vmbr0", "vmbr9"), true);
    let error = elsewhere.sandboxes.adopt(adoption(), false, LONG).await.expect_err("unseen");
    assert_eq!(error.reason, Reason::DhcpRefused);
    elsewhere.assert_unchanged(&before);

    let (node, server) = node(Dhcp::OnRequest).await;
    node.add_cmux(&by_dhcp(), true);
    let (record, _) = node.sandboxes.adopt(adoption(), false, LONG).await.expect("adopted");
    assert_eq!((record.phase, record.lease()), (Phase::Running, None), "no reply was seen yet");
    node.assert_sound().await;
    server.give(CMUX_MAC, ip(50));
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    let record = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!(record.lease(), Some(ip(50)));
    node.sandboxes.release(&id(1), LONG).await.expect("given back");
    // Adopted again while a reply is known.
    let again = Adoption { id: id(2), ..adoption() };
    let (record, _) = node.sandboxes.adopt(again, false, LONG).await.expect("adopted");
    assert_eq!(record.lease(), Some(ip(50)));
    node.assert_sound().await;
}

#[tokio::test(start_paused = true)]
async fn addresses_of_further_interfaces_are_told_in_their_order() {
    let (node, _) = node(Dhcp::Refused).await;
    let line = |number: u8| {
        format!("net{number}: name=eth{number},bridge=vmbr1,ip=192.168.9.{number}/24\n")
    };
    // As PVE sorts them.
    let more = [line(1), line(10), line(2), "net3: name=eth3,bridge=vmbr1,ip=dhcp\n".into()];
    node.add_cmux(&format!("{CMUX}{}", more.concat()), true);
    let (record, _) = node.sandboxes.adopt(adoption(), false, LONG).await.expect("adopted");
    let further = |number| Ipv4Addr::new(192, 168, 9, number);
    let own = Ipv4Addr::new(10, 9, 0, 7);
    let all: Vec<_> = record.addresses().collect();
    assert_eq!((all[0], &all[1..]), (own, &[further(1), further(2), further(10)][..]));
    assert_eq!(record.lease(), Some(own), "the others are not used");
    // What an operator changes counts from the next start on.
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.cluster.edit(&node.name, record.vmid, |config| config.remove("net1"));
    let record = node.sandboxes.start(&id(1), LONG).await.expect("started");
    let all: Vec<_> = record.addresses().collect();
    assert_eq!(all, [own, further(2), further(10)]);
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.cluster.edit(&node.name, record.vmid, |config| {
        for number in 4..=31 {
            let line = line(number);
            let (key, value) = line.trim().split_once(": ").expect("a line");
            config.set(key, value).expect("fits");
        }
    });
    let record = node.sandboxes.start(&id(1), LONG).await.expect("started");
    assert_eq!(record.addresses().count(), 16);
}

#[tokio::test(start_paused = true)]
async fn adopting_a_container_with_a_taken_address_is_refused() {
    let (node, _) = node(Dhcp::Refused).await;
    let with = |address: &str| CMUX.replace("10.9.0.7/24", address);
    let refused = async |text: &str, expected: Reason| {
        let before = node.add_cmux(text, true);
        let error = node.sandboxes.adopt(adoption(), false, LONG).await.expect_err("refused");
        assert_eq!(error.reason, expected, "{error}");
        node.assert_unchanged(&before);
    };
    refused(&with("10.100.1.1/24"), Reason::AddressConflict).await;
    refused(&with("10.100.1.200/24"), Reason::AddressConflict).await;
    let ours = node.running(3).await;
    refused(&with(&format!("{}/24", ours.ip.expect("leased"))), Reason::SandboxKnown).await;
    let other = crate::pve::ContainerConfig::parse(b"net0: bridge=vmbr0,ip=10.100.1.90/24\n");
    node.cluster.add_guest(&node.name, vmid(500), other, false);
    refused(&with("10.100.1.90/24"), Reason::AddressConflict).await;
    // A container without an address from PVE is a sandbox without one.
    node.add_cmux(&with("manual"), true);
    let (record, _) = node.sandboxes.adopt(adoption(), false, LONG).await.expect("adopted");
    assert_eq!((record.network, record.lease()), (Network::Static, None));
    node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
    node.sandboxes.start(&id(1), LONG).await.expect("started");
    node.assert_sound().await;
}
