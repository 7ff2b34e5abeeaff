//! Network in memory: a host that is down cannot be dialled, and going down breaks its connections.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use daemon::{flow::Leg, sync::Mutex};
use proto::name::NodeName;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::mpsc,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, server::Connected};

use crate::node::{Connector, Lane};

/// Bytes in flight in one direction.
const PIPE: usize = 64 * 1024;

/// The network.
#[derive(Debug, Default)]
pub struct Net {
    hosts: Mutex<BTreeMap<NodeName, Host>>,
}

#[derive(Debug)]
struct Host {
    dial: mpsc::Sender<io::Result<Pipe>>,
    /// Breaks the current connections.
    cut: CancellationToken,
    /// Breaks the current bulk connections.
    cut_bulk: CancellationToken,
    down: bool,
    /// Address at which it can be dialled; `None`: at any.
    address: Option<String>,
}

impl Net {
    /// Creates a network without hosts.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub(super) fn register(&self, name: &NodeName, dial: mpsc::Sender<io::Result<Pipe>>) {
        let cut = CancellationToken::new();
        let host = Host { dial, cut_bulk: cut.child_token(), cut, down: false, address: None };
        self.hosts.lock().insert(name.clone(), host);
    }

    pub(super) fn set_down(&self, name: &NodeName, down: bool) {
        if let Some(host) = self.hosts.lock().get_mut(name) {
            host.down = down;
        }
        self.cut(name);
    }

    pub(super) fn move_to(&self, name: &NodeName, address: &str) {
        if let Some(host) = self.hosts.lock().get_mut(name) {
            host.address = Some(address.to_owned());
        }
        self.cut(name);
    }

    /// Breaks every connection to a host.
    pub fn cut(&self, name: &NodeName) {
        if let Some(host) = self.hosts.lock().get_mut(name) {
            std::mem::take(&mut host.cut).cancel();
            host.cut_bulk = host.cut.child_token();
        }
    }

    /// Breaks only its bulk connections.
    pub fn cut_bulk(&self, name: &NodeName) {
        if let Some(host) = self.hosts.lock().get_mut(name) {
            let fresh = host.cut.child_token();
            std::mem::replace(&mut host.cut_bulk, fresh).cancel();
        }
    }

    async fn dial(&self, name: &NodeName, address: &str, lane: Lane) -> io::Result<Pipe> {
        let (dial, cut) = match self.hosts.lock().get(name) {
            Some(host) if !host.down && host.address.as_deref().is_none_or(|at| at == address) => {
                let cut = if lane == Lane::Bulk { &host.cut_bulk } else { &host.cut };
                (host.dial.clone(), cut.clone())
            }
            _ => return Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let (near, far) = tokio::io::duplex(PIPE);
        let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
        dial.send(Ok(Pipe::new(far, &cut))).await.map_err(refused)?;
        Ok(Pipe::new(near, &cut))
    }
}

/// Connector over this network.
#[derive(Debug)]
pub struct Dialler(pub Arc<Net>);

impl Connector for Dialler {
    fn channel(&self, node: &NodeName, address: &str, lane: Lane) -> io::Result<Channel> {
        let (net, node, address) = (self.0.clone(), node.clone(), address.to_owned());
        Ok(daemon::channel::over(Leg::Agent, move || {
            let (net, node, address) = (net.clone(), node.clone(), address.clone());
            async move { net.dial(&node, &address, lane).await }
        }))
    }
}

/// One end of a connection that can be broken.
#[derive(Debug)]
pub struct Pipe {
    stream: DuplexStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Pipe {
    /// Wraps an end that breaks with `cut`.
    pub fn new(stream: DuplexStream, cut: &CancellationToken) -> Self {
        Self { stream, cut: Box::pin(cut.clone().cancelled_owned()) }
    }

    fn broken(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Pipe {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.broken(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.broken(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
