use crate::{
    http::{Client, Request, once},
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

#[tokio::test(flavor = "multi_thread")]
async fn request_bodies_methods_and_paths_pass_unchanged() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let body: Vec<u8> = (0..8u32 * 1024 * 1024).map(|n| ((n * 31) >> 3).to_le_bytes()[0]).collect();

    let post = Request { method: "POST", body: &body, ..Request::get(&host, "/upload") };
    assert_eq!(once(node.public, &post).await.expect("an answer").status, 200);
    assert!(sandbox.last().body == body, "the body is another");

    let mut client = Client::connect(node.public).await.expect("connected");
    let head =
        format!("POST /chunked HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send(head).await.expect("sent");
    for chunk in body.chunks(100_000) {
        client.send(format!("{:x}\r\n", chunk.len())).await.expect("sent");
        client.send(chunk).await.expect("sent");
        client.send("\r\n").await.expect("sent");
    }
    client.send("0\r\n\r\n").await.expect("sent");
    assert_eq!(client.response(false).await.expect("an answer").status, 200);
    assert!(sandbox.last().body == body, "the body is another");

    // The connection stays usable, and a body on the path of a route question is the sandbox's.
    for (method, path) in [("GET", "/v1/route"), ("PUT", "/v1/route?via=peer"), ("PATCH", "/a")] {
        let request = Request { method, body: b"hello", ..Request::get(&host, path) };
        let answer = client.request(&request).await.expect("an answer");
        assert_eq!(answer.status, 200, "{method} {path}");
        let got = sandbox.last();
        assert_eq!(
            (got.head.line, got.body),
            (format!("{method} {path} HTTP/1.1"), b"hello".to_vec())
        );
    }

    let expect = Request { method: "POST", body: b"later", ..Request::get(&host, "/e") };
    let expect = expect.with("Expect", "100-continue");
    assert_eq!(once(node.public, &expect).await.expect("an answer").status, 200);
    assert_eq!(sandbox.last().body, b"later");

    for method in ["HEAD", "OPTIONS", "DELETE", "PROPFIND"] {
        let request = Request { method, ..Request::get(&host, "/m") };
        let answer = client.request(&request).await.expect("an answer");
        assert_eq!(answer.status, 200, "{method}");
        assert_eq!(sandbox.last().head.line, format!("{method} /m HTTP/1.1"));
    }

    // Paths reach the sandbox unchanged.
    for path in ["/a%2Fb", "/%00", "/%2e%2e/x", "//a", "/a//b/../c", "/?a=b&&c", "/ü"] {
        let mut client = Client::connect(node.public).await.expect("connected");
        let answer = client.request(&Request::get(&host, path)).await.expect("an answer");
        assert_eq!(answer.status, 200, "{path}");
        assert!(sandbox.last().head.line.contains(path.trim_end_matches('ü')), "{path}");
    }
}
