//! What one sandbox uses up is not used up for others.

use std::time::Duration;

use crate::world::{id, node, vmid, wait, world};

/// Starts processes until it cannot, says so by ending, and leaves them running.
const FORK_BOMB: &str = "(while :; do sleep 600 & done) 2>/dev/null; exec sleep 600";

#[test]
fn fork_bomb_reaches_the_limit_of_its_sandbox_and_no_other() {
    let Some(world) = world() else { return };
    let (bomb, other) = (world.create(&["--node", "node1"]), world.create(&["--node", "node1"]));
    // A lab node sees the machine's v1 hierarchies there.
    let dirs = ["/run/lab/cgroup/pids", "/sys/fs/cgroup"];
    let number = |file: &str| {
        let files = dirs.map(|dir| format!("{dir}/lxc/{}/{file}", vmid(&bomb)));
        let script = format!("cat {} 2>/dev/null || cat {}", files[0], files[1]);
        let said = world.node(node(&bomb)).exec(["/bin/sh", "-c", &script]).expect("cat");
        String::from_utf8_lossy(&said.stdout).trim().parse::<u64>().ok()
    };
    let max = number("pids.max").expect("a limit in the cgroup");

    let ran = world.ctl(&["exec", "--detach", id(&bomb), "--", "sh", "-c", FORK_BOMB]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    wait("the bomb to reach the limit", || {
        number("pids.current").is_some_and(|now| now >= max)
    });
    // Its neighbour does not notice.
    let ran = world.ctl(&["exec", id(&other), "--", "echo", "fine"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "fine"), "{}", ran.stderr);
    // In the same sandbox nothing more can be started, and the error says so.
    let begun = std::time::Instant::now();
    let (reason, message) = world.refused(&["exec", id(&bomb), "--", "true"]);
    assert_eq!(reason, "EXEC_FAILED", "{message}");
    assert!(message.contains("too many processes"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(15));
    // It can be stopped, and its next boot is limited, too.
    let ran = world.ctl(&["stop", id(&bomb)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = world.ctl(&["start", id(&bomb)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(number("pids.max"), Some(max));
    let ran = world.ctl(&["exec", id(&bomb), "--", "echo", "again"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "again"), "{}", ran.stderr);
    world.finish();
}
