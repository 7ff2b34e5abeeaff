//! Parts of a joined node that are still to be made: its bridge, its first template, an agent that runs.
//! `join` makes them, and `setup` makes those that are missing.

use std::{fmt, path::Path};

use ipnet::Ipv4Net;

use crate::{
    bridge::{self, Bridge, Plan},
    config::{self, Config, File, Flags},
    detect::{self, Roots},
};

/// Part that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// Bridge of the sandboxes, or its name or its address.
    Bridge,
    /// Template: without one no sandbox can be made.
    Template,
    /// Running agent.
    Agent,
}

impl fmt::Display for Lack {
    /// Writes what is to be done about it, beginning with a verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "make the bridge of the sandboxes",
            Self::Template => "make the first template",
            Self::Agent => "enable and start the agent and the ingress",
        })
    }
}

/// Parts of a node that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Bridge of the sandboxes.
    pub bridge: bool,
    /// First template, where the node has none.
    pub template: bool,
    /// Running units.
    pub start: bool,
}

/// Looks at the node, and changes nothing. `net` is the kernel's list of interfaces; `runs` says whether the
/// agent's unit is active.
///
/// # Errors
/// When the configuration cannot be read.
pub fn look(
    wanted: Wanted,
    paths: &bridge::Paths,
    net: &Path,
    runs: bool,
) -> Result<Vec<Lack>, daemon::config::Error> {
    let file = read(&paths.config)?;
    let mut lacks = Vec::new();
    if wanted.bridge && !has_bridge(&file, paths, net) {
        lacks.push(Lack::Bridge);
    }
    let config = Config::complete(file, &Flags::default(), &config::environment, net);
    // Of an incomplete configuration the templates are not known; the bridge may be all that it lacks.
    if wanted.template && config.is_ok_and(|config| config.templates.is_empty()) {
        lacks.push(Lack::Template);
    }
    if wanted.start && !runs {
        lacks.push(Lack::Agent);
    }
    Ok(lacks)
}

/// Returns true when the configuration file itself names a bridge. Without that the agent takes one that it
/// finds, which may be the one of the node's own network.
///
/// # Errors
/// When the configuration cannot be read.
pub fn names_a_bridge(config: &Path) -> Result<bool, daemon::config::Error> {
    Ok(read(config)?.network.bridge.is_some())
}

/// Returns true when a bridge has its interface, and its address on it.
pub fn is_up(bridge: &Bridge, roots: Roots<'_>) -> bool {
    let on_it = detect::on_bridge(roots, &bridge.name)
        .and_then(|on| Ipv4Net::new(on.address, on.prefix).ok());
    roots.net.join(&bridge.name).exists() && on_it == Some(bridge.address)
}

fn read(config: &Path) -> Result<File, daemon::config::Error> {
    match config.exists() {
        true => daemon::config::load(config),
        false => Ok(File::default()),
    }
}

fn has_bridge(file: &File, paths: &bridge::Paths, net: &Path) -> bool {
    let roots = Roots { pve: &file.pve.root, proc: &file.pve.proc, net };
    match bridge::plan(None, paths, net) {
        // An operator's own, or one that sandboxes have used: nothing is made.
        Ok(Plan::Named(_)) => true,
        Ok(Plan::Make(bridge)) => {
            bridge::made(paths).as_ref() == Some(&bridge.name)
                && paths.nat().exists()
                && file.network.bridge.as_ref() == Some(&bridge.name)
                && is_up(&bridge, roots)
        }
        // Whatever keeps it from being made is said when it is made.
        Err(_) => false,
    }
}
