//! Byte streams to servers, and listeners: with the real shim and helper. The servers are tasks of the test.

use std::{net::SocketAddr, sync::atomic::Ordering};

use proto::{
    forward::{Host, Target},
    name::Port,
    visibility::Visibility,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
    task::JoinSet,
};

use super::{
    super::forward::{Forward, Piece, Pieces},
    *,
};
use crate::sandbox::access::expose::Reach;

type To = mpsc::Sender<Piece>;

fn tcp(port: u16) -> Target {
    Target::Tcp(Host::Any, Port::try_from(u32::from(port)).expect("a port"))
}

impl Rig {
    async fn forward(&self, target: Target) -> Result<(To, Pieces), Error> {
        let (to, input) = mpsc::channel(4);
        let forward = self.execs.forward(&SandboxRef::Id(id(1)), target, input).await;
        forward.map(|Forward { pieces, .. }| (to, pieces))
    }
}

/// Listens on a loopback address, and serves each connection with `serve`.
async fn server<F>(address: &str, serve: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(address).await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    port
}

/// Returns what was sent, once the caller's half has ended.
async fn echo(mut stream: TcpStream) {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("read");
    stream.write_all(&all).await.expect("written");
}

/// Reads up to the end; the last piece or error comes with the bytes.
async fn read(pieces: &mut Pieces) -> (Vec<u8>, bool, Option<Error>) {
    let (mut bytes, mut eof) = (Vec::new(), false);
    loop {
        match timeout(DEADLINE, pieces.next()).await.expect("in time").expect("an end") {
            Ok(Piece::Data(data)) => bytes.extend_from_slice(&data),
            Ok(Piece::Eof) => eof = true,
            Ok(Piece::End) => return (bytes, eof, None),
            Err(error) => return (bytes, eof, Some(error)),
        }
    }
}

#[tokio::test]
async fn bytes_arrive_in_order_and_each_half_ends_apart() {
    let rig = Rig::new().await;
    let port = server("127.0.0.1:0", echo).await;
    let mut seed = 7_u32;
    for size in [0, 1, 70_000, 3_000_000] {
        let text: Vec<u8> = (0..size).map(|n: u32| (n ^ (n >> 9)).to_le_bytes()[0]).collect();
        let (to, mut pieces) = rig.forward(tcp(port)).await.expect("open");
        let sent = async {
            let mut rest = Bytes::from(text.clone());
            while !rest.is_empty() {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let length = 1 + usize::try_from(seed >> 16).expect("small");
                let piece = rest.split_to(rest.len().min(length));
                to.send(Piece::Data(piece)).await.expect("taken");
            }
            to.send(Piece::Eof).await.expect("taken");
        };
        let ((), (bytes, eof, error)) = tokio::join!(sent, read(&mut pieces));
        assert!(bytes == text && eof && error.is_none(), "{size}: {} {error:?}", bytes.len());
    }
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn servers_on_loopback_addresses_and_unix_sockets_are_reached() {
    let rig = Rig::new().await;
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("server.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let greets = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accepted");
        stream.write_all(b"hello").await.expect("written");
    });
    let unix = Target::Unix(path.display().to_string());
    let (to, mut pieces) = rig.forward(unix.clone()).await.expect("open");
    greets.await.expect("no panic");
    to.send(Piece::Eof).await.expect("taken");
    assert_eq!(read(&mut pieces).await, (b"hello".to_vec(), true, None));

    let nothing = rig.forward(unix).await.map(drop).expect_err("the listener has gone");
    assert_eq!(nothing.reason, Reason::NotListening);
    assert!(nothing.message.contains("server.sock"), "{nothing}");
    let port = server("[::1]:0", echo).await;
    drop(rig.forward(tcp(port)).await.expect("::1 is tried, too"));
    let free = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = free.local_addr().expect("bound").port();
    drop(free);
    let nothing = rig.forward(tcp(port)).await.map(drop).expect_err("nobody listens");
    assert_eq!(nothing.reason, Reason::NotListening);
    assert!(nothing.message.contains(&format!("port {port}")), "{nothing}");
    let elsewhere = Host::Address([10, 0, 0, 1].into());
    let target = Target::Tcp(elsewhere, Port::try_from(80).expect("a port"));
    let refused = rig.forward(target).await.map(drop).expect_err("not the sandbox's own");
    assert_eq!(refused.reason, Reason::FieldInvalid);
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn reader_that_stands_still_holds_up_nobody_else() {
    let rig = Rig::new().await;
    let floods = server("127.0.0.1:0", |mut stream| async move {
        // Until the connection is closed.
        while stream.write_all(&[0; 65_536]).await.is_ok() {}
    });
    let floods = floods.await;
    let deaf = server("127.0.0.1:0", |stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    });
    let deaf = deaf.await;
    let unread = rig.forward(tcp(floods)).await.expect("open");
    let (to, _unheard) = rig.forward(tcp(deaf)).await.expect("open");
    let stuffed = async {
        loop {
            to.send(Piece::Data(vec![0; 65_536].into())).await.expect("taken");
        }
    };
    timeout(Duration::from_millis(500), stuffed).await.expect_err("it is not endless");

    let port = server("127.0.0.1:0", echo).await;
    let rig = Arc::new(rig);
    let mut all = JoinSet::new();
    for number in 0..64_u8 {
        let rig = Arc::clone(&rig);
        all.spawn(async move {
            let (to, mut pieces) = rig.forward(tcp(port)).await.expect("open");
            to.send(Piece::Data(vec![number; 50_000].into())).await.expect("taken");
            to.send(Piece::Eof).await.expect("taken");
            let (bytes, ..) = read(&mut pieces).await;
            assert!(bytes == vec![number; 50_000], "{number}");
        });
    }
    while let Some(done) = all.join_next().await {
        done.expect("no panic");
    }
    assert_eq!(rig.run(argv(&["true"])).await.code(), 0);
    // The stalled ones go as soon as their callers do.
    drop((unread, to, _unheard));
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn end_of_the_caller_ends_the_connection_inside() {
    let rig = Rig::new().await;
    let (told, mut ends) = mpsc::channel(1);
    let port = server("127.0.0.1:0", move |mut stream| {
        let told = told.clone();
        async move {
            let mut byte = [0];
            let end = stream.read(&mut byte).await;
            told.send(end.map_or(true, |read| read == 0)).await.ok();
        }
    });
    let (_to, pieces) = rig.forward(tcp(port.await)).await.expect("open");
    let inactive = rig.execs.inactive(&SandboxRef::Id(id(1))).await.expect("asked");
    assert!(inactive.is_some(), "it counts while bytes pass");
    assert!(rig.execs.list(&SandboxRef::Id(id(1))).await.expect("asked").is_empty());
    drop(pieces);
    assert_eq!(timeout(DEADLINE, ends.recv()).await.expect("in time"), Some(true));
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn revocation_of_a_port_ends_its_forwards_and_no_others() {
    let rig = Rig::new().await;
    let (told, mut ends) = mpsc::channel(1);
    let own = server("127.0.0.1:0", move |mut stream| {
        let told = told.clone();
        async move {
            let end = stream.read(&mut [0]).await;
            told.send(end.map_or(true, |read| read == 0)).await.ok();
        }
    });
    let (own, other) = (own.await, server("127.0.0.1:0", echo).await);
    let revoke = async || rig.sandboxes.revoke_access(&id(1), own.to_string()).await;
    let nothing = revoke().await.expect_err("the port is not open, and no forward leads to it");
    assert_eq!(nothing.reason, Reason::ServiceNotFound);

    let (_to, mut pieces) = rig.forward(tcp(own)).await.expect("open");
    let (to, mut others) = rig.forward(tcp(other)).await.expect("open");
    let (_, port) = revoke().await.expect("revoked");
    assert_eq!(port.get(), own);
    let error = read(&mut pieces).await.2.expect("an error");
    assert_eq!(error.reason, Reason::ForwardLost);
    assert!(error.message.contains("revoked"), "{error}");
    assert_eq!(timeout(DEADLINE, ends.recv()).await.expect("in time"), Some(true), "inside, too");
    to.send(Piece::Data("on".into())).await.expect("taken");
    to.send(Piece::Eof).await.expect("taken");
    assert_eq!(read(&mut others).await, (b"on".to_vec(), true, None));
    revoke().await.expect_err("it has ended");
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn hide_of_a_port_ends_its_forwards_and_a_new_one_is_possible() {
    let rig = Rig::new().await;
    let (own, other) = (server("127.0.0.1:0", echo).await, server("127.0.0.1:0", echo).await);
    let name = || "web".parse().expect("a name");
    let port = Port::try_from(u32::from(own)).expect("a port");
    let reach = |wanted| Reach { wanted: Some(wanted), default: Visibility::Team };
    let expose = async |wanted| rig.sandboxes.expose(&id(1), name(), port, reach(wanted)).await;
    expose(Visibility::Team).await.expect("open");
    let (to, mut pieces) = rig.forward(tcp(own)).await.expect("open");
    let (to_other, mut others) = rig.forward(tcp(other)).await.expect("open");
    expose(Visibility::Private).await.expect("changed");
    to.send(Piece::Data("on".into())).await.expect("another visibility is about HTTP");
    let early = timeout(Duration::from_millis(200), pieces.next()).await;
    early.expect_err("the server says nothing before the end, and nothing is cut");
    rig.sandboxes.hide(&id(1), name()).await.expect("hidden");
    let error = read(&mut pieces).await.2.expect("an error");
    assert_eq!(error.reason, Reason::ForwardLost, "{error}");
    to_other.send(Piece::Eof).await.expect("taken");
    assert_eq!(read(&mut others).await, (Vec::new(), true, None), "another port");
    let (to, mut pieces) = rig.forward(tcp(own)).await.expect("the caller may still do that");
    to.send(Piece::Eof).await.expect("taken");
    assert_eq!(read(&mut pieces).await, (Vec::new(), true, None));
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn revocation_of_a_port_ends_its_listener_and_what_it_has_accepted() {
    let rig = Rig::new().await;
    let free = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address: SocketAddr = free.local_addr().expect("bound");
    drop(free);
    let port = Port::try_from(u32::from(address.port())).expect("a port");
    let (name, Forward { mut pieces, .. }) =
        rig.execs.listen(&SandboxRef::Id(id(1)), port).await.expect("it listens");
    let [mut taken, mut waiting] =
        [TcpStream::connect(address).await, TcpStream::connect(address).await]
            .map(|connected| connected.expect("accepted"));
    let mut told = Vec::new();
    while told.len() < 16 {
        match timeout(DEADLINE, pieces.next()).await.expect("in time").expect("a piece") {
            Ok(Piece::Data(numbers)) => told.extend_from_slice(&numbers),
            other => panic!("{other:?}"),
        }
    }
    let (_to, mut bytes) = rig.forward(Target::Accepted(name.clone(), 1)).await.expect("taken");
    rig.sandboxes.revoke_access(&id(1), port.to_string()).await.expect("revoked");
    let error = read(&mut bytes).await.2.expect("an error");
    assert_eq!(error.reason, Reason::ForwardLost, "{error}");
    let error = read(&mut pieces).await.2.expect("an error");
    assert_eq!(error.reason, Reason::ForwardRefused, "callers do not listen again: {error}");
    let refused = rig.forward(Target::Accepted(name, 2)).await.map(drop).expect_err("cut");
    assert_eq!(refused.reason, Reason::NotListening);
    for program in [&mut taken, &mut waiting] {
        let end = timeout(DEADLINE, program.read(&mut [0])).await.expect("in time");
        assert!(end.map_or(true, |read| read == 0), "the programs inside see an end");
    }
    rig.until_no_place_is_taken().await;
    // A new one is possible, once the process of this one has gone.
    let begun = Instant::now();
    while rig.execs.listen(&SandboxRef::Id(id(1)), port).await.is_err() {
        assert!(begun.elapsed() < DEADLINE, "the port is taken");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn connection_that_breaks_ends_with_an_error() {
    let rig = Rig::new().await;
    let resets = server("127.0.0.1:0", |stream| async move {
        // A close with unread bytes is a reset.
        stream.peek(&mut [0]).await.expect("they came");
    });
    let (to, mut pieces) = rig.forward(tcp(resets.await)).await.expect("open");
    to.send(Piece::Data("x".into())).await.expect("taken");
    let (.., error) = read(&mut pieces).await;
    assert_eq!(error.map(|error| error.reason), Some(Reason::ForwardLost), "the server");

    let waits = server("127.0.0.1:0", |stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    });
    let port = waits.await;
    let (_to, mut pieces) = rig.forward(tcp(port)).await.expect("open");
    rig.signal_helpers(nix::libc::SIGKILL);
    let (.., error) = read(&mut pieces).await;
    assert_eq!(error.map(|error| error.reason), Some(Reason::ForwardLost), "the helper");

    let (_to, mut pieces) = rig.forward(tcp(port)).await.expect("open");
    let (_too, mut others) = rig.forward(tcp(port)).await.expect("open");
    rig.shims.serving.lock().expect("no panic").iter().for_each(|shim| shim.abort());
    rig.signal_helpers(nix::libc::SIGKILL);
    for pieces in [&mut pieces, &mut others] {
        let (.., error) = read(pieces).await;
        assert_eq!(error.map(|error| error.reason), Some(Reason::ForwardLost), "all of it");
    }
}

#[tokio::test]
async fn answer_of_a_server_that_reads_no_more_still_arrives() {
    let rig = Rig::new().await;
    let refuses = server("127.0.0.1:0", |mut stream| async move {
        stream.read_exact(&mut [0; 10]).await.expect("read");
        stream.write_all(b"too large").await.expect("written");
    });
    let (to, mut pieces) = rig.forward(tcp(refuses.await)).await.expect("open");
    to.send(Piece::Data(vec![0; 10].into())).await.expect("taken");
    let first = timeout(DEADLINE, pieces.next()).await.expect("in time").expect("a piece");
    assert_eq!(first, Ok(Piece::Data("too large".into())));
    // It has gone, so the answer to more is a reset.
    drop(to.send(Piece::Data(vec![0; 60_000].into())).await);
    let (_, eof, error) = read(&mut pieces).await;
    let message = error.map(|error| error.message).unwrap_or_default();
    assert!(eof && message.contains("broke the connection off"), "{eof} {message}");
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn agent_that_stops_tells_so() {
    let rig = Rig::new().await;
    let waits = server("127.0.0.1:0", |stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    });
    let (_to, mut pieces) = rig.forward(tcp(waits.await)).await.expect("open");
    rig.tasks.stopping().cancel();
    let error = read(&mut pieces).await.2.expect("an error");
    assert_eq!(error.reason, Reason::ForwardLost);
    assert!(error.message.contains("open it again"), "{error}");
}

#[tokio::test]
async fn programs_inside_connect_to_a_listener() {
    let rig = Rig::new().await;
    let free = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address: SocketAddr = free.local_addr().expect("bound");
    let sandbox = SandboxRef::Id(id(1));
    let port = Port::try_from(u32::from(address.port())).expect("a port");
    let taken = rig.execs.listen(&sandbox, port).await.map(drop).expect_err("it is taken");
    assert_eq!(taken.reason, Reason::ForwardRefused);
    drop(free);
    let (name, Forward { mut pieces, .. }) =
        rig.execs.listen(&sandbox, port).await.expect("it listens");
    for number in 1..=3_u64 {
        let mut program = TcpStream::connect(address).await.expect("accepted");
        let told = timeout(DEADLINE, pieces.next()).await.expect("in time");
        let told = told.expect("a piece").expect("no error");
        assert_eq!(told, Piece::Data(Bytes::copy_from_slice(&number.to_le_bytes())));
        let accepted = Target::Accepted(name.clone(), number);
        let (to, mut bytes) = rig.forward(accepted.clone()).await.expect("taken");
        let twice = rig.forward(accepted).await.map(drop).expect_err("taken already");
        assert_eq!(twice.reason, Reason::NotListening);
        program.write_all(b"from inside").await.expect("sent");
        program.shutdown().await.expect("ended");
        to.send(Piece::Eof).await.expect("sent");
        assert_eq!(read(&mut bytes).await, (b"from inside".to_vec(), true, None));
    }
    let other = Target::Accepted("0".repeat(32), 1);
    let unknown = rig.forward(other).await.map(drop).expect_err("no such listener");
    assert_eq!(unknown.reason, Reason::NotListening);
    drop(pieces);
    let begun = Instant::now();
    while TcpStream::connect(address).await.is_ok() {
        assert!(begun.elapsed() < DEADLINE, "it listens for nobody");
        sleep(Duration::from_millis(20)).await;
    }
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn shim_from_before_forwards_is_told_from_one_that_has_gone() {
    let rig = Rig::new().await;
    let socket = rig.shims.dir.path().join("1.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    let answers = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let answering = Arc::clone(&answers);
    tokio::spawn(async move {
        use futures_util::{SinkExt as _, StreamExt as _};
        use prost::Message as _;
        while let Ok((stream, _)) = listener.accept().await {
            let codec = tokio_util::codec::LengthDelimitedCodec::new();
            let mut frames = tokio_util::codec::Framed::new(stream, codec);
            let Some(Ok(frame)) = frames.next().await else { continue };
            let ask = wire::Request::decode(frame.freeze()).expect("a request");
            let lists = matches!(ask.message, Some(request::Message::List(_)));
            if lists && answering.load(Ordering::Relaxed) {
                let list = response::Message::Execs(Default::default());
                let answer = wire::Response { message: Some(list) };
                frames.send(Bytes::from(answer.encode_to_vec())).await.expect("sent");
            }
        }
    });
    let refused = rig.forward(tcp(80)).await.map(drop).expect_err("too old");
    assert_eq!(refused.reason, Reason::ForwardRefused);
    assert!(refused.message.contains("older version"), "{refused}");
    answers.store(false, Ordering::Relaxed);
    let gone = rig.forward(tcp(80)).await.map(drop).expect_err("gone");
    assert_eq!(gone.reason, Reason::ExecFailed);
}
