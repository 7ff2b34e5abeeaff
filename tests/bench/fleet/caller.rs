//! A backend that calls the public API with a token.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use proto::{
    MESSAGE_BYTES_MAX,
    sandbox::v1::{
        CreateSandboxRequest, GetSandboxRequest, ListNodesRequest, ListSandboxesRequest, Phase,
        SandboxFilter, operator_service_client::OperatorServiceClient,
        sandbox_service_client::SandboxServiceClient,
    },
};
use tokio::time::{sleep, timeout};
use tonic::{Request, metadata::MetadataValue, transport::Channel};

use super::nodes::SNAPSHOT;

/// Attempts of one creation, each of which waits for up to 20 s.
const TRIES: usize = 4;
/// Longest wait for the controller, which does not answer while it restarts.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(20);

/// Returns the metadata by which a sandbox is found.
pub(super) fn session(number: usize) -> String {
    format!("s{number:06}")
}

/// One connection, shared by concurrent callers.
#[derive(Clone)]
pub(super) struct Caller {
    sandboxes: SandboxServiceClient<Channel>,
    operator: OperatorServiceClient<Channel>,
    token: Arc<str>,
}

impl Caller {
    pub(super) fn new(channel: Channel, token: Arc<str>) -> Self {
        let sandboxes =
            SandboxServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let operator =
            OperatorServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Self { sandboxes, operator, token }
    }

    fn authorised<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        let value = MetadataValue::try_from(format!("Bearer {}", self.token))?;
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }

    /// Creates a sandbox as backends do, and returns when it runs.
    pub(super) async fn create(&self, number: usize) -> Result<String> {
        let message = CreateSandboxRequest {
            request_id: format!("fleet-{number:06}"),
            snapshot_id: SNAPSHOT.into(),
            metadata: BTreeMap::from([("session".into(), session(number))]),
            ..CreateSandboxRequest::default()
        };
        for _ in 0..TRIES {
            let request = self.authorised(message.clone())?;
            let answer = self.sandboxes.clone().create_sandbox(request).await?;
            let sandbox = answer.into_inner().sandbox.context("a sandbox")?;
            match sandbox.phase() {
                Phase::Running => return Ok(sandbox.id),
                Phase::Creating => {}
                phase @ (Phase::Unspecified
                | Phase::Paused
                | Phase::Starting
                | Phase::Stopping
                | Phase::Stopped
                | Phase::Deleting
                | Phase::Deleted
                | Phase::Failed
                | Phase::Unreachable) => bail!("{} is {phase:?}", sandbox.id),
            }
        }
        bail!("a creation did not come up")
    }

    /// Returns the number of sandboxes on a page, and the token of the next page.
    pub(super) async fn page(
        &self,
        page_size: u32,
        token: &str,
        filter: Option<SandboxFilter>,
    ) -> Result<(usize, String)> {
        let message = ListSandboxesRequest {
            page_size,
            page_token: token.into(),
            filter,
            ..ListSandboxesRequest::default()
        };
        let request = self.authorised(message)?;
        let page = self.sandboxes.clone().list_sandboxes(request).await?.into_inner();
        Ok((page.sandboxes.len(), page.next_page_token))
    }

    /// Waits until `nodes` nodes are ready and `known` is reported as running.
    pub(super) async fn until_up(&self, nodes: usize, known: Option<&str>) -> Result<()> {
        let up = async {
            while self.is_up(nodes, known).await.is_err() {
                sleep(PAUSE).await;
            }
        };
        if timeout(PATIENCE, up).await.is_err() {
            return self.is_up(nodes, known).await.context("the controller did not come up");
        }
        Ok(())
    }

    async fn is_up(&self, nodes: usize, known: Option<&str>) -> Result<()> {
        if let Some(id) = known {
            let request = self.authorised(GetSandboxRequest { id: id.into() })?;
            let sandbox = self.sandboxes.clone().get_sandbox(request).await?.into_inner().sandbox;
            let phase = sandbox.context("a sandbox")?.phase();
            ensure!(phase == Phase::Running, "{id} is {phase:?}");
        }
        let request = self.authorised(ListNodesRequest {})?;
        let listed = self.operator.clone().list_nodes(request).await?.into_inner().nodes;
        let ready = listed.iter().filter(|node| node.ready).count();
        ensure!(ready == nodes, "{ready} nodes of {nodes} are ready");
        Ok(())
    }
}
