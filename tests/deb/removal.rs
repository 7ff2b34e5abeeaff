//! `pve-sandbox-agent uninstall` on a node with a sandbox: what is kept lives on and is taken in again, what
//! is deleted leaves nothing. And the purge without it, while everything runs.

use std::{collections::BTreeSet, fs};

use super::{
    booted::Booted,
    steps::{AGENT, CLI, CONTROLLER, INGRESS, INGRESS_GREEN, join_line, until, until_exec},
};

/// Units of the package that run on a node.
const UNITS: [&str; 4] = [AGENT, INGRESS, INGRESS_GREEN, "pve-sandbox-dns"];
/// Names of their processes, of which the kernel keeps 15 characters.
const PROGRAMS: [&str; 3] = ["pve-sandbox-age", "caddy", "dnsmasq"];

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
    purge_ends_all_that_runs_but_the_sandbox(node, id);

    let all = ["--sandboxes", "delete", "--data", "delete", "--bridge", "delete", "--yes"];
    let told = node.ok(&[&[AGENT, "uninstall"][..], &all].concat());
    assert!(told.contains(&format!("deleted {id}")), "{told}");
    assert_eq!(marked(node), "", "no container is left");
    caddy_is_masked(node, false);
    for gone in [
        "/var/lib/pve-sandbox-agent",
        "/var/lib/pve-sandbox-ingress",
        "/var/log/pve-sandbox-ingress",
        "/etc/pve-sandbox/tls/node.key",
    ] {
        assert!(!node.path(gone).exists(), "{gone}");
    }
    // Again, now that the bridge and the journal are gone, as after an interruption.
    let again = node.ok(&[&[AGENT, "uninstall"][..], &all].concat());
    assert!(again.contains("now: apt purge"), "{again}");
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
    assert!(told.contains("now: apt remove") && !told.contains("forget"), "{told}");
    assert_eq!(node.unit(AGENT, "ActiveState"), "inactive");
    caddy_is_masked(node, false);
    let runs = || node.ok(&["pct", "status", &vmid]).contains("running");
    assert!(runs(), "it runs on");
    node.ok(&["apt-get", "remove", "--yes", AGENT]);
    // Not even a purge that is told to takes the journal from under it, nor what says where that is.
    let config = || fs::read_to_string(node.path("/etc/pve-sandbox/agent.toml")).expect("there");
    let before = config();
    let answer =
        format!("echo '{AGENT} {AGENT}/remove-data boolean true' | debconf-set-selections");
    node.ok(&["sh", "-c", &answer]);
    let told = node.ok(&["dpkg", "--purge", AGENT]);
    assert!(told.contains(&vmid) && node.path("/var/lib/pve-sandbox-agent").is_dir(), "{told}");
    assert!(runs(), "it runs on");
    caddy_is_masked(node, false);

    install_again(node);
    assert_eq!(config(), before);
    node.ok(&[AGENT, "setup"]);
    until_exec(node, id);
}

fn install_again(node: &Booted) {
    let package = format!("/root/{AGENT}.deb");
    node.ok(&["apt-get", "install", "--yes", "--no-install-recommends", &package]);
}

/// Installs the agent again, and joins with what a purge has left, until the sandbox can be used.
fn install_and_join(node: &Booted, id: &str) {
    install_again(node);
    let line = join_line(&node.ok(&[CLI, "node", "token", "pve1"]));
    node.ok(&["sh", "-c", &format!("{line} --no-template")]);
    until_exec(node, id);
}

/// Purges the package without `uninstall` while everything runs: agent, Caddy and name server end. The sandbox runs on,
/// and is taken in again.
fn purge_ends_all_that_runs_but_the_sandbox(node: &Booted, id: &str) {
    caddy_is_masked(node, true);
    let all_run = || PROGRAMS.iter().all(|name| sockets(node).iter().any(|(of, _)| of == name));
    until("agent, Caddy and name server", || format!("{:?}", sockets(node)), all_run);
    let ours = sockets(node).into_iter().filter(|(name, _)| PROGRAMS.contains(&name.as_str()));
    let ours: BTreeSet<_> = ours.map(|(_, address)| address).collect();
    let vmid = marked(node);

    let told = node.ok(&["apt-get", "purge", "--yes", AGENT]);
    assert!(told.contains(&vmid), "it says why it keeps the journal: {told}");
    caddy_is_masked(node, false);
    let taken = sockets(node).into_iter().map(|(_, address)| address);
    let taken: Vec<_> = taken.filter(|address| ours.contains(address)).collect();
    assert!(taken.is_empty(), "still in use: {taken:?}");
    let processes = node.ok(&["ps", "-eo", "user:32,args"]);
    let left: Vec<_> = processes.lines().filter(|line| is_of_the_package(line)).collect();
    assert!(left.is_empty(), "these run on: {left:?}");
    for unit in UNITS {
        assert_eq!(node.unit(unit, "ActiveState"), "inactive", "{unit}");
    }
    let dirs = ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system"];
    let files =
        node.ok(&[&["find"], &dirs[..], &["!", "-type", "d", "-name", "pve-sandbox-*"]].concat());
    let files: Vec<_> = files.lines().filter(|path| !path.contains(CONTROLLER)).collect();
    assert!(files.is_empty(), "files of units are left: {files:?}");

    assert!(node.ok(&["pct", "status", &vmid]).contains("running"), "the sandbox runs on");
    assert!(node.path("/var/lib/pve-sandbox-agent").is_dir(), "and has its journal");
    install_and_join(node, id);
}

/// Returns the sockets that listen on the node, each as the program's name, cut off by the kernel, and the address.
#[track_caller]
fn sockets(node: &Booted) -> Vec<(String, String)> {
    let told = node.ok(&["ss", "-Hlntup"]);
    // udp UNCONN 0 0 10.100.1.1:53 0.0.0.0:* users:(("dnsmasq",pid=7,fd=4))
    let socket = |line: &str| {
        let address = line.split_whitespace().nth(4)?;
        let name = line.split('"').nth(1).unwrap_or_default();
        Some((name.to_owned(), address.to_owned()))
    };
    told.lines().filter_map(socket).collect()
}

/// Returns true for a process that the package's units start. Shims are none: they serve the commands in sandboxes, and
/// run on like these.
fn is_of_the_package(line: &str) -> bool {
    let is_ingress = line.starts_with("pve-sandbox-ingress ");
    let is_agent = line.contains("/usr/sbin/pve-sandbox-agent ");
    let is_configured = line.contains("/etc/pve-sandbox/") && !line.contains(CONTROLLER);
    is_ingress || is_agent || is_configured
}
