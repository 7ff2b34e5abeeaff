//! Streams that are open while the agent is replaced: commands that write, and WebSockets through Caddy. Nothing
//! of them is lost or doubled; the longest silence is printed.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpStream,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::{
    Message, client::IntoClientRequest as _, http::HeaderValue, http::header::SEC_WEBSOCKET_KEY,
};

use crate::{
    booted::Booted,
    node::{CLI, UNTIL, wait},
};

/// Number of streams of each kind.
const COUNT: &str = "PVE_SANDBOX_UPGRADE_STREAMS";
const COUNT_USUAL: usize = 8;
/// Time between two lines of a command, and between two messages.
const PACE: Duration = Duration::from_millis(100);
/// Longest wait for an echo.
const ECHO: Duration = Duration::from_secs(60);
/// Where Caddy listens for the public.
const CADDY: &str = "127.0.0.1:8480";
/// Key of the handshake and the answer to it (RFC 6455): with a fixed pair the server needs no hash.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// Counts until it is told to stop, and says how far it came.
const COUNTER: &str =
    "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo $i; sleep 0.1; done; echo end $i";

/// Server that echoes short messages of WebSockets, a process for each connection.
const SERVER: &str = r#"
import os, socket
def read(c, n):
    b = b""
    while len(b) < n:
        p = c.recv(n - len(b))
        if not p: os._exit(0)
        b += p
    return b
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 9000))
s.listen(128)
while True:
    c, _ = s.accept()
    if os.fork():
        c.close()
        continue
    h = b""
    while not h.endswith(b"\r\n\r\n"):
        h += read(c, 1)
    c.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
    while True:
        a = read(c, 2)
        n = a[1] & 127
        m, d = read(c, 4), read(c, n)
        c.sendall(bytes([a[0], n]) + bytes(x ^ m[i % 4] for i, x in enumerate(d)))
"#;

/// Result of one stream.
struct Outcome {
    /// Lines or messages.
    count: u32,
    /// Longest time without any.
    stall: Duration,
}

/// Opens the streams, does the work, and checks each of them.
pub(crate) fn run_through(node: &Booted, id: &str, work: impl FnOnce()) {
    let count = std::env::var(COUNT).ok().and_then(|text| text.parse().ok());
    let count: usize = count.unwrap_or(COUNT_USUAL);
    let mut server = node.command(&[CLI, "exec", id, "--", "python3", "-c", SERVER]);
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nsenter");
    let knock = "import socket; socket.create_connection((\"127.0.0.1\", 9000)).close()";
    let knocks = || node.run(&[CLI, "exec", id, "--", "python3", "-c", knock]).0 == Some(0);
    assert!((0..UNTIL).any(|_| knocks() || wait()), "the server in the sandbox does not start");
    let url = node.ok(&[CLI, "expose", id, "9000", "--public"]);
    let host = url.lines().find_map(|line| line.strip_prefix("https://")).expect("an address");
    let host = host.trim_end_matches('/').to_owned();

    let (started, starts) = channel();
    let commands: Vec<_> = (0..count)
        .map(|_| {
            let started = started.clone();
            let mut command = node.command(&[CLI, "exec", id, "--", "sh", "-c", COUNTER]);
            let child = command.stderr(Stdio::inherit()).spawn().expect("nsenter");
            thread::spawn(move || follow(child, &started))
        })
        .collect();
    let stop = Arc::new(AtomicBool::new(false));
    let sockets: Vec<_> =
        (0..count).map(|_| node.connect(CADDY.parse().expect("an address"))).collect();
    let echoes = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || echo_all(sockets, &host, &stop, &started))
    };

    for _ in 0..2 * count {
        starts.recv_timeout(ECHO).expect("every stream starts");
    }
    work();
    stop.store(true, Ordering::Release);
    node.ok(&[CLI, "exec", id, "--", "touch", "/tmp/stop"]);
    let commands: Vec<_> = commands.into_iter().map(|one| one.join().expect("complete")).collect();
    let echoes = echoes.join().expect("complete");
    for (kind, outcomes) in [("commands", &commands), ("WebSockets", &echoes)] {
        let stall = outcomes.iter().map(|one| one.stall).max().unwrap_or_default();
        let (least, all) = (outcomes.iter().map(|one| one.count).min(), outcomes.len());
        println!("{all} {kind}, {least:?} lines or more each; longest silence {stall:?}");
        assert!(least.is_some_and(|least| least > 20), "{kind} hardly ran");
    }
    node.ok(&[CLI, "exec", id, "--", "rm", "/tmp/stop"]);
    drop(server.kill());
    drop(server.wait());
}

/// Reads a counter to its end, which must have come in order, each number once.
fn follow(mut child: Child, started: &Sender<()>) -> Outcome {
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let (mut count, mut stall, mut last, mut ended) = (0, Duration::ZERO, None, false);
    for line in lines {
        let (line, now) = (line.expect("text"), Instant::now());
        stall = stall.max(last.map_or(Duration::ZERO, |last| now.duration_since(last)));
        last = Some(now);
        assert!(!ended, "{line} after the end");
        if line == format!("end {count}") {
            ended = true;
            continue;
        }
        if count == 0 {
            started.send(()).expect("somebody waits");
        }
        count += 1;
        assert_eq!(line, count.to_string(), "a line is lost or doubled");
    }
    let status = child.wait().expect("it ends");
    assert!(status.success() && ended, "{status:?} after {count} lines");
    Outcome { count, stall }
}

fn echo_all(
    sockets: Vec<TcpStream>,
    host: &str,
    stop: &Arc<AtomicBool>,
    started: &Sender<()>,
) -> Vec<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let start =
            |socket| tokio::spawn(echo(socket, host.to_owned(), Arc::clone(stop), started.clone()));
        let tasks: Vec<_> = sockets.into_iter().map(start).collect();
        let mut outcomes = Vec::new();
        for task in tasks {
            outcomes.push(task.await.expect("complete"));
        }
        outcomes
    })
}

/// Sends numbers over a WebSocket; each must come back once, and nothing else.
async fn echo(
    stream: TcpStream,
    host: String,
    stop: Arc<AtomicBool>,
    started: Sender<()>,
) -> Outcome {
    stream.set_nonblocking(true).expect("set");
    let stream = tokio::net::TcpStream::from_std(stream).expect("registered");
    let mut request = format!("ws://{host}/").into_client_request().expect("a request");
    request.headers_mut().insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static(KEY));
    let opened = tokio_tungstenite::client_async(request, stream).await;
    let (mut socket, _) = opened.expect("a WebSocket through Caddy");
    let (mut count, mut stall) = (0_u32, Duration::ZERO);
    while !stop.load(Ordering::Acquire) {
        count += 1;
        let (message, begun) = (Message::text(count.to_string()), Instant::now());
        socket.send(message.clone()).await.expect("sent");
        let back = timeout(ECHO, socket.next()).await.expect("in time").expect("it is open");
        assert_eq!(back.expect("a message"), message, "a message is lost or doubled");
        stall = stall.max(begun.elapsed());
        if count == 1 {
            started.send(()).expect("somebody waits");
        }
        sleep(PACE).await;
    }
    let more = timeout(PACE, socket.next()).await;
    assert!(more.is_err(), "a message is doubled: {more:?}");
    Outcome { count, stall }
}
