//! Calls about pause, resume and usage of sandboxes.

use daemon::status::Refusal;
use proto::{
    agent::v1 as wire,
    id::{Invalid, SandboxId, SandboxRef},
    sandbox::v1::Usage,
};

use super::{Rpc, convert, status::refusal};
use crate::{journal::Record, sandbox::Known};

/// Most sandboxes whose usage is requested in one call.
const USAGES_MAX: usize = 200;

impl Rpc {
    pub(super) async fn pause(
        &self,
        request: wire::PauseSandboxRequest,
    ) -> Result<wire::PauseSandboxResponse, Refusal> {
        let (id, wait) = (request.id.parse()?, convert::wait(request.wait)?);
        self.fence(request.epoch).await?;
        let record = self.sandboxes.pause(&id, request.or_stop, wait).await.map_err(refusal)?;
        Ok(wire::PauseSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn resume(
        &self,
        request: wire::ResumeSandboxRequest,
    ) -> Result<wire::ResumeSandboxResponse, Refusal> {
        let (id, wait) = (request.id.parse()?, convert::wait(request.wait)?);
        self.fence(request.epoch).await?;
        let record = self.sandboxes.resume(&id, wait).await.map_err(refusal)?;
        Ok(wire::ResumeSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    /// Reports usage. Sandboxes that cannot be measured are omitted: a long list must not fail
    /// because of one.
    pub(super) async fn usage(
        &self,
        request: wire::GetUsageRequest,
    ) -> Result<wire::GetUsageResponse, Refusal> {
        if request.ids.len() > USAGES_MAX {
            return Err(Invalid::new("ids", "must be at most 200").into());
        }
        let ids: Result<Vec<SandboxId>, Invalid> =
            request.ids.iter().map(|id| id.parse()).collect();
        let mut usages = Vec::new();
        for id in ids? {
            if let Some(Known::Live(record)) = self.sandboxes.known(&SandboxRef::Id(id))
                && record.phase.is_up()
            {
                usages.extend(self.usage_of(&record).await);
            }
        }
        Ok(wire::GetUsageResponse { usages })
    }

    async fn usage_of(&self, record: &Record) -> Option<Usage> {
        let usage = self.sandboxes.pve().usage(record.vmid).await?;
        // Where the kernel has no limit, PVE's applies.
        let limit = u64::from(record.size.memory_mib) << 20;
        Some(Usage {
            id: record.id.to_string(),
            cpu_us: usage.cpu_us,
            at_ns: usage.at_ns,
            memory_bytes: usage.memory_bytes,
            memory_max_bytes: if usage.memory_max_bytes == 0 {
                limit
            } else {
                usage.memory_max_bytes
            },
            swap_bytes: usage.swap_bytes,
            pids: usage.pids,
            psi_cpu: usage.psi_cpu,
            psi_memory: usage.psi_memory,
            psi_io: usage.psi_io,
            frozen: usage.frozen,
        })
    }
}
