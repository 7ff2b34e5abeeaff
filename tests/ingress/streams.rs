//! Answers that go on: events that arrive one by one, and gRPC with its trailers. `tests/browser` shows the same with
//! real applications.

use std::{net::SocketAddr, time::Duration};

use agent::ingress::{Owner, version::Generation};
use proto::agent::v1::{
    SetNamesRequest, SetNamesResponse,
    name_service_client::NameServiceClient,
    name_service_server::{NameService, NameServiceServer},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Code, Request, Response, Status,
    transport::{Endpoint, Server, server::TcpIncoming},
};

use crate::{
    http::Head,
    node::{Node, at, generation, host, need_caddy},
    peers::{Pki, two},
};

/// Longest wait for one event.
const DEADLINE: Duration = Duration::from_secs(15);

/// Serves one stream of events; each is sent when the test says so.
async fn serve_ticks(listener: TcpListener, mut next: mpsc::Receiver<()>) {
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut stream = BufReader::new(stream);
        // The agent's probe says nothing.
        let Ok(Some(_)) = Head::read(&mut stream).await else { continue };
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
                    Transfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.expect("sent");
        let mut number = 0;
        while next.recv().await.is_some() {
            let event = format!("data: tick {number}\n\n");
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await.expect("sent");
            number += 1;
        }
        stream.write_all(b"0\r\n\r\n").await.expect("sent");
        return;
    }
}

/// Reads until there is this line.
async fn read_line(stream: &mut BufReader<TcpStream>, expected: &str) {
    let read = async {
        loop {
            let mut line = String::new();
            let length = stream.read_line(&mut line).await.expect("readable");
            assert!(length > 0, "the stream ended before {expected:?}");
            if line.trim_end() == expected {
                return;
            }
        }
    };
    timeout(DEADLINE, read).await.unwrap_or_else(|_| panic!("{expected:?} was kept back"));
}

/// Opens the stream of events of a sandbox through a Caddy. An event is sent only when the one before has arrived, so
/// one that is kept back never comes.
async fn assert_not_kept_back(caddy: SocketAddr, number: u32, address: SocketAddr) {
    let listener = TcpListener::bind(address).await.expect("a free address");
    let (tell, next) = mpsc::channel(1);
    let _server = AbortOnDropHandle::new(tokio::spawn(serve_ticks(listener, next)));
    let mut stream = BufReader::new(TcpStream::connect(caddy).await.expect("connected"));
    let host = host(address.port(), number);
    let request =
        format!("GET /events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    tell.send(()).await.expect("it listens");
    let head = timeout(DEADLINE, Head::read(&mut stream)).await.expect("in time");
    let head = head.expect("readable").expect("an answer");
    assert!(head.line.starts_with("HTTP/1.1 200 "), "{head:?}");
    assert_eq!(head.get("content-type"), Some("text/event-stream"));
    for tick in 0..5 {
        read_line(&mut stream, &format!("data: tick {tick}")).await;
        tell.send(()).await.expect("it listens");
    }
    drop(tell);
    // The last chunk: the end is passed on, too.
    read_line(&mut stream, "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_one_by_one_also_over_a_hop() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let (near, far) = (at(10, 8000), at(11, 8000));
    owner.put(100_001, near);
    owner.put(100_002, far);
    edge.table.elsewhere(100_002, Owner::Peer(owner.peer));
    assert_not_kept_back(owner.public, 100_001, near).await;
    assert_not_kept_back(edge.public, 100_002, far).await;
}

/// A small service of gRPC in a sandbox. Which one it is does not matter.
#[derive(Debug)]
struct Names;

#[tonic::async_trait]
impl NameService for Names {
    async fn set_names(
        &self,
        request: Request<SetNamesRequest>,
    ) -> Result<Response<SetNamesResponse>, Status> {
        match request.into_inner().epoch {
            0 => Err(Status::failed_precondition("no epoch")),
            epoch => Ok(Response::new(SetNamesResponse { digest: epoch })),
        }
    }
}

/// The status of an answer with a body is in its trailers: without them the client has no answer. `make test-ingress`
/// runs this on the newest Caddy alone.
#[tokio::test(flavor = "multi_thread")]
async fn grpc_passes_with_its_trailers_also_over_a_hop_on_a_caddy_with_a_route_for_it() {
    need_caddy!();
    if generation() != Generation::Fixed {
        eprintln!("skipped: this Caddy has no route for gRPC");
        return;
    }
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let address = at(10, 8000);
    owner.put(100_001, address);
    edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    let incoming = TcpIncoming::bind(address).expect("a free address");
    let server = Server::builder().add_service(NameServiceServer::new(Names));
    let _server = AbortOnDropHandle::new(tokio::spawn(server.serve_with_incoming(incoming)));
    for node in [&owner, &edge] {
        assert_serves_grpc(node).await;
    }
}

async fn assert_serves_grpc(node: &Node) {
    let origin = format!("http://{}", host(8000, 100_001)).parse().expect("a URI");
    let endpoint = Endpoint::from_shared(format!("http://{}", node.public)).expect("a URI");
    let endpoint = endpoint.origin(origin).timeout(DEADLINE);
    let mut client = NameServiceClient::new(endpoint.connect().await.expect("connected"));
    for epoch in 1..=3 {
        let asked = SetNamesRequest { epoch, ..SetNamesRequest::default() };
        let answer = client.set_names(asked).await.expect("an answer");
        assert_eq!(answer.into_inner().digest, epoch);
    }
    let refused = client.set_names(SetNamesRequest::default()).await.expect_err("no epoch");
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "no epoch"));
}
