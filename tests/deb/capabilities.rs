//! Capabilities of the agent's unit: without any one of them the agent says so, and what it is needed for.
//! That each has a use is shown in the agent's own tests.

use std::fs;

use super::{booted::Booted, steps::AGENT};

/// Drop-in that takes one away.
const WITHOUT: &str = "/etc/systemd/system/pve-sandbox-agent.service.d/without.conf";

/// Starts the agent without each capability in turn, and with all of them again.
pub(crate) fn each_is_missed(node: &Booted) {
    let declared = node.unit(AGENT, "CapabilityBoundingSet").to_uppercase();
    let declared: Vec<_> = declared.split_whitespace().collect();
    assert!(declared.len() > 10, "{declared:?}");
    let at = node.path(WITHOUT);
    fs::create_dir_all(at.parent().expect("a folder")).expect("made");
    for capability in &declared {
        let without = format!("[Service]\nCapabilityBoundingSet=~{capability}\n");
        fs::write(&at, without).expect("written");
        node.ok(&["systemctl", "daemon-reload"]);
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
    fs::remove_file(&at).expect("removed");
    node.ok(&["systemctl", "daemon-reload"]);
    node.ok(&["systemctl", "reset-failed", AGENT]);
    node.ok(&["systemctl", "restart", AGENT]);
    // The machine that runs this test may not have all of them.
    let missing = missing(node);
    assert!(missing.len() < 3, "{missing:?}");
}

/// Names of the capabilities that `doctor` finds missing.
fn missing(node: &Booted) -> Vec<String> {
    let output = node.command(&[AGENT, "doctor", "--json"]).output().expect("nsenter");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("checks").iter();
    let missing = checks.filter(|check| check["name"] == "capability");
    missing.filter_map(|check| check["subject"].as_str().map(str::to_owned)).collect()
}
