//! HTTP from outside into the sandboxes of the cluster.
//!
//! Caddy runs one static configuration (`render`, `headers`, `caddy`) and asks, for each request, over a unix
//! socket (`server`): which upstream? The answer is decided (`decide`, pure) from the request's
//! host, this node's sandboxes and the owner of what is not here (`owners`). So nothing is reloaded
//! on the way of a request, a port is open only while it is exposed, and an open WebSocket never
//! sees what happens to other sandboxes.
//!
//! Knows `sandbox` and `pve`; knows neither `rpc` nor `reconcile`.

pub mod caddy;
pub mod check;
pub mod decide;
mod headers;
pub mod owners;
pub mod probe;
pub mod render;
pub mod routes;
pub mod seen;
pub mod server;
pub mod settings;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::{NodeName, Port},
};

/// A sandbox of this node as a route question sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Who it is.
    pub id: SandboxId,
    /// Its container.
    pub vmid: Vmid,
    /// Whether it can answer.
    pub state: State,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// Its open ports; all others are closed.
    pub ports: BTreeSet<Port>,
}

/// Whether a sandbox can answer a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// It boots, for the first time or again.
    Booting,
    /// It is paused.
    Paused {
        /// A request wakes it.
        wakes: bool,
    },
    /// It is stopped, or stopping.
    Stopped,
    /// It has been deleted, or is being.
    Gone,
}

/// Whose sandbox it is that is not in this node's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Nobody's, as far as the cluster knows.
    Nobody,
    /// The cluster cannot be read, so it may be anybody's.
    Unknown,
    /// A guest of this very node that is not ours: never reached.
    Here,
    /// Another node's, whose Caddy takes requests of its peers at this address.
    Peer(SocketAddr),
    /// Another node's, which is down or has no address now.
    Down(NodeName),
}

/// What a route question is answered from.
#[async_trait::async_trait]
pub trait Routes: Send + Sync + std::fmt::Debug {
    /// A sandbox of this node, from memory. By vmid: the one that lives there, else the last one
    /// that did.
    fn local(&self, sandbox: SandboxRef) -> Option<Target>;

    /// The owner of a sandbox that lives on another node, or did.
    async fn owner(&self, sandbox: SandboxRef) -> Owner;

    /// A request goes to this sandbox of this node.
    fn used(&self, sandbox: &SandboxId);

    /// Wakes a paused sandbox of this node for a request; when this ends it can be looked at again.
    async fn wake(&self, sandbox: SandboxRef);
}
