//! What the fake agent does about sandboxes: creations, changes of phase, and the watch.

use std::{sync::Arc, time::Duration};

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::{watch_response::Message, *},
    id::SandboxId,
    sandbox::v1::{self as api, Failure, Phase, Sandbox},
};
use tokio::{
    sync::mpsc,
    time::{Instant, interval},
};
use tonic::Status;

use super::{FakeAgent, Faults};

/// Interval of reports of commands.
const COMMANDS: Duration = Duration::from_secs(5);

pub(super) fn refuse<T>(reason: Reason, message: &str) -> Result<T, Status> {
    Err(Refusal::new(reason, message).into())
}

/// Returns the default services of a snapshot with these rules; as an agent, but without regard to the caller's.
fn default_services(
    ports: api::SnapshotPorts,
    rules: &PortRules,
) -> impl Iterator<Item = api::HttpService> {
    let allowed = |service: &api::HttpService| !rules.denied_ports.contains(&service.port);
    ports.services.into_iter().filter(allowed).map(|mut service| {
        if service.visibility() == api::Visibility::Unspecified {
            service.visibility = rules.default_visibility;
        }
        service
    })
}

pub(super) fn parse(id: &str) -> Result<SandboxId, Status> {
    id.parse().map_err(|error| Refusal::from(error).into())
}

impl FakeAgent {
    pub(super) fn check_epoch(&self, epoch: u64) -> Result<(), Status> {
        let mut world = self.world.lock();
        if epoch < world.epoch {
            return refuse(Reason::StaleEpoch, "a higher epoch was seen");
        }
        world.epoch = epoch;
        Ok(())
    }

    pub(super) fn get(&self, id: &str) -> Result<Sandbox, Status> {
        let id = parse(id)?;
        match self.world.lock().sandboxes.get(&id) {
            Some(sandbox) => Ok(sandbox.clone()),
            None => refuse(Reason::SandboxNotFound, "not here"),
        }
    }

    /// Admits, refuses, or continues a creation; returns the record after that.
    pub(super) fn admit(
        &self,
        order: &CreateSandboxRequest,
        faults: &Faults,
    ) -> Result<Sandbox, Status> {
        let id = parse(&order.sandbox_id)?;
        let mut world = self.world.lock();
        world.received.push((id, order.attempt));
        world.port_rules = order.port_rules.clone();
        world.reservations.remove(&id);
        if world.cancelled.get(&id).is_some_and(|off| *off >= order.attempt) {
            return refuse(Reason::CreateCancelled, "it was cancelled");
        }
        if let Some(held) = world.sandboxes.get(&id)
            && held.attempt >= order.attempt
        {
            return Ok(held.clone());
        }
        if let Some(reason) = faults.refuse {
            return refuse(reason, "refused on purpose");
        }
        let spec = order.spec.clone().unwrap_or_default();
        let vmid = world.next_vmid;
        world.next_vmid += 1;
        let at = world.load.snapshots.iter().position(|known| *known == spec.snapshot_id);
        let ports = at.and_then(|at| world.load.snapshot_ports.get(at)).cloned();
        drop(world);
        let mut services = spec.services;
        if let Some(rules) = &order.port_rules
            && !spec.no_default_services
        {
            services.extend(default_services(ports.unwrap_or_default(), rules));
        }
        let mut sandbox = Sandbox {
            id: order.sandbox_id.clone(),
            vmid,
            node: self.name.to_string(),
            team: order.team.clone(),
            snapshot_id: spec.snapshot_id,
            size: Some(spec.size.unwrap_or(api::Size {
                cpu_cores: 1,
                memory_mib: 512,
                disk_gib: 0,
            })),
            services,
            name: spec.name,
            egress: if faults.opens { api::Egress::Unspecified.into() } else { spec.egress },
            egress_names: spec.egress_names.clone(),
            metadata: spec.metadata,
            attempt: order.attempt,
            request_id: order.request_id.clone(),
            progress: api::Progress::Clone.into(),
            ..Sandbox::default()
        };
        sandbox.set_phase(Phase::Creating);
        Ok(self.put(sandbox))
    }

    /// Ends a creation that is still in the admitted state.
    pub(super) fn complete(&self, admitted: &Sandbox, faults: &Faults) {
        let current = self.get(&admitted.id).ok();
        let Some(mut sandbox) = current.filter(|now| now.revision == admitted.revision) else {
            return;
        };
        if let Some(reason) = faults.fail {
            sandbox.set_phase(Phase::Failed);
            sandbox.failure = Some(Failure {
                reason: reason.into(),
                message: "failed on purpose".into(),
                rollback: "all undone".into(),
            });
        } else {
            sandbox.set_phase(Phase::Running);
            (sandbox.boot, sandbox.ip) = (1, format!("10.0.0.{}", sandbox.vmid % 250 + 1));
        }
        self.put(sandbox);
    }

    pub(super) async fn turn(
        &self,
        epoch: u64,
        id: &str,
        phase: Phase,
    ) -> Result<Option<Sandbox>, Status> {
        self.check_epoch(epoch)?;
        let mut sandbox = self.get(id)?;
        if sandbox.phase() == Phase::Deleted && phase != Phase::Deleted {
            return refuse(Reason::SandboxDeleted, "it is deleted");
        }
        if sandbox.phase() != phase {
            let boots = phase == Phase::Running && sandbox.phase() != Phase::Paused;
            sandbox.boot += u32::from(boots);
            sandbox.set_phase(phase);
            sandbox = self.put(sandbox);
        }
        self.answer_unless_mute().await;
        Ok(Some(sandbox))
    }

    /// Waits for ever where changes are not answered.
    pub(super) async fn answer_unless_mute(&self) {
        if self.world.lock().faults.mute {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until a sandbox is not CREATING any more.
    pub(super) async fn until_created(&self, id: &str, limit: Duration) {
        let mut changes = self.changes.subscribe();
        let made = async {
            while self.get(id).is_ok_and(|sandbox| sandbox.phase() == Phase::Creating) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // After the limit the caller gets the current state.
        drop(tokio::time::timeout(limit, made).await);
    }

    pub(super) async fn watch(
        self: Arc<Self>,
        from: WatchRequest,
        out: mpsc::Sender<Result<WatchResponse, Status>>,
    ) {
        let mut changes = self.changes.subscribe();
        let mut ticks = interval(Duration::from_secs(1));
        let journal_id = self.world.lock().journal_id.clone();
        let resumed = from.journal_id == journal_id;
        let mut last = if resumed { from.revision } else { 0 };
        let (mut first, mut told) = (true, Instant::now());
        loop {
            let mut batch = Vec::new();
            if first && !resumed {
                batch.push(Message::Reset(WatchReset { journal_id: journal_id.clone() }));
            }
            if first || told.elapsed() >= COMMANDS {
                told = Instant::now();
                batch.extend(self.told_commands().into_iter().map(Message::Execs));
            }
            {
                let world = self.world.lock();
                let mut news: Vec<_> =
                    world.sandboxes.values().filter(|s| s.revision > last).cloned().collect();
                news.sort_by_key(|sandbox| sandbox.revision);
                if first || !news.is_empty() {
                    last = world.revision;
                    let journal_id = journal_id.clone();
                    batch.extend(news.into_iter().map(Message::Sandbox));
                    batch.push(Message::Bookmark(WatchBookmark { journal_id, revision: last }));
                }
            }
            first = false;
            batch.push(Message::Load(self.report()));
            for message in batch {
                if out.send(Ok(WatchResponse { message: Some(message) })).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = ticks.tick() => {}
                () = out.closed() => return,
            }
        }
    }
}
