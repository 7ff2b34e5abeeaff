//! Connections of callers. Their number is bounded, but a new one is never refused: one without a
//! valid token makes room first, then one of the team that has the most.
//!
//! A caller is known by its calls only, so each connection starts anonymous. Anonymous connections
//! never displace one of a team: an eighth of the capacity is theirs alone.

use std::{
    any::Any,
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use daemon::{
    listen::ConnInfo,
    peer::{Client, Peer},
    sync::Mutex,
};
use proto::name::Team;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::pace::OpenCalls;

/// Most concurrent calls without a token on one connection.
const OPEN_MAX: usize = 4;
/// Most concurrent calls of one connection whose token is not cached and is being looked up.
const UNKNOWN_CALLERS_MAX: usize = 8;
/// Most calls of one connection that wait for their turn (`pace`): it may be a proxy, whose streams others need.
const WAITING_MAX: usize = 256;
/// Time for a peer's first byte after the handshake: in all our protocols the client begins.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// Owner of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Owner {
    /// No valid token yet. With the network that it comes from, where there is one.
    Nobody(Option<IpAddr>),
    /// The team of its first valid token.
    Team(Team),
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    calls: Arc<AtomicUsize>,
    close: CancellationToken,
}

/// Connections in the order of their arrival.
#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

impl Table {
    /// Picks the oldest connection of the owner with the most, among teams or among anonymous ones;
    /// one without calls under way first.
    fn victim(&self, teams: bool) -> Option<u64> {
        let sort = |entry: &Entry| matches!(entry.owner, Owner::Team(_)) == teams;
        let mut counts: HashMap<&Owner, usize> = HashMap::new();
        for entry in self.entries.values().filter(|entry| sort(entry)) {
            *counts.entry(&entry.owner).or_default() += 1;
        }
        let most = counts.values().max()?;
        let of_most = |entry: &Entry| sort(entry) && counts.get(&entry.owner) == Some(most);
        let entries = self.entries.iter().filter(|(_, entry)| of_most(entry));
        // Ids increase: the lowest is the oldest.
        let oldest =
            entries.min_by_key(|(id, entry)| (entry.calls.load(Ordering::Relaxed) > 0, **id));
        oldest.map(|(id, _)| *id)
    }

    fn close(&mut self, id: u64) {
        if let Some(entry) = self.entries.remove(&id) {
            tracing::debug!(owner = ?entry.owner, "connection closed to make room");
            entry.close.cancel();
        }
    }

    fn of_teams(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry.owner, Owner::Team(_))).count()
    }
}

/// All connections.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    max: usize,
    table: Arc<Mutex<Table>>,
}

impl Connections {
    /// Creates a table for at most `max` connections.
    pub(super) fn new(max: usize) -> Self {
        Self { max, table: Arc::default() }
    }

    /// Adds a connection, and closes others where the table is full.
    pub(super) fn admit<IO: Connected>(&self, io: IO) -> Connection<IO> {
        let info = io.connect_info();
        let address = (&info as &dyn Any).downcast_ref::<ConnInfo>();
        let peer = address.map(|info| info.address);
        let client = match address.map(|info| &info.peer) {
            Some(Peer::Client(client)) => Some(client.clone()),
            // Only the callers' CA is trusted here.
            Some(Peer::Anonymous | Peer::Controller | Peer::Agent(_)) | None => None,
        };
        let address = peer.map(|peer| daemon::listen::network(peer.ip()));
        let (close, calls) = (CancellationToken::new(), Arc::<AtomicUsize>::default());
        let mut table = self.table.lock();
        while table.entries.len() >= self.max
            && let Some(victim) = table.victim(false).or_else(|| table.victim(true))
        {
            table.close(victim);
        }
        let id = table.next;
        table.next += 1;
        let (owner, entry_calls) = (Owner::Nobody(address), Arc::clone(&calls));
        table.entries.insert(id, Entry { owner, calls: entry_calls, close: close.clone() });
        drop(table);
        Connection {
            io,
            handle: ConnectionHandle(Arc::new(Inner {
                id,
                peer,
                client,
                connections: self.clone(),
                team: OnceLock::new(),
                calls,
                open: Arc::new(Semaphore::new(OPEN_MAX)),
                unknown_callers: Arc::new(Semaphore::new(UNKNOWN_CALLERS_MAX)),
                open_calls: OpenCalls::default(),
                waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            })),
            closed: Box::pin(close.cancelled_owned()),
            silent: Some(Box::pin(tokio::time::sleep(FIRST_BYTE))),
        }
    }

    fn belongs_to(&self, id: u64, team: Team) {
        let mut table = self.table.lock();
        let Some(entry) = table.entries.get_mut(&id) else { return };
        entry.owner = Owner::Team(team);
        if table.of_teams() > self.max - self.max / 8
            && let Some(victim) = table.victim(true)
        {
            table.close(victim);
        }
    }
}

/// Handle of a connection in the table; requests carry it in their extensions.
#[derive(Debug, Clone)]
pub(super) struct ConnectionHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: u64,
    peer: Option<SocketAddr>,
    client: Option<Client>,
    connections: Connections,
    team: OnceLock<Team>,
    calls: Arc<AtomicUsize>,
    open: Arc<Semaphore>,
    unknown_callers: Arc<Semaphore>,
    open_calls: OpenCalls,
    waiting: Arc<Semaphore>,
}

/// Mark of a call that is under way on a connection.
#[derive(Debug)]
pub(super) struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ConnectionHandle {
    /// Assigns the connection to the team of its first valid token.
    pub(super) fn belongs_to(&self, team: &Team) {
        if self.0.team.set(team.clone()).is_ok() {
            self.0.connections.belongs_to(self.0.id, team.clone());
        }
    }

    /// Returns the address of the peer, where the connection has one.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.0.peer
    }

    /// Returns the client certificate that the peer has shown.
    pub(super) fn client(&self) -> Option<&Client> {
        self.0.client.as_ref()
    }

    /// Marks the connection as in use.
    pub(super) fn busy(&self) -> Busy {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        Busy(Arc::clone(&self.0.calls))
    }

    /// Takes a place for a call that waits for its turn; `None` when all are taken.
    pub(super) fn waiting_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.waiting).try_acquire_owned().ok()
    }

    /// Takes a permit for a call without a token; `None` when all are taken.
    pub(super) fn open_call_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.open).try_acquire_owned().ok()
    }

    /// Returns the turns of the calls without a token.
    pub(super) fn open_calls(&self) -> &OpenCalls {
        &self.0.open_calls
    }

    /// Closes the connection, unless it has had a call with a valid token: a proxy may have the calls of many
    /// callers on one connection.
    pub(super) fn close_if_anonymous(&self) {
        if self.0.team.get().is_none() {
            self.0.connections.table.lock().close(self.0.id);
        }
    }

    /// Takes a permit for a call whose token must be looked up; `None` when all are taken.
    pub(super) fn unknown_caller_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.unknown_callers).try_acquire_owned().ok()
    }
}

/// Connection of a caller.
#[derive(Debug)]
pub(super) struct Connection<IO> {
    io: IO,
    handle: ConnectionHandle,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Timeout until the first byte.
    silent: Option<Pin<Box<Sleep>>>,
}

impl<IO> Drop for Connection<IO> {
    fn drop(&mut self) {
        self.handle.0.connections.table.lock().entries.remove(&self.handle.0.id);
    }
}

impl<IO: Connected> Connected for Connection<IO> {
    type ConnectInfo = ConnectionHandle;

    fn connect_info(&self) -> ConnectionHandle {
        self.handle.clone()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.closed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let read = Pin::new(&mut self.io).poll_read(cx, buffer);
        if read.is_ready() {
            self.silent = None;
        } else if let Some(silent) = &mut self.silent
            && silent.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;

    fn connect(connections: &Connections) -> (Connection<DuplexStream>, DuplexStream) {
        let (near, far) = tokio::io::duplex(16);
        (connections.admit(near), far)
    }

    fn team(name: &str) -> Team {
        name.parse().expect("a team")
    }

    async fn is_closed(connection: &mut Connection<DuplexStream>) -> bool {
        let read = tokio::time::timeout(Duration::from_millis(1), connection.read_u8()).await;
        matches!(read, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset)
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_a_token_give_way_and_never_displace_a_team() {
        let connections = Connections::new(8);
        let (mut red, _far) = connect(&connections);
        red.handle.belongs_to(&team("red"));
        let mut crowd: Vec<_> = (0..30).map(|_| connect(&connections)).collect();
        let mut open = 0;
        for (connection, _) in &mut crowd {
            open += usize::from(!is_closed(connection).await);
        }
        assert_eq!(open, 7, "the newest");
        assert!(!is_closed(&mut crowd[29].0).await);
        assert!(!is_closed(&mut red).await);
        assert_eq!(connections.table.lock().entries.len(), 8);
        drop(crowd);
        assert_eq!(connections.table.lock().entries.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_team_with_the_most_connections_makes_room_for_other_teams() {
        let connections = Connections::new(16);
        let mut red: Vec<_> = (0..16).map(|_| connect(&connections)).collect();
        let busy = red[0].0.handle.busy();
        for (connection, _) in &red {
            connection.handle.belongs_to(&team("red"));
        }
        let (mut blue, _far) = connect(&connections);
        blue.handle.belongs_to(&team("blue"));
        assert!(!is_closed(&mut blue).await);
        assert!(!is_closed(&mut red[0].0).await, "a call is under way on it");
        assert!(is_closed(&mut red[1].0).await, "the oldest without a call");
        drop(busy);
        let (mut late, _far) = connect(&connections);
        assert!(!is_closed(&mut late).await, "nobody's connections keep an eighth");
    }

    #[tokio::test(start_paused = true)]
    async fn flood_of_short_connections_leaves_nothing_and_closes_no_teams() {
        let connections = Connections::new(64);
        let mut red: Vec<_> = (0..40).map(|_| connect(&connections)).collect();
        for (connection, _) in &red {
            connection.handle.belongs_to(&team("red"));
        }
        // Each opens as the last one closes, or stays until it must make room.
        let mut held = std::collections::VecDeque::new();
        for number in 0..20_000 {
            let (connection, far) = connect(&connections);
            if number % 2 == 1 {
                held.push_back((connection, far));
            }
            if held.len() > 200 {
                held.pop_front();
            }
        }
        assert_eq!(connections.table.lock().entries.len(), 64);
        for (connection, _) in &mut red {
            assert!(!is_closed(connection).await, "a team's");
        }
        drop(held);
        assert_eq!(connections.table.lock().entries.len(), 40);
        // What has made room is gone for good: its end removes no entry of another.
        let (mut late, _far) = connect(&connections);
        assert!(!is_closed(&mut late).await);
        assert_eq!(connections.table.lock().entries.len(), 41);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_connection_is_closed() {
        let connections = Connections::new(8);
        let (mut connection, _far) = connect(&connections);
        let error = connection.read_u8().await.expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (mut connection, mut far) = connect(&connections);
        tokio::io::AsyncWriteExt::write_u8(&mut far, 1).await.expect("written");
        connection.read_u8().await.expect("a byte");
        let later = tokio::time::timeout(FIRST_BYTE * 9, connection.read_u8()).await;
        assert!(later.is_err(), "it stays: keep-alive asks after it from here on");
    }
}
