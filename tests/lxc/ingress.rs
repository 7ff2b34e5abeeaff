//! HTTP access from outside, through the node's own Caddy.

use crate::{
    http::{Socket, exchange, get, ingress_port},
    world::{id, node, vmid, wait, world},
};

/// A WebSocket echo server in the template's own Python, without a library.
pub(crate) const ECHO: &str = r#"
import socket, hashlib, base64, threading
def serve(c):
    head = b""
    while not head.endswith(b"\r\n\r\n"): head += c.recv(1)
    key = [l.split(b": ")[1] for l in head.split(b"\r\n") if l.lower().startswith(b"sec-websocket-key")][0]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    c.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
    while True:
        head = c.recv(6, socket.MSG_WAITALL)
        if len(head) < 6: return
        body = c.recv(head[1] & 127, socket.MSG_WAITALL)
        c.sendall(bytes([0x81, len(body)]) + bytes(b ^ head[2 + i % 4] for i, b in enumerate(body)))
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 9000)); s.listen(16)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"#;

#[test]
fn a_websocket_survives_other_sandboxes_and_ends_with_hide() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let (id, node) = (id(&sandbox), node(&sandbox));
    let ran = world.ctl_with(&["exec", "-i", id, "--", "tee", "/root/echo.py"], ECHO.as_bytes());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = world.ctl(&[
        "exec",
        id,
        "--shell",
        "setsid python3 /root/echo.py >/dev/null 2>&1 </dev/null & exit 0",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    world.json(&["expose", id, "9000", "--name", "echo"]);
    world.json(&["expose", id, "9000", "--name", "second"]);
    let host = format!("port-9000-vm-{}.sandbox.localhost", vmid(&sandbox));
    wait("the echo to listen", || {
        world.ctl(&["exec", id, "--shell", "exec 3<>/dev/tcp/127.0.0.1/9000"]).code == 0
    });
    let mut socket = Socket::open(node, &host);
    assert_eq!(socket.echo("before").expect("alive"), "before");
    let other = world.create(&["--node", node]);
    world.json(&["expose", other["id"].as_str().expect("id"), "8000"]);
    assert_eq!(socket.echo("after").expect("alive"), "after", "another sandbox cut the socket");
    // Hidden by one of its two names: the port is closed under both.
    assert_eq!(world.ctl(&["hide", id, "echo"]).text(), format!("{id} echo, second closed\n"));
    wait("hide to cut the open socket", || socket.echo("x").is_err());
    assert_eq!(get(node, &host).0, 403);
    assert_eq!(get(node, &format!("port-9000-{id}.sandbox.localhost")).0, 403);
    assert_eq!(world.refused(&["hide", id, "second"]).0, "SERVICE_NOT_FOUND");
    // Exposed again, and closed by its number.
    world.json(&["expose", id, "9000", "--name", "second"]);
    let mut socket = Socket::open(node, &host);
    assert_eq!(socket.echo("again").expect("alive"), "again");
    world.json(&["hide", id, "9000"]);
    wait("hide to cut the open socket", || socket.echo("x").is_err());
    assert_eq!(get(node, &host).0, 403);
    world.finish();
}

#[test]
fn url_works_as_soon_as_an_answer_gave_it() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2", "--expose", "web=8000"]);
    let (id, vmid) = (id(&sandbox), vmid(&sandbox));
    let given = world.json(&["url", id, "web"]);
    assert_eq!(given["bypasses_access"], false);
    let host = crate::http::host(given["url"].as_str().expect("a URL"));
    for node in ["node2", "node1"] {
        let (status, body) = get(node, &host);
        assert_eq!(status, 200, "{node}: {body}");
    }
    // A port that is opened now: nothing listens there, but it is open at once.
    let port = format!("port-8001-vm-{vmid}.sandbox.localhost");
    assert_eq!(get("node2", &port).0, 403);
    world.json(&["expose", id, "8001"]);
    assert_eq!(get("node2", &port).0, 502);
    world.finish();
}

#[test]
fn address_of_a_container_answers_its_own_node_alone() {
    let Some(world) = world() else { return };
    // No port is exposed: the node itself reaches it anyway.
    let sandbox = world.create(&["--node", "node2"]);
    let ip = sandbox["ip"].as_str().expect("an address");
    let reaches = |node: &str| {
        let line = format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{ip}/8000' 2>/dev/null; echo $?");
        world.shell(node, &line).trim() == "0"
    };
    assert!(reaches("node2"), "{ip}");
    assert!(!reaches("node1"), "{ip}");
    world.finish();
}

#[test]
fn every_node_serves_every_sandbox_and_no_other_container() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2", "--expose", "web=8000"]);
    let (id, vmid) = (id(&sandbox), vmid(&sandbox));
    for name in [format!("port-8000-vm-{vmid}"), format!("port-8000-{id}")] {
        let host = format!("{name}.sandbox.localhost");
        for node in ["node1", "node2", "node3"] {
            wait(&format!("{host} by way of {node}"), || get(node, &host).0 == 200);
            let (_, body) = get(node, &host);
            assert!(body.contains("inside a sandbox"), "{node}: {body}");
        }
    }
    let status = |host: &str| get("node1", host).0;
    assert_eq!(status(&format!("port-22-vm-{vmid}.sandbox.localhost")), 403, "never exposed");
    assert_eq!(status("port-8000-vm-100003.sandbox.localhost"), 404, "a foreign container");
    assert_eq!(status("port-8000-vm-9000.sandbox.localhost"), 404, "a template");
    assert_eq!(status("port-8000-vm-987654.sandbox.localhost"), 404, "nobody's vmid");
    assert_eq!(status("port-8000-pvelxc-00000000000000000000000000.sandbox.localhost"), 404);
    assert_eq!(status(&format!("port-8000-vm-{vmid}.evil.example")), 404, "another domain");
    assert_eq!(status("sandbox.localhost"), 404);
    world.json(&["rm", id]);
    world.wait_phase(id, "deleted");
    for node in ["node1", "node2", "node3"] {
        let host = format!("port-8000-vm-{vmid}.sandbox.localhost");
        wait(&format!("410 by way of {node}"), || get(node, &host).0 == 410);
    }
    world.finish();
}

#[test]
fn port_lets_in_whom_its_visibility_names() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2", "--expose", "web=8000:team"]);
    let (id, vmid) = (id(&sandbox), vmid(&sandbox));
    assert_eq!(world.json(&["get", id])["services"][0]["visibility"], "team");
    let host = format!("8000-vm-{vmid}.sandbox.localhost");
    // At its own node, and by way of another one.
    for node in ["node2", "node1"] {
        wait(&format!("{node} to know the sandbox"), || get(node, &host).0 == 401);
    }
    let link = world.json(&["link", id, "web"]);
    let url = link["url"].as_str().expect("a URL").to_owned();
    let (_, query) = url.split_once("/?").expect("a query");
    let mut sessions = Vec::new();
    for node in ["node2", "node1"] {
        let answer = exchange(node, &host, &format!("/?{query}&a=1"), "Accept: text/html\r\n");
        assert!(answer.starts_with("HTTP/1.1 303"), "{answer}");
        assert!(answer.to_lowercase().contains("\r\nlocation: /?a=1\r\n"), "{answer}");
        let cookie = answer.split("__Host-sbx-8000=").nth(1).expect("a cookie");
        let cookie = cookie.split(';').next().expect("a value");
        let header = format!("Cookie: __Host-sbx-8000={cookie}\r\n");
        assert!(exchange(node, &host, "/", &header).starts_with("HTTP/1.1 200"), "{node}");
        sessions.push((node, header));
    }
    // The agent starts again, and believes what it has signed.
    let services = world.node("node2").services().expect("services");
    services.restart(lab::daemons::AGENT, std::time::Duration::from_secs(60)).expect("restarted");
    for (node, header) in &sessions {
        wait("the session to count again", || {
            exchange(node, &host, "/", header).starts_with("HTTP/1.1 200")
        });
    }
    // The controller is connected again a moment later.
    wait("the revocation", || world.ctl(&["revoke", id, "8000"]).code == 0);
    for (node, header) in &sessions {
        assert!(exchange(node, &host, "/", header).starts_with("HTTP/1.1 401"), "{node}");
    }
    world.json(&["expose", id, "8000", "--name", "web", "--visibility", "token"]);
    let token = world.ctl(&["link", id, "8000", "--bare"]).text();
    let header = format!("X-Sbx-Token: {}\r\n", token.trim());
    for node in ["node2", "node1"] {
        assert!(exchange(node, &host, "/", &header).starts_with("HTTP/1.1 200"), "{node}");
    }
    world.json(&["expose", id, "8000", "--name", "web", "--visibility", "private"]);
    assert!(exchange("node1", &host, "/", &header).starts_with("HTTP/1.1 403"));
    assert_eq!(world.refused(&["link", id, "8000"]).0, "ACCESS_KIND");
    world.json(&["expose", id, "8000", "--name", "web", "--public"]);
    assert_eq!(get("node1", &host).0, 200);
    world.finish();
}

#[test]
fn ingress_test_says_of_each_port_what_a_page_of_another_site_gets() {
    let Some(world) = world() else { return };
    // The page of the template is on 8000. Nothing listens on 8001.
    let args = ["--node", "node2", "--expose", "web=8000", "--expose", "late=8001"];
    let sandbox = world.create(&args);
    let id = id(&sandbox);
    let at = format!("127.0.0.1:{}", ingress_port("node2"));
    let test = |more: &[&str]| {
        let ran = world.ctl(&[&["ingress", "test", id, "--at", &at], more].concat());
        assert!(ran.text().lines().all(|line| line.chars().count() <= 80), "{}", ran.text());
        (ran.code, ran.text(), ran.stderr)
    };
    let fine = "5 checks: nothing is wrong\n";
    // A page that the configuration does not name has no session of its user.
    let no_session = "7 checks: 0 failed, 2 warnings\n";
    for (visibility, end) in [("public", fine), ("team", no_session), ("token", fine)] {
        world.json(&["expose", id, "8000", "--name", "web", "--visibility", visibility]);
        // Each visibility is known at the ingress as soon as the call was answered.
        let (code, text, stderr) = test(&["web"]);
        assert_eq!((code, text.ends_with(end)), (0, true), "{visibility}: {text}{stderr}");
        for check in ["answer", "cross-origin", "frame", "preflight", "websocket"] {
            let is_it = |line: &str| line.split_whitespace().take(3).eq(["ok", check, "web"]);
            assert!(text.lines().any(is_it), "{visibility}, {check}: {text}");
        }
        assert!(text.contains("web (8000): 200\n"), "{visibility}: {text}");
    }
    world.json(&["expose", id, "8000", "--name", "web", "--visibility", "private"]);
    let (code, text, _) = test(&["8000"]);
    assert_eq!(code, 0);
    assert!(text.starts_with("ok       answer  web (8000): private"), "{text}");

    // One that does not answer fails the whole, and hides nothing of the others.
    let (code, text, _) = test(&[]);
    assert_eq!(code, 1);
    let why = "failed   answer  late (8001): 502: nothing listens on port 8001 in the sandbox";
    assert!(text.contains(why), "{text}");
    assert!(text.contains("  remedy: sandboxctl port ls ID shows what listens, and where\n"));
    assert!(text.ends_with("2 checks: 1 failed, 0 warnings\n"), "{text}");
    let report = world.ctl(&["--json", "ingress", "test", id, "late", "--at", &at]);
    let found: serde_json::Value = serde_json::from_slice(&report.stdout).expect("JSON");
    assert_eq!((report.code, &found["failed"]), (1, &1.into()), "{found}");

    let (code, text, stderr) = test(&["9999"]);
    assert!(code != 0 && text.is_empty() && stderr.contains("no such open port"), "{stderr}");
    world.finish();
}
