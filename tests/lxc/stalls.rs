//! Stalled streams on a real node: they delay no other call there.

use std::{
    fs::File,
    process::{Child, Command, Stdio},
};

use crate::world::{World, id, node, ran, vmid, wait, world};

/// Number of calls of another team beside the streams.
const CALLS: usize = 100;
/// Longest call in seconds, with the start of the program, on a machine with much other work.
const LIMIT_S: &str = "15";

/// Programs that end with the test.
#[derive(Default)]
struct Running(Vec<Child>);

impl Running {
    fn start(&mut self, command: &mut Command, stdin: Stdio, stdout: Stdio) {
        let command = command.stdin(stdin).stdout(stdout).stderr(Stdio::null());
        self.0.push(command.spawn().expect("sandboxctl"));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // The child may have ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Runs `sandboxctl` as a team; it must succeed in time.
#[track_caller]
fn in_time(world: &World, token: &str, args: &[&str]) -> String {
    let inner = world.command_with_token(args, token);
    let mut command = Command::new("timeout");
    command.args(["-k", "5", LIMIT_S]).arg(inner.get_program()).args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let done = ran(command.stdin(Stdio::null()).output().expect("sandboxctl"));
    assert_eq!(done.code, 0, "{args:?}: {}", done.stderr);
    done.text()
}

#[test]
fn stalled_streams_delay_no_other_call_of_the_node() {
    let Some(world) = world() else { return };
    let (red, blue) = (world.variable("SANDBOXCTL_TOKEN"), world.variable("LAB_OTHER_TEAM_TOKEN"));
    let (busy, paused) = (world.create(&["--node", "node1"]), world.create(&["--node", "node1"]));
    let other = in_time(&world, &blue, &["--json", "create", "--node", "node1"]);
    let other: serde_json::Value = serde_json::from_str(&other).expect("JSON");
    let other = other.as_array().map_or(other.clone(), |list| list[0].clone());
    let (busy, other, frozen) = (id(&busy), id(&other), id(&paused));

    let mut running = Running::default();
    for _ in 0..3 {
        let mut yes = world.command(&["exec", busy, "--", "yes"]);
        running.start(&mut yes, Stdio::null(), Stdio::piped());
    }
    let zero = File::open("/dev/zero").expect("/dev/zero");
    let mut deaf = world.command(&["exec", "-i", busy, "--", "sleep", "100"]);
    running.start(&mut deaf, zero.into(), Stdio::null());
    let big = tempfile::NamedTempFile::new().expect("a file");
    big.as_file().set_len(1 << 30).expect("a large file without content");
    let from = big.path().to_str().expect("UTF-8");
    // Detected by its name: its disk usage appears only when the disk is written, seconds later.
    let arrives = format!("ls -A /rpool/data/subvol-{}-disk-0/root", vmid(&paused));
    let before = world.shell(node(&paused), &arrives);
    let mut upload = world.command(&["cp", from, &format!("{frozen}:/root/big")]);
    running.start(&mut upload, Stdio::null(), Stdio::null());
    wait("the upload to arrive", || world.shell(node(&paused), &arrives) != before);
    in_time(&world, &red, &["pause", frozen]);
    wait("all commands to run", || {
        let list = world.json(&["ps", busy]);
        list.as_array().is_some_and(|list| list.len() >= 4)
    });

    for number in 0..CALLS {
        let args: &[&str] = match number % 5 {
            0 => &["get", other],
            1 => &["exec", other, "--", "true"],
            2 => &["ps", other],
            3 => &["lifetime", other],
            _ => &["ls"],
        };
        in_time(&world, &blue, args);
    }
    // The team's own calls work, too, including those that end the stall.
    in_time(&world, &red, &["exec", busy, "--", "true"]);
    in_time(&world, &red, &["resume", frozen]);
    let list = world.json(&["ps", busy]);
    let runs = |exec: &&serde_json::Value| exec["code"].is_null() && exec["lost"].is_null();
    for exec in list.as_array().expect("a list").iter().filter(runs) {
        let exec_id = exec["id"].as_str().expect("a name");
        in_time(&world, &red, &["kill", busy, exec_id, "--signal", "KILL"]);
    }
    for node in world.json(&["nodes"]).as_array().expect("nodes") {
        assert_eq!(node["ready"], true, "{node}");
    }
    drop(running);
    in_time(&world, &blue, &["rm", other]);
    world.finish();
}

#[test]
fn departed_caller_is_noticed_despite_unread_stdin() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    let id = id(&sandbox);
    let state = || {
        let list = world.json(&["ps", id]);
        let list = list.as_array().expect("a list");
        let deaf = list.iter().find(|exec| exec["id"] == "deaf");
        deaf.map(|exec| exec["state"].clone()).unwrap_or_default()
    };
    let mut running = Running::default();
    let zero = File::open("/dev/zero").expect("/dev/zero");
    let mut deaf = world.command(&["exec", "-i", "--exec-id", "deaf", id, "--", "sleep", "200"]);
    running.start(&mut deaf, zero.into(), Stdio::null());
    wait("the command to have its caller", || state() == "attached");
    drop(running);
    wait("the node to miss the caller", || state() == "running");
    assert_eq!(world.ctl(&["kill", id, "deaf", "--signal", "KILL"]).code, 0);
    world.finish();
}
