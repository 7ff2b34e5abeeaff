//! Runs the suite over the real driver in a node of the lab: this program runs there again, as
//! `on_a_node`. For what cannot be done from inside, such as cutting the node off, it asks us.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::Stdio,
};

use lab::{Lab, Node};

#[test]
fn every_behaviour_holds() {
    if std::env::var_os("PVE_SANDBOX_LAB_TESTS").is_none() {
        println!("SKIPPED: PVE_SANDBOX_LAB_TESTS=1 runs this in a node of the lab");
        return;
    }
    let lab = Lab::open(Lab::default_dir()).expect("a lab's directory");
    assert!(lab.is_up(), "no lab is up: run `make test-lab`, or `make lab` first");
    let node = lab.node("node1").expect("node1");
    // On the node's own disk: its view of the machine's files may be older than this build.
    let program = "/var/tmp/contract";
    let root = node.root().expect("a root");
    std::fs::copy(std::env::current_exe().expect("a path"), root.join(&program[1..]))
        .expect("a copy");
    let net = node.id().containers_net();
    let environment = [
        "PVE_TESTS=1".to_owned(),
        format!("PVE_TEST_TEMPLATE={}", lab::image::MINIMAL.vmid(node.id())),
        // Outside the ranges of the agent and the DHCP server.
        format!("PVE_TEST_ADDRESS={net}.200/24,{net}.1"),
        "PVE_TEST_STANDIN=1".to_owned(),
        "PVE_TEST_HAND=1".to_owned(),
        "PVE_TEST_WHOLE=1".to_owned(),
        format!("PVE_TEST_ONLY={}", std::env::var("PVE_TEST_ONLY").unwrap_or_default()),
    ];
    let mut argv = vec!["/usr/bin/env".to_owned()];
    argv.extend(environment);
    argv.extend(
        [program, "on_a_node::every_behaviour_holds", "--exact", "--nocapture"].map(str::to_owned),
    );
    let mut child = node
        .command(argv)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a command in the node");
    let (mut input, output) =
        (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
    for line in BufReader::new(output).lines() {
        let line = line.expect("text");
        println!("{line}");
        if let Some(asked) = line.strip_prefix('@') {
            fulfil(&node, asked);
            writeln!(input, "done").expect("it listens");
        }
    }
    let status = child.wait().expect("it ends");
    // Restores the node, whatever happened inside.
    fulfil(&node, "pmxcfs on");
    fulfil(&node, "quorum on");
    std::fs::remove_file(root.join(&program[1..])).expect("the copy is removed");
    assert!(status.success(), "{status}");
}

fn fulfil(node: &Node, asked: &str) {
    match asked {
        "quorum off" => node.set_quorum(false),
        "quorum on" => node.set_quorum(true),
        "pmxcfs off" => node.set_pmxcfs(false),
        "pmxcfs on" => node.set_pmxcfs(true),
        other => panic!("nobody knows how to do {other:?}"),
    }
    .unwrap_or_else(|error| panic!("{asked}: {error:#}"));
}
