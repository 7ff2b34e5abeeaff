//! Steps on a booted node that the tests and the bench take: from the packages to a sandbox, and the
//! replacement of the agent while work goes on.

use std::{
    cell::RefCell,
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use lab::{
    image::{Image, MINIMAL, TOOLS},
    layout::Layout,
    template,
};
use serde_json::Value;

use super::{
    booted::Booted,
    ctl, repository,
    root::{said, target},
    streams::{self, Outcome},
};

pub(crate) const AGENT: &str = "pve-sandbox-agent";
pub(crate) const CONTROLLER: &str = "pve-sandbox-controller";
pub(crate) const INGRESS: &str = "pve-sandbox-ingress";
/// Unit of the Caddy that takes over from the other, and the other way round.
pub(crate) const INGRESS_GREEN: &str = "pve-sandbox-ingress-green";
pub(crate) const CLI: &str = "sandboxctl";
/// All packages, in the order of their upgrade.
const PACKAGES: [&str; 3] = [CONTROLLER, AGENT, CLI];
/// Variable with the path of the agent's program of the next version, for the tests of upgrades.
const NEXT_AGENT: &str = "PVE_SANDBOX_NEXT_AGENT";
/// Archive of a template on a node, where PVE keeps those that it has loaded.
const ARCHIVE: &str = "/var/lib/vz/template/cache/debian.tar";
/// Findings of `fsck` that this node has and one of PVE has not: the invariant, and words of the sentence.
const FINDINGS_OF_THIS_NODE: [(&str, &str); 1] = [
    // The machine's controllers of cgroups may be on v1 or missing, and its kernel may not count connections.
    ("UNCHECKED", "are not limited"),
];
/// Check of `sandboxctl doctor` that only counts what `fsck` finds, which is asked instead.
const COUNT_OF_FSCK: &str = "fsck";
/// Longest wait for anything that has no limit of its own.
const PATIENCE: Duration = Duration::from_secs(120);

/// Installs the packages, which starts nothing.
pub(crate) fn install(node: &Booted) {
    install_packages(node, &PACKAGES);
    // What is not configured yet does not start by itself, now or at a boot; the ingress waits for its configuration.
    for (unit, state) in [(AGENT, "disabled"), (CONTROLLER, "disabled"), (INGRESS, "enabled")] {
        assert_eq!(node.unit(unit, "ActiveState"), "inactive", "{unit}");
        assert_eq!(node.unit(unit, "UnitFileState"), state, "{unit}");
    }
    for name in PACKAGES {
        let says = format!("{name} {}", upstream(&installed(node, name)));
        assert_eq!(node.ok(&[name, "--version"]).trim(), says);
    }
}

/// Installs the package of the agent alone.
pub(crate) fn install_agent(node: &Booted) {
    install_packages(node, &[AGENT]);
}

fn install_packages(node: &Booted, names: &[&str]) {
    let packages: Vec<_> = names.iter().map(|name| node.package(name)).collect();
    let mut argv = vec!["apt-get", "install", "--yes", "--no-install-recommends"];
    argv.extend(packages.iter().map(String::as_str));
    node.ok(&argv);
}

/// Joins the node by the line that `sandboxctl node token` prints; returns that line, and the time until
/// the controller says that the node is ready.
pub(crate) fn join(node: &Booted) -> (String, Duration) {
    let line = join_line(&node.ok(&[CLI, "node", "token", "pve1"]));
    let begun = Instant::now();
    node.ok(&["sh", "-c", &format!("{line} --no-template")]);
    let nodes = || node.ok(&[CLI, "node", "ls"]);
    until("a ready node", nodes, || !ctl::ready_nodes(node).is_empty());
    (line, begun.elapsed())
}

/// Finds the line that joins a node in what `sandboxctl node token` prints.
#[track_caller]
pub(crate) fn join_line(told: &str) -> String {
    let start = format!("{AGENT} join ");
    told.lines().find(|line| line.contains(&start)).expect("a line to run").to_owned()
}

/// Makes a template on the node of the controller, and waits until it is offered.
pub(crate) fn make_a_template(node: &Booted) {
    template_from_archive(node);
    let offered = || node.ok(&[CLI, "snapshot", "ls"]).contains("debian");
    until("an offered template", || node.ok(&[CLI, "node", "ls"]), offered);
}

/// Makes a template from an archive, and restarts the agent, which offers it then.
pub(crate) fn template_from_archive(node: &Booted) {
    put_archive(node, &MINIMAL);
    let init = [AGENT, "template", "init", "--snapshot", "debian", "--archive", ARCHIVE];
    node.ok(&init);
    node.ok(&["systemctl", "restart", AGENT]);
}

/// Copies a template of the lab to `ARCHIVE`.
fn put_archive(node: &Booted, image: &Image) {
    let layout = Layout::new(&target().join("lab"));
    for dir in [layout.cache(), layout.logs()] {
        fs::create_dir_all(dir).expect("a folder");
    }
    template::ensure_all(&layout).expect("the lab's templates");
    let at = node.path(ARCHIVE);
    fs::create_dir_all(at.parent().expect("a folder")).expect("made");
    fs::copy(layout.template_tar(image), at).expect("copied");
}

/// Gives the node a stand-in for mmdebstrap, which needs a mirror of Debian: its archive is one of the lab's, with what
/// setup looks for in a template of its own.
fn put_mmdebstrap(node: &Booted) {
    put_archive(node, &TOOLS);
    // Its last words are the release, the archive and the mirror.
    let script =
        format!("#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\nexec cp {ARCHIVE} \"$1\"\n");
    let at = node.path("/usr/bin/mmdebstrap");
    fs::write(&at, script).expect("written");
    fs::set_permissions(&at, Permissions::from_mode(0o755)).expect("executable");
}

/// Finds the sandbox in what `sandboxctl create` prints.
pub(crate) fn created(told: &str) -> String {
    told.lines().find(|line| line.starts_with("pvelxc-")).expect("an id").to_owned()
}

/// Follows the commands of docs/install.md from the packages to the first sandbox, and no others; returns the sandbox,
/// and the number of commands until it could be used.
pub(crate) fn first_sandbox(node: &Booted, commands: &[String]) -> (String, usize) {
    for name in PACKAGES {
        let package = node.package(name);
        node.ok(&["cp", &package, &in_the_docs(name)]);
    }
    let names = "echo '192.0.2.11 controller.example.org' >>/etc/hosts";
    node.ok(&["sh", "-c", names]);
    put_mmdebstrap(node);

    let mut count = 0;
    let mut follow = |command: &String| {
        count += 1;
        run(node, command)
    };
    let (create, before) = commands.split_last().expect("commands");
    let told: String = before.iter().map(&mut follow).collect();
    assert!(told.contains("pve1 joined") && told.contains("is ready"), "{told}");
    // From then on `create` works, says the page.
    let nodes = || node.ok(&[CLI, "node", "ls"]);
    until("a ready node", nodes, || !ctl::ready_nodes(node).is_empty());
    let id = created(&follow(create));
    until_exec(node, &id);
    (id, count)
}

/// Runs a command of the docs, which must succeed; also the line that it prints to be run on a node.
#[track_caller]
pub(crate) fn run(node: &Booted, command: &str) -> String {
    eprintln!("# {command}");
    let (code, text) = node.run(&["sh", "-c", &format!("cd /root && {command}")]);
    if code == Some(1) && (command.ends_with(" doctor") || command.ends_with(" fsck")) {
        until_nothing_else_is_found(node, command);
    } else {
        assert_eq!(code, Some(0), "`{command}` of the docs: {text}");
    }
    assert!(!text.contains("panicked"), "{command}: {text}");
    if command.starts_with(&format!("{CLI} node token ")) {
        node.ok(&["sh", "-c", &join_line(&text)]);
    }
    text
}

/// Waits until a `doctor` or `fsck` finds nothing but `FINDINGS_OF_THIS_NODE`. What a command before it has restarted may
/// need some seconds.
#[track_caller]
fn until_nothing_else_is_found(node: &Booted, command: &str) {
    let asked = [command, "sandboxctl admin fsck"];
    let asked = if command == "sandboxctl doctor" { &asked[..] } else { &asked[..1] };
    let last = RefCell::new(Vec::new());
    let is_fine = || {
        let found: Vec<_> = asked.iter().flat_map(|command| unexpected_of(node, command)).collect();
        let is_fine = found.is_empty();
        last.replace(found);
        is_fine
    };
    let told = || last.borrow().join("\n");
    until(&format!("`{command}` of the docs to find nothing else"), told, is_fine);
}

/// Runs a `doctor` or `fsck`; returns what is unexpected in its report.
fn unexpected_of(node: &Booted, command: &str) -> Vec<String> {
    let argv: Vec<_> = command.split_whitespace().chain(["--json"]).collect();
    let output = node.command(&argv).output().expect("nsenter");
    match serde_json::from_slice(&output.stdout) {
        Ok(report) => unexpected(&report),
        Err(error) => vec![format!("{command}: {error}: {}", said(&output).1)],
    }
}

/// Lists what has failed in the report of a `doctor`, or was found by `fsck`, beside `FINDINGS_OF_THIS_NODE`. Pure.
fn unexpected(report: &Value) -> Vec<String> {
    let all = |key: &str| report[key].as_array().into_iter().flatten();
    let word = |of: &Value, key: &str| of[key].as_str().unwrap_or_default().to_owned();
    let failed = all("checks").filter(|check| check["state"] == "failed");
    let failed = failed.map(|check| (word(check, "name"), word(check, "found")));
    let failed = failed.filter(|(name, _)| name != COUNT_OF_FSCK);
    let findings = all("findings").map(|one| (word(one, "invariant"), word(one, "detail")));
    let is_known = |(name, text): &(String, String)| {
        FINDINGS_OF_THIS_NODE.iter().any(|(known, words)| name == known && text.contains(*words))
    };
    let unexpected = failed.chain(findings).filter(|one| !is_known(one));
    let mut unexpected: Vec<_> = unexpected.map(|(name, text)| format!("{name}: {text}")).collect();
    if !report["checks"].is_array() && !report["findings"].is_array() {
        unexpected.push(format!("no report: {report}"));
    }
    unexpected
}

#[test]
fn failed_check_and_finding_that_no_node_of_the_tests_explains_are_unexpected() {
    use serde_json::json;

    let check = |name: &str, state: &str| json!({"name": name, "state": state, "found": "why"});
    let checks = [check("quorum", "ok"), check("clock", "warning"), check("fsck", "failed")];
    assert_eq!(unexpected(&json!({"checks": checks})), [""; 0]);
    let checks = [check("fsck", "failed"), check("agent", "failed")];
    assert_eq!(unexpected(&json!({"checks": checks})), ["agent: why"]);

    let finding = |invariant: &str, detail: &str| json!({"invariant": invariant, "detail": detail});
    let io =
        "the kernel has no cgroup controller `io`: reads and writes of sandboxes are not limited";
    let away = "its agent did not check it";
    let findings = [finding("UNCHECKED", io), finding("UNCHECKED", away), finding("I1", "a leak")];
    let expected = ["UNCHECKED: its agent did not check it", "I1: a leak"];
    assert_eq!(unexpected(&json!({"findings": findings})), expected);
    assert_eq!(unexpected(&json!({"findings": []})), [""; 0]);
    assert_eq!(unexpected(&json!({"error": "down"})).len(), 1);
}

/// Waits until a command succeeds in the sandbox.
#[track_caller]
pub(crate) fn until_exec(node: &Booted, id: &str) {
    let last = RefCell::new(String::new());
    let works = || {
        let (code, text) = node.run(&[CLI, "exec", id, "--", "hostname"]);
        let works = code == Some(0) && text.contains(id);
        *last.borrow_mut() = text;
        works
    };
    until(&format!("a command in {id}"), || last.take(), works);
}

/// Waits until `is_so` returns true. At the deadline the test fails with the name of what it waited for, and with what
/// `last` returns.
#[track_caller]
pub(crate) fn until(what: &str, last: impl FnOnce() -> String, is_so: impl FnMut() -> bool) {
    until_within(PATIENCE, what, last, is_so);
}

/// Does the same with another deadline.
#[track_caller]
pub(crate) fn until_within(
    limit: Duration,
    what: &str,
    last: impl FnOnce() -> String,
    mut is_so: impl FnMut() -> bool,
) {
    let deadline = Instant::now() + limit;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {limit:?} for {what}: {}", last());
        thread::sleep(Duration::from_millis(100));
    }
}

/// Installs the next version of the agent from a repository, and then this one again, while commands write
/// and WebSockets are open: so many of each, spread over the sandboxes.
pub(crate) fn agent_is_replaced_under_load(node: &Booted, ids: &[String], count: usize) -> Outcome {
    let version = installed(node, AGENT);
    let next = offer_next_version(node);
    let (agent, caddy) = (node.unit(AGENT, "MainPID"), node.unit(INGRESS, "MainPID"));
    let has_next = next_agent(&next).is_some();
    assert_eq!(has_next, env::var_os(NEXT_AGENT).is_some(), "{NEXT_AGENT} is of {next}");
    if !has_next {
        eprintln!("NOT TESTED: two programs; without {NEXT_AGENT} both versions have the same one");
    }
    let outcome = streams::run_through(node, ids, count, || {
        for version in [&next, &version] {
            let wanted = format!("{AGENT}={version}");
            apt(node, &["install", "--yes", "--allow-downgrades", &wanted]);
            assert_eq!(node.unit(AGENT, "ActiveState"), "active");
            assert_eq!(node.unit(AGENT, "UnitFileState"), "enabled", "as `join` has left it");
            if has_next {
                program_has_the_version_of_its_package(node, version);
            }
        }
    });
    assert_ne!(node.unit(AGENT, "MainPID"), agent, "the agent was restarted");
    assert_eq!(node.unit(INGRESS, "MainPID"), caddy, "Caddy was not");
    outcome
}

/// Installs the next version of controller and `sandboxctl` from the repository that is there, and then this one again:
/// the sandbox stays within reach.
pub(crate) fn controller_and_cli_are_replaced(node: &Booted, id: &str) {
    let version = installed(node, CONTROLLER);
    for wanted in [next_version(&version), version] {
        let before = node.unit(CONTROLLER, "MainPID");
        let packages = [CONTROLLER, CLI].map(|name| format!("{name}={wanted}"));
        let install = ["install", "--yes", "--allow-downgrades", &packages[0], &packages[1]];
        apt(node, &install);
        for name in [CONTROLLER, CLI] {
            assert_eq!(installed(node, name), wanted, "{name}");
        }
        assert_eq!(node.unit(CONTROLLER, "ActiveState"), "active");
        assert_eq!(node.unit(CONTROLLER, "UnitFileState"), "enabled", "as `setup` has left it");
        assert_ne!(node.unit(CONTROLLER, "MainPID"), before, "it was restarted");
        until_exec(node, id);
    }
}

/// Returns the version of a package that is installed.
pub(crate) fn installed(node: &Booted, name: &str) -> String {
    node.ok(&["dpkg-query", "--show", "--showformat", "${Version}", name])
}

/// Version of a package's program: what is before the revision.
pub(crate) fn upstream(version: &str) -> &str {
    version.rsplit_once('-').expect("a revision").0
}

/// Returns the version that comes after that of a package.
pub(crate) fn next_version(version: &str) -> String {
    let (upstream, revision) = version.rsplit_once('-').expect("a revision");
    format!("{upstream}.1-{revision}")
}

/// Returns the agent's program for this version of the package, if the environment names it.
fn next_agent(version: &str) -> Option<PathBuf> {
    let program = PathBuf::from(env::var_os(NEXT_AGENT)?);
    let told = done(Command::new(&program).arg("--version"));
    (told.trim() == format!("{AGENT} {}", upstream(version))).then_some(program)
}

/// Checks that the agent's program says the version of its package, and tells it to the controller.
#[track_caller]
fn program_has_the_version_of_its_package(node: &Booted, version: &str) {
    let wanted = upstream(version);
    assert_eq!(node.ok(&[AGENT, "--version"]).trim(), format!("{AGENT} {wanted}"));
    let nodes = || node.ok(&[CLI, "node", "ls", "-o", "wide"]);
    let is_told = || ctl::ready_nodes(node).iter().any(|node| node["version"] == wanted);
    until(&format!("a node of version {wanted}"), nodes, is_told);
}

/// Runs apt with our repository alone: the root has no network.
fn apt(node: &Booted, words: &[&str]) -> String {
    let list = "Dir::Etc::SourceList=/etc/apt/pve-sandbox.list";
    node.ok(&[&["apt-get", "-o", list, "-o", "Dir::Etc::SourceParts=-"], words].concat())
}

/// Path of a package as docs/operations.md has it.
fn in_the_docs(name: &str) -> String {
    format!("/root/{name}_1_amd64.deb")
}

/// Runs a program of this machine, which must succeed; returns its output.
#[track_caller]
fn done(command: &mut Command) -> String {
    let (code, text) = said(&command.output().expect("started"));
    assert_eq!(code, Some(0), "{text}");
    text
}

/// Builds the next version of a package: with the agent's next program if the environment names it, and another text of
/// the configuration that it ships. Puts it into a folder; returns its path and both versions.
pub(crate) fn next_package(deb: &Path, name: &str, into: &Path) -> (PathBuf, String, String) {
    let version = done(Command::new("dpkg-deb").arg("--field").arg(deb).arg("Version"));
    let version = version.trim().to_owned();
    let next = next_version(&version);
    let work = tempfile::tempdir().expect("a folder");
    let unpacked = work.path().join("unpacked");
    done(Command::new("dpkg-deb").arg("-R").arg(deb).arg(&unpacked));
    let control = unpacked.join("DEBIAN/control");
    let text = fs::read_to_string(&control).expect("read");
    let changed = text.replace(&format!("Version: {version}\n"), &format!("Version: {next}\n"));
    assert_ne!(text, changed, "the control file has the version");
    fs::write(&control, changed).expect("written");
    if name == AGENT
        && let Some(program) = next_agent(&next)
    {
        fs::copy(program, unpacked.join("usr/sbin").join(AGENT)).expect("copied");
    }
    // Also as a conffile, if it becomes one: no upgrade may ask about it.
    let shipped = done(Command::new("find").arg(&unpacked).args(["-name", "*.toml"]));
    assert_eq!(shipped.lines().count(), usize::from(name != CLI), "{name} ships {shipped}");
    for path in shipped.lines() {
        let text = fs::read_to_string(path).expect("read");
        fs::write(path, text + "# of the next version\n").expect("written");
    }
    let built = into.join(format!("{name}_{next}_amd64.deb"));
    let flags = ["--root-owner-group", "-Zgzip", "-z1", "-b"];
    done(Command::new("dpkg-deb").args(flags).arg(&unpacked).arg(&built));
    (built, version, next)
}

/// Puts the next versions of all packages where docs/operations.md installs them from.
pub(crate) fn hand_out_next_packages(node: &Booted) {
    let work = tempfile::tempdir().expect("a folder");
    for name in PACKAGES {
        let this = node.path(&format!("/root/{name}.deb"));
        let (next, ..) = next_package(&this, name, work.path());
        for at in [this, node.path(&in_the_docs(name))] {
            fs::copy(&next, at).expect("copied");
        }
    }
}

/// Makes a signed repository with this version of all packages and the next one, from which the node installs; returns
/// the agent's next version.
pub(crate) fn offer_next_version(node: &Booted) -> String {
    let work = tempfile::tempdir().expect("a folder");
    let at = |name: &str| work.path().join(name);
    fs::create_dir(at("debs")).expect("made");
    let mut offered = String::new();
    for name in PACKAGES {
        let this = node.path(&format!("/root/{name}.deb"));
        let (_, version, next) = next_package(&this, name, &at("debs"));
        let kept = at("debs").join(format!("{name}_{version}_amd64.deb"));
        fs::copy(&this, kept).expect("copied");
        if name == AGENT {
            offered = next;
        }
    }

    let key = repository::signing_key(&at("keys"), "repo");
    let (code, text) = repository::build(&at("repo"), &at("debs"), &at("keys"), &key);
    assert_eq!(code, Some(0), "{text}");
    done(Command::new("cp").arg("-a").arg(at("repo")).arg(node.path("/srv/repo")));
    let list = "deb [signed-by=/srv/repo/pve-sandbox.gpg] file:/srv/repo stable main\n";
    fs::write(node.path("/etc/apt/pve-sandbox.list"), list).expect("written");
    apt(node, &["update"]);
    offered
}
