//! The lab as a test sees it: `sandboxctl`, the nodes, and their containers.

use std::{
    collections::BTreeSet,
    io::Write as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use lab::{Lab, Node, image::MINIMAL};
use serde_json::Value;
use standin::faults::{self, Rule};

use crate::foreign::Foreign;

/// Longest wait for anything: a creation under the modelled cost takes 4 s, and CI machines are
/// slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Output and exit code of a command.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A running lab.
pub(crate) struct World {
    pub(crate) lab: Lab,
    foreign: Foreign,
    made: std::cell::RefCell<BTreeSet<String>>,
}

/// Program and environment with which a thread runs `sandboxctl`.
pub(crate) struct Caller {
    program: PathBuf,
    variables: [(&'static str, String); 4],
}

impl Caller {
    /// Returns exit code, stdout and stderr of a call.
    pub(crate) fn ctl(&self, args: &[&str]) -> (i32, String, String) {
        self.ended(Command::new(&self.program).args(args))
    }

    /// Does the same with a time limit; the code is 124 if the call took too long.
    pub(crate) fn ctl_within(&self, seconds: u32, args: &[&str]) -> (i32, String, String) {
        let limit = seconds.to_string();
        self.ended(Command::new("timeout").args(["-k", "5", &limit]).arg(&self.program).args(args))
    }

    fn ended(&self, command: &mut Command) -> (i32, String, String) {
        let variables = self.variables.iter().map(|(name, value)| (name, value));
        let output = command.envs(variables).stdin(Stdio::null()).output().expect("sandboxctl");
        let done = ran(output);
        (done.code, done.text(), done.stderr)
    }
}

/// Returns the lab, or `None` if the environment says to skip these tests.
pub(crate) fn world() -> Option<World> {
    if std::env::var_os("PVE_SANDBOX_SKIP_LAB_TESTS").is_some() {
        println!("SKIPPED by PVE_SANDBOX_SKIP_LAB_TESTS: this test needs the lab");
        return None;
    }
    let lab = Lab::open(Lab::default_dir()).expect("lab directory");
    assert!(lab.is_up(), "no lab is up: run `make test-lab`, or `make lab` first");
    for node in lab.nodes().expect("nodes") {
        // An earlier test may have failed before it restored the lab.
        if node.init().is_none() {
            node.boot().expect("boot");
        }
        node.set_quorum(true).expect("quorum");
        node.set_corosync(true).expect("corosync");
        node.set_pmxcfs(true).expect("pmxcfs");
        faults::clear_plan(&control_dir(&node)).expect("clear the plan");
    }
    let foreign = Foreign::ensure(&lab);
    let world = World { lab, foreign, made: Default::default() };
    wait("three nodes that are ready", || {
        world
            .json(&["nodes"])
            .as_array()
            .is_some_and(|nodes| nodes.len() == 3 && nodes.iter().all(|node| node["ready"] == true))
    });
    wait("nodes that take work", || {
        let nodes = world.json(&["nodes"]);
        let mut all = true;
        for node in nodes.as_array().expect("nodes") {
            let load = &node["load"];
            if load["cordoned"] == true || load["draining"] == true {
                all = false;
                assert_eq!(world.ctl(&["uncordon", id(node)]).code, 0, "{node}");
            }
        }
        all
    });
    Some(world)
}

impl World {
    /// Runs `sandboxctl` with empty stdin.
    pub(crate) fn ctl(&self, args: &[&str]) -> Ran {
        self.ctl_with(args, b"")
    }

    /// Runs `sandboxctl` with that stdin.
    pub(crate) fn ctl_with(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sandboxctl");
        let mut pipe = child.stdin.take().expect("stdin");
        let output = std::thread::scope(|scope| {
            // sandboxctl may end before it has read everything: a closed pipe is not the test's
            // failure.
            scope.spawn(move || drop(pipe.write_all(stdin)));
            child.wait_with_output().expect("output")
        });
        ran(output)
    }

    /// Prepares `sandboxctl` with the lab's environment.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_with_token(args, &self.variable("SANDBOXCTL_TOKEN"))
    }

    /// Prepares `sandboxctl` with another token, or an empty one.
    pub(crate) fn command_with_token(&self, args: &[&str], token: &str) -> Command {
        let mut command = Command::new(self.lab.layout().dir().join("bin/sandboxctl"));
        command.args(args).env("SANDBOXCTL_TOKEN", token);
        command.env("SANDBOXCTL_SNAPSHOT", MINIMAL.snapshot);
        for name in ["SANDBOXCTL_ENDPOINT", "SANDBOXCTL_CA"] {
            command.env(name, self.variable(name));
        }
        command
    }

    /// Prepares `sandboxctl` for a thread.
    pub(crate) fn caller(&self) -> Caller {
        let variable = |name| (name, self.variable(name));
        Caller {
            program: self.lab.layout().dir().join("bin/sandboxctl"),
            variables: [
                variable("SANDBOXCTL_ENDPOINT"),
                variable("SANDBOXCTL_CA"),
                variable("SANDBOXCTL_TOKEN"),
                ("SANDBOXCTL_SNAPSHOT", MINIMAL.snapshot.to_owned()),
            ],
        }
    }

    /// Returns a value from target/lab/env.
    pub(crate) fn variable(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.lab.layout().dir().join("env")).expect("env file");
        let line = format!("export {name}=");
        let value = text.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_default();
        value.trim_matches(['\'', '"']).to_owned()
    }

    /// Runs `sandboxctl --json`, which must succeed.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
        let ran = self.ctl(&args);
        assert_eq!(ran.code, 0, "sandboxctl {args:?}: {}", ran.stderr);
        serde_json::from_slice(&ran.stdout).unwrap_or_else(|error| {
            panic!("sandboxctl {args:?} printed no JSON ({error}): {}", ran.text())
        })
    }

    /// Runs `sandboxctl --json`, which must fail; returns the error's reason and message.
    #[track_caller]
    pub(crate) fn refused(&self, args: &[&str]) -> (String, String) {
        let args: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
        let ran = self.ctl(&args);
        assert_ne!(ran.code, 0, "sandboxctl {args:?} succeeded: {}", ran.text());
        refusal(&ran)
    }

    /// Creates a sandbox, which is deleted when the test ends.
    #[track_caller]
    pub(crate) fn create(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = std::iter::once("create").chain(args.iter().copied()).collect();
        let sandbox = self.json(&args);
        let sandbox = sandbox.as_array().map_or(sandbox.clone(), |list| list[0].clone());
        self.mine(id(&sandbox));
        assert_eq!(sandbox["phase"], "running", "{sandbox}");
        sandbox
    }

    /// Records a sandbox to be deleted at the end.
    pub(crate) fn mine(&self, id: &str) {
        self.made.borrow_mut().insert(id.to_owned());
    }

    #[track_caller]
    pub(crate) fn get(&self, id: &str) -> Value {
        self.json(&["get", id])
    }

    /// Returns the sandboxes of this request_id, including ended ones.
    pub(crate) fn of_request(&self, request_id: &str) -> Vec<Value> {
        let all = self.json(&["ls", "--all"]);
        let all = all.as_array().expect("a list");
        all.iter().filter(|sandbox| sandbox["request_id"] == request_id).cloned().collect()
    }

    /// Waits until the sandbox has a phase.
    #[track_caller]
    pub(crate) fn wait_phase(&self, id: &str, phase: &str) -> Value {
        wait(&format!("{id} to be {phase}"), || self.get(id)["phase"] == phase);
        self.get(id)
    }

    /// Plans faults for `pct` on a node.
    pub(crate) fn faults(&self, node: &str, rules: &[Rule]) {
        faults::write_plan(&control_dir(&self.node(node)), rules).expect("fault plan");
    }

    pub(crate) fn node(&self, name: &str) -> Node {
        self.lab.node(name).expect("node")
    }

    /// Runs a shell line in a node and returns its output.
    pub(crate) fn shell(&self, node: &str, line: &str) -> String {
        let output = self.node(node).shell(line).expect("a shell in the node");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Lists everything of a vmid that is left on a node: config, volume, veth, cgroup, lock,
    /// process.
    pub(crate) fn left_of(&self, node: &str, vmid: u64) -> String {
        self.shell(
            node,
            &format!(
                "ls -d /etc/pve/lxc/{vmid}.conf /rpool/data/subvol-{vmid}-* \
                 /sys/class/net/veth{vmid}i0 /sys/fs/cgroup/lxc/{vmid} 2>/dev/null; \
                 grep -H '^lock:' /etc/pve/lxc/*.conf; \
                 pgrep -af '[l]xc-start.*{vmid}|[t]ask UPID.*:{vmid}:'; true"
            ),
        )
    }

    /// Checks the invariants over controller, journals, configs and volumes.
    #[track_caller]
    pub(crate) fn fsck(&self) {
        wait("a clean fsck", || self.ctl(&["fsck"]).code == 0);
    }

    /// Deletes the test's sandboxes and checks that nothing else was touched.
    #[track_caller]
    pub(crate) fn finish(self) {
        for node in self.lab.nodes().expect("nodes") {
            faults::clear_plan(&control_dir(&node)).expect("clear the plan");
        }
        let made: Vec<String> = self.made.borrow().iter().cloned().collect();
        for id in made {
            let ran = self.ctl(&["rm", &id]);
            assert_eq!(ran.code, 0, "rm {id}: {}", ran.stderr);
            self.wait_phase(&id, "deleted");
        }
        self.fsck();
        self.foreign.check(&self.lab);
    }
}

/// Deletes the sandboxes of a test that fails, so that the tests after it do not find them.
impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for id in self.made.borrow().iter() {
            // A second panic would end the other tests, too.
            if let Ok(output) = self.command(&["rm", id]).output() {
                eprintln!("rm {id}: {}", output.status);
            }
        }
    }
}

pub(crate) fn id(sandbox: &Value) -> &str {
    sandbox["id"].as_str().expect("an id")
}

pub(crate) fn vmid(sandbox: &Value) -> u64 {
    sandbox["vmid"].as_u64().expect("a vmid")
}

pub(crate) fn node(sandbox: &Value) -> &str {
    sandbox["node"].as_str().expect("a node")
}

/// Returns reason and message of an error that `sandboxctl --json` printed.
#[track_caller]
pub(crate) fn refusal(ran: &Ran) -> (String, String) {
    let line = ran.stderr.lines().find(|line| line.starts_with('{')).unwrap_or_default();
    let error: Value = serde_json::from_str(line)
        .unwrap_or_else(|_| panic!("no JSON error on stderr: {}", ran.stderr));
    let text = |key: &str| error["error"][key].as_str().unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

pub(crate) fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits until a condition is true; the failure names what was waited for.
#[track_caller]
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Returns a request_id that no earlier run used.
pub(crate) fn unique(name: &str) -> String {
    let now = std::time::UNIX_EPOCH.elapsed().expect("a clock after 1970");
    format!("{name}-{}", now.as_nanos())
}

fn control_dir(node: &Node) -> PathBuf {
    node.root().expect("a node that is up").join("run/pct-standin")
}
