//! Forwards to servers in the sandbox, with OpenSSH's client and with one that shows how a channel ends.

use russh::{
    ChannelMsg, Disconnect,
    client::{self, Handle},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use tokio::net::UnixStream;

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

/// Logs in with a client of this process.
pub(super) async fn log_in(door: &Door) -> Handle<Trusting> {
    let config = Arc::new(client::Config { nodelay: true, ..client::Config::default() });
    let mut client = client::connect(config, door.address, Trusting).await.expect("connected");
    let key = PrivateKeyWithHashAlg::new(Arc::new(key(1)), None);
    let answer = client.authenticate_publickey(&door.id, key).await.expect("answered");
    assert!(answer.success());
    client
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
