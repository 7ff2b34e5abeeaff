//! A controller as its program runs it, with an operator's token.

use std::{path::Path, time::Duration};

use agent::join::Line;
use controller::{
    Controller,
    ca::{self, Lives, Own, Signer},
    enrolment::Settings,
};
use daemon::{flow::Leg, tls::ClientAuth};
use proto::{
    Reason,
    sandbox::v1::{
        CreateNodeTokenRequest, EventKind, FsckRequest, Invariant, ListNodesRequest,
        Node as Status, RevokeNodeRequest, WatchAllEventsRequest, WatchAllEventsResponse,
        enrolment_service_client::EnrolmentServiceClient,
        operator_service_client::OperatorServiceClient,
    },
};
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Request, Streaming, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};

use crate::{node::Node, served};

/// Longest wait for a state of a node.
const SOON: Duration = Duration::from_secs(15);

type Auth = Box<dyn FnMut(Request<()>) -> Result<Request<()>, tonic::Status> + Send + Sync>;

pub(crate) struct World {
    dir: tempfile::TempDir,
    address: String,
    token: String,
    _controller: Controller,
    _stop: DropGuard,
}

impl World {
    pub(crate) async fn start(life: Duration) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (files, _) = ca::init(dir.path(), &[]).expect("a CA");
        ca::renew_own(&files, life).expect("a certificate of that life");
        let own = Own { files, life };
        let live = own.load().expect("identity");
        let (controller, token) = served::controller(&live).await;
        let lives = Lives { agent: life, ..Lives::default() };
        let signer = Signer::load(dir.path(), lives).expect("the CA");
        controller.enrol(signer, Settings::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let stop = CancellationToken::new();
        let server = live.server(ClientAuth::None).expect("TLS");
        let incoming = daemon::listen::tls(listener, server, stop.clone());
        tokio::spawn(controller.api().serve(incoming, stop.clone().cancelled_owned()));
        tokio::spawn(own.keep(live, stop.clone()));
        Self { dir, address, token, _controller: controller, _stop: stop.drop_guard() }
    }

    fn auth(&self) -> Auth {
        let value = format!("Bearer {}", self.token);
        Box::new(move |mut request| {
            let value = MetadataValue::try_from(value.as_str()).expect("ascii");
            request.metadata_mut().insert("authorization", value);
            Ok(request)
        })
    }

    fn channel(&self) -> Channel {
        let roots = daemon::tls::client_with_roots(&self.dir.path().join("ca/ca.crt"));
        let roots = roots.expect("roots");
        daemon::channel::tls(Leg::Api, &self.address, "localhost", roots).expect("a name")
    }

    fn enrolment(&self) -> EnrolmentServiceClient<InterceptedService<Channel, Auth>> {
        EnrolmentServiceClient::with_interceptor(self.channel(), self.auth())
    }

    fn operator(&self) -> OperatorServiceClient<InterceptedService<Channel, Auth>> {
        OperatorServiceClient::with_interceptor(self.channel(), self.auth())
    }

    /// Returns the line that `sandboxctl node token` prints.
    pub(crate) async fn line(&self, node: &str) -> Line {
        let request = CreateNodeTokenRequest { node: node.into(), ttl_s: 0 };
        let made = self.enrolment().create_node_token(request).await.expect("a token").into_inner();
        Line {
            controller: format!("https://{}", self.address),
            token: made.token.into(),
            ca_sha256: made.ca_sha256,
            address: None,
            no_bridge: true,
            pool: None,
            node: None,
        }
    }

    /// Returns the fingerprint of this controller's CA, without a new token for the node.
    pub(crate) async fn line_of_ca(&self) -> String {
        self.line("somebody-else").await.ca_sha256
    }

    pub(crate) async fn revoke(&self, node: &str) -> Result<u32, Option<Reason>> {
        let request = RevokeNodeRequest { node: node.into() };
        let answer = self.enrolment().revoke_node(request).await;
        answer
            .map(|answer| answer.into_inner().sandboxes)
            .map_err(|status| daemon::status::reason(&status))
    }

    async fn status(&self, node: &str) -> Status {
        let nodes = self.operator().list_nodes(ListNodesRequest {}).await.expect("nodes");
        let nodes = nodes.into_inner().nodes;
        nodes.into_iter().find(|status| status.name == node).expect("it is known")
    }

    pub(crate) async fn until_ready(&self, node: &str) {
        self.until(node, true).await;
    }

    pub(crate) async fn until_down(&self, node: &str) {
        self.until(node, false).await;
    }

    async fn until(&self, node: &str, ready: bool) {
        let waited = async {
            while self.status(node).await.ready != ready {
                sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(SOON, waited).await.is_err() {
            panic!("not ready={ready} in time: {:?}", self.status(node).await);
        }
    }

    pub(crate) async fn reason_of(&self, node: &str) -> String {
        self.status(node).await.reason
    }

    pub(crate) async fn certificate_end(&self, node: &str) -> Option<prost_types::Timestamp> {
        self.status(node).await.certificate_expires_at
    }

    pub(crate) async fn findings(&self) -> Vec<Invariant> {
        let report = self.operator().fsck(FsckRequest {}).await.expect("a report").into_inner();
        report.findings.iter().map(|finding| finding.invariant()).collect()
    }

    pub(crate) async fn events(&self) -> Vec<EventKind> {
        let request = WatchAllEventsRequest::default();
        let stream = self.operator().watch_all_events(request).await.expect("events");
        let mut stream = stream.into_inner();
        let mut kinds = Vec::new();
        while let Some(message) = stream.message().await.expect("the log") {
            kinds.extend(message.event.map(|event| event.kind()));
        }
        kinds
    }

    pub(crate) async fn follow_events(&self) -> Streaming<WatchAllEventsResponse> {
        let request = WatchAllEventsRequest { follow: true, ..WatchAllEventsRequest::default() };
        self.operator().watch_all_events(request).await.expect("events").into_inner()
    }

    pub(crate) fn own_certificate(&self) -> String {
        let path = self.dir.path().join("ca/controller.crt");
        std::fs::read_to_string(path).expect("a certificate")
    }

    /// Returns a connection of its own to a node's agent, as the controller.
    pub(crate) fn channel_to(&self, node: &Node) -> Channel {
        let path = |name: &str| self.dir.path().join("ca").join(name);
        let file = |name: &str| -> std::path::PathBuf { path(name) };
        let (certificate, key, ca) =
            (file("controller.crt"), file("controller.key"), file("ca.crt"));
        let paths: [&Path; 3] = [&certificate, &key, &ca];
        let identity = daemon::tls::Identity::load(paths[0], paths[1], paths[2]);
        let client = daemon::tls::client(&identity.expect("identity")).expect("client");
        let name = daemon::peer::agent_name(node.name());
        let address = node.address.to_string();
        daemon::channel::tls(Leg::Agent, &address, &name, client).expect("a name")
    }
}
