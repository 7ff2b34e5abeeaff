//! The same work by hand, in a shell on the node, timed by that shell.

use anyhow::{Context as _, Result, ensure};

use crate::world::{SNAPSHOT_TEMPLATE, World};

/// Longest run of one line, seconds.
const LINE_S: &str = "300";

/// Times of a creation by hand.
pub(crate) struct ByHand {
    /// Time of the three calls.
    pub(crate) calls_ms: f64,
    /// Time of the three calls and until the web server answers.
    pub(crate) answers_ms: f64,
}

/// Runs what an operator types to get the same container, timed in the node. One address always has
/// the same MAC; otherwise the node would look for the last one.
pub(crate) fn create(world: &World, node: &str, vmid: u32) -> Result<ByHand> {
    let template = SNAPSHOT_TEMPLATE;
    let said = run(
        world,
        node,
        &format!(
            "set -e; a=$EPOCHREALTIME; \
             pct clone {template} {vmid} --hostname by-hand >/dev/null; \
             pct set {vmid} --net0 name=eth0,bridge=vmbr0,hwaddr=02:00:00:00:01:EE,ip=10.100.1.238/24,gw=10.100.1.1 \
               --cores 1 --memory 128 --swap 0 >/dev/null; \
             pct start {vmid} >/dev/null; b=$EPOCHREALTIME; \
             until (exec 3<>/dev/tcp/10.100.1.238/8000) 2>/dev/null; do \
               [ $SECONDS -lt 300 ] || {{ echo 'the container does not answer' >&2; exit 1; }}; sleep 0.01; done; \
             c=$EPOCHREALTIME; \
             pct stop {vmid} >/dev/null; pct destroy {vmid} >/dev/null; \
             echo $(( ${{b/./}} - ${{a/./}} )) $(( ${{c/./}} - ${{a/./}} ))"
        ),
    )?;
    let mut us = said.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
    let (Some(calls), Some(answers)) = (us.next(), us.next()) else {
        anyhow::bail!("no times in {said:?}");
    };
    Ok(ByHand { calls_ms: calls / 1000.0, answers_ms: answers / 1000.0 })
}

/// Creates a running container that no agent knows.
pub(crate) fn container(world: &World, node: &str, vmid: u32) -> Result<()> {
    let template = SNAPSHOT_TEMPLATE;
    run(world, node, &format!("pct clone {template} {vmid} --hostname by-hand && pct start {vmid}"))
        .map(drop)
}

/// Removes the container.
pub(crate) fn destroy(world: &World, node: &str, vmid: u32) -> Result<()> {
    run(world, node, &format!("pct stop {vmid} && pct destroy {vmid}")).map(drop)
}

/// Returns the milliseconds of each of `times` runs of a command.
pub(crate) fn repeat(world: &World, node: &str, times: usize, command: &str) -> Result<Vec<f64>> {
    let said = run(
        world,
        node,
        &format!(
            "for i in $(seq {times}); do a=$EPOCHREALTIME; {command} </dev/null >/dev/null \
             || exit 1; b=$EPOCHREALTIME; echo $(( ${{b/./}} - ${{a/./}} )); done"
        ),
    )?;
    let us: Vec<f64> = said.lines().filter_map(|line| line.parse::<f64>().ok()).collect();
    ensure!(us.len() == times, "{command} did not run {times} times");
    Ok(us.into_iter().map(|us| us / 1000.0).collect())
}

/// Does the same for a command that is undone after each run; the undo is not counted.
pub(crate) fn repeat_undone(
    world: &World,
    node: &str,
    times: usize,
    command: &str,
    undo: &str,
) -> Result<Vec<f64>> {
    let said = run(
        world,
        node,
        &format!(
            "for i in $(seq {times}); do a=$EPOCHREALTIME; {command} >/dev/null || exit 1; \
             b=$EPOCHREALTIME; echo $(( ${{b/./}} - ${{a/./}} )); {undo} >/dev/null || exit 1; done"
        ),
    )?;
    let us: Vec<f64> = said.lines().filter_map(|line| line.parse::<f64>().ok()).collect();
    ensure!(us.len() == times, "{command} did not run {times} times");
    Ok(us.into_iter().map(|us| us / 1000.0).collect())
}

fn run(world: &World, node: &str, line: &str) -> Result<String> {
    let mut command = world.lab.node(node)?.command(["timeout", LINE_S, "/bin/bash", "-c", line]);
    let output = command.stdin(std::process::Stdio::null()).output()?;
    ensure!(
        output.status.success(),
        "by hand: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).context("text")
}
