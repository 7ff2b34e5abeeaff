//! From a bare node to a sandbox by the packages alone, an upgrade and a downgrade under load, and the
//! end of it all, in Debian 12 and 13 with their own systemd.
//!
//! The machine's cgroup controllers may be on v1; then the roots have none, and limits of sandboxes
//! are not seen here but on the lab.

use std::{fs, process::Command, thread, time::Duration};

use lab::{image::MINIMAL, layout::Layout, template};

use crate::{
    booted::Booted,
    capabilities, removal,
    root::{Base, said, target},
    streams, wanted,
};

pub(crate) const AGENT: &str = "pve-sandbox-agent";
pub(crate) const CONTROLLER: &str = "pve-sandbox-controller";
pub(crate) const INGRESS: &str = "pve-sandbox-ingress";
pub(crate) const CLI: &str = "sandboxctl";
/// Looks, a tenth of a second apart at least, until something is up.
pub(crate) const UNTIL: u32 = 600;
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
    let created = node.ok(&[CLI, "create"]);
    let id = created.lines().find(|line| line.starts_with("pvelxc-")).expect("an id").to_owned();
    let inside = node.ok(&[CLI, "exec", &id, "--", "sh", "-c", "cat /proc/1/comm; hostname"]);
    assert!(inside.contains("systemd") && inside.contains(&id), "{inside}");
    agent_is_replaced_under_load(&node, &id);

    capabilities::each_is_missed(&node);
    removal::keeps_and_then_deletes(&node, &id);
    purge(&node);
}

fn install(node: &Booted) {
    let packages = [AGENT, CONTROLLER, CLI].map(|name| node.package(name));
    let mut argv = vec!["apt-get", "install", "--yes", "--no-install-recommends"];
    argv.extend(packages.iter().map(String::as_str));
    node.ok(&argv);
    // What is not configured yet does not start by itself, now or at a boot.
    for unit in [AGENT, CONTROLLER, INGRESS] {
        assert_eq!(node.unit(unit, "ActiveState"), "inactive", "{unit}");
        assert_eq!(node.unit(unit, "UnitFileState"), "enabled", "{unit}");
    }
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

    let line = node.ok(&[CLI, "node", "token", "pve1"]);
    let line = line.lines().find(|line| line.starts_with(AGENT)).expect("a line to run").to_owned();
    node.ok(&["sh", "-c", &format!("{line} --no-template")]);
    for unit in [AGENT, INGRESS, "pve-sandbox-dns"] {
        assert_eq!(node.unit(unit, "ActiveState"), "active", "{unit}");
    }
    let bridge = node.ok(&["ip", "-brief", "address", "show", "vmbr1"]);
    assert!(bridge.contains("10.100.1.1/24"), "{bridge}");
    let (code, told) = node.run(&["sh", "-c", &line]);
    assert!(code != Some(0) && told.contains("token"), "the line is good once: {told}");
}

pub(crate) fn make_a_template(node: &Booted) {
    let layout = Layout::new(&target().join("lab"));
    for dir in [layout.cache(), layout.logs()] {
        fs::create_dir_all(dir).expect("a folder");
    }
    template::ensure_all(&layout).expect("the lab's templates");
    let archive = "/var/lib/vz/template/cache/debian.tar";
    let at = node.path(archive);
    fs::create_dir_all(at.parent().expect("a folder")).expect("made");
    fs::copy(layout.template_tar(&MINIMAL), at).expect("copied");
    let init = [AGENT, "template", "init", "--snapshot", "debian", "--archive", archive];
    node.ok(&init);
    node.ok(&["systemctl", "restart", AGENT]);
    let offered = || node.ok(&[CLI, "snapshot", "ls"]).contains("debian");
    assert!((0..100).any(|_| offered() || wait()), "{}", node.ok(&[CLI, "node", "ls"]));
}

/// Waits a little; false, for use in a loop.
pub(crate) fn wait() -> bool {
    thread::sleep(Duration::from_millis(100));
    false
}

/// Installs the next version of the agent from a repository, and then this one again, while commands write
/// and WebSockets are open.
fn agent_is_replaced_under_load(node: &Booted, id: &str) {
    let version = node.ok(&["dpkg-query", "--show", "--showformat", "${Version}", AGENT]);
    let next = offer_next_version(node, &version);
    let (agent, caddy) = (node.unit(AGENT, "MainPID"), node.unit(INGRESS, "MainPID"));
    streams::run_through(node, id, || {
        for version in [&next, &version] {
            let wanted = format!("{AGENT}={version}");
            apt(node, &["install", "--yes", "--allow-downgrades", &wanted]);
            assert_eq!(node.unit(AGENT, "ActiveState"), "active");
        }
    });
    assert_ne!(node.unit(AGENT, "MainPID"), agent, "the agent was restarted");
    assert_eq!(node.unit(INGRESS, "MainPID"), caddy, "Caddy was not");
}

/// Runs apt with our repository alone: the root has no network.
fn apt(node: &Booted, words: &[&str]) -> String {
    let list = "Dir::Etc::SourceList=/etc/apt/pve-sandbox.list";
    node.ok(&[&["apt-get", "-o", list, "-o", "Dir::Etc::SourceParts=-"], words].concat())
}

/// Makes a signed repository with this version of the agent and a next one of the same content, from
/// which the node installs; returns the next version.
pub(crate) fn offer_next_version(node: &Booted, version: &str) -> String {
    let next = format!("{version}.1");
    let work = tempfile::tempdir().expect("a folder");
    let at = |name: &str| work.path().join(name);
    let run = |command: &mut Command| {
        let (code, text) = said(&command.env("GNUPGHOME", at("keys")).output().expect("started"));
        assert_eq!(code, Some(0), "{text}");
    };
    fs::create_dir(at("debs")).expect("made");
    let this = at("debs").join(format!("{AGENT}_{version}_amd64.deb"));
    fs::copy(node.path(&format!("/root/{AGENT}.deb")), &this).expect("copied");
    run(Command::new("dpkg-deb").arg("-R").arg(&this).arg(at("unpacked")));
    let control = at("unpacked/DEBIAN/control");
    let text = fs::read_to_string(&control).expect("read");
    let changed = text.replace(&format!("Version: {version}\n"), &format!("Version: {next}\n"));
    assert_ne!(text, changed, "the control file has the version");
    fs::write(&control, changed).expect("written");
    let that = at("debs").join(format!("{AGENT}_{next}_amd64.deb"));
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-b"]).arg(at("unpacked")).arg(that));

    let key = "repo@example.org";
    run(Command::new("mkdir").args(["-m", "700"]).arg(at("keys")));
    let make =
        ["--batch", "--passphrase", "", "--quick-gen-key", key, "default", "default", "never"];
    run(Command::new("gpg").args(make));
    let top = target().parent().expect("the checkout").to_owned();
    let mut build = Command::new(top.join("packaging/build-repo.sh"));
    run(build.env("KEY", key).env("DEBS", at("debs")).env("REPO", at("repo")));
    run(Command::new("cp").arg("-a").arg(at("repo")).arg(node.path("/srv/repo")));
    let list = "deb [signed-by=/srv/repo/pve-sandbox.gpg] file:/srv/repo stable main\n";
    fs::write(node.path("/etc/apt/pve-sandbox.list"), list).expect("written");
    apt(node, &["update"]);
    next
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
