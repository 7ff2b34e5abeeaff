//! Calls about certificates: the renewal of a node's own, and which of other nodes it refuses.

use proto::{agent::v1 as wire, name::NodeName};
use tonic::{Code, Status};

use super::{
    Client, Result,
    answer::{QUICK, call},
    calls::Call,
};

/// Certificate requests of a node, PEM.
#[derive(Debug, Clone)]
pub struct CertificateRequests {
    /// Request of the agent.
    pub agent: String,
    /// Request of the ingress hop, when its certificate is to be renewed, too.
    pub ingress: Option<String>,
}

impl Client {
    /// Asks for certificate requests with new keys. `None` of an older agent, which has no such
    /// call.
    pub async fn request_certificates(&self, epoch: u64) -> Result<Option<CertificateRequests>> {
        let request = wire::RequestCertificatesRequest { epoch };
        let mut client = self.certificates();
        let answer = async {
            match client.request_certificates(request).await {
                Ok(answer) => Ok(answer.map(Some)),
                Err(status) if is_unknown(&status) => Ok(tonic::Response::new(None)),
                Err(status) => Err(status),
            }
        };
        let answer = call(Call::RequestCertificates, QUICK, answer).await?;
        Ok(answer.map(|answer| CertificateRequests {
            agent: answer.agent_csr,
            ingress: Some(answer.ingress_csr).filter(|csr| !csr.is_empty()),
        }))
    }

    /// Replaces the node's list of revoked nodes: each with the time from which on certificates of it are
    /// accepted again. An older agent, which has no such call, continues as it is.
    pub async fn set_revoked_nodes(&self, epoch: u64, nodes: &[(NodeName, u64)]) -> Result<()> {
        let revoked = |(node, from): &(NodeName, u64)| wire::RevokedNode {
            node: node.to_string(),
            accepted_from_ms: *from,
        };
        let nodes = nodes.iter().map(revoked).collect();
        let mut client = self.certificates();
        let answer = async {
            match client.set_revoked_nodes(wire::SetRevokedNodesRequest { epoch, nodes }).await {
                Err(status) if is_unknown(&status) => {
                    Ok(tonic::Response::new(wire::SetRevokedNodesResponse {}))
                }
                answer => answer,
            }
        };
        call(Call::SetRevokedNodes, QUICK, answer).await.map(drop)
    }

    /// Hands certificates over. Returns whether Caddy must be restarted to use its own.
    pub async fn install_certificates(
        &self,
        epoch: u64,
        agent: String,
        ingress: Option<String>,
    ) -> Result<bool> {
        let request = wire::InstallCertificatesRequest {
            epoch,
            agent_certificate: agent,
            ingress_certificate: ingress.unwrap_or_default(),
        };
        let mut client = self.certificates();
        let answer = client.install_certificates(request);
        call(Call::InstallCertificates, QUICK, answer).await.map(|answer| answer.restart_ingress)
    }
}

/// Returns true when the agent does not know the service, which is no error of ours.
pub(super) fn is_unknown(status: &Status) -> bool {
    status.code() == Code::Unimplemented && daemon::status::reason(status).is_none()
}
