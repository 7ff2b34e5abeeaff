//! `pve-sandbox-agent doctor`: each finding comes with what was broken, and goes with its remedy.

use daemon::doctor::State;

use crate::{
    node::Node,
    sick::{Sick, is_possible},
};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_wrong_with_a_whole_node() {
    if !is_possible() {
        return;
    }
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
    if !is_possible() {
        return;
    }
    let sick = Sick::start().await;
    sick.is_mended("configuration", "rm -r $ROOT/net/vmbr1").await;
    sick.is_mended("bridge", "echo > $ROOT/proc/net/fib_trie").await;
    sick.is_mended("nat", "nft delete table ip pve_sandbox_nat").await;
    sick.is_mended("forwarding", "echo 0 > $ROOT/proc/sys/net/ipv4/ip_forward").await;
    let gone = "dns=$(cat $ROOT/dns.pid); kill $dns; while kill -0 $dns 2>&-; do sleep 0.02; done";
    sick.is_mended("name-server", gone).await;
    sick.is_mended("isolation", "nft delete table inet pve_sandbox").await;
    // An edit, not a command.
    sick.sh("sed -i 's/^gateway/isolation = false\\ngateway/' $ROOT/agent.toml");
    let found = sick.findings().await;
    assert_eq!((found.len(), found[0].name, found[0].state), (1, "isolation", State::Warning));
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("isolation = true")));
    sick.sh("sed -i 's/isolation = false/isolation = true/' $ROOT/agent.toml");
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flaw_of_storage_template_and_programs_is_found_and_mended() {
    if !is_possible() {
        return;
    }
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
    found(to_dir, "template init --storage", back).await;
    sick.sh("mv $ROOT/pve/nodes/n1/lxc/9000.conf $ROOT/9000.conf");
    let missing = sick.findings().await;
    let names: Vec<_> = missing.iter().map(|check| check.name).collect();
    assert_eq!(names, ["template", "template"], "the template, and that no snapshot is offered");
    sick.sh("mv $ROOT/9000.conf $ROOT/pve/nodes/n1/lxc/9000.conf");
    assert_eq!(sick.findings().await, []);
    // A storage for new templates that no sandbox is on.
    sick.sh("sed -i '1i storage = \"slow\"' $ROOT/agent.toml");
    let found = sick.findings().await;
    let [unused] = &found[..] else { panic!("{found:?}") };
    assert_eq!((unused.name, unused.subject.as_str()), ("storage", "slow"));
    assert_eq!(unused.state, State::Warning, "what runs does not need it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_cannot_limit_is_a_warning() {
    if !is_possible() {
        return;
    }
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
}

#[tokio::test(flavor = "multi_thread")]
async fn used_up_pool_and_low_bounds_of_the_kernel_are_found_and_mended() {
    if !is_possible() {
        return;
    }
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
    if !is_possible() {
        return;
    }
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
    if !is_possible() {
        return;
    }
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
        // The agent that runs has still the certificate of before.
        let found = sick.findings().await;
        assert_eq!((found.len(), found[0].name), (1, "agent"), "{found:?}");
        assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
        sick.stop_agent().await;
        sick.start_agent().await;
        assert_eq!(sick.findings().await, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_agent_and_lost_cluster_are_found_and_mended() {
    if !is_possible() {
        return;
    }
    let mut sick = Sick::start().await;
    sick.stop_agent().await;
    let found = sick.findings().await;
    let finding = found.iter().find(|check| check.name == "agent").expect("a finding");
    assert!(
        finding.remedy.as_deref().is_some_and(|text| text.starts_with("systemctl start")),
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
