//! A lost journal: running sandboxes are left alone, reported, and recovered.

use lab::daemons::AGENT;

use crate::world::{PATIENCE, id, unique, vmid, wait, world};

#[test]
fn a_sandbox_survives_the_loss_of_its_nodes_journal() {
    let Some(world) = world() else { return };
    let key = unique("lost");
    let before = world.create(&["--node", "node3", "--request-id", &key]);
    let number = vmid(&before).to_string();
    let services = world.node("node3").services().expect("services");
    services.stop(AGENT, PATIENCE).expect("stopped");
    world.shell("node3", "rm /var/lib/pve-sandbox-agent/journal.sqlite*");
    services.start(AGENT, PATIENCE).expect("started");

    wait("the node to tell of it", || {
        let ran = world.ctl(&["--json", "gc", "--dry-run", "--node", "node3"]);
        ran.code == 0 && ran.text().contains("quarantined") && ran.text().contains(&number)
    });
    assert_eq!(world.ctl(&["fsck"]).code, 1, "it is not called right");
    let other = world.create(&["--node", "node3"]);
    assert_ne!((&other["ip"], &other["vmid"]), (&before["ip"], &before["vmid"]));
    let recover = ["recover", "--node", "node3", number.as_str()];
    let told = world.json(&[&recover[..], &["--dry-run"]].concat());
    assert_eq!((id(&told), &told["phase"]), (id(&before), &"running".into()));
    assert_eq!(world.ctl(&["fsck"]).code, 1, "it was only told");

    let after = world.json(&recover);
    assert_eq!((id(&after), &after["ip"]), (id(&before), &before["ip"]));
    assert_eq!(world.ctl(&["exec", id(&before), "--", "true"]).code, 0);
    let again = world.create(&["--node", "node3", "--request-id", &key]);
    assert_eq!(id(&again), id(&before), "the same request is the same sandbox");
    let (reason, _) = world.refused(&recover);
    assert_eq!(reason, "SANDBOX_KNOWN");
    world.finish();
}
