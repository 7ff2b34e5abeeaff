use agent::ingress::{Owner, version::Generation};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{client::IntoClientRequest, http::HeaderName};

use crate::{
    http::{Client, Head, Request, get, once},
    node::{Node, at, host, need_caddy},
    peers::{Pki, two},
    sandbox::Sandbox,
};

/// Spellings of headers that only the ingress, or the tunnel in front of it, may set. Programs
/// behind CGI and the like take each of them for the real one.
const FORGED: &[&str] = &[
    "X-Sbx-Kind",
    "X-Sbx_kind",
    "X_Sbx-Kind",
    "x_sbx_KIND",
    "X.Sbx.Kind",
    "x-sbx.upstream",
    "x_SBX-proof",
    "X-SBX",
    "X_Sbx",
    "Cf_Access-Jwt-Assertion",
    "cf-access_authenticated_user_email",
    "CF.Access.Client.Id",
    "Cf_Warp_Tag_Id",
    "X-Forwarded_For",
    "X_Forwarded-For",
    "x_forwarded_for",
    "X.Forwarded.For",
    "X_Forwarded_Proto",
    "x-forwarded_host",
    "X_Request_Id",
    "X-Request_Id",
    "Cf_Connecting_Ip",
    "cf-connecting_ip",
    "Cf_Ipcountry",
    "Forwarded",
    // Every other character that a name may have.
    "X!Sbx!User",
    "X#Sbx#User",
    "X$Sbx$User",
    "X%Sbx%User",
    "X&Sbx&User",
    "X'Sbx'User",
    "X*Sbx*User",
    "X+Sbx+User",
    "X^Sbx^User",
    "X`Sbx`User",
    "X|Sbx|User",
    "X~Sbx~User",
    "X~Forwarded~For",
    "CF|Access|Jwt|Assertion",
    "X-Request'Id",
];

/// Returns the header's name as a program behind CGI sees it.
fn folded(name: &str) -> String {
    name.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

/// Checks that no forged header came through and no other header is missing.
fn assert_clean(got: &Head, host: &str) {
    for (name, value) in &got.headers {
        assert!(!value.contains("forged"), "{name} came through: {got:?}");
        let name = folded(name);
        assert!(!name.starts_with("x_sbx") && !name.starts_with("cf_access"), "{got:?}");
    }
    assert_eq!(got.get("x-forwarded-host"), Some(host), "{got:?}");
    assert_eq!(got.get("x-forwarded-proto"), Some("https"), "{got:?}");
    assert!(got.get("x-forwarded-for").is_some_and(|chain| chain.starts_with("127.")), "{got:?}");
    assert!(got.get("x-request-id").is_some_and(|id| id.len() == 36), "{got:?}");
    // Later versions of Caddy drop every header with an underscore.
    let kept = (crate::node::generation() == Generation::Before).then_some("kept");
    assert_eq!(got.get("x_requested_with"), kept, "{got:?}");
    assert_eq!(got.get("my_header"), kept, "{got:?}");
}

fn forged<'a>(host: &'a str, connection: &'a str) -> Request<'a> {
    let mut request = Request::get(host, "/").with("Connection", connection);
    for name in FORGED {
        // Each twice: none of them may count.
        request = request.with(name, "forged").with(name, "forged again");
    }
    request.with("X_Requested_With", "kept").with("My_Header", "kept")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_our_headers_reaches_a_sandbox() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    let host = host(8000, 100_001);
    // Declares them as hop-by-hop headers, so that a proxy might remove its own.
    let hop = "close, X-Sbx-Kind, X-Sbx_kind, X-Forwarded-For, X-Forwarded-Host, \
               X-Forwarded-Proto, X-Request-Id";
    // Directly, and through another node.
    for node in [&owner, &edge] {
        for connection in ["close", hop] {
            let answer = once(node.public, &forged(&host, connection)).await.expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_clean(&sandbox.last().head, &host);
        }

        // By WebSocket, whose request takes another path through a proxy.
        let mut request = format!("ws://{host}/ws").into_client_request().expect("a request");
        for name in FORGED {
            let name: HeaderName = name.parse().expect("a name");
            request.headers_mut().insert(name, "forged".parse().expect("a value"));
        }
        for name in ["x_requested_with", "my_header"] {
            request.headers_mut().insert(name, "kept".parse().expect("a value"));
        }
        let stream = TcpStream::connect(node.public).await.expect("connected");
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await.expect("open");
        assert_clean(&sandbox.last().head, &host);
        drop(socket);

        // As trailers after the body.
        let mut client = Client::connect(node.public).await.expect("connected");
        let raw = format!(
            "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\
             Trailer: X-Sbx-Kind, X-Sbx_kind\r\nX_Requested_With: kept\r\nMy_Header: kept\r\n\r\n\
             4\r\nbody\r\n0\r\nX-Sbx-Kind: forged\r\nX-Sbx_kind: forged\r\n\r\n"
        );
        client.send(raw).await.expect("sent");
        assert_eq!(client.response(false).await.expect("an answer").status, 200);
        let got = sandbox.last();
        assert_clean(&got.head, &host);
        let body = String::from_utf8_lossy(&got.body).into_owned();
        assert!(body.starts_with("body") && !body.contains("forged"), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_headers_of_a_client_are_ignored() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let victim = Sandbox::start(at(11, 8000), "victim").await;
    node.put(100_001, sandbox.address);
    let victim_address = victim.address.to_string();
    let host = host(8000, 100_001);

    let request = Request::get(&host, "/x?a=1&b=%2F")
        .with("X-Sbx-Upstream", &victim_address)
        .with("x-sbx-kind", "peer")
        .with("X-SBX-Proof", "0000")
        .with("X-Sbx-Host", "evil")
        .with("X_Sbx_Upstream", &victim_address)
        .with("Connection", "close, X-Sbx-Proof, X-Sbx-Upstream, X-Forwarded-Host, Cookie")
        .with("X-Forwarded-Host", "evil.example")
        .with("X-Forwarded-Proto", "gopher")
        .with("X-Forwarded-For", "203.0.113.9")
        .with("Forwarded", "for=203.0.113.9;host=evil")
        .with("Cf-Access-Jwt-Assertion", "secret")
        .with("Cf-Warp-Tag-Id", "secret")
        .with("X-Request-Id", "mine")
        .with("Authorization", "Bearer of-the-app")
        .with("Cookie", "a=1; __Host-sbx-8000=secret; b=2; CF_Authorization=secret");
    let answer = once(node.public, &request).await.expect("an answer");
    assert_eq!((answer.status, answer.text().starts_with("alpha ")), (200, true));
    let got = sandbox.last().head;
    assert!(!got.any("x-sbx") && !got.any("x_sbx"), "{got:?}");
    assert!(!got.any("forwarded") && !got.any("cf-"), "{got:?}");
    assert_eq!(got.line, "GET /x?a=1&b=%2F HTTP/1.1");
    assert_eq!(got.get("host"), Some("localhost:8000"));
    assert_eq!(got.get("x-forwarded-host"), Some(host.as_str()));
    assert_eq!(got.get("x-forwarded-proto"), Some("https"));
    assert_eq!(got.get("authorization"), Some("Bearer of-the-app"));
    assert!(got.get("x-request-id").is_some_and(|id| id.len() == 36), "{got:?}");
    assert!(got.all("cookie").concat().find("secret").is_none(), "{got:?}");
    assert!(victim.got().is_empty());

    // The app's own cookies stay.
    let request = Request::get(&host, "/").with("Cookie", "a=1; __Host-sbx-8000=secret; b=2");
    once(node.public, &request).await.expect("an answer");
    assert_eq!(sandbox.last().head.get("cookie"), Some("a=1; b=2"));
    let request = Request::get(&host, "/").with("Cookie", "a=1; CF_Authorization=secret");
    once(node.public, &request).await.expect("an answer");
    assert_eq!(sandbox.last().head.get("cookie"), Some("a=1"));

    // A repeated header, and placeholders of Caddy, which must have no effect.
    let request = Request::get(&host, "/{env.HOME}?q={http.vars.sbx_upstream}")
        .with("X-A", "1")
        .with("X-A", "{http.reverse_proxy.header.X-Sbx-Proof}");
    once(node.public, &request).await.expect("an answer");
    let got = sandbox.last().head;
    assert!(got.line.contains("%7Benv.HOME%7D") || got.line.contains("{env.HOME}"), "{}", got.line);
    assert!(got.line.contains("{http.vars.sbx_upstream}"), "{}", got.line);
    assert_eq!(got.all("x-a"), ["1", "{http.reverse_proxy.header.X-Sbx-Proof}"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_headers_of_a_sandbox_are_ignored() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let victim = Sandbox::start(at(11, 8000), "victim").await;
    node.put(100_001, sandbox.address);
    let mut client = Client::connect(node.public).await.expect("connected");
    let host = host(8000, 100_001);
    for _ in 0..20 {
        let answer = client.request(&Request::get(&host, "/forge")).await.expect("an answer");
        assert_eq!((answer.status, answer.text().starts_with("alpha ")), (200, true));
        assert!(!answer.head.any("x-sbx"), "{:?}", answer.head);
    }
    // The path of the route question is an ordinary path of the sandbox.
    let answer = get(node.public, &host, "/v1/route").await;
    assert!(answer.text().starts_with("alpha got GET /v1/route "), "{}", answer.text());
    assert!(victim.got().is_empty());
    assert_eq!(sandbox.questions(), 0);
}

/// Checks that an answer without the proof is ignored, whatever is behind the socket.
#[tokio::test(flavor = "multi_thread")]
async fn route_answer_without_the_proof_is_ignored() {
    need_caddy!();
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let node = Node::start_with(1, None, |json| {
        *json = serde_json::from_str(
            // Not the agent's proof.
            &json.to_string().replace("\"X-Sbx-Proof\":[\"", "\"X-Sbx-Proof\":[\"0"),
        )
        .expect("it is JSON");
    })
    .await;
    node.put(100_001, sandbox.address);
    let answer = get(node.public, &host(8000, 100_001), "/").await;
    assert_eq!((answer.status, answer.text().as_str()), (502, "the node gave no route\n"));
    assert!(!answer.head.any("x-sbx"), "{:?}", answer.head);
    assert!(sandbox.got().is_empty());
}
