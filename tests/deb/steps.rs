//! Steps on a booted node that the tests and the bench take: from the packages to a sandbox, and the
//! replacement of the agent while work goes on.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use lab::{image::MINIMAL, layout::Layout, template};

use super::{
    booted::Booted,
    root::{said, target},
    streams::{self, Outcome},
};

pub(crate) const AGENT: &str = "pve-sandbox-agent";
pub(crate) const CONTROLLER: &str = "pve-sandbox-controller";
pub(crate) const INGRESS: &str = "pve-sandbox-ingress";
/// Unit of the Caddy that takes over from the other, and the other way round.
pub(crate) const INGRESS_GREEN: &str = "pve-sandbox-ingress-green";
pub(crate) const CLI: &str = "sandboxctl";
/// Looks, a tenth of a second apart at least, until something is up.
pub(crate) const UNTIL: u32 = 600;

/// Installs the packages, which starts nothing.
pub(crate) fn install(node: &Booted) {
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

/// Joins the node by the line that `sandboxctl node token` prints; returns that line, and the time until
/// the controller says that the node is ready.
pub(crate) fn join(node: &Booted) -> (String, Duration) {
    let line = node.ok(&[CLI, "node", "token", "pve1"]);
    let line = line.lines().find(|line| line.starts_with(AGENT)).expect("a line to run").to_owned();
    let begun = Instant::now();
    node.ok(&["sh", "-c", &format!("{line} --no-template")]);
    let nodes = || node.ok(&[CLI, "node", "ls", "--json"]).replace(": ", ":");
    let ready = || nodes().contains("\"ready\":true");
    assert!((0..UNTIL).any(|_| ready() || wait()), "{}", nodes());
    (line, begun.elapsed())
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

/// Finds the sandbox in what `sandboxctl create` prints.
pub(crate) fn created(told: &str) -> String {
    told.lines().find(|line| line.starts_with("pvelxc-")).expect("an id").to_owned()
}

/// Follows the commands of docs/install.md from the packages to the first sandbox; returns the sandbox.
pub(crate) fn first_sandbox(node: &Booted, commands: &[String]) -> String {
    for name in [AGENT, CONTROLLER, CLI] {
        let package = node.package(name);
        node.ok(&["cp", &package, &format!("/root/{name}_1_amd64.deb")]);
    }
    let names = "echo '192.0.2.11 controller.example.org' >>/etc/hosts";
    node.ok(&["sh", "-c", names]);
    let (create, before) = commands.split_last().expect("commands");
    let told: String = before.iter().map(|command| run(node, command)).collect();
    assert!(told.contains("done: join the agent of pve1"), "{told}");
    // Without a network no template is built; this one is from an archive.
    make_a_template(node);
    let id = created(&run(node, create));
    until_exec(node, &id);
    id
}

/// Runs a command of the docs, which must succeed; also the line that it prints to be run on a node.
#[track_caller]
pub(crate) fn run(node: &Booted, command: &str) -> String {
    eprintln!("# {command}");
    let (code, text) = node.run(&["sh", "-c", &format!("cd /root && {command}")]);
    // Findings are no failure of the docs: this node has no name servers and no network, and on some
    // machines no controllers of cgroups.
    let has_findings =
        code == Some(1) && (command.contains(" doctor") || command.ends_with(" fsck"));
    assert!(code == Some(0) || has_findings, "`{command}` of the docs: {code:?}: {text}");
    assert!(!text.contains("panicked"), "{command}: {text}");
    if command.contains(" node token ") {
        let line = text.lines().find(|line| line.starts_with(AGENT)).expect("a line to run");
        node.ok(&["sh", "-c", line]);
    }
    text
}

/// Waits until a command succeeds in the sandbox.
#[track_caller]
pub(crate) fn until_exec(node: &Booted, id: &str) {
    let mut last = String::new();
    let mut works = || {
        let (code, text) = node.run(&[CLI, "exec", id, "--", "hostname"]);
        last = text;
        code == Some(0) && last.contains(id)
    };
    assert!((0..UNTIL).any(|_| works() || wait()), "no command runs in {id}: {last}");
}

/// Waits a little; false, for use in a loop.
pub(crate) fn wait() -> bool {
    thread::sleep(Duration::from_millis(100));
    false
}

/// Installs the next version of the agent from a repository, and then this one again, while commands write
/// and WebSockets are open: so many of each, spread over the sandboxes.
pub(crate) fn agent_is_replaced_under_load(node: &Booted, ids: &[String], count: usize) -> Outcome {
    let version = node.ok(&["dpkg-query", "--show", "--showformat", "${Version}", AGENT]);
    let next = offer_next_version(node, &version);
    let (agent, caddy) = (node.unit(AGENT, "MainPID"), node.unit(INGRESS, "MainPID"));
    let outcome = streams::run_through(node, ids, count, || {
        for version in [&next, &version] {
            let wanted = format!("{AGENT}={version}");
            apt(node, &["install", "--yes", "--allow-downgrades", &wanted]);
            assert_eq!(node.unit(AGENT, "ActiveState"), "active");
        }
    });
    assert_ne!(node.unit(AGENT, "MainPID"), agent, "the agent was restarted");
    assert_eq!(node.unit(INGRESS, "MainPID"), caddy, "Caddy was not");
    outcome
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
