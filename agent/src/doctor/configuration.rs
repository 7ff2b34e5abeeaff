//! Judges the configuration itself. Pure.

use std::path::Path;

use daemon::doctor::Check;

use super::{Host, facts::Facts};
use crate::{
    bridge,
    config::{Config, Error, Mistake},
};

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
                let remedy = remedy(mistake.what, facts, &host.bridge.config);
                Check::failed(NAME, mistake.what, mistake.why.clone(), remedy)
            };
            mistakes.iter().map(of_one).collect()
        }
    }
}

fn remedy(what: &str, facts: &Facts, config: &Path) -> String {
    let pmxcfs_is_down = facts.cluster.members.is_empty();
    match what {
        "network.bridge" | "network.gateway" | "network.pool" => {
            of_network(what, facts.named_bridge.as_deref(), facts.made_bridge.as_deref(), config)
        }
        "node" | "vmids.stripe" if pmxcfs_is_down => "systemctl restart pve-cluster".to_owned(),
        _ => {
            let path = config.display();
            format!("set {what} in {path}, then: pve-sandbox-agent check-config")
        }
    }
}

/// Says how sandboxes get a bridge, their gateway on it, and addresses in its network. `named`: the bridge that the file
/// names; `made`: the one that `bridge init` has made.
fn of_network(what: &str, named: Option<&str>, made: Option<&str>, config: &Path) -> String {
    let path = config.display();
    match (what, named, made) {
        // Mostly it is an edit; the bridge has another address where somebody has changed that.
        ("network.pool", Some(named), Some(made)) if named == made => format!(
            "set network.pool in {path} to a part of the network of {made}; or, where the address of {made} is wrong: \
             ifup --force {made}"
        ),
        (_, Some(named), Some(made)) if named == made => format!("ifup --force {made}"),
        ("network.bridge", Some(_), _) => bridge::instead(made, config),
        (_, Some(_), _) => format!("set {what} in {path}; or {}", bridge::instead(made, config)),
        // The line that `bridge init` has written is gone: it is written again.
        (_, None, Some(_)) => "pve-sandbox-agent bridge init".to_owned(),
        (_, None, None) => format!("pve-sandbox-agent bridge init; or set {what} in {path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_of_a_bridge_that_is_not_there_names_one_that_is() {
        let of = |what, named, made| of_network(what, named, made, Path::new("/x/agent.toml"));
        let (bridge, own, init) =
            ("network.bridge", Some("vmbr1"), "pve-sandbox-agent bridge init");
        assert_eq!(of(bridge, own, own), "ifup --force vmbr1");
        let mistyped = of(bridge, Some("vmbr11"), own);
        assert_eq!(mistyped, "set network.bridge = \"vmbr1\" in /x/agent.toml");
        let gone = of(bridge, Some("vmbr5"), None);
        assert!(gone.starts_with("take network.bridge out of /x/agent.toml"), "{gone}");
        assert!(gone.ends_with(init), "{gone}");
        assert_eq!(of(bridge, None, own), init);
        assert!(of(bridge, None, None).starts_with(init));
        // Whatever else a bridge of the operator's lacks, `bridge init` does not give it.
        for what in ["network.gateway", "network.pool"] {
            let told = of(what, Some("vmbr5"), None);
            assert!(told.starts_with(&format!("set {what} in /x/agent.toml; or take ")), "{told}");
        }
    }
}
