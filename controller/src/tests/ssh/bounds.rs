//! Bounds of one connection.

use russh::ChannelMsg;

use super::{forwards::log_in, *};
use crate::ssh::KEPT_MAX;

#[tokio::test(flavor = "multi_thread")]
async fn connection_ends_after_so_many_channels_that_the_server_closed_first() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    for _ in 0..KEPT_MAX {
        let mut channel = client.channel_open_session().await.expect("open");
        // It is no text, and so refused: the server is the first to close.
        channel.exec(false, [0xff]).await.expect("sent");
        while !matches!(channel.wait().await.expect("open"), ChannelMsg::Close) {}
    }
    // It ends by itself, once the place of the last one is free.
    until("the end of the connection", || async { client.is_closed() }).await;
    client.channel_open_session().await.map(drop).expect_err("too many");
    let again = log_in(&door).await;
    again.channel_open_session().await.expect("another connection has its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_has_so_many_channels_and_listeners_at_once() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    let mut open = Vec::new();
    let refused = loop {
        match client.channel_open_session().await {
            Ok(channel) => open.push(channel),
            Err(refused) => break refused,
        }
    };
    assert_eq!(open.len(), 64, "{refused}");
    drop(open);
    let client = log_in(&door).await;
    for port in 9001..=9016 {
        client.tcpip_forward("localhost", port).await.expect("listens");
    }
    client.tcpip_forward("localhost", 9017).await.expect_err("too many");
    client.tcpip_forward("x".repeat(256), 9017).await.expect_err("no address");
    client.cancel_tcpip_forward("localhost", 9001).await.expect("ended");
    client.cancel_tcpip_forward("localhost", 9001).await.expect_err("it has ended already");
    client.cancel_tcpip_forward("elsewhere", 9002).await.expect_err("not its address");
    client.tcpip_forward("localhost", 9017).await.expect("there is room again");
    // The node notices later that one has ended.
    let agent = door.lab.holder(&door.id);
    until("as many listeners", || async { agent.listened(&door.id).len() == 16 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_and_their_connections_count_as_streams_of_the_team() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    door.lab.set_limits("red", "streams=2", &["limits.streams"]).await.expect("set");
    client.tcpip_forward("localhost", 9001).await.expect("listens");
    client.tcpip_forward("localhost", 9002).await.expect("listens");
    client.tcpip_forward("localhost", 9003).await.expect_err("too many streams");
    let opened = client.channel_open_direct_tcpip("localhost", 7, "127.0.0.1", 1).await;
    opened.map(drop).expect_err("too many streams");
    client.cancel_tcpip_forward("localhost", 9001).await.expect("ended");
    let listens = || async { client.tcpip_forward("localhost", 9003).await.is_ok() };
    until("room", listens).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_to_a_listener_waits_for_a_place() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    client.tcpip_forward("localhost", 9001).await.expect("listens");
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(client.channel_open_session().await.expect("open"));
    }
    let mut program = door.lab.holder(&door.id).dial(&door.id, 9001).expect("connected");
    let mut rest = Vec::new();
    let early = timeout(Duration::from_millis(300), program.read_to_end(&mut rest)).await;
    early.expect_err("all places are taken");
    open.pop().expect("one").close().await.expect("sent");
    // This client refuses every channel, and so the connection.
    timeout(STEP, program.read_to_end(&mut rest)).await.expect("in time").expect("an end");
}

#[tokio::test(flavor = "multi_thread")]
async fn port_of_a_cancelled_listener_is_free_for_its_connection_at_once() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    for _ in 0..20 {
        client.tcpip_forward("localhost", 9001).await.expect("listens");
        client.cancel_tcpip_forward("localhost", 9001).await.expect("ended");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_and_each_of_its_connections_are_audited() {
    let (lab, _log) = audit::lab().await;
    let door = Door::of(lab).await;
    let client = log_in(&door).await;
    client.tcpip_forward("localhost", 9001).await.expect("listens");
    client.tcpip_forward("localhost", 9001).await.expect_err("the port is taken");
    let agent = door.lab.holder(&door.id);
    // This client refuses every channel, and so the connection.
    let mut program = agent.dial(&door.id, 9001).expect("connected");
    let mut rest = Vec::new();
    timeout(STEP, program.read_to_end(&mut rest)).await.expect("in time").expect("an end");
    client.cancel_tcpip_forward("localhost", 9001).await.expect("ended");
    let ends = async || {
        door.lab.audit.flush().await;
        let mut lines = door.lab.calls().await;
        lines.retain(|line| {
            line.record.kind == daemon::audit::Kind::Call && line.record.sandbox == door.id
        });
        let told = lines.into_iter().map(|line| (line.record.method, line.record.reason));
        let mut told: Vec<_> = told.filter(|(method, _)| method.starts_with("SshF")).collect();
        told.sort();
        told
    };
    let entry = |method: &str, reason: &str| (method.to_owned(), reason.to_owned());
    let expected = [
        entry("SshForward", "NOT_LISTENING"),
        entry("SshForwardListen", ""),
        entry("SshForwardListen", "FORWARD_REFUSED"),
    ];
    until("the entries", || async { ends().await == expected }).await;
}
