//! `OperatorService`: converts the request, calls the domain, converts the answer.

use std::sync::{Arc, OnceLock};

use futures_util::StreamExt;
use proto::sandbox::v1::{operator_service_server::OperatorService, *};
use tonic::{Request, Response};

use super::{
    audit,
    calls::{self, Call, Made},
    convert,
    permits::Permits,
    sandbox::{Answer, Messages, made, split},
    ssh_keys,
    teams::Teams,
    tokens,
};
use crate::{
    access::Access,
    audit::Audit,
    sandbox::{EventItem, EventQuery, Sandboxes},
};

/// Implementation of the service.
#[derive(Debug)]
pub(super) struct Rpc {
    pub(super) sandboxes: Arc<Sandboxes>,
    pub(super) access: Arc<Access>,
    pub(super) audit: Audit,
    pub(super) permits: Permits,
    /// SSH server, once it listens.
    pub(super) ssh: Arc<OnceLock<SshServer>>,
}

impl Rpc {
    fn teams(&self) -> Teams<'_> {
        Teams { sandboxes: &self.sandboxes, permits: &self.permits }
    }
}

#[tonic::async_trait]
impl OperatorService for Rpc {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        let nodes = self.sandboxes.nodes().statuses().into_iter().map(convert::node).collect();
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    type WatchAllEventsStream = Messages<WatchAllEventsResponse>;

    async fn watch_all_events(
        &self,
        request: Request<WatchAllEventsRequest>,
    ) -> Answer<Self::WatchAllEventsStream> {
        let (_, request) = split(request)?;
        let WatchAllEventsRequest { after_revision, id, follow, last } = request;
        let query = EventQuery { team: None, id, after_revision, last, follow };
        let stream = self.sandboxes.events(query).await?.map(|item| {
            let EventItem { event, revision } = item?;
            Ok(WatchAllEventsResponse { event: event.map(convert::event), revision })
        });
        Ok(Response::new(stream.boxed()))
    }

    async fn fsck(&self, _: Request<FsckRequest>) -> Answer<FsckResponse> {
        let mut report = self.sandboxes.fsck().await;
        report.findings.extend(audit::finding(&self.audit));
        Ok(Response::new(FsckResponse {
            findings: report.findings,
            sandboxes: report.sandboxes,
            nodes: report.nodes,
        }))
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Answer<CollectGarbageResponse> {
        let call = request.extensions().get::<Call>().cloned();
        let (_, CollectGarbageRequest { dry_run, node }) = split(request)?;
        let cleaned = move |items: &[GarbageItem]| {
            if let Some(call) = call.as_ref().filter(|_| !dry_run) {
                call.cleaned(items);
            }
        };
        let (items, unreachable) = self.sandboxes.collect_garbage(&node, dry_run, cleaned).await?;
        Ok(Response::new(CollectGarbageResponse { items, unreachable }))
    }

    async fn recover_sandbox(
        &self,
        request: Request<RecoverSandboxRequest>,
    ) -> Answer<RecoverSandboxResponse> {
        let (caller, request) = split(request)?;
        let RecoverSandboxRequest { node, vmid, dry_run } = request;
        let sandbox = self.sandboxes.recover(&caller, &node, vmid, dry_run).await?;
        // A look is recorded by its vmid alone.
        let id = Made(if dry_run { String::new() } else { sandbox.id.clone() });
        Ok(made(id, RecoverSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn adopt_sandbox(
        &self,
        request: Request<AdoptSandboxRequest>,
    ) -> Answer<AdoptSandboxResponse> {
        let (caller, request) = split(request)?;
        let AdoptSandboxRequest { node, vmid, team, dry_run } = request;
        let adopted = self.sandboxes.adopt(&caller, &node, (vmid, &team), dry_run).await;
        let (sandbox, volumes) = adopted?;
        let id = Made(if dry_run { String::new() } else { sandbox.id.clone() });
        Ok(made(id, AdoptSandboxResponse { sandbox: Some(sandbox), volumes }))
    }

    async fn release_sandbox(
        &self,
        request: Request<ReleaseSandboxRequest>,
    ) -> Answer<ReleaseSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.release(&caller, &request.id).await?;
        Ok(Response::new(ReleaseSandboxResponse { sandbox: Some(sandbox) }))
    }

    async fn cordon_node(&self, request: Request<CordonNodeRequest>) -> Answer<CordonNodeResponse> {
        let (caller, CordonNodeRequest { node, why }) = split(request)?;
        self.sandboxes.cordon(&caller, &node, why).await?;
        Ok(Response::new(CordonNodeResponse {}))
    }

    async fn uncordon_node(
        &self,
        request: Request<UncordonNodeRequest>,
    ) -> Answer<UncordonNodeResponse> {
        let (caller, request) = split(request)?;
        self.sandboxes.uncordon(&caller, &request.node).await?;
        Ok(Response::new(UncordonNodeResponse {}))
    }

    async fn drain_node(&self, request: Request<DrainNodeRequest>) -> Answer<DrainNodeResponse> {
        let witness = calls::witness(&request);
        let (caller, DrainNodeRequest { node, why }) = split(request)?;
        Ok(Response::new(self.sandboxes.drain(&caller, &node, why, &witness).await?))
    }

    async fn forget_node(&self, request: Request<ForgetNodeRequest>) -> Answer<ForgetNodeResponse> {
        let witness = calls::witness(&request);
        let (caller, request) = split(request)?;
        let sandboxes = self.sandboxes.forget_node(&caller, &request, &witness).await?;
        Ok(Response::new(ForgetNodeResponse { sandboxes }))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Answer<CreateTokenResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(tokens::create(&self.access, &caller, request).await?))
    }

    async fn list_tokens(&self, request: Request<ListTokensRequest>) -> Answer<ListTokensResponse> {
        let (_, request) = split(request)?;
        Ok(Response::new(tokens::list(&self.access, request).await?))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Answer<RevokeTokenResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(tokens::revoke(&self.access, &caller, request).await?))
    }

    async fn add_ssh_key(&self, request: Request<AddSshKeyRequest>) -> Answer<AddSshKeyResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(ssh_keys::add(&self.access, &caller, request).await?))
    }

    async fn list_ssh_keys(
        &self,
        request: Request<ListSshKeysRequest>,
    ) -> Answer<ListSshKeysResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(ssh_keys::list(&self.access, &caller, request).await?))
    }

    async fn remove_ssh_key(
        &self,
        request: Request<RemoveSshKeyRequest>,
    ) -> Answer<RemoveSshKeyResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(ssh_keys::remove(&self.access, &caller, request).await?))
    }

    async fn list_teams(&self, request: Request<ListTeamsRequest>) -> Answer<ListTeamsResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.teams().list(&self.access, request).await?))
    }

    async fn get_team(&self, request: Request<GetTeamRequest>) -> Answer<GetTeamResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(self.teams().get(&caller, &request).await?))
    }

    async fn update_team(&self, request: Request<UpdateTeamRequest>) -> Answer<UpdateTeamResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(self.teams().update(&caller, request).await?))
    }

    type ListAuditStream = Messages<ListAuditResponse>;

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Answer<Self::ListAuditStream> {
        let (_, request) = split(request)?;
        Ok(Response::new(audit::list(&self.audit, &self.sandboxes, request).await?))
    }

    type ExportAuditStream = Messages<ExportAuditResponse>;

    async fn export_audit(
        &self,
        request: Request<ExportAuditRequest>,
    ) -> Answer<Self::ExportAuditStream> {
        let (_, request) = split(request)?;
        Ok(Response::new(audit::export(&self.audit, request).await?))
    }

    async fn verify_audit(
        &self,
        request: Request<VerifyAuditRequest>,
    ) -> Answer<VerifyAuditResponse> {
        let (_, request) = split(request)?;
        Ok(Response::new(audit::verify(&self.audit, request).await?))
    }

    async fn get_version(&self, _: Request<GetVersionRequest>) -> Answer<GetVersionResponse> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let epoch = self.sandboxes.nodes().epoch.get();
        Ok(Response::new(GetVersionResponse { version, epoch, ssh: self.ssh.get().cloned() }))
    }
}
