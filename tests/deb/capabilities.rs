//! Takes each capability of a unit away in turn, and checks that the operator is told. `doctor` names the capabilities
//! that the agent lacks, and says that the name server of the sandboxes fails. The agent's own tests show what each
//! capability is needed for.

use std::{fs, path::PathBuf};

use super::{
    booted::Booted,
    steps::{AGENT, until},
};

const DNS: &str = "pve-sandbox-dns";

/// Starts the agent without each capability in turn, and with all of them again.
pub(crate) fn each_is_missed(node: &Booted) {
    let declared = declared(node, AGENT);
    assert!(declared.len() > 10, "{declared:?}");
    for capability in &declared {
        take_away(node, AGENT, capability);
        let (code, told) = node.run(&["systemctl", "restart", AGENT]);
        if code == Some(0) {
            let missing = missing(node);
            assert!(missing.iter().any(|one| one == capability), "{capability}: {missing:?}");
        } else {
            // Without the capability to drop others it does not start at all.
            let log = node.ok(&["journalctl", "--unit", AGENT, "--lines", "30", "--no-pager"]);
            assert!(log.contains("capabilit"), "{capability}: {told}: {log}");
        }
    }
    restore(node, AGENT);
    // The machine that runs this test may not have all of them.
    let missing = missing(node);
    assert!(missing.len() < 3, "{missing:?}");
}

/// Starts the name server of the sandboxes without each capability in turn, and with all of them again.
pub(crate) fn each_of_the_name_server_is_missed(node: &Booted) {
    let declared = declared(node, DNS);
    assert!(!declared.is_empty(), "it listens on port 53");
    let is = |state: &str| name_server(node) == state;
    assert!(is("ok"), "{}", name_server(node));
    for capability in &declared {
        take_away(node, DNS, capability);
        node.ok(&["systemctl", "reset-failed", DNS]);
        let (code, told) = node.run(&["systemctl", "restart", DNS]);
        assert_eq!(code, Some(1), "who starts it is told: {told}");
        // It is started again and again.
        let is_missed = || node.unit(DNS, "NRestarts") != "0" && is("failed");
        let log = || node.ok(&["journalctl", "--unit", DNS, "--lines", "30", "--no-pager"]);
        until(&format!("the name server to fail without {capability}"), log, is_missed);
        let log = log();
        assert!(log.contains("Permission denied"), "{capability}: {log}");
    }
    restore(node, DNS);
    until("the name server", || name_server(node), || is("ok"));
}

/// Names of the capabilities that a unit declares.
fn declared(node: &Booted, unit: &str) -> Vec<String> {
    let declared = node.unit(unit, "CapabilityBoundingSet").to_uppercase();
    declared.split_whitespace().map(str::to_owned).collect()
}

/// Drop-in of a unit that takes a capability away.
fn without(node: &Booted, unit: &str) -> PathBuf {
    node.path(&format!("/etc/systemd/system/{unit}.service.d/without.conf"))
}

fn take_away(node: &Booted, unit: &str, capability: &str) {
    let at = without(node, unit);
    fs::create_dir_all(at.parent().expect("a folder")).expect("made");
    fs::write(&at, format!("[Service]\nCapabilityBoundingSet=~{capability}\n")).expect("written");
    node.ok(&["systemctl", "daemon-reload"]);
}

fn restore(node: &Booted, unit: &str) {
    fs::remove_file(without(node, unit)).expect("removed");
    node.ok(&["systemctl", "daemon-reload"]);
    node.ok(&["systemctl", "reset-failed", unit]);
    node.ok(&["systemctl", "restart", unit]);
}

/// Checks of `doctor` with a name: subject and state of each.
fn found(node: &Booted, name: &str) -> Vec<(String, String)> {
    let output = node.command(&[AGENT, "doctor", "--json"]).output().expect("nsenter");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("checks").iter();
    let named = checks.filter(|check| check["name"] == name);
    let word = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    named.filter_map(|check| Some((word(&check["subject"])?, word(&check["state"])?))).collect()
}

/// Names of the capabilities that `doctor` finds missing.
fn missing(node: &Booted) -> Vec<String> {
    found(node, "capability").into_iter().map(|(subject, _)| subject).collect()
}

/// State that `doctor` finds the name server of the sandboxes in.
fn name_server(node: &Booted) -> String {
    let found = found(node, "name-server");
    found.first().map(|(_, state)| state.clone()).unwrap_or_default()
}
