//! From a bare node to a sandbox by the packages alone, an upgrade and a downgrade under load, and the
//! end of it all, in Debian 12 and 13 with their own systemd.
//!
//! The machine's cgroup controllers may be on v1; then the roots have none, and limits of sandboxes
//! are not seen here but on the lab.

use super::{
    booted::Booted,
    capabilities, removal,
    root::Base,
    steps::{
        AGENT, CLI, CONTROLLER, INGRESS, agent_is_replaced_under_load, created, install, join,
        make_a_template,
    },
    streams, wanted,
};

/// Highest exposure of the controller's unit by `systemd-analyze security`, in tenths.
const EXPOSURE: &str = "--threshold=20";

#[test]
fn packages_make_a_node_of_debian_12() {
    from_packages_to_a_sandbox_and_back(Base::Bookworm);
}

#[test]
fn packages_make_a_node_of_debian_13() {
    from_packages_to_a_sandbox_and_back(Base::Trixie);
}

fn from_packages_to_a_sandbox_and_back(base: Base) {
    if !wanted() {
        return;
    }
    let node = Booted::start(base, &format!("node-{base:?}").to_lowercase());
    install(&node);
    set_up(&node);
    make_a_template(&node);

    // No image, no name: the only snapshot is taken.
    let id = created(&node.ok(&[CLI, "create"]));
    let inside = node.ok(&[CLI, "exec", &id, "--", "sh", "-c", "cat /proc/1/comm; hostname"]);
    assert!(inside.contains("systemd") && inside.contains(&id), "{inside}");
    let ids = [id];
    let outcome = agent_is_replaced_under_load(&node, &ids, streams::wanted());
    println!("{outcome:?}");
    assert_eq!((outcome.lost, outcome.doubled), (0, 0), "{outcome:?}");
    let [id] = ids;

    capabilities::each_is_missed(&node);
    removal::keeps_and_then_deletes(&node, &id);
    purge(&node);
}

fn set_up(node: &Booted) {
    let setup = [CONTROLLER, "setup", "--domain", "sandbox.test"];
    let told = node.ok(&[&setup[..], &["--dry-run"]].concat());
    assert!(told.contains("controller.toml"), "{told}");
    assert_eq!(node.unit(CONTROLLER, "ActiveState"), "inactive", "a dry run starts nothing");
    node.ok(&setup);
    assert_eq!(node.unit(CONTROLLER, "ActiveState"), "active");
    assert!(node.ok(&setup).contains("nothing to do"), "a second run has nothing to do");
    node.ok(&["systemd-analyze", "security", "--no-pager", EXPOSURE, CONTROLLER]);

    let (line, took) = join(node);
    println!("joined and ready in {took:?}");
    for unit in [AGENT, INGRESS, "pve-sandbox-dns"] {
        assert_eq!(node.unit(unit, "ActiveState"), "active", "{unit}");
    }
    let bridge = node.ok(&["ip", "-brief", "address", "show", "vmbr1"]);
    assert!(bridge.contains("10.100.1.1/24"), "{bridge}");
    let (code, told) = node.run(&["sh", "-c", &line]);
    assert!(code != Some(0) && told.contains("token"), "the line is good once: {told}");
}

fn purge(node: &Booted) {
    let told = node.ok(&["dpkg", "--purge", AGENT, CONTROLLER, CLI]);
    let kept = "/var/lib/pve-sandbox-controller";
    assert!(told.contains(kept), "it says what it keeps: {told}");
    assert!(node.path(kept).is_dir(), "nobody was asked");
    assert_eq!(node.unit(AGENT, "ActiveState"), "inactive");
    assert_eq!(node.unit(CONTROLLER, "ActiveState"), "inactive");
    let agent = [
        "/usr/sbin/pve-sandbox-agent",
        "/etc/pve-sandbox/agent.toml",
        "/var/lib/pve-sandbox-agent",
    ];
    for left in agent {
        assert!(!node.path(left).exists(), "{left}");
    }
}
