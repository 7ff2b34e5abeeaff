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

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        let CollectGarbageRequest { dry_run, node } = request.into_inner();
        let (items, unreachable) = self.sandboxes.collect_garbage(&node, dry_run).await?;
        Ok(Response::new(CollectGarbageResponse { items, unreachable }))
    }

    async fn recover_sandbox(
        &self,
        request: Request<RecoverSandboxRequest>,
    ) -> Result<Response<RecoverSandboxResponse>, Status> {
        let RecoverSandboxRequest { node, vmid, dry_run } = request.into_inner();
        let sandbox = self.sandboxes.recover(&node, vmid, dry_run).await?;
        Ok(Response::new(RecoverSandboxResponse { sandbox: Some(sandbox) }))
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
