//! The log of events on real nodes: the whole life of a sandbox, through a crash of the controller,
//! read in two parts.

use crate::world::{World, id, node, wait, world};

/// Reads a sandbox's events after a revision: kinds and actors, and the last revision.
fn read(world: &World, id: &str, since: u64) -> (Vec<(String, String)>, u64) {
    let ran = world.ctl(&["--json", "events", id, "--since", &since.to_string()]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let events: Vec<serde_json::Value> =
        ran.text().lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    let last = events.last().and_then(|event| event["revision"].as_u64()).unwrap_or(since);
    let word = |event: &serde_json::Value, key: &str| event[key].as_str().expect(key).to_owned();
    (events.iter().map(|event| (word(event, "kind"), word(event, "actor"))).collect(), last)
}

fn kinds(told: &[(String, String)]) -> Vec<&str> {
    told.iter().map(|(kind, _)| kind.as_str()).collect()
}

#[test]
fn event_log_has_the_whole_life_of_a_sandbox_with_its_actors() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    world.json(&["pause", id]);
    let (told, seen) = read(&world, id, 0);
    assert_eq!(kinds(&told), ["create_asked", "created", "pause_asked", "paused"]);
    // The public part of the token that the lab's sandboxctl uses.
    let token = world.variable("SANDBOXCTL_TOKEN");
    let public = token.split('_').nth(1).expect("a token").to_owned();
    assert!(told.iter().all(|(_, actor)| *actor == public), "{told:?}");

    world.json(&["resume", id]);
    world.json(&["stop", id]);
    world.wait_phase(id, "stopped");
    world.json(&["rm", id]);
    wait("the end to be told", || kinds(&read(&world, id, seen).0).last() == Some(&"deleted"));
    let (rest, _) = read(&world, id, seen);
    let expected = ["resume_asked", "resumed", "stop_asked", "stopped", "delete_asked", "deleted"];
    assert_eq!(kinds(&rest), expected);
    let (whole, _) = read(&world, id, 0);
    assert_eq!(whole, [told, rest].concat());
}

#[test]
fn node_reboot_is_logged_with_the_agent_as_actor() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let (id, name) = (id(&sandbox), node(&sandbox));
    let (_, seen) = read(&world, id, 0);
    let host = world.node(name);
    host.kill().expect("power cut");
    host.boot().expect("boot");
    wait("the sandbox to be told of", || !read(&world, id, seen).0.is_empty());
    let (told, _) = read(&world, id, seen);
    assert!(told.iter().all(|(_, actor)| actor == "agent"), "{told:?}");
    let ran = world.ctl(&["--json", "events", "--all-teams"]);
    let down = |line: &str| {
        let event: serde_json::Value = serde_json::from_str(line).expect("json");
        event["kind"] == "node_down" && event["node"] == *name
    };
    assert!(ran.text().lines().any(down), "{}{}", ran.text(), ran.stderr);
    world.finish();
}
