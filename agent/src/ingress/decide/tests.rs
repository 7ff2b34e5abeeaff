use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use proto::{
    host::Label,
    id::{SandboxId, SandboxRef, Vmid},
    visibility::Visibility,
};

use super::*;
use crate::{
    ingress::OpenPort,
    journal::AccessKey,
    sandbox::access::credential::{Credential, Purpose},
};

const ID: &str = "pvelxc-01jd0000000000000000000000";

fn domain() -> Domain {
    "sbx.test".parse().expect("a domain")
}

fn parse(host: &str) -> Option<Label> {
    domain().label_of(host)
}

fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("a vmid")
}

#[test]
fn host_names_by_vmid_and_by_id_are_parsed() {
    let by_vmid = Label::ById { port: port(8000), sandbox: SandboxRef::Vmid(vmid(100_001)) };
    for host in [
        "port-8000-vm-100001.sbx.test",
        "PORT-8000-VM-100001.SBX.TEST",
        "port-8000-vm-100001.sbx.test:443",
        "Port-8000-vm-100001.Sbx.Test:65535",
        "8000-vm-100001.sbx.test",
        "8000-VM-100001.sbx.test:443",
    ] {
        assert_eq!(parse(host).as_ref(), Some(&by_vmid), "{host}");
    }
    let id: SandboxId = ID.parse().expect("an id");
    let by_id = Label::ById { port: port(80), sandbox: SandboxRef::Id(id) };
    for host in [
        format!("port-80-{ID}.sbx.test"),
        format!("port-80-{ID}.sbx.test").to_uppercase(),
        format!("80-{ID}.sbx.test"),
    ] {
        assert_eq!(parse(&host).as_ref(), Some(&by_id), "{host}");
    }
}

#[test]
fn other_host_names_are_refused() {
    for host in [
        "",
        ".",
        ":",
        "sbx.test",
        ".sbx.test",
        "port-8000-vm-100001",
        "port-8000-vm-100001.",
        "port-8000-vm-100001sbx.test",
        "port-8000-vm-100001.sbx.test.",
        "port-8000-vm-100001.sbx.test.evil.com",
        "port-8000-vm-100001.sbx.test@evil.com",
        "port-8000-vm-100001.evil.com",
        "port-8000-vm-100001.sbx.tes",
        "port-8000-vm-100001.xsbx.test",
        "port-8000-vm-100001.a.sbx.test",
        "a.port-8000-vm-100001.sbx.test",
        "xport-8000-vm-100001.sbx.test",
        "port-8000-vm-100001x.sbx.test",
        "port-0-vm-100001.sbx.test",
        "port-08000-vm-100001.sbx.test",
        "port-65536-vm-100001.sbx.test",
        "port-70000-vm-100001.sbx.test",
        "port-+80-vm-100001.sbx.test",
        "port-8000-vm-0100001.sbx.test",
        "port-8000-vm-99.sbx.test",
        "port-8000-vm-0.sbx.test",
        "port-8000-vm-1000000000.sbx.test",
        "port-8000-vm-10000100001.sbx.test",
        "port-8000-vm-+100001.sbx.test",
        "port-8000-vm-100001.sbx.test:",
        "port-8000-vm-100001.sbx.test:0",
        "port-8000-vm-100001.sbx.test:99999999",
        "port-8000-vm-100001.sbx.test:80:80",
        "port-8000-vm-100001.sbx.test:http",
        "port-8000-vm-100001.sbx.test ",
        " port-8000-vm-100001.sbx.test",
        "port-8000-vm-100001\n.sbx.test",
        "port-8000-vm-100001\0.sbx.test",
        "port-8000-vm-１00001.sbx.test",
        "port-8000-100001.sbx.test",
        "8000-100001.sbx.test",
        "0-vm-100001.sbx.test",
        "08000-vm-100001.sbx.test",
        "70000-vm-100001.sbx.test",
        "vm-100001.sbx.test",
        "vm-1.evil.test",
        "8000.vm-100001.sbx.test",
        "port-port-8000-vm-100001.sbx.test",
        "-8000-vm-100001.sbx.test",
        "%38000-vm-100001.sbx.test",
        "8000-vm-100001%2esbx.test",
        "8000-vm-100001.sbx.test%00.evil.test",
        "8000-vm-100001。sbx.test",
        "xn--8000-vm-100001.sbx.test",
        "port-8000-pvelxc-.sbx.test",
        "port-8000-pvelxc-01jd000000000000000000000.sbx.test",
        "port-8000-pvelxc-81jd0000000000000000000000.sbx.test",
        "port-8000-pvelxc-01jd000000000000000000000w.sbx.test",
        "port-8000-pve.sbx.test",
        "port-8006-localhost.sbx.test",
        "[::1]:8480",
        "127.0.0.1:8480",
        "localhost",
    ] {
        assert_eq!(parse(host), None, "{host:?}");
    }
    assert_eq!(parse(&"a".repeat(100_000)), None);
}

#[test]
fn domains_are_names_in_lower_case() {
    for text in ["a.b", "sandbox.localhost", "x-1.example.com", "localhost"] {
        assert!(text.parse::<Domain>().is_ok(), "{text}");
    }
    for text in ["", ".", "a..b", ".a", "a.", "A.b", "a b", "a_b", "-a.b", "{a}", "a/b", "a.*"] {
        assert!(text.parse::<Domain>().is_err(), "{text:?}");
    }
}

fn target(state: State) -> Target {
    Target {
        id: ID.parse().expect("an id"),
        vmid: vmid(100_001),
        team: "red".parse().expect("a team"),
        name: "box--red".parse().ok(),
        state,
        ip: Some([10, 100, 1, 5].into()),
        ports: BTreeMap::from([(port(8000), OpenPort::PUBLIC)]),
        main: Some(port(8000)),
        key: None,
    }
}

fn rules() -> Rules {
    let parents = vec!["https://app.example.com".parse().expect("an origin")];
    Rules { domain: domain(), parents, cors: true }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&str, &str)| {
        (name.parse::<HeaderName>().expect("a name"), value.parse().expect("a value"))
    };
    pairs.iter().map(pair).collect()
}

fn ask(number: u32, via: Via, local: Option<Target>, owner: Owner) -> Verdict {
    let host = format!("port-{number}-vm-100001.sbx.test");
    let headers = headers(&[("host", &host)]);
    let rules = rules();
    decide(&Question::new(via, &headers, &rules, NOW), local.as_ref(), &owner)
}

/// Time of every question, seconds.
const NOW: u64 = 1_000_000;

fn key() -> AccessKey {
    AccessKey::new([7; 32])
}

/// Grant of a public port.
fn anybody() -> Grant {
    Grant { identity: None, remove: None, wakes: true }
}

/// A running sandbox with port 8000 open so.
fn guarded(visibility: Visibility) -> Target {
    let open = OpenPort { visibility, generation: 3 };
    Target {
        ports: BTreeMap::from([(port(8000), open), (port(8001), open)]),
        key: Some(key()),
        ..target(State::Running)
    }
}

fn credential(purpose: Purpose) -> Credential {
    let user = Some("ada".parse().expect("a label"));
    Credential { purpose, port: port(8000), generation: 3, expires_s: NOW + 60, user }
}

fn text(purpose: Purpose) -> String {
    credential(purpose).sign(&key(), &target(State::Running).id)
}

/// Asks for port 8000 with these headers, method and URI.
fn request(target: &Target, method: &str, uri: &str, more: &[(&str, &str)]) -> Verdict {
    request_by(&rules(), target, method, uri, more)
}

fn request_by(
    rules: &Rules,
    target: &Target,
    method: &str,
    uri: &str,
    more: &[(&str, &str)],
) -> Verdict {
    let all = [&[HOST, ("x-forwarded-method", method), ("x-forwarded-uri", uri)], more].concat();
    let headers = headers(&all);
    decide(&Question::new(Via::Edge, &headers, rules, NOW), Some(target), &Owner::Nobody)
}

#[track_caller]
fn granted(verdict: Verdict) -> Grant {
    let Verdict::Local { grant, .. } = verdict else { panic!("not granted: {verdict:?}") };
    grant
}

#[track_caller]
fn known(verdict: Verdict, visibility: Visibility) -> Grant {
    let grant = granted(verdict);
    let identity = grant.identity.as_ref().expect("known");
    assert_eq!(identity.visibility, visibility);
    assert_eq!(identity.user.as_ref().map(|user| user.as_str()), Some("ada"));
    grant
}

const NAVIGATES: (&str, &str) = ("sec-fetch-mode", "navigate");

#[test]
fn link_becomes_a_session_that_opens_its_port_alone() {
    let team = guarded(Visibility::Team);
    let uri = format!("/a?b=1&sbx_link={}&c=2", text(Purpose::Link));
    for method in ["GET", "HEAD"] {
        let verdict = request(&team, method, &uri, &[NAVIGATES]);
        let Verdict::Redirect(Redirect { location, cookie }) = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(location, "/a?b=1&c=2");
        let cookie = cookie.expect("a session");
        let (pair, rules) = cookie.split_once("; ").expect("rules");
        assert_eq!(
            rules, "Path=/; Secure; HttpOnly; SameSite=None; Partitioned; Max-Age=43200",
            "and no Domain"
        );
        assert!(pair.starts_with("__Host-sbx-8000=sbxs1_"), "{pair}");
        let others = format!("a=1; {pair}; b=2");
        known(request(&team, "GET", "/", &[("cookie", &others)]), Visibility::Team);
        // The cookie is not for another port, although it has another name there anyhow.
        let renamed = others.replace("sbx-8000", "sbx-8001");
        let headers = headers(&[
            ("host", "port-8001-vm-100001.sbx.test"),
            ("x-forwarded-method", "GET"),
            ("cookie", &renamed),
        ]);
        let rules = self::rules();
        let other = Question::new(Via::Edge, &headers, &rules, NOW);
        let verdict = decide(&other, Some(&team), &Owner::Nobody);
        assert!(matches!(verdict, Verdict::Unauthorized(_)), "{verdict:?}");
        // An old link does not hinder who has a session.
        let verdict = request(&team, "GET", "/?sbx_link=old", &[("cookie", &others)]);
        assert_eq!(verdict, Verdict::Redirect(Redirect { location: "/".into(), cookie: None }));
    }
    // A link does not open a port by itself.
    assert!(matches!(request(&team, "POST", &uri, &[]), Verdict::Unauthorized(_)));
    for header in TOKENS {
        let verdict = request(&team, "GET", "/", &[(header.as_str(), &text(Purpose::Token))]);
        assert!(matches!(verdict, Verdict::Unauthorized(_)), "{verdict:?}");
    }
}

#[test]
fn token_opens_its_port_by_header_query_and_session() {
    let open = guarded(Visibility::Token);
    let token = text(Purpose::Token);
    for header in TOKENS {
        let grant =
            known(request(&open, "POST", "/", &[(header.as_str(), &token)]), Visibility::Token);
        assert_eq!(grant.remove, None);
        let verdict = request(&open, "GET", "/", &[(header.as_str(), "sbxt1_x")]);
        assert!(matches!(verdict, Verdict::Unauthorized(_)), "{verdict:?}");
    }
    let uri = format!("/a?sbx_token={token}&b=1");
    // A program, and a WebSocket, get in at once; the sandbox does not see the token.
    for (method, more) in [
        ("GET", vec![]),
        ("POST", vec![]),
        ("GET", vec![("sec-websocket-key", "x"), ("origin", "https://elsewhere.example")]),
    ] {
        let grant = known(request(&open, method, &uri, &more), Visibility::Token);
        assert_eq!(grant.remove, Some(format!("sbx_token={token}&")));
    }
    // A browser gets a session that ends with the token.
    for more in [vec![NAVIGATES], vec![("accept", "text/html,*/*")]] {
        let verdict = request(&open, "GET", &uri, &more);
        let Verdict::Redirect(Redirect { location, cookie: Some(cookie) }) = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(location, "/a?b=1");
        assert!(cookie.ends_with("; Max-Age=60"), "{cookie}");
        let pair = cookie.split(';').next().expect("a pair");
        known(request(&open, "GET", "/", &[("cookie", pair)]), Visibility::Token);
    }
    let twice = format!("/?sbx_token={token}&sbx_token=x");
    assert_eq!(request(&open, "POST", &twice, &[]), Verdict::Ambiguous);
    // Authorization is the application's.
    let bearer = format!("Bearer {token}");
    let verdict = request(&open, "GET", "/", &[("authorization", &bearer)]);
    assert!(matches!(verdict, Verdict::Unauthorized(_)), "{verdict:?}");
}

#[test]
fn void_credentials_open_nothing() {
    let good = credential(Purpose::Token);
    let id = target(State::Running).id;
    let other = SandboxId::new(1, &[9; 10]);
    for (why, text) in [
        ("expired", Credential { expires_s: NOW, ..good.clone() }.sign(&key(), &id)),
        ("revoked", Credential { generation: 2, ..good.clone() }.sign(&key(), &id)),
        ("another port", Credential { port: port(8001), ..good.clone() }.sign(&key(), &id)),
        ("another sandbox", good.sign(&key(), &other)),
        ("another key", good.sign(&AccessKey::new([8; 32]), &id)),
        ("another purpose", text(Purpose::Link)),
        ("a session", text(Purpose::Session)),
        ("nothing", String::new()),
    ] {
        let open = guarded(Visibility::Token);
        for (uri, more) in [
            ("/".to_owned(), vec![("x-sbx-token", text.as_str())]),
            (format!("/?sbx_token={text}"), vec![]),
            (format!("/?sbx_token={text}"), vec![NAVIGATES]),
        ] {
            let verdict = request(&open, "GET", &uri, &more);
            assert!(matches!(verdict, Verdict::Unauthorized(_)), "{why}: {verdict:?}");
        }
    }
    // Without a key nothing was ever given away.
    let keyless = Target { key: None, ..guarded(Visibility::Token) };
    let verdict = request(&keyless, "GET", "/", &[("x-sbx-token", &text(Purpose::Token))]);
    assert!(matches!(verdict, Verdict::Unauthorized(_)), "{verdict:?}");
}

#[test]
fn private_port_is_for_nobody_and_public_one_for_everybody() {
    let private = guarded(Visibility::Private);
    let session = format!("__Host-sbx-8000={}", text(Purpose::Session));
    for more in [
        vec![],
        vec![("cookie", session.as_str())],
        vec![("origin", "https://a.b"), ("access-control-request-method", "PUT")],
    ] {
        let verdict = request(&private, "OPTIONS", "/", &more);
        assert!(matches!(verdict, Verdict::Forbidden(_)), "{verdict:?}");
    }
    let public = guarded(Visibility::Public);
    assert_eq!(granted(request(&public, "POST", "/?a=1", &[])), anybody());
    // A credential that is not needed any more does not reach the sandbox, either.
    let verdict = request(&public, "GET", "/?sbx_token=x&a=1", &[NAVIGATES]);
    assert_eq!(verdict, Verdict::Redirect(Redirect { location: "/?a=1".into(), cookie: None }));
    let grant = granted(request(&public, "POST", "/?sbx_token=x&a=1", &[]));
    assert_eq!(grant.remove.as_deref(), Some("sbx_token=x&"));
}

#[test]
fn nobody_unknown_wakes_a_sandbox() {
    let preflight =
        [("origin", "https://a.b"), ("access-control-request-method", "PUT")].as_slice();
    let token = text(Purpose::Token);
    for visibility in [Visibility::Team, Visibility::Token, Visibility::Private] {
        let paused = Target { state: State::Paused { wakes: true }, ..guarded(visibility) };
        let verdict = request(&paused, "GET", "/", &[]);
        let refused = matches!(verdict, Verdict::Unauthorized(_) | Verdict::Forbidden(_));
        assert!(refused, "{visibility}: {verdict:?}");
        assert_ne!(request(&paused, "OPTIONS", "/", preflight), Verdict::Wake);
        // The exchange of a credential does not, either; the next request does.
        let uri = format!("/?sbx_token={token}");
        assert_ne!(request(&paused, "GET", &uri, &[NAVIGATES]), Verdict::Wake);
    }
    let paused = Target { state: State::Paused { wakes: true }, ..guarded(Visibility::Token) };
    assert_eq!(request(&paused, "GET", "/", &[("x-sbx-token", &token)]), Verdict::Wake);
    // A preflight has no credentials: it is answered alike in every state, and nothing is asked.
    let paused = Target { state: State::Paused { wakes: true }, ..guarded(Visibility::Token) };
    for target in [paused, guarded(Visibility::Token), guarded(Visibility::Team)] {
        let verdict = request(&target, "OPTIONS", "/", preflight);
        assert_eq!(verdict, Verdict::Preflight { allowed: "*".into(), for_s: PREFLIGHT_S });
    }
    let bare = request(&guarded(Visibility::Token), "OPTIONS", "/", &[]);
    assert!(matches!(bare, Verdict::Unauthorized(_)), "{bare:?}");
}

/// A browser would else never send the request, which wakes the sandbox, waits for it, or reads why it cannot.
#[test]
fn preflight_of_a_public_port_is_allowed_while_its_server_cannot_answer() {
    let preflight =
        [("origin", "https://a.b"), ("access-control-request-method", "PUT")].as_slice();
    let nowhere = Target { ip: None, ..guarded(Visibility::Public) };
    let states = [true, false].map(|wakes| State::Paused { wakes });
    let states = states.into_iter().chain([State::Booting, State::Stopped]);
    let targets = states.map(|state| Target { state, ..guarded(Visibility::Public) });
    for target in targets.chain([nowhere]) {
        let verdict = request(&target, "OPTIONS", "/", preflight);
        // It wakes nothing, and is for this request alone: the server may say otherwise once it runs.
        assert_eq!(verdict, Verdict::Preflight { allowed: "*".into(), for_s: 0 }, "{target:?}");
        // The answer to what is no preflight is as before, and so is that of an operator who allows none.
        let bare = request(&target, "OPTIONS", "/", &[]);
        assert!(matches!(bare, Verdict::Wake | Verdict::Unavailable(_)), "{bare:?}");
        let none = Rules { cors: false, ..rules() };
        assert_eq!(request_by(&none, &target, "OPTIONS", "/", preflight), bare);
    }
    let paused = Target { state: State::Paused { wakes: true }, ..guarded(Visibility::Public) };
    assert_eq!(request(&paused, "PUT", "/", &[("origin", "https://a.b")]), Verdict::Wake);
    // A server that runs is asked itself, and a closed port stays closed.
    granted(request(&guarded(Visibility::Public), "OPTIONS", "/", preflight));
    let closed = Target { ports: BTreeMap::new(), ..paused };
    assert_eq!(request(&closed, "OPTIONS", "/", preflight), Verdict::NotExposed(port(8000)));
}

#[test]
fn session_does_not_count_for_another_page() {
    let team = guarded(Visibility::Team);
    let session = format!("__Host-sbx-8000={}", text(Purpose::Session));
    let with = |more: &[(&'static str, &'static str)]| {
        let more = [&[("cookie", session.as_str())], more].concat();
        request(&team, "GET", "/", &more)
    };
    known(with(&[("sec-fetch-site", "cross-site"), NAVIGATES]), Visibility::Team);
    known(with(&[("sec-fetch-site", "same-origin")]), Visibility::Team);
    let verdict = with(&[("sec-fetch-site", "same-site"), ("sec-fetch-mode", "cors")]);
    assert!(matches!(verdict, Verdict::Forbidden(_)), "{verdict:?}");
}

/// Wherever the sandbox is: another node would get the body of a CONNECT as a request.
#[test]
fn connect_and_targets_that_are_no_path_go_to_no_sandbox() {
    let peer: SocketAddr = "10.99.0.2:8481".parse().expect("an address");
    let ask = |method: &str, uri: &str, via, is_here: bool| {
        let all = [HOST, ("x-forwarded-method", method), ("x-forwarded-uri", uri)];
        let (headers, rules) = (headers(&all), rules());
        let local = is_here.then(|| target(State::Running));
        let owner = if is_here { Owner::Nobody } else { Owner::Peer(peer) };
        let verdict = decide(&Question::new(via, &headers, &rules, NOW), local.as_ref(), &owner);
        matches!(verdict, Verdict::Malformed(_))
    };
    for (via, is_here) in [(Via::Edge, true), (Via::Edge, false), (Via::Peer, true)] {
        for (method, uri) in [
            ("CONNECT", "/"),
            ("GET", ""),
            ("GET", "x"),
            ("GET", "**"),
            ("GET", "@evil.example/"),
            ("GET", "http://evil.example/v1/route"),
        ] {
            assert!(ask(method, uri, via, is_here), "{method} {uri}");
        }
        for (method, uri) in [("GET", "/"), ("OPTIONS", "*"), ("GET", "//x"), ("connect", "/")] {
            assert!(!ask(method, uri, via, is_here), "{method} {uri}");
        }
    }
}

/// Servers redirect to what they are told.
#[test]
fn server_is_told_its_port_unless_it_is_the_one_of_http() {
    for (number, expected) in [(80, "localhost"), (8000, "localhost:8000")] {
        let ports = BTreeMap::from([(port(number), OpenPort::PUBLIC)]);
        let open = Target { ports, ..target(State::Running) };
        let verdict = ask(number, Via::Edge, Some(open), Owner::Nobody);
        let told = matches!(&verdict, Verdict::Local { host, .. } if host == expected);
        assert!(told, "{verdict:?}");
    }
}

#[test]
fn verdicts_match_the_table() {
    use Verdict::{Gone, Local, Misdirected, NotExposed, NotFound, Peer};
    let peer: SocketAddr = "10.99.0.2:8481".parse().expect("an address");
    let node: NodeName = "node2".parse().expect("a node");
    let local = Local {
        upstream: "10.100.1.5:8000".parse().expect("an address"),
        host: "localhost:8000".into(),
        grant: anybody(),
    };
    let booting = Verdict::Unavailable(Unavailable::Booting);
    let stopped = Verdict::Unavailable(Unavailable::Stopped);
    let down = Verdict::Unavailable(Unavailable::NodeDown(node.clone()));

    for via in [Via::Edge, Via::Peer] {
        // A sandbox that lives here is answered here, whatever the cluster says.
        for owner in [Owner::Nobody, Owner::Here, Owner::Peer(peer), Owner::Down(node.clone())] {
            let ask = |number, state| ask(number, via, Some(target(state)), owner.clone());
            assert_eq!(ask(8000, State::Running), local);
            assert_eq!(ask(8000, State::Booting), booting);
            assert_eq!(ask(8000, State::Stopped), stopped);
            for state in [State::Running, State::Booting, State::Stopped] {
                assert_eq!(ask(22, state), NotExposed(port(22)));
            }
        }
        assert_eq!(ask(8000, via, Some(target(State::Gone)), Owner::Nobody), Gone);
        assert_eq!(ask(22, via, Some(target(State::Gone)), Owner::Here), Gone);
        assert_eq!(ask(8000, via, None, Owner::Nobody), NotFound(NOBODY));
        assert_eq!(ask(8000, via, None, Owner::Here), NotFound(NOBODY));
        for host in [vec![("host", "x.sbx.test")], vec![], vec![HOST, HOST]] {
            // No host of ours, none at all, or two.
            let headers = headers(&host);
            let rules = self::rules();
            let question = Question::new(via, &headers, &rules, NOW);
            assert_eq!(decide(&question, None, &Owner::Peer(peer)), NotFound(NO_NAME));
        }
    }
    assert_eq!(ask(8000, Via::Edge, None, Owner::Peer(peer)), Peer { upstream: peer });
    assert_eq!(
        ask(8000, Via::Edge, Some(target(State::Gone)), Owner::Peer(peer)),
        Peer { upstream: peer }
    );
    assert_eq!(ask(8000, Via::Edge, None, Owner::Down(node.clone())), down);
    for via in [Via::Edge, Via::Peer] {
        let blind = Verdict::Unavailable(Unavailable::Blind);
        assert_eq!(ask(8000, via, None, Owner::Unknown), blind);
        assert_eq!(ask(8000, via, Some(target(State::Gone)), Owner::Unknown), Gone);
    }
    assert_eq!(ask(8000, Via::Peer, None, Owner::Peer(peer)), Misdirected);
    assert_eq!(ask(8000, Via::Peer, None, Owner::Down(node)), Misdirected);
    let mut nowhere = target(State::Running);
    nowhere.ip = None;
    assert_eq!(ask(8000, Via::Edge, Some(nowhere), Owner::Nobody), booting);
}

const HOST: (&str, &str) = ("host", "port-8000-vm-100001.sbx.test");

fn owner() -> impl Strategy<Value = Owner> {
    prop_oneof![
        Just(Owner::Nobody),
        Just(Owner::Here),
        Just(Owner::Unknown),
        Just(Owner::Peer("10.99.0.2:8481".parse().expect("an address"))),
        Just(Owner::Down("node2".parse().expect("a node"))),
    ]
}

/// Headers that the verdict looks at.
const KNOWN: &[&str] = &[
    "host",
    "x-forwarded-method",
    "x-forwarded-uri",
    "x-sbx-token",
    "e2b-traffic-access-token",
    "x-daytona-preview-token",
    "cookie",
    "origin",
    "accept",
    "access-control-request-method",
    "sec-fetch-site",
    "sec-fetch-mode",
    "sec-websocket-key",
];

/// Any value that a header can have, and more often those that mean something.
fn header_value() -> impl Strategy<Value = HeaderValue> {
    let words = prop_oneof![
        Just("GET".to_owned()),
        Just("OPTIONS".to_owned()),
        Just("/?sbx_token=x&sbx_link=y".to_owned()),
        Just(format!("__Host-sbx-8000={}", text(Purpose::Link))),
        Just(text(Purpose::Session)),
        Just("navigate".to_owned()),
        Just("https://app.example.com".to_owned()),
        Just("text/html".to_owned()),
    ];
    let bytes = proptest::collection::vec(any::<u8>(), 0..40);
    let path = bytes.clone().prop_map(|bytes| [b"/".as_slice(), &bytes].concat());
    let bytes = prop_oneof![bytes, path];
    prop_oneof![
        words.prop_map(|word| word.parse().expect("a value")),
        bytes.prop_filter_map("no header has it", |bytes| HeaderValue::from_bytes(&bytes).ok()),
    ]
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Running), Just(State::Booting), Just(State::Stopped), Just(State::Gone)]
}

proptest! {
    #[test]
    fn host_name_round_trips(
        number in 1u32..=65_535, guest in 100u32..=999_999_999, ms in 0u64..1 << 48, random: [u8; 10],
    ) {
        let by_vmid = Label::ById { port: port(number), sandbox: SandboxRef::Vmid(vmid(guest)) };
        prop_assert_eq!(parse(&format!("port-{number}-vm-{guest}.sbx.test")), Some(by_vmid.clone()));
        let id = SandboxId::new(ms, &random);
        let by_id = Label::ById { port: port(number), sandbox: SandboxRef::Id(id) };
        prop_assert_eq!(parse(&format!("port-{number}-{id}.sbx.test")), Some(by_id.clone()));
        prop_assert_eq!(parse(&format!("{number}-{id}.sbx.test")), Some(by_id));
        prop_assert_eq!(parse(&format!("{number}-vm-{guest}.sbx.test")), Some(by_vmid));
    }

    /// Every accepted host has exactly one spelling, except for case and a port at its end.
    #[test]
    fn accepted_host_has_exactly_one_spelling(host in "(?i)(port-)?[0-9+ ]{0,6}-?(vm-|pvelxc-)?[0-9a-z]{0,27}\\.?(sbx\\.test|\\PC{0,9})(:[0-9]{0,6})?") {
        if let Some(Label::ById { port, sandbox }) = parse(&host) {
            let sandbox = match sandbox {
                SandboxRef::Id(id) => id.to_string(),
                SandboxRef::Vmid(vmid) => format!("vm-{vmid}"),
            };
            let canonical = format!("{port}-{sandbox}.sbx.test");
            let lower = host.to_ascii_lowercase();
            let rest = lower.strip_prefix("port-").unwrap_or(&lower).strip_prefix(&canonical);
            prop_assert!(rest.is_some_and(|r| r.is_empty() || r.starts_with(':')), "{}", host);
        }
    }

    #[test]
    fn any_text_is_refused_without_a_panic(host in any::<String>()) {
        prop_assert_eq!(parse(&host), None);
    }

    /// Whatever bytes a client sends: there is a verdict, nobody gets in without a credential, and nothing wakes.
    #[test]
    fn any_bytes_get_a_verdict_and_open_nothing(
        values in proptest::collection::vec((0usize..KNOWN.len(), header_value()), 0..12),
        paused: bool,
        visibility in prop_oneof![
            Just(Visibility::Team), Just(Visibility::Token), Just(Visibility::Private),
        ],
    ) {
        let mut headers = headers(&[HOST]);
        for (name, value) in values {
            headers.append(KNOWN[name], value);
        }
        let state = if paused { State::Paused { wakes: true } } else { State::Running };
        let target = Target { state, ..guarded(visibility) };
        for via in [Via::Edge, Via::Peer] {
            let rules = self::rules();
            let question = Question::new(via, &headers, &rules, NOW);
            match decide(&question, Some(&target), &Owner::Nobody) {
                Verdict::Unauthorized(_) | Verdict::Forbidden(_) | Verdict::Ambiguous => {}
                Verdict::NotFound(_) => prop_assert!(headers.get_all("host").iter().count() > 1),
                Verdict::Malformed(_) => {
                    let target = headers.get("x-forwarded-uri").map(HeaderValue::as_bytes);
                    prop_assert!(target.is_some_and(|target| !target.starts_with(b"/")));
                }
                Verdict::Preflight { .. } => {
                    prop_assert!(headers.contains_key("access-control-request-method"));
                    prop_assert!(visibility != Visibility::Private);
                }
                other @ (Verdict::Local { .. }
                | Verdict::Redirect(_)
                | Verdict::Wake
                | Verdict::Peer { .. }
                | Verdict::NotExposed(_)
                | Verdict::Gone
                | Verdict::Unavailable(_)
                | Verdict::Misdirected) => prop_assert!(false, "{:?}", other),
            }
        }
    }

    /// Named properties of the verdict, for all of its inputs.
    #[test]
    fn verdict_obeys_the_rules_for_all_inputs(
        number in prop_oneof![Just(8000u32), 1u32..=65_535],
        edge: bool, here in proptest::option::of(state()), owner in owner(),
    ) {
        let via = if edge { Via::Edge } else { Via::Peer };
        let verdict = ask(number, via, here.map(target), owner.clone());
        // Only an exposed port of a running sandbox of this node is ever dialled.
        if let Verdict::Local { upstream, .. } = &verdict {
            prop_assert_eq!(upstream.to_string(), "10.100.1.5:8000");
            prop_assert_eq!((number, here), (8000, Some(State::Running)));
        }
        // One hop at most.
        if matches!(verdict, Verdict::Peer { .. }) {
            prop_assert_eq!(via, Via::Edge);
        }
        // Only a peer is told that it asked the wrong node.
        if verdict == Verdict::Misdirected {
            prop_assert_eq!(via, Via::Peer);
        }
        // The owner is looked up whenever it makes a difference.
        if !needs_owner(here.map(target).as_ref()) {
            prop_assert_eq!(&verdict, &ask(number, via, here.map(target), Owner::Nobody));
        }
    }
}
