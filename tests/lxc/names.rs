//! Host names by the name of a sandbox, from the controller's word to the answers of two nodes: the one that has the
//! sandbox, and one that knows of it only what it was told.

use std::process::Command;

use lab::daemons::{AGENT, CONTROLLER};
use serde_json::Value;

use crate::{
    http::try_get,
    world::{PATIENCE, World, id, ran, unique, wait, world},
};

/// Nodes that are asked. The second has the sandbox.
const NODES: [&str; 2] = ["node1", "node2"];

/// Returns status and body of `/id` through a node, which may not answer.
fn answer(node: &str, host: &str) -> Option<(u16, String)> {
    let (status, body) = try_get(node, host, "/id")?;
    Some((status, body.trim().to_owned()))
}

/// Returns true when a node says that there is no such host.
fn is_unknown(node: &str, host: &str) -> bool {
    answer(node, host).is_some_and(|(status, _)| status == 404)
}

/// Prepares `sandboxctl --json` as the other team.
fn other_team(world: &World, args: &[&str]) -> Command {
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let args: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
    world.command_with_token(&args, &token)
}

/// Runs `sandboxctl --json` as the other team, which must succeed.
#[track_caller]
fn as_other_team(world: &World, args: &[&str]) -> Value {
    let done = ran(other_team(world, args).output().expect("sandboxctl"));
    assert_eq!(done.code, 0, "{args:?}: {}", done.stderr);
    serde_json::from_slice(&done.stdout).expect("JSON")
}

/// Sandbox of the other team, which is deleted when the test fails, too.
pub(crate) struct Theirs<'a> {
    world: &'a World,
    pub(crate) id: String,
}

impl<'a> Theirs<'a> {
    #[track_caller]
    pub(crate) fn create(world: &'a World, args: &[&str]) -> Self {
        let made = as_other_team(world, args);
        let sandbox = made.as_array().map_or(&made, |list| &list[0]);
        Self { world, id: id(sandbox).to_owned() }
    }

    /// Deletes the sandbox, and waits until it is gone.
    #[track_caller]
    pub(crate) fn delete(self) {
        as_other_team(self.world, &["rm", &self.id]);
        wait("the deletion of the other team's sandbox", || {
            as_other_team(self.world, &["get", &self.id])["phase"] == "deleted"
        });
    }
}

impl Drop for Theirs<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        // A second panic would end the other tests, too.
        if let Ok(output) = other_team(self.world, &["rm", &self.id]).output() {
            eprintln!("rm {}: {}", self.id, output.status);
        }
    }
}

/// The controller, stopped until this is dropped.
struct Away<'a>(&'a World);

impl<'a> Away<'a> {
    fn new(world: &'a World) -> Self {
        world.lab.services().stop(CONTROLLER, PATIENCE).expect("stopped");
        Self(world)
    }
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        // A second panic would end the other tests, too.
        if let Err(error) = self.0.lab.services().start(CONTROLLER, PATIENCE) {
            eprintln!("the controller does not start: {error:#}");
        }
    }
}

#[test]
fn name_leads_from_two_nodes_to_its_own_teams_sandbox_until_that_is_deleted() {
    // `hostname` is the id: so the page says which sandbox answers.
    const SAYS_ITS_ID: &str = "hostname > /srv/www/id";
    let Some(world) = world() else { return };
    let name = unique("named");
    let create = ["create", "--name", &name, "--expose", "web=8000", "--node"];
    let own = world.create(&[&create[1..], &["node2"]].concat());
    assert_eq!(world.ctl(&["exec", id(&own), "--shell", SAYS_ITS_ID]).code, 0);
    let host = format!("{name}--demo.sandbox.localhost");
    let yes = Some((200, id(&own).to_owned()));
    for node in NODES {
        wait(&format!("{host} by way of {node}"), || answer(node, &host) == yes);
    }
    // With the port, too; and no other port, and no other name.
    let with_port = |port: u16| format!("{port}-{host}");
    let others = format!("{name}--other.sandbox.localhost");
    for node in NODES {
        assert_eq!(answer(node, &with_port(8000)), yes, "{node}");
        for closed in [&with_port(22), &format!("x{host}"), &others] {
            assert!(is_unknown(node, closed), "{closed} by way of {node}");
        }
    }

    // Another team's sandbox of the same name is another one.
    let theirs = Theirs::create(&world, &[&create[..], &["node1"]].concat());
    let wrote = other_team(&world, &["exec", &theirs.id, "--shell", SAYS_ITS_ID]).output();
    assert!(wrote.expect("sandboxctl").status.success());
    let theirs_answers = Some((200, theirs.id.clone()));
    for node in NODES {
        wait(&format!("{others} by way of {node}"), || answer(node, &others) == theirs_answers);
        assert_eq!(answer(node, &host), yes, "{node}");
    }

    // The node that was told keeps it, without the controller and over a restart of its agent.
    let away = Away::new(&world);
    let services = world.node("node1").services().expect("services");
    services.restart(AGENT, PATIENCE).expect("restarted");
    for node in NODES {
        wait(&format!("{host} by way of {node} again"), || answer(node, &host) == yes);
    }
    drop(away);

    wait("the deletion", || world.ctl(&["rm", id(&own)]).code == 0);
    world.wait_phase(id(&own), "deleted");
    for node in NODES {
        wait(&format!("{host} to be gone from {node}"), || is_unknown(node, &host));
        assert_eq!(answer(node, &others), theirs_answers, "{node}");
    }
    theirs.delete();
    world.finish();
}
