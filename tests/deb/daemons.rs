//! The packages of the daemons: units, configurations, users, a manual start, removal.

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    root::{Root, said},
    steps::next_package,
    wanted,
};

/// Longest time until a daemon is up, or says why it cannot start.
const UP: Duration = Duration::from_secs(60);

struct Package {
    name: &'static str,
    units: &'static [&'static str],
    /// Unit that its program enables and starts, once there is a certificate.
    daemon: &'static str,
    config: &'static str,
    /// Part of the purge's message that names what is kept beside the data.
    kept: &'static str,
    user: &'static str,
}

impl Package {
    /// Returns the directory of its data, unless its configuration names another.
    fn data(&self) -> String {
        format!("/var/lib/{}", self.name)
    }
}

const AGENT: Package = Package {
    name: "pve-sandbox-agent",
    units: &["pve-sandbox-agent.service", "pve-sandbox-ingress.service"],
    daemon: "pve-sandbox-agent.service",
    config: "/etc/pve-sandbox/agent.toml",
    kept: "/etc/pve-sandbox and /var/lib/pve-sandbox-ingress are kept",
    user: "pve-sandbox-ingress",
};

const CONTROLLER: Package = Package {
    name: "pve-sandbox-controller",
    units: &["pve-sandbox-controller.service"],
    daemon: "pve-sandbox-controller.service",
    config: "/etc/pve-sandbox/controller.toml",
    kept: "/etc/pve-sandbox/controller.toml are kept",
    user: "pve-sandbox-controller",
};

/// Installs a package and checks its files.
fn install(package: &Package) -> Root {
    let root = Root::new(package.name);
    let deb = root.package(package.name);
    let told = root.ok(&["dpkg", "--install", &deb]);
    assert!(told.contains("man "), "the first installation says what to do next: {told}");
    root.ok(&["getent", "passwd", package.user]);
    for unit in package.units {
        let path = format!("/usr/lib/systemd/system/{unit}");
        let verified = root.ok(&["systemd-analyze", "verify", "--man=no", &path]);
        assert!(!verified.contains(unit), "systemd has something to say of {unit}: {verified}");
        assert_eq!(is_enabled(&root, unit), *unit != package.daemon, "{unit}");
    }
    let mode = fs::metadata(root.path(package.config)).expect("there").permissions().mode();
    assert_eq!(mode & 0o7777, 0o644);
    // An operator's changes survive the next version, which ships another text, and nobody is asked about them.
    let mine = change(&root, package);
    let work = tempfile::tempdir().expect("a folder");
    let (next, ..) = next_package(&root.path(&deb), package.name, work.path());
    root.ok(&["dpkg", "--install", &inside(&root, &next)]);
    assert_eq!(text(&root, package), mine);
    assert!(!is_enabled(&root, package.daemon), "it is still not configured");
    // So does what enabled the unit, an earlier version of the package among them.
    root.ok(&["systemctl", "enable", package.daemon]);
    root.ok(&["dpkg", "--install", &deb]);
    assert!(is_enabled(&root, package.daemon), "an upgrade leaves it enabled");
    root
}

/// Adds a line to the configuration that is in use; returns its text then.
fn change(root: &Root, package: &Package) -> String {
    let path = root.path(package.config);
    let mut file = fs::OpenOptions::new().append(true).open(path).expect("there");
    file.write_all(b"# changed by hand\n").expect("changed");
    text(root, package)
}

/// Returns the configuration that is in use.
#[track_caller]
fn text(root: &Root, package: &Package) -> String {
    fs::read_to_string(root.path(package.config)).expect("there")
}

/// Copies a package that a test has built into a root; returns its path inside.
fn inside(root: &Root, deb: &Path) -> String {
    let name = deb.file_name().expect("a file").to_string_lossy();
    let inside = format!("/tmp/{name}");
    fs::copy(deb, root.path(&inside)).expect("copied");
    inside
}

/// Returns true for a unit that a boot starts.
fn is_enabled(root: &Root, unit: &str) -> bool {
    root.has(&format!("/etc/systemd/system/multi-user.target.wants/{unit}"))
}

/// Removes a package, then purges it.
fn remove(root: &Root, package: &Package) {
    let listed = root.ok(&["dpkg", "--listfiles", package.name]);
    root.ok(&["dpkg", "--remove", package.name]);
    assert!(root.has(package.config), "a removal keeps the configuration");
    let has_data = root.has(&package.data());
    root.ok(&["dpkg", "--purge", package.name]);
    assert_eq!(root.has(package.config), has_data, "it stays with the data alone");
    let left: Vec<_> = listed.lines().filter(|path| root.path(path).is_file()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    for unit in package.units {
        assert!(!is_enabled(root, unit), "{unit}");
    }
}

/// Runs the unit's ExecStart line as its user.
fn start(root: &Root, unit: &str, notify: &str) -> Child {
    let text =
        fs::read_to_string(root.path(&format!("/usr/lib/systemd/system/{unit}"))).expect("unit");
    let setting =
        |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    let line = setting("ExecStart=").expect("it starts something");
    let user = setting("User=");
    let mut argv = Vec::new();
    if let Some(user) = &user {
        argv.extend(["runuser", "-u", user, "--"]);
    }
    argv.extend(line.split_whitespace());
    root.start(&argv, notify)
}

/// Runs a daemon that cannot serve, checks that it fails, and returns its output.
fn refuses(root: &Root, unit: &str) -> String {
    let child = start(root, unit, "/run/nobody-listens");
    let (code, text) =
        said(&child.wait_with_output().expect("it ends, or is killed at the deadline"));
    assert!(code.is_some_and(|code| code != 0 && code != 137), "{code:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[test]
fn the_controller_is_installed_started_and_removed() {
    if !wanted() {
        return;
    }
    let root = install(&CONTROLLER);
    let told = refuses(&root, "pve-sandbox-controller.service");
    assert!(told.contains("setup"), "it must say that `setup` comes first: {told}");

    let program = "/usr/sbin/pve-sandbox-controller";
    let as_user = ["runuser", "-u", CONTROLLER.user, "--", program];
    root.ok(&[&as_user[..], &["init", "--name", "controller.test"]].concat());
    let token = root.ok(&[&as_user[..], &["token", "create", "--team", "test"]].concat());
    assert!(token.trim().len() > 20, "{token}");
    root.ok(&[program, "check-config"]);

    starts_and_stops(&root, "pve-sandbox-controller.service", program);

    remove(&root, &CONTROLLER);
    assert!(root.has("/var/lib/pve-sandbox-controller"), "a purge keeps the CA");
}

/// Checks that a unit starts, and ends on SIGTERM.
#[track_caller]
fn starts_and_stops(root: &Root, unit: &str, program: &str) {
    let socket = root.path("/run/notify.sock");
    let notify = UnixDatagram::bind(&socket).expect("socket");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).expect("for all");
    notify.set_read_timeout(Some(UP)).expect("deadline");
    let child = start(root, unit, "/run/notify.sock");
    let mut message = [0; 4096];
    let ready = notify
        .recv(&mut message)
        .map(|length| String::from_utf8_lossy(&message[..length]).into_owned());
    let up = ready.as_ref().is_ok_and(|message| message.contains("READY=1"));
    // `timeout` passes the signal to nobody inside a pid namespace, so it is sent to the program.
    for pid in processes(root, program) {
        kill(pid, Signal::SIGTERM).expect("signalled");
    }
    let (code, text) = said(&child.wait_with_output().expect("it ends"));
    assert!(up, "{ready:?}: {text}");
    assert_eq!(code, Some(0), "it stops when it is told: {text}");
}

/// Returns the processes that run a program of the root.
fn processes(root: &Root, program: &str) -> Vec<Pid> {
    let exe = root.path(program);
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let same = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|runs| runs == exe);
    pids.filter(same).map(Pid::from_raw).collect()
}

#[test]
fn agent_package_is_installed_reports_what_it_lacks_and_is_removed() {
    if !wanted() {
        return;
    }
    let root = install(&AGENT);
    // There is no PVE here: the daemon must say so, and name what to do.
    let told = refuses(&root, "pve-sandbox-agent.service");
    assert!(told.contains("/etc/pve") || told.contains("node"), "{told}");
    let (code, told) = root.run(&["/usr/sbin/pve-sandbox-agent", "check-config"]);
    assert!(code.is_some_and(|code| code != 0), "{told}");
    assert!(told.contains("node"), "it names what it could not detect: {told}");
    // An agent that still runs would start a Caddy again.
    let script = root.path("/var/lib/dpkg/info/pve-sandbox-agent.prerm");
    let script = fs::read_to_string(script).expect("a script");
    let stops: Vec<_> = script.lines().filter(|line| line.contains(" stop ")).collect();
    assert!(stops.len() == 5 && stops[0].contains(" pve-sandbox-agent.service"), "{stops:?}");
    remove(&root, &AGENT);
}

#[test]
fn purge_removes_data_only_when_told_and_never_under_a_sandbox() {
    if !wanted() {
        return;
    }
    let root = Root::new("purge");
    for package in [&AGENT, &CONTROLLER] {
        let (name, data) = (package.name, package.data());
        let has = || (root.has(&data), root.has(package.config));
        // Where nobody is asked, it stays.
        let told = purge(&root, package, None);
        assert!(told.contains(&data) && told.contains(package.kept), "{told}");
        assert_eq!(has(), (true, true), "{told}");
        // An answer holds for one purge.
        let told = purge(&root, package, Some(true));
        assert!(told.contains("removed"), "{told}");
        assert_eq!(has(), (false, false), "{told}");
        purge(&root, package, None);
        assert_eq!(has(), (true, true), "the answer of {name} was forgotten");
        purge(&root, package, Some(false));
        assert_eq!(has(), (true, true), "{name}");
    }
    let key = "/etc/pve-sandbox/tls/node.key";
    assert!(root.has(key), "keys stay with the journal");
    let config = root.path("/etc/pve/lxc/101.conf");
    fs::create_dir_all(config.parent().expect("a folder")).expect("made");
    fs::write(&config, "#mine\n#pve-sandbox%3Av1 id=x vmid=101\narch: amd64\n").expect("written");
    let told = purge(&root, &AGENT, Some(true));
    assert!(told.contains("101") && root.has("/var/lib/pve-sandbox-agent"), "{told}");
    fs::write(&config, "#pve-sandbox-template%3Av1 unfinished\narch: amd64\n").expect("written");
    let told = purge(&root, &AGENT, Some(true));
    assert!(!root.has("/var/lib/pve-sandbox-agent") && !root.has(key), "{told}");
    // `uninstall --data delete` has removed the data before; the log goes with the package.
    root.ok(&["dpkg", "--install", &root.package(AGENT.name)]);
    let log = "/var/log/pve-sandbox-ingress";
    let state = "/var/lib/pve-sandbox-ingress";
    root.ok(&["mkdir", "-p", log, state]);
    root.ok(&["dpkg", "--purge", AGENT.name]);
    assert!(root.has(log), "with another state_dir nobody was asked, and the data are there");
    root.ok(&["dpkg", "--install", &root.package(AGENT.name)]);
    root.ok(&["rm", "-r", state]);
    root.ok(&["dpkg", "--purge", AGENT.name]);
    assert!(!root.has(log), "no access log is left");
}

#[test]
fn purge_keeps_data_in_a_directory_of_the_operator_and_the_configuration_that_names_it() {
    if !wanted() {
        return;
    }
    let root = Root::new("purge-elsewhere");
    let caddy = "/etc/systemd/system/caddy.service";
    root.ok(&["ln", "-s", "/dev/null", caddy]);
    for (package, key) in [(&AGENT, "state_dir"), (&CONTROLLER, "data_dir")] {
        let dir = format!("/srv/{}", package.name);
        root.ok(&["dpkg", "--install", &root.package(package.name)]);
        let config = root.path(package.config);
        fs::write(&config, format!("{key} = \"{dir}\"  # mine\n")).expect("written");
        let file = root.path(&format!("{dir}/masked-caddy"));
        fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        fs::write(&file, "").expect("written");
        let before = text(&root, package);

        let told = purge(&root, package, Some(true));
        assert!(told.contains(&dir) && told.contains(&format!("{key} names")), "{told}");
        assert!(told.contains(package.kept), "all secrets that are left are named: {told}");
        assert!(root.has(&dir), "{told}");
        assert!(!root.has(caddy), "the note that it was masked is in there, too: {told}");
        root.ok(&["dpkg", "--install", &root.package(package.name)]);
        assert_eq!(text(&root, package), before, "what is installed later finds its data");

        root.ok(&["rm", "-r", &dir]);
        let told = root.ok(&["dpkg", "--purge", package.name]);
        assert!(!root.has(package.config), "it goes without the data: {told}");
    }
}

/// Builds a package of an earlier version, which shipped its configuration as a conffile.
fn with_a_conffile(deb: &Path, package: &Package, into: &Path) -> PathBuf {
    let script = r#"
set -eu
dpkg-deb -R "$1" "$2"
mkdir -p "$2${3%/*}"
mv "$2/usr/share/$4/${3##*/}" "$2$3"
echo '# of an earlier version' >>"$2$3"
echo "$3" >"$2/DEBIAN/conffiles"
sed -i 's/^Version: .*/Version: 0.0.1-1/' "$2/DEBIAN/control"
dpkg-deb --root-owner-group -Zgzip -z1 -b "$2" "$2.deb"
"#;
    let unpacked = into.join(format!("{}-earlier", package.name));
    let mut build = Command::new("sh");
    build.args(["-c", script, "sh"]).arg(deb).arg(&unpacked).args([package.config, package.name]);
    let (code, told) = said(&build.output().expect("started"));
    assert_eq!(code, Some(0), "{told}");
    unpacked.with_extension("deb")
}

#[test]
fn configuration_that_was_a_conffile_stays_through_upgrade_downgrade_and_purge() {
    if !wanted() {
        return;
    }
    let root = Root::new("conffile");
    for package in [&AGENT, &CONTROLLER] {
        let this = root.package(package.name);
        let work = tempfile::tempdir().expect("a folder");
        let earlier = inside(&root, &with_a_conffile(&root.path(&this), package, work.path()));
        root.ok(&["dpkg", "--install", &earlier]);
        let mine = change(&root, package);
        // Back and forth: nobody is asked.
        for deb in [&this, &earlier, &this] {
            let told = root.ok(&["dpkg", "--install", deb]);
            assert_eq!(text(&root, package), mine, "{deb}: {told}");
        }
        // dpkg removes what was a conffile before it asks the package.
        let told = purge(&root, package, None);
        assert_eq!(text(&root, package), mine, "{told}");

        // Where no earlier version was installed, a downgrade asks.
        root.ok(&["dpkg", "--install", &this]);
        let (code, told) = root.run(&["dpkg", "--install", &earlier]);
        assert!(code == Some(1) && told.contains("conffile prompt"), "{code:?}: {told}");
        root.ok(&["dpkg", "--force-confold", "--install", &earlier]);
        assert_eq!(text(&root, package), mine);
        let told = purge(&root, package, Some(true));
        assert!(!root.has(package.config), "nothing is left of it: {told}");
    }
}

/// Installs a package, gives it data, and purges it with this answer of debconf's, or with none.
fn purge(root: &Root, package: &Package, answer: Option<bool>) -> String {
    let name = package.name;
    root.ok(&["dpkg", "--install", &root.package(name)]);
    let make = format!(
        "mkdir -p /var/lib/{name} /etc/pve-sandbox/tls && touch /etc/pve-sandbox/tls/node.key"
    );
    root.ok(&["sh", "-c", &make]);
    if let Some(answer) = answer {
        let line = format!("{name} {name}/remove-data boolean {answer}");
        root.ok(&["sh", "-c", &format!("echo '{line}' | debconf-set-selections")]);
    }
    root.ok(&["dpkg", "--purge", name])
}

/// Follows the steps of pve-sandbox-controller(8) and pve-sandbox-agent(8) one by one, on a host
/// with the parts of PVE that the agent reads at its start.
#[test]
fn manual_steps_start_the_agent_and_give_a_valid_ingress_config() {
    if !wanted() {
        return;
    }
    let root = install(&AGENT);
    let deb = root.package(CONTROLLER.name);
    root.ok(&["dpkg", "--install", &deb]);
    let write = |path: &str, text: &str| {
        let path = root.path(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(&path, text).expect("written");
    };
    write("/etc/pve/.members", "{\"nodename\":\"pve1\",\"version\":0}");
    write("/etc/pve/storage.cfg", "dir: local\n\tpath /var/lib/vz\n\tcontent rootdir,vztmpl\n");
    for folder in ["/etc/pve/nodes/pve1/lxc", "/sys/class/net/vmbr0", "/run/pve-sandbox"] {
        fs::create_dir_all(root.path(folder)).expect("made");
    }

    // The steps of the controller's manual.
    let program = "/usr/sbin/pve-sandbox-controller";
    let as_user = ["runuser", "-u", CONTROLLER.user, "--", program];
    root.ok(&[&as_user[..], &["init", "--name", "controller.test"]].concat());
    let told = root.ok(&[&as_user[..], &["init"]].concat());
    assert!(told.contains("controller.test"), "run again, it keeps the names: {told}");

    // 1: the node's certificates.
    let tls = "/etc/pve-sandbox/tls";
    root.ok(&[program, "node-cert", "pve1", "--address", "127.0.0.1", "--out", tls]);
    let agent = "/usr/sbin/pve-sandbox-agent";
    let config = root.path(AGENT.config);
    // 2: the domain, and values that are detected on a real host.
    let text = fs::read_to_string(&config).expect("there");
    let text = text.replace("#domain = \"sandbox.example.com\"", "domain = \"sandbox.test\"");
    let text = text.replace("#peer = \"192.0.2.11:8481\"", "peer = \"127.0.0.1:8481\"");
    let network =
        "[network]\nbridge = \"vmbr0\"\ngateway = \"10.100.1.1\"\npool = \"10.100.1.0/24\"\n";
    fs::write(&config, format!("{text}\n{network}")).expect("written");
    // Access to Caddy's key is easily forgotten, and then reported.
    let (code, told) = root.run(&[agent, "check-config"]);
    assert!(code != Some(0) && told.contains("Caddy cannot read"), "{told}");
    let key = format!("{tls}/ingress-node.key");
    root.ok(&["chgrp", AGENT.user, &key]);
    root.ok(&["chmod", "0640", &key]);
    // 3: check, and start both.
    root.ok(&[agent, "check-config"]);
    assert!(!root.has("/etc/pve-sandbox/caddy.json"));
    starts_and_stops(&root, "pve-sandbox-agent.service", agent);
    let validate = ["caddy", "validate", "--config", "/etc/pve-sandbox/caddy.json"];
    let as_ingress = ["runuser", "-u", AGENT.user, "--", "env", "HOME=/tmp"];
    root.ok(&[&as_ingress[..], &validate].concat());
}
