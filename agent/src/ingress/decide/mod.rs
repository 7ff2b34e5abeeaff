//! Decides which upstream a request gets. Pure: from a host name and what the tables say about it
//! to a verdict.
//!
//! The host is parsed only here. The regular expression in Caddy's configuration is a coarse
//! filter, and nothing that it captures is used for routing. A sandbox is looked up in a table by
//! its name; no address is ever built from the host.

use std::{fmt, net::SocketAddr, str::FromStr};

use proto::{
    id::{Invalid, SandboxRef},
    name::{NodeName, Port},
};

use super::{Owner, State, Target};

/// Domain of the sandboxes' host names: labels in lower case, without a dot at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Domain {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(plain)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // 253 is the longest DNS name; the label of a sandbox and its dot come in front.
        if text.len() <= 253 - 64 && text.split('.').all(label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Invalid::new(
                "ingress.domain",
                "must be a domain name in lower case, such as `sandbox.example.com`",
            ))
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Parsed host name: `port-{port}-vm-{vmid}.{domain}` or `port-{port}-{sandbox_id}.{domain}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// TCP port inside the sandbox.
    pub port: Port,
    pub sandbox: SandboxRef,
}

impl Name {
    /// Parses a Host header, in any case and with or without a port; `None` when it has any other
    /// form.
    pub fn parse(host: &str, domain: &Domain) -> Option<Self> {
        // A DNS name and a port are shorter; do not copy anything else.
        if host.len() > 253 + 6 {
            return None;
        }
        let host = host.to_ascii_lowercase();
        let name = match host.split_once(':') {
            Some((name, port)) => port.parse::<Port>().ok().map(|_| name)?,
            None => &host,
        };
        let label = name.strip_suffix(domain.as_str())?.strip_suffix('.')?;
        let (port, sandbox) = label.strip_prefix("port-")?.split_once('-')?;
        let sandbox = match sandbox.strip_prefix("vm-") {
            Some(vmid) => SandboxRef::Vmid(vmid.parse().ok()?),
            None => SandboxRef::Id(sandbox.parse().ok()?),
        };
        Some(Self { port: port.parse().ok()?, sandbox })
    }
}

/// Caddy server that asks a route question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The server for clients.
    Edge,
    /// The server for other nodes' Caddys. It never forwards a request: one hop at most.
    Peer,
}

/// Verdict on a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Send it to the sandbox on this node, if something listens there.
    Local {
        upstream: SocketAddr,
        /// Host header for the sandbox. Development servers refuse names that they do not know, and
        /// all of them know `localhost`; the name that the client used is in X-Forwarded-Host.
        host: String,
    },
    /// Wake the paused sandbox, then decide again.
    Wake,
    /// Send it to the owner's Caddy.
    Peer { upstream: SocketAddr },
    /// 404: not a sandbox's name, or no such sandbox.
    NotFound(&'static str),
    /// 403: the port is not exposed.
    NotExposed(Port),
    /// 410: the sandbox has been deleted.
    Gone,
    /// 503: the sandbox may become available soon.
    Unavailable(Unavailable),
    /// 421: a peer asked for a sandbox that is not here.
    Misdirected,
}

/// Reason why a sandbox cannot answer now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unavailable {
    Booting,
    /// The sandbox is paused, and a request does not wake it.
    Paused,
    Stopped,
    NodeDown(NodeName),
    /// The sandbox's node is unknown: the cluster cannot be read.
    Blind,
}

impl Verdict {
    /// True when the sandbox may be able to answer soon, so that the request waits.
    pub fn waits(&self) -> bool {
        matches!(self, Self::Wake | Self::Unavailable(Unavailable::Booting))
    }
}

/// Decides. `owner` is used only when the table alone does not decide (see [`needs_owner`]).
pub fn decide(name: Option<Name>, via: Via, local: Option<&Target>, owner: &Owner) -> Verdict {
    let Some(name) = name else { return Verdict::NotFound(NO_NAME) };
    match (local, via, owner) {
        (Some(target), ..) if target.state != State::Gone => on_this_node(name.port, target),
        // The vmid of a sandbox that was deleted here may belong to another node by now.
        (_, Via::Edge, Owner::Peer(upstream)) => Verdict::Peer { upstream: *upstream },
        (_, Via::Edge, Owner::Down(node)) => {
            Verdict::Unavailable(Unavailable::NodeDown(node.clone()))
        }
        (Some(_), ..) => Verdict::Gone,
        (None, Via::Peer, Owner::Peer(_) | Owner::Down(_)) => Verdict::Misdirected,
        (None, _, Owner::Unknown) => Verdict::Unavailable(Unavailable::Blind),
        (None, _, Owner::Nobody | Owner::Here) => Verdict::NotFound(NOBODY),
    }
}

/// Returns true when the owner can change the verdict.
pub fn needs_owner(name: Option<Name>, local: Option<&Target>) -> bool {
    name.is_some() && local.is_none_or(|target| target.state == State::Gone)
}

const NO_NAME: &str = "this host is no sandbox: the form is port-{port}-vm-{vmid} or \
                       port-{port}-{sandbox_id} in front of the domain";
const NOBODY: &str = "there is no such sandbox";

fn on_this_node(port: Port, target: &Target) -> Verdict {
    // Check this first: a closed port reveals nothing about the sandbox behind it.
    if !target.ports.contains(&port) {
        return Verdict::NotExposed(port);
    }
    match (target.state, target.ip) {
        (State::Running, Some(ip)) => Verdict::Local {
            upstream: SocketAddr::new(ip, port.get()),
            host: format!("localhost:{port}"),
        },
        (State::Running | State::Booting, _) => Verdict::Unavailable(Unavailable::Booting),
        (State::Paused { wakes: true }, _) => Verdict::Wake,
        (State::Paused { wakes: false }, _) => Verdict::Unavailable(Unavailable::Paused),
        (State::Stopped, _) => Verdict::Unavailable(Unavailable::Stopped),
        (State::Gone, _) => Verdict::Gone,
    }
}

#[cfg(test)]
mod tests;
