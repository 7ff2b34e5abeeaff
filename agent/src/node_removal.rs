//! `uninstall`: takes from a node what the operator does not want to keep. It prints what it does.
//!
//! The agent's unit is stopped first. Then sandboxes are deleted by an agent in this process, so the rules
//! are those of always: journal and mark. Then come the data, and last the bridge: a run that ends in between can be
//! repeated, since only the deletion of sandboxes needs a complete configuration.

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use agent::{
    bridge, caddy_settings,
    config::{self, Basics, Config, Flags},
    firewall::nft::NftFirewall,
    ingress::{low_ports, systemd::UNITS as UNITS_DIR},
    join::other_caddy,
    journal::SqliteJournal,
    pve::{files::READS_MAX, looks::LOOKS_MAX, pmxcfs},
    sandbox::exec::shims::Shims as _,
    tunnel::{UNIT as TUNNEL_UNIT, node as tunnel_node},
    uninstall::{self, Ask, Choice, Found, MASKED_CADDY, Marked, Plan},
};
use anyhow::{Context, Result};
use daemon::{chain::Chain, systemctl};
use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use crate::{
    node_setup::{DNS_UNIT, GREEN_UNIT, UNITS, is_active},
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
/// Endings of what joins, renewals and crashes leave beside a file: agent/src/join/mod.rs, daemon/src/key_files.rs,
/// daemon/src/replace.rs.
const BESIDE: [&str; 8] =
    ["new", "lock", "next", "next.new", "next.for", "next.for.new", "for", "for.new"];
/// Network interfaces of the host.
const NET: &str = "/sys/class/net";
/// Caddy's own state, and its access log.
const INGRESS: [&str; 2] = ["/var/lib/pve-sandbox-ingress", "/var/log/pve-sandbox-ingress"];

/// Removes from this node what flags and answers say.
pub(crate) fn uninstall(flags: &uninstall::Flags, path: &Path) -> Result<()> {
    let basics = Basics::load(path, &config::environment)
        .context("without its configuration nobody can tell what is on this node")?;
    let paths = bridge::Paths::of_host(path);
    // A removal that was interrupted has taken the name from the file first.
    let named = basics.file.network.bridge.as_ref();
    let found = Found {
        sandboxes: marked(&basics)?,
        bridge: bridge::made(&paths).filter(|made| named.is_none_or(|named| named == made)),
        has_data: basics.state_dir.exists(),
        tunnel: tunnel_of(&basics),
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
        uninstall::check_data(&basics.state_dir, Path::new(config::STATE_DIR))?;
    }
    println!("{}", if flags.dry_run { "this would be done:" } else { "this will be done:" });
    uninstall::steps(plan, &found).iter().for_each(|line| println!("  {line}"));
    if flags.dry_run {
        return Ok(());
    }
    if !flags.yes {
        uninstall::confirm(&mut ask)?;
    }
    remove(&basics, &paths, plan, &found, flags)
}

/// Lists the containers of this node with a mark.
fn marked(basics: &Basics) -> Result<Vec<Marked>, uninstall::Error> {
    uninstall::marked(&basics.file.pve.root.join(pmxcfs::configs(&basics.node)))
}

/// Returns the places of the tunnel's files.
fn tunnel_paths(basics: &Basics) -> tunnel_node::Paths {
    tunnel_node::Paths::beside(&basics.file.ingress.caddy_config)
}

/// Returns the tunnel that this node is a connector of. Settings that cannot be read are one, too.
fn tunnel_of(basics: &Basics) -> Option<String> {
    let settings = tunnel_node::settings(&tunnel_paths(basics));
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
    basics: &Basics,
    paths: &bridge::Paths,
    plan: Plan,
    found: &Found,
    flags: &uninstall::Flags,
) -> Result<()> {
    stop_agent(|| uninstall::check_unseen(flags, plan, found, &marked(basics)?))?;
    if systemctl::is_there() {
        let [_agent, ingress] = UNITS;
        systemctl::run(&["stop", ingress, GREEN_UNIT])?;
        if found.tunnel.is_some() {
            systemctl::run(&["disable", "--now", "--quiet", TUNNEL_UNIT])?;
        }
    }
    let mut deleted = 0;
    if plan.sandboxes == Choice::Delete && basics.file.journal().exists() {
        deleted = delete_sandboxes(basics, &paths.config)?;
    }
    // Looked at again: not all may be in the journal.
    let left = marked(basics)?;
    if plan.sandboxes == Choice::Delete && !left.is_empty() {
        left.iter().for_each(|one| println!("still here: {one}"));
        anyhow::bail!(
            "{} containers with a mark are not in the journal, so they are not deleted: take them \
             back (systemctl start {}; then `sandboxctl admin recover`) or destroy them (`pct destroy`), and repeat \
             this command; the rest stays as it is",
            left.len(),
            UNITS.join(" ")
        );
    }
    let is_empty = left.is_empty();
    let bridge = found.bridge.as_deref().filter(|_| plan.bridge == Choice::Delete && is_empty);
    if let Some(bridge) = bridge {
        // Before anything is removed that an agent would need to go on with this bridge.
        uninstall::check_bridge(Path::new(NET), bridge)?;
    }
    if systemctl::is_there() {
        systemctl::run(&[&["disable", "--quiet"], &UNITS[..]].concat())?;
        if low_ports::arrange(Path::new(UNITS_DIR), false)? {
            systemctl::run(&["daemon-reload"])?;
        }
        if basics.state_dir.join(MASKED_CADDY).exists() {
            systemctl::run(&["unmask", "--quiet", other_caddy::UNIT])?;
            fs::remove_file(basics.state_dir.join(MASKED_CADDY))?;
        }
    }
    if plan.data == Choice::Delete && is_empty {
        remove_data(basics)?;
    }
    if let Some(bridge) = bridge {
        remove_bridge(bridge, paths)?;
    }
    let next = uninstall::afterwards(plan, found, !is_empty, deleted > 0, &basics.node);
    next.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Stops the agent, and waits for its end: it would start a Caddy again, which cancels a stop of both. An agent that ran is
/// started again where `check` says then that nothing may be removed.
fn stop_agent(check: impl FnOnce() -> Result<(), uninstall::Error>) -> Result<()> {
    let [agent, _ingress] = UNITS;
    let ran = systemctl::is_there() && is_active(agent);
    if systemctl::is_there() {
        systemctl::run(&["stop", agent])?;
    }
    let checked = check();
    if checked.is_err()
        && ran
        && let Err(error) = systemctl::run(&["start", agent])
    {
        // Why nothing is removed is the error; this comes beside it.
        eprintln!("{agent} was not started again: {error}");
    }
    Ok(checked?)
}

/// Deletes all sandboxes of this node; returns their number. Of a configuration that is not complete no agent can be
/// made, which is fine where no container is a sandbox.
fn delete_sandboxes(basics: &Basics, path: &Path) -> Result<usize> {
    let error = match Config::load(Some(path), &Flags::default(), &config::environment) {
        Ok(config) => return delete_all(&config),
        Err(error) => error,
    };
    // A record without a container may have disks left, or its container on another node.
    let has_records = SqliteJournal::has_live(&basics.file.journal()).unwrap_or(false);
    if has_records || !marked(basics)?.is_empty() {
        return Err(error).context(
            "the sandboxes were not deleted, and nothing else was removed; `pve-sandbox-agent doctor` says what mends \
             the configuration",
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(remove_tables());
    Ok(0)
}

/// Removes what isolated the sandboxes: it would hold for the next container with such a number.
async fn remove_tables() {
    if let Err(error) = NftFirewall::default().remove().await {
        println!("the tables of nftables that isolated the sandboxes are still there: {error}");
    }
}

/// Deletes all sandboxes of the journal, and what isolates them; returns their number.
fn delete_all(config: &Config) -> Result<usize> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(READS_MAX + LOOKS_MAX + 4)
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
                    Ok(now) => println!("{} is still {}", record.id, now.phase),
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
        remove_tables().await;
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
fn remove_data(basics: &Basics) -> Result<()> {
    let (own, hop) = (&basics.file.tls, &basics.file.ingress.tls);
    let caddy = &basics.file.ingress.caddy_config;
    let files = [&own.ca, &own.cert, &own.key, &hop.ca, &hop.cert, &hop.key];
    let files = files.into_iter().cloned().chain([caddy.clone(), caddy.with_extension("proof")]);
    let files = files.chain(caddy_settings::copies(caddy));
    // What stands elsewhere is another program's, too.
    let ours = files.filter(|path| path.starts_with(CONFIG_DIR));
    for path in ours.flat_map(|path| with_next(&path)) {
        gone(&path, |path| fs::remove_file(path))?;
    }
    for path in tunnel_node::remove_files(&tunnel_paths(basics))? {
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
    uninstall::check_data(&basics.state_dir, Path::new(config::STATE_DIR))?;
    // The directory itself: of a link only the link would be removed, and the keys would stay.
    let real = fs::canonicalize(&basics.state_dir).unwrap_or_else(|_| basics.state_dir.clone());
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
        assert!(is_beside("node.crt", "node.crt.for"), "a join has noted there what it was for");
        for other in ["agent.key.backup", "agent.key", "agent.keys.next", "agent.key-next"] {
            assert!(!is_beside("agent.key", other), "{other}");
        }
    }
}
