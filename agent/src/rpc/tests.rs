//! Tests of the service over in-memory streams, with a fake PVE and an in-memory journal, in paused
//! time.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use daemon::{channel, flow::Leg, status as wire_status};
use proto::{
    Reason,
    agent::v1::{self as wire, agent_service_client::AgentServiceClient, watch_response::Message},
    sandbox::v1::{self as public, Phase},
};
use tokio::{
    io::{DuplexStream, ReadBuf},
    sync::{mpsc, watch as watched},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::io::InspectWriter;
use tonic::{Code, transport::Channel};

use super::*;
use crate::{
    load::HostLoad,
    sandbox::{
        drift::garbage::Item,
        exec::{outputs::Commands, shims::NoShims},
        tests::{LONG, Node, id},
    },
};

/// Server end of an in-memory stream whose peer is `1`.
struct Conn(DuplexStream, Peer);

impl Connected for Conn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.1.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

pub(crate) type Client = AgentServiceClient<Channel>;

fn execs(node: &Node) -> Execs {
    Execs::new(Arc::clone(&node.sandboxes), Arc::new(NoShims))
}

#[derive(Debug)]
struct NoGarbage;

#[async_trait::async_trait]
impl Garbage for NoGarbage {
    async fn look(&self) -> Vec<Item> {
        Vec::new()
    }

    fn collect(&self) {}
}

fn rpc(node: &Node) -> Rpc {
    service(&node.sandboxes, execs(node))
}

/// Creates the service of these sandboxes and their commands.
pub(crate) fn service(sandboxes: &Arc<Sandboxes>, execs: Execs) -> Rpc {
    let (_, host) = watched::channel(HostLoad { cores: 2.0, ..HostLoad::default() });
    let reporter = Reporter::new(Arc::clone(sandboxes), host);
    Rpc::new(Arc::clone(sandboxes), execs, reporter, Arc::new(NoGarbage))
}

/// Serves the node to one peer.
fn serve(node: &Node, peer: Peer) -> Client {
    serve_counted(rpc(node), node.tasks.stopping().clone(), (peer, Arc::default()))
}

/// Serves to one peer, and counts the bytes that it sends.
pub(crate) fn serve_counted(
    rpc: Rpc,
    stop: CancellationToken,
    (peer, sent): (Peer, Arc<AtomicU64>),
) -> Client {
    let (sender, incoming) = mpsc::channel::<io::Result<Conn>>(4);
    tokio::spawn(async move {
        rpc.serve(ReceiverStream::new(incoming), stop).await.expect("serves");
    });
    AgentServiceClient::new(channel::over(Leg::Agent, move || {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let (sender, peer, sent) = (sender.clone(), peer.clone(), Arc::clone(&sent));
        async move {
            sender.send(Ok(Conn(theirs, peer))).await.map_err(io::Error::other)?;
            Ok(InspectWriter::new(ours, move |bytes: &[u8]| {
                sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }))
        }
    }))
}

fn create(number: u8) -> wire::CreateSandboxRequest {
    wire::CreateSandboxRequest {
        epoch: 1,
        sandbox_id: id(number).to_string(),
        team: "acme".into(),
        request_id: format!("r-{number}"),
        body_digest: "0".repeat(64),
        attempt: 1,
        spec: Some(public::CreateSandboxRequest {
            request_id: format!("r-{number}"),
            snapshot_id: "base".into(),
            ..Default::default()
        }),
        wait: None,
        port_rules: None,
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: Reason) {
    let status = answer.expect_err(reason.name());
    let found = wire_status::reason(&status);
    assert_eq!((status.code(), found), (code, Some(reason)), "{status:?}");
    assert!(!status.message().is_empty());
}

#[tokio::test(start_paused = true)]
async fn failing_journal_does_not_end_a_creation_under_way() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    client.create_sandbox(create(1)).await.expect("begun");
    node.journal.fail(Some("no space left on device"));
    // Another controller: its epoch cannot be written.
    let of_next = |number| wire::CreateSandboxRequest { epoch: 2, ..create(number) };
    let held = client.create_sandbox(of_next(1)).await;
    refused(held, Code::DeadlineExceeded, Reason::OutcomeUnknown);
    refused(client.create_sandbox(of_next(2)).await, Code::Internal, Reason::StoreFailed);
    node.journal.fail(None);
    client.create_sandbox(of_next(1)).await.expect("the same");
}

#[tokio::test(start_paused = true)]
async fn only_the_controller_may_call_the_agent() {
    let node = Node::new().await;
    let client = daemon::peer::Client { token: "0123456789ab".into(), key: [0; 32] };
    let agent = Peer::Agent("node2".parse().expect("valid"));
    for peer in [Peer::Anonymous, agent, Peer::Client(client)] {
        let mut client = serve(&node, peer);
        let answer = client.get_load(wire::GetLoadRequest {}).await;
        refused(answer, Code::PermissionDenied, Reason::ScopeMissing);
    }
}

#[tokio::test(start_paused = true)]
async fn snapshot_is_reported_with_the_disk_of_its_template() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    let answer = client.get_load(wire::GetLoadRequest {}).await.expect("answers").into_inner();
    let load = answer.load.expect("a load");
    assert_eq!((load.snapshots.len(), load.snapshot_sizes.len()), (1, 1));
    assert_eq!(load.snapshot_sizes[0].disk_gib, 2, "as the template's config says");
    // It stays what was asked for: nothing.
    let made = client.create_sandbox(create(1)).await.expect("made").into_inner();
    let size = made.sandbox.and_then(|sandbox| sandbox.size).expect("a size");
    assert_eq!(size.disk_gib, 0);
}

#[tokio::test(start_paused = true)]
async fn sandbox_is_created_found_listed_and_deleted() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    let hello = client.hello(wire::HelloRequest { epoch: 7 }).await.expect("answers").into_inner();
    assert_eq!((hello.node.as_str(), hello.epoch, hello.members.len()), ("node1", 7, 2));
    assert_eq!((hello.vmid_first, hello.vmid_last), (100_000, 100_099));
    let request = wire::CreateSandboxRequest { epoch: 7, ..create(1) };
    let made = client.create_sandbox(request).await.expect("made").into_inner();
    let sandbox = made.sandbox.expect("set");
    assert_eq!((sandbox.phase(), sandbox.progress()), (Phase::Running, public::Progress::Done));
    assert_eq!(made.load.map(|load| (load.running, load.vmids_free)), Some((1, 99)));
    for name in [sandbox.id.clone(), "100000".into(), "cmux-100000".into()] {
        let found = client.get_sandbox(wire::GetSandboxRequest { id: name }).await;
        assert_eq!(found.expect("found").into_inner().sandbox.as_ref(), Some(&sandbox));
    }
    let list = client.list_sandboxes(wire::ListSandboxesRequest::default()).await.expect("lists");
    assert_eq!(list.into_inner().sandboxes.len(), 1);
    let check = client.check(wire::CheckRequest {}).await.expect("checks").into_inner();
    assert_eq!((check.findings, check.sandboxes), (vec![], 1));
    let delete = wire::DeleteSandboxRequest { epoch: 7, id: sandbox.id, wait: None };
    let gone = client.delete_sandbox(delete).await.expect("deleted").into_inner();
    assert_eq!(gone.sandbox.map(|sandbox| sandbox.phase()), Some(Phase::Deleted));
}

#[tokio::test(start_paused = true)]
async fn invalid_request_gets_a_code_and_a_reason() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    client.hello(wire::HelloRequest { epoch: 7 }).await.expect("answers");
    refused(client.create_sandbox(create(1)).await, Code::Aborted, Reason::StaleEpoch);
    let unfenced = wire::CreateSandboxRequest { epoch: 0, ..create(1) };
    refused(client.create_sandbox(unfenced).await, Code::InvalidArgument, Reason::FieldInvalid);
    let bad = wire::CreateSandboxRequest { epoch: 7, team: "a\nb".into(), ..create(1) };
    refused(client.create_sandbox(bad).await, Code::InvalidArgument, Reason::FieldInvalid);
    let stop =
        |id: &str| wire::StopSandboxRequest { epoch: 7, id: id.into(), wait: None, grace: None };
    let unknown = client.stop_sandbox(stop(&id(9).to_string())).await;
    refused(unknown, Code::NotFound, Reason::SandboxNotFound);
    let no_id = client.stop_sandbox(stop("--force")).await;
    refused(no_id, Code::InvalidArgument, Reason::FieldInvalid);
    let page = wire::ListSandboxesRequest { page_size: 1001, ..Default::default() };
    refused(client.list_sandboxes(page).await, Code::InvalidArgument, Reason::FieldInvalid);
    // Ten megabytes are not even read.
    let huge = wire::GetSandboxRequest { id: "x".repeat(10 << 20) };
    let status = client.get_sandbox(huge).await.expect_err("too large");
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    client.get_load(wire::GetLoadRequest {}).await.expect("goes on");
}

/// Watch that ignores load reports.
struct Watch(Streaming<wire::WatchResponse>);

impl Watch {
    async fn start(client: &mut Client, journal_id: &str, revision: u64) -> Self {
        let request = wire::WatchRequest { journal_id: journal_id.into(), revision };
        Self(client.watch(request).await.expect("watches").into_inner())
    }

    async fn next(&mut self) -> Result<Message, Status> {
        loop {
            let message = self.0.next().await.expect("goes on")?.message.expect("set");
            if !matches!(message, Message::Load(_)) {
                return Ok(message);
            }
        }
    }

    /// Reads up to a bookmark. Returns ids and phases, and the bookmark's revision.
    async fn batch(&mut self) -> (Vec<(String, Phase)>, u64) {
        let mut sandboxes = Vec::new();
        loop {
            match self.next().await.expect("goes on") {
                Message::Sandbox(sandbox) => sandboxes.push((sandbox.id.clone(), sandbox.phase())),
                Message::Bookmark(bookmark) => return (sandboxes, bookmark.revision),
                other @ (Message::Reset(_) | Message::Load(_) | Message::Execs(_)) => {
                    panic!("{other:?}")
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn watch_begins_with_an_inventory_and_can_be_resumed() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    node.running(1).await;
    let mut watch = Watch::start(&mut client, "", 0).await;
    assert!(
        matches!(watch.next().await, Ok(Message::Reset(reset)) if reset.journal_id == "journal")
    );
    let (inventory, first) = watch.batch().await;
    assert_eq!(inventory, [(id(1).to_string(), Phase::Running)]);
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    let mut last = (String::new(), Phase::Unspecified);
    let mut bookmark = first;
    while last.1 != Phase::Deleted {
        let (deltas, revision) = watch.batch().await;
        last = deltas.last().cloned().expect("not empty");
        bookmark = revision;
    }
    assert!(bookmark > first);

    // Resumed from the first bookmark: only later changes, and no reset.
    let mut resumed = Watch::start(&mut client, "journal", first).await;
    assert_eq!(resumed.batch().await, (vec![(id(1).to_string(), Phase::Deleted)], bookmark));
    let mut up_to_date = Watch::start(&mut client, "journal", bookmark).await;
    assert_eq!(up_to_date.batch().await, (vec![], bookmark));

    // Another history, a future revision, and a forgotten past: all reset.
    node.sandboxes.forget(u64::MAX).await.expect("forgotten");
    for (journal, revision) in [("other", first), ("journal", bookmark + 1), ("journal", first)] {
        let mut watch = Watch::start(&mut client, journal, revision).await;
        assert!(matches!(watch.next().await, Ok(Message::Reset(_))), "{journal} {revision}");
        // The bookmark of an empty inventory can be resumed from.
        assert_eq!(watch.batch().await, (vec![], bookmark));
    }
}

#[tokio::test(start_paused = true)]
async fn watch_reports_the_load_every_second_and_on_change() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    let mut watch = Watch::start(&mut client, "", 0).await.0;
    let begun = tokio::time::Instant::now();
    let mut seqs = Vec::new();
    while seqs.len() < 4 {
        let message = watch.next().await.expect("goes on").expect("well").message;
        if let Some(Message::Load(load)) = message {
            assert!(load.quorate && load.snapshots == ["base"] && load.cores > 1.0, "{load:?}");
            seqs.push(load.seq);
        }
    }
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    assert!(begun.elapsed() < Duration::from_secs(4));
    // On a change, a report comes at once, with the creation counted.
    node.sandboxes.create(crate::sandbox::tests::order(1), Duration::ZERO).await.expect("admitted");
    let changed = async {
        loop {
            let message = watch.next().await.expect("goes on").expect("well").message;
            if let Some(Message::Load(load)) = message
                && load.starting + load.queued == 1
            {
                return;
            }
        }
    };
    timeout(Duration::from_secs(2), changed).await.expect("reported");
}

#[tokio::test(start_paused = true)]
async fn watch_reports_commands_before_the_inventory_and_after_each_check() {
    let node = Node::new().await;
    let rpc = rpc(&node);
    let told = |many: u8| {
        let one = |n: u8| {
            let running = vec![format!("e{n}")];
            (id(n), Commands { kept_bytes: n.into(), running })
        };
        Arc::new((0..many).map(one).collect())
    };
    rpc.execs.tell(told(250));
    let permit = permit(&rpc.watches).expect("free");
    let mut watch = watch::watch(&rpc, wire::WatchRequest::default(), permit);
    let mut next = async || {
        let message = watch.next().await.expect("goes on").expect("well");
        message.message.expect("set")
    };
    assert!(matches!(next().await, Message::Reset(_)));
    for (count, more) in [(200, true), (50, false)] {
        let Message::Execs(report) = next().await else { panic!("no report") };
        assert_eq!((report.sandboxes.len(), report.more), (count, more));
    }
    assert!(matches!(next().await, Message::Bookmark(_)));
    // Also that nothing runs any more.
    for many in [3, 0, 0] {
        rpc.execs.tell(told(many));
        let report = loop {
            if let Message::Execs(report) = next().await {
                break report;
            }
        };
        let kept: Vec<_> = report.sandboxes.iter().map(|of| of.kept_bytes).collect();
        assert_eq!((kept, report.more), ((0..u64::from(many)).collect(), false));
    }
}

#[tokio::test(start_paused = true)]
async fn watcher_that_does_not_read_is_dropped() {
    let node = Node::new().await;
    let rpc = rpc(&node);
    let permit = permit(&rpc.watches).expect("free");
    let unread = watch::watch(&rpc, wire::WatchRequest::default(), permit);
    tokio::time::sleep(Duration::from_secs(120)).await;
    node.running(1).await;
    assert_eq!(rpc.watches.available_permits(), WATCHES_MAX);
    let mut messages: Vec<_> = unread.collect().await;
    let last = messages.pop().expect("not empty");
    assert!(messages.iter().all(Result::is_ok) && messages.len() < 100);
    refused(last, Code::ResourceExhausted, Reason::TooManyCalls);
}

#[tokio::test(start_paused = true)]
async fn a_watch_ends_when_the_agent_stops() {
    let node = Node::new().await;
    let mut client = serve(&node, Peer::Controller);
    let mut watch = Watch::start(&mut client, "", 0).await;
    watch.next().await.expect("begun");
    node.tasks.stopping().cancel();
    let ended = async {
        loop {
            if let Err(status) = watch.next().await {
                return status;
            }
        }
    };
    let status = timeout(Duration::from_secs(60), ended).await.expect("ended");
    refused::<()>(Err(status), Code::Unavailable, Reason::ShuttingDown);
}
