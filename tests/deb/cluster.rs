//! A PVE cluster of two booted nodes, with a network and an /etc/pve that they share: on the second one there is the
//! agent's package alone, and it joins the controller on the first one.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use lab::pmxcfs::{
    cluster::Member,
    daemon::{Mount, Mounted, mount},
};

use super::{
    booted::{Booted, STORAGE, address},
    ctl,
    root::{Base, said, target},
    steps::{
        AGENT, CLI, CONTROLLER, INGRESS, created, install, install_agent, join, join_line,
        template_from_archive, until, until_exec, until_within,
    },
    wanted, web,
};

/// Most creations until both nodes have one.
const CREATIONS: usize = 20;
/// Longest time until a revocation has its effect.
const REVOCATION: Duration = Duration::from_secs(15);

/// Network namespace with a bridge, on which the uplinks of the nodes are.
struct Switch(Child);

impl Switch {
    fn start() -> Self {
        // `cat` ends with this process, and the namespace with it.
        let make = "ip link add lan type bridge && ip link set lan up && echo made && exec cat";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", make])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let told = BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line);
        assert!(told.is_ok() && line == "made\n", "no bridge: {told:?} {line}");
        Self(child)
    }

    /// Takes the end of a node's network that is not its own.
    #[track_caller]
    fn connect(&self, node: &Booted, port: &str) {
        let pid = self.0.id().to_string();
        let mut give = node.outside("ip");
        give.args(["link", "set", "uplink", "netns", &pid, "name", port]);
        let mut take = Command::new("nsenter");
        take.args(["--target", &pid, "--net", "ip", "link", "set", port, "master", "lan", "up"]);
        for mut command in [give, take] {
            let (code, text) = said(&command.output().expect("started"));
            assert_eq!(code, Some(0), "{port}: {text}");
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Two nodes, their network and their /etc/pve. They are dropped in the order of the fields: the nodes end first,
/// because /etc/pve cannot be unmounted while they use it.
struct Cluster {
    first: Booted,
    second: Booted,
    #[expect(dead_code, reason = "held so that the network stays until it is dropped")]
    switch: Switch,
    #[expect(dead_code, reason = "held so that /etc/pve stays until it is dropped")]
    pve: Mounted,
}

impl Cluster {
    fn start(base: Base) -> Self {
        let dir = target().join("deb-root/cluster");
        let store = dir.join("store");
        // Of a run that was killed.
        drop(fs::remove_dir_all(&store));
        let mounts = [1, 2].map(|id| Mount {
            node: format!("pve{id}"),
            member: Member {
                id,
                ip: address(id),
                up: true,
                cut: false,
                stopped: false,
                unheard: false,
            },
            dir: dir.join(format!("pve{id}")),
            pid_file: None,
        });
        let pve = mount(&store, &mounts).expect("/etc/pve");
        let [one, two] = &mounts;
        fs::write(one.dir.join("storage.cfg"), STORAGE).expect("written");
        let (first, second) =
            (Booted::of_cluster(base, 1, &one.dir), Booted::of_cluster(base, 2, &two.dir));
        let switch = Switch::start();
        switch.connect(&first, "pve1");
        switch.connect(&second, "pve2");
        Self { first, second, switch, pve }
    }
}

/// Makes the line that joins a node.
fn line_for(first: &Booted, node: &str) -> String {
    join_line(&first.ok(&[CLI, "node", "token", node])) + " --no-template"
}

/// Runs a line that must be refused, with these words.
#[track_caller]
fn refused(second: &Booted, line: &str, words: &str) {
    let (code, told) = second.run(&["sh", "-c", line]);
    assert!(code == Some(1) && told.contains(words), "{words}: {code:?}: {told}");
}

/// Returns the nodes that are ready and offer a snapshot, in order.
#[track_caller]
fn usable(first: &Booted) -> Vec<String> {
    let mut nodes = ctl::ready_nodes(first);
    nodes.retain(|node| node["load"]["snapshots"][0] == "debian");
    let mut names: Vec<_> =
        nodes.iter().filter_map(|node| Some(node["id"].as_str()?.to_owned())).collect();
    names.sort();
    names
}

/// Waits until both nodes are ready and offer a snapshot.
#[track_caller]
fn until_both_are_usable(first: &Booted) {
    let list = || first.ok(&[CLI, "node", "ls"]);
    until("both nodes", list, || usable(first) == ["pve1", "pve2"]);
}

/// Returns a field of a sandbox.
#[track_caller]
fn field(first: &Booted, id: &str, name: &str) -> String {
    ctl::json(first, &["get", id])[name].as_str().unwrap_or_default().to_owned()
}

#[test]
fn two_packaged_nodes_make_a_cluster() {
    if !wanted() {
        return;
    }
    let cluster = Cluster::start(Base::Trixie);
    let Cluster { first, second, .. } = &cluster;
    install(first);
    let setup = [CONTROLLER, "setup", "--domain", "sandbox.test"];
    first.ok(&setup);
    join(first);
    let told = first.ok(&setup);
    assert!(told.contains("pve2=192.0.2.12"), "it says how the other one joins: {told}");

    install_agent(second);
    token_of_another_node_is_refused(first, second);
    let line = overlapping_pool_is_refused_and_the_token_stays_good(first, second);
    second_node_joins(second, &line);
    spent_token_is_refused(second, &line);
    for node in [first, second] {
        template_from_archive(node);
    }
    until_both_are_usable(first);

    let [one, two] = a_sandbox_on_each(first);
    for id in [&one, &two] {
        until_exec(first, id);
    }
    let host = web::serve(first, &one);
    assert_eq!(web::by_tunnel(second, &host), "hello 200", "over the hop between the nodes");
    revoked_node_is_turned_away_at_once(first, second, [&one, &two], &host);
    revoked_node_joins_again(first, second, &two, &host);
}

fn token_of_another_node_is_refused(first: &Booted, second: &Booted) {
    refused(second, &line_for(first, "pve3"), "this token is not good for pve2");
}

/// Tries to join the second node with addresses of the first one; returns the line without them.
fn overlapping_pool_is_refused_and_the_token_stays_good(first: &Booted, second: &Booted) -> String {
    let line = line_for(first, "pve2");
    let overlap = "overlap with 10.100.1.0-10.100.1.255 of pve1";
    refused(second, &format!("{line} --pool 10.100.1.128/25"), overlap);
    assert!(!second.path("/etc/pve-sandbox/tls/node.crt").exists(), "nothing was given");
    assert_eq!(second.unit(AGENT, "ActiveState"), "inactive");
    line
}

fn second_node_joins(second: &Booted, line: &str) {
    let told = second.ok(&["sh", "-c", line]);
    assert!(told.contains("network.pool = \"10.100.2.0/24\""), "{told}");
    for unit in [AGENT, INGRESS, "pve-sandbox-dns"] {
        assert_eq!(second.unit(unit, "ActiveState"), "active", "{unit}");
    }
}

/// Runs the line again, as after an interruption, and then with other words.
fn spent_token_is_refused(second: &Booted, line: &str) {
    let told = second.ok(&["sh", "-c", line]);
    assert!(told.contains("has joined") && told.contains("already"), "{told}");
    refused(second, &format!("{line} --pool 10.100.2.0/24"), "it is used");
}

/// Creates sandboxes until each node has one; returns one of the first and one of the second.
fn a_sandbox_on_each(first: &Booted) -> [String; 2] {
    let mut ids = [None, None];
    for _ in 0..CREATIONS {
        let id = created(&first.ok(&[CLI, "create"]));
        let node = field(first, &id, "node");
        let at = ["pve1", "pve2"].iter().position(|name| *name == node).expect(&node);
        ids[at] = Some(id);
        if let [Some(one), Some(two)] = &ids {
            return [one.clone(), two.clone()];
        }
    }
    panic!("{CREATIONS} creations on one node: {}", first.ok(&[CLI, "node", "ls"]));
}

/// Revokes the second node: its sandbox runs on and nobody reaches it, nothing is made there, and the first one refuses
/// what it passes on.
fn revoked_node_is_turned_away_at_once(
    first: &Booted,
    second: &Booted,
    [one, two]: [&str; 2],
    host: &str,
) {
    let vmid = ctl::json(first, &["get", two])["vmid"].to_string();
    first.ok(&[CLI, "node", "revoke", "pve2"]);
    let is_away = || field(first, two, "phase") == "unreachable" && usable(first) == ["pve1"];
    let nodes = || first.ok(&[CLI, "node", "ls"]);
    until_within(REVOCATION, "the revoked node to be unreachable", nodes, is_away);
    let told = || web::by_tunnel(second, host);
    until_within(REVOCATION, "a refused request", told, || told().ends_with(" 403"));
    assert_eq!(web::by_tunnel(first, host), "hello 200");
    let other = created(&first.ok(&[CLI, "create"]));
    assert_eq!(field(first, &other, "node"), "pve1");
    until_exec(first, one);
    assert!(second.ok(&["pct", "status", &vmid]).contains("running"), "it runs on");
}

fn revoked_node_joins_again(first: &Booted, second: &Booted, two: &str, host: &str) {
    second.ok(&["sh", "-c", &line_for(first, "pve2")]);
    until_both_are_usable(first);
    until_exec(first, two);
    web::until_answer(second, host, "hello 200");
}
