//! Decides what `pve-sandbox-agent uninstall` removes from a node, by flags or by answers on a terminal.
//! Removes nothing itself.
//!
//! | what | keep | delete |
//! |---|---|---|
//! | sandboxes | their containers run on; a later agent takes them in again by the journal | destroyed as always: by journal and mark |
//! | connector of a tunnel | stopped and disabled in any case: without an agent nobody routes; its files are data | |
//! | data (journal, keys) | needed for kept sandboxes | only where no container carries a mark |
//! | bridge of `bridge init` | needed for kept sandboxes | with its name server and its way out |

mod bridge;
mod data;
#[cfg(test)]
mod tests;

use std::{fmt, fs, io, path::Path};

use clap::{Args, ValueEnum};
use proto::{id::Vmid, name::NodeName};

use crate::{
    pve::{ContainerConfig, Mark},
    sys::read,
};

pub use bridge::check_bridge;
pub use data::{MASKED_CADDY, OWNERS, REVOKED_NODES, SANDBOX_NAMES, TEMPLATE, check_data};

/// Most containers of one node that are looked at.
const CONTAINERS_MAX: usize = 100_000;
/// Most sandboxes that are listed by name.
const SHOWN_MAX: usize = 50;

/// Decision about a part of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Leave it as it is.
    Keep,
    /// Remove it.
    Delete,
}

/// Arguments of `uninstall`. What is not given is asked on a terminal.
#[derive(Debug, Clone, Default, Args)]
pub struct Flags {
    /// Sandboxes of this node: keep their containers running for a later agent, or delete them
    #[arg(long, value_enum, value_name = "CHOICE")]
    pub sandboxes: Option<Choice>,
    /// Journal, keys and certificates of this node
    #[arg(long, value_enum, value_name = "CHOICE")]
    pub data: Option<Choice>,
    /// The bridge that `bridge init` has made, with its name server
    #[arg(long, value_enum, value_name = "CHOICE")]
    pub bridge: Option<Choice>,
    /// Do not ask whether to go on
    #[arg(long, short)]
    pub yes: bool,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// A container of this node that carries the mark of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// Number of the container.
    pub vmid: Vmid,
    /// Its mark; `None` for one that this version cannot read.
    pub mark: Option<Mark>,
}

impl fmt::Display for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mark {
            Some(mark) => {
                write!(f, "{} {} of team {}", self.vmid, mark.sandbox_id, mark.team)
            }
            None => write!(f, "{} with a mark that cannot be read", self.vmid),
        }
    }
}

/// Parts of this node that can be removed.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Containers with a mark.
    pub sandboxes: Vec<Marked>,
    /// Bridge that `bridge init` has made.
    pub bridge: Option<String>,
    /// Whether the state directory is there.
    pub has_data: bool,
    /// Name of the tunnel that this node is a connector of.
    pub tunnel: Option<String>,
}

/// Decision about each part. What is not there is to be deleted, so that nothing of it stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Sandboxes.
    pub sandboxes: Choice,
    /// Journal, keys and certificates.
    pub data: Choice,
    /// Bridge that `bridge init` has made.
    pub bridge: Choice,
}

/// Reason why nothing is removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Choices are missing, and nobody can be asked.
    #[error("there is no terminal to ask on: say {}", .0.join(" and "))]
    Missing(Vec<&'static str>),
    /// The choices contradict each other.
    #[error(
        "sandboxes that are kept need the {0}: say --{0} keep, or --sandboxes delete; containers without \
         their journal can be neither used nor deleted by an agent"
    )]
    Needed(&'static str),
    /// Sandboxes have come while the operator was asked.
    #[error(
        "{0} came to this node meanwhile: nothing was removed, and an agent that ran is started again. Say --sandboxes \
         keep, or --sandboxes delete"
    )]
    Unseen(String),
    /// The answer was none of the two words.
    #[error("{0:?} is neither keep nor delete: nothing was done")]
    Answer(String),
    /// The operator does not want to go on.
    #[error("nothing was done")]
    Declined,
    /// The terminal cannot be used.
    #[error("cannot ask")]
    Terminal(#[source] io::Error),
    /// Guests are connected to the bridge.
    #[error("the bridge {bridge} stays: it has the ports {ports}; stop or move these guests first")]
    HasPorts {
        /// Name of the bridge.
        bridge: String,
        /// Names of its ports.
        ports: String,
    },
    /// The ports of the bridge cannot be listed.
    #[error("the bridge {0} stays: its ports cannot be listed")]
    Ports(String, #[source] io::Error),
    /// The state directory may have files of others.
    #[error(
        "{dir} is not removed: {why}; nothing was done. If the data are to stay: --data keep; else move \
         what is not the agent's, or remove the directory by hand at the end"
    )]
    NotOurs {
        /// Directory that `state_dir` of the configuration names.
        dir: String,
        /// Reason.
        why: String,
    },
    /// The state directory cannot be read.
    #[error("cannot read {0}")]
    Data(String, #[source] io::Error),
    /// The node's containers cannot be read.
    #[error("cannot read the containers of this node in {0}")]
    Containers(String, #[source] io::Error),
}

/// Asks a question; returns the answer.
pub type Ask<'a> = &'a mut dyn FnMut(&str) -> io::Result<String>;

/// Lists the containers with a mark in PVE's directory of this node's configs.
///
/// # Errors
/// When the directory or a config cannot be read: then nobody can tell what is on this node.
pub fn marked(configs: &Path) -> Result<Vec<Marked>, Error> {
    let failed = |error| Error::Containers(configs.display().to_string(), error);
    let mut found = Vec::new();
    for entry in fs::read_dir(configs).map_err(failed)?.take(CONTAINERS_MAX) {
        let name = entry.map_err(failed)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".conf"));
        let Some(vmid) = stem.and_then(|stem| stem.parse::<Vmid>().ok()) else { continue };
        let bytes = match read::whole(&configs.join(&name), read::LARGE) {
            Ok(bytes) => bytes,
            // It was deleted in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        let config = ContainerConfig::parse(&bytes);
        if config.has_mark() {
            // The mark of a clone that somebody made names another container.
            let mark = config.mark().filter(|mark| mark.vmid == vmid);
            found.push(Marked { vmid, mark });
        }
    }
    found.sort_by_key(|marked| marked.vmid);
    Ok(found)
}

/// Lists what was found, for people.
pub fn listing(found: &Found) -> Vec<String> {
    let count = found.sandboxes.len();
    let mut lines = vec![match count {
        0 => "no container of this node is a sandbox".to_owned(),
        1 => "1 container of this node is a sandbox:".to_owned(),
        _ => format!("{count} containers of this node are sandboxes:"),
    }];
    lines.extend(found.sandboxes.iter().take(SHOWN_MAX).map(|one| format!("  {one}")));
    if count > SHOWN_MAX {
        lines.push(format!("  and {} more", count - SHOWN_MAX));
    }
    lines
}

/// Decides what is removed: by the flags, then by answers. `ask` is `None` where there is no terminal.
///
/// # Errors
/// When choices are missing, contradict each other, or the operator does not go on.
pub fn decide(flags: &Flags, found: &Found, mut ask: Option<Ask<'_>>) -> Result<Plan, Error> {
    let mut missing = Vec::new();
    let sandboxes = match (flags.sandboxes, found.sandboxes.is_empty()) {
        (Some(choice), _) => choice,
        (None, true) => Choice::Delete,
        (None, false) => choose(
            ask.as_mut(),
            "Its sandboxes: keep them running, or delete them? (keep/delete) ",
            "--sandboxes keep|delete",
            &mut missing,
        )?,
    };
    // An empty node has nothing that needs the rest.
    let keeps = sandboxes == Choice::Keep && !found.sandboxes.is_empty();
    let mut part = |given: Option<Choice>, name: &'static str, there: bool, question, flag| match (
        given, keeps,
    ) {
        (Some(Choice::Delete), true) => Err(Error::Needed(name)),
        (_, true) => Ok(Choice::Keep),
        (Some(choice), false) => Ok(choice),
        (None, false) if !there => Ok(Choice::Delete),
        (None, false) => choose(ask.as_mut(), question, flag, &mut missing),
    };
    let data = part(
        flags.data,
        "data",
        found.has_data,
        "Its journal, keys and certificates? (keep/delete) ",
        "--data keep|delete",
    )?;
    let bridge = part(
        flags.bridge,
        "bridge",
        found.bridge.is_some(),
        "The bridge of its sandboxes? (keep/delete) ",
        "--bridge keep|delete",
    )?;
    if !flags.yes && !flags.dry_run && ask.is_none() {
        missing.push("--yes");
    }
    if !missing.is_empty() {
        return Err(Error::Missing(missing));
    }
    Ok(Plan { sandboxes, data, bridge })
}

/// Asks for a choice; notes its flag where nobody can be asked, and goes on for the others.
fn choose(
    ask: Option<&mut Ask<'_>>,
    question: &str,
    flag: &'static str,
    missing: &mut Vec<&'static str>,
) -> Result<Choice, Error> {
    let Some(ask) = ask else {
        missing.push(flag);
        return Ok(Choice::Delete);
    };
    let answer = ask(question).map_err(Error::Terminal)?;
    match answer.trim() {
        "keep" | "k" => Ok(Choice::Keep),
        "delete" | "d" => Ok(Choice::Delete),
        other => Err(Error::Answer(other.to_owned())),
    }
}

/// Checks that no sandbox would be deleted that the operator was not shown. A flag speaks of all. `now`: the containers with
/// a mark after the agent's end.
///
/// # Errors
/// [`Error::Unseen`] with the first of them.
pub fn check_unseen(flags: &Flags, plan: Plan, found: &Found, now: &[Marked]) -> Result<(), Error> {
    if plan.sandboxes == Choice::Keep || flags.sandboxes.is_some() {
        return Ok(());
    }
    let unseen: Vec<_> = now.iter().filter(|one| !found.sandboxes.contains(one)).collect();
    let Some(first) = unseen.first() else { return Ok(()) };
    Err(Error::Unseen(match unseen.len() {
        1 => format!("sandbox {first}"),
        count => format!("{count} sandboxes ({first}, ...)"),
    }))
}

/// Says what a plan does, for people: one line for each part that is there.
pub fn steps(plan: Plan, found: &Found) -> Vec<String> {
    let mut lines = vec!["stop the agent and the ingress of this node".to_owned()];
    if let Some(tunnel) = &found.tunnel {
        lines.push(format!(
            "stop this node's connector of the tunnel {tunnel}, which stays at Cloudflare"
        ));
    }
    let count = found.sandboxes.len();
    match plan.sandboxes {
        Choice::Keep => lines.push(format!("keep {count} sandboxes, which run on")),
        Choice::Delete => {
            lines.push("delete all sandboxes of this node, with their disks".to_owned());
        }
    }
    lines.push(match plan.data {
        Choice::Keep => "keep the journal, the keys and the certificates".to_owned(),
        Choice::Delete => "remove the journal, the keys and the certificates".to_owned(),
    });
    if let Some(bridge) = &found.bridge {
        lines.push(match plan.bridge {
            Choice::Keep => format!("keep the bridge {bridge}"),
            Choice::Delete => format!("remove the bridge {bridge} and its name server"),
        });
    }
    lines
}

/// Says what the operator does after the plan was carried out, for people. `keeps`: sandboxes stay on the node;
/// `deleted`: some were deleted, and the controller did not hear of it.
pub fn afterwards(
    plan: Plan,
    found: &Found,
    keeps: bool,
    deleted: bool,
    node: &NodeName,
) -> Vec<String> {
    // A purge would ask once more what becomes of the data.
    let remove = "now: apt remove pve-sandbox-agent";
    if keeps {
        let later = "later: install the package again, and run `pve-sandbox-agent setup`: the sandboxes are taken in \
                     again. Until then the controller shows them as unreachable";
        let mut lines = vec![remove.to_owned(), later.to_owned()];
        if found.tunnel.is_some() {
            // The uninstallation has disabled it, and `setup` knows nothing of tunnels.
            lines.push("then: systemctl enable --now pve-sandbox-tunnel".to_owned());
        }
        return lines;
    }
    let now = match plan.data {
        Choice::Keep => remove,
        Choice::Delete => "now: apt purge pve-sandbox-agent",
    };
    let lost = if deleted { " --lost" } else { "" };
    let then = format!("then, where sandboxctl works: sandboxctl node forget {node}{lost}");
    vec![now.to_owned(), then]
}

/// Asks whether to go on.
///
/// # Errors
/// When the answer is not yes.
pub fn confirm(ask: Ask<'_>) -> Result<(), Error> {
    let answer = ask("Go on? (yes/no) ").map_err(Error::Terminal)?;
    match answer.trim() {
        "yes" | "y" => Ok(()),
        _ => Err(Error::Declined),
    }
}
