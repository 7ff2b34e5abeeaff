//! A short run of the workload in every build: checks the strengths of placement.

use controller::placement::Look;
use workload::{Algorithm, Measured, Peer, Scenario, run};

const OURS: Algorithm = Algorithm::Ours { look: Look::Sample(16), probes: false, spread: true };

fn mean(algorithm: Algorithm) -> Measured {
    let runs: Vec<_> = (1..=4).map(|seed| run(algorithm, &Scenario::of(10), seed)).collect();
    Measured::mean(&runs)
}

#[test]
fn same_seed_gives_the_same_run() {
    let scenario = Scenario { measured_s: 300, ..Scenario::of(10) };
    assert_eq!(run(OURS, &scenario, 7), run(OURS, &scenario, 7));
}

#[test]
fn few_creations_fail_and_starts_are_fast() {
    let (ours, random) = (mean(OURS), mean(Algorithm::Peer(Peer::Random)));
    assert!(ours.failed <= 0.3, "{ours:?}");
    assert!(ours.start_p99 <= 4.0, "{ours:?}");
    assert!(ours.starved * 2.0 < random.starved, "{ours:?} {random:?}");
    assert!(random.failed > 2.0, "the workload is not too easy: {random:?}");
}
