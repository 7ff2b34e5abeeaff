//! Ports of a real container, past HTTP: servers that nothing from outside reaches, and connections outwards.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Stdio},
};

use crate::world::{PATIENCE, World, id, wait, world};

/// Servers in the template's own Python: an echo on 127.0.0.1:7000 and on a unix socket, which answers when the
/// caller's half has ended, and a flood on 127.0.0.1:7001.
const SERVERS: &str = r#"
import os, socket, threading
def echo(c):
    data = b""
    while True:
        more = c.recv(65536)
        if not more: break
        data += more
    c.sendall(data); c.close()
def flood(c):
    while True: c.sendall(b"y" * 65536)
def serve(s, f):
    s.listen(64)
    while True: threading.Thread(target=f, args=(s.accept()[0],), daemon=True).start()
def tcp(port):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("127.0.0.1", port)); return s
u = socket.socket(socket.AF_UNIX); u.bind("/run/echo.sock")
threading.Thread(target=serve, args=(u, echo), daemon=True).start()
threading.Thread(target=serve, args=(tcp(7001), flood), daemon=True).start()
serve(tcp(7000), echo)
"#;

/// Running `port-forward`; ends with the test.
struct Forwarding {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Forwarding {
    fn start(world: &World, args: &[&str]) -> Self {
        let mut command = world.command(&["port-forward"]);
        let command = command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().expect("sandboxctl");
        let lines = BufReader::new(child.stdout.take().expect("stdout"));
        Self { child, lines }
    }

    /// Returns where the next forward begins.
    fn from(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        line.split(' ').nth(1).unwrap_or_else(|| panic!("no forward: {line:?}")).to_owned()
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        // The child may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("sandboxctl listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Sends bytes, ends that half, and returns what comes back.
fn echoed(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(address);
    stream.write_all(bytes).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("ended");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("an end, and no reset");
    back
}

fn with_servers(world: &World, id: &str) {
    let ran =
        world.ctl_with(&["exec", "-i", id, "--", "tee", "/root/servers.py"], SERVERS.as_bytes());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let line = "setsid python3 /root/servers.py >/dev/null 2>&1 </dev/null & exit 0";
    assert_eq!(world.ctl(&["exec", id, "--shell", line]).code, 0);
    wait("the servers to listen", || {
        let ports = world.json(&["port", "ls", id]);
        let all = ports.as_array().expect("a list");
        all.iter().any(|port| port["port"] == 7000 && port["address"] == "127.0.0.1")
    });
}

#[test]
fn loopback_servers_and_unix_sockets_are_forwarded() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    with_servers(&world, id);
    let mut forwarding =
        Forwarding::start(&world, &[id, ":7000", ":/run/echo.sock", ":7001", ":7999"]);
    let [echo, unix, flood, nothing] = std::array::from_fn(|_| forwarding.from());
    let text: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 251) as u8).collect();
    assert!(echoed(&echo, &text) == text);
    assert_eq!(echoed(&unix, b"through a socket"), b"through a socket");
    connect(&nothing).read(&mut [0]).expect_err("a reset: nothing listens");

    // A flood that nobody reads delays neither a command nor another connection.
    let stalled = connect(&flood);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert!(echoed(&echo, &text[..100_000]) == text[..100_000]));
        }
    });
    assert_eq!(world.ctl(&["exec", id, "--", "true"]).code, 0);
    drop(stalled);

    // One connection over stdin and stdout.
    let ran = world.ctl_with(&["port-forward", id, "-", "7000"], b"ping");
    assert_eq!((ran.code, ran.text().as_str()), (0, "ping"), "{}", ran.stderr);
    assert_eq!(world.refused(&["port-forward", id, "-", "7999"]).0, "NOT_LISTENING");

    // Another team finds no such sandbox.
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let other = world.command_with_token(&["port-forward", id, ":7000"], &token).output();
    let other = other.expect("sandboxctl");
    assert!(String::from_utf8_lossy(&other.stderr).contains("SANDBOX_NOT_FOUND"), "{other:?}");

    // What is frozen goes on; what is deleted ends.
    let mut open = connect(&echo);
    open.write_all(b"before").expect("sent");
    assert_eq!(world.ctl(&["pause", id]).code, 0);
    assert_eq!(world.ctl(&["resume", id]).code, 0);
    open.write_all(b" and after").expect("sent");
    open.shutdown(std::net::Shutdown::Write).expect("ended");
    let mut back = String::new();
    open.read_to_string(&mut back).expect("an end");
    assert_eq!(back, "before and after");
    let mut open = connect(&flood);
    open.read_exact(&mut [0; 100]).expect("it floods");
    assert_eq!(world.ctl(&["rm", id]).code, 0);
    let mut sink = vec![0; 1 << 20];
    while open.read(&mut sink).is_ok_and(|read| read > 0) {}
    world.finish();
}

/// Reads some bytes of the server that never stops. Fails once the connection is cut.
fn floods(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.read_exact(&mut [0; 1024])
}

/// Reads until the connection is cut.
fn until_cut(mut stream: TcpStream) {
    let mut sink = vec![0; 1 << 20];
    wait("the connection to be cut", || !stream.read(&mut sink).is_ok_and(|read| read > 0));
}

#[test]
fn revocation_and_hide_of_a_port_cut_its_forwards() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    with_servers(&world, id);
    let mut forwarding = Forwarding::start(&world, &[id, ":7000", ":7001"]);
    let [echo, flood] = std::array::from_fn(|_| forwarding.from());
    assert_eq!(world.refused(&["revoke", id, "7002"]).0, "SERVICE_NOT_FOUND");

    let mut open = connect(&flood);
    floods(&mut open).expect("it floods");
    world.json(&["expose", id, "7001", "--visibility", "token"]);
    world.json(&["expose", id, "7001", "--visibility", "private"]);
    floods(&mut open).expect("another visibility is about HTTP");
    world.json(&["hide", id, "7001"]);
    until_cut(open);
    open = connect(&flood);
    floods(&mut open).expect("a new one is possible");

    // The port is closed to HTTP, and open; in both cases its forwards end, and nobody else's.
    for visibility in [None, Some("token")] {
        if let Some(visibility) = visibility {
            world.json(&["expose", id, "7001", "--visibility", visibility]);
        }
        let mut other = connect(&echo);
        other.write_all(b"before").expect("sent");
        world.json(&["revoke", id, "7001"]);
        until_cut(open);
        other.write_all(b" and after").expect("sent");
        other.shutdown(std::net::Shutdown::Write).expect("ended");
        let mut back = String::new();
        other.read_to_string(&mut back).expect("an end");
        assert_eq!(back, "before and after", "{visibility:?}");
        // A new one is possible: the scope of the token says who may.
        open = connect(&flood);
        floods(&mut open).expect("it floods");
    }
    drop(open);
    world.finish();
}

#[test]
fn programs_inside_connect_to_this_machine() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    let here = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = here.local_addr().expect("bound").port();
    let forward = format!("{port}:8099");
    let mut forwarding = Forwarding::start(&world, &[id, &forward, "--reverse"]);
    assert_eq!(forwarding.from(), format!("{id}:8099"));
    let serving = std::thread::spawn(move || {
        for _ in 0..3 {
            let (mut stream, _) = here.accept().expect("connected");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let mut name = String::new();
            stream.read_to_string(&mut name).expect("an end");
            stream.write_all(format!("hello {name}").as_bytes()).expect("sent");
        }
    });
    let line = "python3 -c 'import socket,sys; s=socket.create_connection((\"127.0.0.1\", 8099)); \
                s.sendall(b\"ada\"); s.shutdown(1); print(s.recv(99, socket.MSG_WAITALL).decode())'";
    for _ in 0..3 {
        let ran = world.ctl(&["exec", id, "--shell", line]);
        assert_eq!(ran.text(), "hello ada\n", "{}", ran.stderr);
    }
    serving.join().expect("no panic");
    let taken = world.refused(&["port-forward", id, &forward, "--reverse"]);
    assert_eq!(taken.0, "FORWARD_REFUSED", "the port is taken");
    drop(forwarding);
    let gone = || {
        let ports = world.json(&["port", "ls", id]);
        ports.as_array().expect("a list").iter().all(|port| port["port"] != 8099)
    };
    wait("the listener to go with its caller", gone);

    // A revocation ends the listener, too, and the program that has it.
    let mut forwarding = Forwarding::start(&world, &[id, &forward, "--reverse"]);
    assert_eq!(forwarding.from(), format!("{id}:8099"));
    world.json(&["revoke", id, "8099"]);
    wait("the end of the forward", || forwarding.child.try_wait().expect("asked").is_some());
    wait("the end of the listener", gone);
    world.finish();
}
