//! The fake's service that admits nodes.

use proto::{
    Reason,
    sandbox::v1::{enrolment_service_server::EnrolmentService, *},
};
use tonic::{Request, Response};

use super::{Answer, Service, refuse};

#[tonic::async_trait]
impl EnrolmentService for Service {
    async fn join(&self, _: Request<JoinRequest>) -> Answer<JoinResponse> {
        Err(refuse(Reason::TokenInvalid))
    }

    async fn create_node_token(
        &self,
        request: Request<CreateNodeTokenRequest>,
    ) -> Answer<CreateNodeTokenResponse> {
        let CreateNodeTokenRequest { node, ttl_s } = request.into_inner();
        Ok(Response::new(CreateNodeTokenResponse {
            token: format!("pvesj_{node}_{ttl_s}"),
            expires_at: Some(prost_types::Timestamp { seconds: 1_700_000_900, nanos: 0 }),
            ca_sha256: "ab".repeat(32),
            names: vec!["controller.example".into()],
        }))
    }

    async fn revoke_node(&self, request: Request<RevokeNodeRequest>) -> Answer<RevokeNodeResponse> {
        match request.get_ref().node.as_str() {
            "node2" => Ok(Response::new(RevokeNodeResponse { sandboxes: 3 })),
            _ => Err(refuse(Reason::NodeNotFound)),
        }
    }
}
