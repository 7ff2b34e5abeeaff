//! The controller: serves the API and places the callers' sandboxes on the nodes of a cluster.
//!
//! ```text
//!  rpc/ (tonic; token -> team)          one request: rpc/sandbox.rs -> sandbox/create
//!    -> sandbox/ (domain, one file an operation)       -> placement (pure) -> store (durable)
//!         -> placement/ (pure: where, and why)         -> sandbox/create/creation -> node/client.rs
//!         -> node/ (agent.v1: calls, watch)
//!         -> enrolment/ (nodes that join; ca/ signs)
//!         -> name_directory (which sandbox each host name leads to)
//!         -> inventory/ (all sandboxes, as the nodes report them)
//!         -> events/ (the log of what happened; derivation is pure)
//!    -> access/ (tokens: who may call)
//!  ssh/ (russh; key -> team)            the same domain: commands and forwards of one sandbox
//!    -> audit/ (the log of calls, a chain of hashes in files)
//!         -> store/ (intent and the log: SQLite, or memory)
//! ```
//! Invariants: only `rpc` serves and only `node` calls with tonic; only `store` knows SQL;
//! `placement` uses neither time nor network; nothing is deleted on a node because it is missing
//! here; a node receives a creation only after its placement is durable; an agent's gRPC status is
//! never passed to a caller. Time and randomness are injected, so that all of this runs in a
//! simulation on paused time with a seed.

pub mod access;
pub mod audit;
pub mod ca;
pub mod clock;
pub mod commands;
pub mod config;
pub mod doctor;
pub mod enrolment;
pub mod events;
pub mod inventory;
mod name_directory;
pub mod node;
pub mod placement;
pub mod rpc;
pub mod sandbox;
pub mod setup;
pub mod ssh;
pub mod store;
pub mod token;
mod token_command;
pub mod url;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use access::Access;
use audit::Audit;
use clock::{Clock, Random};
use config::ApiLimits;
use enrolment::Enrolment;
use name_directory::Teller;
use node::{Connector, Nodes};
use sandbox::Sandboxes;
use store::Store;
use url::Urls;

/// Longest time that `stop` waits for calls under way.
const DRAIN: Duration = Duration::from_secs(10);

/// Dependencies and settings of a controller.
#[derive(Debug)]
pub struct Parts {
    /// Durable intent and events.
    pub store: Arc<dyn Store>,
    /// Connections to agents.
    pub connector: Arc<dyn Connector>,
    /// Log of calls. Its owner closes it, after the last call.
    pub audit: Audit,
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Randomness for ids and jitter.
    pub random: Arc<dyn Random>,
    /// Sources of nodes.
    pub nodes: node::Options,
    /// Bounds of creations.
    pub creates: sandbox::Options,
    /// Retention of the event log.
    pub events: events::Options,
    /// Bounds of the API.
    pub limits: ApiLimits,
    /// Template of the URLs of open ports.
    pub urls: Urls,
}

/// A running controller. Dropping it without `stop` is a crash: the next controller over the same
/// store continues the work under way.
#[derive(Debug)]
pub struct Controller {
    sandboxes: Arc<Sandboxes>,
    api: rpc::Api,
    access: Arc<Access>,
    audit: Audit,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Controller {
    /// Starts to watch the nodes and continues the creations that are in the store.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn start(parts: Parts) -> Result<Self, store::Error> {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (clock, random) = (parts.clock, parts.random);
        let access = Arc::new(Access::new(parts.store.clone(), clock.clone()));
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
            (clock.clone(), random),
            (tasks.clone(), stop.clone()),
        )
        .await?;
        let (uses, until) = (access.clone(), stop.clone());
        tasks.spawn(async move { uses.write_uses(until).await });
        let (ends, until) = (access.clone(), stop.clone());
        tasks.spawn(async move { ends.end_calls_of_ended_tokens(until).await });
        let (audit, urls, limits) = (parts.audit, parts.urls, parts.limits);
        let api = rpc::Api::new(sandboxes.clone(), access.clone(), audit.clone(), urls, limits);
        let api = api.await;
        let (health, nodes, until) = (api.health().clone(), sandboxes.registry(), stop.clone());
        tasks.spawn(async move {
            if until.run_until_cancelled(nodes.epoch.replaced()).await.is_some() {
                health.replaced().await;
            }
        });
        Ok(Self { sandboxes, api, access, audit, store: parts.store, clock, tasks, stop })
    }

    /// Returns the gRPC services, which can be served over any stream of connections.
    pub fn api(&self) -> rpc::Api {
        self.api.clone()
    }

    /// Lets nodes join, and keeps their certificates young.
    pub fn enrol(&self, signer: ca::Signer, settings: enrolment::Settings) {
        let (nodes, store) = (self.sandboxes.registry(), self.store.clone());
        let clock = self.clock.clone();
        let enrolment = Arc::new(Enrolment::new(nodes, store, signer, clock, settings));
        self.tasks.spawn(enrolment.clone().keep(self.stop.clone()));
        self.api.enrol(enrolment);
    }

    /// Tells the nodes whether host names by name are answered, and which sandbox each leads to. Called once.
    pub fn tell_names(&self, is_enabled: bool) {
        let teller = Teller::new(self.sandboxes.registry(), is_enabled);
        self.tasks.spawn(teller.run(self.stop.clone()));
    }

    /// Tells when the renewal of the certificate that the controller serves with is overdue. Called once.
    pub fn watch_certificate(&self, live: daemon::tls::LiveIdentity) {
        let nodes = self.sandboxes.registry();
        self.tasks.spawn(nodes.watch_own_certificate(live, self.stop.clone()));
    }

    /// Lets tokens be client certificates.
    pub fn certify(&self, signer: ca::ClientSigner) {
        self.access.certify(signer);
    }

    /// Makes the SSH server, and tells clients of it. Called once.
    pub fn ssh(&self, key: russh::keys::PrivateKey, settings: &ssh::Settings) -> ssh::Server {
        self.api.announce_ssh(ssh::announcement(&key, settings));
        let services = ssh::Services {
            sandboxes: self.sandboxes.clone(),
            access: self.access.clone(),
            audit: self.audit.clone(),
            permits: self.api.permits(),
            tasks: self.tasks.clone(),
            stop: self.stop.clone(),
        };
        ssh::Server::new(key, settings, services)
    }

    /// Returns the domain, for programs that run the controller in their own process.
    pub fn sandboxes(&self) -> &Arc<Sandboxes> {
        &self.sandboxes
    }

    /// Waits at most `limit` until every node is ready; returns the count of ready and of all
    /// nodes.
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

    /// Returns the token that is cancelled when the controller stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Stops the controller. Waiting callers get the state known now; creations under way stay in
    /// the store and the next start continues them.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(DRAIN, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "stopped before all tasks ended");
        }
        // The tasks that ended above have logged events, which must be stored too.
        if timeout(DRAIN, self.sandboxes.write_behind()).await.is_err() {
            tracing::warn!("stopped before the last events were written");
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
