//! Recovery after a crash, a check, and the simulation. Needs no lab: an agent in this process uses
//! its journal on the disk and the fake PVE, which takes the recorded times of the real one.

use std::{sync::Arc, time::Duration};

use agent::{
    journal::{Phase, Record},
    pve::fake::Pace,
    saga::{Faults, When},
};
use anyhow::{Result, anyhow, ensure};
use tokio::time::{Instant, sleep};

use crate::{
    figures::{Figures, median},
    stage::{Stage, create, end, id, order},
    world::timed,
};

/// Number of sandboxes that the agent knows when it recovers.
const KNOWN: u32 = 200;
/// Number of those whose creation was interrupted after the clone.
const CUT: u32 = 20;
/// Number of those whose deletion was requested and not done.
const DELETED: u32 = 10;
/// Longest recovery.
const RECOVERY: Duration = Duration::from_secs(120);
/// Aim for the recovery, milliseconds.
const RECOVERY_AIM: f64 = 10_000.0;
/// Number of sandboxes in one check.
const CHECKED: u32 = 1000;
/// Rounds of the check.
const CHECKS: usize = 9;
/// Time during which seeds are counted.
const SEEDS: Duration = Duration::from_secs(10);
/// Largest number of seeds.
const SEEDS_MAX: u64 = 100_000;
pub(crate) async fn measure(figures: &mut Figures) -> Result<()> {
    recovery_agent(figures).await?;
    fsck(figures).await?;
    simulation(figures).await
}

/// Measures the time from the start of an agent until all operations are settled.
async fn recovery_agent(figures: &mut Figures) -> Result<()> {
    eprintln!("an agent comes back to {KNOWN} sandboxes");
    let stage = Stage::new()?;
    let agent = stage.start(Faults::default()).await?;
    create(&agent, 0..KNOWN - CUT).await?;
    end(agent).await;
    // An agent whose creations stop after the clone.
    let hook = |_, name: &'static str, when| -> futures_util::future::BoxFuture<'static, ()> {
        if name == "configure" && when == When::Before {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(()))
    };
    let agent = stage.start(Faults { hook: Some(Arc::new(hook)), ..Faults::default() }).await?;
    for number in KNOWN - CUT..KNOWN {
        agent.sandboxes().create(order(number)?, Duration::ZERO).await?;
    }
    // Plus one for the template.
    let cloned = || stage.pve.guests().len() == count(KNOWN) + 1;
    until("the creations to stand behind their clones", cloned).await?;
    stage.pve.set_pace(Pace::RECORDED);
    for number in 0..DELETED {
        agent.sandboxes().delete(&id(number), Duration::ZERO).await?;
    }
    let deleting = |record: &Arc<Record>| record.phase == Phase::Deleting;
    let begun = || agent.sandboxes().live().into_iter().filter(deleting).count() == count(DELETED);
    until("the deletions to be recorded", begun).await?;
    end(agent).await;
    let begun = std::time::Instant::now();
    let agent = stage.start(Faults::default()).await?;
    let rest = [Phase::Running, Phase::Paused, Phase::Stopped];
    let settled = || {
        let live = agent.sandboxes().live();
        agent.sandboxes().busy().is_empty() && live.iter().all(|r| rest.contains(&r.phase))
    };
    until("everything to be settled", settled).await?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    let left = agent.sandboxes().live().len();
    ensure!(left == count(KNOWN - CUT - DELETED), "{left} sandboxes are left");
    let (findings, _) = agent.sandboxes().check().await;
    ensure!(findings.is_empty(), "{findings:?}");
    end(agent).await;
    let cut = CUT + DELETED;
    let against = format!("the aim, {KNOWN} known, {cut} cut off, fake PVE at the recorded pace");
    figures.add("recovery_agent", took, "ms", &against, RECOVERY_AIM);
    Ok(())
}

/// Measures one check of many sandboxes.
async fn fsck(figures: &mut Figures) -> Result<()> {
    eprintln!("a check of {CHECKED} sandboxes");
    let stage = Stage::new()?;
    let agent = stage.start(Faults::default()).await?;
    create(&agent, 0..CHECKED).await?;
    let mut times = Vec::new();
    for _ in 0..CHECKS {
        let (took, (findings, looked_at)) = timed(agent.sandboxes().check()).await;
        ensure!(findings.is_empty() && looked_at == count(CHECKED), "{findings:?}");
        times.push(took);
    }
    end(agent).await;
    figures.alone("fsck_1000", median(&mut times), "ms");
    Ok(())
}

/// Measures how many stories a core runs.
async fn simulation(figures: &mut Figures) -> Result<()> {
    eprintln!("seeds of the simulation for {SEEDS:?}");
    let counted = tokio::task::spawn_blocking(|| {
        let begun = std::time::Instant::now();
        for seed in 0..SEEDS_MAX {
            if let Err(broken) = simulation::tell(seed, None) {
                return Err(anyhow!("seed {seed}: {broken:?}"));
            }
            if begun.elapsed() > SEEDS {
                return Ok((seed + 1, begun.elapsed()));
            }
        }
        Ok((SEEDS_MAX, begun.elapsed()))
    });
    let (seeds, took) = counted.await??;
    #[expect(clippy::cast_precision_loss, reason = "a count")]
    let per_minute = seeds as f64 / took.as_secs_f64() * 60.0;
    figures.alone("sim_seeds_per_minute", per_minute, "seeds");
    Ok(())
}

async fn until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + RECOVERY;
    while !done() {
        ensure!(Instant::now() < end, "waited {RECOVERY:?} for {what}");
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
