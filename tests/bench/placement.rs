//! Placement on its workload, beside published algorithms, and the cost of a decision.
//!
//! PVE_SANDBOX_PLACEMENT_SEEDS sets the number of seeds of each variant, in place of one to ten;
//! PVE_SANDBOX_PLACEMENT_FIRST_SEED the first seed, in place of 1.

use anyhow::{Context as _, Result, ensure};
use controller::placement::Look;

use crate::figures::Figures;

/// Numbers of nodes for which a decision is timed; the figure of the last has no number in its
/// name.
const NODES: [usize; 4] = [10, 100, 1000, 5000];
/// Longest time of a decision, nanoseconds.
const DECISION_NS_MAX: f64 = 2000.0;

pub(crate) fn measure(figures: &mut Figures) -> Result<()> {
    let seeds = workload::Seeds {
        first: number("PVE_SANDBOX_PLACEMENT_FIRST_SEED")?.unwrap_or(1),
        number: number("PVE_SANDBOX_PLACEMENT_SEEDS")?,
    };
    let mut slow = Vec::new();
    for nodes in NODES {
        let name = match nodes {
            5000 => "placement_decision_ns".to_owned(),
            _ => format!("placement_decision_ns_{nodes}"),
        };
        let took = workload::decision_ns(nodes, Look::default());
        let full = workload::decision_ns(nodes, Look::All);
        figures.add(&name, took, "ns", &format!("all of {nodes} nodes scored"), full);
        if took > DECISION_NS_MAX {
            slow.push(format!("a decision among {nodes} nodes takes {took:.0} ns"));
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let report = workload::bench(seeds, threads, &|line| eprintln!("{line}"));
    for line in &report.lines {
        println!("{line}");
    }
    println!();
    for (name, value, unit, rival) in &report.figures {
        figures.add(name, *value, unit, "Trimaran, the best of the others", *rival);
    }
    let failures = [report.failures, slow].concat();
    ensure!(failures.is_empty(), "placement:\n  {}", failures.join("\n  "));
    Ok(())
}

/// Reads a number from the environment, if it is set.
pub(crate) fn number(name: &str) -> Result<Option<u64>> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(text.parse().with_context(|| format!("{name} is no number"))?)),
        Err(_) => Ok(None),
    }
}
