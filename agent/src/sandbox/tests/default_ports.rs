//! Ports that no caller exposes: the default services of a snapshot, and ports that something listens on.

use std::net::SocketAddr;

use proto::{name::Port, visibility::Visibility};

use super::*;
use crate::{journal::PortRules, sandbox::access::expose::Reach};

fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

fn service(name: &str, number: u32, visibility: Option<Visibility>) -> DefaultService {
    DefaultService { name: name.parse().expect("a name"), port: port(number), visibility }
}

pub(super) fn rules(default: Visibility, denied: &[u32]) -> PortRules {
    PortRules { default, denied: denied.iter().map(|number| port(*number)).collect() }
}

fn ruled(number: u8, rules: PortRules) -> Order {
    Order { port_rules: Some(rules), ..order(number) }
}

async fn node(services: Vec<DefaultService>, on_listen: bool) -> Node {
    let ports = DefaultPorts { services, on_listen };
    Node::with(|options| options.templates[0].ports = ports, Faults::default()).await
}

/// Services that cmux's templates have.
fn cmux() -> Vec<DefaultService> {
    vec![
        service("vscode", 39_378, None),
        service("exec", 39_375, None),
        service("xterm", 39_383, Some(Visibility::Private)),
        service("preview", 5173, None),
    ]
}

fn open(record: &Record) -> Vec<(String, u16, Visibility)> {
    let ports = record.open_ports().into_iter();
    ports.map(|open| (open.name.to_string(), open.port.get(), open.visibility)).collect()
}

impl Node {
    /// Makes servers in the sandbox listen, and looks once. Returns the ports that were exposed.
    async fn listening(&self, number: u8, addresses: &[&str]) -> Vec<u16> {
        let addresses: Vec<SocketAddr> =
            addresses.iter().map(|at| at.parse().expect("an address")).collect();
        self.cluster.listen(self.record(number).await.vmid, &addresses);
        let exposed = self.sandboxes.expose_listening().await.into_iter();
        exposed.filter(|(of, _)| *of == id(number)).map(|(_, port)| port.get()).collect()
    }

    pub(super) async fn hide(&self, name: &str) {
        let name = name.parse().expect("a name");
        self.sandboxes.hide(&id(1), name).await.expect("closed");
    }
}

#[tokio::test(start_paused = true)]
async fn default_services_are_open_from_the_intent_on() {
    use Visibility::{Private, Public, Team};
    let mut node = node(cmux(), false).await;
    let order = ruled(1, rules(Public, &[]));
    let intent = node.sandboxes.create(order, Duration::ZERO).await.expect("admitted");
    let expected = [
        ("exec", 39_375, Team),
        ("preview", 5173, Public),
        ("vscode", 39_378, Public),
        ("xterm", 39_383, Private),
    ];
    let expected = expected.map(|(name, port, who)| (name.to_owned(), port, who));
    assert_eq!(intent.phase, Phase::Creating);
    assert_eq!(open(&intent), expected);
    node.idle().await;
    node.restart().await;
    let record = node.record(1).await;
    assert_eq!((record.phase, open(&record)), (Phase::Running, expected.to_vec()));
    assert_eq!(record.access.listen, None);
}

#[tokio::test(start_paused = true)]
async fn creation_declines_or_overrides_default_services() {
    use Visibility::{Team, Token};
    let node = node(cmux(), true).await;
    let mut bare = ruled(1, rules(Team, &[]));
    bare.spec.no_default_services = true;
    let record = node.sandboxes.create(bare, LONG).await.expect("admitted");
    assert_eq!((open(&record), &record.access.listen), (vec![], &None));

    let mut own = ruled(2, rules(Team, &[]));
    own.spec.services.insert("vscode".parse().expect("a name"), port(8080));
    own.spec.services.insert("site".parse().expect("a name"), port(5173));
    own.spec.visibility.insert(port(8080), Token);
    own.spec.visibility.insert(port(5173), Token);
    own.spec.expose_on_listen = Some(false);
    let record = node.sandboxes.create(own, LONG).await.expect("admitted");
    let expected = [
        ("exec", 39_375, Team),
        ("site", 5173, Token),
        ("vscode", 8080, Token),
        ("xterm", 39_383, Visibility::Private),
    ];
    assert_eq!(open(&record), expected.map(|(name, port, who)| (name.to_owned(), port, who)));
    assert_eq!(record.access.listen, None);

    // A controller of the version before knows no default services, and which ports it denies is not known.
    let record = node.create(3).await;
    assert_eq!((open(&record), &record.access.listen), (vec![], &None));
}

#[tokio::test(start_paused = true)]
async fn denied_default_service_is_left_closed_and_the_creation_succeeds() {
    let node = node(cmux(), true).await;
    let order = ruled(1, rules(Visibility::Team, &[39_378, 39_375, 3000]));
    let record = node.sandboxes.create(order, LONG).await.expect("admitted");
    assert_eq!(record.phase, Phase::Running);
    let ports: Vec<_> = open(&record).into_iter().map(|(_, port, _)| port).collect();
    assert_eq!(ports, [5173, 39_383]);
    assert_eq!(node.listening(1, &["0.0.0.0:39378", "0.0.0.0:3000"]).await, [] as [u16; 0]);
}

#[tokio::test(start_paused = true)]
async fn default_services_and_those_of_the_caller_are_bounded_together() {
    let many = (8000..8032).map(|number| service(&format!("s-{number}"), number, None)).collect();
    let node = node(many, false).await;
    let mut order = ruled(1, rules(Visibility::Team, &[]));
    for number in 9000..9002 {
        order.spec.services.insert(format!("own-{number}").parse().expect("a name"), port(number));
    }
    let record = node.sandboxes.create(order, LONG).await.expect("admitted");
    let ports: Vec<_> = record.open_ports().into_iter().map(|open| open.port.get()).collect();
    assert_eq!(ports.len(), 32);
    assert!(ports.contains(&9000) && ports.contains(&9001), "the caller's count first: {ports:?}");
}

#[tokio::test(start_paused = true)]
async fn port_is_exposed_once_something_reachable_listens_on_it() {
    use Visibility::Team;
    let mut node = node(cmux(), true).await;
    node.sandboxes.create(ruled(1, rules(Team, &[])), LONG).await.expect("admitted");
    node.sandboxes.create(ruled(2, rules(Team, &[])), LONG).await.expect("admitted");
    assert_eq!(node.listening(1, &[]).await, [] as [u16; 0]);
    let all = [
        "127.0.0.1:3000",
        "[::1]:3001",
        "[::ffff:127.0.0.1]:3002",
        "0.0.0.0:22",
        "0.0.0.0:5173",
        "0.0.0.0:40000",
        "0.0.0.0:8080",
        "[::]:8080",
        "10.100.1.2:8081",
    ];
    assert_eq!(node.listening(1, &all).await, [8080, 8081]);
    let revision = node.record(1).await.revision;
    assert_eq!(node.listening(1, &all).await, [] as [u16; 0]);
    assert_eq!(node.record(1).await.revision, revision, "nothing new writes nothing");
    assert_eq!(open(&*node.record(2).await).len(), 4, "each by itself");

    // It stays open without its server, and after a restart of the agent.
    node.restart().await;
    assert_eq!(node.listening(1, &[]).await, [] as [u16; 0]);
    assert_eq!(node.record(1).await.visibility(port(8080)), Some(Team));
    node.hide("port-8080").await;
    node.restart().await;
    assert_eq!(node.listening(1, &all).await, [] as [u16; 0], "a caller has closed it");
    let reach = Reach { wanted: None, default: Team };
    let name = "site".parse().expect("a name");
    node.sandboxes.expose(&id(1), name, port(8080), reach).await.expect("opened");
    let record = node.record(1).await;
    let rule = record.access.listen.as_ref().expect("a rule");
    assert_eq!((rule.opened.len(), rule.hidden.len()), (1, 0), "{rule:?}");
}

#[tokio::test(start_paused = true)]
async fn only_running_sandboxes_with_the_rule_are_looked_at() {
    let node = node(Vec::new(), false).await;
    node.sandboxes.create(ruled(1, rules(Visibility::Team, &[])), LONG).await.expect("admitted");
    let mut own = ruled(2, rules(Visibility::Team, &[]));
    own.spec.expose_on_listen = Some(true);
    node.sandboxes.create(own, LONG).await.expect("admitted");
    assert_eq!(node.listening(1, &["0.0.0.0:8080"]).await, [] as [u16; 0], "no rule");
    node.sandboxes.pause(&id(2), false, LONG).await.expect("paused");
    assert_eq!(node.listening(2, &["0.0.0.0:8080"]).await, [] as [u16; 0], "paused");
    node.sandboxes.resume(&id(2), LONG).await.expect("resumed");
    assert_eq!(node.listening(2, &["0.0.0.0:8080"]).await, [8080]);
}

#[tokio::test(start_paused = true)]
async fn loop_of_the_agent_finds_what_begins_to_listen_within_seconds() {
    let node = node(Vec::new(), true).await;
    node.sandboxes.create(ruled(1, rules(Visibility::Team, &[])), LONG).await.expect("admitted");
    node.tasks.spawn(Arc::clone(&node.sandboxes).follow_listeners());
    let vmid = node.record(1).await.vmid;
    node.cluster.listen(vmid, &["0.0.0.0:8080".parse().expect("an address")]);
    tokio::time::timeout(Duration::from_secs(10), async {
        while node.record(1).await.visibility(port(8080)).is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("exposed");
}
