//! Real sockets, with the certificates that the program makes.

use proto::{name::NodeName, sandbox::v1::*};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use daemon::tls::{ClientAuth, Identity};

use super::*;
use crate::{
    audit, ca,
    clock::{SystemClock, SystemRandom},
    node::TlsConnector,
};

#[tokio::test]
async fn creation_works_over_our_certificates() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (data, out) = (dir.path().join("data"), dir.path().join("node"));
    let (files, _) = ca::init(&data, &["sandbox.localhost".into()]).expect("init");
    let n1: NodeName = "n1".parse().expect("name");
    ca::node(&data, &n1, None, &out).expect("certificates");
    let stop = CancellationToken::new();

    let node = Identity::load(&out.join("node.crt"), &out.join("node.key"), &out.join("ca.crt"));
    let server = daemon::tls::server(&node.expect("identity"), ClientAuth::Required);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    let agent = FakeAgent::start(&Net::new(), "n1", 100_000, &[SNAPSHOT]);
    let incoming = daemon::listen::tls(listener, server.expect("server"), stop.clone());
    tokio::spawn(agent.clone().serve(incoming));

    let ours = Identity::load(&files.certificate(), &files.key(), &files.ca()).expect("identity");
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let red = token(&store, "red", "sandbox").await;
    let log = dir.path().join("audit");
    let audit = Audit::open(&log, Arc::new(SystemClock), audit::Options::default());
    let audit = audit.await.expect("opened");
    let controller = Controller::start(Parts {
        store,
        audit: audit.clone(),
        connector: Arc::new(TlsConnector::new(daemon::tls::client(&ours).expect("client"))),
        clock: Arc::new(SystemClock),
        random: Arc::new(SystemRandom),
        nodes: node::Options {
            // The second name is wrong: that agent's certificate does not contain it.
            seeds: vec![(n1, address.clone()), ("n2".parse().expect("name"), address)],
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
    let server = daemon::tls::server(&ours, ClientAuth::None).expect("server");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    let incoming = daemon::listen::tls(listener, server, stop.clone());
    tokio::spawn(controller.api().serve(incoming, stop.clone().cancelled_owned()));
    assert_eq!(controller.settled(Duration::from_secs(2)).await, (1, 2));

    let roots = daemon::tls::client_with_roots(&files.ca()).expect("roots");
    for name in ["sandbox.localhost", "localhost"] {
        let channel =
            daemon::channel::tls(Leg::Api, &address, name, roots.clone()).expect("a name");
        let mut api: Api = SandboxServiceClient::with_interceptor(channel, bearer(&red));
        let sandbox = create(&mut api, request("r1")).await.expect("made");
        assert_eq!((sandbox.node.as_str(), sandbox.phase()), ("n1", Phase::Running));
    }
    let statuses = controller.sandboxes().nodes().statuses();
    let why = statuses[1].not_ready.as_deref().expect("n2 is not ready");
    assert!(why.contains("certificate"), "{why}");
    let entries = super::audit::entries(&audit, audit::AuditQuery::default()).await;
    let creation = entries.iter().find(|line| line.record.method == "CreateSandbox");
    let peer = &creation.expect("an entry").record.peer;
    assert!(peer.starts_with("127.0.0.1:"), "{peer}");
    stop.cancel();
    controller.stop().await;
}
