//! Streams that are open while the agent is replaced: commands that write, and WebSockets through Caddy. What of
//! them is lost or doubled is counted, with the longest silence.

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

use super::{
    booted::Booted,
    steps::{CLI, until},
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

/// Notes that it was started, counts until it is told to stop, and says how far it came.
const COUNTER: &str = "echo started >>/tmp/starts; \
    i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo $i; sleep 0.1; done; echo end $i";

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

/// Losses and delays of all streams.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    /// Bytes that did not arrive.
    pub(crate) lost: usize,
    /// Commands that were started twice, and lines or messages that came twice.
    pub(crate) doubled: usize,
    /// Longest time without a line or an echo.
    pub(crate) stall: Duration,
}

/// Result of one stream.
#[derive(Debug, Default)]
struct Stream {
    /// Lines or messages that arrived.
    count: u32,
    /// Bytes of those that did not.
    lost: usize,
    /// Number of those that came more than once.
    doubled: usize,
    /// Longest time without any.
    stall: Duration,
}

/// Returns the usual number of streams of each kind, or the one that the environment says.
pub(crate) fn wanted() -> usize {
    let count = std::env::var(COUNT).ok().and_then(|text| text.parse().ok());
    count.unwrap_or(COUNT_USUAL)
}

/// Opens so many streams of each kind, in the sandboxes in turn, does the work, and counts what became of
/// them.
pub(crate) fn run_through(
    node: &Booted,
    ids: &[String],
    count: usize,
    work: impl FnOnce(),
) -> Outcome {
    let servers: Vec<_> = ids.iter().map(|id| serve(node, id)).collect();
    let (started, starts) = channel();
    let commands: Vec<_> = ids
        .iter()
        .cycle()
        .take(count)
        .map(|id| {
            let started = started.clone();
            let mut command = node.command(&[CLI, "exec", id, "--", "sh", "-c", COUNTER]);
            let child = command.stderr(Stdio::inherit()).spawn().expect("nsenter");
            thread::spawn(move || follow(child, &started))
        })
        .collect();
    let stop = Arc::new(AtomicBool::new(false));
    let hosts = servers.iter().map(|(_, host)| host.clone()).cycle().take(count);
    let sockets: Vec<_> =
        hosts.map(|host| (node.connect(CADDY.parse().expect("an address")), host)).collect();
    let echoes = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || echo_all(sockets, &stop, &started))
    };

    for _ in 0..2 * count {
        starts.recv_timeout(ECHO).expect("every stream starts");
    }
    work();
    stop.store(true, Ordering::Release);
    for id in ids {
        node.ok(&[CLI, "exec", id, "--", "touch", "/tmp/stop"]);
    }
    let commands: Vec<_> = commands.into_iter().map(|one| one.join().expect("complete")).collect();
    let echoes = echoes.join().expect("complete");
    let mut all = Outcome::default();
    for (kind, streams) in [("commands", &commands), ("WebSockets", &echoes)] {
        let stall = streams.iter().map(|one| one.stall).max().unwrap_or_default();
        let (least, number) = (streams.iter().map(|one| one.count).min(), streams.len());
        println!("{number} {kind}, {least:?} lines or more each; longest silence {stall:?}");
        assert!(least.is_some_and(|least| least > 20), "{kind} hardly ran");
        all.lost += streams.iter().map(|one| one.lost).sum::<usize>();
        all.doubled += streams.iter().map(|one| one.doubled).sum::<usize>();
        all.stall = all.stall.max(stall);
    }
    let mut started = 0;
    for id in ids {
        let told = node.ok(&[CLI, "exec", id, "--", "cat", "/tmp/starts"]);
        started += told.lines().count();
        node.ok(&[CLI, "exec", id, "--", "rm", "/tmp/stop", "/tmp/starts"]);
    }
    assert!(started >= count, "{started} of {count} commands were started");
    all.doubled += started - count;
    for (mut server, _) in servers {
        drop(server.kill());
        drop(server.wait());
    }
    all
}

/// Starts the server in a sandbox, and exposes it; returns the client that holds it, and its host name.
fn serve(node: &Booted, id: &str) -> (Child, String) {
    let mut server = node.command(&[CLI, "exec", id, "--", "python3", "-c", SERVER]);
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nsenter");
    let knock = "import socket; socket.create_connection((\"127.0.0.1\", 9000)).close()";
    let knocks = || node.run(&[CLI, "exec", id, "--", "python3", "-c", knock]);
    until("the server in the sandbox", || knocks().1, || knocks().0 == Some(0));
    let url = node.ok(&[CLI, "expose", id, "9000", "--public"]);
    let host = url.lines().find_map(|line| line.strip_prefix("https://")).expect("an address");
    (server, host.trim_end_matches('/').to_owned())
}

/// Reads a counter to its end. Each number is to come once, in order.
fn follow(mut child: Child, started: &Sender<()>) -> Stream {
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let (mut stream, mut last, mut reached, mut end) = (Stream::default(), None, 0, None);
    for line in lines {
        let (line, now) = (line.expect("text"), Instant::now());
        let silence = last.map_or(Duration::ZERO, |last| now.duration_since(last));
        stream.stall = stream.stall.max(silence);
        last = Some(now);
        assert!(end.is_none(), "{line} after the end");
        if let Some(number) = line.strip_prefix("end ") {
            end = Some(number.parse().expect("a number"));
            continue;
        }
        if stream.count == 0 {
            started.send(()).expect("somebody waits");
        }
        stream.arrived(&mut reached, line.parse().expect("a number"));
    }
    let status = child.wait().expect("it ends");
    assert!(status.success(), "{status:?} after {} lines", stream.count);
    let end = end.expect("it says how far it came");
    stream.missed(reached, end);
    stream
}

impl Stream {
    /// Counts a line; `reached` is the last number before it.
    fn arrived(&mut self, reached: &mut u32, number: u32) {
        self.count += 1;
        if number <= *reached {
            self.doubled += 1;
            return;
        }
        self.missed(*reached, number - 1);
        *reached = number;
    }

    /// Counts the lines after the first number, up to the second.
    fn missed(&mut self, reached: u32, end: u32) {
        let lines = (reached.saturating_add(1)..=end).map(|number| number.to_string().len() + 1);
        self.lost += lines.sum::<usize>();
    }
}

#[test]
fn lost_and_doubled_lines_are_counted() {
    let mut stream = Stream::default();
    let mut reached = 0;
    for number in [1, 2, 2, 3, 7, 6, 8] {
        stream.arrived(&mut reached, number);
    }
    stream.missed(reached, 10);
    // 4, 5 and 6 with a line end each, the late 6 counts as doubled; then 9 and 10.
    assert_eq!((stream.count, stream.lost, stream.doubled), (7, 6 + 5, 2));
}

fn echo_all(
    sockets: Vec<(TcpStream, String)>,
    stop: &Arc<AtomicBool>,
    started: &Sender<()>,
) -> Vec<Stream> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let start =
            |(socket, host)| tokio::spawn(echo(socket, host, Arc::clone(stop), started.clone()));
        let tasks: Vec<_> = sockets.into_iter().map(start).collect();
        let mut outcomes = Vec::new();
        for task in tasks {
            outcomes.push(task.await.expect("complete"));
        }
        outcomes
    })
}

/// Sends numbers over a WebSocket; each is to come back once, and nothing else.
async fn echo(
    stream: TcpStream,
    host: String,
    stop: Arc<AtomicBool>,
    started: Sender<()>,
) -> Stream {
    stream.set_nonblocking(true).expect("set");
    let stream = tokio::net::TcpStream::from_std(stream).expect("registered");
    let mut request = format!("ws://{host}/").into_client_request().expect("a request");
    request.headers_mut().insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static(KEY));
    let opened = tokio_tungstenite::client_async(request, stream).await;
    let (mut socket, _) = opened.expect("a WebSocket through Caddy");
    let (mut echoes, mut reached, mut sent) = (Stream::default(), 0, 0);
    while !stop.load(Ordering::Acquire) {
        sent += 1;
        let begun = Instant::now();
        // A cut connection ends the stream: what was on its way is lost.
        if socket.send(Message::text(sent.to_string())).await.is_err() {
            break;
        }
        let Ok(Some(Ok(back))) = timeout(ECHO, socket.next()).await else { break };
        let number = back.to_text().ok().and_then(|text| text.parse().ok());
        echoes.arrived(&mut reached, number.expect("an echo and nothing else"));
        echoes.stall = echoes.stall.max(begun.elapsed());
        if sent == 1 {
            started.send(()).expect("somebody waits");
        }
        sleep(PACE).await;
    }
    echoes.missed(reached, sent);
    while let Ok(Some(Ok(_))) = timeout(PACE, socket.next()).await {
        echoes.doubled += 1;
    }
    echoes
}
