//! To come.
use std::sync::Arc;

use proto::agent::v1 as wire;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use crate::sandbox::Sandboxes;

pub(super) type Responses = ReceiverStream<Result<wire::ExecResponse, Status>>;

pub(super) async fn exec(
    _: Arc<Sandboxes>,
    _: Streaming<wire::ExecRequest>,
) -> Result<Response<Responses>, Status> {
    Err(Status::unimplemented("to come"))
}
