//! What Caddy changes in the answers of sandboxes, and what it tells browsers of a port that not everybody reaches.

use agent::{
    ingress::{Owner, version::Generation},
    sandbox::access::credential::Purpose,
};
use proto::visibility::Visibility;

use crate::{
    access::credential,
    http::{Client, Request, Response, once},
    node::{Node, PARENT, at, generation, host, need_caddy},
    peers::{Pki, two},
    sandbox::Sandbox,
};

/// Sandbox of these tests.
const NUMBER: u32 = 100_001;

/// Starts two nodes, and a sandbox on the second.
async fn two_with_a_sandbox() -> (Pki, [Node; 2], Sandbox) {
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(NUMBER, sandbox.address);
    edge.table.elsewhere(NUMBER, Owner::Peer(owner.peer));
    (pki, [edge, owner], sandbox)
}

/// Asks for an answer with a status and headers.
async fn answered(node: &Node, status: &str, with: &[&str], more: &[(&str, &str)]) -> Response {
    let host = host(8000, NUMBER);
    let mut request = Request::get(&host, "/").with("X-Answer", status);
    for header in with {
        request = request.with("X-Answer-With", header);
    }
    for (name, value) in more {
        request = request.with(name, value);
    }
    once(node.public, &request).await.expect("an answer")
}

/// Returns the cookie of a session.
fn session() -> String {
    format!("__Host-sbx-8000={}", credential(Purpose::Session, 60))
}

/// A cache in front knows a URL alone: it would answer without a session, and after the port was hidden.
#[tokio::test(flavor = "multi_thread")]
async fn no_shared_cache_keeps_an_answer_of_a_sandbox() {
    need_caddy!();
    let (_pki, nodes, _sandbox) = two_with_a_sandbox().await;
    let cookie = session();
    let cookie = ("Cookie", cookie.as_str());
    for (visibility, unsaid) in [
        (Visibility::Public, None),
        (Visibility::Team, Some("private")),
        (Visibility::Token, Some("private")),
    ] {
        nodes[1].table.guard(NUMBER, visibility, 1);
        for node in &nodes {
            let own = ["CDN-Cache-Control: max-age=60", "cloudflare-cdn-cache-control: public"];
            let answer = answered(node, "200", &own, &[cookie]).await;
            assert_eq!(answer.status, 200, "{visibility:?}: {}", answer.text());
            for name in ["cdn-cache-control", "cloudflare-cdn-cache-control"] {
                assert_eq!(
                    answer.head.all(name),
                    ["no-store"],
                    "{visibility:?}: {:?}",
                    answer.head
                );
            }
            assert_eq!(
                answer.head.get("cache-control"),
                unsaid,
                "{visibility:?}: {:?}",
                answer.head
            );
            // What it says to browsers stays.
            let own = ["Cache-Control: max-age=60"];
            let answer = answered(node, "404", &own, &[cookie]).await;
            assert_eq!(answer.head.all("cache-control"), ["max-age=60"], "{visibility:?}");
            assert_eq!(answer.head.all("cdn-cache-control"), ["no-store"], "{visibility:?}");
            if visibility != Visibility::Public {
                let refused = answered(node, "200", &[], &[]).await;
                assert_eq!(refused.status, 401, "{visibility:?}");
                assert_eq!(refused.head.get("cache-control"), Some("no-store"), "{visibility:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_of_a_server_to_itself_leads_to_its_public_host() {
    need_caddy!();
    let (_pki, nodes, sandbox) = two_with_a_sandbox().await;
    let public = host(8000, NUMBER);
    for node in &nodes {
        for (to, rest) in [
            ("http://localhost:8000/a/?b=c#d", "/a/?b=c#d"),
            ("http://localhost:8000//a", "//a"),
            ("https://localhost:8000?b", "?b"),
            ("http://localhost:8000", ""),
        ] {
            let answer = answered(node, "301", &[&format!("Location: {to}")], &[]).await;
            let expected = format!("https://{public}{rest}");
            assert_eq!(answer.head.get("location"), Some(expected.as_str()), "{to}");
        }
        for to in [
            "/a",
            "//localhost:8000/",
            "http://localhost/",
            "http://localhost:800/",
            "http://localhost:80001/",
            "http://localhost:3000/a",
            "http://localhost:8000.evil.test/",
            "http://localhost:8000@evil.test/",
            "https://other.test/?to=http://localhost:8000/",
        ] {
            let answer = answered(node, "302", &[&format!("Location: {to}")], &[]).await;
            assert_eq!(answer.head.get("location"), Some(to));
        }
    }
    // Without https in front.
    let plain = Node::shaped(3, None, |settings| settings.https = false).await;
    plain.put(NUMBER, sandbox.address);
    let answer = answered(&plain, "302", &["Location: http://localhost:8000/a"], &[]).await;
    assert_eq!(answer.head.get("location"), Some(format!("http://{public}/a").as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn sandbox_sets_and_clears_no_cookies_of_its_siblings() {
    need_caddy!();
    let (_pki, nodes, _sandbox) = two_with_a_sandbox().await;
    let with = [
        "Set-Cookie: a=1; Domain=sbx.test; Path=/; Secure",
        "Set-Cookie: b=2;DOMAIN=.sbx.test",
        "Set-Cookie: c=3; \tdomain \t= sbx.test;domain=sbx.test; HttpOnly",
        "Set-Cookie: d=domain=4; Path=/domain=x",
        "Clear-Site-Data: \"cookies\"",
        "clear-site-data: \"storage\"",
    ];
    for node in &nodes {
        let answer = answered(node, "200", &with, &[]).await;
        let cookies = ["a=1; Path=/; Secure", "b=2", "c=3; HttpOnly", "d=domain=4; Path=/domain=x"];
        assert_eq!(answer.head.all("set-cookie"), cookies);
        assert!(!answer.head.any("clear-site-data"), "{:?}", answer.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_rule_for_frames_is_taken_out_of_each_policy() {
    need_caddy!();
    let (_pki, nodes, _sandbox) = two_with_a_sandbox().await;
    let with = [
        "Content-Security-Policy: default-src 'self'; Frame-Ancestors 'none', script-src 'self'; \
         frame-ancestors 'self'; img-src *",
        "Content-Security-Policy: frame-ancestors 'none';frame-ancestors a.test; font-src *",
        "Content-Security-Policy-Report-Only: frame-ancestors 'none', style-src *",
        "X-Frame-Options: DENY",
    ];
    for node in &nodes {
        let head = answered(node, "200", &with, &[]).await.head;
        // Rules that are empty mean nothing.
        let rules = |name: &str| -> Vec<Vec<String>> {
            let rules = |policy: &str| -> Vec<String> {
                let rules = policy.split(';').map(|rule| rule.trim().to_owned());
                rules.filter(|rule| !rule.is_empty()).collect()
            };
            let values = head.all(name);
            let policies = values.iter().flat_map(|value| value.split(','));
            policies.map(rules).filter(|policy| !policy.is_empty()).collect()
        };
        let expected = [
            vec!["default-src 'self'"],
            vec!["script-src 'self'", "img-src *"],
            vec!["font-src *"],
        ];
        assert_eq!(rules("content-security-policy"), expected, "{head:?}");
        assert_eq!(rules("content-security-policy-report-only"), [["style-src *"]], "{head:?}");
        assert!(!head.any("x-frame-options"), "{head:?}");
    }
}

/// Another team's sandbox is the same site to a browser, which sends the session along with a frame.
#[tokio::test(flavor = "multi_thread")]
async fn frame_of_a_guarded_port_is_for_pages_that_are_no_sandbox() {
    need_caddy!();
    let (_pki, nodes, sandbox) = two_with_a_sandbox().await;
    nodes[1].table.guard(NUMBER, Visibility::Team, 1);
    let cookie = session();
    let sibling = format!("https://{}/", host(8000, 100_002));
    let own = format!("https://{}/", host(8000, NUMBER));
    let frame = |site: &'static str, page: Option<&'static str>| {
        let mut all = vec![
            ("Cookie", cookie.as_str()),
            ("Sec-Fetch-Site", site),
            ("Sec-Fetch-Mode", "navigate"),
            ("Sec-Fetch-Dest", "iframe"),
        ];
        all.extend(page.map(|page| ("Referer", page)));
        all
    };
    let with = ["X-Frame-Options: DENY", "Content-Security-Policy: default-src 'self'"];
    for node in &nodes {
        for (site, page, pages) in [
            ("cross-site", Some("https://other.test/"), format!(" {PARENT} https://other.test")),
            ("same-site", Some("https://app.sbx.test/"), format!(" {PARENT} https://app.sbx.test")),
            // A page may keep to itself who it is.
            ("cross-site", None, format!(" {PARENT}")),
            ("same-site", None, format!(" {PARENT}")),
        ] {
            let answer = answered(node, "200", &with, &frame(site, page)).await;
            assert_eq!(answer.status, 200, "{page:?}: {}", answer.text());
            let ancestors = format!("frame-ancestors 'self'{pages}");
            let policies = answer.head.all("content-security-policy");
            assert_eq!(policies, ["default-src 'self'", &ancestors], "{page:?}");
            assert!(!answer.head.any("x-frame-options"), "{page:?}: {:?}", answer.head);
        }
        let served = sandbox.got().len();
        let mut of_sibling = frame("same-site", None);
        of_sibling.push(("Referer", &sibling));
        assert_eq!(answered(node, "200", &[], &of_sibling).await.status, 403);
        assert_eq!(sandbox.got().len(), served);
        // A page in a frame stays there when it loads another one.
        let mut within = frame("same-origin", None);
        within.push(("Referer", &own));
        let answer = answered(node, "200", &with, &within).await;
        assert_eq!(answer.head.all("content-security-policy"), ["default-src 'self'"]);
    }
    // Where servers decide on frames, one that forbids them is not overruled.
    let strict = Node::shaped(3, None, |settings| settings.frames = false).await;
    strict.put(NUMBER, sandbox.address);
    strict.table.guard(NUMBER, Visibility::Team, 1);
    let framed = frame("cross-site", Some("https://other.test/"));
    let head = answered(&strict, "200", &with, &framed).await.head;
    assert_eq!(head.get("x-frame-options"), Some("DENY"));
    assert_eq!(head.all("content-security-policy"), ["default-src 'self'"]);
    let head = answered(&strict, "200", &[], &framed).await.head;
    let policy = format!("frame-ancestors 'self' {PARENT} https://other.test");
    assert_eq!(head.all("content-security-policy"), [policy]);
}

/// Asks as `sandboxctl ingress test` does, with the default settings.
#[tokio::test(flavor = "multi_thread")]
async fn page_that_is_no_sandbox_shows_a_guarded_port_where_no_page_is_named() {
    need_caddy!();
    let (_pki, mut nodes, _sandbox) = two_with_a_sandbox().await;
    nodes.iter_mut().for_each(Node::name_no_page);
    nodes[1].table.guard(NUMBER, Visibility::Team, 1);
    let cookie = session();
    let page = [
        ("Cookie", cookie.as_str()),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Mode", "navigate"),
    ];
    let frame = ("Sec-Fetch-Dest", "iframe");
    for node in &nodes {
        for (more, status, pages) in [
            (&[frame, ("Referer", "https://page.example/")][..], 200, " https://page.example"),
            // Of an earlier sandboxctl.
            (&[][..], 200, ""),
            (&[frame][..], 403, ""),
        ] {
            let answer = answered(node, "200", &[], &[&page, more].concat()).await;
            assert_eq!(answer.status, status, "{more:?}: {}", answer.text());
            if status == 200 {
                let policy = format!("frame-ancestors 'self'{pages}");
                assert_eq!(answer.head.all("content-security-policy"), [policy], "{more:?}");
            }
        }
    }
}

/// A browser's cache would else show what was loaded for a page of the port itself in a frame of another sandbox.
#[tokio::test(flavor = "multi_thread")]
async fn answer_of_a_guarded_port_says_that_it_depends_on_who_asks() {
    need_caddy!();
    let (_pki, nodes, _sandbox) = two_with_a_sandbox().await;
    let cookie = session();
    let cookie = ("Cookie", cookie.as_str());
    let own = "Origin, Referer, Sec-Fetch-Site, Sec-Fetch-Dest";
    for (visibility, ours) in
        [(Visibility::Public, None), (Visibility::Team, Some(own)), (Visibility::Token, Some(own))]
    {
        nodes[1].table.guard(NUMBER, visibility, 1);
        for node in &nodes {
            for (status, with, theirs, open) in [
                ("200", &[][..], None, &["*"][..]),
                ("404", &["Vary: Accept-Encoding"][..], Some("Accept-Encoding"), &["*"][..]),
                // A server that judges origins itself is left to it.
                ("200", &["Vary: Origin"][..], Some("Origin"), &[][..]),
            ] {
                let head = answered(node, status, with, &[cookie]).await.head;
                let vary: Vec<_> = theirs.into_iter().chain(ours).collect();
                assert_eq!(head.all("vary"), vary, "{visibility:?}: {head:?}");
                let allowed = head.all("access-control-allow-origin");
                assert_eq!(allowed, open, "{visibility:?}: {head:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_page_reads_answers_and_refusals_with_its_users_session() {
    need_caddy!();
    let (_pki, nodes, sandbox) = two_with_a_sandbox().await;
    nodes[1].table.guard(NUMBER, Visibility::Team, 1);
    let cookie = session();
    let fetch = [
        ("Origin", PARENT),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Mode", "cors"),
        ("Cookie", cookie.as_str()),
    ];
    let assert_readable = |answer: &Response| {
        let head = &answer.head;
        assert_eq!(head.all("access-control-allow-origin"), [PARENT], "{head:?}");
        assert_eq!(head.all("access-control-allow-credentials"), ["true"], "{head:?}");
        let vary = head.all("vary").join(", ");
        assert!(vary.split(", ").any(|name| name == "Origin"), "{head:?}");
    };
    for node in &nodes {
        for with in [
            &[][..],
            &["Access-Control-Allow-Origin: *"],
            &["Access-Control-Allow-Origin: https://one.test", "Vary: Origin"],
            &["Access-Control-Allow-Credentials: false", "Vary: Accept"],
        ] {
            let answer = answered(node, "200", with, &fetch).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_readable(&answer);
        }
        // Without a session.
        let refused = answered(node, "200", &[], &fetch[..3]).await;
        assert_eq!(refused.status, 401, "{}", refused.text());
        assert_readable(&refused);

        let other = [("Origin", "https://other.test"), ("Sec-Fetch-Site", "cross-site"), fetch[3]];
        let refused = answered(node, "200", &[], &other).await;
        assert_eq!(refused.status, 403, "{}", refused.text());
        assert_eq!(refused.head.all("access-control-allow-origin"), ["*"]);
        assert!(!refused.head.any("access-control-allow-credentials"), "{:?}", refused.head);
    }
    // Other requests, and other pages of the same port, are told nothing of it.
    let answer = answered(&nodes[1], "200", &[], &[("Cookie", cookie.as_str())]).await;
    assert_eq!(answer.head.all("access-control-allow-origin"), ["*"]);
    assert!(!answer.head.any("access-control-allow-credentials"), "{:?}", answer.head);
    nodes[1].table.guard(NUMBER, Visibility::Public, 1);
    let answer = answered(&nodes[1], "200", &[], &fetch).await;
    assert_eq!(answer.head.all("access-control-allow-origin"), ["*"]);
    assert_eq!(sandbox.questions(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hint_before_an_answer_is_cleaned_as_the_answer_is_and_changes_nothing_in_it() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(NUMBER, sandbox.address);
    for (own, allowed) in
        [("X-Own: yes", "*"), ("Access-Control-Allow-Origin: https://one.test", "https://one.test")]
    {
        let hints = [
            ("X-Hint", "Link: </a.css>; rel=preload"),
            ("X-Hint", "Set-Cookie: a=1; Domain=sbx.test"),
            ("X-Hint", "Clear-Site-Data: \"cookies\""),
            ("X-Hint", "X-Sbx-Kind: forged"),
        ];
        let answer = answered(&node, "200", &[own], &hints).await;
        let [hint] = &answer.hints[..] else { panic!("{:?}", answer.hints) };
        assert_eq!(hint.get("link"), Some("</a.css>; rel=preload"), "{hint:?}");
        assert_eq!(hint.get("set-cookie"), Some("a=1"), "{hint:?}");
        assert!(!hint.any("clear-site-data") && !hint.any("x-sbx"), "{hint:?}");
        let head = &answer.head;
        assert_eq!(head.all("access-control-allow-origin"), [allowed], "{head:?}");
        assert_eq!(head.all("cdn-cache-control"), ["no-store"], "{head:?}");
    }
}

/// Asks for another protocol.
async fn upgraded(node: &Node, upgrades: &[&str], more: &[(&str, &str)]) -> Response {
    let host = host(8000, NUMBER);
    let mut request = Request::get(&host, "/outer").with("Connection", "keep-alive, UPGRADE");
    for upgrade in upgrades {
        request = request.with("Upgrade", upgrade);
    }
    for (name, value) in more {
        request = request.with(name, value);
    }
    let mut client = Client::connect(node.public).await.expect("connected");
    client.request(&request).await.expect("an answer")
}

/// Requests inside of HTTP/2 would reach the sandbox without a question, with whatever identity they say.
#[tokio::test(flavor = "multi_thread")]
async fn no_protocol_but_websocket_is_passed_on() {
    need_caddy!();
    let (_pki, nodes, sandbox) = two_with_a_sandbox().await;
    let settings = [("HTTP2-Settings", "AAMAAABkAAQAAP__")];
    for node in &nodes {
        for upgrades in [
            &["h2c"][..],
            &["H2C"],
            &["websocket, h2c"],
            &["h2c", "websocket"],
            &["websocket", "h2c"],
            &["websocket/13"],
            &["{http.request.header.X-Request-Id}"],
        ] {
            let answer = upgraded(node, upgrades, &settings).await;
            assert_eq!(answer.status, 200, "{upgrades:?}: {:?}", answer.head);
            assert!(answer.text().starts_with("alpha got GET /outer "), "{}", answer.text());
            let got = sandbox.last().head;
            assert!(!got.any("upgrade") && !got.any("http2-settings"), "{upgrades:?}: {got:?}");
            assert_ne!(got.get("connection"), Some("Upgrade"), "{upgrades:?}: {got:?}");
        }
    }
}

/// Caddy 2.6.2 writes such an answer past everything that changes headers. A script of the sandbox's page can set
/// such a cookie, too.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_opens_in_any_spelling_and_its_answer_is_cleaned_where_caddy_can() {
    need_caddy!();
    let (_pki, nodes, _sandbox) = two_with_a_sandbox().await;
    let cleans = generation() == Generation::Fixed;
    for node in &nodes {
        for spelling in ["websocket", "WebSocket", "WEBSOCKET"] {
            let more = [
                ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ("X-Answer-With", "Set-Cookie: a=1; Domain=sbx.test"),
                ("X-Answer-With", "X-Sbx-Kind: forged"),
                ("X-Answer-With", "Clear-Site-Data: \"cookies\""),
            ];
            let answer = upgraded(node, &[spelling], &more).await;
            let head = &answer.head;
            assert_eq!(answer.status, 101, "{spelling}: {head:?}");
            assert_eq!(head.get("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
            let cookie = if cleans { "a=1" } else { "a=1; Domain=sbx.test" };
            assert_eq!(head.get("set-cookie"), Some(cookie), "{spelling}: {head:?}");
            assert_eq!(head.any("clear-site-data"), !cleans, "{spelling}: {head:?}");
            assert_eq!(head.any("x-sbx"), !cleans, "{spelling}: {head:?}");
        }
    }
}
