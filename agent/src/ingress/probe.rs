//! Tests by connecting whether something listens.
//!
//! Caddy 2.6 cannot retry a request with a body after a failed dial, so a route is only given once
//! a connection to it has succeeded. Each address has one connect at a time, whose result all
//! concurrent questions share: a sandbox that drops packets occupies one descriptor, not one for
//! each request.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use daemon::sync::Mutex;
use tokio::{
    net::TcpStream,
    sync::OnceCell,
    time::{Instant, timeout},
};

/// Longest time for a connect. A container is one bridge away.
const DEADLINE: Duration = Duration::from_secs(1);
/// Time for which a silent address is not tried again.
const REST: Duration = Duration::from_secs(1);
/// Most questions that may wait for one address.
const WAITING_MAX: usize = 256;
/// Most addresses that are remembered as silent.
const SILENT_MAX: usize = 4096;

/// Result of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
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
pub struct Probe(Mutex<Addresses>);

#[derive(Debug, Default)]
struct Addresses {
    asked: HashMap<SocketAddr, Arc<OnceCell<Answer>>>,
    silent: HashMap<SocketAddr, Instant>,
}

impl Probe {
    pub async fn ask(&self, address: SocketAddr) -> Answer {
        let now = Instant::now();
        let cell = {
            let mut addresses = self.0.lock();
            if addresses.silent.get(&address).is_some_and(|until| *until > now) {
                return Answer::Silent;
            }
            let cell = addresses.asked.entry(address).or_default();
            if Arc::strong_count(cell) > WAITING_MAX {
                return Answer::Busy;
            }
            Arc::clone(cell)
        };
        // If the future that connects is cancelled, the next waiter connects.
        let answer = *cell.get_or_init(|| connect(address)).await;
        let mut addresses = self.0.lock();
        if addresses.asked.get(&address).is_some_and(|asked| Arc::ptr_eq(asked, &cell)) {
            addresses.asked.remove(&address);
            if answer == Answer::Silent {
                addresses.remember(address, now);
            }
        }
        answer
    }
}

impl Addresses {
    fn remember(&mut self, address: SocketAddr, now: Instant) {
        if self.silent.len() >= SILENT_MAX {
            self.silent.retain(|_, until| *until > now);
        }
        if self.silent.len() < SILENT_MAX {
            self.silent.insert(address, Instant::now() + REST);
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
    use tokio::{net::TcpListener, task::JoinSet};

    use super::*;

    #[tokio::test]
    async fn probe_tells_an_open_port_from_a_closed_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let probe = Probe::default();
        assert_eq!(probe.ask(address).await, Answer::Open);
        drop(listener);
        assert_eq!(probe.ask(address).await, Answer::Refused);
        assert!(probe.0.lock().asked.is_empty());
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
