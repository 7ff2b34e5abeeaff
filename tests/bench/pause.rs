//! Pause and resume through the agent, beside LXC's own freeze by hand.

use anyhow::{Context as _, Result, ensure};
use proto::{
    agent::v1::{PauseSandboxRequest, ResumeSandboxRequest},
    sandbox::v1::Phase,
};

use crate::{
    figures::{Figures, median},
    hand,
    world::{World, timed},
};

const ROUNDS: usize = 40;
/// Id of the container that is frozen by hand.
const BY_HAND: u32 = 150_001;

pub(crate) async fn pause_and_resume(world: &World, figures: &mut Figures) -> Result<()> {
    let id = world.create("node1").await?;
    let vmid = world.get(&id).await?.vmid;
    let mut agent = world.agent("node1")?;
    let epoch = agent.hello(proto::agent::v1::HelloRequest::default()).await?.into_inner().epoch;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // The work of a resume after its answer must not count for this pause.
        unlocked(world, vmid).await?;
        let request = PauseSandboxRequest { epoch, id: id.clone(), ..Default::default() };
        let (took, answer) = timed(agent.pause_sandbox(request)).await;
        let phase = answer?.into_inner().sandbox.context("a sandbox")?.phase();
        ensure!(phase == Phase::Paused, "{id} is {phase:?}");
        pauses.push(took);
        let request = ResumeSandboxRequest { epoch, id: id.clone(), ..Default::default() };
        let (took, answer) = timed(agent.resume_sandbox(request)).await;
        let phase = answer?.into_inner().sandbox.context("a sandbox")?.phase();
        ensure!(phase == Phase::Running, "{id} is {phase:?}");
        resumes.push(took);
    }
    // Uses another container: the agent thaws a sandbox that somebody else has frozen.
    hand::container(world, "node1", BY_HAND)?;
    let by_hand = |command: &str, undo: &str| {
        let (command, undo) = (format!("{command} -n {BY_HAND}"), format!("{undo} -n {BY_HAND}"));
        hand::repeat_undone(world, "node1", ROUNDS, &command, &undo)
    };
    let mut freezes = by_hand("lxc-freeze", "lxc-unfreeze")?;
    hand::repeat(world, "node1", 1, &format!("lxc-freeze -n {BY_HAND}"))?;
    let mut thaws = by_hand("lxc-unfreeze", "lxc-freeze")?;
    hand::repeat(world, "node1", 1, &format!("lxc-unfreeze -n {BY_HAND}"))?;
    hand::destroy(world, "node1", BY_HAND)?;
    figures.add("pause", median(&mut pauses), "ms", "lxc-freeze by hand", median(&mut freezes));
    figures.add("resume", median(&mut resumes), "ms", "lxc-unfreeze by hand", median(&mut thaws));
    paused_rss(world, figures, &id, vmid).await?;
    world.delete(&id).await
}

/// Waits until the lock of the last pause is removed.
async fn unlocked(world: &World, vmid: u32) -> Result<()> {
    let node = world.lab.node("node1")?;
    let locked = format!("grep -q '^lock:' /etc/pve/lxc/{vmid}.conf");
    for _ in 0..100 {
        if !node.shell(&locked)?.status.success() {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    anyhow::bail!("CT {vmid} stays locked")
}

/// Measures the memory of a sandbox before its pause and after its memory has been swapped out.
async fn paused_rss(world: &World, figures: &mut Figures, id: &str, vmid: u32) -> Result<()> {
    let current = || -> Result<Option<f64>> {
        let file = format!("cat /sys/fs/cgroup/lxc/{vmid}/memory.current 2>/dev/null; true");
        let output = world.lab.node("node1")?.shell(&file)?;
        Ok(String::from_utf8(output.stdout)?.trim().parse::<f64>().ok())
    };
    let swap = std::fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() > 1;
    let Some(before) = current()?.filter(|_| swap) else {
        println!("paused_rss: not measured: no swap here, or memory is not cgroup2's");
        return Ok(());
    };
    let mut agent = world.agent("node1")?;
    let epoch = agent.hello(proto::agent::v1::HelloRequest::default()).await?.into_inner().epoch;
    let request = PauseSandboxRequest { epoch, id: id.into(), ..Default::default() };
    agent.pause_sandbox(request).await?;
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    let after = current()?.context("memory.current")?;
    let mib = f64::from(1 << 20);
    figures.add("paused_rss", after / mib, "MiB", "before the pause", before / mib);
    Ok(())
}
