//! `pve-sandbox-agent uninstall` on a node with a sandbox: what is kept lives on and is taken in again, what
//! is deleted leaves nothing.

use super::{
    booted::Booted,
    steps::{AGENT, CLI, join_line, until, until_exec},
};

/// Unit of Debian's own Caddy.
const CADDY: &str = "caddy.service";
/// File by which the agent knows that it has masked that.
const MASKED: &str = "/var/lib/pve-sandbox-agent/masked-caddy";

/// Checks that Debian's Caddy does not start by itself, or that it was given back.
#[track_caller]
pub(crate) fn caddy_is_masked(node: &Booted, masked: bool) {
    let state = node.unit(CADDY, "UnitFileState");
    assert_eq!(state == "masked", masked, "{state}");
    assert_eq!(node.path(MASKED).exists(), masked, "the file tells it");
    let runs = node.unit(CADDY, "ActiveState") == "active";
    assert!(!masked || !runs, "it was stopped");
}

/// Keeps the sandbox through a purge and a new installation, then deletes it with all of the node.
pub(crate) fn keeps_and_then_deletes(node: &Booted, id: &str) {
    refuses_what_is_not_said(node);
    kept_sandbox_is_taken_in_again(node, id);

    let all = ["--sandboxes", "delete", "--data", "delete", "--bridge", "delete", "--yes"];
    let told = node.ok(&[&[AGENT, "uninstall"][..], &all].concat());
    assert!(told.contains(&format!("deleted {id}")), "{told}");
    assert_eq!(marked(node), "", "no container is left");
    caddy_is_masked(node, false);
    for gone in ["/var/lib/pve-sandbox-agent", "/etc/pve-sandbox/tls/node.key"] {
        assert!(!node.path(gone).exists(), "{gone}");
    }
    let tables = node.ok(&["nft", "list", "tables"]);
    assert!(!tables.contains("pve_sandbox"), "{tables}");
    // The controller did not hear of it: it is told.
    let forget = || node.run(&[CLI, "node", "forget", "pve1", "--lost"]);
    until("the node to be forgotten", || forget().1, || forget().0 == Some(0));
    assert!(!node.ok(&[CLI, "ls", "-q"]).contains(id));
}

/// Numbers of the containers with a mark.
fn marked(node: &Booted) -> String {
    let look = "grep -l '^#pve-sandbox%3A' /etc/pve/lxc/*.conf | xargs -rn1 basename -s .conf";
    node.ok(&["sh", "-c", look]).trim().to_owned()
}

fn refuses_what_is_not_said(node: &Booted) {
    for (flags, wanted) in [
        (&[][..], "--sandboxes keep|delete"),
        (&["--sandboxes", "delete", "--yes"][..], "--data keep|delete and --bridge keep|delete"),
        (&["--sandboxes", "keep", "--data", "delete", "--yes"][..], "--data keep"),
        (&["--sandboxes", "keep"][..], "--yes"),
    ] {
        let (code, told) = node.run(&[&[AGENT, "uninstall"][..], flags].concat());
        assert!(code == Some(1) && told.contains(wanted), "{flags:?}: {told}");
    }
    assert_eq!(node.unit(AGENT, "ActiveState"), "active", "nothing was done");
}

fn kept_sandbox_is_taken_in_again(node: &Booted, id: &str) {
    let vmid = marked(node);
    let told = node.ok(&[AGENT, "uninstall", "--sandboxes", "keep", "--yes"]);
    assert!(told.contains(id) && told.contains("keep 1 sandboxes"), "{told}");
    assert_eq!(node.unit(AGENT, "ActiveState"), "inactive");
    caddy_is_masked(node, false);
    // As a node has it whose package is purged without `uninstall`.
    node.ok(&["sh", "-c", &format!("touch {MASKED} && systemctl mask --quiet {CADDY}")]);
    let runs = || node.ok(&["pct", "status", &vmid]).contains("running");
    assert!(runs(), "it runs on");
    // Not even a purge that is told to takes the journal from under it.
    let answer =
        format!("echo '{AGENT} {AGENT}/remove-data boolean true' | debconf-set-selections");
    node.ok(&["sh", "-c", &answer]);
    let told = node.ok(&["dpkg", "--purge", AGENT]);
    assert!(told.contains(&vmid) && node.path("/var/lib/pve-sandbox-agent").is_dir(), "{told}");
    assert!(runs(), "it runs on");
    caddy_is_masked(node, false);

    let package = format!("/root/{AGENT}.deb");
    node.ok(&["apt-get", "install", "--yes", "--no-install-recommends", &package]);
    let line = join_line(&node.ok(&[CLI, "node", "token", "pve1"]));
    node.ok(&["sh", "-c", &format!("{line} --no-template")]);
    until_exec(node, id);
}
