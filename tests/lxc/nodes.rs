//! Placement by what the nodes report, live.

use std::process::Stdio;

use crate::world::{World, id, wait, world};

fn load(world: &World, node: &str, key: &str) -> f64 {
    let nodes = world.json(&["nodes"]);
    let node = nodes.as_array().and_then(|n| n.iter().find(|n| n["id"] == node).cloned());
    node.and_then(|node| node["load"][key].as_f64()).expect("a load")
}

#[test]
fn a_burdened_node_is_avoided_and_explain_says_so() {
    let Some(world) = world() else { return };
    // Each a process of `lab exec` alone, which takes it along when it is killed.
    let hogs: Vec<_> = (0..4)
        .map(|_| {
            let mut hog = world.node("node2").command(["/bin/bash", "-c", "while :; do :; done"]);
            hog.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a hog in node2")
        })
        .collect();
    wait("node2 to report it", || load(&world, "node2", "cpu_busy") > 0.5);
    let burdened = world.json(&["explain", "--dry-run"]);
    let made: Vec<_> = (0..3).map(|_| world.create(&[])).collect();
    let others = load(&world, "node1", "cpu_busy").max(load(&world, "node3", "cpu_busy"));
    let own = load(&world, "node2", "cpu_busy");
    for mut hog in hogs {
        hog.kill().expect("end the hog");
        hog.wait().expect("ended");
    }
    assert!(own > others, "a hog in node2 shows in node2's report: {own} against {others}");
    assert_ne!(burdened["node"], "node2", "{burdened}");
    for sandbox in &made {
        assert_ne!(sandbox["node"], "node2", "{sandbox}");
        let why = world.json(&["explain", id(sandbox)]);
        assert_eq!(why["node"], sandbox["node"]);
        let verdicts = why["nodes"].as_array().expect("verdicts");
        let score = |node: &str| {
            verdicts.iter().find(|v| v["id"] == node).and_then(|v| v["score"].as_f64())
        };
        let chosen = score(sandbox["node"].as_str().expect("node")).expect("a score");
        assert!(score("node2").is_none_or(|other| other > chosen), "{why}");
    }
    wait("node2 to be free again", || load(&world, "node2", "cpu_busy") < 0.5);
    world.finish();
}

#[test]
fn a_node_without_quorum_takes_nothing_and_serves_on() {
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
