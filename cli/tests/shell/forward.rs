//! Tests of `port-forward` and `port ls`.

use std::{
    collections::BTreeSet,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::{
    Reason,
    sandbox::v1::{
        forward_listen_response as listened, forward_open::Target, forward_request::Message as In,
        forward_response::Message as Out, *,
    },
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStderr, ChildStdout},
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use crate::fake::{Behaviour, Fake, ID, refuse};

/// Connections of the flood.
const FLOOD: u64 = 1000;
/// Longest wait of a test for one thing.
const DEADLINE: Duration = Duration::from_secs(30);

/// Listeners of the fake.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    /// Whether the first one tells of [`FLOOD`] connections at once, and is lost then.
    flood: bool,
    /// Whether they end as those do whose access is revoked.
    revoked: bool,
    /// Number of listeners so far.
    listened: AtomicU32,
    /// Lets the second one of a flood tell of one more connection.
    more: Arc<Notify>,
    /// Connections that were taken.
    taken: Mutex<BTreeSet<u64>>,
}

/// Plays servers of the fake's sandbox: 7 and all other targets echo, 22 breaks off after its first bytes, and
/// nothing listens on 81.
pub(crate) async fn serve(
    listeners: &Listeners,
    mut input: Streaming<ForwardRequest>,
) -> Result<ReceiverStream<Result<ForwardResponse, Status>>, Status> {
    let first = input.message().await?.and_then(|first| first.message);
    let Some(In::Open(ForwardOpen { target, .. })) = first else { panic!("no open: {first:?}") };
    let port = match target {
        Some(Target::Tcp(tcp)) => tcp.port,
        Some(Target::Accepted(accepted)) => {
            listeners.taken.lock().expect("no panic").insert(accepted.connection);
            7
        }
        _ => 7,
    };
    if port == 81 {
        return Err(refuse(Reason::NotListening));
    }
    let (out, messages) = mpsc::channel(4);
    let say = |message| Ok(ForwardResponse { message: Some(message) });
    tokio::spawn(async move {
        out.send(say(Out::Opened(ForwardOpened::default()))).await.ok();
        while let Ok(message) = input.message().await {
            let answer = match message.and_then(|message| message.message) {
                Some(In::Data(_)) if port == 22 => Err(refuse(Reason::ForwardLost)),
                Some(In::Data(data)) => say(Out::Data(data)),
                _ => say(Out::Eof(true)),
            };
            let over = !matches!(&answer, Ok(said) if matches!(said.message, Some(Out::Data(_))));
            if out.send(answer).await.is_err() || over {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(messages))
}

/// Listens, and accepts one connection, or as many as `listeners` says.
pub(crate) fn listen(
    listeners: &Listeners,
) -> impl Stream<Item = Result<ForwardListenResponse, Status>> + Send + use<> {
    let Listeners { flood, revoked, listened, more, .. } = listeners;
    let is_first = listened.fetch_add(1, Ordering::SeqCst) == 0;
    let listener = "0".repeat(32);
    let say = |message| Ok(ForwardListenResponse { message: Some(message) });
    let listening = ForwardListening { listener: listener.clone(), ..Default::default() };
    let accepted = move |connection| {
        say(listened::Message::Accepted(ForwardAccepted { listener: listener.clone(), connection }))
    };
    let mut messages = vec![say(listened::Message::Listening(listening))];
    let mut later = None;
    match (*revoked, *flood) {
        (true, _) => messages.push(Err(refuse(Reason::ForwardRefused))),
        (_, true) if is_first => {
            messages.extend((1..=FLOOD).map(accepted));
            messages.push(Err(refuse(Reason::ForwardLost)));
        }
        (_, true) => later = Some((more.clone(), accepted(FLOOD + 1))),
        _ => messages.push(accepted(1)),
    }
    let later = futures_util::stream::once(async move {
        let Some((more, message)) = later else { return std::future::pending().await };
        more.notified().await;
        message
    });
    tokio_stream::iter(messages).chain(later).chain(tokio_stream::pending())
}

/// Running `port-forward`.
struct Forwarding {
    child: Child,
    out: Lines<BufReader<ChildStdout>>,
    err: Lines<BufReader<ChildStderr>>,
}

impl Forwarding {
    fn start(fake: &Fake, args: &[&str]) -> Self {
        let mut command = fake.command(args);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("started");
        let out = BufReader::new(child.stdout.take().expect("piped")).lines();
        let err = BufReader::new(child.stderr.take().expect("piped")).lines();
        Self { child, out, err }
    }

    async fn line(&mut self) -> String {
        self.out.next_line().await.expect("read").expect("a line")
    }

    /// Address that the next forward listens on.
    async fn address(&mut self) -> String {
        let line = self.line().await;
        line.split(' ').nth(1).expect("an address").to_owned()
    }

    /// Ends it as Ctrl-C does; returns its exit code.
    async fn interrupt(mut self) -> Option<i32> {
        let pid = i32::try_from(self.child.id().expect("it runs")).expect("a pid");
        kill(Pid::from_raw(pid), Signal::SIGINT).expect("signalled");
        self.child.wait().await.expect("ended").code()
    }
}

#[tokio::test]
async fn many_connections_are_forwarded_and_a_refused_one_ends_nothing() {
    let fake = Fake::start(Behaviour::default()).await;
    let args = ["port-forward", ID, ":7", ":81", ":22", ":/run/app.sock"];
    let mut forwarding = Forwarding::start(&fake, &args);
    let mut addresses = Vec::new();
    for _ in 0..4 {
        addresses.push(forwarding.address().await);
    }
    let text: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let echo = |address: String, text: Vec<u8>| async move {
        let (mut read, mut write) =
            TcpStream::connect(address).await.expect("connected").into_split();
        let sent = async {
            write.write_all(&text).await.expect("sent");
            write.shutdown().await.expect("ended");
        };
        let mut back = Vec::new();
        let ((), got) = tokio::join!(sent, read.read_to_end(&mut back));
        got.expect("an end, and no reset");
        assert!(back == text, "{} bytes", back.len());
    };
    let many = (0..32).map(|_| tokio::spawn(echo(addresses[0].clone(), text.clone())));
    for one in many.collect::<Vec<_>>() {
        one.await.expect("no panic");
    }
    echo(addresses[3].clone(), b"through a socket".to_vec()).await;

    let mut refused = TcpStream::connect(&addresses[1]).await.expect("accepted here");
    refused.read(&mut [0]).await.expect_err("a reset");
    let said = forwarding.err.next_line().await.expect("read").expect("a line");
    assert!(said.contains(&format!("{ID}:81")), "{said}");
    let mut broken = TcpStream::connect(&addresses[2]).await.expect("accepted here");
    broken.write_all(b"x").await.expect("sent");
    broken.read(&mut [0]).await.expect_err("a reset, which is no end");
    assert!(forwarding.err.next_line().await.expect("read").is_some(), "it is said");
    echo(addresses[0].clone(), b"it goes on".to_vec()).await;
    assert_eq!(forwarding.interrupt().await, Some(130));
}

#[tokio::test]
async fn reverse_forward_connects_to_this_machine() {
    let fake = Fake::start(Behaviour::default()).await;
    let here = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = here.local_addr().expect("bound").port();
    let forward = format!("{port}:8080");
    let mut forwarding =
        Forwarding::start(&fake, &["--json", "port-forward", ID, &forward, "--reverse"]);
    let told: Value = serde_json::from_str(&forwarding.line().await).expect("JSON");
    assert_eq!(told["from"], format!("{ID}:8080"));
    assert_eq!(told["to"], format!("127.0.0.1:{port}"));
    let (mut stream, _) = here.accept().await.expect("connected");
    stream.write_all(b"hello").await.expect("sent");
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.expect("echoed");
    assert_eq!(&back, b"hello");
    assert_eq!(forwarding.interrupt().await, Some(130));
}

#[tokio::test]
async fn sandbox_that_tells_of_many_connections_at_once_has_a_bounded_part_of_them_served() {
    let listeners = Listeners { flood: true, ..Listeners::default() };
    let fake = Fake::start(Behaviour { listeners, ..Behaviour::default() }).await;
    let here = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let forward = format!("{}:8080", here.local_addr().expect("bound").port());
    let mut forwarding = Forwarding::start(&fake, &["port-forward", ID, &forward, "--reverse"]);
    forwarding.line().await;
    let serve = async |connections: usize| {
        let mut open = Vec::new();
        while open.len() < connections {
            open.push(timeout(DEADLINE, here.accept()).await.expect("in time").expect("accepted"));
        }
        open
    };
    let first = serve(128).await;
    // By now all of them were told.
    let said = timeout(DEADLINE, forwarding.err.next_line()).await.expect("in time");
    let said = said.expect("read").expect("a line");
    assert!(said.contains("listening again"), "{said}");
    drop(first);
    // Those that have waited.
    drop(serve(64).await);
    fake.behaviour.listeners.more.notify_one();
    drop(serve(1).await);
    let taken = fake.behaviour.listeners.taken.lock().expect("no panic").clone();
    assert_eq!((taken.len(), taken.last()), (128 + 64 + 1, Some(&(FLOOD + 1))));
    assert_eq!(forwarding.interrupt().await, Some(130));
}

#[tokio::test]
async fn reverse_forward_whose_access_is_revoked_ends_and_does_not_listen_again() {
    let listeners = Listeners { revoked: true, ..Listeners::default() };
    let fake = Fake::start(Behaviour { listeners, ..Behaviour::default() }).await;
    let ran = fake.run(&["port-forward", ID, "8080:80", "--reverse"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(!ran.stderr.contains("listening again"), "{ran:?}");
    assert_eq!(fake.behaviour.listeners.listened.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn stdin_and_stdout_can_be_the_connection() {
    let fake = Fake::start(Behaviour::default()).await;
    let ran = fake.run_with(&["port-forward", ID, "-", "7"], b"ping").await;
    assert_eq!((ran.code, ran.text()), (Some(0), "ping"), "{ran:?}");
    let ran = fake.run_with(&["port-forward", ID, "-", "81"], b"").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for wrong in [&["port-forward", ID, "7", "-"][..], &["port-forward", ID, ":80", "--reverse"]] {
        assert_eq!(fake.run(wrong).await.code, Some(2), "{wrong:?}");
    }
    assert_eq!(fake.run(&["port-forward", "100404", ":7"]).await.code, Some(3), "no such sandbox");
}

#[tokio::test]
async fn listening_ports_are_listed() {
    let fake = Fake::start(Behaviour::default()).await;
    let list = fake.run(&["port", "ls", ID, "--json"]).await.json();
    assert_eq!(list[0]["address"], "127.0.0.1");
    assert_eq!((&list[0]["open"], &list[1]["services"][0]["name"]), (&false.into(), &"web".into()));
    let table = fake.run(&["port", "ls", ID]).await;
    let text = table.text();
    assert!(text.contains("PORT") && text.contains("web"), "{text}");
}
