use std::collections::BTreeSet;

use agent::ingress::{Owner, State};
use proto::visibility::Visibility;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    http::{Client, Request, get, once},
    node::{DOMAIN, Node, at, host, host_by_id, id, ip, need_caddy},
    peers::{Pki, two},
    sandbox::Sandbox,
};

#[tokio::test(flavor = "multi_thread")]
async fn only_valid_host_names_reach_a_sandbox() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let other = Sandbox::start(at(10, 22), "closed").await;
    node.put(100_001, sandbox.address);

    for host in [
        host(8000, 100_001),
        host_by_id(8000, 100_001),
        "8000-vm-100001.sbx.test".to_owned(),
        format!("8000-{}.sbx.test", id(100_001)),
        host(8000, 100_001).to_uppercase(),
        host_by_id(8000, 100_001).to_uppercase(),
        format!("{}:443", host(8000, 100_001)),
    ] {
        let answer = get(node.public, &host, "/").await;
        assert_eq!(
            (answer.status, answer.text().starts_with("alpha got GET / ")),
            (200, true),
            "{host}"
        );
    }
    let served = sandbox.got().len();

    for (status, host) in [
        (404, "".to_owned()),
        (404, "localhost".to_owned()),
        (404, "sbx.test".to_owned()),
        (404, host(0, 100_001)),
        (404, "port-08000-vm-100001.sbx.test".to_owned()),
        (404, "0-vm-100001.sbx.test".to_owned()),
        (404, "08000-vm-100001.sbx.test".to_owned()),
        (404, "70000-vm-100001.sbx.test".to_owned()),
        (404, "vm-100001.sbx.test".to_owned()),
        (404, "vm-1.evil.test".to_owned()),
        (404, "port-port-8000-vm-100001.sbx.test".to_owned()),
        (404, "8000-pvelxc-zzzzzzzzzzzzzzzzzzzzzzzzzz.sbx.test".to_owned()),
        (403, "22-vm-100001.sbx.test".to_owned()),
        (404, "port-70000-vm-100001.sbx.test".to_owned()),
        (404, "port-8000-vm-0100001.sbx.test".to_owned()),
        (404, "port-8000-vm-10000100001.sbx.test".to_owned()),
        (404, "port-8000-vm-100001.sbx.test.".to_owned()),
        (404, "port-8000-vm-100001.sbx.test.evil.com".to_owned()),
        (404, "port-8000-vm-100001.evil.com".to_owned()),
        (404, "port-8000-vm-100001.sbx-test".to_owned()),
        (404, "port-8000-vm-100001.sbxxtest".to_owned()),
        (404, "xport-8000-vm-100001.sbx.test".to_owned()),
        (404, "port-8000-vm-100001x.sbx.test".to_owned()),
        (404, "a.port-8000-vm-100001.sbx.test".to_owned()),
        (404, "port-8000-vm-100001.a.sbx.test".to_owned()),
        (404, "port-8000-vm-100001.sbx.test:99999999".to_owned()),
        (404, "port-8000-vm-100002.sbx.test".to_owned()),
        (404, "port-8000-pvelxc-zzzzzzzzzzzzzzzzzzzzzzzzzz.sbx.test".to_owned()),
        (404, host_by_id(8000, 100_002)),
        (403, host(22, 100_001)),
        (403, host_by_id(22, 100_001)),
        (403, host(8006, 100_001)),
        (400, "user@port-8000-vm-100001.sbx.test".to_owned()),
        (400, "port-8000-vm-100001.sbx.tëst".to_owned()),
    ] {
        let answer = get(node.public, &host, "/").await;
        // A later Caddy answers 400 to an empty Host.
        let empty = host.is_empty() && answer.status == 400;
        assert!(answer.status == status || empty, "{host:?}: {} {}", answer.status, answer.text());
        assert!(!answer.head.any("x-sbx-"), "{host:?}: {:?}", answer.head);
    }

    // Two hosts, and a host in the request line.
    let mut client = Client::connect(node.public).await.expect("connected");
    let two = format!("GET / HTTP/1.1\r\nHost: {}\r\nHost: sbx.test\r\n\r\n", host(8000, 100_001));
    client.send(two).await.expect("sent");
    assert_eq!(client.response(false).await.expect("an answer").status, 400);
    let absolute = format!("http://{}/", host(22, 100_001));
    let answer = get(node.public, &host(8000, 100_001), &absolute).await;
    assert_eq!(answer.status, 403, "the host of the first line counts");
    for (to, status) in [("example.com:443".to_owned(), 404), (host(8000, 100_001), 400)] {
        let connect = Request { method: "CONNECT", ..Request::get(&to, &to) };
        assert_eq!(once(node.public, &connect).await.expect("an answer").status, status, "{to}");
    }
    // Targets without a path: Caddy asks the agent for them in place of the path of a question.
    for (target, status) in [
        ("x:y", 400),
        ("x:@evil.test/", 400),
        ("x:http://u/v1/route?via=peer", 400),
        // The agent answers with its metrics, which are no route.
        ("x:http://u/v1/metrics", 502),
    ] {
        let answer = get(node.public, &host(8000, 100_001), target).await;
        assert_eq!(answer.status, status, "{target}: {}", answer.text());
        assert!(!answer.text().contains("# HELP"), "{target}: {}", answer.text());
    }

    assert_eq!(sandbox.got().len(), served);
    assert!(other.got().is_empty(), "a port that is not exposed was dialled");
    assert_eq!(sandbox.questions(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_request_is_answered_with_its_reason() {
    need_caddy!();
    let node = Node::start(1).await;
    node.table.put(100_001, ip(10), State::Running, &[8000, 8001]);
    node.table.put(100_008, ip(10), State::Running, &[8000]);
    node.table.listen_on_loopback(100_008, 8000);
    node.table.put(100_002, ip(10), State::Stopped, &[8000]);
    node.table.put(100_003, ip(10), State::Booting, &[8000]);
    node.table.put(100_004, ip(10), State::Gone, &[8000]);
    node.table.elsewhere(100_005, Owner::Down("node9".parse().expect("a node")));
    node.table.elsewhere(100_006, Owner::Here);
    for (number, status, words) in [
        (100_001, 502, "nothing listens on port 8000"),
        (100_008, 502, "let it listen on 0.0.0.0:8000"),
        (100_002, 503, "is stopped"),
        (100_003, 503, "is booting"),
        (100_004, 410, "has been deleted"),
        (100_005, 503, "the node of this sandbox is down"),
        (100_006, 404, "no such sandbox"),
        (100_007, 404, "no such sandbox"),
    ] {
        let answer = get(node.public, &host(8000, number), "/").await;
        assert_eq!(answer.status, status, "{number}: {}", answer.text());
        assert!(answer.text().contains(words), "{number}: {}", answer.text());
        assert_eq!(answer.head.get("cache-control"), Some("no-store"));
        assert_eq!(answer.head.get("access-control-allow-origin"), Some("*"));
        assert_eq!(answer.head.get("retry-after").is_some(), status == 503, "{number}");
        assert!(!answer.head.any("x-sbx-"), "{number}: {:?}", answer.head);
        assert!(!answer.text().contains("node9"), "the names of nodes are for operators");
    }
    let answer = get(node.public, &host(9, 100_001), "/").await;
    assert_eq!(answer.status, 403);
    assert!(answer.text().contains("port 9 of this sandbox is not exposed"), "{}", answer.text());
    assert_ne!(id(100_001), id(100_002));
}

/// Whoever asks a public port without a server, and however often: its container is looked into a few times.
#[tokio::test(flavor = "multi_thread")]
async fn many_refused_requests_share_a_look_into_the_container() {
    need_caddy!();
    let node = Node::start(1).await;
    node.table.put(100_001, ip(10), State::Running, &[8000]);
    node.table.listen_on_loopback(100_001, 8000);
    let (begun, mut requests) = (Instant::now(), JoinSet::new());
    for _ in 0..200 {
        let (public, host) = (node.public, host(8000, 100_001));
        requests.spawn(async move { get(public, &host, "/").await });
    }
    for answer in requests.join_all().await {
        assert_eq!(answer.status, 502, "{}", answer.text());
        assert!(answer.text().contains("let it listen on 0.0.0.0:8000"), "{}", answer.text());
    }
    let most = begun.elapsed().as_millis() / 250 + 2;
    assert!(u128::from(node.table.looks()) <= most, "{} looks, not {most}", node.table.looks());
}

/// Returns an answer as a client sees it, without what is different each time.
async fn seen(node: &Node, label: &str) -> (u16, String) {
    let answer = get(node.public, &format!("{label}.{DOMAIN}"), "/").await;
    let mut headers = answer.head.headers.clone();
    headers.retain(|(name, _)| !["date", "x-request-id"].contains(&&*name.to_ascii_lowercase()));
    headers.sort();
    (answer.status, format!("{headers:?} {}", answer.text()))
}

#[tokio::test(flavor = "multi_thread")]
async fn name_leads_to_its_sandbox_from_every_node_and_each_guess_to_one_answer() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    owner.table.name(100_001, "box--red", Some(8000));
    edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    edge.table.told("box--red", 100_001);
    // It had this name before, and nobody has told the nodes yet.
    edge.table.told("old--red", 100_001);
    owner.table.told("old--red", 100_001);
    for node in [&edge, &owner] {
        for label in ["box--red", "BOX--Red", "8000-box--red", "port-8000-box--red"] {
            let answer = get(node.public, &format!("{label}.{DOMAIN}"), "/").await;
            let is_served = answer.text().starts_with("alpha got GET / ");
            assert_eq!((answer.status, is_served), (200, true), "{label}: {}", answer.text());
        }
    }
    let served = sandbox.got().len();
    let guesses = [
        "other--red",
        "box--blue",
        "8001-box--red",
        "8000-other--red",
        "old--red",
        "8000-old--red",
    ];
    for node in [&edge, &owner] {
        let mut answers = BTreeSet::new();
        for label in guesses {
            answers.insert(seen(node, label).await);
        }
        let statuses: Vec<u16> = answers.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses, [404], "{answers:#?}");
    }
    for label in ["xn--red", "box--", "--red", "80-80-box--red", "port-box--red", "box--red--"] {
        assert_eq!(seen(&edge, label).await.0, 404, "{label}");
    }
    // Who gets in is decided as under the other names, and a port that is hidden is closed under all.
    owner.table.guard(100_001, Visibility::Token, 1);
    for node in [&edge, &owner] {
        assert_eq!(seen(node, "box--red").await.0, 401);
    }
    owner.table.put(100_001, ip(10), State::Running, &[]);
    owner.table.name(100_001, "box--red", None);
    for node in [&edge, &owner] {
        for label in ["box--red", "8000-box--red"] {
            assert_eq!(seen(node, label).await.0, 404, "{label}");
        }
        let by_id = host_by_id(8000, 100_001);
        assert_eq!(get(node.public, &by_id, "/").await.status, 403);
    }
    assert_eq!(sandbox.got().len(), served);
}

/// Caddy would keep the whole body of such a request in memory.
#[tokio::test(flavor = "multi_thread")]
async fn request_to_upgrade_to_http_2_is_an_ordinary_one() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let request = Request { method: "POST", body: b"body", ..Request::get(&host, "/x") }
        .with("Connection", "Upgrade, HTTP2-Settings")
        .with("Upgrade", "h2c")
        .with("HTTP2-Settings", "AAMAAABkAAQAAP__");
    let answer = once(node.public, &request).await.expect("an answer");
    let is_served = answer.text().starts_with("alpha got POST /x ");
    assert_eq!((answer.status, is_served), (200, true), "{}", answer.text());
}
