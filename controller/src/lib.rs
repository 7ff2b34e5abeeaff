//! The controller: takes what callers ask for and spreads it over the nodes.
//!
//! ```text
//!  rpc/ (tonic; token -> team)          one request: rpc/sandbox.rs -> sandbox/create.rs
//!    -> sandbox/ (domain, one file an operation)       -> placement (pure) -> store (durable)
//!         -> placement/ (pure: where, and why)         -> sandbox/job.rs -> node/client.rs
//!         -> node/ (agent.v1: calls, watch, cache)
//!         -> events/ (the log of what happened; derivation is pure)
//!         -> store/ (intent and the log: SQLite, or memory)
//! ```
//! What must hold: only `rpc` serves and only `node` calls with tonic; only `store` knows SQL;
//! `placement` knows neither time nor network; nothing is deleted on a node because it is missing
//! here; a node hears of a creation only after the choice of it is durable; an agent's status is
//! never handed on. Time and chance are passed in, so that all of this runs in a simulation on
//! paused time with a seed.

pub mod ca;
pub mod clock;
pub mod commands;
pub mod config;
pub mod events;
pub mod node;
pub mod placement;
pub mod rpc;
pub mod sandbox;
pub mod store;
pub mod token;
pub mod url;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use clock::{Clock, Random};
use config::ApiLimits;
use node::{Connector, Nodes};
use sandbox::Sandboxes;
use store::Store;
use url::UrlTemplate;

/// How long calls under way may go on after the controller was told to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// What a controller is made of.
#[derive(Debug)]
pub struct Parts {
    /// Where intent is kept.
    pub store: Arc<dyn Store>,
    /// How agents are reached.
    pub connector: Arc<dyn Connector>,
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub random: Arc<dyn Random>,
    /// Which nodes.
    pub nodes: node::Options,
    /// Bounds of creations.
    pub creates: sandbox::Options,
    /// How much is kept of the log.
    pub events: events::Options,
    /// Bounds of the API.
    pub limits: ApiLimits,
    /// Addresses of open ports.
    pub urls: UrlTemplate,
}

/// A running controller. Dropping it without `stop` is a crash: whatever it was doing is gone on
/// with by the next one over the same store.
#[derive(Debug)]
pub struct Controller {
    sandboxes: Arc<Sandboxes>,
    api: rpc::Api,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Controller {
    /// Starts to watch the nodes and goes on with what was under way.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn start(parts: Parts) -> Result<Self, store::Error> {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (clock, random) = (parts.clock, parts.random);
        let nodes = Nodes::start(
            parts.nodes,
            parts.connector,
            parts.store.clone(),
            (clock.clone(), random.clone()),
            (tasks.clone(), stop.clone()),
        )
        .await?;
        let sandboxes = Sandboxes::start_up(
            nodes,
            parts.store.clone(),
            (parts.creates, parts.events),
            (clock, random),
            (tasks.clone(), stop.clone()),
        )
        .await?;
        let api = rpc::Api::new(sandboxes.clone(), parts.store, parts.urls, parts.limits).await;
        Ok(Self { sandboxes, api, tasks, stop })
    }

    /// The services, to be served over any stream of connections.
    pub fn api(&self) -> rpc::Api {
        self.api.clone()
    }

    /// The domain, for programs that hold the controller in their own process.
    pub fn sandboxes(&self) -> &Arc<Sandboxes> {
        &self.sandboxes
    }

    /// Waits until every node has been heard, at most for `limit`. How many have, of how many.
    pub async fn settled(&self, limit: Duration) -> (usize, usize) {
        let deadline = Instant::now() + limit;
        let mut news = self.sandboxes.nodes().news();
        loop {
            news.mark_unchanged();
            let statuses = self.sandboxes.nodes().statuses();
            let ready = statuses.iter().filter(|status| status.not_ready.is_none()).count();
            let waited = timeout_at(deadline, news.changed());
            if ready == statuses.len() || waited.await.is_err() {
                return (ready, statuses.len());
            }
        }
    }

    /// Cancelled when the controller stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Stops: callers that wait get what is known now, creations under way stay in the store and go
    /// on with the next start.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(DRAIN, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "stopped without waiting for everything");
        }
        // What was done while the others ended belongs into the log too.
        if timeout(DRAIN, self.sandboxes.write_behind()).await.is_err() {
            tracing::warn!("stopped without writing the last events");
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
