//! Rules of the real `pct` that no single transcript can show, because they involve chance or a
//! process id. Also tests of the fault plan and the cost switch.

use std::fs;
use std::time::{Duration, Instant};

use standin::cost;
use standin::faults::{Action, Rule, write_plan};
use standin::task::upid::Upid;

use crate::cluster::{Cluster, RealLxc, Said};

const GUESTS: &str = "volume data/basevol-900-disk-0; guest 900 tmpl 512 btr:basevol-900-disk-0; \
    put 900 'template: 1'; volume data/basevol-910-disk-0; \
    guest 910 other 64 btr:basevol-910-disk-0 pve2; \
    echo 'template: 1' >> /etc/pve/nodes/pve2/lxc/910.conf";

fn cluster() -> Cluster {
    let cluster = Cluster::new(None);
    let said = cluster.run(GUESTS, "pve1");
    assert_eq!(said.exit, Some(0), "{said:?}");
    cluster
}

fn pct(cluster: &Cluster, args: &str) -> Said {
    cluster.run(&format!("pct {args}"), "pve1")
}

fn plan(cluster: &Cluster, rules: &[Rule]) {
    write_plan(cluster.control_dir(), rules).expect("a plan");
}

fn conf(cluster: &Cluster, vmid: u32) -> String {
    let path = cluster.dir.join(format!("etc/pve/nodes/pve1/lxc/{vmid}.conf"));
    fs::read_to_string(path).unwrap_or_default()
}

fn has_volume(cluster: &Cluster, vmid: u32) -> bool {
    cluster.dir.join(format!("rpool/data/subvol-{vmid}-disk-0")).is_dir()
}

fn index(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.dir.join("var/log/pve/tasks/index")).unwrap_or_default()
}

/// Waits for the only running task and returns it.
fn running_task(cluster: &Cluster) -> Upid {
    let active = cluster.dir.join("var/log/pve/tasks/active");
    let found = wait_for(|| {
        let text = fs::read_to_string(&active).ok()?;
        Upid::parse(text.lines().next()?.split(' ').next()?)
    });
    found.expect("a task")
}

fn wait_for<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(found) = look() {
            return Some(found);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

#[test]
fn parallel_clones_that_find_the_lock_fail() {
    let cluster = cluster();
    let rule = Rule::once("clone", "volume", Action::SleepMs).after().lasting_ms(100).always();
    plan(&cluster, &[rule]);
    let text = "for i in 1 2 3 4 5 6; do \
        (o=$(pct clone 900 41$i 2>&1); echo \"$? $(echo \"$o\" | tail -1)\") & done; wait";
    let said = cluster.run(text, "pve1");
    let (won, lost): (Vec<_>, Vec<_>) = said.out.iter().partition(|line| line.starts_with("0 "));
    assert!(!won.is_empty() && won.len() + lost.len() == 6, "{said:?}");
    assert!(lost.iter().all(|line| *line == "255 CT is locked (disk)"), "{lost:?}");
    let left = cluster.run("grep -l ^lock /etc/pve/lxc/*.conf; ls /etc/pve/lxc | wc -l", "pve1");
    assert_eq!(left.out, [(won.len() + 1).to_string()]);
}

#[test]
fn two_nodes_that_clone_to_one_vmid_have_one_winner() {
    let cluster = cluster();
    for vmid in 1101..1106 {
        let (one, two) = std::thread::scope(|scope| {
            let one = scope.spawn(|| {
                let mut bash = cluster.command(&format!("pct clone 900 {vmid}"), "pve1");
                bash.output().expect("bash runs")
            });
            let two = scope.spawn(|| {
                let mut bash = cluster.command(&format!("pct clone 910 {vmid}"), "pve2");
                bash.output().expect("bash runs")
            });
            (one.join().expect("a clone"), two.join().expect("a clone"))
        });
        let (winner, loser) = if one.status.success() { ("pve1", &two) } else { ("pve2", &one) };
        assert!(one.status.success() != two.status.success(), "{one:?} {two:?}");
        let said = String::from_utf8_lossy(&loser.stderr);
        // Both share a directory of lock files here, so the loser may have waited for that first.
        let last = said.lines().last();
        let wanted = format!("CT {vmid} already exists on node '{winner}'");
        assert_eq!(last, Some(wanted.as_str()));
    }
}

#[test]
fn clone_killed_with_its_worker_leaves_both_locks_and_its_volume() {
    let cluster = cluster();
    plan(&cluster, &[Rule::once("clone", "volume", Action::DieAfter).for_vmid(501)]);
    let said = pct(&cluster, "clone 900 501 --description mark");
    assert_ne!(said.exit, Some(0));
    assert!(conf(&cluster, 900).contains("lock: disk"));
    let target = conf(&cluster, 501);
    assert!(target.starts_with("#mark\n") && target.contains("lock: create"), "{target}");
    assert!(!target.contains("rootfs") && has_volume(&cluster, 501));
    assert_eq!(pct(&cluster, "clone 900 502").err, ["CT is locked (disk)"]);
    let cleaned = "unlock 900 && pct unlock 501 && pct destroy 501 --destroy-unreferenced-disks 1";
    assert_eq!(pct(&cluster, cleaned).exit, Some(0));
    assert!(!has_volume(&cluster, 501) && conf(&cluster, 501).is_empty());
    assert!(index(&cluster).contains("vzclone:900:root@pam: "));
    assert!(index(&cluster).contains("unexpected status"));
}

#[test]
fn a_worker_outlives_its_parent() {
    let cluster = cluster();
    let slow = Rule::once("clone", "volume", Action::SleepMs).after().lasting_ms(300);
    plan(&cluster, &[Rule::once("clone", "volume", Action::KillParent), slow]);
    let said = pct(&cluster, "clone 900 501; exit $?");
    assert_eq!(said.exit, Some(137), "{said:?}");
    let done = wait_for(|| {
        let target = conf(&cluster, 501);
        let free = !target.contains("lock:") && !conf(&cluster, 900).contains("lock:");
        (target.contains("rootfs") && free).then_some(())
    });
    assert!(done.is_some(), "{}", conf(&cluster, 501));
}

#[test]
fn worker_is_named_after_its_task_and_leads_a_session() {
    let cluster = cluster();
    plan(&cluster, &[Rule::once("clone", "volume", Action::Hang).after()]);
    std::thread::scope(|scope| {
        let clone = scope
            .spawn(|| cluster.command("pct clone 900 501", "pve1").output().expect("bash runs"));
        let task = running_task(&cluster);
        assert!(task.is_alive() && task.kind == "vzclone" && task.id == "900");
        let command = fs::read(format!("/proc/{}/cmdline", task.pid)).expect("a process");
        assert_eq!(String::from_utf8_lossy(&command), format!("task {task}\0"));
        let stat = fs::read_to_string(format!("/proc/{}/stat", task.pid)).expect("a process");
        assert_eq!(stat.split(' ').nth(5), Some(task.pid.to_string().as_str()), "{stat}");
        wait_for(|| has_volume(&cluster, 501).then_some(())).expect("a volume");
        cluster.run(&format!("kill -TERM {}", task.pid), "pve1");
        let said = clone.join().expect("a clone");
        assert_eq!(said.status.code(), Some(255));
        let text = String::from_utf8_lossy(&said.stderr);
        assert!(text.contains("failed: interrupted by signal"), "{text}");
    });
    // The volume in progress has no configuration: it stays.
    assert!(conf(&cluster, 501).is_empty() && has_volume(&cluster, 501));
    assert!(!conf(&cluster, 900).contains("lock:"));
}

#[test]
fn a_worker_killed_alone_ends_with_an_unexpected_status() {
    let cluster = cluster();
    plan(&cluster, &[Rule::once("clone", "write-rootfs", Action::KillWorker)]);
    let said = pct(&cluster, "clone 900 501");
    assert_eq!((said.exit, said.err), (Some(255), vec!["unexpected status".to_owned()]));
    assert!(index(&cluster).trim_end().ends_with("unexpected status"));
}

#[test]
fn fault_plan_makes_a_call_lie_fail_or_leave_its_locks() {
    let cluster = cluster();
    plan(&cluster, &[Rule::once("clone", "end", Action::Exit).saying(7, "no")]);
    let said = pct(&cluster, "clone 900 501");
    assert_eq!((said.exit, said.err), (Some(7), vec!["no".to_owned()]));
    assert!(conf(&cluster, 501).contains("rootfs"));
    plan(&cluster, &[Rule::once("clone", "write-rootfs", Action::Exit).saying(4, "broken")]);
    let said = pct(&cluster, "clone 900 502");
    assert_eq!((said.exit, said.err), (Some(4), vec!["broken".to_owned()]));
    assert!(conf(&cluster, 502).is_empty() && !has_volume(&cluster, 502));
    plan(&cluster, &[Rule::once("clone", "volume", Action::LeaveLock)]);
    assert_eq!(pct(&cluster, "clone 900 503").exit, Some(0));
    assert!(conf(&cluster, 503).contains("lock: create"));
    assert!(conf(&cluster, 900).contains("lock: disk"));
}

#[test]
fn clone_terminated_at_any_step_is_undone() {
    for step in ["volume", "write-rootfs", "mount", "mounted", "unlock-target"] {
        let cluster = cluster();
        plan(&cluster, &[Rule::once("clone", step, Action::Hang)]);
        let said = cluster.run("timeout -s TERM 1 pct clone 900 501", "pve1");
        assert_eq!(said.exit, Some(124), "{step}: {said:?}");
        assert!(said.err[0].starts_with("clone failed: "), "{step}: {said:?}");
        assert!(!conf(&cluster, 900).contains("lock:"), "{step}");
        assert!(conf(&cluster, 501).is_empty() && !has_volume(&cluster, 501), "{step}");
    }
}

#[test]
fn calls_cost_as_much_cpu_time_as_the_real_pct() {
    let cluster = cluster();
    let cpu_s = |args: &str| {
        let said = cluster.run(&format!("TIMEFORMAT=%U; time pct {args} >/dev/null"), "pve1");
        said.err.last().and_then(|s| s.parse::<f64>().ok()).expect("a time")
    };
    assert!(cpu_s("list") < 0.2);
    cost::switch(cluster.control_dir(), true).expect("a switch");
    let list = cpu_s("list");
    assert!((0.5..1.2).contains(&list), "{list}");
    let clone = cpu_s("clone 900 501");
    assert!((0.7..1.6).contains(&clone), "{clone}");
}

#[test]
fn resize_of_a_stopped_raw_volume_waits() {
    let cluster = cluster();
    assert_eq!(cluster.run("pct clone 900 501", "pve1").exit, Some(0));
    let said = cluster.run("pct resize 501 rootfs 5G", "pve1");
    assert_eq!((said.exit, said.out), (Some(0), vec![]), "a subvolume has no such wait");
    let wait = std::time::Duration::from_millis(300);
    cost::set_mmp(cluster.control_dir(), Some(wait)).expect("a file");
    let start = std::time::Instant::now();
    let said = cluster.run("pct resize 501 rootfs 6G", "pve1");
    assert!(start.elapsed() >= 2 * wait, "e2fsck and resize2fs wait, each");
    assert_eq!((said.exit, said.out.len()), (Some(0), 2), "{said:?}");
    assert!(conf(&cluster, 501).contains("size=6G"));
    // A resize that is told to end during the wait has changed nothing.
    cost::set_mmp(cluster.control_dir(), Some(std::time::Duration::from_secs(60))).expect("a file");
    cluster.run("timeout -s TERM 1 pct resize 501 rootfs 7G", "pve1");
    assert!(conf(&cluster, 501).contains("size=6G"));
    cost::set_mmp(cluster.control_dir(), None).expect("no file");
    assert_eq!(cluster.run("pct resize 501 rootfs 7G", "pve1").exit, Some(0));
    assert!(conf(&cluster, 501).contains("size=7G"));
}

#[test]
fn running_containers_behave_as_under_the_real_pct() {
    let Some(real) = RealLxc::from_env() else {
        println!("skipped: needs STANDIN_LXC=1 inside a lab node");
        return;
    };
    let cluster = Cluster::new(Some(real));
    assert_eq!(cluster.run(GUESTS, "pve1").exit, Some(0));
    let said = cluster.run("pct clone 900 501 && pct start 501", "pve1");
    assert_eq!(said.exit, Some(0), "{said:?}");

    // The caller's open files and environment are inherited; --keep-env 0 drops the environment.
    let fd = "pct exec 501 -- sh -c 'read l <&9; echo got $l' 9<<<from-outside";
    assert_eq!(cluster.run(fd, "pve1").out, ["got from-outside"]);
    let leak = "SECRET=x pct exec 501 -- sh -c 'echo [$SECRET]'; \
        SECRET=x pct exec 501 --keep-env 0 -- sh -c 'echo [$SECRET]'";
    assert_eq!(cluster.run(leak, "pve1").out, ["[x]", "[]"]);

    // Both directions transfer byte for byte.
    let same = "head -c 3000000 /dev/urandom > /tmp/blob; \
        [ \"$(md5sum < /tmp/blob)\" = \"$(pct exec 501 -- cat < /tmp/blob | md5sum)\" ]";
    assert_eq!(cluster.run(same, "pve1").exit, Some(0));

    // The command survives inside when its caller is killed.
    let orphan = "pct exec 501 -- sleep 987 & P=$!; sleep 0.5; kill -KILL $P; wait $P; \
        echo rc=$?; sleep 0.2; pct exec 501 -- sh -c 'cat /proc/[0-9]*/cmdline' | tr '\\0' ' ' | \
        grep -o 'sleep 987' | head -1";
    assert_eq!(cluster.run(orphan, "pve1").out, ["rc=137", "sleep 987"]);

    // Remnants of a destroy.
    let said = cluster.run("pct destroy 501 --force 1; ls /var/lib/lxc/501; ip -br link", "pve1");
    assert_eq!(
        said.out[..3],
        ["forced to stop CT 501 before destroying!", "passthrough", "rules.seccomp"]
    );
    assert!(!said.out.iter().any(|line| line.contains("veth501")), "{said:?}");
    assert!(!std::path::Path::new("/sys/fs/cgroup/lxc/501").exists());
    assert!(cluster.dir.join("run/lock/lxc/pve-config-501.lock").exists());
}
