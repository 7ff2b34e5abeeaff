//! From a bare node to a sandbox by the packages alone, upgrades and downgrades, those of the agent under load, and the
//! end of it all, in Debian 12 and 13 with their own systemd.
//!
//! The machine's cgroup controllers may be on v1; then the roots have none, and limits of sandboxes
//! are not seen here but on the lab.

use std::fs;

use super::{
    booted::Booted,
    capabilities, https, removal,
    root::{Base, said},
    steps::{
        AGENT, CLI, CONTROLLER, INGRESS, agent_is_replaced_under_load,
        controller_and_cli_are_replaced, created, install, join, make_a_template,
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
    super::tunnel::connector_runs_under_systemd(&node);
    make_a_template(&node);

    // No image, no name: the only snapshot is taken.
    let id = created(&node.ok(&[CLI, "create"]));
    let inside = node.ok(&[CLI, "exec", &id, "--", "sh", "-c", "cat /proc/1/comm; hostname"]);
    assert!(inside.contains("systemd") && inside.contains(&id), "{inside}");
    starts_nothing_with_its_own_limits(&node);
    let ids = [id];
    let outcome = agent_is_replaced_under_load(&node, &ids, streams::wanted());
    println!("{outcome:?}");
    assert_eq!((outcome.lost, outcome.doubled), (0, 0), "{outcome:?}");
    let [id] = ids;
    controller_and_cli_are_replaced(&node, &id);

    https::own_certificate_is_served_and_replaced(&node, &id);
    capabilities::each_is_missed(&node);
    capabilities::each_of_the_name_server_is_missed(&node);
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
    assert_eq!(node.unit(CONTROLLER, "UnitFileState"), "enabled");
    assert!(node.ok(&setup).contains("nothing to do"), "a second run has nothing to do");
    node.ok(&["systemd-analyze", "security", "--no-pager", EXPOSURE, CONTROLLER]);

    // apt brings it, unless an operator asks for it by name.
    node.ok(&["apt-mark", "auto", "caddy"]);
    let (line, took) = join(node);
    removal::caddy_is_masked(node, true);
    println!("joined and ready in {took:?}");
    for unit in [AGENT, INGRESS, "pve-sandbox-dns"] {
        assert_eq!(node.unit(unit, "ActiveState"), "active", "{unit}");
        assert_eq!(node.unit(unit, "UnitFileState"), "enabled", "{unit}");
    }
    let bridge = node.ok(&["ip", "-brief", "address", "show", "vmbr1"]);
    assert!(bridge.contains("10.100.1.1/24"), "{bridge}");
    let again = format!("{line} --no-template");
    let told = node.ok(&["sh", "-c", &again]);
    assert!(
        told.contains("already with this token"),
        "it goes on where it was interrupted: {told}"
    );
    let (code, told) = node.run(&["sh", "-c", &format!("{again} --pool 10.100.1.0/24")]);
    assert!(code != Some(0) && told.contains("it is used"), "the token is good once: {told}");
}

/// Process of the node: its cgroup in v2, and its score for the OOM killer.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    cgroup: String,
    score: i32,
}

impl Process {
    /// Parses what `cat /proc/PID/cgroup /proc/PID/oom_score_adj` prints.
    #[track_caller]
    fn of(told: &str) -> Self {
        let cgroup = told.lines().find_map(|line| line.strip_prefix("0::")).expect(told);
        let score = told.lines().last().and_then(|line| line.trim().parse().ok()).expect(told);
        Self { cgroup: cgroup.to_owned(), score }
    }
}

/// Returns true when this machine's root may have the OOM killer spare a process.
fn may_spare() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let caps = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect(&status);
    let caps = u64::from_str_radix(caps.trim(), 16).expect(caps);
    caps & (1 << 24) != 0
}

/// Checks that a shim and a `pct` that runs are outside the agent's cgroup, so that they do not count for its
/// limit of memory, and are not spared when memory runs out; the agent is.
fn starts_nothing_with_its_own_limits(node: &Booted) {
    let look = |pid: &str| {
        let files = ["cgroup", "oom_score_adj"].map(|file| format!("/proc/{pid}/{file}"));
        Process::of(&node.ok(&["cat", &files[0], &files[1]]))
    };
    let agent = look(&node.unit(AGENT, "MainPID"));
    assert!(agent.cgroup.ends_with("/pve-sandbox-agent.service"), "{agent:?}");
    assert_eq!(node.unit(AGENT, "CPUWeight"), "1000");
    assert_eq!(node.unit(AGENT, "OOMScoreAdjust"), "-500");
    if may_spare() {
        assert_eq!(agent.score, -500);
    } else {
        eprintln!(
            "NOT TESTED: no process of this machine is spared by the OOM killer (CAP_SYS_RESOURCE)"
        );
    }
    assert_eq!(node.unit(AGENT, "MemoryMax"), (1_u64 << 30).to_string());

    let shims = node.ok(&["pgrep", "-f", "^/proc/self/exe shim "]);
    let shims: Vec<_> = shims.split_whitespace().map(look).collect();
    // The first that is seen while a sandbox is made, stopped so that it does not end meanwhile.
    let seen = "while :; do for pid in $(pgrep -x pct); do kill -STOP $pid 2>&- || continue; \
                cat /proc/$pid/cgroup /proc/$pid/oom_score_adj; kill -CONT $pid; exit; done; done";
    let looking = node.command(&["timeout", "60", "sh", "-c", seen]).spawn().expect("nsenter");
    let other = created(&node.ok(&[CLI, "create"]));
    let (code, told) = said(&looking.wait_with_output().expect("it ends"));
    assert_eq!(code, Some(0), "no pct was seen: {told}");
    node.ok(&[CLI, "rm", &other]);
    assert!(!shims.is_empty());
    for process in shims.iter().chain([&Process::of(&told)]) {
        let Process { cgroup, score } = process;
        assert!(!cgroup.contains(AGENT) && *score == 0, "{process:?}");
    }
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
