//! Notices reboots and ends from inside: looks every second whether the init of each running sandbox
//! is still the one of its boot. The reconciler, which looks at everything, comes by less often.

use std::{sync::Arc, time::Duration};

use proto::{Cause, Progress, id::SandboxId, sandbox::v1::StopResult, spec::Network};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    journal::{Phase, Record},
    sandbox::{Event, Result, Sandboxes},
};

/// Interval between two looks.
const TICK: Duration = Duration::from_secs(1);
/// Time that a container gets to come up again once its init has ended: on PVE a reboot is a stop and
/// a start, which takes about two seconds.
const REBOOT: Duration = Duration::from_secs(4);
/// Time after a stop in which a container that runs again has made a reboot of its shutdown.
const AFTER_STOP: Duration = Duration::from_secs(15);
/// Interval between two looks at a container that may be rebooting.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for one sandbox: what takes longer goes on by itself.
const WAIT: Duration = Duration::from_millis(100);

impl Sandboxes {
    /// Looks every second until the agent stops.
    pub async fn watch_boots(self: Arc<Self>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stop = self.tasks.stopping().clone();
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.look_at_boots().await;
        }
    }

    /// Looks at each running sandbox once. Returns those whose init is not the one of its boot.
    pub async fn look_at_boots(self: &Arc<Self>) -> Vec<SandboxId> {
        let (busy, live) = (self.busy(), self.live());
        let quiet =
            |record: &&Arc<Record>| record.phase == Phase::Running && !busy.contains(&record.id);
        let mut changed = Vec::new();
        for record in live.iter().filter(quiet) {
            let init = self.pve.init(record.vmid).await.map(|init| init.start);
            if init.is_some() && record.init.is_none() {
                self.note_init(record, init).await;
            } else if init.is_none() && self.pve.running(record.vmid).await {
                // Its init is not found for now: a tenant can hide it behind many processes.
            } else if init != record.init {
                changed.push(record.id);
                if let Err(error) = self.record_drift(&record.id, WAIT).await {
                    tracing::warn!(sandbox_id = %record.id, %error, "end of a boot was not recorded");
                }
            }
        }
        changed
    }

    /// Records the init of a boot that another version recorded, or that was found.
    async fn note_init(self: &Arc<Self>, record: &Record, init: Option<u64>) {
        let boot = record.boot;
        let noted = self.amend_living(&record.id, move |record| {
            if record.boot == boot && record.phase == Phase::Running {
                record.init = init;
            }
            Ok(())
        });
        if let Err(error) = noted.await {
            tracing::warn!(sandbox_id = %record.id, %error, "init of the sandbox was not recorded");
        }
    }

    /// True when the container's init is not the one of this boot, and both are of the same boot of the
    /// node.
    pub(super) async fn rebooted_itself(&self, record: &Record) -> bool {
        let Some(known) = record.init else { return false };
        let same_host = record.since.boot == self.clock.moment().boot;
        let now = self.pve.init(record.vmid).await;
        same_host && now.is_some_and(|now| now.start != known)
    }

    /// True when the sandbox was stopped a moment ago: asked to shut down, its init rebooted instead, and
    /// what runs now was not started by anybody.
    pub(super) fn rebooted_out_of_a_stop(&self, record: &Record) -> bool {
        record.phase == Phase::Stopped
            && record.stop_result == StopResult::ShutDown
            && record.since.ago(&self.clock.moment()) < AFTER_STOP
    }

    /// Kills a container that rebooted out of its stop.
    pub(super) async fn stop_again(&self, record: &Record) -> Result<Arc<Record>> {
        self.stop_container(record).await?;
        self.amend_stopped(&record.id, |record| record.stop_result = StopResult::Killed).await
    }

    /// Waits for a container that does not run: it may be rebooting.
    pub(super) async fn let_it_reboot(&self, record: &Record) {
        let same_host = record.since.boot == self.clock.moment().boot;
        let until = Instant::now() + REBOOT;
        while same_host
            && Instant::now() < until
            && !self.pve.running(record.vmid).await
            && !self.tasks.stopping().is_cancelled()
        {
            sleep(PAUSE).await;
        }
    }

    /// Counts a boot that nobody asked for. Its time to live is not renewed: a tenant could go on for
    /// ever.
    pub(super) async fn record_reboot(&self, record: &Record) -> Result<Arc<Record>> {
        self.limit_found_in_cgroup(record).await;
        let now = self.clock.moment();
        let dhcp = record.network == Network::Dhcp;
        let given = if dhcp { self.found_by_dhcp(record).await } else { None };
        let init = self.pve.init(record.vmid).await.map(|init| init.start);
        self.advance(&record.id, Event::FoundUp, |record| {
            record.boot += 1;
            record.init = init;
            record.started_ms = now.wall_ms;
            record.since = now.clone();
            record.cause = Cause::Rebooted;
            record.failure = None;
            if dhcp {
                (record.ip, record.ip_granted) = (given, given.is_some());
            }
            record.progress = Progress::Done;
        })
        .await
    }
}
