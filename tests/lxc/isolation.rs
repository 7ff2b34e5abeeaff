//! Isolation: what root in a sandbox reaches, and as whom it can speak, tried from inside real
//! containers. Each probe must succeed once our rules are away: otherwise it proves nothing.

use std::{collections::BTreeMap, process::Command};

use lab::{
    daemons::AGENT,
    probes::{self, Seen},
};
use serde_json::Value;

use crate::{
    http::get,
    world::{PATIENCE, World, id, node, ran, vmid, wait, world},
};

/// Network beside node1: see `probes::Lan`.
pub(crate) struct Lan(#[expect(dead_code, reason = "removed with it")] probes::Lan);

impl Lan {
    pub(crate) fn new(world: &World) -> Self {
        Self(probes::Lan::new(&world.node("node1")).expect("a network beside node1"))
    }
}

/// Process of the agent that is stopped while this lives: nothing puts the rules back.
pub(crate) struct Held<'a>(&'a World);

impl<'a> Held<'a> {
    pub(crate) fn new(world: &'a World) -> Self {
        world.shell("node1", "pkill -STOP -f '^/[^ ]*pve-sandbox-agent run'");
        Self(world)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.shell("node1", "pkill -CONT -f '^/[^ ]*pve-sandbox-agent run'");
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

/// Creates a sandbox on node1 for the second team.
fn of_other_team(world: &World) -> Value {
    let args = ["--json", "create", "--node", "node1", "--expose", "web=8000"];
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

fn seen(sandbox: &Value) -> Seen {
    Seen::new(vmid(sandbox), sandbox["ip"].as_str().expect("an address")).expect("an address")
}

#[test]
fn sandbox_reaches_the_world_and_nothing_beside_it() {
    let Some(world) = world() else { return };
    let lan = Lan::new(&world);
    let one = world.create(&["--node", "node1"]);
    let two = of_other_team(&world);
    let (own, other) = (seen(&one), seen(&two));
    let page = format!("port-8000-vm-{}.sandbox.localhost", other.vmid);
    wait("the neighbour's page", || get(node(&two), &page).0 == 200);

    let closed = probes::closed(&world.node("node1"), &other).expect("targets");
    if !closed.contains_key("host, IPv6") {
        println!("the sandboxes have no IPv6 here: it is not probed");
    }
    let open = probes::open();
    let all = |reached: &BTreeMap<String, bool>, is: bool| {
        let wrong: Vec<_> = reached.iter().filter(|(_, reached)| **reached != is).collect();
        assert!(wrong.is_empty(), "expected {is}, found {wrong:?}");
    };
    let isolated = |world: &World| {
        all(&probe(world, own.vmid, &closed), false);
        all(&probe(world, own.vmid, &open), true);
        let drawn = spoofs(world, &own, &other);
        assert!(drawn.values().all(|drawn| !drawn), "{drawn:?}");
        assert_eq!(get(node(&two), &page).0, 200, "the neighbour's page");
    };
    isolated(&world);

    // The rules outlive their agent.
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    isolated(&world);
    wait("the agent again", || world.ctl(&["exec", id(&one), "--", "true"]).code == 0);
    isolated(&world);

    // Without the rules every probe gets through, so each of them proves something.
    let held = Held::new(&world);
    world.shell("node1", "nft delete table bridge pve_sandbox; nft delete table inet pve_sandbox");
    world.shell("node1", "echo 0 >/sys/class/net/vmbr0/bridge/no_linklocal_learn");
    // Not at the first try: a kernel that has just found no neighbour waits before it asks again.
    let through = |targets: &BTreeMap<&str, String>| {
        wait("every probe to get through", || {
            probe(&world, own.vmid, targets).values().all(|reached| *reached)
        })
    };
    through(&closed);
    through(&open);
    let drawn = spoofs(&world, &own, &other);
    assert!(drawn.values().all(|drawn| *drawn), "{drawn:?}");
    drop(held);

    // The agent puts them back, and tells.
    wait("the rules again", || {
        world.shell("node1", "nft list tables").matches("pve_sandbox").count() == 2
    });
    wait("a finding", || world.ctl(&["fsck"]).text().contains("isolation rules"));
    isolated(&world);

    remove_of_other_team(&world, &two);
    drop(lan);
    world.finish();
}
