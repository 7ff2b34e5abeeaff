//! `make bench`: measures costs, each figure beside the value that it is compared with, in the same
//! run.
//!
//! Runs in the lab's network, against its controller and its agents; `recovery`, `placement`, `fleet`,
//! `http` and `install` need no lab. `install` runs on demand only: it boots roots of Debian. Figures marked
//! `modelled` include the cost of the real `pct`: the stand-in then burns the CPU time that was measured with it.

#![expect(clippy::disallowed_methods, reason = "a bench measures the real clock")]

mod abuse;
mod busy;
mod figures;
mod fleet;
mod hand;
mod http;
mod inside;
mod install;
mod isolation;
mod pause;
mod placement;
#[path = "../ingress/program.rs"]
mod program;
mod recovery;
mod ssh;
mod stage;
mod verdict;
mod wake;
mod world;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use figures::{Figures, median};
use world::{World, timed};

/// Rounds of steps that take seconds.
const CREATES: usize = 5;
/// Rounds of steps that take milliseconds.
const EXECS: usize = 60;
/// Number of concurrent creations.
const BURST: usize = 30;
/// Longest duration of the burst, seconds.
const BURST_S: u64 = 180;
/// Number of sandboxes that an agent knows when its memory is read.
const KNOWN: usize = 50;

/// Parts that can be measured alone, in the order of a full run.
const PARTS: [&str; 14] = [
    "create",
    "exec",
    "inside",
    "pause",
    "wake",
    "ssh",
    "burst",
    "abuse",
    "isolation",
    RECOVERY,
    PLACEMENT,
    VERDICT,
    FLEET,
    HTTP,
];
/// Results below this package.
const RESULTS: &str = "../target/bench/results.json";
/// Part that needs no lab, as are the next four.
const RECOVERY: &str = "recovery";
const PLACEMENT: &str = "placement";
const VERDICT: &str = "verdict";
const FLEET: &str = "fleet";
const HTTP: &str = "http";
/// Part that runs only when it is asked for, and then adds its figures to those of the last full run.
const INSTALL: &str = "install";

#[tokio::main]
async fn main() -> Result<()> {
    let asked: Vec<_> = std::env::args().skip(1).collect();
    let known = |part: &String| part == INSTALL || PARTS.contains(&part.as_str());
    if let Some(unknown) = asked.iter().find(|part| !known(part)) {
        let parts = PARTS.join(", ");
        anyhow::bail!("{unknown} is nothing to measure: there are {parts}, {INSTALL}");
    }
    let mut figures = Figures::default();
    if asked == [INSTALL] {
        let measured = install::measure(&mut figures);
        figures.print();
        measured?;
        return figures.merge(&Path::new(env!("CARGO_MANIFEST_DIR")).join(RESULTS));
    }
    anyhow::ensure!(!asked.iter().any(|part| part == INSTALL), "{INSTALL} is measured alone");
    let no_lab =
        |part: &String| [RECOVERY, PLACEMENT, VERDICT, FLEET, HTTP].contains(&part.as_str());
    if asked.iter().all(no_lab) && !asked.is_empty() {
        for part in &asked {
            let measured = match part.as_str() {
                RECOVERY => recovery::measure(&mut figures).await,
                FLEET => Box::pin(fleet::measure(&mut figures)).await,
                HTTP => Box::pin(http::measure(&mut figures)).await,
                VERDICT => verdict::measure(&mut figures),
                _ => placement::measure(&mut figures),
            };
            measured.inspect_err(|_| figures.print())?;
        }
        figures.print();
        return Ok(());
    }
    let world = World::open()?;
    for part in PARTS.into_iter().filter(|part| asked.is_empty() || asked.iter().any(|a| a == part))
    {
        match part {
            "create" => {
                cold_create(&world, &mut figures, true).await?;
                cold_create(&world, &mut figures, false).await?;
            }
            "exec" => exec_true(&world, &mut figures).await?,
            "inside" => inside::measure(&world, &mut figures).await?,
            "pause" => pause::pause_and_resume(&world, &mut figures).await?,
            "wake" => wake::measure(&world, &mut figures).await?,
            "ssh" => Box::pin(ssh::measure(&world, &mut figures)).await?,
            "isolation" => isolation::measure(&world, &mut figures).await?,
            "abuse" => abuse::measure(&world, &mut figures).await?,
            RECOVERY => recovery::measure(&mut figures).await?,
            PLACEMENT => placement::measure(&mut figures)?,
            VERDICT => verdict::measure(&mut figures)?,
            FLEET => Box::pin(fleet::measure(&mut figures)).await?,
            HTTP => Box::pin(http::measure(&mut figures)).await?,
            _ => burst_and_memory(&world, &mut figures).await?,
        }
    }
    if asked.is_empty() {
        figures.write(&world.results())?;
    }
    figures.print();
    Ok(())
}

/// Measures a creation through the controller and the same `pct` calls by hand, in turns on one
/// node.
async fn cold_create(world: &World, figures: &mut Figures, modelled: bool) -> Result<()> {
    world.set_cost(modelled)?;
    let (mut ours, mut theirs, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..CREATES {
        eprintln!("cold create, round {} of {CREATES}", round + 1);
        let (took, id) = timed(world.create("node1")).await;
        ours.push(took);
        world.delete(&id?).await?;
        let by_hand = hand::create(world, "node1", 150_000)?;
        theirs.push(by_hand.answers_ms);
        calls.push(by_hand.calls_ms);
    }
    world.set_cost(false)?;
    let (ours, theirs, calls) = (median(&mut ours), median(&mut theirs), median(&mut calls));
    let note = if modelled { " (modelled)" } else { "" };
    let suffix = if modelled { "" } else { "_without_cost" };
    figures.add(
        &format!("cold_create{suffix}"),
        ours,
        "ms",
        &format!("pct clone, set, start by hand until it answers{note}"),
        theirs,
    );
    figures.add(
        &format!("cold_create{suffix}_over_calls"),
        ours - calls,
        "ms",
        &format!("sum of the calls by hand{note}"),
        calls,
    );
    Ok(())
}

/// Measures `true` through the agent, by `lxc-attach` by hand, and by `pct exec` at the real cost.
async fn exec_true(world: &World, figures: &mut Figures) -> Result<()> {
    let id = world.create("node1").await?;
    let sandbox = world.get(&id).await?;
    let mut agent = world.agent("node1")?;
    let mut ours = Vec::new();
    for _ in 0..EXECS {
        let (took, exit) = timed(world::exec_true(&mut agent, &id)).await;
        ensure!(exit? == 0, "exec true did not exit with 0");
        ours.push(took);
    }
    let mut attach =
        hand::repeat(world, "node1", EXECS, &format!("lxc-attach -n {} -- true", sandbox.vmid))?;
    world.set_cost(true)?;
    let pct = hand::repeat(world, "node1", 5, &format!("pct exec {} -- true", sandbox.vmid));
    world.set_cost(false)?;
    let (ours, attach, pct) = (median(&mut ours), median(&mut attach), median(&mut pct?));
    figures.add("exec_true", ours, "ms", "lxc-attach -- true by hand", attach);
    figures.add("exec_true_vs_pct", ours, "ms", "pct exec -- true (modelled)", pct);
    cli_exec(world, figures, &id).await?;
    world.delete(&id).await
}

/// Measures `true` by `sandboxctl exec`, a new process and connection each time, and over a connection to the
/// controller that is open already, in turns.
async fn cli_exec(world: &World, figures: &mut Figures, id: &str) -> Result<()> {
    let (mut cli, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..EXECS {
        let (took, status) = timed(world.cli(&["exec", id, "--", "true"])).await;
        ensure!(status?.success(), "sandboxctl exec true did not exit with 0");
        cli.push(took);
        let (took, code) = timed(world.exec_true(id)).await;
        ensure!(code? == 0, "exec true did not exit with 0");
        warm.push(took);
    }
    let (cli, warm) = (median(&mut cli), median(&mut warm));
    figures.add("cli_exec_ms", cli, "ms", "the same exec over a warm channel", warm);
    Ok(())
}

/// Measures many concurrent creations over all nodes, and the memory of an agent that knows many.
async fn burst_and_memory(world: &World, figures: &mut Figures) -> Result<()> {
    eprintln!("a burst of {BURST}");
    let mut burst = tokio::task::JoinSet::new();
    let begun = std::time::Instant::now();
    for _ in 0..BURST {
        let world = world.clone();
        burst.spawn(async move { world.create("").await });
    }
    let all = tokio::time::timeout(Duration::from_secs(BURST_S), burst.join_all());
    let made = all.await.context("the burst was not over in time")?;
    let took = begun.elapsed().as_secs_f64();
    let mut ids: Vec<String> = Vec::new();
    for made in made {
        match made {
            Ok(id) => ids.push(id),
            Err(error) => eprintln!("a creation of the burst failed: {error:#}"),
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of 30")]
    let (ok, failed) = (ids.len() as f64, (BURST - ids.len()) as f64);
    figures.alone("create_burst", ok / took, "creates/s");
    figures.alone("create_burst_failed", failed, "of 30");
    let on_node1 = world.count("node1").await?;
    for round in on_node1..KNOWN {
        eprintln!("node1 knows {round} of {KNOWN}");
        ids.push(world.create("node1").await?);
    }
    figures.alone("agent_rss_idle", world.agent_rss_mib("node1")?, "MiB");
    for id in ids {
        world.delete(&id).await?;
    }
    Ok(())
}
