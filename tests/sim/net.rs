//! The network between the controllers and the agents: in-memory streams that can be cut, slowed
//! down, held up in one direction, and replayed.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use controller::node::Lane;
use daemon::{flow::Leg, peer::Peer};
use proto::name::NodeName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::mpsc,
    time::sleep,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, server::Connected};

use crate::{
    chance::Chance,
    pipe::{Reader, Recording, Road, Writer, pipe},
};

/// Source of an agent's incoming connections.
pub(crate) type Incoming = mpsc::Receiver<Result<Link, io::Error>>;

/// Time that a replayed connection stays open after its last piece.
const HAUNTS: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Net {
    seed: u64,
    hosts: Mutex<BTreeMap<NodeName, Host>>,
}

#[derive(Debug)]
struct Host {
    door: mpsc::Sender<Result<Link, io::Error>>,
    /// Cuts every earlier connection.
    cut: CancellationToken,
    reachable: bool,
    roads: Roads,
    /// Recordings of what controllers sent to the host, with the controllers' numbers, in the order
    /// of their connections.
    said: Vec<(u64, Recording)>,
}

/// Both directions between a host and the controllers.
#[derive(Debug, Clone)]
pub(crate) struct Roads {
    /// Direction from the controllers.
    pub(crate) to: Arc<Road>,
    /// Direction to the controllers.
    pub(crate) from: Arc<Road>,
}

impl Roads {
    /// Ends all delays and holds.
    pub(crate) fn clear(&self) {
        for road in [&self.to, &self.from] {
            road.delay(0);
            road.hold(false);
        }
    }
}

impl Net {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, hosts: Mutex::default() }
    }

    /// Starts a host under this name; connections to an earlier one are dead.
    pub(crate) fn listen(&self, name: &NodeName) -> Incoming {
        let (door, incoming) = mpsc::channel(16);
        let mut hosts = self.hosts.lock().expect("hosts");
        let number = 10 * u64::try_from(hosts.len()).expect("few");
        let host = hosts.entry(name.clone()).or_insert_with(|| {
            let road = |way| Arc::new(Road::new(Chance::new(self.seed, 2000 + number + way)));
            Host {
                door: door.clone(),
                cut: CancellationToken::new(),
                reachable: true,
                roads: Roads { to: road(0), from: road(1) },
                said: Vec::new(),
            }
        });
        host.door = door;
        std::mem::take(&mut host.cut).cancel();
        incoming
    }

    /// Cuts a host off, with all its connections, or reconnects it.
    pub(crate) fn set_reachable(&self, name: &NodeName, reachable: bool) {
        let mut hosts = self.hosts.lock().expect("hosts");
        let host = hosts.get_mut(name).expect("a host of that name");
        host.reachable = reachable;
        if !reachable {
            std::mem::take(&mut host.cut).cancel();
        }
    }

    /// Returns both directions between a host and the controllers.
    pub(crate) fn roads(&self, name: &NodeName) -> Roads {
        self.hosts.lock().expect("hosts").get(name).expect("a host of that name").roads.clone()
    }

    /// Returns whether nothing holds up traffic to or from the host.
    pub(crate) fn is_clear(&self, name: &NodeName) -> bool {
        let hosts = self.hosts.lock().expect("hosts");
        let host = hosts.get(name).expect("a host of that name");
        host.reachable && host.roads.to.is_open() && host.roads.from.is_open()
    }

    /// Connects to a host. `by`: the controller that connects, whose data is recorded.
    async fn dial(&self, name: &NodeName, by: Option<u64>) -> io::Result<Link> {
        let roads = {
            let hosts = self.hosts.lock().expect("hosts");
            let host = hosts.get(name).filter(|host| host.reachable);
            host.ok_or(io::ErrorKind::HostUnreachable)?.roads.clone()
        };
        // A connection begins with one packet each way.
        roads.to.passes().await;
        roads.from.passes().await;
        let mut hosts = self.hosts.lock().expect("hosts");
        let host = hosts.get_mut(name).filter(|host| host.reachable);
        let host = host.ok_or(io::ErrorKind::HostUnreachable)?;
        let recording = by.map(|_| Recording::default());
        let (to, at_host) = pipe(&roads.to, recording.clone());
        let (from, at_controller) = pipe(&roads.from, None);
        let link = |reader, writer| {
            let cut = Box::pin(host.cut.clone().cancelled_owned());
            Link { reader, writer, cut }
        };
        let (near, far) = (link(at_controller, to), link(at_host, from));
        host.door.try_send(Ok(far)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        host.said.extend(by.zip(recording));
        Ok(near)
    }

    /// Replays to a host what a controller before `before` has sent to it, and drops the answers.
    /// Returns false if there is no such recording.
    pub(crate) fn haunt(self: &Arc<Self>, name: &NodeName, before: u64) -> bool {
        let said = {
            let hosts = self.hosts.lock().expect("hosts");
            let said = &hosts.get(name).expect("a host of that name").said;
            let of_old = said.iter().rev().find(|(by, _)| *by < before);
            of_old.map(|(_, recording)| recording.lock().expect("a recording").clone())
        };
        let Some(said) = said else { return false };
        let (net, name) = (Arc::clone(self), name.clone());
        tokio::spawn(async move {
            let Ok(link) = net.dial(&name, None).await else { return };
            let (mut answers, mut words) = tokio::io::split(link);
            let deaf = tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while answers.read(&mut buffer).await.is_ok_and(|some| some > 0) {}
            });
            for piece in said {
                if words.write_all(&piece).await.is_err() {
                    break;
                }
                sleep(Duration::from_millis(5)).await;
            }
            sleep(HAUNTS).await;
            deaf.abort();
        });
        true
    }
}

/// Connector of a controller to the agents.
#[derive(Debug)]
pub(crate) struct Dialler {
    pub(crate) net: Arc<Net>,
    /// Number of the controller.
    pub(crate) by: u64,
}

impl controller::node::Connector for Dialler {
    fn channel(&self, node: &NodeName, _address: &str, lane: Lane) -> io::Result<Channel> {
        let (net, node) = (self.net.clone(), node.clone());
        // Only this lane carries changes, so only this lane is recorded for replays.
        let by = (lane == Lane::Control).then_some(self.by);
        Ok(daemon::channel::over(Leg::Agent, move || {
            let (net, node) = (net.clone(), node.clone());
            async move { net.dial(&node, by).await }
        }))
    }
}

/// One end of a connection. Once it is cut, reads and writes fail as after a reset.
#[derive(Debug)]
pub(crate) struct Link {
    reader: Reader,
    writer: Writer,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Link {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Link {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer::Controller
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
