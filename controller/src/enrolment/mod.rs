//! Nodes that join, and that are turned away. The controller is their CA: a node makes its keys
//! itself, shows a one-time token, and gets certificates for its name.
//!
//! ```text
//!  node token -> row (hashed) -> line for the node -> Join -> token and keys checked -> pool chosen
//!     -> certificates signed -> token used, node and certificate stored (one write) -> answer
//! ```
//! Invariants: the key of a node never leaves it; of a request only the key counts, the names are ours;
//! a token is used once, and again only for the same keys; no two nodes have a pool that overlaps; a
//! certificate is in the store before its node has it.

mod pool;
mod renewal;
mod revocations;
mod token;

use std::{net::SocketAddr, sync::Arc};

use proto::{
    Reason,
    name::NodeName,
    sandbox::v1::{EventKind, JoinRequest, JoinResponse},
    secret::Secret,
};
use sha2::{Digest as _, Sha256};

use crate::{
    ca::{self, Signer},
    clock::Clock,
    node::Nodes,
    sandbox::{Caller, Error, Result},
    store::{
        Event, Store,
        enrolments::{Admission, Issued},
    },
};

use pool::Pool;
pub use token::{TTL_S, issue};

/// Actor of a join in the event log.
const JOIN: &str = "join";
/// Longest address of an agent, bytes.
const ADDRESS_MAX: usize = 261;

/// Facts that a node which joins is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Domain of the sandboxes' host names.
    pub domain: Option<String>,
    /// Whether clients of the sandboxes use https.
    pub https: bool,
    /// Names and addresses in the controller's certificate that a node may reach it by.
    pub names: Vec<String>,
}

/// A one-time token, as it is shown to an operator.
#[derive(Debug, Clone)]
pub struct Issue {
    /// Text of the token.
    pub text: Secret<String>,
    /// End of its life, milliseconds since 1970.
    pub expires_ms: u64,
}

/// Admits nodes and turns them away.
#[derive(Debug)]
pub struct Enrolment {
    nodes: Arc<Nodes>,
    store: Arc<dyn Store>,
    signer: Signer,
    clock: Arc<dyn Clock>,
    settings: Settings,
    /// Held from the look at the pools of others until a node is stored and known with its own, and while
    /// one is revoked.
    joining: tokio::sync::Mutex<()>,
    /// Notified when a node was revoked or has joined.
    changed: tokio::sync::Notify,
}

impl Enrolment {
    /// Creates the service over the registry of nodes and the CAs.
    pub fn new(
        nodes: Arc<Nodes>,
        store: Arc<dyn Store>,
        signer: Signer,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Self {
        let (joining, changed) = (tokio::sync::Mutex::default(), tokio::sync::Notify::new());
        Self { nodes, store, signer, clock, settings, joining, changed }
    }

    /// Returns the names and addresses that a node may reach the controller by.
    pub fn names(&self) -> &[String] {
        &self.settings.names
    }

    /// Returns the SHA-256 of the CA's certificate, hex.
    pub fn fingerprint(&self) -> String {
        data_encoding::HEXLOWER.encode(&self.signer.fingerprint())
    }

    /// Makes a one-time token for a node. `ttl_s` 0 means the usual life.
    ///
    /// # Errors
    /// When the name or the life is invalid, or the store fails.
    pub async fn create_token(&self, caller: &Caller, node: &str, ttl_s: u32) -> Result<Issue> {
        let node: NodeName = node.parse()?;
        self.may_change()?;
        let (text, token) = issue(&node, ttl_s, self.clock.now_ms())?;
        let expires_ms = token.expires_ms;
        self.store.add_node_token(token).await?;
        self.log(EventKind::NodeTokenCreated, &caller.token, node, String::new());
        Ok(Issue { text: text.into(), expires_ms })
    }

    /// Admits a node.
    ///
    /// # Errors
    /// TOKEN_INVALID, ADDRESS_CONFLICT for a pool that another node has, FIELD_INVALID.
    pub async fn join(&self, request: JoinRequest) -> Result<JoinResponse> {
        self.may_change()?;
        let node: NodeName = request.node.parse()?;
        let address = checked_address(&request.address)?;
        let token = self.token(&request.token, &node).await?;
        // Before the signatures: what the node had before this time is refused if it was revoked.
        let now_ms = self.clock.now_ms();
        let agent = self.signer.agent(&node, &request.agent_csr).map_err(refused)?;
        let hop = self.signer.ingress(&node, &request.ingress_csr).map_err(refused)?;
        // Of two keys this one is the node; a node that repeats its call may have made the other anew.
        let key = Sha256::digest(&agent.key);

        let turn = self.joining.lock().await;
        let pool = self.pool(&node, &request.pool, request.number).await?;
        let admission = Admission {
            token,
            key: key.to_vec(),
            node: node.clone(),
            address: address.clone(),
            pool: pool.clone(),
            issued: Issued {
                serial: agent.validity.serial.clone(),
                not_after_ms: agent.validity.not_after_ms,
                in_use: None,
            },
            now_ms,
        };
        if !self.store.admit(admission).await? {
            return Err(token::invalid(&node));
        }
        self.nodes.certificates().joined(&node, &agent.validity);
        self.nodes.joined(&node, &address);
        self.changed.notify_one();
        drop(turn);
        tracing::info!(%node, address, pool, "node joined");
        self.log(EventKind::NodeJoined, JOIN, node, format!("its agent is at {address}"));
        Ok(JoinResponse {
            agent_certificate: agent.pem,
            ca: self.signer.ca().to_owned(),
            ingress_certificate: hop.pem,
            ingress_ca: self.signer.ingress_ca().to_owned(),
            pool,
            domain: self.settings.domain.clone().unwrap_or_default(),
            https: self.settings.https,
        })
    }

    /// Turns a node away at once. Returns the number of living sandboxes that are on it.
    ///
    /// # Errors
    /// NODE_NOT_FOUND; when the store fails.
    pub async fn revoke(&self, caller: &Caller, node: &str) -> Result<usize> {
        let node: NodeName = node.parse()?;
        self.may_change()?;
        let enrolled = self.store.enrolments().await?;
        let living = self.nodes.cache.living_on(&node).len();
        let joined = enrolled.iter().any(|known| known.node == node);
        if !joined && living == 0 && self.nodes.get(&node).is_none() {
            return Err(Error::new(Reason::NodeNotFound, format!("there is no node {node}")));
        }
        // Not while the node joins: what counts last counts in the store and here.
        let _turn = self.joining.lock().await;
        // The store first: after a crash in between, it is refused from the next start on.
        self.store.revoke_node(&node, self.clock.now_ms()).await?;
        self.nodes.certificates().revoke(&node);
        self.changed.notify_one();
        tracing::warn!(%node, "node revoked");
        let detail = format!("{living} sandboxes are on it");
        self.log(EventKind::NodeRevoked, &caller.token, node, detail);
        Ok(living)
    }

    /// Checks a token before anything is signed; returns its id.
    async fn token(&self, text: &str, node: &NodeName) -> Result<String> {
        let (id, secret) = token::split(text).ok_or_else(|| token::invalid(node))?;
        let known = self.store.node_token(id).await?;
        let fits = |known: &_| token::verify(known, secret, node, self.clock.now_ms());
        known.filter(fits).map(|known| known.id).ok_or_else(|| token::invalid(node))
    }

    /// Chooses the addresses of a node's sandboxes: what it asks for, else what it had before, else
    /// the first that are free.
    async fn pool(&self, node: &NodeName, asked: &str, number: u32) -> Result<String> {
        let enrolled = self.store.enrolments().await?;
        let before = enrolled.iter().find(|known| known.node == *node && !known.pool.is_empty());
        let others = enrolled.iter().filter(|known| known.node != *node);
        let taken: Vec<(Pool, &NodeName)> =
            others.filter_map(|known| Some((known.pool.parse().ok()?, &known.node))).collect();
        let wanted =
            if asked.is_empty() { before.map(|known| known.pool.as_str()) } else { Some(asked) };
        let Some(wanted) = wanted else {
            let taken: Vec<Pool> = taken.iter().map(|(pool, _)| *pool).collect();
            return pool::free(number, &taken).ok_or_else(|| {
                let message = "all of 10.100.0.0/16 is given to nodes: set network.pool in the \
                               node's agent.toml";
                Error::new(Reason::AddressConflict, message)
            });
        };
        let pool: Pool = wanted.parse()?;
        match taken.iter().find(|(other, _)| other.overlaps(pool)) {
            None => Ok(wanted.to_owned()),
            Some((other, holder)) => Err(Error::new(
                Reason::AddressConflict,
                format!(
                    "the addresses {wanted} of {node} overlap with {other} of {holder}: give \
                     {node} others, with network.pool in its agent.toml or with --pool"
                ),
            )),
        }
    }

    fn may_change(&self) -> Result<()> {
        if self.nodes.epoch.fenced() {
            let message = "a later controller is in charge; ask that one";
            return Err(Error::new(Reason::StaleEpoch, message));
        }
        Ok(())
    }

    fn log(&self, kind: EventKind, actor: &str, node: NodeName, detail: String) {
        let log = &self.nodes.log;
        log.append(Event { node: Some(node), detail, ..log.event(kind, actor) });
    }
}

/// Checks that an address is `host:port`.
fn checked_address(text: &str) -> Result<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b);
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let port = port.and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port > 0);
    let is_any = text.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_unspecified());
    if text.len() > ADDRESS_MAX || !text.bytes().all(plain) || port.is_none() || is_any {
        return Err(proto::id::Invalid::new("address", "must be host:port of the agent").into());
    }
    Ok(text.to_owned())
}

fn refused(error: ca::Error) -> Error {
    match error {
        ca::Error::Request(why) => {
            tracing::debug!(why, "certificate request refused");
            proto::id::Invalid::new("csr", "must be a request for an ECDSA key on P-256").into()
        }
        error @ (ca::Error::File { .. }
        | ca::Error::Broken { .. }
        | ca::Error::Missing(_)
        | ca::Error::Name(_)
        | ca::Error::Authority(_)
        | ca::Error::Ended
        | ca::Error::Certificate(_)) => {
            tracing::error!(error = %daemon::chain::Chain(&error), "could not sign a certificate");
            Error::new(Reason::StoreFailed, "the controller's CA failed; see its log")
        }
    }
}
