//! `OperatorService`: convert, call, convert.

use std::sync::Arc;

use proto::sandbox::v1::{operator_service_server::OperatorService, *};
use tonic::{Request, Response, Status};

use super::convert;
use crate::sandbox::Sandboxes;

/// The service.
#[derive(Debug)]
pub(super) struct Rpc {
    pub(super) sandboxes: Arc<Sandboxes>,
}

#[tonic::async_trait]
impl OperatorService for Rpc {
    async fn list_nodes(
        &self,
        _request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let nodes = self.sandboxes.nodes().statuses().into_iter().map(convert::node).collect();
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn fsck(&self, _request: Request<FsckRequest>) -> Result<Response<FsckResponse>, Status> {
        let report = self.sandboxes.fsck().await;
        Ok(Response::new(FsckResponse {
            findings: report.findings,
            sandboxes: report.sandboxes,
            nodes: report.nodes,
        }))
    }

    async fn get_version(
        &self,
        _request: Request<GetVersionRequest>,
    ) -> Result<Response<GetVersionResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let epoch = self.sandboxes.nodes().epoch.get();
        Ok(Response::new(GetVersionResponse { version, epoch }))
    }
}
