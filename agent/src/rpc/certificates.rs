//! `CertificateService`: the controller renews the node's certificates.

use std::{collections::BTreeMap, sync::Arc};

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::{certificate_service_server::CertificateService, *},
    id::Invalid,
    name::NodeName,
};
use tokio::task::spawn_blocking;
use tonic::{Request, Status};

use super::{Answer, Handled, Rpc};
use crate::{
    certificates::Certificates,
    revoked::{NODES_MAX, Revoked},
};

#[tonic::async_trait]
impl CertificateService for Rpc {
    async fn request_certificates(
        &self,
        request: Request<RequestCertificatesRequest>,
    ) -> Answer<RequestCertificatesResponse> {
        let own = self.own_certificates()?;
        self.call(self.make_requests(own, request.into_inner())).await
    }

    async fn install_certificates(
        &self,
        request: Request<InstallCertificatesRequest>,
    ) -> Answer<InstallCertificatesResponse> {
        let own = self.own_certificates()?;
        self.call(self.take_certificates(own, request.into_inner())).await
    }

    async fn set_revoked_nodes(
        &self,
        request: Request<SetRevokedNodesRequest>,
    ) -> Answer<SetRevokedNodesResponse> {
        self.call(self.take_revoked(request.into_inner())).await
    }
}

impl Rpc {
    /// Lets the controller renew these certificates. Called once; without it the calls are unknown.
    pub fn renew(&self, certificates: Arc<Certificates>) {
        drop(self.certificates.set(certificates));
    }

    /// Keeps the controller's list of revoked nodes here. Called once; without it the call is unknown.
    pub fn keep_revoked(&self, revoked: Arc<Revoked>) {
        drop(self.revoked.set(revoked));
    }

    async fn take_revoked(
        &self,
        request: SetRevokedNodesRequest,
    ) -> Handled<SetRevokedNodesResponse> {
        let Some(revoked) = self.revoked.get().cloned() else {
            return Ok(SetRevokedNodesResponse {});
        };
        self.fence(request.epoch).await?;
        let nodes = request.nodes.into_iter().take(NODES_MAX);
        let nodes = nodes.map(|node| Ok((node.node.parse::<NodeName>()?, node.accepted_from_ms)));
        let nodes = nodes.collect::<Result<BTreeMap<_, _>, Invalid>>()?;
        let replaced = spawn_blocking(move || revoked.replace(nodes)).await;
        replaced.map_err(failed)?.map_err(failed)?;
        Ok(SetRevokedNodesResponse {})
    }

    fn own_certificates(&self) -> Result<Arc<Certificates>, Status> {
        let own = self.certificates.get().cloned();
        own.ok_or_else(|| Status::unimplemented("this agent has no certificates"))
    }

    async fn make_requests(
        &self,
        own: Arc<Certificates>,
        request: RequestCertificatesRequest,
    ) -> Handled<RequestCertificatesResponse> {
        self.fence(request.epoch).await?;
        let now_ms = self.sandboxes.now_ms();
        let made = spawn_blocking(move || own.request(now_ms)).await;
        let made = made.map_err(failed)?.map_err(failed)?;
        Ok(RequestCertificatesResponse {
            agent_csr: made.agent,
            ingress_csr: made.ingress.unwrap_or_default(),
        })
    }

    async fn take_certificates(
        &self,
        own: Arc<Certificates>,
        request: InstallCertificatesRequest,
    ) -> Handled<InstallCertificatesResponse> {
        self.fence(request.epoch).await?;
        let hop = Some(request.ingress_certificate).filter(|pem| !pem.is_empty());
        let restart_ingress = hop.is_some() && !own.reach_caddy();
        let (agent, now_ms) = (request.agent_certificate, self.sandboxes.now_ms());
        let installed = spawn_blocking(move || own.install(&agent, hop.as_deref(), now_ms)).await;
        installed.map_err(failed)?.map_err(failed)?;
        tracing::info!("certificate renewed");
        if restart_ingress {
            tracing::warn!("the ingress has a new certificate: restart pve-sandbox-ingress");
        }
        Ok(InstallCertificatesResponse { restart_ingress })
    }
}

fn failed(error: impl std::fmt::Display) -> Refusal {
    Refusal::new(Reason::StoreFailed, format!("the node's certificates: {error}"))
}
