//! `OperatorService`: convert, call, convert.

use std::sync::Arc;

use futures_util::StreamExt;
use proto::sandbox::v1::{operator_service_server::OperatorService, *};
use tonic::{Request, Response, Status};

use super::{convert, sandbox::Messages};
use crate::sandbox::{Said, Sandboxes, Wanted};

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

    type WatchAllEventsStream = Messages<WatchAllEventsResponse>;

    async fn watch_all_events(
        &self,
        request: Request<WatchAllEventsRequest>,
    ) -> Result<Response<Self::WatchAllEventsStream>, Status> {
        let WatchAllEventsRequest { after_revision, id, follow, last } = request.into_inner();
        let wanted = Wanted { team: None, id, after_revision, last, follow };
        let stream = self.sandboxes.events(wanted).await?.map(|said| {
            let Said { event, revision } = said?;
            Ok(WatchAllEventsResponse { event: event.map(convert::event), revision })
        });
        Ok(Response::new(stream.boxed()))
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
