//! Installation and upgrade, in booted roots of Debian 13 with the packages of `make deb`. Needs no lab. The
//! steps and what is counted are those of `tests/deb`, which checks them with fewer streams.

#![expect(dead_code, reason = "the tests of tests/deb use the rest of its files")]

#[path = "../../deb/booted.rs"]
mod booted;
#[path = "../../deb/built.rs"]
mod built;
#[path = "../../deb/ctl.rs"]
mod ctl;
#[path = "../../docs/procedures.rs"]
mod procedures;
#[path = "../../deb/repository.rs"]
mod repository;
#[path = "../../deb/root.rs"]
mod root;
#[path = "../../deb/steps.rs"]
mod steps;
#[path = "../../deb/streams.rs"]
mod streams;

use anyhow::{Context as _, Result};

use crate::figures::Figures;
use booted::Booted;
use root::Base;
use steps::{CLI, CONTROLLER};

/// Page and heading of the commands that lead to the first sandbox.
const FIRST: (&str, &str) = ("install.md", "The first node: three commands");
/// Number of sandboxes, of commands that write, and of WebSockets during the upgrade.
const COUNT: usize = 50;
/// Longest silence of a stream that the upgrade may cause, milliseconds.
const STALL_AIM: f64 = 1000.0;

/// Measures; a step that fails ends the program.
pub(crate) fn measure(figures: &mut Figures) -> Result<()> {
    first_sandbox(figures)?;
    upgrade(figures);
    Ok(())
}

/// Runs the commands of the page on a bare node, and counts them until a command runs in the first sandbox.
#[expect(clippy::cast_precision_loss, reason = "a count of three")]
fn first_sandbox(figures: &mut Figures) -> Result<()> {
    let (page, heading) = FIRST;
    let mut blocks = procedures::blocks(page).into_iter();
    let block = blocks.find(|block| block.heading == heading).context("the page has changed")?;
    let commands: Vec<_> =
        block.commands.iter().map(|line| procedures::on_the_node(line)).collect();
    eprintln!("a bare node, and {} commands", commands.len());
    let node = Booted::start(Base::Trixie, "bench-first");
    let (_, count) = steps::first_sandbox(&node, &commands);
    figures.alone("commands_to_first_sandbox", count as f64, "commands");
    Ok(())
}

/// Joins another bare node, and replaces its agent twice under load.
#[expect(clippy::cast_precision_loss, reason = "counts of some thousands at most")]
fn upgrade(figures: &mut Figures) {
    let node = Booted::start(Base::Trixie, "bench-upgrade");
    steps::install(&node);
    node.ok(&[CONTROLLER, "setup", "--domain", "sandbox.test"]);
    let (_, took) = steps::join(&node);
    figures.alone("join_seconds", took.as_secs_f64(), "s");
    steps::make_a_template(&node);
    let ids: Vec<_> = (0..COUNT)
        .map(|number| {
            eprintln!("{number} of {COUNT} sandboxes");
            steps::created(&node.ok(&[CLI, "create", "--memory", "128m"]))
        })
        .collect();
    let outcome = steps::agent_is_replaced_under_load(&node, &ids, COUNT);
    figures.alone("upgrade_lost", outcome.lost as f64, "bytes");
    figures.alone("upgrade_doubled", outcome.doubled as f64, "commands");
    let stall = outcome.stall.as_secs_f64() * 1000.0;
    figures.add("upgrade_stall", stall, "ms", "aim", STALL_AIM);
}
