//! Commands and files in a real container: they survive the agent's end, and a hostile root inside
//! gains nothing.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use lab::daemons::AGENT;

use crate::world::{Caller, PATIENCE, id, node, vmid, wait, world};

/// Number of kills of the agent under load, each with a whole restart; `PVE_SANDBOX_KILLS`
/// overrides it.
const KILLS: u32 = 100;

/// Runs commands one after another until it is told to stop, and returns their number. Each has its
/// own exit code and writes a line. If a node cannot be reached, the command is repeated under the
/// same name, as a backend does.
fn run_commands(world: &Caller, id: &str, lane: u32, stop: &AtomicBool) -> u32 {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let code = 1 + number % 120;
        let line = format!("echo {lane}-{number} >>/root/ran; sleep 0.3; echo out; exit {code}");
        let name = format!("run-{lane}-{number}");
        let begun = Instant::now();
        let ran = loop {
            let ran = world.ctl(&["exec", "--exec-id", &name, id, "--shell", &line]);
            let later = ["(NODE_UNREACHABLE)", "(SHUTTING_DOWN)", "(OUTCOME_UNKNOWN)"];
            let again = ran.0 == 125 && later.iter().any(|reason| ran.2.contains(reason));
            if !again || begun.elapsed() > PATIENCE {
                break ran;
            }
            std::thread::sleep(Duration::from_millis(200));
        };
        assert_eq!(ran.0, i32::try_from(code).expect("small"), "{lane}-{number}: {}", ran.2);
        assert_eq!(ran.1, "out\n", "{lane}-{number}");
        number += 1;
    }
    number
}

#[test]
fn commands_files_and_pauses_work_through_kills_of_the_agent() {
    let Some(world) = world() else { return };
    let (busy, paused) = (world.create(&["--node", "node1"]), world.create(&["--node", "node1"]));
    let (busy, paused) = (id(&busy), id(&paused));
    let services = world.node("node1").services().expect("services");
    let here = world.caller();
    let (stop, pauses) = (AtomicBool::new(false), AtomicU32::new(0));
    let content = "as it should be\n".repeat(2000);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), &content).expect("written");
    let runs = std::thread::scope(|scope| {
        // One command runs all the time: its output must be complete.
        let long = scope.spawn(|| {
            let line =
                "i=0; while [ ! -e /root/stop ]; do i=$((i+1)); echo $i; sleep 0.02; done; exit 42";
            here.ctl(&["exec", "--exec-id", "long", "--timeout", "1h", busy, "--shell", line])
        });
        let lanes = [0, 1].map(|lane| {
            let (here, stop) = (&here, &stop);
            scope.spawn(move || run_commands(here, busy, lane, stop))
        });
        let toggling = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Refused while the agent is down; repeated in the next round.
                for verb in ["pause", "resume"] {
                    let done = here.ctl(&[verb, paused]).0 == 0;
                    pauses.fetch_add(u32::from(done), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        });
        let copying = scope.spawn(|| {
            let to = format!("{busy}:/root/copy");
            let from = file.path().to_str().expect("UTF-8");
            let mut copies = 0;
            while !stop.load(Ordering::Relaxed) {
                copies += u32::from(here.ctl(&["cp", from, &to]).0 == 0);
                std::thread::sleep(Duration::from_millis(300));
            }
            copies
        });
        wait("the long command to run", || here.ctl(&["ps", busy]).1.contains("long"));
        let kills = std::env::var("PVE_SANDBOX_KILLS").ok();
        for _ in 0..kills.map_or(KILLS, |kills| kills.parse().expect("a number")) {
            services.kill(AGENT, false, PATIENCE).expect("kill -9");
            // The agent runs again, and the controller has found it.
            wait("the agent to be back", || here.ctl(&["ps", busy]).0 == 0);
        }
        // Few kills on a slow machine leave time for few pauses.
        wait("some pauses", || pauses.load(Ordering::Relaxed) > 3);
        stop.store(true, Ordering::Relaxed);
        let runs = lanes.map(|lane| lane.join().expect("every exit code came once"));
        toggling.join().expect("no panic");
        assert!(copying.join().expect("no panic") > 0, "no copy succeeded");
        let stopped = Instant::now();
        while here.ctl(&["exec", busy, "--", "touch", "/root/stop"]).0 != 0 {
            assert!(stopped.elapsed() < PATIENCE, "nothing runs any more");
        }
        let (code, out, err) = long.join().expect("no panic");
        assert_eq!(code, 42, "{err}");
        let numbers: Vec<u32> = out.lines().map(|line| line.parse().expect("a number")).collect();
        let wanted: Vec<u32> = (1..=u32::try_from(numbers.len()).expect("few")).collect();
        assert!(numbers == wanted, "a line was lost or came twice");
        runs
    });
    // Each command ran once.
    let ran = world.ctl(&["exec", busy, "--", "sort", "/root/ran"]);
    let mut wanted: Vec<String> =
        (0..2).flat_map(|lane| (0..runs[lane]).map(move |n| format!("{lane}-{n}"))).collect();
    wanted.sort();
    let mut lines: Vec<String> = ran.text().lines().map(ToOwned::to_owned).collect();
    lines.sort();
    assert_eq!(lines, wanted);
    assert!(runs.iter().all(|runs| *runs > 0), "{runs:?}");
    // A copy is the whole file or nothing.
    let ran = world.ctl(&["exec", busy, "--", "cat", "/root/copy"]);
    assert_eq!(ran.text(), content);
    wait("the paused one to be resumed", || world.ctl(&["resume", paused]).code == 0);
    assert_eq!(world.get(busy)["boot"], 1);
    world.finish();
}

#[test]
fn hostile_root_gains_nothing_on_the_host() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    let id = id(&sandbox);
    let shell = |line: &str| world.ctl(&["exec", id, "--shell", line]);
    // Inspects the helper: image, descriptors, environment, capabilities, filter.
    let probe = "for p in /proc/[0-9]*; do case $(readlink $p/exe) in /memfd:*) \
        (echo x >$p/exe) 2>/dev/null && echo overwritten; (echo x >>$p/exe) 2>/dev/null && echo appended; \
        echo helper; ls -l $p/fd $p/cwd | sed 's/.*-> //' ; tr '\\0' '\\n' <$p/environ;; esac; done; \
        grep Seccomp: /proc/self/status; cat /proc/self/cgroup";
    let seen = shell(probe).text();
    assert!(seen.contains("helper") && seen.contains("Seccomp:\t2"), "{seen}");
    for leaked in
        ["overwritten", "appended", "SANDBOX", "/etc/pve", "/var/lib", "/run/pve", "LC_ALL"]
    {
        assert!(!seen.contains(leaked), "{leaked}: {seen}");
    }
    // A killed helper affects only the sandbox's own commands.
    let kill = "for p in /proc/[0-9]*; do case $(readlink $p/exe) in /memfd:*) kill -9 ${p#/proc/};; \
                esac; done; sleep 5";
    let lost = world.ctl(&["--json", "exec", id, "--shell", kill]);
    assert_eq!(crate::world::refusal(&lost).0, "EXEC_LOST", "{}", lost.stderr);
    assert_eq!(shell("exit 3").code, 3, "a new helper");
    // The command has its own terminal: its input reaches no terminal of the node.
    let tty = world.shell(node(&sandbox), "ls /dev/pts | wc -l");
    let inject = "python3 -c 1 2>/dev/null; tty; ls -l /proc/self/fd/0";
    let ran = world.ctl(&["exec", id, "-t", "--shell", inject]);
    assert!(ran.text().contains("/dev/pts/"), "{}", ran.text());
    assert_eq!(world.shell(node(&sandbox), "ls /dev/pts | wc -l"), tty);
    // A fork bomb ends at its time limit, and the node's other sandboxes are not disturbed.
    let other = world.create(&["--node", "node1"]);
    let bomb = "f() { sleep 60 & [ $1 -gt 0 ] && { f $(($1-1)) & f $(($1-1)) & }; }; f 7; sleep 60";
    let ran = world.ctl(&["exec", "--timeout", "3s", id, "--shell", bomb]);
    assert_eq!(ran.code, 124, "{}", ran.stderr);
    wait("the bomb to be gone", || shell("pgrep -c sleep").text().trim() == "0");
    assert_eq!(world.ctl(&["exec", crate::world::id(&other), "--", "true"]).code, 0);
    assert!(world.shell("node1", "ls /etc/pve/lxc").contains(&vmid(&sandbox).to_string()));
    world.finish();
}

#[test]
fn hostile_files_are_refused_without_delay() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    let id = id(&sandbox);
    let made = world.ctl(&[
        "exec",
        id,
        "--shell",
        "mkfifo /srv/fifo; ln -s /etc/shadow /srv/shadow; ln -s fifo /srv/link; truncate -s 8T /srv/giant; \
         mkdir /srv/d; ln -s /tmp/out /srv/d/out",
    ]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let dir = tempfile::tempdir().expect("tempdir");
    let to = dir.path().to_str().expect("UTF-8");
    let begun = Instant::now();
    for bad in ["/srv/fifo", "/srv/link", "/dev/zero", "/dev/console"] {
        let ran = world.ctl(&["cp", "-L", &format!("{id}:{bad}"), &format!("{to}/x")]);
        assert_ne!(ran.code, 0, "{bad}: {}", ran.stderr);
    }
    assert!(begun.elapsed() < PATIENCE, "something was waited for");
    // Must be the sandbox's own /etc/shadow, not the node's.
    let mine = world.ctl(&["exec", id, "--", "cat", "/etc/shadow"]).text();
    let ran = world.ctl(&["cp", "-L", &format!("{id}:/srv/shadow"), &format!("{to}/shadow")]);
    if ran.code == 0 {
        assert_eq!(std::fs::read_to_string(dir.path().join("shadow")).expect("read"), mine);
    }
    let ran = world.ctl(&["cp", &format!("{id}:/srv/shadow"), &format!("{to}/link")]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(std::fs::symlink_metadata(dir.path().join("link")).expect("there").is_symlink());
    // A link that leads outside stays a link here, and nothing is written through it.
    let ran = world.ctl(&["cp", &format!("{id}:/srv/d"), to]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(std::fs::symlink_metadata(dir.path().join("d/out")).expect("there").is_symlink());
    world.finish();
}

#[test]
fn commands_are_limited_by_the_cgroup_of_their_sandbox() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--memory", "256"]);
    let (id, node) = (id(&sandbox), node(&sandbox));
    // Checks every hierarchy that counts CPU or memory, v1 or v2, as the node sees it.
    let marker = format!("sleep {}", 40_000_000 + vmid(&sandbox));
    let line = format!("exec {marker}");
    let started = world.ctl(&["exec", "--detach", "--timeout", "10m", id, "--shell", &line]);
    assert_eq!(started.code, 0, "{started:?}");
    let find = format!(
        "for p in /proc/[0-9]*; do [ \"$(tr '\\0' ' ' <$p/cmdline 2>/dev/null)\" = '{marker} ' ] \
         && cat $p/cgroup; done; true"
    );
    let mut cgroups = String::new();
    wait("the command to be seen on its node", || {
        cgroups = world.shell(node, &find);
        !cgroups.is_empty()
    });
    let own = format!("/lxc/{}", vmid(&sandbox));
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (controllers, path) = (fields.nth(1).unwrap_or_default(), fields.next());
        let counts = |name: &str| ["", "cpu", "cpuacct", "memory", "pids"].contains(&name);
        // Controllers that the lab does not give to nodes are at the machine's root.
        if controllers.split(',').any(counts) && path != Some("/") {
            assert!(path.is_some_and(|path| path.contains(&own)), "{line} of:\n{cgroups}");
        }
    }
    let of_memory = |line: &str| line.contains(":memory:") || line.starts_with("0::");
    assert!(cgroups.lines().any(|line| of_memory(line) && line.contains(&own)), "{cgroups}");
    // A command that needs more memory than the sandbox has is killed; nothing else on the node is.
    let greedy = world.ctl(&["exec", id, "--timeout", "2m", "--", "tail", "/dev/zero"]);
    assert_eq!(greedy.code, 137, "{greedy:?}");
    assert_eq!(world.ctl(&["exec", id, "--", "true"]).code, 0);
    world.finish();
}
