//! `pve-sandbox-agent doctor`: each finding comes with what was broken, and goes with its remedy.

use std::{
    fs,
    net::SocketAddr,
    process::{Command as Process, Stdio},
    time::Duration,
};

use agent::{
    commands::{Cli, Command, TemplateCommand},
    journal::{self, Journal as _, Pools, SqliteJournal},
    template::{self, Named},
};
use clap::Parser as _;
use daemon::doctor::State;
use proto::id::Vmid;

use crate::{
    node::Node,
    patient::Patient as _,
    sick::{Running, Sick},
};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_wrong_with_a_whole_node() {
    let sick = Sick::start().await;
    let report = sick.report().await;
    assert_eq!(sick.findings().await, [], "{}", report.text());
    let names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
    for name in [
        "configuration",
        "privileges",
        "quorum",
        "clock",
        "program",
        "certificate",
        "bridge",
        "nat",
        "forwarding",
        "name-server",
        "isolation",
        "pool",
        "storage",
        "template",
        "limits",
        "disk",
        "agent",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert!(report.text().lines().all(|line| line.chars().count() <= 80), "{}", report.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_the_network_is_found_and_mended() {
    let sick = Sick::start().await;
    sick.is_mended("configuration", "rm -r $ROOT/net/vmbr1").await;
    sick.is_mended("bridge", "echo > $ROOT/proc/net/fib_trie").await;
    sick.is_mended("nat", "nft delete table ip pve_sandbox_nat").await;
    sick.is_mended("forwarding", "echo 0 > $ROOT/proc/sys/net/ipv4/ip_forward").await;
    let gone = "dns=$(cat $ROOT/dns.pid); kill $dns\n\
                timeout 10 sh -c 'while kill -0 $0 2>&-; do sleep 0.02; done' $dns";
    sick.is_mended("name-server", gone).await;
    let server = sick.host().name_server.expect("an address");
    sick.sh(gone);
    another_name_server_is_found_until_it_leaves_the_address(&sick, server).await;
    sick.is_mended("isolation", "nft delete table inet pve_sandbox").await;
    // Remedies that the operator goes on from: something has the bridge's name, nft says why it fails.
    sick.sh("mv $ROOT/net/vmbr1/bridge $ROOT/bridge.off");
    let found = sick.findings().await;
    assert_eq!((found.len(), found[0].name, found[0].state), (1, "bridge", State::Failed));
    let remedy = found[0].remedy.as_deref().unwrap_or_default();
    assert!(remedy.starts_with("ip -d link show vmbr1"), "{remedy}");
    sick.sh("mv $ROOT/bridge.off $ROOT/net/vmbr1/bridge; touch $ROOT/unlisted");
    let found = sick.findings().await;
    let names: Vec<_> = found.iter().map(|check| check.name).collect();
    assert_eq!(names, ["nat", "isolation"], "{found:?}");
    assert!(found.iter().all(|check| check.remedy.as_deref() == Some("nft list tables")));
    sick.sh("rm $ROOT/unlisted");
    assert_eq!(sick.findings().await, []);
    // An edit, not a command.
    sick.sh("sed -i 's/^gateway/isolation = false\\ngateway/' $ROOT/agent.toml");
    let found = sick.findings().await;
    assert_eq!((found.len(), found[0].name, found[0].state), (1, "isolation", State::Warning));
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("isolation = true")));
    sick.sh("sed -i 's/isolation = false/isolation = true/' $ROOT/agent.toml");
    assert_eq!(sick.findings().await, []);
}

/// Has another resolver of the node answer at the address of the sandboxes' name server, which has ended.
async fn another_name_server_is_found_until_it_leaves_the_address(
    sick: &Sick,
    address: SocketAddr,
) {
    let resolver = tokio::net::UdpSocket::bind(address).await.expect("free");
    let serving = tokio::spawn(async move {
        let mut question = [0; 512];
        while let Ok((length, from)) = resolver.recv_from(&mut question).await {
            question[2] |= 0x80;
            resolver.send_to(&question[..length], from).await.expect("answered");
        }
    });
    let of_another = async || {
        let found = sick.findings().await;
        let [one] = &found[..] else { panic!("{found:?}") };
        assert_eq!((one.name, one.state), ("name-server", State::Failed));
        let remedy = one.remedy.clone().expect("a remedy");
        let ss = format!("ss -lunp 'sport = :{}' shows what does", address.port());
        assert!(remedy.starts_with(&ss), "{remedy}");
        remedy
    };
    let remedy = of_another().await;
    serving.abort();
    serving.await.expect_err("it listens elsewhere now");
    let (_, restart) = remedy.split_once("then: ").expect("a command");
    sick.sh(restart);
    assert_eq!(sick.findings().await, [], "{restart}");
    // A dnsmasq of the node's own is none of ours, either.
    sick.sh("mv $ROOT/dns.pid $ROOT/other.pid");
    of_another().await;
    sick.sh("mv $ROOT/other.pid $ROOT/dns.pid");
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_the_clock_is_found_and_mended() {
    let sick = Sick::start().await;
    sick.is_mended("clock", "touch $ROOT/unsynchronised").await;
    // Where controller and node are apart, the node's certificate begins in the node's future.
    sick.is_mended("certificate", "touch $ROOT/behind $ROOT/unsynchronised").await;
    sick.sh("touch $ROOT/behind $ROOT/unsynchronised");
    let found = sick.findings().await;
    let behind = found.iter().find(|check| check.name == "certificate").expect("a finding");
    assert!(behind.found.contains("the clock of this machine is behind"), "{behind:?}");
    // With a clock that is right, it was the maker's that was wrong.
    sick.sh("rm $ROOT/unsynchronised");
    let found = sick.findings().await;
    let [early] = &found[..] else { panic!("{found:?}") };
    assert!(early.found.contains("made while a clock was ahead"), "{early:?}");
    sick.sh("rm $ROOT/behind; mv $ROOT/bin/timedatectl $ROOT/timedatectl");
    let found = sick.findings().await;
    let [silent] = &found[..] else { panic!("{found:?}") };
    assert_eq!((silent.name, silent.remedy.as_deref()), ("clock", Some("timedatectl status")));
    sick.sh("mv $ROOT/timedatectl $ROOT/bin/timedatectl");
    assert_eq!(sick.findings().await, []);
}

/// Number of a process that Linux gives to none.
const AGENT_PID: u32 = 4_194_305;

/// Shows an agent that runs, as the kernel does; its program is this file.
fn show_agent(sick: &Sick, pid: u32, program: &str) {
    let own = format!("$ROOT/proc/{pid}");
    sick.sh(&format!(
        "mkdir -p {own}/ns $ROOT/proc/self/ns; ln -sf 'pid:[1]' {own}/ns/pid\n\
         ln -sf 'pid:[1]' $ROOT/proc/self/ns/pid; ln -s '{program}' {own}/exe\n\
         echo '{pid} (agent) S 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 7 0 0' > {own}/stat\n\
         printf '/usr/bin/pve-sandbox-agent\\000run\\000' > {own}/cmdline"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn older_agent_one_without_its_rights_and_a_stranger_are_found() {
    let mut sick = Sick::start().await;
    show_agent(&sick, AGENT_PID, "/usr/bin/pve-sandbox-agent");
    assert_eq!(sick.findings().await, []);
    let replaced = format!("ln -sfn '/usr/bin/agent (deleted)' $ROOT/proc/{AGENT_PID}/exe");
    sick.is_mended("agent", &replaced).await;

    // A drop-in of its unit has taken its capabilities.
    let bound = Process::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all", "sleep", "300"])
        .stdin(Stdio::null())
        .spawn()
        .expect("setpriv");
    let bound = Running(bound);
    let status = format!("/proc/{}/status", bound.0.id());
    let has_none = || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        text.lines().any(|line| line == "CapEff:\t0000000000000000")
    };
    let waited = async {
        while !has_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waited).await.expect("it has none in time");
    show_agent(&sick, bound.0.id(), "/usr/bin/pve-sandbox-agent");
    let found = sick.findings().await;
    drop(bound);
    assert!(!found.is_empty() && found.iter().all(|check| check.name == "capability"), "{found:?}");
    let remedy = found[0].remedy.as_deref().unwrap_or_default();
    assert!(remedy.starts_with("systemctl cat pve-sandbox-agent shows which file"), "{remedy}");
    sick.sh("systemctl restart pve-sandbox-agent");
    assert_eq!(sick.findings().await, []);

    sick.stop_agent().await;
    let other = tokio::net::TcpListener::bind(sick.node.address).await.expect("free");
    // The controller calls it, too.
    let silent = tokio::spawn(async move { while other.accept().await.map(drop).is_ok() {} });
    let found = sick.findings().await;
    let [stranger] = &found[..] else { panic!("{found:?}") };
    assert_eq!((stranger.name, stranger.state), ("agent", State::Failed));
    assert!(stranger.remedy.as_deref().is_some_and(|text| text.starts_with("ss -ltnp")));
    silent.abort();
    silent.await.expect_err("aborted");
    sick.start_agent().await;
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_number_of_the_node_is_found_until_it_is_confirmed() {
    let sick = Sick::start().await;
    let vmid = |number| Vmid::try_from(number).expect("in range");
    let pools = Pools {
        vmids: (vmid(100_000), vmid(100_999)),
        addresses: ([10, 100, 1, 2].into(), [10, 100, 1, 254].into()),
        address_quarantine_ms: 0,
    };
    fs::create_dir_all(sick.node.file("state")).expect("made");
    let path = sick.node.file("state/journal.sqlite");
    let journal = SqliteJournal::open(&path, pools).expect("a journal");
    // As `confirm-node-number` does.
    let confirm = async |number| {
        let node = journal::Node { name: sick.node.name().clone(), number };
        journal.set_node(&node).await.expect("written");
    };
    confirm(1).await;
    assert_eq!(sick.findings().await, []);
    confirm(2).await;
    let found = sick.findings().await;
    let [changed] = &found[..] else { panic!("{found:?}") };
    assert_eq!((changed.name, changed.state), ("node-number", State::Failed));
    assert_eq!(
        changed.remedy.as_deref(),
        Some(
            "systemctl stop pve-sandbox-agent; pve-sandbox-agent confirm-node-number; systemctl start \
             pve-sandbox-agent"
        )
    );
    confirm(1).await;
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_ingress_and_of_the_tunnel_are_found_and_mended() {
    let sick = Sick::start().await;
    let root = sick.path("");
    // The first of the commands: the other one needs Cloudflare.
    sick.sh("mkdir $ROOT/tunnel; echo nonsense > $ROOT/tunnel/settings.json");
    let found = sick.findings().await;
    let [settings] = &found[..] else { panic!("{found:?}") };
    assert_eq!((settings.name, settings.state), ("tunnel", State::Failed));
    let remedy = settings.remedy.as_deref().unwrap_or_default();
    let (first, rest) = remedy.split_once("; then ").expect("two commands");
    assert!(rest.starts_with("pve-sandbox-agent tunnel setup"), "{remedy}");
    sick.sh(first);
    assert_eq!(sick.findings().await, []);

    // No Caddy runs here: of the findings, only those of its files count.
    let ingress = format!(
        "\n[ingress]\ndomain = \"sbx.test\"\npublic = [\"127.0.0.1:1\"]\npeer = \"127.0.0.1:2\"\n\
         caddy_config = \"{root}web/caddy.json\"\naccess_log = \"\"\n"
    );
    fs::write(sick.node.file("agent.toml"), sick.node.config() + &ingress).expect("written");
    sick.sh("mkdir $ROOT/web");
    let of_files = async || {
        let found = sick.findings().await.into_iter();
        let names = ["configuration", "ingress-files", "ingress-certificate"];
        found.filter(|check| names.contains(&check.name)).collect::<Vec<_>>()
    };
    assert_eq!(of_files().await, []);
    for (name, breaks) in [
        ("ingress-files", "rmdir $ROOT/web"),
        ("ingress-files", "echo short > $ROOT/web/caddy.proof"),
        ("ingress-certificate", "chmod 644 $ROOT/tls/ingress-node.key"),
    ] {
        sick.sh(breaks);
        let found = of_files().await;
        let [one] = &found[..] else { panic!("{breaks}: {found:?}") };
        assert_eq!((one.name, one.state), (name, State::Failed), "{breaks}");
        sick.sh(one.remedy.as_deref().expect("a remedy"));
        assert_eq!(of_files().await, [], "{breaks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_storage_template_and_programs_is_found_and_mended() {
    let sick = Sick::start().await;
    sick.is_mended("program", "rm $ROOT/bin/lxc-attach").await;
    let hook = "echo 'hookscript: local:snippets/x' >> $ROOT/pve/nodes/n1/lxc/9000.conf";
    sick.is_mended("template", hook).await;
    // The remedies of these are done by hand, or on a real PVE.
    let found_of = async |name: &str, breaks: &str, text: &str, mends: &str| {
        sick.sh(breaks);
        let found = sick.findings().await;
        let one = found.iter().find(|check| check.name == name).expect("a finding");
        assert!(one.remedy.as_deref().is_some_and(|remedy| remedy.contains(text)), "{found:?}");
        sick.sh(mends);
        assert_eq!(sick.findings().await, [], "{mends}");
    };
    let ordinary = "sed -i /^template/d $ROOT/pve/nodes/n1/lxc/9000.conf";
    // Another container's number by mistake must not end as a template.
    let by_hand = "only if 9000 is meant to be a template: pct template 9000";
    found_of("template", ordinary, by_hand, "pct template 9000").await;
    let found = async |breaks: &str, text: &str, mends: &str| {
        found_of("storage", breaks, text, mends).await
    };
    let holds_none = "sed -i 's/content images,rootdir/content images/' $ROOT/pve/storage.cfg";
    let holds = "sed -i 's/content images/content images,rootdir/' $ROOT/pve/storage.cfg";
    found(holds_none, "`rootdir` must be in its content", holds).await;
    found("touch $ROOT/off", "pvesm status --storage fast", "rm $ROOT/off").await;
    let to_dir = "sed -i 's/^zfspool: fast/dir: fast/' $ROOT/pve/storage.cfg";
    let back = "sed -i 's/^dir: fast/zfspool: fast/' $ROOT/pve/storage.cfg";
    found(to_dir, "template init --snapshot debian --storage NAME", back).await;
    sick.sh("mv $ROOT/pve/nodes/n1/lxc/9000.conf $ROOT/9000.conf");
    let missing = sick.findings().await;
    let names: Vec<_> = missing.iter().map(|check| check.name).collect();
    assert_eq!(names, ["template", "template"], "the template, and that no snapshot is offered");
    // The agent that runs finds new templates at its start.
    let remedy = missing[1].remedy.as_deref().unwrap_or_default();
    assert_eq!(remedy, "pve-sandbox-agent template init; systemctl restart pve-sandbox-agent");
    sick.sh("mv $ROOT/9000.conf $ROOT/pve/nodes/n1/lxc/9000.conf");
    assert_eq!(sick.findings().await, []);
    // A storage for new templates that no sandbox is on.
    sick.sh("sed -i '1i storage = \"slow\"' $ROOT/agent.toml");
    let found = sick.findings().await;
    let [unused] = &found[..] else { panic!("{found:?}") };
    assert_eq!((unused.name, unused.subject.as_str()), ("storage", "slow"));
    assert_eq!(unused.state, State::Warning, "what runs does not need it");
    assert_eq!(unused.remedy.as_deref(), Some("set storage = \"fast\" in agent.toml"));
    sick.sh("sed -i 's/^storage = .*/storage = \"fast\"/' $ROOT/agent.toml");
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_not_decided_is_found_until_one_is_named() {
    let sick = Sick::start().await;
    // No template, and two storages whose room only PVE knows.
    let storages = "printf 'rbd: a\\n\\tcontent rootdir\\n\\nrbd: b\\n\\tcontent rootdir\\n\\n'";
    sick.sh(&format!(
        "mv $ROOT/pve/nodes/n1/lxc/9000.conf $ROOT/9000.conf; {storages} > $ROOT/pve/storage.cfg"
    ));
    let of_storage = async || {
        let found = sick.findings().await.into_iter();
        found.filter(|check| check.name == "storage").collect::<Vec<_>>()
    };
    let found = of_storage().await;
    let [undecided] = &found[..] else { panic!("{found:?}") };
    assert!(undecided.found.ends_with(": a, b"), "{undecided:?}");
    let remedy = undecided.remedy.as_deref().unwrap_or_default();
    let edit = remedy.strip_prefix("set ").and_then(|edit| edit.split_once(", or another"));
    let (edit, _) = edit.expect("an edit");
    assert_eq!(edit, "storage = \"a\"");
    sick.sh(&format!("sed -i '1i {edit}' $ROOT/agent.toml"));
    assert_eq!(of_storage().await, []);
}

/// Runs `template init` as far as where the template goes and which number it gets; what is there already stays.
fn template_init(sick: &Sick, line: &str) {
    let cli = Cli::try_parse_from(line.split_whitespace()).expect(line);
    let Command::Template { command: TemplateCommand::Init(init) } = cli.command else {
        panic!("{line} is another command");
    };
    let (snapshot, storage) = (init.snapshot.expect("named"), init.common.flags.storage);
    let named = Named { snapshot: Some(&snapshot), storage: storage.as_deref() };
    let vmid = template::vmid(&sick.node.file("pve"), sick.node.name(), named);
    let vmid = init.vmid.unwrap_or_else(|| vmid.expect("one is free"));
    let config = sick.node.file(&format!("pve/nodes/n1/lxc/{vmid}.conf"));
    if !config.exists() {
        let (mark, storage) = (mark(snapshot.as_str()), storage.expect("named"));
        let text = format!(
            "{mark}rootfs: {storage}:basevol-{vmid}-disk-0,size=4G\nunprivileged: 1\ntemplate: 1\n"
        );
        fs::write(config, text).expect("written");
    }
}

/// Returns the line by which the agent finds a template.
fn mark(snapshot: &str) -> String {
    format!("#pve-sandbox-template%3Av1 snapshot={snapshot} cores=1 memory_mib=512\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn template_on_a_storage_that_is_gone_is_replaced_by_the_remedy() {
    let sick = Sick::start().await;
    // One that `template init` has made: no [[template]], and its line.
    sick.sh("sed -i '/^\\[\\[template\\]\\]$/,/^vmid/d' $ROOT/agent.toml");
    sick.sh(&format!("sed -i '1i {}' $ROOT/pve/nodes/n1/lxc/9000.conf", mark("debian").trim()));
    sick.sh("echo '{\"ids\":{\"9000\":{\"node\":\"n1\",\"type\":\"lxc\"}}}' > $ROOT/pve/.vmlist");
    let spare = "printf 'zfspool: spare\\n\\tpool other\\n\\tcontent images,rootdir\\n\\n'";
    sick.sh(&format!("{spare} >> $ROOT/pve/storage.cfg"));
    assert_eq!(sick.findings().await, []);

    sick.sh("sed -i '/^zfspool: fast/,/^$/d' $ROOT/pve/storage.cfg");
    let found = sick.findings().await;
    let [gone] = &found[..] else { panic!("{found:?}") };
    assert_eq!((gone.name, gone.subject.as_str(), gone.state), ("storage", "fast", State::Failed));
    for step in gone.remedy.as_deref().expect("a remedy").split("; ") {
        match step.starts_with("pve-sandbox-agent ") {
            true => template_init(&sick, step),
            false => sick.sh(step),
        }
    }
    assert_eq!(sick.findings().await, [], "{gone:?}");
    assert!(sick.node.file("pve/nodes/n1/lxc/9001.conf").exists(), "it has another number");
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_address_that_the_other_nodes_do_not_dial_is_found_and_mended() {
    let sick = Sick::start().await;
    let ingress = "\n[ingress]\npeer = \"192.0.2.11:8481\"\ndomain = \"sbx.test\"\npublic = [\"127.0.0.1:1\"]\n";
    fs::write(sick.node.file("agent.toml"), sick.node.config() + ingress).expect("written");
    // No Caddy runs here: of the findings, only this one counts.
    let of_peer = async || {
        let found = sick.findings().await.into_iter();
        found.filter(|check| check.name == "peer").collect::<Vec<_>>()
    };
    sick.sh("sed -i 's/^peer = .*/peer = \"10.9.9.9:8481\"/' $ROOT/agent.toml");
    assert_eq!(of_peer().await, [], "there is no other node");
    let nodes =
        "\"n1\":{\"id\":1,\"online\":1,\"ip\":\"192.0.2.11\"},\"n2\":{\"id\":2,\"online\":1}";
    let members = format!(
        "{{\"nodename\":\"n1\",\"version\":1,\"cluster\":{{\"quorate\":1}},\"nodelist\":{{{nodes}}}}}"
    );
    fs::write(sick.node.file("pve/.members"), members).expect("written");
    for (breaks, state) in
        [("true", State::Failed), ("sed -i '/^peer = /d' $ROOT/agent.toml", State::Warning)]
    {
        sick.sh(breaks);
        let found = of_peer().await;
        let [one] = &found[..] else { panic!("{breaks}: {found:?}") };
        assert_eq!(one.state, state, "{breaks}");
        // An edit, and a command.
        let remedy = one.remedy.as_deref().expect("a remedy");
        let (edit, restart) = remedy.split_once("; ").expect("two steps");
        let line = edit.strip_prefix("set ").and_then(|edit| edit.split_once(" below [ingress] "));
        let (line, _) = line.expect("a line below [ingress]");
        sick.sh("sed -i '/^peer = /d' $ROOT/agent.toml");
        sick.sh(&format!("sed -i 's/^\\[ingress\\]$/&\\n{line}/' $ROOT/agent.toml"));
        sick.sh(restart);
        assert_eq!(of_peer().await, [], "{breaks}: {remedy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_cannot_limit_is_a_warning() {
    let sick = Sick::start().await;
    let found = async |breaks: &str| {
        sick.sh(breaks);
        let found = sick.findings().await;
        let warns =
            |check: &daemon::doctor::Check| (check.name, check.state) == ("limits", State::Warning);
        assert!(found.iter().all(warns), "{found:?}");
        found.into_iter().map(|check| check.subject).collect::<Vec<_>>()
    };
    assert_eq!(found("sed -i '/^io_/d' $ROOT/agent.toml").await, ["storage fast"], "ZFS");
    let controllers = "echo cpu memory > $ROOT/cgroup/cgroup.controllers";
    assert_eq!(found(controllers).await, ["cgroup controller pids", "cgroup controller io"]);
    // v1 has them under names of its own.
    let v1 = "for name in pids blkio; do mkdir $ROOT/cgroup/$name; : > $ROOT/cgroup/$name/cgroup.procs; done";
    assert_eq!(found(v1).await, ["storage fast"]);
    let off = ["read_mibps", "write_mibps", "read_iops", "write_iops"]
        .map(|name| format!("io_{name} = 0"));
    let off = format!("sed -i 's/^\\[limits\\]/&\\n{}/' $ROOT/agent.toml", off.join("\\n"));
    assert_eq!(found(&off).await, [""; 0], "that is meant");
    sick.is_mended("limits", "touch $ROOT/countless").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn used_up_pool_and_low_bounds_of_the_kernel_are_found_and_mended() {
    let sick = Sick::start().await;
    for (vmid, last) in [(100_001, 2), (100_002, 3)] {
        let net0 = format!("net0: name=eth0,bridge=vmbr1,ip=10.100.1.{last}/24");
        sick.sh(&format!("echo {net0} > $ROOT/pve/nodes/n1/lxc/{vmid}.conf"));
    }
    assert_eq!(sick.findings().await, []);
    // Edits, not commands.
    let pool =
        |pool: &str| sick.sh(&format!("sed -i 's|^pool = .*|pool = \"{pool}\"|' $ROOT/agent.toml"));
    pool("10.100.1.2-10.100.1.3");
    let found = sick.findings().await;
    let [used_up] = &found[..] else { panic!("{found:?}") };
    assert_eq!((used_up.name, used_up.state), ("pool", State::Failed));
    let remedy = used_up.remedy.as_deref().unwrap_or_default();
    assert!(remedy.contains("set network.pool in agent.toml"), "{remedy}");
    // Not in the bridge's network.
    pool("10.200.1.0/24");
    let found = sick.findings().await;
    let [elsewhere] = &found[..] else { panic!("{found:?}") };
    assert_eq!((elsewhere.name, elsewhere.subject.as_str()), ("configuration", "network.pool"));
    let remedy = elsewhere.remedy.as_deref().unwrap_or_default();
    assert!(remedy.starts_with("set network.pool in "), "{remedy}");
    pool("10.100.1.0/24");
    assert_eq!(sick.findings().await, []);

    let low = "mkdir -p $ROOT/proc/sys/kernel/keys; echo 200 > $ROOT/proc/sys/kernel/keys/maxkeys";
    sick.sh(low);
    let found = sick.findings().await;
    let [keys] = &found[..] else { panic!("{found:?}") };
    assert_eq!((keys.name, keys.state), ("kernel", State::Warning));
    let remedy = keys.remedy.as_deref().unwrap_or_default();
    let command = remedy.split(';').next().expect("a command");
    assert_eq!(command, "sysctl -w kernel.keys.maxkeys=506");
    sick.sh(command);
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn stuck_pmxcfs_is_found_without_getting_stuck() {
    let mut sick = Sick::start().await;
    sick.stop_agent().await;
    // A read waits for a writer that never comes, as it waits for a pmxcfs that is stuck.
    sick.sh("rm $ROOT/pve/.members; mkfifo $ROOT/pve/.members");
    let found = tokio::time::timeout(std::time::Duration::from_secs(20), sick.findings()).await;
    let found = found.expect("it ends");
    let [stuck] = &found[..] else { panic!("{found:?}") };
    assert_eq!((stuck.name, stuck.state), ("quorum", State::Failed));
    assert!(stuck.found.contains("does not answer"), "{stuck:?}");
    let remedy = stuck.remedy.as_deref().unwrap_or_default();
    assert!(remedy.starts_with("systemctl restart pve-cluster"), "{remedy}");
    sick.sh("rm $ROOT/pve/.members; systemctl restart pve-cluster");
    sick.start_agent().await;
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_the_certificate_is_found_and_mended() {
    let mut sick = Sick::start().await;
    sick.is_mended("certificate", "chmod 644 $ROOT/tls/node.key").await;

    // A renewal that a crash has interrupted is finished by a restart.
    sick.sh("mv $ROOT/tls/node.key $ROOT/tls/node.key.next");
    let found = sick.findings().await;
    let finding = found.iter().find(|check| check.name == "certificate").expect("a finding");
    assert_eq!(finding.remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
    sick.stop_agent().await;
    sick.start_agent().await;
    assert_eq!(sick.findings().await, []);

    // Another node's certificate, and one of another CA: the node joins again.
    let other = Node::new("n2");
    let line = sick.world.line("n2").await;
    other.join(&line).await.expect("it joins");
    let elsewhere = crate::world::World::start(std::time::Duration::from_secs(3600)).await;
    let foreign = Node::new("n1");
    let line = elsewhere.line("n1").await;
    foreign.join(&line).await.expect("it joins");
    for (from, flaw) in [(&other, "it is not for n1"), (&foreign, "has not signed it")] {
        for name in ["node.crt", "node.key"] {
            let from = from.file(&format!("tls/{name}")).display().to_string();
            sick.sh(&format!("cp -p {from} $ROOT/tls/{name}"));
        }
        let found = sick.findings().await;
        let finding = found.iter().find(|check| check.name == "certificate").expect("a finding");
        assert!(finding.found.contains(flaw), "{found:?}");
        let remedy = finding.remedy.as_deref().unwrap_or_default();
        assert!(remedy.starts_with("sandboxctl node token n1"), "{remedy}");
        let line = sick.world.line("n1").await;
        sick.node.join(&line).await.expect("it joins again");
        // The agent that runs has still the earlier certificate.
        let found = sick.findings().await;
        assert_eq!((found.len(), found[0].name), (1, "agent"), "{found:?}");
        assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
        sick.stop_agent().await;
        sick.start_agent().await;
        assert_eq!(sick.findings().await, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_a_boot_does_not_start_is_found_and_mended() {
    let sick = Sick::start().await;
    sick.is_mended("agent", "touch $ROOT/disabled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_agent_and_lost_cluster_are_found_and_mended() {
    let mut sick = Sick::start().await;
    sick.stop_agent().await;
    let found = sick.findings().await;
    let finding = found.iter().find(|check| check.name == "agent").expect("a finding");
    assert!(
        finding.remedy.as_deref().is_some_and(|text| text.starts_with("systemctl enable --now")),
        "{found:?}"
    );
    sick.start_agent().await;
    assert_eq!(sick.findings().await, []);

    sick.is_mended("quorum", "rm $ROOT/pve/.members").await;
    // A mistake in the file is told with its line, and nothing else is looked at that needs it.
    sick.sh("echo 'nonsense = 1' >> $ROOT/agent.toml");
    let found = sick.findings().await;
    let finding = found.iter().find(|check| check.name == "configuration").expect("a finding");
    assert!(finding.found.contains("nonsense"), "{found:?}");
    assert_eq!(finding.remedy, Some(format!("edit {}", sick.path("agent.toml"))));
    sick.sh("sed -i /nonsense/d $ROOT/agent.toml");
    assert_eq!(sick.findings().await, []);
}
