//! Detects and records what was done to a container outside of the agent: in PVE's GUI, by `pct`,
//! or in the container itself. `seen` is the table of it; docs/cleanup.md explains it to operators.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    name::NodeName,
    spec::Network,
};

use crate::{
    clock::Moment,
    journal::{Failure, Phase, Record},
    sandbox::{Event, OnReboot, Result, Sandboxes, core::operations::OperationKind},
};

/// Failure of a paused sandbox whose container does not run any more: it cannot end by itself.
const LOST_WHILE_PAUSED: &str =
    "its node was rebooted while it was paused; its memory is gone, its disk is kept";
/// Failure of a sandbox that ran before a reboot of its node and is not started again.
const NOT_STARTED_AGAIN: &str =
    "its node was rebooted, and on_reboot in the agent's configuration says that it stays stopped";
const EXPIRED_MEANWHILE: &str = "its node was rebooted, and its time to live was over by then";

/// Location of a sandbox's container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerLocation {
    /// On this node, with the sandbox's mark.
    Here {
        /// True when its init runs.
        running: bool,
        /// True when its init is not the one of this boot: the sandbox was rebooted from inside.
        /// False where that is not looked at.
        rebooted: bool,
    },
    /// Replaced: what has its vmid on this node does not carry its mark, or is a template.
    Taken,
    /// On another node.
    Elsewhere(NodeName),
    /// On no node.
    Gone,
}

/// Drift of a container from its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift {
    /// The sandbox should run and does not, or cannot any more; with reason and sentence.
    Down(Reason, String),
    /// The sandbox is stopped, and cannot be started; with reason and sentence.
    Unfit(Reason, String),
    /// The container runs; by its record it is stopped, or it ran before its node was rebooted.
    Up,
    /// The sandbox ran when its node was rebooted, and must run again.
    Rebooted,
    /// The sandbox was rebooted from inside, and runs again.
    RebootedItself,
    /// As `Rebooted`, but its time to live was over before it could.
    Expired(&'static str),
    /// The container can be used again, after it was unfit or exported to another node.
    Fit,
}

/// Current boot of the node, with which a record is compared.
#[derive(Debug, Clone, Default)]
pub struct Life {
    /// Current time.
    pub now: Moment,
    /// Handling of sandboxes that ran when the node was rebooted.
    pub on_reboot: OnReboot,
}

impl Life {
    /// True when the record was written before the node was rebooted. A record that does not say
    /// when is from an older version, or came from another node.
    fn is_later_than(&self, record: &Record) -> bool {
        let before = &record.since.boot;
        !before.is_empty() && !self.now.boot.is_empty() && *before != self.now.boot
    }

    /// Decides about a sandbox that ran before the reboot, and does not run now.
    fn after_reboot(&self, record: &Record) -> Drift {
        // Uses the wall clock as it is: it may be set later, but a start is not taken back.
        let expires = record.lifetime.expires.as_ref();
        if expires.is_some_and(|expiry| expiry.wall_ms <= self.now.wall_ms) {
            return Drift::Expired(EXPIRED_MEANWHILE);
        }
        match self.on_reboot {
            OnReboot::Start => Drift::Rebooted,
            OnReboot::Keep => Drift::Down(Reason::SandboxNotRunning, NOT_STARTED_AGAIN.to_owned()),
        }
    }
}

/// Detects drift of a container from its record; `None` when there is none. Pure.
pub fn detect_drift(record: &Record, place: &ContainerLocation, life: &Life) -> Option<Drift> {
    let rebooted = life.is_later_than(record);
    let recorded = record.failure.as_ref().map(|failure| failure.reason);
    let (reason, why) = match (place, record.phase) {
        (ContainerLocation::Here { running: true, .. }, Phase::Stopped) => return Some(Drift::Up),
        (ContainerLocation::Here { running: false, .. }, Phase::Stopped) => {
            let unfit = matches!(recorded, Some(Reason::NotOurs | Reason::ContainerGone));
            let back = record.progress == Progress::Export;
            return (unfit || back).then_some(Drift::Fit);
        }
        // PVE started it with the node, or an operator did: either way it is another boot.
        (ContainerLocation::Here { running: true, .. }, Phase::Running) if rebooted => {
            return Some(Drift::Up);
        }
        (ContainerLocation::Here { running: true, rebooted: true }, Phase::Running) => {
            return Some(Drift::RebootedItself);
        }
        (ContainerLocation::Here { running: true, .. }, _) => return None,
        (ContainerLocation::Here { running: false, .. }, Phase::Running) if rebooted => {
            return Some(life.after_reboot(record));
        }
        (ContainerLocation::Here { running: false, .. }, Phase::Paused) => {
            (Reason::SandboxNotRunning, LOST_WHILE_PAUSED.to_owned())
        }
        (ContainerLocation::Here { running: false, .. }, _) => {
            let why = "it was found stopped: it ended by itself, or somebody stopped it";
            (Reason::SandboxNotRunning, why.to_owned())
        }
        (ContainerLocation::Taken, _) => {
            let why = "its container does not carry its mark any more and is left alone";
            (Reason::NotOurs, why.to_owned())
        }
        (ContainerLocation::Elsewhere(node), _) => {
            let why = format!("its container was moved to node {node}: recover it there");
            (Reason::ContainerGone, why)
        }
        (ContainerLocation::Gone, _) => {
            (Reason::ContainerGone, "its container was removed by somebody else".to_owned())
        }
    };
    match record.phase {
        Phase::Running | Phase::Paused => Some(Drift::Down(reason, why)),
        Phase::Stopped => (recorded != Some(reason)).then_some(Drift::Unfit(reason, why)),
        // Another operation works on it, or will.
        Phase::Creating
        | Phase::Undoing
        | Phase::Starting
        | Phase::Stopping
        | Phase::Deleting
        | Phase::Deleted
        | Phase::Failed => None,
    }
}

impl Sandboxes {
    /// Compares the container with its record while no other operation works on it; records drift.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn record_drift(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        self.operate(id, OperationKind::Look, wait, |sandboxes, id| {
            sandboxes.record_drift_now(id).boxed()
        })
        .await
    }

    async fn record_drift_now(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running {
            self.let_it_reboot(&record).await;
        }
        let Some(place) = self.place(&record).await? else { return Ok(record) };
        let Some(seen) = detect_drift(&record, &place, &self.life()) else { return Ok(record) };
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, ?seen, "container differs from its record");
        match seen {
            Drift::Rebooted => {
                // The intent is durable; the next pass starts it, as it continues every start.
                self.advance(id, Event::Rebooted, |record| {
                    record.boot += 1;
                    record.failure = None;
                    record.progress = Progress::Start;
                })
                .await
            }
            Drift::Expired(why) => {
                let failure = failure(Reason::SandboxNotRunning, why.to_owned());
                let note = |record: &mut Record| record.failure = Some(failure.clone());
                self.advance_because(id, Event::FoundDown, Cause::Ttl, note).await
            }
            Drift::Down(reason, message) => {
                let failure = failure(reason, message);
                let noted = self
                    .advance(id, Event::FoundDown, |record| record.failure = Some(failure.clone()))
                    .await?;
                // The lock of a pause outlives a reboot. The next pass removes what is left.
                if matches!(place, ContainerLocation::Here { .. })
                    && let Err(error) = self.pve.release_pause_lock(record.vmid, id).await
                {
                    tracing::warn!(sandbox_id = %id, %error, "lock of the pause stays for now");
                }
                Ok(noted)
            }
            Drift::Unfit(reason, message) => {
                let failure = failure(reason, message);
                let note = |record: &mut Record| record.failure = Some(failure.clone());
                self.amend_stopped(id, note).await
            }
            Drift::Fit => {
                let fit = |record: &mut Record| {
                    record.failure = None;
                    record.progress = Progress::Done;
                };
                self.amend_stopped(id, fit).await
            }
            Drift::RebootedItself => self.record_reboot(&record).await,
            Drift::Up if self.rebooted_out_of_a_stop(&record) => self.stop_again(&record).await,
            Drift::Up => {
                self.limit_found_in_cgroup(&record).await;
                let now = self.clock.moment();
                // A tenant controls everything inside, so nothing of it is read.
                let dhcp = record.network == Network::Dhcp;
                let given = if dhcp { self.found_by_dhcp(&record).await } else { None };
                let init = self.pve.init(record.vmid).await.map(|init| init.start);
                self.advance(id, Event::FoundUp, |record| {
                    record.boot += 1;
                    record.init = init;
                    record.failure = None;
                    record.started_ms = now.wall_ms;
                    record.since = now.clone();
                    record.cause = Cause::FoundUp;
                    record.lifetime.renew(&now);
                    if dhcp {
                        (record.ip, record.ip_granted) = (given, given.is_some());
                    }
                    record.progress = Progress::Done;
                })
                .await
            }
        }
    }

    /// Current boot of the node, and its rule for reboots.
    pub fn life(&self) -> Life {
        Life { now: self.clock.moment(), on_reboot: self.options.on_reboot }
    }

    pub(super) async fn amend_stopped(
        &self,
        id: &SandboxId,
        note: impl Fn(&mut Record),
    ) -> Result<Arc<Record>> {
        self.records
            .change(id, |record| {
                if record.phase == Phase::Stopped {
                    note(record);
                }
            })
            .await
    }

    /// Locates the container; `None` while that cannot be decided.
    pub(in crate::sandbox) async fn place(
        &self,
        record: &Record,
    ) -> Result<Option<ContainerLocation>> {
        if let Some(config) = self.pve.config(record.vmid).await? {
            if config.mark() != Some(record.mark()) || config.is_template() {
                return Ok(Some(ContainerLocation::Taken));
            }
            let running = self.pve.running(record.vmid).await;
            let rebooted = running && self.rebooted_itself(record).await;
            return Ok(Some(ContainerLocation::Here { running, rebooted }));
        }
        let cluster = self.pve.cluster().await;
        // Without quorum, or with pmxcfs down, absence proves nothing.
        Ok(cluster.quorate.then(|| match cluster.guests.get(&record.vmid) {
            Some(node) if node == self.pve.node() => ContainerLocation::Taken,
            Some(node) => ContainerLocation::Elsewhere(node.clone()),
            None => ContainerLocation::Gone,
        }))
    }
}

fn failure(reason: Reason, message: String) -> Failure {
    Failure { reason, message, rollback: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::conformance::record;

    #[test]
    fn drift_is_recorded_once_and_never_during_an_operation() {
        let places = [
            ContainerLocation::Here { running: true, rebooted: false },
            ContainerLocation::Here { running: true, rebooted: true },
            ContainerLocation::Here { running: false, rebooted: false },
            ContainerLocation::Taken,
            ContainerLocation::Elsewhere("n2".parse().expect("a name")),
            ContainerLocation::Gone,
        ];
        let lives = [OnReboot::Start, OnReboot::Keep].map(|on_reboot| {
            // Records of the conformance suite have no boot; these have the one before the reboot.
            let now = Moment { wall_ms: 9, boot: "new".into(), up_ms: 9 };
            Life { now, on_reboot }
        });
        let lives = lives.into_iter().chain([Life::default()]);
        let all = lives.flat_map(|life| places.iter().map(move |place| (life.clone(), place)));
        for (life, place) in all {
            let gone = (Phase::Stopped, Progress::Export);
            let still = [Phase::Running, Phase::Paused, Phase::Stopped]
                .map(|phase| (phase, Progress::Unspecified));
            for (phase, progress) in still.into_iter().chain([gone]) {
                let since = Moment { boot: "old".into(), ..Moment::default() };
                let mut record = Record { phase, progress, since, failure: None, ..record(1) };
                for round in 0..3 {
                    match detect_drift(&record, place, &life) {
                        None => break,
                        Some(Drift::Down(reason, why)) => {
                            record.phase = Phase::Stopped;
                            record.failure = Some(failure(reason, why));
                        }
                        Some(Drift::Unfit(reason, why)) => {
                            record.failure = Some(failure(reason, why));
                        }
                        Some(Drift::Up) => {
                            (record.phase, record.failure) = (Phase::Running, None);
                            record.since = life.now.clone();
                        }
                        Some(Drift::Rebooted) => record.phase = Phase::Starting,
                        // What is looked at next is the init that is recorded now.
                        Some(Drift::RebootedItself) => break,
                        Some(Drift::Expired(_)) => panic!("it lives for ever"),
                        Some(Drift::Fit) => {
                            (record.progress, record.failure) = (Progress::Done, None);
                        }
                    }
                    assert!(round < 2, "{place:?} {phase:?}");
                }
            }
            for phase in [Phase::Creating, Phase::Starting, Phase::Stopping, Phase::Deleting] {
                assert_eq!(
                    detect_drift(&Record { phase, ..record(1) }, place, &life),
                    None,
                    "{place:?}"
                );
            }
        }
    }
}
