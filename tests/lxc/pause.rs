//! Paused sandboxes: nothing in them runs, their memory stays, and only a wake event wakes them.

use lab::daemons::AGENT;

use crate::{
    http::{ask, get},
    stuck::Stuck,
    world::{PATIENCE, World, id, node, vmid, wait, world},
};

/// Counts in its own memory, and writes the number to the disk for readers outside.
const COUNTER: &str = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >/root/n.new; \
    mv /root/n.new /root/n; sleep 0.02; done' >/dev/null 2>&1 </dev/null & echo $!";

/// A counting process in a sandbox.
struct Counter<'a> {
    world: &'a World,
    id: String,
    node: String,
    vmid: u64,
    pid: String,
}

impl<'a> Counter<'a> {
    fn start(world: &'a World, sandbox: &serde_json::Value) -> Self {
        let ran = world.ctl(&["exec", id(sandbox), "--shell", COUNTER]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let counter = Self {
            world,
            id: id(sandbox).into(),
            node: node(sandbox).into(),
            vmid: vmid(sandbox),
            pid: ran.text().trim().into(),
        };
        wait("the counter to count", || counter.read() > 2);
        counter
    }

    /// Reads the number from the node, without using the sandbox.
    fn read(&self) -> u64 {
        let line = format!("cat /rpool/data/subvol-{}-disk-0/root/n", self.vmid);
        self.world.shell(&self.node, &line).trim().parse().unwrap_or(0)
    }

    #[track_caller]
    fn stands(&self) {
        let before = self.read();
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(self.read(), before, "something in it runs");
    }

    #[track_caller]
    fn goes_on_from(&self, number: u64) {
        wait("the counter to go on", || self.read() > number + 2);
        assert!(self.read() >= number, "it went on from where it stood");
        let line = format!("kill -0 {}", self.pid);
        let ran = self.world.ctl(&["exec", &self.id, "--shell", &line]);
        assert_eq!(ran.code, 0, "it is another process: {}", ran.stderr);
    }
}

#[test]
fn memory_of_a_paused_sandbox_survives_an_agent_kill() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    let (id, boot) = (id(&sandbox), &sandbox["boot"]);
    let counter = Counter::start(&world, &sandbox);
    for _ in 0..2 {
        assert_eq!(world.json(&["pause", id])["phase"], "paused");
    }
    counter.stands();
    let stood_at = counter.read();
    let locked =
        world.shell("node1", &format!("grep -H ^lock: /etc/pve/lxc/{}.conf", counter.vmid));
    assert!(locked.contains("lock: backup"), "{locked}");
    let snapshot = world.shell("node1", &format!("pct snapshot {} snap1 2>&1", counter.vmid));
    assert!(snapshot.contains("CT is locked (backup)"), "{snapshot}");
    let usage = world.json(&["top", "--once", id]);
    assert_eq!(usage[0]["phase"], "paused", "{usage}");
    // What is told first may reach back to before the pause.
    wait("a report without any use of the CPU", || {
        world.json(&["top", "--once", id])[0]["cpu_percent"] == 0.0
    });
    assert_eq!(world.ctl(&["fsck"]).code, 0, "as it is to be");
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    wait("the agent again", || world.ctl(&["fsck"]).code == 0);
    assert_eq!(world.get(id)["phase"], "paused");
    counter.stands();
    let resumed = world.json(&["resume", id]);
    assert_eq!((&resumed["phase"], &resumed["boot"]), (&"running".into(), boot));
    counter.goes_on_from(stood_at);
    wait("the lock to be gone", || {
        world.shell("node1", &format!("grep -c ^lock: /etc/pve/lxc/{}.conf", counter.vmid)).trim()
            == "0"
    });
    world.finish();
}

#[test]
fn http_request_wakes_a_paused_sandbox_unless_it_is_switched_off() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2", "--expose", "web=8000"]);
    let (id, host) = (id(&sandbox), format!("port-8000-vm-{}.sandbox.localhost", vmid(&sandbox)));
    wait("the web server", || get("node2", &host).0 == 200);
    world.json(&["pause", id]);
    let closed = format!("port-8001-vm-{}.sandbox.localhost", vmid(&sandbox));
    assert_eq!(get("node2", &closed).0, 403);
    // Nor does what nobody made: a tab's icon, its socket, a look whether it is there.
    for line in [
        "GET /favicon.ico HTTP/1.1",
        "HEAD / HTTP/1.1",
        "GET /ws HTTP/1.1\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x",
    ] {
        assert_eq!(ask("node2", &host, line).0, 503, "{line}");
    }
    assert_eq!(world.get(id)["phase"], "paused", "a closed port wakes nobody");
    // Through another node, too.
    assert_eq!(get("node1", &host).0, 200);
    world.wait_phase(id, "running");
    world.json(&["wake-on", id, "--http", "off"]);
    world.json(&["pause", id]);
    let (status, body) = get("node2", &host);
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("this sandbox is paused"), "{body}");
    assert_eq!(world.get(id)["phase"], "paused");
    // A paused sandbox can be deleted.
    world.json(&["rm", id]);
    world.wait_phase(id, "deleted");
    world.finish();
}

#[test]
fn paused_sandbox_is_stopped_after_a_power_cut_and_says_why() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node3"]);
    world.json(&["pause", id(&sandbox)]);
    world.node("node3").kill().expect("power cut");
    world.wait_phase(id(&sandbox), "unreachable");
    world.node("node3").boot().expect("boot");
    let after = world.wait_phase(id(&sandbox), "stopped");
    assert_eq!(
        after["failure"]["message"],
        "its node was rebooted while it was paused; its memory is gone, its disk is kept"
    );
    world.json(&["start", id(&sandbox)]);
    world.wait_phase(id(&sandbox), "running");
    world.finish();
}

#[test]
fn sandbox_that_does_not_freeze_keeps_running_or_is_stopped() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    let id = id(&sandbox);
    let counter = Counter::start(&world, &sandbox);
    let stuck = Stuck::in_container(&world, "node1", counter.vmid);
    let stood_at = counter.read();
    let (reason, message) = world.refused(&["pause", id]);
    assert_eq!(reason, "FREEZE_FAILED", "{message}");
    let after = world.get(id);
    assert_eq!(
        (&after["phase"], &after["failure"]["reason"]),
        (&"running".into(), &"FREEZE_FAILED".into())
    );
    counter.goes_on_from(stood_at);
    wait("nothing to be left of the pause", || world.ctl(&["fsck"]).code == 0);
    let stopped = world.json(&["pause", "--or-stop", id]);
    assert_eq!(stopped["phase"], "stopped", "{stopped}");
    drop(stuck);
    world.json(&["start", id]);
    world.wait_phase(id, "running");
    world.finish();
}
