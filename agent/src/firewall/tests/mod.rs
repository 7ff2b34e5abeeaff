//! The rules on a kernel: in a network namespace of the test's own.

mod firewall_bridge;

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use proto::spec::Egress;

use super::{Entry, Firewall as _, Grounds, Rules, nft::NftFirewall, render::TABLE};

pub(super) fn grounds() -> Grounds {
    Grounds {
        gateway: [10, 100, 1, 1].into(),
        name_servers: [[10, 100, 1, 1].into(), [192, 0, 2, 53].into()].into(),
        dhcp_server: Some([10, 100, 1, 1].into()),
        closed: ["10.100.1.0/24", "203.0.113.9/32"].map(|net| net.parse().expect("one")).into(),
        reach: ["10.7.0.0/24".parse().expect("one")].into(),
        connections: Some(4096),
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
        let mut command = Command::new("unshare");
        let sleeping = command.args(["--net", "sleep", "120"]).stdin(Stdio::null()).spawn();
        let namespace = Self(sleeping.expect("unshare"));
        // Until `unshare` has become `sleep`, the namespace is the test's.
        let own = std::fs::read_link("/proc/self/ns/net").expect("proc");
        let other = || std::fs::read_link(namespace.path()).is_ok_and(|other| other != own);
        while !other() {
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
    if !nix::unistd::geteuid().is_root() {
        // Making a namespace requires root.
        return;
    }
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
    let two = rules([(100_002, closed), (100_004, entry(4)), (100_003, dhcp)]);
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

#[tokio::test]
async fn rules_without_counting_are_applied_where_the_kernel_cannot_count() {
    if !nix::unistd::geteuid().is_root() {
        // Making a namespace requires root.
        return;
    }
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
    if !nix::unistd::geteuid().is_root() {
        // Making a namespace requires root.
        return;
    }
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
