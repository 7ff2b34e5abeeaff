//! The rules on a kernel: in a network namespace of the test's own.

mod firewall_bridge;
mod routed;

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use proto::spec::Egress;

use super::{Entry, Firewall as _, Grant, Grounds, Rules, nft::NftFirewall, render::TABLE};
use crate::bridge::NAT_TABLE;

pub(super) fn grounds() -> Grounds {
    Grounds {
        gateway: [10, 100, 1, 1].into(),
        name_servers: [[10, 100, 1, 1].into(), [192, 0, 2, 53].into()].into(),
        dhcp_server: Some([10, 100, 1, 1].into()),
        closed: ["10.100.1.0/24", "203.0.113.9/32"].map(|net| net.parse().expect("one")).into(),
        reach: ["10.7.0.0/24".parse().expect("one")].into(),
        connections: Some(4096),
        name_connections: Some(4),
    }
}

pub(super) fn entry(last: u8) -> Entry {
    Entry {
        mac: Some([0x02, 0x50, 10, 100, 1, last]),
        ip: Some([10, 100, 1, last].into()),
        dhcp: false,
        egress: Egress::Open,
    }
}

pub(super) fn rules(sandboxes: impl IntoIterator<Item = (u32, Entry)>) -> Rules {
    let vmid = |number: u32| number.try_into().expect("a vmid");
    Rules {
        grounds: grounds(),
        bridges: ["vmbr0".to_owned()].into(),
        routers: Default::default(),
        sandboxes: sandboxes.into_iter().map(|(number, entry)| (vmid(number), entry)).collect(),
    }
}

/// Network namespace that lives as long as this.
struct Namespace(Child);

impl Namespace {
    #[expect(clippy::disallowed_methods, reason = "a test starts its namespace")]
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "run this test as root: it makes a network namespace"
        );
        let mut command = Command::new("unshare");
        let sleeping = command.args(["--net", "sleep", "120"]).stdin(Stdio::null()).spawn();
        let namespace = Self(sleeping.expect("unshare"));
        // Until `unshare` has become `sleep`, the namespace is the test's.
        let own = std::fs::read_link("/proc/self/ns/net").expect("proc");
        let other = || std::fs::read_link(namespace.path()).is_ok_and(|other| other != own);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !other() {
            assert!(Instant::now() < deadline, "`unshare --net` has made no namespace");
            std::thread::sleep(Duration::from_millis(2));
        }
        namespace
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    fn nft(&self) -> [String; 3] {
        [
            "/usr/bin/nsenter".to_owned(),
            format!("--net={}", self.path()),
            "/usr/sbin/nft".to_owned(),
        ]
    }

    #[expect(clippy::disallowed_methods, reason = "a test is somebody else on the host")]
    fn run(&self, line: &str) -> String {
        let [nsenter, namespace, nft] = self.nft();
        let output = Command::new(nsenter).args([&namespace, &nft, line]).output().expect("nft");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn rules_are_applied_changed_and_put_back() {
    let (namespace, net) = (Namespace::new(), tempfile::tempdir().expect("a directory"));
    let setting = net.path().join("vmbr0/bridge/no_linklocal_learn");
    std::fs::create_dir_all(setting.parent().expect("one")).expect("mkdir");
    std::fs::write(&setting, "0\n").expect("written");
    let firewall = NftFirewall::of(net.path(), &namespace.nft());
    namespace.run("add table inet somebody");

    let one = rules([(100_002, entry(2))]);
    firewall.apply(&one).await.expect("applied");
    assert_eq!(std::fs::read_to_string(&setting).expect("read"), "1");
    assert_eq!(firewall.check().await, Ok(None));

    // A change is as good as a replacement.
    let dhcp = Entry { ip: None, dhcp: true, ..entry(3) };
    let closed = Entry { egress: Egress::None, ..entry(2) };
    let two = rules([
        (100_002, closed),
        (100_004, entry(4)),
        (100_003, dhcp),
        (100_005, listed("allow=a.b")),
    ]);
    firewall.apply(&two).await.expect("changed");
    assert_eq!(firewall.check().await, Ok(None));
    let list = || namespace.run("list ruleset");
    let changed = list();
    let fresh = NftFirewall::of(net.path(), &namespace.nft());
    fresh.apply(&two).await.expect("replaced");
    let lines = |text: &str| {
        let mut lines: Vec<_> = text.split([',', '\n']).map(|l| l.trim().to_owned()).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&changed), lines(&list()));

    for tampering in [
        format!("delete element inet {TABLE} addresses {{ 10.100.1.4 }}"),
        format!("flush chain bridge {TABLE} source"),
        format!("delete element inet {TABLE} closed_egress {{ 10.100.1.2 }}"),
        format!("add element inet {TABLE} name_servers {{ 10.9.9.9 }}"),
        "delete element inet pve_sandbox_names listed { 10.100.1.5 }".to_owned(),
        "flush chain inet pve_sandbox_names asking".to_owned(),
        "delete table bridge pve_sandbox_names".to_owned(),
        format!("delete table bridge {TABLE}"),
        "flush ruleset".to_owned(),
    ] {
        namespace.run(&tampering);
        let found = fresh.check().await.expect("listed");
        assert!(found.is_some(), "{tampering}");
        fresh.apply(&two).await.expect("put back");
        assert_eq!(fresh.check().await, Ok(None), "{tampering}");
    }
    // What somebody else took away makes a change fail; then everything is replaced.
    namespace.run("flush ruleset");
    fresh.apply(&one).await.expect("replaced");
    assert_eq!(fresh.check().await, Ok(None));
    std::fs::write(&setting, "0\n").expect("written");
    let found = fresh.check().await.expect("listed").expect("a difference");
    assert!(found.contains("no_linklocal_learn"), "{found}");
}

fn listed(names: &str) -> Entry {
    Entry { egress: names.parse().expect("an egress"), ..entry(5) }
}

fn grant(name: &str, last: u8) -> Grant {
    let (sandbox, address) = ([10, 100, 1, 5].into(), [93, 184, 216, last].into());
    Grant { sandbox, name: name.to_owned(), address }
}

#[tokio::test]
async fn addresses_of_names_come_go_and_outlive_the_agent() {
    let (namespace, net) = (Namespace::new(), tempfile::tempdir().expect("a directory"));
    let firewall = NftFirewall::of(net.path(), &namespace.nft());
    firewall.can_allow(&grounds()).await.expect("this kernel has all that it takes");
    assert_eq!(namespace.run("list ruleset"), "", "it was tried only");
    let with = |names: &str| rules([(100_005, listed(names)), (100_002, entry(2))]);
    firewall.apply(&with("allow=a.b,c.d")).await.expect("applied");
    let grants = [grant("a.b", 1), grant("c.d", 2), grant("e.f", 3)];
    firewall.allow(&grants).await.expect("allowed");
    firewall.allow(&grants[..1]).await.expect("once more");
    let has = |last: u8| {
        ["bridge", "inet"].map(|family| {
            let set = namespace.run(&format!("list set {family} pve_sandbox_names allowed"));
            set.contains(&format!("10.100.1.5 . 93.184.216.{last} "))
        })
    };
    assert_eq!([has(1), has(2), has(3)], [[true; 2], [true; 2], [false; 2]]);
    assert_eq!(firewall.check().await, Ok(None), "they are no difference");
    // Another sandbox's change and a repair leave them.
    firewall.apply(&rules([(100_005, listed("allow=a.b,c.d"))])).await.expect("changed");
    namespace.run("flush chain inet pve_sandbox_names named");
    assert!(firewall.check().await.expect("listed").is_some());
    firewall.apply(&with("allow=a.b,c.d")).await.expect("put back");
    assert_eq!([has(1), has(2)], [[true; 2]; 2]);
    // A tighter list takes one away, though the kernel may have forgotten it.
    namespace.run("flush set bridge pve_sandbox_names allowed");
    firewall.apply(&with("allow=a.b")).await.expect("tightened");
    assert_eq!([has(1), has(2)], [[false, true], [false; 2]]);
    firewall.allow(&[grant("c.d", 2), grant("a.b", 1)]).await.expect("as far as allowed");
    assert_eq!([has(1), has(2)], [[true; 2], [false; 2]]);
    // The next agent keeps it under the same list, and not under another.
    let next = NftFirewall::of(net.path(), &namespace.nft());
    next.apply(&with("allow=a.b")).await.expect("applied");
    assert_eq!(has(1), [true; 2]);
    let other = NftFirewall::of(net.path(), &namespace.nft());
    other.apply(&with("allow=a.b,c.d")).await.expect("applied");
    assert_eq!(has(1), [false; 2]);
    // After a flush, what was answered lately comes back.
    other.allow(&[grant("a.b", 1)]).await.expect("allowed");
    namespace.run("flush ruleset");
    assert!(other.allow(&[grant("c.d", 2)]).await.is_err(), "there are no tables");
    other.check().await.expect("listed").expect("a difference");
    other.apply(&with("allow=a.b,c.d")).await.expect("put back");
    assert_eq!(has(1), [true; 2]);
    // Without a list there are no tables of names.
    other.apply(&rules([(100_002, entry(2))])).await.expect("changed");
    assert!(!namespace.run("list ruleset").contains("pve_sandbox_names"));
    assert_eq!(other.check().await, Ok(None));
}

#[tokio::test]
async fn no_table_of_ours_stays_where_isolation_is_switched_off() {
    let (namespace, net) = (Namespace::new(), tempfile::tempdir().expect("a directory"));
    let firewall = NftFirewall::of(net.path(), &namespace.nft());
    assert_eq!(firewall.remove().await, Ok(Vec::new()), "there is none");
    let both = rules([(100_002, entry(2)), (100_005, listed("allow=a.b"))]);
    firewall.apply(&both).await.expect("applied");
    let way_out = format!("ip {NAT_TABLE}");
    for table in
        ["inet somebody", "inet pve_sandboxes", "inet pve_sandbox_of_a_later_version", &way_out]
    {
        namespace.run(&format!("add table {table}"));
    }
    let gone = NftFirewall::of(net.path(), &namespace.nft()).remove().await.expect("removed");
    assert_eq!(gone.len(), 5, "{gone:?}");
    let left = namespace.run("list tables");
    let left: std::collections::BTreeSet<_> = left.lines().collect();
    let way_out = format!("table {way_out}");
    assert_eq!(left, ["table inet pve_sandboxes", "table inet somebody", &way_out].into());
    // It can be switched on again.
    firewall.remove().await.expect("nothing is left");
    firewall.apply(&both).await.expect("applied");
    assert_eq!(firewall.check().await, Ok(None));
    let without = NftFirewall::of(net.path(), &["/nonexistent/nft".to_owned()]);
    assert_eq!(without.remove().await, Ok(Vec::new()), "no program, no table");
}

#[tokio::test]
async fn rules_without_counting_are_applied_where_the_kernel_cannot_count() {
    let (namespace, net) = (Namespace::new(), tempfile::tempdir().expect("a directory"));
    // Stands for the nft of such a kernel: it refuses every check.
    let nft = namespace.nft().map(|word| format!("'{word}'")).join(" ");
    let refusing =
        format!("case $1 in -c) echo 'Error: not supported' >&2; exit 1;; esac; exec {nft} \"$@\"");
    let argv = ["/bin/sh".to_owned(), "-c".to_owned(), refusing, "nft".to_owned()];
    let firewall = NftFirewall::of(net.path(), &argv);
    let one = rules([(100_002, entry(2))]);
    firewall.apply(&one).await.expect("applied");
    assert!(!namespace.run("list ruleset").contains("ct count"));
    assert!(!firewall.counts_connections());
    assert_eq!(firewall.check().await, Ok(None));
    firewall.apply(&rules([(100_003, entry(3))])).await.expect("changed");
    assert_eq!(firewall.check().await, Ok(None));
}

#[tokio::test]
async fn connections_that_are_counted_are_no_difference() {
    let (namespace, net) = (Namespace::new(), tempfile::tempdir().expect("a directory"));
    let firewall = NftFirewall::of(net.path(), &namespace.nft());
    firewall.apply(&rules([(100_002, entry(2))])).await.expect("applied");
    assert!(namespace.run("list ruleset").contains("ct count over 4096"), "this kernel can count");
    assert!(firewall.counts_connections());
    namespace
        .run(&format!("add element inet {TABLE} connections {{ 10.100.1.2 ct count over 4096 }}"));
    assert_eq!(firewall.check().await, Ok(None));
    namespace.run(&format!("flush chain inet {TABLE} connections"));
    let found = firewall.check().await.expect("listed").expect("a difference");
    assert!(found.contains("connections"), "{found}");
}

#[tokio::test]
async fn missing_nft_and_a_foreign_bridge_are_errors() {
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &["/nonexistent/nft".to_owned()]);
    let error = firewall.apply(&rules([])).await.expect_err("no nft").to_string();
    assert!(error.contains("nftables"), "{error}");
    std::fs::create_dir_all(net.path().join("ovs0")).expect("mkdir");
    let error = firewall.can_filter("ovs0").expect_err("no bridge").to_string();
    assert!(error.contains("ovs0"), "{error}");
    let refusing = NftFirewall::of(net.path(), &["/bin/false".to_owned()]);
    assert!(refusing.apply(&rules([])).await.is_err());
}
