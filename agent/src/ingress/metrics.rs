//! Counters of the route questions, and of changes by hand, as text for Prometheus.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use daemon::sync::Mutex;

use super::decide::Via;
use crate::hand_edits::HandEdits;

/// Upper bounds of the histogram of answer times, milliseconds.
const BOUNDS_MS: [u64; 8] = [1, 2, 5, 10, 50, 250, 1000, 10_000];

#[derive(Debug, Default)]
struct Counts {
    /// Answers by server and status. The agent has some ten statuses.
    answers: BTreeMap<(&'static str, u16), u64>,
    /// Answers within each bound.
    within: [u64; BOUNDS_MS.len()],
    total: u64,
    seconds: f64,
}

/// Counters of one agent, since its start.
#[derive(Debug, Default)]
pub struct Metrics {
    counts: Mutex<Counts>,
    edits: Arc<HandEdits>,
}

impl Metrics {
    /// Begins at zero, with the count of these changes by hand.
    pub fn new(edits: Arc<HandEdits>) -> Self {
        Self { counts: Mutex::default(), edits }
    }

    /// Counts one answer.
    pub fn count(&self, via: Via, status: u16, took: Duration) {
        let via = match via {
            Via::Edge => "edge",
            Via::Peer => "peer",
        };
        let mut counts = self.counts.lock();
        *counts.answers.entry((via, status)).or_default() += 1;
        counts.total += 1;
        counts.seconds += took.as_secs_f64();
        let took_ms = daemon::clock::millis(took);
        for (bound, within) in BOUNDS_MS.iter().zip(&mut counts.within) {
            *within += u64::from(took_ms <= *bound);
        }
    }

    /// Returns all counters in the text format of Prometheus.
    pub fn text(&self) -> String {
        let counts = self.counts.lock();
        let mut text = String::from(
            "# HELP pve_sandbox_route_answers_total Route questions answered; 204 is a route.\n\
             # TYPE pve_sandbox_route_answers_total counter\n",
        );
        // write! to a String cannot fail.
        for ((via, status), count) in &counts.answers {
            let _infallible = writeln!(
                text,
                "pve_sandbox_route_answers_total{{via=\"{via}\",status=\"{status}\"}} {count}"
            );
        }
        text.push_str(
            "# HELP pve_sandbox_route_answer_seconds Time to answer, with the wait for a wake.\n\
             # TYPE pve_sandbox_route_answer_seconds histogram\n",
        );
        let name = "pve_sandbox_route_answer_seconds";
        for (bound, within) in BOUNDS_MS.iter().zip(&counts.within) {
            let bound = Duration::from_millis(*bound).as_secs_f64();
            let _infallible = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {within}");
        }
        let _infallible = writeln!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {seconds}\n{name}_count {total}",
            total = counts.total,
            seconds = counts.seconds,
        );
        let name = "pve_sandbox_hand_edits_total";
        let _infallible = writeln!(
            text,
            "# HELP {name} Configuration files that were changed by hand, and put back.\n\
             # TYPE {name} counter\n{name} {count}",
            count = self.edits.count(),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_server_status_and_time() {
        let edits = Arc::new(HandEdits::default());
        let metrics = Metrics::new(Arc::clone(&edits));
        edits.put_back(std::path::Path::new("/etc/pve-sandbox/caddy.json"), 1);
        metrics.count(Via::Edge, 204, Duration::from_millis(3));
        metrics.count(Via::Edge, 204, Duration::from_millis(30));
        metrics.count(Via::Peer, 403, Duration::from_secs(20));
        let text = metrics.text();
        for line in [
            "pve_sandbox_route_answers_total{via=\"edge\",status=\"204\"} 2",
            "pve_sandbox_route_answers_total{via=\"peer\",status=\"403\"} 1",
            "pve_sandbox_route_answer_seconds_bucket{le=\"0.002\"} 0",
            "pve_sandbox_route_answer_seconds_bucket{le=\"0.005\"} 1",
            "pve_sandbox_route_answer_seconds_bucket{le=\"10\"} 2",
            "pve_sandbox_route_answer_seconds_bucket{le=\"+Inf\"} 3",
            "pve_sandbox_route_answer_seconds_count 3",
            "pve_sandbox_hand_edits_total 1",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
