//! `uninstall`: takes from a node what the operator does not want to keep. It prints what it does.
//!
//! The agent's unit is stopped first. Then sandboxes are deleted by an agent in this process, so the rules
//! are those of always: journal and mark. Last come the bridge and the data.

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use agent::{
    bridge, caddy_settings,
    config::{self, Config, Flags},
    firewall::nft::NftFirewall,
    ingress::{low_ports, systemd::UNITS as UNITS_DIR},
    join::other_caddy,
    pve::pmxcfs,
    sandbox::exec::shims::Shims as _,
    tunnel::{UNIT as TUNNEL_UNIT, node as tunnel_node},
    uninstall::{self, Ask, Choice, Found, MASKED_CADDY, Plan},
};
use anyhow::{Context, Result};
use daemon::{chain::Chain, systemctl};
use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use crate::{
    node_setup::{DNS_UNIT, GREEN_UNIT, UNITS},
    production::{self, Assembled},
};

/// Program of ifupdown2 that takes one interface down.
const IFDOWN: &str = "/usr/sbin/ifdown";
/// Longest answer on the terminal, bytes.
const ANSWER_MAX: u64 = 64;
/// Sandboxes that are deleted at a time.
const DELETES_MAX: usize = 8;
/// Longest wait for one deletion.
const DELETE: Duration = Duration::from_secs(180);
/// Times that what could not be deleted is tried again.
const ROUNDS: usize = 2;
/// Longest wait for pending operations at the end.
const DRAIN: Duration = Duration::from_secs(40);
/// Directory of the agent's own keys and configuration.
const CONFIG_DIR: &str = "/etc/pve-sandbox";
/// Endings of what renewals and crashes leave beside a file: daemon/src/key_files.rs, daemon/src/replace.rs.
const BESIDE: [&str; 6] = ["new", "lock", "next", "next.new", "next.for", "next.for.new"];
/// Network interfaces of the host.
const NET: &str = "/sys/class/net";
/// Caddy's own state, and its access log.
const INGRESS: [&str; 2] = ["/var/lib/pve-sandbox-ingress", "/var/log/pve-sandbox-ingress"];

/// Removes from this node what flags and answers say.
pub(crate) fn uninstall(flags: &uninstall::Flags, path: &Path) -> Result<()> {
    let config = Config::load(Some(path), &Flags::default(), &config::environment)
        .context("without its configuration nobody can tell what is on this node")?;
    let paths = bridge::Paths::of_host(path);
    let configs = config.pve.root.join(pmxcfs::configs(&config.node.value));
    let found = Found {
        sandboxes: uninstall::marked(&configs)?,
        bridge: bridge::made(&paths).filter(|made| *made == config.network.bridge),
        has_data: config.state_dir.exists(),
        tunnel: tunnel_of(&config),
    };
    uninstall::listing(&found).iter().for_each(|line| println!("{line}"));

    let is_terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    let mut ask = |question: &str| answer(question);
    let plan = match uninstall::decide(flags, &found, is_terminal.then_some(&mut ask as Ask<'_>)) {
        // A first look needs no choices.
        Err(uninstall::Error::Missing(missing)) if flags.dry_run => {
            println!("nothing was done; it would have to be told: {}", missing.join(", "));
            return Ok(());
        }
        decided => decided?,
    };
    if plan.data == Choice::Delete {
        uninstall::check_data(&config.state_dir, Path::new(config::STATE_DIR))?;
    }
    println!("{}", if flags.dry_run { "this would be done:" } else { "this will be done:" });
    uninstall::steps(plan, &found).iter().for_each(|line| println!("  {line}"));
    if flags.dry_run {
        return Ok(());
    }
    if !flags.yes {
        uninstall::confirm(&mut ask)?;
    }
    remove(&config, &paths, plan, &found, &configs)
}

/// Returns the tunnel that this node is a connector of. Settings that cannot be read are one, too.
fn tunnel_of(config: &Config) -> Option<String> {
    let settings = tunnel_node::settings(&tunnel_node::Paths::of_host(config));
    settings.map_or_else(|error| Some(error.to_string()), |found| found.map(|found| found.name))
}

/// Asks on the terminal.
fn answer(question: &str) -> io::Result<String> {
    io::stderr().write_all(question.as_bytes())?;
    let mut line = String::new();
    io::stdin().lock().take(ANSWER_MAX).read_line(&mut line)?;
    Ok(line)
}

fn remove(
    config: &Config,
    paths: &bridge::Paths,
    plan: Plan,
    found: &Found,
    configs: &Path,
) -> Result<()> {
    if systemctl::is_there() {
        // The agent first, and until it has ended: it would start a Caddy again, which cancels a stop of both.
        let [agent, ingress] = UNITS;
        systemctl::run(&["stop", agent])?;
        systemctl::run(&["stop", ingress, GREEN_UNIT])?;
        if found.tunnel.is_some() {
            systemctl::run(&["disable", "--now", "--quiet", TUNNEL_UNIT])?;
        }
    }
    let mut deleted = 0;
    if plan.sandboxes == Choice::Delete && config.journal().exists() {
        deleted = delete_sandboxes(config)?;
    }
    // Looked at again: a creation may have ended just before the agent was stopped.
    let left = uninstall::marked(configs)?;
    if plan.sandboxes == Choice::Delete && !left.is_empty() {
        left.iter().for_each(|one| println!("still here: {one}"));
        anyhow::bail!(
            "{} containers with a mark are not in the journal, so they are not deleted: take them \
             back (`sandboxctl admin recover`) or destroy them (`pct destroy`); the rest stays as it is",
            left.len()
        );
    }
    let is_empty = left.is_empty();
    if systemctl::is_there() {
        systemctl::run(&[&["disable", "--quiet"], &UNITS[..]].concat())?;
        if low_ports::arrange(Path::new(UNITS_DIR), false)? {
            systemctl::run(&["daemon-reload"])?;
        }
        if config.state_dir.join(MASKED_CADDY).exists() {
            systemctl::run(&["unmask", "--quiet", other_caddy::UNIT])?;
            fs::remove_file(config.state_dir.join(MASKED_CADDY))?;
        }
    }
    if let (Choice::Delete, Some(bridge), true) = (plan.bridge, &found.bridge, is_empty) {
        remove_bridge(bridge, paths)?;
    }
    if plan.data == Choice::Delete && is_empty {
        remove_data(config)?;
    }
    println!("now: apt purge pve-sandbox-agent");
    let lost = if deleted > 0 { " --lost" } else { "" };
    println!("then, where sandboxctl works: sandboxctl node forget {}{lost}", config.node.value);
    Ok(())
}

/// Deletes all sandboxes of the journal, and what isolates them; returns their number.
fn delete_sandboxes(config: &Config) -> Result<usize> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let assembled = Box::pin(production::assemble(config, &stop)).await;
        let Assembled { agent, shims, .. } = assembled.context("the sandboxes were not deleted")?;
        let sandboxes = agent.sandboxes();
        let count = sandboxes.live().len();
        for _ in 0..ROUNDS {
            let deletions = sandboxes.live().into_iter().map(|record| async move {
                match sandboxes.delete(&record.id, DELETE).await {
                    Ok(now) if now.phase.ended() => println!("deleted {}", record.id),
                    Ok(now) => println!("{} is still {:?}", record.id, now.phase),
                    Err(error) => println!("{} was not deleted: {}", record.id, Chain(&error)),
                }
            });
            stream::iter(deletions).buffer_unordered(DELETES_MAX).collect::<Vec<()>>().await;
        }
        let left = sandboxes.live().len();
        shims.sweep(&sandboxes.live().iter().map(|record| record.id).collect());
        shims.sweep_cgroups().await;
        stop.cancel();
        agent.drain(DRAIN).await;
        anyhow::ensure!(
            left == 0,
            "{left} sandboxes are not deleted yet, and nothing else was removed: repeat this command, or \
             start the agent again: systemctl start {}",
            UNITS.join(" ")
        );
        // What is left of them would hold for the next container with such a number.
        if let Err(error) = NftFirewall::default().remove().await {
            println!("the tables of nftables that isolated the sandboxes are still there: {error}");
        }
        Ok(count)
    })
}

fn remove_bridge(bridge: &str, paths: &bridge::Paths) -> Result<()> {
    uninstall::check_bridge(Path::new(NET), bridge)?;
    if systemctl::is_there() {
        systemctl::run(&["disable", "--now", "--quiet", DNS_UNIT])?;
    }
    systemctl::run_program(Path::new(IFDOWN), &[bridge], &[])
        .context("the bridge did not go down")?;
    for path in bridge::remove(paths)? {
        println!("{} {}", if path.exists() { "changed" } else { "removed" }, path.display());
    }
    Ok(())
}

/// Removes the journal, keys, certificates, and the files of Caddy and of the tunnel.
fn remove_data(config: &Config) -> Result<()> {
    let (own, hop) = (&config.tls, &config.ingress.tls);
    let caddy = &config.ingress.caddy_config;
    let files = [&own.ca, &own.cert, &own.key, &hop.ca, &hop.cert, &hop.key];
    let files = files.into_iter().cloned().chain([caddy.clone(), caddy.with_extension("proof")]);
    let files = files.chain(caddy_settings::copies(caddy));
    // What stands elsewhere is another program's, too.
    let ours = files.filter(|path| path.starts_with(CONFIG_DIR));
    for path in ours.flat_map(|path| with_next(&path)) {
        gone(&path, |path| fs::remove_file(path))?;
    }
    for path in tunnel_node::remove_files(&tunnel_node::Paths::of_host(config))? {
        println!("removed {}", path.display());
    }
    let dirs = [&own.key, &hop.key].map(|key| key.parent().unwrap_or(Path::new(CONFIG_DIR)));
    for dir in dirs.into_iter().filter(|dir| dir.starts_with(CONFIG_DIR)) {
        // Another file in it is not ours.
        gone(dir, |dir| match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                Err(io::ErrorKind::NotFound.into())
            }
            removed => removed,
        })?;
    }
    // Looked at again: the agent that deleted the sandboxes wrote there.
    uninstall::check_data(&config.state_dir, Path::new(config::STATE_DIR))?;
    // The directory itself: of a link only the link would be removed, and the keys would stay.
    let real = fs::canonicalize(&config.state_dir).unwrap_or_else(|_| config.state_dir.clone());
    for path in [real.as_path()].into_iter().chain(INGRESS.map(Path::new)) {
        gone(path, |path| fs::remove_dir_all(path))?;
    }
    Ok(())
}

/// Returns a file and what a renewal of it has left beside it.
fn with_next(path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_owned()];
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside =
        path.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let is_next = |entry: &fs::DirEntry| {
        entry.file_name().to_str().is_some_and(|other| is_beside(name, other))
    };
    all.extend(beside.filter(is_next).map(|entry| entry.path()));
    all
}

/// True for a file that a renewal of the first one has made. An operator's copy is none.
fn is_beside(name: &str, other: &str) -> bool {
    let ending = other.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
    ending.is_some_and(|ending| BESIDE.contains(&ending))
}

/// Removes what may be gone already, and says so.
fn gone(path: &Path, remove: impl Fn(&Path) -> io::Result<()>) -> Result<()> {
    match remove(path) {
        Ok(()) => println!("removed {}", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot remove {}", path.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_an_operator_are_not_left_by_a_renewal() {
        for other in ["agent.key.next", "agent.key.next.for", "agent.key.lock", "agent.key.new"] {
            assert!(is_beside("agent.key", other), "{other}");
        }
        for other in ["agent.key.backup", "agent.key", "agent.keys.next", "agent.key-next"] {
            assert!(!is_beside("agent.key", other), "{other}");
        }
    }
}
