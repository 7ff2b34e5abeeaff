//! Client certificates, over real sockets: what they open, and that they and those of daemons are never
//! taken for each other.

use std::path::{Path, PathBuf};

use daemon::{
    peer::CONTROLLER_NAME,
    tls::{ClientAuth, Identity, LiveIdentity},
};
use proto::sandbox::v1::*;
use rcgen::{CertificateParams, KeyPair};
use tokio::net::TcpListener;
use tokio_stream::StreamExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Code;

use super::*;
use crate::{
    ca,
    clock::{SystemClock, SystemRandom},
    node::TlsConnector,
};

/// Controller without nodes, on the loopback.
struct Site {
    dir: tempfile::TempDir,
    files: ca::Files,
    address: String,
    operator: String,
    store: Arc<dyn Store>,
    controller: Controller,
    _stop: DropGuard,
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (files, _) = ca::init(dir.path(), &[]).expect("CAs");
        let own = Identity::load(&files.certificate(), &files.key(), &files.ca());
        let live = LiveIdentity::new(&own.expect("identity")).expect("identity");
        let live = live.with_callers(&files.client_ca()).expect("the callers' CA");
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let operator = token(&store, "ops", "operator").await;
        let controller = Controller::start(Parts {
            store: store.clone(),
            audit: Audit::off(),
            connector: Arc::new(TlsConnector::new(live.client().expect("client"))),
            clock: Arc::new(SystemClock),
            random: Arc::new(SystemRandom),
            nodes: node::Options {
                seeds: Vec::new(),
                discover: false,
                agent_port: 7445,
                limits: crate::placement::Limits::default(),
            },
            creates: sandbox::Options::default(),
            events: crate::events::Options::default(),
            limits: ApiLimits::default(),
            urls: UrlTemplate::new("http://port-{port}-vm-{vmid}.test").expect("template").into(),
        })
        .await
        .expect("a controller");
        controller.certify(ca::ClientSigner::load(dir.path()).expect("signer"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let stop = CancellationToken::new();
        let server = live.server(ClientAuth::None).expect("server");
        let incoming = daemon::listen::tls(listener, server, stop.clone());
        tokio::spawn(controller.api().serve(incoming, stop.clone().cancelled_owned()));
        Self { dir, files, address, operator, store, controller, _stop: stop.drop_guard() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Connects with a certificate and its key in one file, or with none.
    fn channel(&self, own: Option<&Path>) -> Channel {
        let tls = match own {
            Some(own) => daemon::tls::client_with_certificate(own, Some(&self.files.ca())),
            None => daemon::tls::client_with_roots(&self.files.ca()),
        };
        daemon::channel::tls(Leg::Api, &self.address, "localhost", tls.expect("tls")).expect("name")
    }

    fn operator(&self) -> Operator {
        OperatorServiceClient::with_interceptor(self.channel(None), bearer(&self.operator))
    }

    /// Makes a client certificate; returns the id of its token, and the file with its key.
    async fn certificate(&self, team: &str, scopes: Vec<i32>, ttl_s: i64) -> (String, PathBuf) {
        let key = KeyPair::generate().expect("a key");
        let csr = CertificateParams::default().serialize_request(&key).expect("a request");
        let request = CreateTokenRequest {
            team: team.into(),
            scopes,
            ttl: (ttl_s > 0).then_some(prost_types::Duration { seconds: ttl_s, nanos: 0 }),
            csr: csr.pem().expect("PEM"),
            ..CreateTokenRequest::default()
        };
        let made = self.operator().create_token(request).await.expect("made").into_inner();
        let shown = made.token.expect("a token");
        assert!(shown.certificate && made.text.is_empty());
        let path = self.path(&format!("{}.pem", shown.id));
        std::fs::write(&path, made.certificate + &key.serialize_pem()).expect("written");
        (shown.id, path)
    }
}

/// Calls with no token in a header.
fn plain(channel: Channel) -> SandboxServiceClient<Channel> {
    SandboxServiceClient::new(channel)
}

async fn list(client: &mut SandboxServiceClient<Channel>) -> Result<(), Status> {
    client.list_sandboxes(ListSandboxesRequest::default()).await.map(drop)
}

async fn own_team(channel: Channel, auth: Auth) -> String {
    let mut operator = OperatorServiceClient::with_interceptor(channel, auth);
    let answer = operator.get_team(GetTeamRequest::default()).await.expect("a team");
    answer.into_inner().team.expect("a team").name
}

#[tokio::test]
async fn client_certificate_is_its_token_until_that_ends() {
    let site = Site::new().await;
    let (id, file) = site.certificate("red", vec![Scope::Read.into()], 0).await;
    let channel = site.channel(Some(&file));
    let mut client = plain(channel.clone());
    list(&mut client).await.expect("it may read");
    let delete = DeleteSandboxRequest { id: "web".into() };
    assert_eq!(reason(client.delete_sandbox(delete).await), Reason::ScopeMissing);
    assert_eq!(own_team(channel.clone(), Box::new(Ok)).await, "red");
    // A token in a header wins.
    assert_eq!(own_team(channel.clone(), bearer(&site.operator)).await, "ops");
    let unknown = issued("red", "read").text(Format::Plain);
    let mut wrong = SandboxServiceClient::with_interceptor(channel.clone(), bearer(&unknown));
    let answer = wrong.list_sandboxes(ListSandboxesRequest::default()).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);

    let watch = client.watch_sandboxes(WatchSandboxesRequest::default()).await;
    let mut watch = watch.expect("watches").into_inner();
    let revoke = RevokeTokenRequest { token: id, team: String::new() };
    site.operator().revoke_token(revoke).await.expect("revoked");
    let ended = async {
        loop {
            match watch.next().await {
                Some(Ok(_)) => {}
                Some(Err(status)) => return status,
                None => panic!("it ended without an error"),
            }
        }
    };
    let status = tokio::time::timeout(Duration::from_secs(2), ended).await.expect("at once");
    assert_eq!(status.code(), Code::Unauthenticated);
    // On the open connection, and on a new one.
    assert_eq!(reason(list(&mut client).await), Reason::TokenInvalid);
    assert_eq!(reason(list(&mut plain(site.channel(Some(&file)))).await), Reason::TokenInvalid);
}

#[tokio::test]
async fn certificate_is_good_for_the_key_that_it_was_made_for() {
    let site = Site::new().await;
    let (id, file) = site.certificate("red", Vec::new(), 3600).await;
    list(&mut plain(site.channel(Some(&file)))).await.expect("it may read");
    // Another key with the same id, of the same CA: as if somebody could have it signed once more.
    let signer = ca::ClientSigner::load(site.dir.path()).expect("signer");
    let key = KeyPair::generate().expect("a key");
    let csr = CertificateParams::default().serialize_request(&key).expect("a request");
    let csr = csr.pem().expect("PEM");
    let other = signer.sign(&id, None, &csr).expect("signed");
    let path = site.path("other.pem");
    std::fs::write(&path, other.pem + &key.serialize_pem()).expect("written");
    assert_eq!(reason(list(&mut plain(site.channel(Some(&path)))).await), Reason::TokenInvalid);
    let expires = site.store.token(&id).await.expect("store").expect("known").expires_ms;
    assert!(expires > 0, "its token ends with it");
    let bad = CreateTokenRequest { csr: "no request".into(), ..CreateTokenRequest::default() };
    assert_eq!(reason(site.operator().create_token(bad).await), Reason::FieldInvalid);
}

/// Whether a server with this identity accepts a client: one that our daemons would call, or be.
async fn accepts(
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
    name: &str,
) -> bool {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let stop = CancellationToken::new();
    let mut incoming = daemon::listen::tls(listener, server, stop.clone());
    let channel = daemon::channel::tls(Leg::Api, &address, name, client).expect("a name");
    let call = tokio::spawn(async move { list(&mut plain(channel)).await });
    let accepted = tokio::time::timeout(Duration::from_secs(1), incoming.next()).await;
    // A client that refuses the server ends the handshake; one that is refused has no connection.
    let accepted = matches!(accepted, Ok(Some(Ok(_)))) && !call.is_finished();
    call.abort();
    stop.cancel();
    accepted
}

#[tokio::test]
async fn certificates_of_callers_and_of_daemons_are_never_taken_for_each_other() {
    let site = Site::new().await;
    let n1 = "n1".parse().expect("name");
    let out = site.path("n1");
    ca::node(site.dir.path(), &n1, None, &out).expect("certificates");
    let node = |name: &str| out.join(name);
    let (_, caller) = site.certificate("red", vec![Scope::Admin.into()], 0).await;
    let ca = site.files.ca();
    let load = |certificate: &Path, key: &Path, ca: &Path| {
        Identity::load(certificate, key, ca).expect("identity")
    };
    let agent = load(&node("node.crt"), &node("node.key"), &ca);
    let ours = load(&site.files.certificate(), &site.files.key(), &ca);
    let name = daemon::peer::agent_name(&n1);
    let server = |identity: &Identity| daemon::tls::server(identity, ClientAuth::Required);

    // An agent takes the controller, and no caller.
    let to_agent = |client| accepts(server(&agent).expect("server"), client, &name);
    assert!(to_agent(daemon::tls::client(&ours).expect("client")).await);
    let as_caller = || daemon::tls::client_with_certificate(&caller, Some(&ca)).expect("client");
    assert!(!to_agent(as_caller()).await, "a caller at an agent, and so at its renewal call");

    // The controller takes no caller for an agent, nor does anybody for the controller.
    let posing = load(&caller, &caller, &ca);
    let posing = || server(&posing).expect("server");
    let calls = || daemon::tls::client(&ours).expect("client");
    assert!(!accepts(posing(), calls(), &name).await, "a caller as an agent");
    assert!(!accepts(posing(), calls(), CONTROLLER_NAME).await, "a caller as the controller");

    // The API takes no certificate of a daemon.
    for (certificate, key) in [
        (node("node.crt"), node("node.key")),
        (node("ingress-node.crt"), node("ingress-node.key")),
        (site.files.certificate(), site.files.key()),
    ] {
        let both = [certificate, key].map(|path| std::fs::read_to_string(path).expect("PEM"));
        let path = site.path("daemon.pem");
        std::fs::write(&path, both.concat()).expect("written");
        let status = list(&mut plain(site.channel(Some(&path)))).await.expect_err("refused");
        assert_ne!(status.code(), Code::Ok, "{status:?}");
    }

    // Nor do the CAs vouch for each other's.
    let pem = |path: &Path| std::fs::read(path).expect("PEM");
    let client_ca = pem(&site.files.client_ca());
    daemon::tls::signed_by(&pem(&node("node.crt")), &pem(&ca)).expect("its CA");
    daemon::tls::signed_by(&pem(&node("node.crt")), &client_ca).expect_err("another CA");
    daemon::tls::signed_by(&pem(&caller), &pem(&ca)).expect_err("another CA");
}

#[tokio::test]
async fn overdue_renewal_of_the_controllers_own_certificate_is_an_event_and_a_finding() {
    let site = Site::new().await;
    let of_life = |life: Duration| {
        ca::renew_own(&site.files, life).expect("a certificate");
        let (cert, key) = (site.files.certificate(), site.files.key());
        Identity::load(&cert, &key, &site.files.ca()).expect("identity")
    };
    let findings = async || {
        let report = site.operator().fsck(FsckRequest {}).await.expect("checked").into_inner();
        report.findings.into_iter().map(|finding| finding.subject).collect::<Vec<_>>()
    };
    let events = async || {
        let page = site.store.events(0, crate::store::Filter::default(), 100).await.expect("read");
        let overdue = page.events.iter().map(|(_, event)| event);
        overdue.filter(|event| event.kind == EventKind::CertificateOverdue).count()
    };
    let until_told = async |count: usize| {
        let told = async {
            while events().await < count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), told).await.expect("told in time");
    };
    // What nobody renews, whatever the reason.
    let live = LiveIdentity::new(&of_life(Duration::from_secs(2))).expect("identity");
    site.controller.watch_certificate(live.clone());
    until_told(1).await;
    let found = findings().await;
    assert!(found.len() == 1 && found[0].starts_with("controller's certificate "), "{found:?}");
    assert_eq!(events().await, 1);
    // A renewal mends it.
    live.replace(&of_life(Duration::from_secs(40))).expect("replaced");
    let mended = async {
        while !findings().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), mended).await.expect("mended in time");
    // Each certificate that is late is told once.
    live.replace(&of_life(Duration::from_secs(2))).expect("replaced");
    until_told(2).await;
    assert_eq!(events().await, 2);
}
