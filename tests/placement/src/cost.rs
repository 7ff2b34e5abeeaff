//! Cost of a decision.

#![expect(clippy::disallowed_methods, reason = "a cost is measured with the real clock")]

use std::{hint::black_box, time::Instant};

use controller::placement::{Affinity, Ask, Fleet, Holder, Limits, Load, Look};
use proto::{
    name::SnapshotId,
    spec::{Network, Size},
};

use crate::{ours::SNAPSHOT, stream::Stream};

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// Number of batches, of which the median is taken. They are many and short, because other work on
/// the machine takes time from some of them.
const BATCHES: usize = 201;

/// Returns a fleet of `nodes` different nodes, all of which hold the snapshot.
pub fn fleet(nodes: usize) -> Fleet {
    let mut random = Stream::new(1, 1);
    let mut fleet = Fleet::new(Limits::default(), 1);
    // Each new node updates the ranks of names, so nodes are added together and in order.
    for at in 0..nodes {
        let node = fleet.add(format!("n{at:05}").parse().expect("a name"));
        fleet.set_down(node, false);
        let size = Size { cpu_cores: 2, memory_mib: 4096, disk_gib: 0 };
        fleet.hold(SNAPSHOT, Holder { node, size, queued: 0, queue_max: 0, cached: false });
    }
    for at in 0..nodes {
        let load = Load {
            cores: 32.0,
            cpu_busy: random.unit(),
            psi_cpu: random.uniform(0.0, 0.2),
            foreign_cores: Some(random.uniform(0.0, 4.0)),
            foreign_memory: Some(random.uniform(0.0, 16.0) * GIB),
            booting_cores: random.uniform(0.0, 8.0),
            cores_allocated: random.uniform(0.0, 100.0),
            memory_total: 128.0 * GIB,
            memory_used: random.uniform(16.0, 100.0) * GIB,
            memory_allocated: random.uniform(0.0, 160.0) * GIB,
            starting: 1.0,
            start_slots: 4.0,
            start_ms: random.uniform(1000.0, 2000.0),
            vmids_free: 1000,
            ips_free: 1000,
            quorate: true,
            ..Load::default()
        };
        let node = u32::try_from(at).expect("fewer nodes than 2^32");
        fleet.load(node, load, (1, true), 0);
    }
    fleet
}

/// Makes one decision; returns whether a node was found.
pub fn decide(fleet: &mut Fleet, snapshot: &SnapshotId, look: Look) -> bool {
    let ask = Ask {
        size: Size::default(),
        network: Network::Static,
        required: None,
        affinity: Affinity::default(),
        prior: &[],
        team: &|node| node % 3,
        queued: &|_| 0,
    };
    fleet.choose(snapshot, black_box(&ask), look, 500).best.first().is_some()
}

/// Returns the nanoseconds of a decision among `nodes` nodes: the median of several batches.
pub fn decision_ns(nodes: usize, look: Look) -> f64 {
    let snapshot: SnapshotId = SNAPSHOT.parse().expect("a name");
    let mut fleet = fleet(nodes);
    // A batch takes about a millisecond.
    let in_a_batch = match look {
        Look::Sample(_) => 500_u32,
        Look::All => u32::try_from(10_000 / nodes.max(20)).unwrap_or(u32::MAX),
    };
    let mut batches: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let begun = Instant::now();
            for _ in 0..in_a_batch {
                black_box(decide(&mut fleet, &snapshot, look));
            }
            begun.elapsed().as_secs_f64() * 1e9 / f64::from(in_a_batch)
        })
        .collect();
    batches.sort_by(f64::total_cmp);
    batches[BATCHES / 2]
}
