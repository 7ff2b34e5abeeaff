//! Forwards to servers in the sandbox, with OpenSSH's client and with one that shows how a channel ends.

use russh::{
    ChannelMsg, Disconnect,
    client::{self, Handle},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::*;

/// Client that trusts any server, and refuses channels that it opens.
pub(super) struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _: russh::Channel<client::Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: client::ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), Self::Error> {
        reply.reject(russh::ChannelOpenFailure::ConnectFailed).await;
        Ok(())
    }
}

fn config() -> Arc<client::Config> {
    Arc::new(client::Config { nodelay: true, ..client::Config::default() })
}

/// Connects with a client of this process.
pub(super) async fn connect(door: &Door) -> Handle<Trusting> {
    client::connect(config(), door.address, Trusting).await.expect("connected")
}

/// Logs in with a client of this process.
pub(super) async fn log_in(door: &Door) -> Handle<Trusting> {
    authenticated(door, connect(door).await).await
}

async fn authenticated(door: &Door, mut client: Handle<Trusting>) -> Handle<Trusting> {
    let key = PrivateKeyWithHashAlg::new(Arc::new(key(1)), None);
    let answer = client.authenticate_publickey(&door.id, key).await.expect("answered");
    assert!(answer.success());
    client
}

/// Bytes that a stream in memory holds.
const ROOM: usize = 256 * 1024;

/// Opens a stream in memory to the server, which time that is paused does not overtake.
pub(super) fn dial(door: &Door) -> tokio::io::DuplexStream {
    let settings = ssh::Settings { host: String::new(), port: 0, connections_max: 64 };
    let controller = door.lab.controller.as_ref().expect("a controller");
    let (near, far) = tokio::io::duplex(ROOM);
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    tokio::spawn(controller.ssh(key(99), &settings).serve_one(near, peer));
    far
}

/// Connects over a stream in memory, without a login.
pub(super) async fn connect_nearby(door: &Door) -> Handle<Trusting> {
    client::connect_stream(config(), dial(door), Trusting).await.expect("connected")
}

/// Logs in over streams in memory. With the token the client vanishes without a word: the streams stay open, and
/// nobody reads or writes them any more.
async fn log_in_nearby(door: &Door) -> (Handle<Trusting>, CancellationToken) {
    let mut far = dial(door);
    let (stream, mut own) = tokio::io::duplex(ROOM);
    let vanished = CancellationToken::new();
    let vanishes = vanished.clone();
    tokio::spawn(async move {
        let both = tokio::io::copy_bidirectional(&mut own, &mut far);
        if vanishes.run_until_cancelled(both).await.is_none() {
            std::future::pending::<()>().await;
        }
    });
    let client = client::connect_stream(config(), stream, Trusting).await.expect("connected");
    (authenticated(door, client).await, vanished)
}

#[tokio::test(flavor = "multi_thread")]
async fn forwards_end_in_the_sandbox_alone() {
    let door = Door::open().await;
    for target in ["10.0.0.1:80", "metadata.internal:80", "localhost:0"] {
        let refused = output(door.ssh(1, &door.id).args(["-W", target])).await;
        assert!(!refused.status.success(), "{target}");
    }
    let ran = output(door.ssh(1, &door.id).args(["-A", "-X"]).arg("echo in")).await;
    assert_eq!(text(&ran.stdout), "in\n", "agent and X11 are refused, and the session goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_that_breaks_off_has_no_end_of_its_bytes() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    // 22 breaks off after the first bytes; 7 says them back, and ends.
    for (port, is_whole) in [(22, false), (7, true)] {
        let opened = client.channel_open_direct_tcpip("localhost", port, "127.0.0.1", 1).await;
        let mut channel = opened.expect("open");
        channel.data_bytes("hello").await.expect("sent");
        if is_whole {
            channel.eof().await.expect("sent");
        }
        let mut told_end = false;
        let to_the_end = async {
            while let Some(message) = channel.wait().await {
                told_end |= matches!(message, ChannelMsg::Eof);
                if matches!(message, ChannelMsg::Close) {
                    break;
                }
            }
        };
        timeout(STEP, to_the_end).await.expect("closed in time");
        assert_eq!(told_end, is_whole, "port {port}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_goes_without_an_end_breaks_the_connection_off() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    let broken = || door.lab.holder(&door.id).broken_off();
    let open = async || {
        let opened = client.channel_open_direct_tcpip("localhost", 7, "127.0.0.1", 1).await;
        let mut channel = opened.expect("open");
        channel.data_bytes("hello").await.expect("sent");
        while !matches!(channel.wait().await.expect("open"), ChannelMsg::Data { .. }) {}
        channel
    };
    let whole = open().await;
    whole.eof().await.expect("sent");
    whole.close().await.expect("sent");
    assert_eq!(broken(), 0);
    open().await.close().await.expect("sent");
    until("the break", || async { broken() == 1 }).await;
    let _open = open().await;
    client.disconnect(Disconnect::ByApplication, "", "").await.expect("sent");
    until("the end of the connection", || async { broken() == 2 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_and_sockets_of_the_sandbox_are_reached() {
    let door = Door::open().await;
    // The fake's servers: 7 echoes, and so does every socket; nothing listens on 81.
    for host in ["localhost", "127.0.0.1", door.id.as_str()] {
        let mut ssh = door.ssh(1, &door.id);
        let child = ssh.arg("-W").arg(format!("{host}:7")).stdin(Stdio::piped()).spawn();
        let mut child = child.expect("ssh");
        let mut stdin = child.stdin.take().expect("one");
        stdin.write_all(b"hello").await.expect("sent");
        drop(stdin);
        let ended = timeout(STEP, child.wait_with_output()).await.expect("in time").expect("ended");
        assert_eq!(text(&ended.stdout), "hello", "{host}: {}", text(&ended.stderr));
    }
    let closed = output(door.ssh(1, &door.id).args(["-W", "localhost:81"])).await;
    assert!(!closed.status.success());
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let near = free.local_addr().expect("an address");
    drop(free);
    let socket = door.path("near");
    let mut ssh = door.ssh(1, &door.id);
    ssh.arg("-N").arg("-L").arg(format!("{near}:localhost:7"));
    let _listens = ssh.arg("-L").arg(format!("{}:/run/x", socket.display())).spawn().expect("ssh");
    until("the port", || async { echoes(TcpStream::connect(near).await).await }).await;
    until("the socket", || async { echoes(UnixStream::connect(&socket).await).await }).await;
    // Many at once, beside one whose server never stops writing.
    let mut unread = door.ssh(1, &door.id);
    let _unread = unread.args(["-W", "localhost:19"]).spawn().expect("ssh");
    let many = (0..20).map(|_| async { echoes(TcpStream::connect(near).await).await });
    assert!(futures_util::future::join_all(many).await.into_iter().all(|echoed| echoed));
}

#[tokio::test(start_paused = true)]
async fn listener_of_a_client_that_vanishes_without_a_word_ends_in_time() {
    let door = Door::open().await;
    let (client, vanished) = log_in_nearby(&door).await;
    client.tcpip_forward("localhost", 9001).await.expect("listens");
    let agent = door.lab.holder(&door.id);
    // A client that says nothing is asked, and answers.
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!client.is_closed());
    assert_eq!(agent.listened(&door.id), [9001]);
    assert!(door.lab.usage("red").await.streams > 0);

    vanished.cancel();
    let ends = async {
        while !agent.listened(&door.id).is_empty() || door.lab.usage("red").await.streams > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    // Four times 30 s, and what the node takes to notice.
    timeout(Duration::from_secs(150), ends).await.expect("it ends in time");
}

#[tokio::test(start_paused = true)]
async fn channel_that_its_client_has_closed_ends_though_the_server_takes_nothing() {
    let door = Door::open().await;
    let (client, _vanished) = log_in_nearby(&door).await;
    // The fake's server on 9 takes nothing, and never ends.
    let opened = client.channel_open_direct_tcpip("localhost", 9, "127.0.0.1", 1).await;
    let channel = opened.expect("open");
    let second = Duration::from_secs(1);
    let send = || timeout(second, channel.data_bytes(vec![7; 32 * 1024]));
    while matches!(send().await, Ok(Ok(()))) {}
    assert_eq!(door.lab.usage("red").await.streams, 1);
    channel.close().await.expect("sent");
    let ends = async {
        while door.lab.usage("red").await.streams > 0 {
            tokio::time::sleep(second).await;
        }
    };
    timeout(Duration::from_secs(90), ends).await.expect("it ends in time");
    assert!(!client.is_closed(), "the connection goes on");
}

#[tokio::test(start_paused = true)]
async fn so_many_connections_to_a_listener_wait_for_a_place_and_no_more() {
    let door = Door::open().await;
    let (client, _vanished) = log_in_nearby(&door).await;
    client.tcpip_forward("localhost", 9001).await.expect("listens");
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(client.channel_open_session().await.expect("open"));
    }
    let agent = door.lab.holder(&door.id);
    let dial = || agent.dial(&door.id, 9001).expect("connected");
    let _programs: Vec<_> = (0..70).map(|_| dial()).collect();
    // All of them are told meanwhile, and wait for no longer than 25 s.
    tokio::time::sleep(Duration::from_secs(5)).await;
    for channel in open {
        channel.close().await.expect("sent");
    }
    // This client refuses every channel, and so the connection.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(agent.broken_off(), 64, "the others were not taken");
}
