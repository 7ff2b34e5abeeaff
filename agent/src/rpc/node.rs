//! Calls about the node as a whole.

use std::time::Duration;

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::{self as wire, *},
    id::{Invalid, Vmid},
    sandbox::v1::{Finding, GarbageItem},
    spec,
};

use super::{Handled, Rpc, convert, status::refusal};
use crate::{journal::scheduling::SchedulingState, sandbox::Adoption};

/// Longest reason of an operator, in bytes.
const WHY_MAX: usize = 256;

/// Longest wait of a call for a config write; the operation then continues by itself.
const WAIT: Duration = Duration::from_secs(15);

impl Rpc {
    pub(super) async fn say_hello(&self, request: HelloRequest) -> Handled<HelloResponse> {
        // A controller with a lower epoch learns the highest one, and returns with a higher one.
        if request.epoch > self.sandboxes.epoch() {
            self.sandboxes.fence(request.epoch).await.map_err(refusal)?;
        }
        let cluster = self.sandboxes.pve().cluster().await;
        let members = cluster.members.into_iter().map(|(node, member)| wire::Member {
            node: node.into(),
            ip: member.ip.map(|ip| ip.to_string()).unwrap_or_default(),
            online: member.online,
        });
        let (first, last) = self.sandboxes.journal().vmids();
        Ok(HelloResponse {
            node: self.sandboxes.pve().node().to_string(),
            version: daemon::version::get().to_owned(),
            journal_id: self.sandboxes.journal().id().to_owned(),
            epoch: self.sandboxes.epoch(),
            members: members.collect(),
            vmid_first: first.get(),
            vmid_last: last.get(),
            closes_egress: self.sandboxes.isolates(),
            filters_egress: self.sandboxes.filters_egress(),
            guards_ports: true,
        })
    }

    pub(super) async fn load(&self) -> Handled<GetLoadResponse> {
        Ok(GetLoadResponse { load: Some(self.reporter.report().await) })
    }

    /// Reports the actions at the beginning of the pass that this wakes.
    pub(super) async fn garbage(
        &self,
        request: CollectGarbageRequest,
    ) -> Handled<CollectGarbageResponse> {
        if !request.dry_run {
            self.fence(request.epoch).await?;
        }
        let found = self.garbage.look().await;
        if !request.dry_run {
            self.garbage.collect();
        }
        let node = self.sandboxes.pve().node();
        let items = found.into_iter().map(|item| GarbageItem {
            node: node.to_string(),
            action: item.action.into(),
            subject: item.subject,
            why: item.why,
        });
        Ok(CollectGarbageResponse { items: items.collect() })
    }

    pub(super) async fn recover(
        &self,
        request: RecoverSandboxRequest,
    ) -> Handled<RecoverSandboxResponse> {
        let vmid = Vmid::try_from(request.vmid)?;
        if !request.dry_run {
            self.fence(request.epoch).await?;
        }
        let egress = convert::egress(request.egress, &request.egress_names)?;
        let record = self.sandboxes.recover(vmid, egress, request.dry_run).await;
        let record = record.map_err(refusal)?;
        Ok(RecoverSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn set_scheduling(
        &self,
        request: SetSchedulingRequest,
    ) -> Handled<SetSchedulingResponse> {
        let state = match request.state() {
            wire::SchedulingState::Schedulable => SchedulingState::Schedulable,
            wire::SchedulingState::Cordoned => SchedulingState::Cordoned,
            wire::SchedulingState::Draining => SchedulingState::Draining,
            wire::SchedulingState::Unspecified => {
                return Err(Invalid::new("state", "must be given").into());
            }
        };
        if request.why.len() > WHY_MAX {
            return Err(Invalid::new("why", "must be at most 256 bytes").into());
        }
        self.fence(request.epoch).await?;
        self.sandboxes.set_scheduling(state, request.why).await.map_err(refusal)?;
        Ok(SetSchedulingResponse { load: Some(self.reporter.report().await) })
    }

    pub(super) async fn reserve(&self, request: ReserveRequest) -> Handled<ReserveResponse> {
        let (id, snapshot) = (request.sandbox_id.parse()?, request.snapshot_id.parse()?);
        let size = spec::check_size(request.size.unwrap_or_default())?;
        self.fence(request.epoch).await?;
        self.sandboxes.reserve(&id, &snapshot, size).await.map_err(refusal)?;
        Ok(ReserveResponse { load: Some(self.reporter.report().await) })
    }

    pub(super) async fn cancel_reservation(
        &self,
        request: CancelReservationRequest,
    ) -> Handled<CancelReservationResponse> {
        self.sandboxes.cancel_reservation(&request.sandbox_id.parse()?);
        Ok(CancelReservationResponse {})
    }

    pub(super) async fn export_sandbox(
        &self,
        request: ExportSandboxRequest,
    ) -> Handled<ExportSandboxResponse> {
        let (id, target) = (request.id.parse()?, request.target.parse()?);
        self.fence(request.epoch).await?;
        let exported = self.sandboxes.export(&id, &target, WAIT).await;
        let (exported, node) = exported.map_err(refusal)?;
        let record = serde_json::to_vec(&exported).map_err(|error| {
            Refusal::new(Reason::Invariant, format!("the record of {id}: {error}"))
        })?;
        Ok(ExportSandboxResponse { node: node.to_string(), record: record.into() })
    }

    pub(super) async fn import_sandbox(
        &self,
        request: ImportSandboxRequest,
    ) -> Handled<ImportSandboxResponse> {
        let exported = serde_json::from_slice(&request.record).map_err(|error| {
            Invalid::new("record", format!("cannot be read by this version: {error}"))
        })?;
        self.fence(request.epoch).await?;
        let record = self.sandboxes.import(exported, WAIT).await.map_err(refusal)?;
        Ok(ImportSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn adopt(
        &self,
        request: AdoptSandboxRequest,
    ) -> Handled<AdoptSandboxResponse> {
        let adoption = Adoption {
            id: request.id.parse()?,
            vmid: Vmid::try_from(request.vmid)?,
            team: request.team.parse()?,
            egress: convert::egress(request.egress, &request.egress_names)?,
        };
        if !request.dry_run {
            self.fence(request.epoch).await?;
        }
        let adopted = self.sandboxes.adopt(adoption, request.dry_run, WAIT).await;
        let (record, volumes) = adopted.map_err(refusal)?;
        Ok(AdoptSandboxResponse { sandbox: Some(self.wire(&record)), volumes })
    }

    pub(super) async fn release(
        &self,
        request: ReleaseSandboxRequest,
    ) -> Handled<ReleaseSandboxResponse> {
        let id = request.id.parse()?;
        self.fence(request.epoch).await?;
        let released = if request.moved_to.is_empty() {
            self.sandboxes.release(&id, WAIT).await
        } else {
            self.sandboxes.forget_moved(&id, &request.moved_to.parse()?, WAIT).await
        };
        let record = released.map_err(refusal)?;
        Ok(ReleaseSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn check_node(&self) -> Handled<CheckResponse> {
        let (mut findings, sandboxes) = self.sandboxes.check().await;
        findings.extend(self.execs.check().await);
        if let Some(check) = self.checks.get() {
            findings.extend(check.check().await);
        }
        let node = self.sandboxes.pve().node();
        let findings = findings.into_iter().map(|finding| Finding {
            invariant: finding.invariant.into(),
            node: node.to_string(),
            subject: finding.subject,
            detail: finding.detail,
        });
        Ok(CheckResponse {
            findings: findings.collect(),
            sandboxes: u32::try_from(sandboxes).unwrap_or(u32::MAX),
        })
    }
}
