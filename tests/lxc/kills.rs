//! Kills everything that can be killed, repeatedly, under a load of callers: the agents, the
//! controller, a worker of `pct`, Caddy, a container's init. Web requests and SSH logins are answered
//! again in time, each by the sandbox that it was for. Afterwards every answer that a caller got must
//! be true, and nothing may be left behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lab::{
    daemons::{AGENT, CADDY, CONTROLLER},
    supervise::{Services, State},
};
use serde_json::Value;
use standin::faults::{Action, Rule};

use crate::{
    history::{History, Known, Sandbox},
    http,
    login::Logins,
    world::{Caller, PATIENCE, World, unique, wait, world},
};

/// Number of kills in a plain run; `PVE_SANDBOX_CHAOS` overrides it.
const KILLS: u32 = 50;
/// Longest call of `sandboxctl`, in seconds.
const CALL_S: u32 = 90;
/// Longest time until a living sandbox answers a web request or a login, whatever is killed meanwhile. One attempt may
/// last 15 s, and several must fit.
const ANSWERED: Duration = PATIENCE.saturating_mul(2);
/// Number of sandboxes that a creating caller keeps.
const KEPT: usize = 2;
/// Duration of a step of `pct`, in milliseconds, long enough to be hit by a kill.
const STEP_MS: u64 = 150;
/// Longest search for a worker.
const LOOK: Duration = Duration::from_secs(20);
const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// Victims of the kills, in turn: each gets a fifth.
const VICTIMS: [Victim; 5] =
    [Victim::Agent, Victim::Worker, Victim::Controller, Victim::Init, Victim::Caddy];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Agent,
    Controller,
    Worker,
    Caddy,
    Init,
}

/// SplitMix64 generator. The seed fixes the actions and their times, but not what they hit.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn node(&mut self) -> &'static str {
        NODES[usize::try_from(self.roll() % 3).expect("an index")]
    }

    fn pause(&mut self, ms_max: u64) {
        thread::sleep(Duration::from_millis(self.roll() % ms_max));
    }
}

/// Answers that a lane has got.
#[derive(Debug, Default)]
struct Answers {
    count: u32,
    /// Longest wait for one.
    longest: Duration,
}

/// A caller in its own thread.
struct Lane<'a> {
    caller: Caller,
    history: &'a History,
    stop: &'a AtomicBool,
    prefix: String,
    dice: Dice,
}

impl Lane<'_> {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn ctl(&self, args: &[&str]) -> (i32, String, String) {
        let done = self.caller.ctl_within(CALL_S, args);
        if done.0 == 124 {
            self.history.broken(format!("I9: sandboxctl {args:?} took longer than {CALL_S} s"));
        }
        done
    }

    /// Creates and deletes until it is told to stop, and keeps the last few sandboxes.
    fn create_and_delete(mut self) {
        let (mut number, mut kept) = (0, Vec::new());
        while self.goes_on() {
            let key = format!("{}-{number}", self.prefix);
            number += 1;
            if create(&self, &key) {
                kept.push(key);
            }
            if kept.len() > KEPT {
                let at = usize::try_from(self.dice.roll() % 3).expect("an index");
                delete(&self, &kept.swap_remove(at.min(kept.len() - 1)));
            }
            self.dice.pause(200);
        }
    }

    /// Runs commands in sandboxes of other callers.
    fn run_commands(mut self) {
        let mut number = 0;
        while self.goes_on() {
            let roll = self.dice.roll();
            if let Some((key, sandbox)) = self.history.living(roll) {
                // Not an exit code that `sandboxctl` itself uses.
                let code = 10 + number % 110;
                run(&self, &key, &sandbox, &format!("{}-{number}", self.prefix), code);
                number += 1;
            }
            self.dice.pause(100);
        }
    }

    /// Asks web servers of other callers' sandboxes, which answer with their ids, through any node.
    fn ask_the_web(mut self) -> Answers {
        let (mut answers, mut ready) = (Answers::default(), BTreeSet::new());
        while self.goes_on() {
            let roll = self.dice.roll();
            if let Some((key, sandbox)) = self.history.living(roll) {
                let (id, node) = (&sandbox.id, self.dice.node());
                let write = ["exec", id, "--shell", "hostname > /srv/www/id"];
                if ready.contains(id) || self.ctl(&write).0 == 0 {
                    ready.insert(id.clone());
                    let how = format!("a web request through {node}");
                    self.ask(&key, id, &how, &mut answers, || page(node, id));
                }
            }
            self.dice.pause(200);
        }
        answers
    }

    /// Logs in to other callers' sandboxes.
    fn log_in(mut self, logins: &Logins) -> Answers {
        let mut answers = Answers::default();
        while self.goes_on() {
            let roll = self.dice.roll();
            if let Some((key, Sandbox { id, .. })) = self.history.living(roll) {
                let once = || logins.run(&id, "hostname").map(|name| name.trim().to_owned());
                self.ask(&key, &id, "a login", &mut answers, once);
            }
            self.dice.pause(500);
        }
        answers
    }

    /// Asks a sandbox for its id until it answers. It must answer in time, unless it is deleted or hit meanwhile, and
    /// nobody else may answer for it.
    fn ask(
        &self,
        key: &str,
        id: &str,
        how: &str,
        answers: &mut Answers,
        once: impl Fn() -> Option<String>,
    ) {
        let begun = Instant::now();
        loop {
            // Marked before: what was asked of it while it lived may fail from then on.
            let answer = once();
            let is_owed = !self.history.note(key, |known| known.delete_asked || known.hit);
            match answer {
                Some(answer) if answer == id => {
                    answers.count += 1;
                    answers.longest = answers.longest.max(begun.elapsed());
                    return;
                }
                Some(other) => {
                    self.history.broken(format!("I5: {how} for {id} is answered by {other:?}"));
                    return;
                }
                None if !is_owed => return,
                None if begun.elapsed() > ANSWERED => {
                    self.history.broken(format!("I9: {how} for {id} is not answered"));
                    return;
                }
                None => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Checks I2: an acked sandbox is found, whenever the controller answers.
    fn look(mut self) {
        while self.goes_on() {
            let roll = self.dice.roll();
            if let Some((key, Sandbox { id, .. })) = self.history.living(roll) {
                let (code, _, err) = self.ctl(&["get", &id]);
                let unasked = !self.history.note(&key, |known| known.delete_asked);
                // 3: the sandbox does not exist.
                if code == 3 && unasked {
                    self.history.broken(format!("I2: {key}, acked as {id}, is not found: {err}"));
                }
            }
            self.dice.pause(200);
        }
    }
}

/// Returns the id that the web server of a sandbox answers with; `None` without a whole answer.
fn page(node: &str, id: &str) -> Option<String> {
    let host = format!("port-8000-{id}.sandbox.localhost");
    let (status, body) = http::try_get(node, &host, "/id")?;
    // Without the end of the line, Caddy was killed in the middle.
    body.strip_suffix('\n').filter(|_| status == 200).map(str::to_owned)
}

/// Repeats a creation until it is answered; returns whether the sandbox runs.
fn create(lane: &Lane<'_>, key: &str) -> bool {
    let begun = Instant::now();
    lane.history.note(key, |_| {});
    // Sometimes repeats a request that was answered already.
    let mut again = key.len() % 2;
    loop {
        let create = ["--json", "create", "--request-id", key, "--expose", "web=8000:public"];
        let (code, out, err) = lane.ctl(&create);
        let answer: Option<Value> = serde_json::from_str(&out).ok();
        let answer = answer.map(|one| one.as_array().map_or(one.clone(), |list| list[0].clone()));
        if let Some(answer) = answer.filter(|one| one["phase"] == "running") {
            acked(lane.history, key, &answer);
            if again == 0 {
                return true;
            }
            again -= 1;
        } else if code == 1 && err.contains("\"reason\"") {
            // A final failure, which a repetition would get again. Temporary ones have exit codes of
            // their own.
            return lane.history.note(key, |known| known.acked.is_some());
        }
        if begun.elapsed() > PATIENCE * 2 {
            lane.history.broken(format!("I9: {key} is not answered: {code} {err}"));
            return false;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Records an ack and checks I4: the same sandbox for the same request_id.
fn acked(history: &History, key: &str, answer: &Value) {
    let text = |field: &str| answer[field].as_str().unwrap_or_default().to_owned();
    let (id, node) = (text("id"), text("node"));
    let vmid = answer["vmid"].as_u64().unwrap_or_default();
    let before = history.note(key, |known| {
        known.ids.insert(id.clone());
        known.acked.get_or_insert(Sandbox { id: id.clone(), node, vmid }).id.clone()
    });
    if before != id {
        history.broken(format!("I4: {key} is {before} and {id}"));
    }
}

/// Deletes a sandbox and waits until it is gone.
fn delete(lane: &Lane<'_>, key: &str) {
    let known = lane.history.note(key, |known| {
        known.delete_asked = true;
        known.clone()
    });
    let Some(Sandbox { id, .. }) = known.acked else { return };
    let begun = Instant::now();
    loop {
        let (code, out, err) = lane.ctl(&["--json", "rm", &id]);
        if code == 3 {
            lane.history.broken(format!("I2: {id} was lost before it was deleted: {err}"));
            return;
        }
        if code == 0 && out.contains("\"deleted\"") {
            lane.history.note(key, |known| known.deleted = true);
            return;
        }
        if begun.elapsed() > PATIENCE * 2 {
            lane.history.broken(format!("I9: {id} is not deleted: {code} {out}{err}"));
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Runs a command, which must end with its own code or a clear failure.
fn run(lane: &Lane<'_>, key: &str, sandbox: &Sandbox, name: &str, code: i32) {
    let line = format!("echo {name} >>/root/ran; sync /root/ran; exit {code}");
    lane.history.note(key, |known| known.ran.insert(name.to_owned(), None));
    let args = ["exec", "--exec-id", name, &sandbox.id, "--shell", &line];
    let (came, out, err) = lane.ctl(&args);
    if came == code {
        lane.history.note(key, |known| known.ran.insert(name.to_owned(), Some(code)));
        return;
    }
    // 125: not run, or its outcome is lost; 3, 4: the sandbox does not exist, or cannot run it now.
    let clear = matches!(came, 1 | 3 | 4 | 125) && !err.trim().is_empty();
    if !clear {
        let id = &sandbox.id;
        lane.history.broken(format!("{name} in {id} came to {came}, not {code}: {out}{err}"));
    }
}

/// Kills a victim; returns false if there was none.
fn kill(world: &World, history: &History, dice: &mut Dice, victim: Victim) -> bool {
    let service = |services: Services, name: &str| {
        services.wait(name, State::Ready, PATIENCE).expect("it is up again");
        services.kill(name, false, PATIENCE).expect("kill -9");
        true
    };
    match victim {
        Victim::Agent => service(world.node(dice.node()).services().expect("services"), AGENT),
        Victim::Caddy => service(world.node(dice.node()).services().expect("services"), CADDY),
        Victim::Controller => service(world.lab.services(), CONTROLLER),
        Victim::Worker => worker(world, dice),
        Victim::Init => history.living(dice.roll()).is_some_and(|(key, sandbox)| {
            // Marked before the kill: commands in it may be lost from now on.
            history.note(&key, |known| known.hit = true);
            let Sandbox { id, node, vmid } = sandbox;
            // The vmid may have another owner by now; the config names it.
            let killed = world.shell(
                &node,
                &format!(
                    "grep -q {id} /etc/pve/lxc/{vmid}.conf && kill -9 $(head -n 1 \
                     /sys/fs/cgroup/lxc/{vmid}/ns/init.scope/cgroup.procs) && echo killed"
                ),
            );
            killed == "killed\n"
        }),
    }
}

/// Kills the first `pct` worker that is seen on a node.
fn worker(world: &World, dice: &mut Dice) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < LOOK {
        let killed = world.shell(
            dice.node(),
            "for i in $(seq 20); do p=$(pgrep -f '[t]ask UPID' | head -n 1); \
             [ -n \"$p\" ] && kill -9 $p && echo killed && break; sleep 0.02; done",
        );
        if killed == "killed\n" {
            return true;
        }
    }
    false
}

/// Lists everything on a node that a sandbox could leave: configs, volumes, links, cgroups, locks,
/// tasks.
fn footprint(world: &World, node: &str) -> BTreeSet<String> {
    let lines = world.shell(
        node,
        "ls -d /etc/pve/lxc/*.conf /rpool/data/subvol-* /sys/class/net/veth* \
         /sys/fs/cgroup/lxc/[0-9]* 2>/dev/null; grep -H '^lock:' /etc/pve/lxc/*.conf; \
         pgrep -af '[t]ask UPID|[p]ct (clone|start|destroy)'; true",
    );
    lines.lines().map(str::to_owned).collect()
}

/// Checks all recorded answers after the kills have stopped.
fn check(world: &World, history: &History) {
    for (key, known) in history.all() {
        let tries = world.of_request(&key);
        let living: Vec<_> = tries
            .iter()
            .filter(|one| one["phase"] != "failed" && one["phase"] != "deleted")
            .collect();
        if living.len() > 1 {
            history.broken(format!("I4: {key} is {} sandboxes", living.len()));
        }
        let Some(sandbox) = &known.acked else { continue };
        let phase =
            tries.iter().find(|one| one["id"] == sandbox.id.as_str()).map(|one| &one["phase"]);
        let phase = phase.and_then(Value::as_str).unwrap_or("lost");
        let fits = match (known.deleted, known.delete_asked) {
            (true, _) => phase == "deleted",
            (false, true) => phase != "lost",
            (false, false) => phase == "running" || known.hit && phase == "stopped",
        };
        if !fits {
            history.broken(format!("I2, I7: {key}, {known:?}, is {phase}"));
        }
        if phase == "running" {
            each_command_ran_once(world, history, &sandbox.id, &known);
        }
    }
}

/// Checks the runs of commands: exactly one run if a code came, at most one otherwise.
fn each_command_ran_once(world: &World, history: &History, id: &str, known: &Known) {
    let ran = world.ctl(&["exec", id, "--shell", "cat /root/ran 2>/dev/null; true"]);
    if ran.code != 0 && known.hit && ran.stderr.contains("SANDBOX_NOT_RUNNING") {
        // Its init was killed so late that its phase did not say so yet.
        world.wait_phase(id, "stopped");
        return;
    }
    if ran.code != 0 {
        history.broken(format!("{id} runs no command: {}", ran.stderr));
        return;
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let text = ran.text();
    for line in text.lines() {
        *counts.entry(line).or_default() += 1;
    }
    for (name, came) in &known.ran {
        let count = counts.get(name.as_str()).copied().unwrap_or_default();
        if count > 1 || (came.is_some() && count != 1) {
            history.broken(format!("{name} in {id} came to {came:?} and ran {count} times"));
        }
    }
}

#[test]
fn callers_get_true_answers_through_kills_of_everything() {
    let Some(world) = world() else { return };
    let kills = std::env::var("PVE_SANDBOX_CHAOS").ok().filter(|text| !text.is_empty());
    let kills: u32 = kills.map_or(KILLS, |kills| kills.parse().expect("a number"));
    let seed = u64::try_from(std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos());
    let seed = seed.expect("before 2500");
    println!("{kills} kills, seed {seed}");
    wait("a lab without leftovers", || world.ctl(&["fsck"]).code == 0);
    let before = NODES.map(|node| footprint(&world, node));
    for node in NODES {
        // Slows steps down, so that kills hit them.
        let slow =
            |command, step| Rule::once(command, step, Action::SleepMs).lasting_ms(STEP_MS).always();
        world.faults(
            node,
            &[slow("clone", "volume"), slow("start", "lxc-start"), slow("destroy", "volume")],
        );
    }
    let (history, stop, logins) = (History::default(), AtomicBool::new(false), Logins::new(&world));
    let run = unique("chaos");
    let lane = |name: &str, number: u64| Lane {
        caller: world.caller(),
        history: &history,
        stop: &stop,
        prefix: format!("{run}-{name}{number}"),
        dice: Dice(seed.wrapping_add(number)),
    };
    let mut hits: BTreeMap<Victim, u32> = BTreeMap::new();
    let (pages, sessions) = thread::scope(|scope| {
        // Stops the callers even after a failure here; otherwise it would wait for them for ever.
        let stopping = Stop(&stop);
        for number in 0..2 {
            let (create, run) = (lane("create", number), lane("run", 10 + number));
            scope.spawn(move || create.create_and_delete());
            scope.spawn(move || run.run_commands());
        }
        let look = lane("look", 20);
        scope.spawn(move || look.look());
        let (web, ssh, logins) = (lane("web", 30), lane("ssh", 31), &logins);
        let web = scope.spawn(move || web.ask_the_web());
        let ssh = scope.spawn(move || ssh.log_in(logins));
        let mut dice = Dice(seed);
        wait("the first sandboxes", || history.living(0).is_some());
        let turns = VICTIMS.iter().copied().cycle();
        for (number, victim) in (0..kills).zip(turns) {
            // Callers keep few containers: sometimes there is none to hit.
            let done = (0..10).any(|_| {
                let done = kill(&world, &history, &mut dice, victim);
                dice.pause(600);
                done
            });
            *hits.entry(victim).or_default() += u32::from(done);
            if number % 10 == 9 {
                println!("{} kills: {hits:?}", number + 1);
            }
        }
        drop(stopping);
        (web.join().expect("no panic"), ssh.join().expect("no panic"))
    });
    for node in NODES {
        world.faults(node, &[]);
    }
    for victim in VICTIMS {
        let hit = hits.get(&victim).copied().unwrap_or_default();
        assert!(hit * 10 >= kills, "{victim:?} was hit {hit} times of {kills}: {hits:?}");
    }
    wait("the controller and three nodes", || {
        let (code, out, _) = world.caller().ctl(&["--json", "nodes"]);
        let nodes: Value = serde_json::from_str(&out).unwrap_or_default();
        let ready = nodes.as_array().is_some_and(|nodes| nodes.iter().all(|n| n["ready"] == true));
        code == 0 && ready
    });
    world.fsck();
    check(&world, &history);
    for node in NODES {
        let nobodys = "port-8000-vm-987654.sandbox.localhost";
        wait(&format!("Caddy of {node}"), || http::status(node, nobodys) == Some(404));
    }
    let all = history.all();
    let (acked, deleted) = (
        all.values().filter(|known| known.acked.is_some()).count(),
        all.values().filter(|known| known.deleted).count(),
    );
    let ran: usize = all.values().flat_map(|known| known.ran.values()).flatten().count();
    println!("{hits:?}; {acked} created, {deleted} deleted, {ran} commands came to their code");
    println!("web requests: {pages:?}, logins: {sessions:?}");
    assert!(acked > 3 && deleted > 0 && ran > 3, "a load without work proves nothing");
    assert!(pages.count > 3 && sessions.count > 3, "{pages:?} and {sessions:?} prove nothing");
    for key in all.keys() {
        for sandbox in world.of_request(key) {
            if sandbox["phase"] != "deleted" && sandbox["phase"] != "failed" {
                let id = sandbox["id"].as_str().expect("an id");
                wait(&format!("{id} to be deleted"), || world.ctl(&["rm", id]).code == 0);
                world.wait_phase(id, "deleted");
            }
        }
    }
    for (node, before) in NODES.iter().zip(&before) {
        wait(&format!("nothing to be left on {node} but {before:?}"), || {
            footprint(&world, node).is_subset(before)
        });
    }
    history.judge();
    drop(logins);
    world.finish();
}

/// Tells all callers to stop when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
