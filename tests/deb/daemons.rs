//! The packages of the daemons: units, conffiles, users, a start by hand, removal.

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    process::Child,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    root::{Root, said},
    wanted,
};

/// How long a daemon may take until it is up, or says why it cannot be.
const UP: Duration = Duration::from_secs(60);

struct Package {
    name: &'static str,
    units: &'static [&'static str],
    conffile: &'static str,
    user: &'static str,
}

const AGENT: Package = Package {
    name: "pve-sandbox-agent",
    units: &["pve-sandbox-agent.service", "pve-sandbox-ingress.service"],
    conffile: "/etc/pve-sandbox/agent.toml",
    user: "pve-sandbox-ingress",
};

const CONTROLLER: Package = Package {
    name: "pve-sandbox-controller",
    units: &["pve-sandbox-controller.service"],
    conffile: "/etc/pve-sandbox/controller.toml",
    user: "pve-sandbox-controller",
};

/// Installs it and looks at what is there.
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
        let wants = format!("/etc/systemd/system/multi-user.target.wants/{unit}");
        assert!(root.has(&wants), "{unit} is enabled");
    }
    // Somebody's changes survive the next installation.
    let mine = "# changed by hand\n";
    let conffile = root.path(package.conffile);
    fs::OpenOptions::new()
        .append(true)
        .open(&conffile)
        .expect("there")
        .write_all(mine.as_bytes())
        .expect("changed");
    root.ok(&["dpkg", "--force-confdef", "--install", &deb]);
    assert!(fs::read_to_string(&conffile).expect("there").ends_with(mine));
    root
}

/// Removes it, then purges it.
fn remove(root: &Root, package: &Package) {
    let listed = root.ok(&["dpkg", "--listfiles", package.name]);
    root.ok(&["dpkg", "--remove", package.name]);
    assert!(root.has(package.conffile), "a removal keeps the configuration");
    root.ok(&["dpkg", "--purge", package.name]);
    let left: Vec<_> = listed.lines().filter(|path| root.path(path).is_file()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    for unit in package.units {
        assert!(!root.has(&format!("/etc/systemd/system/multi-user.target.wants/{unit}")));
    }
}

/// The unit's ExecStart line, run as its user.
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

/// How a daemon that cannot serve ends: exit code and what it says.
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
    assert!(told.contains("init"), "it must say that `init` comes first: {told}");

    let program = "/usr/sbin/pve-sandbox-controller";
    let as_user = ["runuser", "-u", CONTROLLER.user, "--", program];
    root.ok(&[&as_user[..], &["init", "--name", "controller.test"]].concat());
    let token = root.ok(&[&as_user[..], &["token", "create", "--team", "test"]].concat());
    assert!(token.trim().len() > 20, "{token}");
    root.ok(&[program, "check-config"]);

    let socket = root.path("/run/notify.sock");
    let notify = UnixDatagram::bind(&socket).expect("socket");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).expect("for all");
    notify.set_read_timeout(Some(UP)).expect("deadline");
    let child = start(&root, "pve-sandbox-controller.service", "/run/notify.sock");
    let mut message = [0; 4096];
    let ready = notify
        .recv(&mut message)
        .map(|length| String::from_utf8_lossy(&message[..length]).into_owned());
    let up = ready.as_ref().is_ok_and(|message| message.contains("READY=1"));
    // `timeout` hands the signal on to nobody inside a namespace of pids, so it goes to the program.
    for pid in inside(&root, program) {
        kill(pid, Signal::SIGTERM).expect("signalled");
    }
    let (code, text) = said(&child.wait_with_output().expect("it ends"));
    assert!(up, "{ready:?}: {text}");
    assert_eq!(code, Some(0), "it stops when it is told: {text}");

    remove(&root, &CONTROLLER);
    assert!(root.has("/var/lib/pve-sandbox-controller"), "a purge keeps the CA");
}

/// The processes that run a program of the root.
fn inside(root: &Root, program: &str) -> Vec<Pid> {
    let exe = root.path(program);
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let same = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|runs| runs == exe);
    pids.filter(same).map(Pid::from_raw).collect()
}

#[test]
fn the_agent_is_installed_says_what_it_lacks_and_is_removed() {
    if !wanted() {
        return;
    }
    let root = install(&AGENT);
    // No PVE here: it must say so, in words that name what to do.
    let told = refuses(&root, "pve-sandbox-agent.service");
    assert!(told.contains("/etc/pve") || told.contains("node"), "{told}");
    let (code, told) = root.run(&["/usr/sbin/pve-sandbox-agent", "check-config"]);
    assert!(code.is_some_and(|code| code != 0), "{told}");
    assert!(told.contains("node"), "it names what it could not detect: {told}");
    remove(&root, &AGENT);
}
