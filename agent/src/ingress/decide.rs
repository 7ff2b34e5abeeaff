//! Which upstream a request gets. Pure: a host name, what the tables say about it, a verdict.
//!
//! The host is taken apart here and nowhere else; the regular expression in Caddy's configuration
//! is only a coarse sieve, and nothing that it captures routes anything. A sandbox is found in a
//! table by its name, never by putting together an address out of the host.

use std::{fmt, net::SocketAddr, str::FromStr};

use proto::{
    id::{Invalid, SandboxRef},
    name::{NodeName, Port},
};

use super::{Owner, State, Target};

/// The domain that sandboxes are reached under: labels in lower case, without a dot at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    /// The text.
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
        // 253 is the longest name of DNS; the label of a sandbox and its dot come in front.
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

/// What a host names: `port-{port}-vm-{vmid}.{domain}` or `port-{port}-{sandbox_id}.{domain}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// TCP port inside the sandbox.
    pub port: Port,
    /// The sandbox.
    pub sandbox: SandboxRef,
}

impl Name {
    /// The name in a Host header, in any case and with or without a port; `None` when it has any
    /// other form.
    pub fn parse(host: &str, domain: &Domain) -> Option<Self> {
        // A DNS name and a port are shorter; nothing else is worth a copy.
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

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The Caddy that clients reach.
    Edge,
    /// The Caddy that other nodes' Caddys reach. It never sends a request on: one hop at most.
    Peer,
}

/// What a request gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The sandbox, here, if something listens there.
    Local {
        /// Its own address and port.
        upstream: SocketAddr,
        /// What it gets as Host. Development servers refuse names that they do not know, and all
        /// of them know `localhost`; the name that the client used is in X-Forwarded-Host.
        host: String,
    },
    /// The sandbox is paused and this wakes it; then it is to be decided again.
    Wake,
    /// The owner's Caddy.
    Peer {
        /// Its address.
        upstream: SocketAddr,
    },
    /// 404: not a name of ours, or nobody's.
    NotFound(&'static str),
    /// 403: the port is not exposed.
    NotExposed(Port),
    /// 410: there was such a sandbox.
    Gone,
    /// 503: soon, perhaps.
    Unavailable(Unavailable),
    /// 421: a peer asked for what is not here.
    Misdirected,
}

/// Why a sandbox cannot answer now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unavailable {
    /// It boots.
    Booting,
    /// It is paused, and a request does not wake it.
    Paused,
    /// It is stopped.
    Stopped,
    /// Its node is down.
    NodeDown(NodeName),
    /// Nobody knows where it is: the cluster cannot be read.
    Blind,
}

/// Decides. `owner` is asked for only when the table alone does not say.
pub fn decide(name: Option<Name>, via: Via, local: Option<&Target>, owner: &Owner) -> Verdict {
    let Some(name) = name else { return Verdict::NotFound(NO_NAME) };
    match (local, via, owner) {
        (Some(target), ..) if target.state != State::Gone => on_this_node(name.port, target),
        // The number of a sandbox that was deleted here may be another node's by now.
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

/// True when the owner has a say in the verdict.
pub fn needs_owner(name: Option<Name>, local: Option<&Target>) -> bool {
    name.is_some() && local.is_none_or(|target| target.state == State::Gone)
}

const NO_NAME: &str = "this host is no sandbox: the form is port-{port}-vm-{vmid} or \
                       port-{port}-{sandbox_id} in front of the domain";
const NOBODY: &str = "there is no such sandbox";

fn on_this_node(port: Port, target: &Target) -> Verdict {
    // First of all: a closed port says nothing about the sandbox behind it.
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
