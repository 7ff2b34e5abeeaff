//! Byte streams to servers inside sandboxes.

use bytes::Bytes;
use futures_util::stream;
use proto::{Reason, sandbox::v1::*};
use tokio_stream::StreamExt as _;

use super::*;
use crate::node::fake::counted;

type Message = forward_request::Message;
type Said = forward_response::Message;

fn open(id: &str, port: u32) -> ForwardRequest {
    let tcp = ForwardTcp { port, ..ForwardTcp::default() };
    let target = Some(forward_open::Target::Tcp(tcp));
    message(Message::Open(ForwardOpen { id: id.into(), target }))
}

fn message(message: Message) -> ForwardRequest {
    ForwardRequest { message: Some(message) }
}

fn data(bytes: &[u8]) -> ForwardRequest {
    message(Message::Data(Bytes::copy_from_slice(bytes)))
}

async fn heard(mut answer: tonic::Streaming<ForwardResponse>) -> (Vec<u8>, bool, Option<Reason>) {
    let (mut bytes, mut eof) = (Vec::new(), false);
    while let Some(said) = answer.next().await {
        match said.map(|said| said.message.expect("a message")) {
            Ok(Said::Opened(opened)) => assert_eq!(opened.boot, 1),
            Ok(Said::Data(data)) => bytes.extend_from_slice(&data),
            Ok(Said::Eof(over)) => eof |= over,
            Err(status) => return (bytes, eof, daemon::status::reason(&status)),
        }
    }
    (bytes, eof, None)
}

#[tokio::test(start_paused = true)]
async fn bytes_go_both_ways_and_each_half_ends_apart() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let text = counted(1_000_000);
    for explicit in [true, false] {
        let parts = text.chunks(70_000).map(data);
        let end = explicit.then(|| message(Message::Eof(true)));
        let all: Vec<_> = [open(&sandbox.id, 7)].into_iter().chain(parts).chain(end).collect();
        let answer = lab.api().forward(stream::iter(all)).await.expect("open").into_inner();
        let (bytes, eof, error) = heard(answer).await;
        assert!(bytes == text && eof && error.is_none(), "{explicit}: {} {error:?}", bytes.len());
    }
}

#[tokio::test(start_paused = true)]
async fn large_messages_are_cut_for_the_node_and_empty_ones_are_not_passed_on() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let nothing = (0..20).flat_map(|_| [data(b""), message(Message::Eof(false))]);
    let all = [open(&sandbox.id, 7)].into_iter().chain(nothing).chain([data(&[7; 200_000])]);
    let input = stream::iter(all.collect::<Vec<_>>());
    let mut answer = lab.api().forward(input).await.expect("open").into_inner();
    let mut sizes = Vec::new();
    // The server returns each message as it comes.
    while let Some(said) = answer.next().await {
        if let Some(Said::Data(data)) = said.expect("no error").message {
            sizes.push(data.len());
        }
    }
    assert_eq!(sizes, [64 * 1024, 64 * 1024, 64 * 1024, 3392]);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_typed_and_another_team_finds_nothing() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let blue = token(&lab.store, "blue", "sandbox").await;
    let refused = async |mut api: Api, first: ForwardRequest| {
        let input = stream::iter([first]).chain(stream::pending());
        reason(api.forward(input).await)
    };
    let id = &sandbox.id;
    assert_eq!(refused(lab.api(), open(id, 81)).await, Reason::NotListening);
    assert_eq!(refused(lab.api(), open(id, 70_000)).await, Reason::FieldInvalid);
    assert_eq!(refused(lab.api(), data(b"x")).await, Reason::FieldInvalid);
    assert_eq!(refused(lab.api_as(&blue), open(id, 7)).await, Reason::SandboxNotFound);
    let path = Some(forward_open::Target::UnixPath("run/x".into()));
    let relative = message(Message::Open(ForwardOpen { id: id.clone(), target: path }));
    assert_eq!(refused(lab.api(), relative).await, Reason::FieldInvalid);
    let listen = ForwardListenRequest { id: id.clone(), port: 80 };
    assert_eq!(reason(lab.api_as(&blue).forward_listen(listen).await), Reason::SandboxNotFound);
    let ask = ListPortsRequest { id: id.clone() };
    assert_eq!(reason(lab.api_as(&blue).list_ports(ask).await), Reason::SandboxNotFound);

    let input = stream::iter([open(id, 22), data(b"x")]).chain(stream::pending());
    let answer = lab.api().forward(input).await.expect("open").into_inner();
    assert_eq!(heard(answer).await.2, Some(Reason::ForwardLost), "the server broke it off");
    let input = stream::iter([open(id, 7), open(id, 7)]).chain(stream::pending());
    let answer = lab.api().forward(input).await.expect("open").into_inner();
    assert_eq!(heard(answer).await.2, Some(Reason::FieldInvalid), "it is open already");
}

#[tokio::test(start_paused = true)]
async fn lost_node_ends_a_forward_with_an_error() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let input = stream::iter([open(&sandbox.id, 9)]).chain(stream::pending());
    let mut answer = lab.api().forward(input).await.expect("open").into_inner();
    answer.next().await.expect("a message").expect("open");
    let beat = answer.next().await.expect("a message").expect("alive");
    assert_eq!(beat.message, Some(Said::Data(Bytes::new())), "no silence of more than 20 s");
    let agent = lab.holder(&sandbox.id);
    lab.net.cut(agent.name());
    assert_eq!(heard(answer).await.2, Some(Reason::ForwardLost));
}

#[tokio::test(start_paused = true)]
async fn reader_that_stands_still_holds_up_nobody_else() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let mut api = lab.api();
    let mut stalled = Vec::new();
    for port in [19, 19, 9, 9] {
        let bytes = stream::repeat_with(|| data(&[0; 64 * 1024]));
        let input = stream::iter([open(&sandbox.id, port)]).chain(bytes);
        stalled.push(api.forward(input).await.expect("open"));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let text = counted(300_000);
    let many: Vec<_> = (0..64)
        .map(|_| {
            let (mut api, id, text) = (lab.api(), sandbox.id.clone(), text.clone());
            tokio::spawn(async move {
                let parts = text.chunks(60_000).map(data);
                let all: Vec<_> = [open(&id, 7)].into_iter().chain(parts).collect();
                let answer = api.forward(stream::iter(all)).await.expect("open").into_inner();
                assert!(heard(answer).await.0 == text);
            })
        })
        .collect();
    for one in many {
        let done = tokio::time::timeout(Duration::from_secs(5), one).await;
        done.expect("in time").expect("no panic");
    }
    drop(stalled);
}

#[tokio::test(start_paused = true)]
async fn forward_ends_when_its_answer_is_dropped() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let sandboxes = &lab.controller.as_ref().expect("a controller").sandboxes;
    let team = "red".parse().expect("a team");
    let forward = async |port: u32| {
        let tcp = ForwardTcp { port, ..ForwardTcp::default() };
        let target = Some(forward_open::Target::Tcp(tcp));
        let open = ForwardOpen { id: sandbox.id.clone(), target };
        sandboxes.forward(&team, open, stream::pending()).await
    };
    // A server that takes nothing and says nothing: only the drop ends it.
    let mut held = Vec::new();
    for _ in 0..128 {
        held.push(forward(9).await.expect("open"));
    }
    assert_eq!(forward(9).await.expect_err("full").reason, Reason::TooManyCalls);
    drop(held);
    tokio::time::sleep(Duration::from_secs(5)).await;
    forward(9).await.expect("all were given back");
}

#[tokio::test(start_paused = true)]
async fn listening_ports_tell_their_services() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (id, name) = (sandbox.id.clone(), "web".to_owned());
    let expose = ExposeHttpServiceRequest { id, name, port: 8000, ..Default::default() };
    lab.api().expose_http_service(expose).await.expect("open");
    let ask = ListPortsRequest { id: sandbox.id.clone() };
    let ports = lab.api().list_ports(ask).await.expect("listed").into_inner().ports;
    let told: Vec<_> =
        ports.iter().map(|port| (port.port, port.address.as_str(), port.services.len())).collect();
    assert_eq!(told, [(7, "127.0.0.1", 0), (8000, "0.0.0.0", 1)]);
    assert!(ports[1].services[0].url.contains("8000"), "{ports:?}");
    let listen = ForwardListenRequest { id: sandbox.id, port: 80 };
    let mut heard = lab.api().forward_listen(listen).await.expect("listens").into_inner();
    let first = heard.next().await.expect("a message").expect("listens").message;
    assert!(matches!(first, Some(forward_listen_response::Message::Listening(_))), "{first:?}");
    let beat = heard.next().await.expect("a message").expect("alive").message;
    assert_eq!(beat, Some(forward_listen_response::Message::Heartbeat(true)));
}
