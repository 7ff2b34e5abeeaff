//! Judges the configuration itself. Pure.

use daemon::doctor::Check;

use super::{Host, facts::Facts};
use crate::config::{Config, Error, Mistake};

const NAME: &str = "configuration";

pub(super) fn check(config: &Result<Config, Error>, facts: &Facts, host: &Host) -> Vec<Check> {
    let path = host.bridge.config.display().to_string();
    match config {
        Ok(_) => vec![Check::ok(NAME, path, "complete and valid")],
        Err(Error::File(error)) => {
            let found = daemon::chain::Chain(error).to_string();
            vec![Check::failed(NAME, path.clone(), found, format!("edit {path}"))]
        }
        Err(Error::Mistakes(mistakes)) => {
            let of_one = |mistake: &Mistake| {
                let remedy = remedy(mistake.what, facts, &path);
                Check::failed(NAME, mistake.what, mistake.why.clone(), remedy)
            };
            mistakes.iter().map(of_one).collect()
        }
    }
}

fn remedy(what: &str, facts: &Facts, path: &str) -> String {
    let pmxcfs_is_down = facts.cluster.members.is_empty();
    match (what, &facts.made_bridge) {
        // Mostly it is an edit; the bridge has another address where somebody has changed that.
        ("network.pool", Some(bridge)) => format!(
            "set network.pool in {path} to a part of the network of {bridge}; or, where the address of {bridge} is \
             wrong: ifup --force {bridge}"
        ),
        ("network.bridge" | "network.gateway", Some(bridge)) => format!("ifup --force {bridge}"),
        ("network.bridge" | "network.gateway" | "network.pool", None) => {
            format!("pve-sandbox-agent bridge init; or set {what} in {path}")
        }
        ("node" | "vmids.stripe", _) if pmxcfs_is_down => {
            "systemctl restart pve-cluster".to_owned()
        }
        _ => format!("set {what} in {path}, then: pve-sandbox-agent check-config"),
    }
}
