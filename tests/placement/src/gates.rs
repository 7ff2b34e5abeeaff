//! Gates of the bench: if one is missed, the bench fails.

use std::fmt;

use crate::{
    bench::{OURS, Results},
    measure::Measured,
    peers::Peer,
    world::Algorithm,
};

/// Largest share of failures, in percent, of a peer that is compared with: a node that refuses work
/// looks lightly loaded.
const FAILED_MAX: f64 = 5.0;

/// A bound on one figure.
#[derive(Debug)]
pub(crate) struct Gate {
    what: String,
    seen: f64,
    limit: f64,
    pub(crate) met: bool,
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, seen, limit, met } = self;
        let word = if *met { "met" } else { "MISSED" };
        write!(f, "{word:<7} {what}: {seen:.2}, at most {limit:.2}")
    }
}

type Value = fn(&Measured) -> f64;

pub(crate) fn check(results: &Results) -> Vec<Gate> {
    let mean = |part: &str| results.of(part, OURS).map(|runs| Measured::mean(runs));
    let mut gates = Vec::new();
    let mut at_most = |part: &str, what: &str, value: Value, limit: f64| {
        let seen = mean(part).map_or(f64::NAN, |measured| value(&measured));
        gates.push(Gate { what: format!("{part}: {what}"), seen, limit, met: seen <= limit });
    };
    at_most("N=100", "failed, %", |m| m.failed, 0.15);
    at_most("N=100", "crowded cpu, %", |m| m.t90_cpu, 5.0);
    at_most("N=100", "crowded memory, %", |m| m.t90_memory, 0.3);
    at_most("N=100", "starved, %", |m| m.starved, 0.9);
    at_most("N=100", "start p99, s", |m| m.start_p99, 2.9);
    at_most("N=100", "kills for want of memory, an hour", |m| m.killed, 1.0);
    at_most("N=10", "failed, %", |m| m.failed, 0.15);
    at_most("N=10", "crowded cpu, %", |m| m.t90_cpu, 4.5);
    at_most("reports every 20 s", "failed, %", |m| m.failed, 0.4);
    at_most("10 controllers", "start p99, s", |m| m.start_p99, 3.2);
    let values: [(&str, Value); 4] = [
        ("failed, %", |m| m.failed),
        ("starved, %", |m| m.starved),
        ("start p99, s", |m| m.start_p99),
        ("crowded cpu, %", |m| m.t90_cpu),
    ];
    // On every seed of a hundred nodes, at least as good as the best peer for each value.
    for (what, value) in &values[..3] {
        gates.push(no_worse_on_every_seed(results, what, *value));
    }
    for part in ["N=10", "N=32", "N=100", "N=1000"] {
        for (what, value) in &values {
            gates.push(better_in_the_mean(results, part, what, *value));
        }
    }
    gates
}

/// Returns the runs of the peers that fail rarely enough.
fn peers<'a>(results: &'a Results, part: &'a str) -> impl Iterator<Item = &'a Vec<Measured>> {
    let runs = Peer::ALL.into_iter().filter_map(|peer| results.of(part, Algorithm::Peer(peer)));
    runs.filter(|runs| Measured::mean(runs).failed <= FAILED_MAX)
}

/// Returns the gate for the seed with the smallest margin.
fn no_worse_on_every_seed(results: &Results, what: &str, value: Value) -> Gate {
    let own = results.of("N=100", OURS).cloned().unwrap_or_default();
    let seeds = own.iter().enumerate().map(|(seed, own)| {
        let best = peers(results, "N=100").map(|runs| value(&runs[seed]));
        (seed, value(own), best.fold(f64::INFINITY, f64::min))
    });
    let tightest = seeds.max_by(|a, b| (a.1 - a.2).total_cmp(&(b.1 - b.2)));
    let (seed, seen, limit) = tightest.unwrap_or((0, f64::NAN, 0.0));
    let first = results.parts.iter().find(|part| part.name == "N=100").map(|part| part.first_seed);
    let seed = first.unwrap_or_default() + seed as u64;
    let what =
        format!("N=100: {what}, no worse than any peer on any seed; tightest is seed {seed}");
    Gate { what, seen, limit, met: seen <= limit }
}

fn better_in_the_mean(results: &Results, part: &str, what: &str, value: Value) -> Gate {
    let seen = results.of(part, OURS).map_or(f64::NAN, |runs| value(&Measured::mean(runs)));
    let best = peers(results, part).map(|runs| value(&Measured::mean(runs)));
    let limit = best.fold(f64::INFINITY, f64::min);
    Gate { what: format!("{part}: {what}, better than every peer"), seen, limit, met: seen < limit }
}
