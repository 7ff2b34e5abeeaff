//! Tests by connecting whether something listens.
//!
//! Caddy 2.6 cannot retry a request with a body after a failed dial, so a route is only given once
//! a connection to it has succeeded. Each address has one connect at a time, whose result all
//! concurrent questions share: a sandbox that drops packets occupies one descriptor, not one for
//! each request. An open port is remembered for a moment, so that a server sees few connections that
//! ask for nothing; if it ends within that moment, Caddy answers 502 by itself. The look into a container
//! that refuses is shared in the same way: whoever has the URL may ask a port without a server as often
//! as he likes.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use daemon::sync::Mutex;
use proto::id::Vmid;
use tokio::{
    net::TcpStream,
    sync::OnceCell,
    time::{Instant, timeout},
};

/// Longest time for a connect. A container is one bridge away, but a server whose queue is full drops
/// the first packet: the kernel sends it again after one second, and two seconds later (TCP_TIMEOUT_INIT of Linux).
const DEADLINE: Duration = Duration::from_millis(3500);
/// Time for which a silent address is not tried again.
const SILENT_FOR: Duration = Duration::from_secs(1);
/// Time for which an open address is not tried again.
const OPEN_FOR: Duration = Duration::from_millis(250);
/// Time for which a container is not looked into again for the same port.
const LOOKED_FOR: Duration = Duration::from_millis(250);
/// Most questions that may wait for one address.
const WAITING_MAX: usize = 256;
/// Most addresses whose results are remembered.
const REMEMBERED_MAX: usize = 4096;

/// Result of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Something listens.
    Open,
    /// Nothing listens: the connection was refused.
    Refused,
    /// No reply in time.
    Silent,
    /// Too many questions already wait for this address.
    Busy,
}

/// Prober of addresses, shared by all questions.
#[derive(Debug, Default)]
pub struct Probe {
    addresses: Mutex<Addresses>,
    /// Looks into containers, by port.
    looks: Mutex<HashMap<(Vmid, u16), Arc<Look>>>,
}

/// Look for a server that listens for its container alone: whether there is one, and until when that holds.
/// Empty while the look lasts.
type Look = OnceCell<(bool, Instant)>;

#[derive(Debug, Default)]
struct Addresses {
    asked: HashMap<SocketAddr, Arc<OnceCell<Answer>>>,
    /// Results, and until when they hold.
    known: HashMap<SocketAddr, (Answer, Instant)>,
}

impl Probe {
    /// Returns whether something listens there; answers are shared, and remembered for a moment.
    pub async fn ask(&self, address: SocketAddr) -> Answer {
        let now = Instant::now();
        let cell = {
            let mut addresses = self.addresses.lock();
            if let Some((answer, _)) =
                addresses.known.get(&address).filter(|(_, until)| *until > now)
            {
                return *answer;
            }
            if addresses.asked.len() >= REMEMBERED_MAX {
                // Those that nobody waits for any more: all their questions were cancelled.
                addresses.asked.retain(|_, cell| Arc::strong_count(cell) > 1);
            }
            let cell = addresses.asked.entry(address).or_default();
            if Arc::strong_count(cell) > WAITING_MAX {
                return Answer::Busy;
            }
            Arc::clone(cell)
        };
        // If the future that connects is cancelled, the next waiter connects.
        let answer = *cell.get_or_init(|| connect(address)).await;
        let mut addresses = self.addresses.lock();
        if addresses.asked.get(&address).is_some_and(|asked| Arc::ptr_eq(asked, &cell)) {
            addresses.asked.remove(&address);
            addresses.remember(address, answer, Instant::now());
        }
        answer
    }

    /// Returns the result of `look`, which says whether a server of a container listens on this port for the
    /// container alone. Concurrent questions share one look, and those that come soon after it share its result.
    pub async fn on_loopback(
        &self,
        vmid: Vmid,
        port: u16,
        look: impl Future<Output = bool>,
    ) -> bool {
        let now = Instant::now();
        // One that nobody waits for any more was cancelled.
        let counts = |known: &Arc<Look>| match known.get() {
            Some((_, until)) => *until > now,
            None => Arc::strong_count(known) > 1,
        };
        let cell = {
            let mut looks = self.looks.lock();
            if looks.len() >= REMEMBERED_MAX {
                looks.retain(|_, known| counts(known));
            }
            let known = looks.get(&(vmid, port)).filter(|known| counts(known)).map(Arc::clone);
            known.unwrap_or_else(|| {
                let fresh = Arc::new(Look::new());
                if looks.len() < REMEMBERED_MAX {
                    looks.insert((vmid, port), Arc::clone(&fresh));
                }
                fresh
            })
        };
        let look = || async move { (look.await, Instant::now() + LOOKED_FOR) };
        cell.get_or_init(look).await.0
    }
}

impl Addresses {
    fn remember(&mut self, address: SocketAddr, answer: Answer, now: Instant) {
        let time = match answer {
            Answer::Open => OPEN_FOR,
            Answer::Silent => SILENT_FOR,
            // A server that starts is there at once.
            Answer::Refused | Answer::Busy => return,
        };
        if self.known.len() >= REMEMBERED_MAX {
            self.known.retain(|_, (_, until)| *until > now);
        }
        if self.known.len() < REMEMBERED_MAX {
            self.known.insert(address, (answer, now + time));
        }
    }
}

async fn connect(address: SocketAddr) -> Answer {
    match timeout(DEADLINE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Answer::Open,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Answer::Refused,
        // No route, no neighbour: the container's interface does not exist.
        Ok(Err(_)) | Err(_) => Answer::Silent,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{net::TcpListener, task::JoinSet};

    use super::*;

    #[tokio::test]
    async fn probe_tells_an_open_port_from_a_closed_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        assert_eq!(Probe::default().ask(address).await, Answer::Open);
        drop(listener);
        let probe = Probe::default();
        assert_eq!(probe.ask(address).await, Answer::Refused);
        assert!(probe.addresses.lock().asked.is_empty());
        let _listener = TcpListener::bind(address).await.expect("bind");
        assert_eq!(probe.ask(address).await, Answer::Open, "a refusal is not remembered");
    }

    #[tokio::test]
    async fn open_address_is_asked_again_after_a_moment() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let probe = Probe::default();
        assert_eq!(probe.ask(address).await, Answer::Open);
        drop(listener);
        tokio::time::pause();
        assert_eq!(probe.ask(address).await, Answer::Open);
        tokio::time::advance(OPEN_FOR).await;
        assert_eq!(probe.ask(address).await, Answer::Refused);
    }

    #[tokio::test]
    async fn addresses_of_cancelled_questions_are_forgotten() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let probe = Probe::default();
        let waits = Arc::<OnceCell<Answer>>::default();
        let waited_for = SocketAddr::from(([192, 0, 2, 1], 1));
        {
            let mut addresses = probe.addresses.lock();
            addresses.asked.insert(waited_for, Arc::clone(&waits));
            for port in (2..).take(REMEMBERED_MAX) {
                addresses.asked.insert(SocketAddr::from(([192, 0, 2, 1], port)), Arc::default());
            }
        }
        assert_eq!(probe.ask(address).await, Answer::Open);
        let left: Vec<_> = probe.addresses.lock().asked.keys().copied().collect();
        assert_eq!(left, [waited_for]);
    }

    /// A listener that accepts nothing, with a full queue, drops the first packet of a connect.
    #[tokio::test]
    async fn server_with_a_full_queue_is_waited_for() {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bind");
        let listener = socket.listen(1).expect("listen");
        let address = listener.local_addr().expect("address");
        let mut queued = Vec::new();
        while let Ok(Ok(one)) =
            timeout(Duration::from_millis(200), TcpStream::connect(address)).await
        {
            queued.push(one);
        }
        let probe = Arc::new(Probe::default());
        let asked = tokio::spawn({
            let probe = Arc::clone(&probe);
            async move { probe.ask(address).await }
        });
        // Its first packet is sent, and dropped.
        tokio::task::yield_now().await;
        for _ in &queued {
            listener.accept().await.expect("accepted");
        }
        assert_eq!(asked.await.expect("an answer"), Answer::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn look_into_a_container_is_shared_and_holds_for_a_moment() {
        let (probe, looks) = (Arc::new(Probe::default()), Arc::new(AtomicUsize::new(0)));
        let ask = |port: u16| {
            let (probe, looks) = (Arc::clone(&probe), Arc::clone(&looks));
            async move {
                let look = async {
                    looks.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(2 * LOOKED_FOR).await;
                    port == 80
                };
                let vmid = Vmid::try_from(100_001).expect("a vmid");
                probe.on_loopback(vmid, port, look).await
            }
        };
        let mut questions = JoinSet::new();
        for number in 0..100 {
            questions.spawn(ask([80, 81][number % 2]));
        }
        let found = questions.join_all().await.into_iter().filter(|found| *found).count();
        assert_eq!((found, looks.load(Ordering::Relaxed)), (50, 2), "one look for each port");
        assert!(ask(80).await);
        assert_eq!(looks.load(Ordering::Relaxed), 2, "the result is remembered");
        tokio::time::advance(LOOKED_FOR).await;
        assert!(ask(80).await);
        assert_eq!(looks.load(Ordering::Relaxed), 3, "and not for long");
        // A look whose questions were all cancelled is no result.
        tokio::time::advance(LOOKED_FOR).await;
        timeout(LOOKED_FOR, ask(80)).await.expect_err("cancelled");
        assert!(ask(80).await);
        assert_eq!(looks.load(Ordering::Relaxed), 5);
    }

    /// TEST-NET-1 never answers; where even a route to it is missing, that counts as silence too.
    #[tokio::test(start_paused = true)]
    async fn probes_of_a_silent_address_are_few_and_short() {
        let address: SocketAddr = "192.0.2.77:80".parse().expect("an address");
        let probe = Arc::new(Probe::default());
        let mut questions = JoinSet::new();
        for _ in 0..2 * WAITING_MAX {
            let probe = Arc::clone(&probe);
            questions.spawn(async move { probe.ask(address).await });
        }
        let begun = Instant::now();
        let answers = questions.join_all().await;
        assert!(begun.elapsed() <= DEADLINE + Duration::from_millis(100));
        assert!(answers.iter().all(|a| matches!(a, Answer::Silent | Answer::Busy)));
        let again = Instant::now();
        assert_eq!(probe.ask(address).await, Answer::Silent);
        assert_eq!(again.elapsed(), Duration::ZERO);
    }
}
