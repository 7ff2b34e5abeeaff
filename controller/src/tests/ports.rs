//! Who reaches an open port: by default, by the caller's word, and only on nodes that know of it.

use proto::{Reason, sandbox::v1::*};

use super::*;
use crate::node::calls::Call;

fn expose(id: &str, port: u32, visibility: Visibility) -> ExposeHttpServiceRequest {
    ExposeHttpServiceRequest {
        id: id.into(),
        name: String::new(),
        port,
        visibility: visibility.into(),
    }
}

fn reason(status: &Status) -> Option<Reason> {
    daemon::status::reason(status)
}

fn with_port(request_id: &str, port: u32, visibility: Visibility) -> CreateSandboxRequest {
    let service = HttpService { port, visibility: visibility.into(), ..HttpService::default() };
    CreateSandboxRequest { services: vec![service], ..request(request_id) }
}

impl Lab {
    async fn exposed(&self, id: &str, port: u32, asked: Visibility) -> Result<Visibility, Status> {
        let answer = self.api().expose_http_service(expose(id, port, asked)).await?;
        Ok(answer.into_inner().service.expect("a service").visibility())
    }
}

#[tokio::test(start_paused = true)]
async fn port_gets_the_callers_word_else_what_it_has_else_the_default() {
    use Visibility::{Private, Public, Team, Token, Unspecified};
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    assert_eq!(lab.exposed(&id, 80, Unspecified).await.expect("exposed"), Team);
    assert_eq!(lab.exposed(&id, 80, Private).await.expect("exposed"), Private);
    assert_eq!(lab.exposed(&id, 80, Unspecified).await.expect("exposed"), Private);
    assert_eq!(lab.get(&id).await.expect("known").services[0].visibility(), Private);
    let bad = ExposeHttpServiceRequest { visibility: 9, ..expose(&id, 80, Public) };
    let bad = lab.api().expose_http_service(bad).await.expect_err("no visibility");
    assert_eq!(reason(&bad), Some(Reason::FieldInvalid));

    lab.options.exposure.default = proto::visibility::Visibility::Public;
    lab.options.exposure.denied = ["22".parse().expect("a port")].into();
    lab.start().await;
    assert_eq!(lab.exposed(&id, 81, Unspecified).await.expect("exposed"), Public);
    // The exec daemon's port is public by an explicit word alone.
    assert_eq!(lab.exposed(&id, 39_375, Unspecified).await.expect("exposed"), Team);
    assert_eq!(lab.exposed(&id, 39_383, Public).await.expect("exposed"), Public);
    let denied = lab.exposed(&id, 22, Public).await.expect_err("denied");
    assert_eq!(reason(&denied), Some(Reason::PortDenied));
    let denied = create(&mut lab.api(), with_port("r2", 22, Token)).await.expect_err("denied");
    assert_eq!(reason(&denied), Some(Reason::PortDenied));
    let made = create(&mut lab.api(), with_port("r3", 39_377, Unspecified)).await.expect("made");
    assert_eq!(made.services[0].visibility(), Team);
    // A repetition is one by what the caller sent.
    let again = create(&mut lab.api(), with_port("r3", 39_377, Unspecified)).await;
    assert_eq!(again.expect("repeated").id, made.id);
}

fn snapshot_ports() -> SnapshotPorts {
    let given =
        [("vscode", 39_378, Visibility::Unspecified), ("xterm", 39_383, Visibility::Private)];
    let denied = [("ssh", 22, Visibility::Unspecified)];
    let service = |(name, port, who): (&str, u32, Visibility)| HttpService {
        name: name.into(),
        port,
        visibility: who.into(),
        ..HttpService::default()
    };
    let services = given.into_iter().chain(denied).map(service).collect();
    SnapshotPorts { services, expose_on_listen: true }
}

#[tokio::test(start_paused = true)]
async fn creation_exposes_what_its_snapshot_says_unless_the_caller_declines() {
    use Visibility::{Private, Token};
    let mut lab = Lab::new().await;
    lab.options.exposure.default = proto::visibility::Visibility::Token;
    lab.options.exposure.denied = ["22".parse().expect("a port")].into();
    lab.start().await;
    for agent in &lab.agents {
        agent.load(|load| load.snapshot_ports = vec![snapshot_ports()]);
    }
    let made = create(&mut lab.api(), request("r1")).await.expect("made");
    let open: Vec<_> = made.services.iter().map(|of| (of.port, of.visibility())).collect();
    assert_eq!(open, [(39_378, Token), (39_383, Private)]);
    assert!(made.services.iter().all(|service| !service.url.is_empty()), "{made:?}");
    let agent = lab.agents.iter().find(|agent| !agent.received().is_empty()).expect("one got it");
    let rules = agent.port_rules().expect("they came with it");
    assert_eq!((rules.default_visibility(), rules.denied_ports), (Token, vec![22]));

    let bare = CreateSandboxRequest { no_default_services: true, ..request("r2") };
    let made = create(&mut lab.api(), bare.clone()).await.expect("made");
    assert!(made.services.is_empty(), "{made:?}");
    let named = |request_id: &str, no_default_services| {
        let create = CreateSandboxRequest {
            name: "bare".into(),
            no_default_services,
            ..request(request_id)
        };
        GetOrCreateSandboxRequest { create: Some(create) }
    };
    lab.api().get_or_create_sandbox(named("r3", true)).await.expect("made");
    lab.api().get_or_create_sandbox(named("r4", true)).await.expect("the same");
    let other = lab.api().get_or_create_sandbox(named("r5", false)).await.expect_err("another");
    assert!(other.message().contains("no_default_services"), "{}", other.message());
    // A port that is exposed by hand gets the same default.
    assert_eq!(lab.exposed(&made.id, 80, Visibility::Unspecified).await.expect("exposed"), Token);
}

#[tokio::test(start_paused = true)]
async fn list_of_snapshots_has_their_services_and_the_nodes_that_differ() {
    let mut lab = Lab::new().await;
    lab.options.exposure.denied = ["22".parse().expect("a port")].into();
    lab.start().await;
    for agent in &lab.agents {
        agent.load(|load| load.snapshot_ports = vec![snapshot_ports()]);
    }
    lab.agents[2].load(|load| load.snapshot_ports[0].services.truncate(1));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let list = lab.api().list_snapshots(ListSnapshotsRequest {}).await.expect("listed");
    let [snapshot] = list.into_inner().snapshots.try_into().expect("one");
    let services: Vec<_> =
        snapshot.services.iter().map(|of| (of.name.as_str(), of.visibility())).collect();
    assert_eq!(services, [("vscode", Visibility::Team), ("xterm", Visibility::Private)]);
    assert!(snapshot.expose_on_listen);
    assert_eq!((snapshot.nodes.len(), snapshot.differing_nodes), (3, vec!["n3".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn creation_that_is_wanted_again_compares_who_reaches_its_ports() {
    use Visibility::{Private, Team, Unspecified};
    let lab = Lab::new().await;
    let named = |request_id: &str, who| {
        let create = CreateSandboxRequest { name: "web".into(), ..with_port(request_id, 80, who) };
        GetOrCreateSandboxRequest { create: Some(create) }
    };
    lab.api().get_or_create_sandbox(named("r1", Unspecified)).await.expect("made");
    for who in [Unspecified, Team] {
        lab.api().get_or_create_sandbox(named("r2", who)).await.expect("the same");
    }
    let other = lab.api().get_or_create_sandbox(named("r3", Private)).await.expect_err("another");
    assert_eq!(reason(&other), Some(Reason::NameTaken));
    assert!(other.message().contains("services"), "{}", other.message());
}

#[tokio::test(start_paused = true)]
async fn node_that_knows_no_visibility_gets_public_ports_alone() {
    use Visibility::{Public, Team, Unspecified};
    let mut lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    for agent in &lab.agents {
        agent.faults(|faults| faults.guards_nothing = true);
    }
    lab.start().await;
    for asked in [Unspecified, Team] {
        let error = lab.exposed(&id, 80, asked).await.expect_err("it would be public");
        assert_eq!(reason(&error), Some(Reason::VisibilityUnsupported));
    }
    assert_eq!(lab.exposed(&id, 80, Public).await.expect("exposed"), Public);
    let link = CreateAccessLinkRequest { id, service: "80".into(), ..Default::default() };
    let error = lab.api().create_access_link(link).await.expect_err("it knows none");
    assert_eq!(reason(&error), Some(Reason::VisibilityUnsupported));
    // Of three nodes one has learnt it: that one gets the sandbox.
    lab.agents[1].faults(|faults| faults.guards_nothing = false);
    lab.start().await;
    for number in 0..4 {
        let request = with_port(&format!("c{number}"), 80, Team);
        let made = create(&mut lab.api(), request).await.expect("made");
        assert_eq!(made.node, lab.agents[1].name().to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn exposure_whose_answer_is_lost_is_the_same_when_it_is_repeated() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    lab.holder(&id).faults(|faults| faults.mute = true);
    let lost = lab.exposed(&id, 80, Visibility::Token).await.expect_err("no answer");
    assert_eq!(reason(&lost), Some(Reason::OutcomeUnknown));
    lab.holder(&id).faults(|faults| faults.mute = false);
    for _ in 0..2 {
        let again = lab.exposed(&id, 80, Visibility::Token).await;
        assert_eq!(again.expect("repeated"), Visibility::Token);
    }
    let services = lab.get(&id).await.expect("known").services;
    assert_eq!(services.len(), 1, "{services:?}");
    events::settled(&lab).await;
    let events = events::of(&lab, &id, 0).await;
    let exposed = events.iter().filter(|event| event.kind() == EventKind::Exposed);
    assert_eq!(exposed.count(), 1, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn port_that_an_older_agent_opened_without_an_answer_is_closed_again() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    lab.exposed(&id, 81, Visibility::Public).await.expect("exposed");
    let agent = lab.holder(&id);
    agent.faults(|faults| (faults.mute, faults.forgets_visibility) = (true, true));
    for port in [80, 81] {
        let lost = lab.exposed(&id, port, Visibility::Team).await.expect_err("no answer");
        assert_eq!(reason(&lost), Some(Reason::OutcomeUnknown), "{port}");
    }
    agent.faults(|faults| faults.mute = false);
    let ports =
        |view: &Sandbox| view.services.iter().map(|service| service.port).collect::<Vec<_>>();
    let view = lab.until_seen(&id, |view| !ports(view).contains(&80)).await;
    assert_eq!(ports(&view), [81], "what was open before stays");
    events::settled(&lab).await;
    let events = events::of(&lab, &id, 0).await;
    let hidden = events.iter().find(|event| event.kind() == EventKind::Hidden).expect("an event");
    assert_eq!(hidden.actor, "controller");
}

#[tokio::test(start_paused = true)]
async fn port_that_an_older_agent_opened_is_closed_again_though_its_caller_hung_up() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let agent = lab.holder(&id);
    agent.faults(|faults| (faults.mute, faults.forgets_visibility) = (true, true));
    let exposed = lab.exposed(&id, 80, Visibility::Team);
    let hung_up = tokio::time::timeout(Duration::from_secs(1), exposed).await;
    hung_up.expect_err("no answer");
    lab.until_seen(&id, |view| !view.services.is_empty()).await;
    agent.faults(|faults| faults.mute = false);
    lab.until_seen(&id, |view| view.services.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn port_that_is_exposed_again_as_public_stays_open() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    let agent = lab.holder(&id);
    agent.faults(|faults| faults.unanswered = Some(Call::ExposeHttpService));
    let lost = lab.exposed(&id, 80, Visibility::Team).await.expect_err("no answer");
    assert_eq!(reason(&lost), Some(Reason::OutcomeUnknown));
    agent.faults(|faults| (faults.unanswered, faults.forgets_visibility) = (None, true));
    lab.exposed(&id, 80, Visibility::Public).await.expect("exposed");
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(lab.get(&id).await.expect("known").services.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn link_is_the_url_of_the_port_with_the_nodes_credential() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let id = sandbox.id.clone();
    for (port, who, kind, parameter) in [
        (80, Visibility::Team, AccessKind::Link, "sbx_link"),
        (81, Visibility::Token, AccessKind::Token, "sbx_token"),
    ] {
        lab.exposed(&id, port, who).await.expect("exposed");
        let request = CreateAccessLinkRequest {
            id: id.clone(),
            service: port.to_string(),
            ..CreateAccessLinkRequest::default()
        };
        let made = lab.api().create_access_link(request).await.expect("made").into_inner();
        assert_eq!((made.kind(), made.port), (kind, port));
        let url = format!("http://port-{port}-vm-{}.test:8480", sandbox.vmid);
        assert_eq!(made.url, format!("{url}/?{parameter}={}", made.credential));
        assert!(!format!("{made:?}").contains(&made.credential), "it is a secret");
    }
    let revoke = |service: &str| RevokeAccessRequest { id: id.clone(), service: service.into() };
    let revoked = lab.api().revoke_access(revoke("port-80")).await.expect("revoked").into_inner();
    assert_eq!((revoked.port, revoked.sandbox.map(|it| it.id)), (80, Some(id.clone())));
    let error = lab.api().revoke_access(revoke("none")).await.expect_err("there is none");
    assert_eq!(reason(&error), Some(Reason::ServiceNotFound));
}

#[tokio::test(start_paused = true)]
async fn fsck_finds_ports_of_a_node_that_callers_are_not_shown() {
    let lab = Lab::new().await;
    let id = lab.create("r1").await.expect("made").id;
    lab.exposed(&id, 80, Visibility::Team).await.expect("exposed");
    let found = async || {
        let findings = lab.domain().fsck().await.findings.into_iter();
        let found = findings.filter(|finding| finding.invariant() == Invariant::I12);
        found.map(|finding| (finding.subject, finding.detail)).collect::<Vec<_>>()
    };
    assert_eq!(found().await, []);
    let (agent, number) = (lab.holder(&id), id.parse().expect("an id"));
    agent.change_unseen(&number, |sandbox| {
        sandbox.services[0].visibility = Visibility::Public.into();
    });
    let wrong = found().await;
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].0 == id && wrong[0].1.contains("80 public"), "{wrong:?}");
    // A change that is told while the ports are compared is none.
    let there = agent.sandboxes().into_iter().find(|sandbox| sandbox.id == id);
    agent.put(there.expect("a sandbox"));
    assert_eq!(found().await, []);
}
