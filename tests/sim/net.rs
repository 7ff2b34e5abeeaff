//! The network between the controller and the agents: streams in memory that can be cut.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use daemon::peer::Peer;
use proto::name::NodeName;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::mpsc,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, server::Connected};

/// What an agent accepts connections from.
pub(crate) type Incoming = mpsc::Receiver<Result<Link, io::Error>>;

#[derive(Debug, Default)]
pub(crate) struct Net {
    hosts: Mutex<BTreeMap<NodeName, Host>>,
}

#[derive(Debug)]
struct Host {
    door: mpsc::Sender<Result<Link, io::Error>>,
    /// Cuts every connection that was made before.
    cut: CancellationToken,
    reachable: bool,
}

impl Net {
    /// A host comes up under this name; connections to one before it are dead.
    pub(crate) fn listen(&self, name: &NodeName) -> Incoming {
        let (door, incoming) = mpsc::channel(16);
        let mut hosts = self.hosts.lock().expect("hosts");
        let reachable = hosts.get(name).is_none_or(|host| host.reachable);
        let host = Host { door, cut: CancellationToken::new(), reachable };
        if let Some(before) = hosts.insert(name.clone(), host) {
            before.cut.cancel();
        }
        incoming
    }

    /// Cuts a host off, with all its connections, or joins it again.
    pub(crate) fn set_reachable(&self, name: &NodeName, reachable: bool) {
        let mut hosts = self.hosts.lock().expect("hosts");
        let host = hosts.get_mut(name).expect("a host of that name");
        host.reachable = reachable;
        if !reachable {
            std::mem::take(&mut host.cut).cancel();
        }
    }

    fn dial(&self, name: &NodeName) -> io::Result<Link> {
        let hosts = self.hosts.lock().expect("hosts");
        let host = hosts.get(name).filter(|host| host.reachable);
        let host = host.ok_or(io::ErrorKind::HostUnreachable)?;
        let (near, far) = tokio::io::duplex(256 * 1024);
        let link = |stream| Link { stream, cut: Box::pin(host.cut.clone().cancelled_owned()) };
        host.door.try_send(Ok(link(far))).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(link(near))
    }
}

/// The controller's way to the agents.
#[derive(Debug)]
pub(crate) struct Dialler(pub(crate) Arc<Net>);

impl controller::node::Connector for Dialler {
    fn channel(&self, node: &NodeName, _address: &str) -> io::Result<Channel> {
        let (net, node) = (self.0.clone(), node.clone());
        Ok(daemon::channel::over(move || std::future::ready(net.dial(&node))))
    }
}

/// One end of a connection. Cut: reads and writes fail, as on a reset.
#[derive(Debug)]
pub(crate) struct Link {
    stream: DuplexStream,
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
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
