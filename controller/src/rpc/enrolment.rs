//! `EnrolmentService`: converts the request, calls the domain, converts the answer.

use std::sync::{Arc, OnceLock};

use daemon::status::Refusal;
use proto::{
    Reason,
    sandbox::v1::{enrolment_service_server::EnrolmentService, *},
    time::timestamp,
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::{
    calls::Call,
    sandbox::{Answer, split},
};
use crate::enrolment::Enrolment;

/// Most joins at once, of all callers: each may take signatures of the CA.
const JOINS_MAX: usize = 4;

/// Implementation of the service.
#[derive(Debug)]
pub(super) struct Rpc {
    enrolment: Arc<OnceLock<Arc<Enrolment>>>,
    joins: Arc<Semaphore>,
}

impl Rpc {
    pub(super) fn new(enrolment: Arc<OnceLock<Arc<Enrolment>>>) -> Self {
        Self { enrolment, joins: Arc::new(Semaphore::new(JOINS_MAX)) }
    }

    fn enrolment(&self) -> Result<&Arc<Enrolment>, Status> {
        self.enrolment.get().ok_or_else(|| {
            let message = "this controller has no CA that it can use; its log says why";
            Refusal::new(Reason::StoreFailed, message).into()
        })
    }
}

#[tonic::async_trait]
impl EnrolmentService for Rpc {
    async fn join(&self, request: Request<JoinRequest>) -> Answer<JoinResponse> {
        let enrolment = self.enrolment()?.clone();
        // Callers without a good token are refused soon, so a wait is short; the guard bounds it.
        let place = self.joins.clone().acquire_owned().await;
        let call = request.extensions().get::<Call>().cloned();
        let join = async move {
            let request = request.into_inner();
            if let Some(call) = &call {
                call.about(&request);
            }
            let done = enrolment.join(request).await;
            if let Some(call) = &call {
                call.joined(&done);
            }
            done
        };
        Ok(Response::new(to_its_end(place, join).await?))
    }

    async fn create_node_token(
        &self,
        request: Request<CreateNodeTokenRequest>,
    ) -> Answer<CreateNodeTokenResponse> {
        let (caller, CreateNodeTokenRequest { node, ttl_s }) = split(request)?;
        let enrolment = self.enrolment()?;
        let issue = enrolment.create_token(&caller, &node, ttl_s).await?;
        Ok(Response::new(CreateNodeTokenResponse {
            token: issue.text.reveal(),
            expires_at: Some(timestamp(issue.expires_ms)),
            ca_sha256: enrolment.fingerprint(),
            names: enrolment.names().to_vec(),
        }))
    }

    async fn revoke_node(&self, request: Request<RevokeNodeRequest>) -> Answer<RevokeNodeResponse> {
        let (caller, RevokeNodeRequest { node }) = split(request)?;
        let enrolment = self.enrolment()?.clone();
        let permit = caller.permit.clone();
        let revoke = async move { enrolment.revoke(&caller, &node).await };
        let living = to_its_end(permit, revoke).await?;
        let sandboxes = u32::try_from(living).unwrap_or(u32::MAX);
        Ok(Response::new(RevokeNodeResponse { sandboxes }))
    }
}

/// Runs a change on a task of its own: a caller who hangs up must not leave it in the store alone. The change keeps
/// the place of its call until its end: whoever hangs up and calls again has the work of both under way.
async fn to_its_end<T: Send + 'static>(
    place: impl Send + 'static,
    change: impl Future<Output = crate::sandbox::Result<T>> + Send + 'static,
) -> Result<T, Status> {
    let task = async move {
        let _place = place;
        change.await
    };
    let done = tokio::spawn(task).await;
    let done = done.map_err(|_| Status::unavailable("the controller is stopping"))?;
    Ok(done?)
}
