//! Temporary faults of a host: its network, disk, speed and clock. A fault lasts through moves of a
//! story until it eases.

use std::{
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use daemon::disk::Disk;

use crate::{chance::Chance, cluster::Cluster};

/// A disk whose syncs take time: a kill may come before or after the sync.
#[derive(Debug)]
pub(crate) struct SlowDisk {
    pub(crate) chance: Chance,
    /// Factor by which the disk is slower than usual.
    pub(crate) slow: Arc<AtomicU32>,
}

impl SlowDisk {
    async fn takes(&self, us_max: u64) {
        let slow = self.slow.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_micros(self.chance.below(us_max)) * slow).await;
    }
}

#[async_trait::async_trait]
impl Disk for SlowDisk {
    async fn before_sync(&self) {
        self.takes(4000).await;
    }

    async fn after_sync(&self) {
        self.takes(1000).await;
    }
}

/// The disk of the controllers' store: mostly fast, but sometimes so slow that a crash comes during
/// a write whose result nobody knows yet.
#[derive(Debug)]
pub(crate) struct StoreDisk(pub(crate) Chance);

impl StoreDisk {
    async fn takes(&self) {
        let ms = if self.0.percent(5) { self.0.below(1500) } else { self.0.below(3) };
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

#[async_trait::async_trait]
impl Disk for StoreDisk {
    async fn before_sync(&self) {
        self.takes().await;
    }

    async fn after_sync(&self) {
        self.takes().await;
    }
}

/// Offsets and jumps of wall clocks, in milliseconds.
const OFF_MS: [i64; 6] = [-3_600_000, -60_000, -1500, 1500, 60_000, 3_600_000];

/// Returns the offset of a clock at the beginning of a story.
pub(crate) fn skew(chance: &Chance) -> i64 {
    if chance.percent(50) { 0 } else { *chance.pick(&OFF_MS).expect("there are some") }
}

impl Cluster {
    /// Starts a fault on a random host.
    pub(crate) fn worsen(&mut self, chance: &Chance) {
        let host = chance.pick(&self.hosts).expect("there are some");
        let roads = self.net.roads(&host.name);
        match chance.below(8) {
            0 => {
                for road in [&roads.to, &roads.from] {
                    road.delay(*chance.pick(&[20, 300, 3000]).expect("there are some"));
                }
            }
            // Requests arrive, but their answers do not.
            1 | 2 => roads.from.hold(true),
            // Requests arrive when nobody waits for them any more.
            3 => roads.to.hold(true),
            4 => {
                roads.to.hold(true);
                roads.from.hold(true);
            }
            5 => {
                let slow = *chance.pick(&[3, 10, 25]).expect("there are some");
                self.pve.set_slow(&host.name, slow);
                host.slow.store(slow, Ordering::Relaxed);
            }
            6 => {
                let why = ["no space left on device", "input/output error"];
                host.journal.fail(chance.pick(&why).copied());
            }
            _ => {
                let ms = *chance.pick(&OFF_MS).expect("there are some");
                let clocks = [&host.clock, &self.clock];
                chance.pick(&clocks).expect("there are some").jump(ms);
            }
        }
    }

    /// Ends some of the faults.
    pub(crate) fn ease(&self, chance: &Chance) {
        for host in &self.hosts {
            if chance.percent(20) {
                self.net.roads(&host.name).clear();
            }
            if chance.percent(20) {
                self.pve.set_slow(&host.name, 1);
                host.slow.store(1, Ordering::Relaxed);
            }
            if chance.percent(30) {
                host.journal.fail(None);
            }
        }
    }

    /// Ends all faults; clocks stay wrong.
    pub(crate) fn calm(&self) {
        for host in &self.hosts {
            self.net.roads(&host.name).clear();
            self.pve.set_slow(&host.name, 1);
            host.slow.store(1, Ordering::Relaxed);
            host.journal.fail(None);
        }
    }
}
