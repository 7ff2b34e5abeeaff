//! `pve-sandbox-agent template init` on a node: a template from an archive, found by its mark, and a
//! sandbox of it. Set `PVE_SANDBOX_TEST_MMDEBSTRAP` to build the archive by mmdebstrap as well.

use std::path::Path;

use lab::{image::TOOLS, sources};

use crate::world::{World, id, node, wait, world};

const NODE: &str = "node1";

fn init(world: &World, options: &str) -> (bool, String) {
    let line = format!(
        "pve-sandbox-agent template init --config /etc/pve-sandbox/agent.toml {options} 2>&1 \
         && echo IT ENDED WELL"
    );
    let text = world.shell(NODE, &line);
    (text.contains("IT ENDED WELL"), text)
}

fn config(world: &World, vmid: u32) -> String {
    world.shell(NODE, &format!("cat /etc/pve/lxc/{vmid}.conf 2>/dev/null"))
}

/// Restarts the node's agent, which finds templates at its start.
fn restart_agent(world: &World) {
    let pid = || world.shell(NODE, "pgrep -xo -f '.*pve-sandbox-agent run.*'").trim().to_owned();
    let before = pid();
    assert!(!before.is_empty(), "an agent runs");
    world.shell(NODE, &format!("kill {before}"));
    wait("another agent", || {
        let now = pid();
        !now.is_empty() && now != before
    });
}

fn offers(world: &World, snapshot: &str) -> bool {
    world.ctl(&["snapshot", "ls", "--json"]).text().contains(snapshot)
}

fn make_and_use(world: &World, vmid: u32, snapshot: &str, options: &str) {
    let options = format!("--vmid {vmid} --snapshot {snapshot} {options}");
    let (well, text) = init(world, &options);
    assert!(well && text.contains("is ready"), "{text}");
    assert_eq!(config(world, vmid + 1), "", "the clone that checked it is gone");
    let (well, text) = init(world, &options);
    assert!(well && text.contains("is there already"), "{text}");

    restart_agent(world);
    wait("the new snapshot", || offers(world, snapshot));
    let sandbox = world.create(&["--snapshot", snapshot]);
    assert_eq!(node(&sandbox), NODE);
    for program in ["git --version", "curl --version", "ssh -V", "python3 --version"] {
        let ran = world.ctl(&["exec", id(&sandbox), "--", "sh", "-c", program]);
        assert_eq!(ran.code, 0, "{program}: {}", ran.stderr);
    }
    let ask = "curl -fsS --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:8000/";
    let ran = world.ctl(&["exec", id(&sandbox), "--", "sh", "-c", ask]);
    assert_eq!(ran.code, 0, "the web server: {}", ran.stderr);
    assert_eq!(world.ctl(&["rm", id(&sandbox)]).code, 0);
    world.shell(NODE, &format!("pct destroy {vmid}"));
    assert_eq!(config(world, vmid), "");
    restart_agent(world);
    wait("no such snapshot", || !offers(world, snapshot));
}

#[test]
fn template_is_made_checked_and_found_by_its_mark() {
    let Some(world) = world() else { return };
    let tar = world.lab.layout().template_tar(&TOOLS);
    let tar = tar.display();

    // The number of another container, which stays as it is.
    let line = "basename -s .conf $(grep -l '^template: 1' /etc/pve/lxc/*.conf | head -1)";
    let other = world.shell(NODE, line).trim().parse().expect("the lab's template");
    let before = config(&world, other);
    let (well, text) = init(&world, &format!("--vmid {other} --snapshot x --archive {tar}"));
    assert!(!well && text.contains("was not made by this command"), "{text}");
    assert_eq!(config(&world, other), before);

    // An archive whose server does not answer is not offered, and the next run makes it again.
    let broken = format!(
        "--vmid 9700 --snapshot mine --archive {tar} --http 8000/nothing-there --patience-s 5"
    );
    let (well, text) = init(&world, &broken);
    assert!(!well && text.contains("did not get ready"), "{text}");
    assert!(config(&world, 9700).contains("unfinished"), "{}", config(&world, 9700));
    make_and_use(&world, 9700, "mine", &format!("--archive {tar} --http 8000/"));

    if std::env::var_os("PVE_SANDBOX_TEST_MMDEBSTRAP").is_some() {
        let mirror = sources::mirror(Path::new("/etc/apt"));
        make_and_use(&world, 9710, "built", &format!("--mirror {mirror}"));
    }
    world.finish();
}
