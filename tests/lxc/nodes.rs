//! Nodes: placement by their live reports, lost quorum, cordon and drain.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use lab::{daemons::AGENT, disk};
use serde_json::Value;

use crate::world::{PATIENCE, World, id, node, vmid, wait, world};

/// Returns each node's reported value of `key`, at one moment.
fn loads(world: &World, key: &str) -> BTreeMap<String, f64> {
    let nodes = world.json(&["nodes"]);
    let of = |node: &Value| Some((node["id"].as_str()?.to_owned(), node["load"][key].as_f64()?));
    nodes.as_array().expect("nodes").iter().filter_map(of).collect()
}

#[test]
fn loaded_node_is_avoided_and_explain_shows_why() {
    let Some(world) = world() else { return };
    let hogs: Vec<_> = (0..4).map(|_| Hog::on(&world, "node2")).collect();
    // On a small machine the nodes share their cores, and other work affects all of them: so the
    // test waits for the answer instead of asking once.
    wait("a report of node2 that stands out, and an answer that avoids it", || {
        let nodes = loads(&world, "cpu_busy");
        let own = nodes.get("node2").copied().unwrap_or_default();
        let answer = world.json(&["explain", "--dry-run"]);
        let verdicts = answer["nodes"].as_array().expect("verdicts");
        let worst = verdicts.iter().max_by(|a, b| {
            a["parts"]["cpu"].as_f64().partial_cmp(&b["parts"]["cpu"].as_f64()).expect("numbers")
        });
        own > 0.3
            && nodes.iter().all(|(node, &busy)| node == "node2" || busy < own)
            && worst.is_some_and(|verdict| verdict["id"] == "node2")
            && answer["node"] != "node2"
    });
    let made: Vec<_> = (0..3).map(|_| world.create(&[])).collect();
    drop(hogs);
    for sandbox in &made {
        let why = world.json(&["explain", id(sandbox)]);
        assert_eq!(why["node"], sandbox["node"]);
        let verdicts = why["nodes"].as_array().expect("verdicts");
        let score = |node: &str| {
            verdicts.iter().find(|v| v["id"] == node).and_then(|v| v["score"].as_f64())
        };
        let chosen = score(sandbox["node"].as_str().expect("node")).expect("a score");
        for other in ["node1", "node2", "node3"] {
            assert!(score(other).is_none_or(|other| other >= chosen), "{why}");
        }
    }
    wait("node2 to be free again", || loads(&world, "cpu_busy")["node2"] < 0.3);
    world.finish();
}

/// A process that keeps a core of a node busy until it is dropped. It is started by `lab exec`,
/// whose end also kills it.
struct Hog(Child);

impl Hog {
    fn on(world: &World, node: &str) -> Self {
        let mut hog = world.node(node).command(["/bin/bash", "-c", "while :; do :; done"]);
        Self(hog.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a hog"))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.0.kill().expect("end the hog");
        self.0.wait().expect("ended");
    }
}

/// Memory in use on a node until this is dropped.
struct Ballast<'a>(&'a World, &'static str);

impl<'a> Ballast<'a> {
    fn of(world: &'a World, node: &'static str, mib: u64) -> Self {
        let fill = format!("head -c {mib}M /dev/zero > /dev/shm/ballast");
        let done = Self(world, node);
        world.shell(node, &fill);
        done
    }
}

impl Drop for Ballast<'_> {
    fn drop(&mut self) {
        self.0.shell(self.1, "rm -f /dev/shm/ballast");
    }
}

/// Creates sandboxes in small groups. A booting sandbox counts as a core, and a node of the lab has
/// two, so that larger groups would be too much for any node.
fn create_at_rest(world: &World, counts: &[usize]) -> Vec<Value> {
    let mut made = Vec::new();
    for count in counts {
        wait("what has booted to be at rest", || {
            loads(world, "booting_cores").values().all(|young| *young == 0.0)
        });
        made.extend((0..*count).map(|_| world.create(&["--memory", "64"])));
    }
    made
}

#[test]
fn creations_go_where_there_is_room_and_even_out_later() {
    let Some(world) = world() else { return };
    let busy = |key: &str, node: &str| loads(&world, key).get(node).copied().unwrap_or_default();
    let mib = |key: &str, node: &str| busy(key, node) / f64::from(1 << 20);
    let hogs: Vec<_> = (0..8).map(|_| Hog::on(&world, "node2")).collect();
    // Leaves less than a tenth free.
    let free = mib("memory_available", "node1") - 0.08 * mib("memory_total", "node1");
    let ballast = Ballast::of(&world, "node1", free as u64);
    wait("reports of both", || {
        busy("psi_cpu", "node2") > 75.0
            && mib("memory_available", "node1") < 0.1 * mib("memory_total", "node1")
    });
    let mut made = create_at_rest(&world, &[3; 2]);
    let on = |made: &[Value]| {
        let mut counts =
            BTreeMap::from(["node1", "node2", "node3"].map(|node| (node.to_owned(), 0)));
        for sandbox in made {
            *counts.entry(node(sandbox).to_owned()).or_default() += 1;
        }
        counts
    };
    assert_eq!(on(&made)["node3"], 6, "{:?}", on(&made));

    drop(ballast);
    drop(hogs);
    wait("both to be free again", || {
        busy("cpu_busy", "node2") < 0.3
            && mib("memory_available", "node1") > 0.5 * mib("memory_total", "node1")
    });
    // Two nodes are six behind; with an even spread from now on, they would stay so.
    let apart = |made: &[Value]| {
        let counts = on(made);
        let (least, most) = (counts.values().min(), counts.values().max());
        most.zip(least).map_or(0, |(most, least)| most - least)
    };
    for _ in 0..8 {
        if apart(&made) > 2 {
            made.extend(create_at_rest(&world, &[4]));
        }
    }
    assert!(apart(&made) <= 2, "{:?}", on(&made));
    world.finish();
}

#[test]
fn node_without_quorum_gets_no_creations_and_keeps_serving() {
    let Some(world) = world() else { return };
    let there = world.create(&["--node", "node2"]);
    world.node("node2").set_quorum(false).expect("cut");
    wait("node2 to be filtered out", || {
        let why = world.json(&["explain", "--dry-run"]);
        let verdicts = why["nodes"].as_array().cloned().unwrap_or_default();
        verdicts.iter().any(|v| v["id"] == "node2" && v["filtered"] == "NO_QUORUM")
    });
    assert_eq!(world.ctl(&["exec", id(&there), "--", "true"]).code, 0, "exec goes on");
    let (reason, _) = world.refused(&["rm", id(&there)]);
    assert_eq!(reason, "NO_QUORUM");
    world.node("node2").set_quorum(true).expect("join");
    wait("node2 to be back", || {
        world.json(&["explain", "--dry-run", "--node", "node2"])["node"] == "node2"
    });
    world.finish();
}

#[test]
fn node_without_corosync_creates_and_removes_nothing() {
    let Some(world) = world() else { return };
    let there = world.create(&["--node", "node2"]);
    let host = world.node("node2");
    host.set_corosync(false).expect("down");
    wait("node2 to be filtered out", || {
        let why = world.json(&["explain", "--dry-run"]);
        let verdicts = why["nodes"].as_array().cloned().unwrap_or_default();
        verdicts.iter().any(|v| v["id"] == "node2" && v["filtered"] == "NO_QUORUM")
    });
    // Its agent may restart: it is still node 2.
    let services = host.services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    wait("the agent again", || world.ctl(&["exec", id(&there), "--", "true"]).code == 0);
    let (reason, _) = world.refused(&["rm", id(&there)]);
    assert_eq!(reason, "NO_QUORUM");
    let volume = format!("test -d /rpool/data/subvol-{}-disk-0 && echo there", vmid(&there));
    assert_eq!(world.shell("node2", &volume).trim(), "there");
    host.set_corosync(true).expect("up");
    wait("node2 to be back", || {
        world.json(&["explain", "--dry-run", "--node", "node2"])["node"] == "node2"
    });
    world.finish();
}

#[test]
fn running_sandbox_is_reached_and_paused_without_pmxcfs() {
    let Some(world) = world() else { return };
    let used = world.create(&["--node", "node2"]);
    let fresh = world.create(&["--node", "node2"]);
    assert_eq!(world.ctl(&["exec", id(&used), "--", "true"]).code, 0);
    let host = world.node("node2");
    host.set_pmxcfs(false).expect("stopped");
    for sandbox in [&used, &fresh] {
        let ran = world.ctl(&["exec", id(sandbox), "--", "true"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        world.json(&["pause", id(sandbox)]);
        assert_eq!(world.get(id(sandbox))["phase"], "paused");
        world.json(&["resume", id(sandbox)]);
    }
    let (reason, message) = world.refused(&["stop", id(&used)]);
    assert_eq!(reason, "NO_QUORUM", "{message}");
    assert_eq!(world.get(id(&used))["phase"], "running");
    host.set_pmxcfs(true).expect("started");
    wait("node2 to be back", || {
        world.json(&["explain", "--dry-run", "--node", "node2"])["node"] == "node2"
    });
    world.json(&["rm", id(&used)]);
    world.finish();
}

#[test]
fn cordon_survives_an_agent_restart_and_drain_lists_what_is_left() {
    let Some(world) = world() else { return };
    let there = world.create(&["--node", "node3"]);
    let dry_run = |world: &World| world.json(&["explain", "--dry-run", "--node", "node3"]);
    assert_eq!(world.ctl(&["cordon", "node3", "--why", "new disks"]).code, 0);
    let why = dry_run(&world);
    assert!(why["nodes"].to_string().contains("CORDONED"), "{why}");
    // The agent keeps the cordon through a restart, and refuses creations.
    let services = world.node("node3").services().expect("services");
    services.stop(AGENT, PATIENCE).expect("stopped");
    services.start(AGENT, PATIENCE).expect("started");
    wait("node3 to be back, and cordoned", || {
        let nodes = world.json(&["nodes"]);
        let node3 = nodes.as_array().and_then(|all| all.iter().find(|n| n["id"] == "node3"));
        node3.is_some_and(|node| node["ready"] == true && node["load"]["cordoned"] == true)
    });
    for _ in 0..2 {
        assert_ne!(node(&world.create(&[])), "node3");
    }
    assert_eq!(world.ctl(&["exec", id(&there), "--", "true"]).code, 0, "what is there lives on");

    let left = world.ctl(&["drain", "node3"]);
    assert_eq!(left.code, 1, "{}", left.stderr);
    assert!(left.text().contains(id(&there)), "{}", left.text());
    assert_eq!(world.ctl(&["rm", id(&there)]).code, 0);
    assert_eq!(world.ctl(&["drain", "node3", "--wait", "--timeout", "60s"]).code, 0);
    assert_eq!(world.ctl(&["uncordon", "node3"]).code, 0);
    wait("node3 to take work", || dry_run(&world)["node"] == "node3");
    world.finish();
}

/// Marks the nodes' own storage as shared for PVE, until this is dropped.
pub(crate) struct Shared(PathBuf);

impl Shared {
    const POOL: &str = "\tpool rpool/data\n";
    const MARK: &str = "\tshared 1\n";

    pub(crate) fn of(world: &World) -> Self {
        let root = world.node("node1").root().expect("a node that is up");
        let this = Self(root.join("etc/pve/storage.cfg"));
        this.write(&format!("{}{}", Self::POOL, Self::MARK));
        this
    }

    fn write(&self, pool: &str) {
        let text = std::fs::read_to_string(&self.0).expect("storage.cfg");
        let text = text.replace(Self::MARK, "").replace(Self::POOL, pool);
        std::fs::write(&self.0, text).expect("storage.cfg");
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.write(Self::POOL);
    }
}

/// Copies the disk to the other node, which a shared storage would not need.
pub(crate) fn carry(world: &World, vmid: u64, from: &str, to: &str) {
    let volume = |node: &str| {
        let name = format!("subvol-{vmid}-disk-0");
        disk::volume(world.lab.layout(), world.node(node).id(), &name)
    };
    let (from, to) = (volume(from), volume(to));
    let run = |program: &str, words: &[&str]| {
        let status = Command::new(program).args(words).stdout(Stdio::null()).status();
        assert!(status.expect("it starts").success(), "{program} {words:?}");
    };
    let (from, to) = (from.to_str().expect("a path"), to.to_str().expect("a path"));
    run("btrfs", &["subvolume", "create", to]);
    run("cp", &["-a", &format!("{from}/."), to]);
    run("btrfs", &["subvolume", "delete", from]);
}

#[test]
fn drain_moves_a_stopped_sandbox_to_a_node_that_sees_its_disk() {
    let Some(world) = world() else { return };
    let stopped = world.create(&["--node", "node3", "--meta", "colour=green"]);
    let running = world.create(&["--node", "node3"]);
    let (name, number) = (id(&stopped), vmid(&stopped));
    assert_eq!(world.ctl(&["exec", name, "--", "sh", "-c", "echo kept > /root/kept"]).code, 0);
    world.json(&["stop", name]);

    let stays = world.ctl(&["--json", "drain", "node3"]);
    let stays: Value = serde_json::from_slice(&stays.stdout).expect("JSON");
    let why = stays["stays"][name].as_str().expect("why it stays");
    assert!(why.contains("does not see"), "{why}");
    assert_eq!(node(&world.get(name)), "node3");

    let shared = Shared::of(&world);
    let drained = world.ctl(&["drain", "node3"]);
    let there = world.get(name);
    let to = node(&there).to_owned();
    assert_ne!(to, "node3", "{}{}", drained.text(), drained.stderr);
    assert!(drained.text().contains(&format!("{name} moved to {to}")), "{}", drained.text());
    assert_eq!(drained.code, 1, "one that runs is left");
    assert!(drained.text().contains(id(&running)), "{}", drained.text());
    assert_eq!((&there["phase"], vmid(&there)), (&Value::from("stopped"), number));
    assert_eq!(there["metadata"]["colour"], "green");
    drop(shared);
    carry(&world, number, "node3", &to);

    world.json(&["start", name]);
    let kept = world.ctl(&["exec", name, "--", "cat", "/root/kept"]);
    assert_eq!(kept.text().trim(), "kept", "{}", kept.stderr);
    let events = world.ctl(&["events", name]);
    assert!(events.text().contains("moved"), "{}", events.text());
    assert!(!events.text().contains("deleted"), "{}", events.text());
    assert_eq!(world.ctl(&["exec", id(&running), "--", "true"]).code, 0, "what runs lives on");
    assert_eq!(world.ctl(&["uncordon", "node3"]).code, 0);
    world.finish();
}
