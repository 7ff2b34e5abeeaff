//! Procedures of docs/operations.md that need a second node: a node is lost, and a sandbox is moved. The commands
//! are read from the page. `tests/deb` follows the other procedures.

#[path = "../docs/in_the_lab.rs"]
mod in_the_lab;

use lab::daemons::AGENT;
use serde_json::Value;

use self::in_the_lab::IN_THE_LAB;
use crate::{
    nodes::{Shared, carry},
    procedures::blocks,
    world::{PATIENCE, Ran, World, id, node, vmid, wait, world},
};

const PAGE: &str = "operations.md";
/// Node that stands for `pve2` and `pve3` of the page. The controller has discovered it, so that it can be forgotten.
const NODE: &str = "node3";
/// Node whose agent tells of the others.
const OTHER: &str = "node1";

/// Command of the page, for `sandboxctl`.
#[derive(Debug)]
struct Words(Vec<String>);

impl Words {
    fn run(&self, world: &World) -> Ran {
        world.ctl(&self.words())
    }

    fn words(&self) -> Vec<&str> {
        self.0.iter().map(String::as_str).collect()
    }
}

/// Reads the commands below a heading, with `NODE` and this sandbox in the place of the examples.
#[track_caller]
fn commands(heading: &str, sandbox: &str) -> Vec<Words> {
    assert!(IN_THE_LAB.contains(&heading), "{heading} is not in the list that tests/docs checks");
    let block = blocks(PAGE).into_iter().find(|block| block.heading == heading);
    let block = block.unwrap_or_else(|| panic!("{PAGE} has no commands below {heading}"));
    let read = |command: &String| {
        let (program, words) = command.split_once(' ').unwrap_or_default();
        assert_eq!(program, "sandboxctl", "{command} is not known here");
        let of_the_lab = |word: &str| match word {
            "pve2" | "pve3" => NODE.to_owned(),
            "ID" => sandbox.to_owned(),
            other => other.to_owned(),
        };
        Words(words.split(' ').map(of_the_lab).collect())
    };
    block.commands.iter().map(read).collect()
}

/// The node without power, until this is dropped. Then it boots. It is still in the cluster and `discover` is on, so it
/// is found again without a join, when the controller next connects to another node's agent.
struct Lost<'a>(&'a World);

impl<'a> Lost<'a> {
    fn now(world: &'a World) -> Self {
        world.node(NODE).kill().expect("power cut");
        Self(world)
    }
}

impl Drop for Lost<'_> {
    fn drop(&mut self) {
        let tells = || self.0.node(OTHER).services()?.restart(AGENT, PATIENCE);
        // A second panic would hide the first. The next test waits for all nodes.
        if let Err(error) = self.0.node(NODE).boot().and_then(|()| tells()) {
            eprintln!("{NODE} is not back: {error:#}");
        }
    }
}

/// Names of the nodes that the controller knows, with whether they are ready.
fn nodes(world: &World) -> Vec<(String, bool)> {
    let all = world.json(&["node", "ls"]);
    let of =
        |node: &Value| (node["id"].as_str().unwrap_or_default().to_owned(), node["ready"] == true);
    all.as_array().expect("nodes").iter().map(of).collect()
}

#[test]
fn node_is_given_up_as_the_page_says_and_found_again_when_it_is_back() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", NODE]);
    let own = id(&sandbox);
    let commands = commands("Lose a node", own);
    let [told, forget] = commands.as_slice() else { panic!("another block: {commands:?}") };
    assert!(told.0.iter().any(|word| word == "--dry-run"), "{told:?}");
    let (reason, _) = world.refused(&forget.words());
    assert_eq!(reason, "NODE_IN_USE", "it answers");

    let lost = Lost::now(&world);
    world.wait_phase(own, "unreachable");
    let ran = told.run(&world);
    assert!(ran.code == 0 && ran.text().contains(own), "{}{}", ran.text(), ran.stderr);
    assert!(ran.text().contains("nothing was done"), "{}", ran.text());
    assert_eq!(world.get(own)["phase"], "unreachable");
    let (reason, _) = world.refused(&["node", "forget", NODE]);
    assert_eq!(reason, "NODE_IN_USE", "it has a sandbox, and nobody says that it is lost");
    let ran = forget.run(&world);
    assert!(ran.code == 0 && ran.text().contains("is forgotten"), "{}{}", ran.text(), ran.stderr);
    let gone = world.get(own);
    assert_eq!((&gone["phase"], &gone["cause"]), (&"deleted".into(), &"node_lost".into()));
    assert!(nodes(&world).iter().all(|(name, _)| name != NODE), "{:?}", nodes(&world));
    assert_ne!(node(&world.create(&[])), NODE, "creations go on elsewhere");

    drop(lost);
    wait("three nodes that are ready", || {
        let nodes = nodes(&world);
        nodes.len() == 3 && nodes.iter().all(|(_, ready)| *ready)
    });
    // It ran when the power was cut, so it is started again.
    world.wait_phase(own, "running");
    wait("a command in it", || world.ctl(&["exec", own, "--", "true"]).code == 0);
    world.finish();
}

#[test]
fn sandbox_is_moved_to_another_node_as_the_page_says() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", NODE, "--meta", "colour=green"]);
    let (own, number) = (id(&sandbox), vmid(&sandbox));
    assert_eq!(world.ctl(&["exec", own, "--", "sh", "-c", "echo kept > /root/kept"]).code, 0);

    let mut shared = Some(Shared::of(&world));
    for command in commands("Move a sandbox to another node", own) {
        let ran = command.run(&world);
        assert_eq!(ran.code, 0, "{command:?}: {}{}", ran.text(), ran.stderr);
        if command.0.iter().any(|word| word == "drain") {
            let to = node(&world.get(own)).to_owned();
            let told = format!("{own} moved to {to}");
            assert!(to != NODE && ran.text().contains(&told), "{}{}", ran.text(), ran.stderr);
            drop(shared.take());
            carry(&world, number, NODE, &to);
        }
    }
    assert!(shared.is_none(), "no command has moved it");
    let moved = world.get(own);
    assert_eq!((&moved["phase"], vmid(&moved)), (&"running".into(), number));
    assert_eq!(moved["metadata"]["colour"], "green");
    assert_eq!(world.ctl(&["exec", own, "--", "cat", "/root/kept"]).text().trim(), "kept");
    wait("the node to take work again", || {
        world.json(&["explain", "--dry-run", "--node", NODE])["node"] == NODE
    });
    world.finish();
}
