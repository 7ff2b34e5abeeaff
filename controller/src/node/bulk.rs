//! Streams of commands and files to one node. They use connections of their own, opened on demand
//! and closed when idle, so that a stalled stream blocks neither a control call nor the watch.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use daemon::{shares::Shares, sync::Mutex};
use futures_util::{Stream, StreamExt};
use proto::{
    Reason, agent::v1::agent_service_client::AgentServiceClient, id::SandboxId, name::Team,
};
use tokio::time::Instant;
use tonic::transport::Channel;

use super::Error;

/// Most bulk connections to one node. The agent's memory bounds them: docs/connections.md has the product.
const CONNECTIONS_MAX: usize = 10;
/// Most streams of one connection. The agent allows more.
const CONNECTION_STREAMS_MAX: usize = 64;
/// Most streams of one node, over all its connections. A team gets at most half of them, and less
/// while other teams have streams: see `Shares`.
const STREAMS_MAX: usize = CONNECTIONS_MAX * CONNECTION_STREAMS_MAX;
/// Most streams of one sandbox: twice the number of commands that it can run at a time.
const SANDBOX_STREAMS_MAX: usize = 128;
/// Time after which a connection without streams is closed.
const IDLE: Duration = Duration::from_secs(60);
/// Retry hint of a refusal.
const RETRY: Duration = Duration::from_secs(1);

/// Team and sandbox that a stream counts against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOwner {
    /// Team of the caller.
    pub team: Team,
    /// Sandbox at the other end of the stream.
    pub sandbox: SandboxId,
}

type Agent = AgentServiceClient<Channel>;
type Open = Box<dyn Fn() -> io::Result<Agent> + Send + Sync>;

/// Pool of the bulk connections to one node.
pub(super) struct Bulk {
    open: Open,
    state: Mutex<State>,
}

struct State {
    teams: Shares<Team>,
    sandboxes: BTreeMap<SandboxId, usize>,
    connections: Vec<Connection>,
    /// Number of the next connection.
    next: u64,
}

struct Connection {
    number: u64,
    agent: Agent,
    streams: usize,
    /// Time at which its last stream ended.
    idle: Instant,
}

impl std::fmt::Debug for Bulk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        let streams: Vec<_> = state.connections.iter().map(|one| one.streams).collect();
        f.debug_struct("Bulk").field("streams", &streams).finish_non_exhaustive()
    }
}

impl Bulk {
    /// Creates a pool that opens connections with `open`. A channel connects when it is first used.
    pub(super) fn new(open: Open) -> Arc<Self> {
        let state = State {
            teams: Shares::new(STREAMS_MAX),
            sandboxes: BTreeMap::new(),
            connections: Vec::new(),
            next: 0,
        };
        Arc::new(Self { open, state: Mutex::new(state) })
    }

    /// Reserves one stream on a connection with a free stream, or on a new connection.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when the sandbox or the team already uses its share of the node.
    pub(super) fn lease(self: &Arc<Self>, owner: &StreamOwner) -> Result<Lease, Error> {
        let mut state = self.state.lock();
        let of_sandbox = state.sandboxes.get(&owner.sandbox).copied().unwrap_or(0);
        if of_sandbox >= SANDBOX_STREAMS_MAX {
            return Err(full(format!("this sandbox has {of_sandbox} streams open already")));
        }
        if !state.teams.take(&owner.team) {
            let held = state.teams.held(&owner.team);
            return Err(full(format!(
                "this team has {held} of the node's {STREAMS_MAX} streams open already, \
                 which is its share now"
            )));
        }
        // First fit, so that the last connections become idle.
        let room = state.connections.iter().position(|one| one.streams < CONNECTION_STREAMS_MAX);
        let place = match room {
            Some(place) => place,
            None => match (self.open)() {
                Ok(agent) => {
                    let (number, idle) = (state.next, Instant::now());
                    state.next += 1;
                    state.connections.push(Connection { number, agent, streams: 0, idle });
                    state.connections.len() - 1
                }
                Err(error) => {
                    state.teams.release(&owner.team);
                    return Err(Error::Unreachable(error.to_string()));
                }
            },
        };
        state.connections[place].streams += 1;
        *state.sandboxes.entry(owner.sandbox).or_default() += 1;
        let Connection { number, agent, .. } = &state.connections[place];
        let (number, agent) = (*number, agent.clone());
        drop(state);
        Ok(Lease {
            agent,
            slot: Arc::new(Slot { bulk: self.clone(), number, owner: owner.clone() }),
        })
    }

    /// Closes connections that have been idle for `IDLE`.
    pub(super) fn close_idle(&self) {
        self.state.lock().connections.retain(|one| one.streams > 0 || one.idle.elapsed() < IDLE);
    }

    /// Returns the number of streams of each open connection.
    #[cfg(test)]
    pub(super) fn streams(&self) -> Vec<usize> {
        self.state.lock().connections.iter().map(|one| one.streams).collect()
    }

    fn release(&self, number: u64, owner: &StreamOwner) {
        let mut state = self.state.lock();
        state.teams.release(&owner.team);
        if let Some(streams) = state.sandboxes.get_mut(&owner.sandbox) {
            *streams -= 1;
            if *streams == 0 {
                state.sandboxes.remove(&owner.sandbox);
            }
        }
        if let Some(one) = state.connections.iter_mut().find(|one| one.number == number) {
            one.streams -= 1;
            one.idle = Instant::now();
        }
    }
}

/// Lease of one stream. Released when the lease and both directions of the stream are dropped.
#[derive(Debug)]
pub(super) struct Lease {
    /// Connection to open the stream on.
    pub(super) agent: Agent,
    slot: Arc<Slot>,
}

#[derive(Debug)]
struct Slot {
    bulk: Arc<Bulk>,
    number: u64,
    owner: StreamOwner,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.bulk.release(self.number, &self.owner);
    }
}

impl Lease {
    /// Keeps the lease while this direction lives. Both directions count: one that the agent does
    /// not read can outlive the other.
    pub(super) fn hold<S: Stream>(&self, stream: S) -> impl Stream<Item = S::Item> + use<S> {
        let slot = self.slot.clone();
        stream.map(move |item| {
            let _held = &slot;
            item
        })
    }
}

fn full(message: String) -> Error {
    let (reason, retry_after) = (Reason::TooManyCalls, Some(RETRY));
    Error::Refused { reason, message, retry_after, files_written: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk() -> Arc<Bulk> {
        let unused = || async { Err::<tokio::io::DuplexStream, _>(io::ErrorKind::NotFound.into()) };
        Bulk::new(Box::new(move || {
            Ok(Agent::new(daemon::channel::over(daemon::flow::Leg::Agent, unused)))
        }))
    }

    fn owner(team: &str, sandbox: u8) -> StreamOwner {
        StreamOwner {
            team: team.parse().expect("team"),
            sandbox: SandboxId::new(1, &[sandbox; 10]),
        }
    }

    /// Opens as many streams as this team gets, over as many sandboxes as needed.
    fn all(bulk: &Arc<Bulk>, team: &str) -> Vec<Lease> {
        let of_sandbox = |n| std::iter::from_fn(move || bulk.lease(&owner(team, n)).ok());
        (0..20).flat_map(of_sandbox).collect()
    }

    #[tokio::test]
    async fn team_cannot_take_all_streams_of_a_node() {
        let bulk = bulk();
        let red = all(&bulk, "red");
        assert_eq!(red.len(), STREAMS_MAX / 2);
        let refused = bulk.lease(&owner("red", 99)).expect_err("its share");
        assert_eq!(refused.reason(), Some(Reason::TooManyCalls), "{refused}");
        assert_eq!(all(&bulk, "blue").len(), STREAMS_MAX / 4);
        drop(red);
        assert_eq!(all(&bulk, "red").len(), STREAMS_MAX / 2, "all was given back");
    }

    #[tokio::test]
    async fn sandbox_cannot_take_all_streams_of_its_team() {
        let bulk = bulk();
        let one: Vec<_> = std::iter::from_fn(|| bulk.lease(&owner("red", 1)).ok()).collect();
        assert_eq!(one.len(), SANDBOX_STREAMS_MAX);
        bulk.lease(&owner("red", 2)).expect("another sandbox has its own");
    }

    #[tokio::test(start_paused = true)]
    async fn connections_open_on_demand_and_close_when_idle() {
        let bulk = bulk();
        assert_eq!(bulk.streams(), [0; 0]);
        let first = bulk.lease(&owner("red", 1)).expect("a stream");
        let mut more: Vec<_> = (0..CONNECTION_STREAMS_MAX)
            .map(|_| bulk.lease(&owner("red", 1)).expect("room"))
            .collect();
        assert_eq!(bulk.streams(), [CONNECTION_STREAMS_MAX, 1]);
        drop(more.pop());
        bulk.close_idle();
        assert_eq!(bulk.streams(), [CONNECTION_STREAMS_MAX, 0], "it may be needed in a moment");
        tokio::time::advance(IDLE).await;
        bulk.close_idle();
        assert_eq!(bulk.streams(), [CONNECTION_STREAMS_MAX]);
        drop((first, more));
        bulk.close_idle();
        assert_eq!(bulk.streams(), [0]);
        tokio::time::advance(IDLE).await;
        bulk.close_idle();
        assert_eq!(bulk.streams(), [0; 0]);
    }

    #[tokio::test]
    async fn lease_lasts_until_both_directions_are_dropped() {
        let bulk = bulk();
        let lease = bulk.lease(&owner("red", 1)).expect("a stream");
        let input = lease.hold(futures_util::stream::pending::<()>());
        let output = lease.hold(futures_util::stream::pending::<()>());
        drop(lease);
        drop(output);
        assert_eq!(bulk.streams(), [1], "the agent may not have read what was sent");
        drop(input);
        assert_eq!(bulk.streams(), [0]);
    }
}
