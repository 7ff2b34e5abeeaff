//! `pve-sandbox-agent doctor` on the sandboxes' bridge and on PVE's firewall: what the remedies say is what mends it.

use agent::bridge::{Error, Plan};
use daemon::doctor::{Check, State};

use crate::{patient::Patient as _, sick::Sick};

/// Returns the one thing that is wrong.
async fn only(sick: &Sick, name: &str) -> (Check, String) {
    let found = sick.findings().await;
    let [one] = &found[..] else { panic!("{name}: {found:?}") };
    assert_eq!(one.name, name, "{one:?}");
    (one.clone(), one.remedy.clone().expect("a remedy"))
}

/// Has agent.toml name this bridge.
fn name_bridge(sick: &Sick, name: &str) {
    sick.sh(&format!("sed -i 's/^bridge = .*/bridge = \"{name}\"/' $ROOT/agent.toml"));
}

#[tokio::test(flavor = "multi_thread")]
async fn named_bridge_that_cannot_be_used_is_found_until_the_made_one_is_named() {
    let sick = Sick::start().await;
    // Mistyped, and an interface that is no Linux bridge.
    for (name, finding) in [("vmbr11", "configuration"), ("eth9", "bridge")] {
        sick.sh("mkdir -p $ROOT/net/eth9");
        name_bridge(&sick, name);
        let (found, remedy) = only(&sick, finding).await;
        assert_eq!(found.state, State::Failed);
        let edit = format!("set network.bridge = \"vmbr1\" in {}", sick.path("agent.toml"));
        assert_eq!(remedy, edit, "{name}");
        name_bridge(&sick, "vmbr1");
        assert_eq!(sick.findings().await, [], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_bridge_that_is_gone_is_refused_by_bridge_init_until_it_is_not_named() {
    let sick = Sick::start().await;
    sick.sh(
        "rm -r $ROOT/interfaces.d/pve-sandbox $ROOT/net/vmbr1; sed -i /^vmbr1/d $ROOT/proc/net/route\n\
         echo > $ROOT/proc/net/fib_trie",
    );
    name_bridge(&sick, "vmbr5");
    let (_, remedy) = only(&sick, "configuration").await;
    let error = sick.bridge_init().expect_err("it must not end well");
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let (edit, command) = remedy.split_once("; then: ").expect("an edit, and a command");
    let taken_out = format!("take network.bridge out of {}", sick.path("agent.toml"));
    assert!(edit.starts_with(&taken_out), "{edit}");
    sick.sh("sed -i '/^bridge = /d' $ROOT/agent.toml");
    sick.run(command).await;
    assert_eq!(sick.findings().await, []);
    assert!(matches!(sick.bridge_init(), Ok(Plan::Make(bridge)) if bridge.name == "vmbr1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_files_of_the_bridge_are_found_and_mended() {
    let sick = Sick::start().await;
    let nat = "rm $ROOT/etc/nat.nft";
    sick.is_mended("nat", &format!("{nat}; nft delete table ip pve_sandbox_nat")).await;
    // What is loaded works until the node's next start.
    sick.sh(nat);
    assert_eq!(only(&sick, "nat").await.0.state, State::Warning);
    sick.is_mended("nat", "true").await;
    sick.is_mended("name-server", "rm $ROOT/etc/dns.conf").await;
    let gateway = "sed -i 's/^gateway = .*/gateway = \"10.100.1.254\"/' $ROOT/agent.toml";
    sick.sh(gateway);
    let (_, remedy) = only(&sick, "bridge").await;
    let edit = format!("set network.gateway = \"10.100.1.1\" in {}", sick.path("agent.toml"));
    assert_eq!(remedy, edit);
    sick.sh(&gateway.replace("10.100.1.254", "10.100.1.1"));
    assert_eq!(sick.findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn firewall_of_pve_that_drops_what_sandboxes_ask_is_found_until_its_rules_accept_that() {
    let sick = Sick::start().await;
    sick.sh(
        "mkdir $ROOT/pve/firewall; printf '[OPTIONS]\\nenable: 1\\n' > $ROOT/pve/firewall/cluster.fw",
    );
    let (closed, remedy) = only(&sick, "firewall").await;
    assert_eq!(closed.state, State::Warning);
    assert!(closed.found.contains("udp 53, 10053"), "{closed:?}");
    let (place, rules) = remedy.split_once("): ").expect("a place, and rules");
    let file = sick.path("pve/nodes/n1/host.fw");
    assert!(place.starts_with(&format!("add below [RULES] in {file} ")), "{place}");
    std::fs::write(&file, format!("[RULES]\n{}\n", rules.replace("; ", "\n"))).expect("written");
    assert_eq!(sick.findings().await, [], "{remedy}");
    // A rule that is switched off lets nothing in; a firewall that is switched off here, everything.
    sick.sh(&format!("sed -i 's/^IN/|IN/' {file}"));
    assert_eq!(only(&sick, "firewall").await.0, closed);
    sick.sh(&format!("printf '[OPTIONS]\\nenable: 0\\n' > {file}"));
    assert_eq!(sick.findings().await, []);
}
