//! Resolver of the node, for sandboxes that reach the names of a list alone.
//!
//! The host's rules lead each question of such a sandbox here, whichever name server it is for. A name of
//! its list is asked upstream; its addresses are opened in the host's rules first, and told then. Any other
//! name is refused at once. A sandbox is known by its address, which the rules let nobody else send from.
//! Whoever asks without a list gets no answer. While this does not run, nobody answers, so nothing new
//! is reached.
//!
//! | part | what |
//! |---|---|
//! | `message` | what DNS messages say; pure |
//! | `upstream` | asks the node's name servers |
//! | `refused` | what is logged of refusals |
//! | here | who may ask what, and how much at once |

mod message;
mod refused;
#[cfg(test)]
mod tests;
mod upstream;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use daemon::{
    keyed_count::{Counted, KeyedCount},
    seldom::Seldom,
    sync::Mutex,
};
use proto::{egress::AllowList, id::SandboxId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    message::{Answer, Kind, QUESTION_MAX, Transport},
    refused::Refused,
};
use crate::{firewall::Grant, sandbox::Sandboxes};

/// Most questions and connections of all sandboxes at once. The last quarter is for those that have few.
const ALL_MAX: usize = 512;
/// Most of one sandbox while only that quarter is left: those that ask much leave room for the others.
const FEW: usize = 4;
/// Most questions of one sandbox by UDP at once.
const EACH_MAX: usize = 32;
/// Most connections of one sandbox.
const CONNECTIONS_MAX: usize = 4;
/// Most questions on one connection.
const ON_CONNECTION_MAX: usize = 32;
/// Longest wait for the next question on a connection, and for an answer to be taken.
const IDLE: Duration = Duration::from_secs(5);
/// Bounds of the time that an answer holds, in seconds. It is asked for anew soon, which renews the address
/// in the rules.
const TTL: (u32, u32) = (30, 60);
/// Most answers that are remembered, of all sandboxes and of one.
const REMEMBERED_MAX: (usize, usize) = (4096, 128);
/// Time until the next try to listen.
const RETRY: Duration = Duration::from_secs(10);

/// Addresses of the resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Address and port to answer at: the gateway's.
    pub listen: SocketAddr,
    /// Name servers of the node.
    pub servers: Vec<SocketAddr>,
}

/// Sandboxes and names that the host's rules do not allow, or not yet.
pub type Refusals = BTreeSet<(Ipv4Addr, String)>;

/// Lists of the sandboxes, and the rules that follow them. No method has a default body.
#[async_trait::async_trait]
pub trait Lists: Send + Sync + std::fmt::Debug {
    /// Returns the sandbox with this address, its list, if it has one, and a number that is another one after
    /// each change of the list.
    fn list_of(&self, source: Ipv4Addr) -> Option<(SandboxId, AllowList, u64)>;

    /// Returns true when sandboxes may reach an address at all.
    fn may_be_reached(&self, address: Ipv4Addr) -> bool;

    /// Lets sandboxes reach addresses.
    ///
    /// # Errors
    /// When the host's rules do not let them, in words.
    async fn open(&self, grants: &[Grant]) -> Result<Refusals, String>;

    /// Takes notice whether sandboxes get answers.
    fn answers(&self, answers: bool);
}

#[async_trait::async_trait]
impl Lists for Sandboxes {
    fn list_of(&self, source: Ipv4Addr) -> Option<(SandboxId, AllowList, u64)> {
        self.allow_list_of(source)
    }

    fn may_be_reached(&self, address: Ipv4Addr) -> bool {
        self.is_within_reach(address)
    }

    async fn open(&self, grants: &[Grant]) -> Result<Refusals, String> {
        self.allow(grants).await.map_err(|error| error.to_string())
    }

    fn answers(&self, answers: bool) {
        self.resolver_answers(answers);
    }
}

/// Serves until `stop`. Tries again where it cannot listen.
pub async fn run(lists: Arc<dyn Lists>, settings: Settings, stop: CancellationToken) {
    let resolver = Resolver::new(lists, settings.servers);
    let mut told = false;
    while !stop.is_cancelled() {
        match listen(settings.listen).await {
            Ok(listening) => {
                tracing::info!(listen = %settings.listen, "sandboxes with an allow-list get answers");
                told = false;
                resolver.lists.answers(true);
                let served = stop.run_until_cancelled(resolver.serve(listening)).await;
                resolver.lists.answers(false);
                if let Some(error) = served {
                    tracing::error!(%error, "the resolver of allow-lists was interrupted");
                }
            }
            Err(error) if !told => {
                told = true;
                tracing::error!(listen = %settings.listen, %error,
                    "sandboxes with an allow-list get no answers");
            }
            Err(_) => {}
        }
        stop.run_until_cancelled(sleep(RETRY)).await;
    }
}

/// Sockets of the resolver.
struct Listening(UdpSocket, TcpListener);

async fn listen(address: SocketAddr) -> io::Result<Listening> {
    Ok(Listening(UdpSocket::bind(address).await?, TcpListener::bind(address).await?))
}

/// Addresses to open, and where to tell that they are.
type Opening = (Vec<Grant>, oneshot::Sender<bool>);

/// Everything that answers share.
#[derive(Debug)]
struct Resolver {
    lists: Arc<dyn Lists>,
    servers: Vec<SocketAddr>,
    all: Arc<Semaphore>,
    each: KeyedCount<(Ipv4Addr, Transport)>,
    refused: Refused,
    remembered: Mutex<BTreeMap<(Ipv4Addr, String), Remembered>>,
    openings: mpsc::Sender<Opening>,
    granted: tokio::sync::Mutex<mpsc::Receiver<Opening>>,
}

/// Answer whose addresses are open for a sandbox.
#[derive(Debug, Clone)]
struct Remembered {
    /// Number of the list under which they were opened: one that was changed there and back is another one.
    under: u64,
    addresses: Vec<Ipv4Addr>,
    until: Instant,
}

/// Sandbox that asks.
#[derive(Debug, Clone)]
struct Asking {
    source: Ipv4Addr,
    id: SandboxId,
    list: AllowList,
    /// Number of the list.
    number: u64,
}

/// Room for one question or connection, until it is dropped.
type Room = (OwnedSemaphorePermit, Counted<(Ipv4Addr, Transport)>);

impl Resolver {
    fn new(lists: Arc<dyn Lists>, servers: Vec<SocketAddr>) -> Arc<Self> {
        let (openings, granted) = mpsc::channel(ALL_MAX);
        Arc::new(Self {
            lists,
            servers,
            all: Arc::new(Semaphore::new(ALL_MAX)),
            each: KeyedCount::default(),
            refused: Refused::default(),
            remembered: Mutex::default(),
            openings,
            granted: tokio::sync::Mutex::new(granted),
        })
    }

    /// Serves until a socket fails.
    async fn serve(self: &Arc<Self>, Listening(udp, tcp): Listening) -> io::Error {
        let udp = Arc::new(udp);
        tokio::select! {
            error = self.serve_udp(udp) => error,
            error = self.serve_tcp(tcp) => error,
            () = self.grant() => io::Error::other("nobody opens addresses"),
        }
    }

    async fn serve_udp(self: &Arc<Self>, socket: Arc<UdpSocket>) -> io::Error {
        let mut tasks = JoinSet::new();
        let mut buffer = [0; QUESTION_MAX + 1];
        loop {
            let (length, from) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => return error,
            };
            while tasks.try_join_next().is_some() {}
            // What finds no room is dropped: who asks will ask again.
            let Some((asking, room)) = self.admit(from, Transport::Udp) else { continue };
            let (this, socket) = (Arc::clone(self), Arc::clone(&socket));
            let bytes = buffer[..length].to_vec();
            tasks.spawn(async move {
                let _room = room;
                let reply = this.reply(&asking, &bytes, Transport::Udp).await;
                if !reply.is_empty() {
                    // The sandbox may be gone.
                    drop(socket.send_to(&reply, from).await);
                }
            });
        }
    }

    async fn serve_tcp(self: &Arc<Self>, listener: TcpListener) -> io::Error {
        let mut tasks = JoinSet::new();
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                // Of one connection; or the host is short of something for a moment.
                Err(error) => {
                    tracing::debug!(%error, "a question by TCP was not accepted");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while tasks.try_join_next().is_some() {}
            let Some((asking, room)) = self.admit(from, Transport::Tcp) else { continue };
            let this = Arc::clone(self);
            tasks.spawn(async move {
                let _room = room;
                // The sandbox may hang up at any time.
                drop(this.converse(asking, stream).await);
            });
        }
    }

    /// Finds out who asks, and whether there is room for it.
    fn admit(&self, from: SocketAddr, by: Transport) -> Option<(Asking, Room)> {
        let IpAddr::V4(source) = from.ip() else { return None };
        let (id, list, number) = self.lists.list_of(source)?;
        let max = match by {
            Transport::Udp => EACH_MAX,
            Transport::Tcp => CONNECTIONS_MAX,
        };
        let is_plenty = self.all.available_permits() > ALL_MAX / 4;
        let max = if is_plenty { max } else { max.min(FEW) };
        let counted = self.each.begin((source, by), max)?;
        let permit = Arc::clone(&self.all).try_acquire_owned().ok()?;
        Some((Asking { source, id, list, number }, (permit, counted)))
    }

    async fn converse(&self, mut asking: Asking, mut stream: TcpStream) -> io::Result<()> {
        for _ in 0..ON_CONNECTION_MAX {
            let length = usize::from(timeout(IDLE, stream.read_u16()).await??);
            if length > QUESTION_MAX {
                break;
            }
            let mut bytes = vec![0; length];
            timeout(IDLE, stream.read_exact(&mut bytes)).await??;
            // Its list may be another one by now.
            let Some((id, list, number)) = self.lists.list_of(asking.source) else { break };
            asking = Asking { id, list, number, ..asking };
            let reply = self.reply(&asking, &bytes, Transport::Tcp).await;
            let Ok(length) = u16::try_from(reply.len()) else { break };
            if length == 0 {
                break;
            }
            let framed = [&length.to_be_bytes()[..], &reply].concat();
            timeout(IDLE, stream.write_all(&framed)).await??;
        }
        Ok(())
    }

    /// Returns the reply to what a sandbox has sent; empty when it gets none.
    async fn reply(&self, asking: &Asking, bytes: &[u8], by: Transport) -> Vec<u8> {
        match message::question(bytes) {
            Ok(question) => {
                let answer = self.answer(asking, question.name.as_deref(), question.kind).await;
                message::reply(&question, &answer, by)
            }
            Err(reply) => reply.unwrap_or_default(),
        }
    }

    async fn answer(&self, asking: &Asking, name: Option<&str>, kind: Kind) -> Answer {
        let allowed = name.filter(|name| asking.list.allows(name));
        let Some(name) = allowed else {
            if let Some(name) = name
                && let Some(silent) = self.refused.add(asking.id, name)
            {
                tracing::info!(sandbox_id = %asking.id, name, silent,
                    "egress refused: the sandbox asked for a name that is not on its allow-list");
            }
            return Answer::Refused;
        };
        match kind {
            Kind::Address => self.addresses(asking, name).await,
            // IPv6 is closed to every sandbox.
            Kind::Absent => Answer::Addresses(Vec::new(), 0),
            Kind::Other => Answer::Refused,
        }
    }

    async fn addresses(&self, asking: &Asking, name: &str) -> Answer {
        let key = (asking.source, name.to_owned());
        if let Some(answer) = self.recall(&key, asking.number) {
            return answer;
        }
        let (found, ttl) = match upstream::resolve(&self.servers, name).await {
            Answer::Addresses(found, ttl) => (found, ttl.clamp(TTL.0, TTL.1)),
            other @ (Answer::NoName | Answer::Refused | Answer::Failed) => return other,
        };
        // A name may point anywhere: what no sandbox reaches is not told either.
        let mut addresses = found;
        addresses.retain(|address| self.lists.may_be_reached(*address));
        let grant = |address: &Ipv4Addr| Grant {
            sandbox: asking.source,
            name: name.to_owned(),
            address: *address,
        };
        let grants: Vec<_> = addresses.iter().map(grant).collect();
        if grants.is_empty() {
            return Answer::Addresses(Vec::new(), 0);
        }
        let (opened, told) = oneshot::channel();
        if self.openings.send((grants, opened)).await.is_err() || !told.await.unwrap_or(false) {
            return Answer::Failed;
        }
        let until = Instant::now() + Duration::from_secs(ttl.into());
        let under = asking.number;
        self.remember(key, Remembered { under, addresses: addresses.clone(), until });
        Answer::Addresses(addresses, ttl)
    }

    /// Opens addresses, all that are asked for by then in one change of the host's rules.
    async fn grant(&self) {
        let mut granted = self.granted.lock().await;
        let (mut batch, unopened) = (Vec::new(), Seldom::new());
        while granted.recv_many(&mut batch, ALL_MAX).await > 0 {
            let all: Vec<_> = batch.iter().flat_map(|(grants, _)| grants.clone()).collect();
            let opened = self.lists.open(&all).await;
            // Sandboxes decide how often it is tried.
            if let Err(error) = &opened
                && let Some(left_out) = unopened.admit()
            {
                tracing::warn!(%error, left_out, "addresses of allowed names were not opened");
            }
            for (grants, told) in batch.drain(..) {
                let is_open = |grant: &Grant, refused: &Refusals| {
                    !refused.contains(&(grant.sandbox, grant.name.clone()))
                };
                let open = opened
                    .as_ref()
                    .is_ok_and(|refused| grants.iter().all(|grant| is_open(grant, refused)));
                let _given_up = told.send(open);
            }
        }
    }

    /// Returns an answer that still holds.
    fn recall(&self, key: &(Ipv4Addr, String), under: u64) -> Option<Answer> {
        let remembered = self.remembered.lock();
        let known = remembered.get(key).filter(|known| known.under == under)?;
        let left = known.until.saturating_duration_since(Instant::now()).as_secs();
        let left = u32::try_from(left).ok().filter(|left| *left > 0)?;
        Some(Answer::Addresses(known.addresses.clone(), left))
    }

    fn remember(&self, key: (Ipv4Addr, String), answer: Remembered) {
        let mut remembered = self.remembered.lock();
        let now = Instant::now();
        let of_sandbox = (key.0, String::new())..(key.0, char::MAX.to_string());
        if remembered.len() >= REMEMBERED_MAX.0
            || remembered.range(of_sandbox).count() >= REMEMBERED_MAX.1
        {
            remembered.retain(|of, known| known.until > now && of.0 != key.0);
        }
        if remembered.len() < REMEMBERED_MAX.0 {
            remembered.insert(key, answer);
        }
    }
}
