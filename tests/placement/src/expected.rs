//! Figures of the peers from the first measurement of this workload, which was checked against
//! their originals. If a peer differs here, the comparison is worth nothing, and the bench fails.
//!
//! Bands are the spread over seeds of that time: for e2b at 100 nodes, crowded 6.5 to 11.1 %,
//! failed 1.7 to 3.6 %, starts 6.9 to 12.4 s around the means below, about a third to both sides.
//! Small shares of failures are a handful of requests, so a band is never narrower than a point.

use crate::{measure::Measured, peers::Peer};

/// Expected value; `share` is the relative tolerance, `least` the smallest absolute one.
#[derive(Debug, Clone, Copy)]
struct Band {
    value: f64,
    share: f64,
    least: f64,
}

impl Band {
    fn holds(self, seen: f64) -> bool {
        (seen - self.value).abs() <= (self.value * self.share).max(self.least)
    }
}

/// Expected means of one peer over the seeds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    pub(crate) peer: Peer,
    /// Share of nodes and seconds with more than 90 % of the cores in demand, percent.
    crowded: Band,
    /// Failed requests, percent.
    failed: Band,
    /// 99th percentile of the time until the sandbox runs, seconds.
    start_p99: Band,
}

const fn of(peer: Peer, crowded: f64, failed: f64, start_p99: f64) -> Expected {
    Expected {
        peer,
        crowded: Band { value: crowded, share: 0.35, least: 1.0 },
        failed: Band { value: failed, share: 0.4, least: 1.0 },
        start_p99: Band { value: start_p99, share: 0.35, least: 0.5 },
    }
}

/// Means over five seeds.
pub(crate) const OF_100: [Expected; 14] = [
    of(Peer::Random, 15.6, 5.25, 10.4),
    of(Peer::RoundRobin, 15.9, 5.95, 9.4),
    of(Peer::LeastCpu, 9.1, 10.3, 16.7),
    of(Peer::LeastAllocated, 10.8, 10.8, 18.6),
    of(Peer::TwoChoicesCpu, 10.0, 0.71, 5.3),
    of(Peer::TwoChoicesAllocated, 12.3, 3.30, 11.0),
    of(Peer::E2b, 9.4, 2.72, 10.1),
    of(Peer::Daytona, 9.8, 0.82, 11.2),
    of(Peer::CrsStatic, 8.3, 6.19, 12.0),
    of(Peer::CrsDynamic, 3.0, 24.7, 4.1),
    of(Peer::NomadBinpack, 16.1, 5.99, 10.7),
    of(Peer::NomadSpread, 8.8, 5.00, 13.3),
    of(Peer::Kubernetes, 7.9, 6.86, 13.6),
    of(Peer::Trimaran, 6.5, 1.07, 4.1),
];

/// Means over ten seeds.
pub(crate) const OF_10: [Expected; 14] = [
    of(Peer::Random, 14.1, 5.2, 9.4),
    of(Peer::RoundRobin, 14.5, 6.2, 9.7),
    of(Peer::LeastCpu, 8.4, 0.9, 11.4),
    of(Peer::LeastAllocated, 10.2, 3.9, 16.2),
    of(Peer::TwoChoicesCpu, 9.6, 0.42, 5.0),
    of(Peer::TwoChoicesAllocated, 10.5, 2.8, 9.1),
    of(Peer::E2b, 8.4, 2.1, 8.3),
    of(Peer::Daytona, 11.8, 2.5, 8.9),
    of(Peer::CrsStatic, 8.4, 3.0, 10.6),
    of(Peer::CrsDynamic, 6.7, 0.57, 6.0),
    of(Peer::NomadBinpack, 14.9, 4.2, 10.5),
    of(Peer::NomadSpread, 8.8, 3.5, 10.8),
    of(Peer::Kubernetes, 8.5, 3.8, 10.9),
    of(Peer::Trimaran, 5.1, 0.11, 3.1),
];

impl Expected {
    /// Returns the values outside their bands, as sentences.
    pub(crate) fn departures(&self, nodes: usize, seen: &Measured) -> Vec<String> {
        let checks = [
            ("crowded, %", self.crowded, seen.t90_cpu),
            ("failed, %", self.failed, seen.failed),
            ("start p99, s", self.start_p99, seen.start_p99),
        ];
        let out = checks.iter().filter(|(_, band, seen)| !band.holds(*seen));
        out.map(|(what, band, seen)| {
            let name = self.peer.name();
            let Band { value, .. } = band;
            format!("{name} at {nodes} nodes: {what}: {seen:.2} is too far from {value:.2}")
        })
        .collect()
    }
}
