//! docs/install.md and docs/operations.md, followed on one node from the packages to the purge: each block of
//! commands is read from the page and run as it stands there, but for the names of the examples. So are the commands
//! in sentences.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    vec,
};

use super::{
    booted::Booted,
    ctl,
    procedures::{RUN, SENTENCES, blocks, on_the_node},
    root::{Base, said},
    steps::{
        AGENT, CLI, CONTROLLER, INGRESS, INGRESS_GREEN, first_sandbox, hand_out_next_packages,
        next_version, offer_next_version, run, until, until_exec,
    },
    wanted,
};

/// Container of the example of an adoption.
const THEIRS: &str = "207";

/// Stands in for ssh in `ssh -o HostKeyAlias=NODE -o UserKnownHostsFile=FILES root@ADDRESS COMMAND`: notes whom it would
/// reach, and runs the command here.
const SSH: &str = "#!/bin/sh\necho \"$1 $2 $3 $4 $5\" >>/root/ssh.log\nshift 5\nexec \"$@\"\n";

/// Pages, with the blocks and sentences that were not followed yet.
struct Pages {
    commands: BTreeMap<(&'static str, String, usize), Vec<String>>,
    left: BTreeSet<(&'static str, &'static str, usize)>,
    sentences: BTreeSet<(&'static str, &'static str)>,
}

impl Pages {
    fn read() -> Self {
        let pages: BTreeSet<_> = RUN.iter().map(|(page, ..)| *page).collect();
        let all =
            pages.into_iter().flat_map(|page| blocks(page).into_iter().map(move |b| (page, b)));
        let commands = all.map(|(page, block)| {
            let commands = block.commands.iter().map(|command| on_the_node(command));
            ((page, block.heading, block.number), commands.collect())
        });
        Self {
            commands: commands.collect(),
            left: RUN.iter().copied().collect(),
            sentences: SENTENCES.iter().copied().collect(),
        }
    }

    /// Runs the command of a sentence; returns its output.
    #[track_caller]
    fn sentence(&mut self, node: &Booted, page: &'static str, command: &'static str) -> String {
        assert!(self.sentences.remove(&(page, command)), "{command} is not in SENTENCES");
        run(node, &on_the_node(command))
    }

    /// Begins to follow a block.
    #[track_caller]
    fn block<'a>(
        &mut self,
        node: &'a Booted,
        (page, heading, number): (&'static str, &'static str, usize),
    ) -> Following<'a> {
        assert!(self.left.remove(&(page, heading, number)), "{heading} {number} is not in RUN");
        let commands = self.commands.get(&(page, heading.to_owned(), number)).cloned();
        let commands = commands.unwrap_or_else(|| panic!("{page} has no block {heading} {number}"));
        Following { node, commands: commands.into_iter() }
    }

    /// Follows a whole block of docs/operations.md.
    #[track_caller]
    fn operation(&mut self, node: &Booted, heading: &'static str, number: usize) {
        self.block(node, ("operations.md", heading, number)).rest();
    }
}

/// A block that is being followed.
struct Following<'a> {
    node: &'a Booted,
    commands: vec::IntoIter<String>,
}

impl Following<'_> {
    /// Runs the next command; returns its output.
    #[track_caller]
    fn next(&mut self) -> String {
        let command = self.commands.next().expect("another command");
        run(self.node, &command)
    }

    /// Runs the next command until it succeeds.
    #[track_caller]
    fn next_until(&mut self) -> String {
        let command = self.commands.next().expect("another command");
        let last = RefCell::new(String::new());
        let succeeds = || {
            let (code, text) = self.node.run(&["sh", "-c", &command]);
            *last.borrow_mut() = text;
            code == Some(0)
        };
        until(&format!("`{command}` of the docs"), || last.take(), succeeds);
        last.take()
    }

    /// Runs the other commands.
    #[track_caller]
    fn rest(self) {
        self.commands.for_each(|command| drop(run(self.node, &command)));
    }
}

#[test]
fn documents_are_followed_on_debian_12() {
    follow(Base::Bookworm);
}

#[test]
fn documents_are_followed_on_debian_13() {
    follow(Base::Trixie);
}

fn follow(base: Base) {
    if !wanted() {
        return;
    }
    let node = Booted::start(base, &format!("docs-{base:?}").to_lowercase());
    let mut pages = Pages::read();
    let id = install(&node, &mut pages);

    pages.operation(&node, "Look", 0);
    pages.sentence(&node, "install.md", "sandboxctl node ls -o wide");
    pages.sentence(&node, "operations.md", "pve-sandbox-controller check-config");
    upgrade(&node, &mut pages, &id);
    back_up_and_restore(&node, &mut pages, &id);
    put_the_key_back(&node, &mut pages, &id);
    upgrade_from_a_repository(&node, &mut pages);
    lose_the_controller(&node, &mut pages, &id);
    rotate(&node, &mut pages, &id);
    join_further_nodes(&node, &mut pages, &id);
    adopt(&node, &mut pages);

    node.ok(&[CLI, "rm", &id]);
    remove_and_make_the_bridge(&node, &mut pages);
    cordon_and_drain(&node, &mut pages);
    uninstall(&node, &mut pages);
    assert!(pages.left.is_empty(), "blocks that no step follows: {:?}", pages.left);
    assert!(pages.sentences.is_empty(), "no step follows these: {:?}", pages.sentences);
}

/// Follows the first three commands; returns the sandbox that they make.
fn install(node: &Booted, pages: &mut Pages) -> String {
    let first = pages.block(node, ("install.md", "The first node: three commands", 0));
    let commands: Vec<_> = first.commands.collect();
    let (id, count) = first_sandbox(node, &commands);
    assert_eq!(count, 3);
    id
}

/// Follows the upgrade of all packages to a next version while a command runs in the sandbox.
fn upgrade(node: &Booted, pages: &mut Pages, id: &str) {
    let states = || {
        let format = "${Package} ${Version}\n";
        let of = |unit| (node.unit(unit, "MainPID"), node.unit(unit, "ActiveState"));
        let versions = node.ok(&["dpkg-query", "-W", "-f", format, AGENT, CONTROLLER, CLI]);
        (versions, of(AGENT), of(CONTROLLER))
    };
    // Time of the start of the container's first process.
    let begin = ["sh", "-c", "cut -d' ' -f22 /proc/1/stat"];
    let booted = || node.ok(&[&[CLI, "exec", id, "--"][..], &begin].concat());
    let (before, booted_before) = (states(), booted());
    let waits = "echo begun; until [ -e /tmp/upgraded ]; do sleep 0.1; done; echo ended";
    let argv = [CLI, "exec", "--exec-id", "upgrade", id, "--", "sh", "-c", waits];
    let running = node.command(&argv).spawn().expect("nsenter");
    let ps = || node.ok(&[CLI, "ps", id]);
    until("the command", ps, || ps().contains("upgrade"));

    hand_out_next_packages(node);
    pages.operation(node, "Upgrade", 0);

    let after = states();
    let lines = before.0.lines().zip(after.0.lines());
    assert!(before.0.lines().count() == 3, "{before:?}");
    lines.for_each(|(old, new)| assert_eq!(next_version(old), new, "it was upgraded"));
    for (old, new) in [(&before.1, &after.1), (&before.2, &after.2)] {
        assert!(old.0 != new.0 && new.1 == "active", "{old:?}: {new:?}");
    }
    // Both serve again, and what ran runs on.
    until_exec(node, id);
    assert_eq!(booted(), booted_before, "the sandbox was not touched");
    node.ok(&[CLI, "exec", id, "--", "touch", "/tmp/upgraded"]);
    let (code, told) = said(&running.wait_with_output().expect("it ends"));
    assert!(code == Some(0) && told.contains("begun\nended\n"), "{code:?}: {told}");
}

fn back_up_and_restore(node: &Booted, pages: &mut Pages, id: &str) {
    let tokens = || node.ok(&[CLI, "token", "ls"]);
    pages.operation(node, "Back up and restore", 0);
    node.ok(&[CLI, "token", "create", "later", "--team", "acme"]);
    assert!(tokens().contains("later"));
    // This node stands for the machine that the controller leaves, and for the one that it moves to.
    let is_on = || ["ActiveState", "UnitFileState"].map(|property| node.unit(CONTROLLER, property));
    pages.sentence(node, "operations.md", "systemctl disable --now pve-sandbox-controller");
    assert_eq!(is_on(), ["inactive", "disabled"]);
    pages.operation(node, "Back up and restore", 1);
    assert_eq!(is_on(), ["active", "enabled"]);
    until_exec(node, id);
    assert!(!tokens().contains("later"), "what came after the copy is not in it");
    pages.operation(node, "Back up and restore", 2);
    let used = fs::read_to_string(node.path("/root/.config/sandboxctl/config.toml"));
    assert!(used.expect("read").contains("https://controller.example.org:7443"));
    until_exec(node, id);
}

/// Loses the key of the node, and puts it back as the page says.
fn put_the_key_back(node: &Booted, pages: &mut Pages, id: &str) {
    node.ok(&["systemctl", "stop", AGENT]);
    node.ok(&["mv", "/var/lib/pve-sandbox-agent/secret.key", "/root/secret.key"]);
    node.ok(&["systemctl", "start", AGENT]);
    pages.operation(node, "The keys that seal secrets", 0);
    until_exec(node, id);
}

fn upgrade_from_a_repository(node: &Booted, pages: &mut Pages) {
    let version = || node.ok(&["dpkg-query", "--show", "--showformat", "${Version}", AGENT]);
    let next = offer_next_version(node);
    pages.block(node, ("install.md", "A repository of your own", 0)).rest();
    assert_eq!(version(), next);
}

fn lose_the_controller(node: &Booted, pages: &mut Pages, id: &str) {
    node.ok(&["systemctl", "stop", CONTROLLER]);
    let lose = "mv /var/lib/pve-sandbox-controller /root/lost && rm -r /root/.config/sandboxctl";
    node.ok(&["sh", "-c", lose]);
    pages.operation(node, "Lose the controller", 0);
    until_exec(node, id);
}

fn rotate(node: &Booted, pages: &mut Pages, id: &str) {
    // The token that the last procedure has made is revoked here.
    pages.operation(node, "Rotate", 0);
    until_exec(node, id);

    let ca = |dir: &str| {
        let path = format!("/var/lib/pve-sandbox-controller/{dir}/ca.crt");
        fs::read_to_string(node.path(&path)).expect("a CA")
    };
    let before = ca("ca");
    let mut block = pages.block(node, ("operations.md", "Rotate", 1));
    let told = block.next();
    assert!(told.contains("would") && ca("ca") == before, "a dry run changes nothing: {told}");
    let told = block.next();
    assert!(told.contains("sandboxctl node token pve1 | sh"), "{told}");
    assert_ne!(ca("ca"), before);
    assert_eq!(ca("ca.old-1"), before, "the old one is kept");
    block.rest();
    until_exec(node, id);

    pages.operation(node, "Rotate", 2);
    assert_eq!(node.unit(AGENT, "ActiveState"), "active");
    // Whichever took over from the other.
    let states = || [INGRESS, INGRESS_GREEN].map(|unit| node.unit(unit, "ActiveState"));
    let one_runs = || states().iter().filter(|state| *state == "active").count() == 1;
    until("one Caddy alone", || states().join(", "), one_runs);
    until_exec(node, id);
}

/// Joins by one line, and by the loop for the nodes of a cluster, in which this node stands for both.
fn join_further_nodes(node: &Booted, pages: &mut Pages, id: &str) {
    let heading = "Each further node: one line";
    pages.block(node, ("install.md", heading, 0)).rest();
    until_exec(node, id);

    let ssh = node.path("/usr/local/bin/ssh");
    fs::write(&ssh, SSH).expect("written");
    fs::set_permissions(&ssh, Permissions::from_mode(0o755)).expect("executable");
    let mut block = pages.block(node, ("install.md", heading, 1));
    let told = block.next();
    block.rest();
    assert_eq!(told.matches("pve1 joined").count(), 2, "{told}");
    let reached = fs::read_to_string(node.path("/root/ssh.log")).expect("the log of ssh");
    let options = "-o HostKeyAlias=pve1 -o UserKnownHostsFile=/root/.ssh/known_hosts \
                   /etc/pve/nodes/pve1/ssh_known_hosts";
    let expected = ["12", "13"].map(|end| format!("{options} root@192.0.2.{end}\n"));
    assert_eq!(reached, expected.concat());
    until_exec(node, id);
}

/// Removes the bridge by hand, and has it made again by the command for it; then lets `setup` start the agent.
fn remove_and_make_the_bridge(node: &Booted, pages: &mut Pages) {
    let (page, dns) = ("install.md", "pve-sandbox-dns");
    let has_bridge = || node.run(&["ip", "link", "show", "vmbr1"]).0 == Some(0);
    assert!(has_bridge());
    pages.sentence(node, page, "ifdown vmbr1");
    let remove = "cd /etc && rm network/interfaces.d/pve-sandbox pve-sandbox/nat.nft pve-sandbox/dns.conf && \
                  sed -i '/^bridge = \"vmbr1\"$/d' pve-sandbox/agent.toml";
    node.ok(&["sh", "-c", remove]);
    pages.sentence(node, page, "systemctl disable --now pve-sandbox-dns");
    let is_on = || [node.unit(dns, "ActiveState"), node.unit(dns, "UnitFileState")];
    let [active, enabled] = is_on();
    assert!(active != "active" && enabled == "disabled", "{active}, {enabled}");
    assert!(!has_bridge(), "it went down");

    let told = pages.sentence(node, page, "pve-sandbox-agent bridge init");
    assert!(told.contains("bridge vmbr1 is up"), "{told}");
    assert!(has_bridge());
    assert_eq!(is_on(), ["active", "enabled"]);

    node.ok(&["systemctl", "stop", AGENT]);
    pages.sentence(node, page, "pve-sandbox-agent setup");
    assert_eq!(node.unit(AGENT, "ActiveState"), "active");
    let told = node.ok(&[AGENT, "setup"]);
    assert!(told.contains("nothing to do"), "it can be repeated: {told}");
    until_ready(node);
}

fn until_ready(node: &Booted) {
    let nodes = || node.ok(&[CLI, "node", "ls"]);
    until("a ready node", nodes, || !ctl::ready_nodes(node).is_empty());
}

fn cordon_and_drain(node: &Booted, pages: &mut Pages) {
    let nodes = || node.ok(&[CLI, "node", "ls"]);
    let has = |cordoned: bool| {
        ctl::ready_nodes(node).iter().any(|node| node["load"]["cordoned"] == cordoned)
    };
    pages.sentence(node, "operations.md", "sandboxctl node cordon pve2");
    until("a cordoned node", nodes, || has(true));
    pages.operation(node, "Empty a node", 0);
    until("a node that is back in use", nodes, || has(false));
}

fn adopt(node: &Booted, pages: &mut Pages) {
    let make = format!(
        "set -e; pct clone 9000 {THEIRS} --hostname theirs --description mine; \
         pct set {THEIRS} --net0 name=eth0,bridge=vmbr1,ip=10.100.1.207/24,gw=10.100.1.1; \
         pct start {THEIRS}"
    );
    node.ok(&["sh", "-c", &make]);
    let config = || node.ok(&["cat", &format!("/etc/pve/lxc/{THEIRS}.conf")]);
    let before = config();
    let mut block = pages.block(node, ("operations.md", "Adopt a container, or give one back", 0));
    block.next();
    assert_eq!(config(), before, "nothing is done without --yes");
    block.next();
    assert!(config().contains("team=acme"), "{}", config());
    block.rest();
    assert_eq!(config(), before, "it is given back as it was");
    node.ok(&["sh", "-c", &format!("pct stop {THEIRS} && pct destroy {THEIRS}")]);
}

fn uninstall(node: &Booted, pages: &mut Pages) {
    let mut block = pages.block(node, ("operations.md", "Uninstall", 0));
    block.next();
    let told = block.next();
    assert!(told.contains("no container of this node is a sandbox"), "{told}");
    assert_eq!(node.unit(AGENT, "ActiveState"), "active", "a dry run stops nothing");
    block.next();
    assert!(!node.path("/var/lib/pve-sandbox-agent").exists());
    // Of data that are there, the purge asks.
    node.ok(&["mkdir", "/var/lib/pve-sandbox-agent"]);
    let answer = "echo 'pve-sandbox-agent pve-sandbox-agent/remove-data boolean true' | debconf-set-selections";
    pages.sentence(node, "operations.md", answer);
    block.next();
    // The controller has to notice that the node is gone.
    let forget = block.next_until();
    assert!(forget.contains("forgotten"), "{forget}");
    block.rest();
    for gone in [
        "/var/lib/pve-sandbox-agent",
        "/etc/pve-sandbox/tls",
        "/etc/pve-sandbox/agent.toml",
        "/etc/pve-sandbox/dns.conf",
        "/etc/network/interfaces.d/pve-sandbox",
        "/usr/sbin/pve-sandbox-agent",
    ] {
        assert!(!node.path(gone).exists(), "{gone}");
    }
    let (code, told) = node.run(&["ip", "link", "show", "vmbr1"]);
    assert_ne!(code, Some(0), "{told}");
    let template = node.path("/etc/pve/lxc/9000.conf");
    assert!(template.exists(), "templates stay");
    pages.sentence(node, "operations.md", "pct destroy 9000");
    assert!(!template.exists());
    pages.operation(node, "Uninstall", 1);
    assert!(node.path("/var/lib/pve-sandbox-controller").is_dir(), "nobody was asked");
    assert!(!node.path("/usr/bin/sandboxctl").exists());
}
