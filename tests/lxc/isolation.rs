//! Isolation: what root in a sandbox reaches, and as whom it can speak, tried from inside real
//! containers; after a crash of the agent and a power cut of the node, too. Each probe must succeed once
//! our rules are away: otherwise it proves nothing.

use std::{collections::BTreeMap, process::Command};

use lab::{
    daemons::AGENT,
    probes::{self, Seen},
};
use serde_json::Value;

use crate::{
    http::{get, status},
    world::{PATIENCE, World, id, node, ran, vmid, wait, world},
};

/// Network beside node1: see `probes::Lan`.
pub(crate) struct Lan(#[expect(dead_code, reason = "removed with it")] probes::Lan);

impl Lan {
    pub(crate) fn new(world: &World) -> Self {
        let (node, other) = (world.node("node1"), world.node("node2"));
        Self(probes::Lan::new(&node, &other).expect("a network beside node1"))
    }
}

/// Process of a node's agent that is stopped while this lives: nothing puts the rules back.
pub(crate) struct Held<'a>(&'a World, &'static str);

impl<'a> Held<'a> {
    /// Stops the agent of node1.
    pub(crate) fn new(world: &'a World) -> Self {
        Self::on(world, "node1")
    }

    fn on(world: &'a World, node: &'static str) -> Self {
        world.shell(node, "pkill -STOP -f '^/[^ ]*pve-sandbox-agent run'");
        Self(world, node)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.shell(self.1, "pkill -CONT -f '^/[^ ]*pve-sandbox-agent run'");
    }
}

/// Runs a Python script in a container of node1, without the agent.
pub(crate) fn python(world: &World, vmid: u64, script: &str, args: &[String]) -> String {
    probes::python(&world.node("node1"), vmid, script, args).expect("a script in a container")
}

pub(crate) fn probe(
    world: &World,
    vmid: u64,
    targets: &BTreeMap<&str, String>,
) -> BTreeMap<String, bool> {
    probes::reach(&world.node("node1"), vmid, targets).expect("a probe")
}

fn spoofs(world: &World, from: &Seen, victim: &Seen) -> BTreeMap<&'static str, bool> {
    probes::spoofs(&world.node("node1"), from, victim).expect("frames in another's name")
}

/// Lets a sandbox of node1 send errors about connections of others; returns who got one.
pub(crate) fn errors(world: &World, from: &Seen, neighbour: &Seen) -> BTreeMap<&'static str, bool> {
    probes::errors(&world.node("node1"), from, neighbour).expect("errors about connections")
}

/// Creates a sandbox for the second team.
fn of_other_team(world: &World, node: &str) -> Value {
    let args = ["--json", "create", "--node", node, "--expose", "web=8000"];
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let created = ran(world.command_with_token(&args, &token).output().expect("sandboxctl"));
    assert_eq!(created.code, 0, "{}", created.stderr);
    let sandbox: Value = serde_json::from_slice(&created.stdout).expect("JSON");
    sandbox.as_array().map_or(sandbox.clone(), |list| list[0].clone())
}

fn remove_of_other_team(world: &World, sandbox: &Value) {
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let mut command: Command = world.command_with_token(&["rm", id(sandbox)], &token);
    let removed = ran(command.output().expect("sandboxctl"));
    assert_eq!(removed.code, 0, "{}", removed.stderr);
}

pub(crate) fn seen(sandbox: &Value) -> Seen {
    Seen::new(vmid(sandbox), sandbox["ip"].as_str().expect("an address")).expect("an address")
}

fn page(sandbox: &Value) -> String {
    format!("port-8000-vm-{}.sandbox.localhost", vmid(sandbox))
}

/// Sandbox of one team on node1, and two of another team: one beside it, and one on node2.
struct Trio<'a> {
    world: &'a World,
    own: Seen,
    beside: Seen,
    far: Seen,
    /// Page of the one beside it.
    page: String,
}

impl Trio<'_> {
    /// Returns what no sandbox may reach. The addresses by IPv6 may be others after a boot.
    fn closed(&self) -> BTreeMap<&'static str, String> {
        probes::closed(&self.world.node("node1"), &self.beside).expect("targets")
    }

    fn beyond(&self) -> [BTreeMap<&'static str, String>; 2] {
        let other_node = probes::of_another_node(&self.world.node("node2"));
        [other_node, probes::of_far_sandbox(&self.far)]
    }

    #[track_caller]
    fn all(&self, targets: &BTreeMap<&str, String>, is: bool) {
        let reached = probe(self.world, self.own.vmid, targets);
        let wrong: Vec<_> = reached.iter().filter(|(_, reached)| **reached != is).collect();
        assert!(wrong.is_empty(), "expected {is}, found {wrong:?}");
    }

    #[track_caller]
    fn is_isolated(&self) {
        self.all(&self.closed(), false);
        for targets in self.beyond() {
            self.all(&targets, false);
        }
        self.all(&probes::open(), true);
        let drawn = spoofs(self.world, &self.own, &self.beside);
        assert!(drawn.values().all(|drawn| !drawn), "{drawn:?}");
        let told = errors(self.world, &self.own, &self.beside);
        assert!(told.values().all(|told| !told), "{told:?}");
        assert_eq!(get("node1", &self.page).0, 200, "the neighbour's page");
    }

    /// Waits until each target was reached once. Not at the first try: a kernel that has just found no
    /// neighbour waits before it asks again, and says only now and then that a port has no program.
    #[track_caller]
    fn gets_through(&self, targets: &BTreeMap<&str, String>) {
        let mut left = targets.clone();
        wait("every probe to get through", || {
            let reached = probe(self.world, self.own.vmid, &left);
            left.retain(|name, _| !reached[*name]);
            left.is_empty()
        });
    }
}

const NO_RULES: &str =
    "nft delete table bridge pve_sandbox; nft delete table inet pve_sandbox; true";

#[test]
fn sandbox_reaches_the_world_and_nothing_beside_it() {
    let Some(world) = world() else { return };
    let lan = Lan::new(&world);
    let one = world.create(&["--node", "node1"]);
    let (two, there) = (of_other_team(&world, "node1"), of_other_team(&world, "node2"));
    let pages_are_there = || {
        for sandbox in [&two, &there] {
            wait("a neighbour's page", || status(node(sandbox), &page(sandbox)) == Some(200));
        }
    };
    pages_are_there();
    let trio = Trio {
        world: &world,
        own: seen(&one),
        beside: seen(&two),
        far: seen(&there),
        page: page(&two),
    };
    trio.is_isolated();

    // The rules outlive their agent.
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    trio.is_isolated();
    wait("the agent again", || world.ctl(&["exec", id(&one), "--", "true"]).code == 0);
    trio.is_isolated();

    // A power cut takes the rules; they are there again before a sandbox is.
    drop(lan);
    world.node("node1").reboot().expect("power cut and boot");
    wait("it to run in its next boot", || {
        let now = world.get(id(&one));
        now["phase"] == "running" && now["boot"] == 2
    });
    let lan = Lan::new(&world);
    pages_are_there();
    trio.is_isolated();

    // Without the rules every probe gets through, so each of them proves something.
    let held = [Held::on(&world, "node1"), Held::on(&world, "node2")];
    world.shell("node1", NO_RULES);
    world.shell("node1", "echo 0 >/sys/class/net/vmbr0/bridge/no_linklocal_learn");
    trio.gets_through(&trio.closed());
    trio.gets_through(&probes::open());
    let [other_node, far_sandbox] = trio.beyond();
    trio.gets_through(&other_node);
    // Node2 lets nobody in to its own sandboxes, whatever node1 does.
    trio.all(&far_sandbox, false);
    world.shell("node2", NO_RULES);
    trio.gets_through(&far_sandbox);
    let drawn = spoofs(&world, &trio.own, &trio.beside);
    assert!(drawn.values().all(|drawn| *drawn), "{drawn:?}");
    let told = errors(&world, &trio.own, &trio.beside);
    assert!(told.values().all(|told| *told), "{told:?}");
    drop(held);

    // The agents put them back, and tell.
    for node in ["node1", "node2"] {
        wait("the rules again", || {
            world.shell(node, "nft list tables").matches("pve_sandbox").count() == 2
        });
    }
    wait("a finding", || world.ctl(&["fsck"]).text().contains("isolation rules"));
    trio.is_isolated();

    for sandbox in [&two, &there] {
        remove_of_other_team(&world, sandbox);
    }
    drop(lan);
    world.finish();
}
