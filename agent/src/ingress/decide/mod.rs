//! Decides which upstream a request gets. Pure: from what Caddy says of it (`question`, `host`, `uri`), and what
//! the tables say of its sandbox, to a verdict. Who reaches an open port is decided in `access`.
//!
//! A sandbox is looked up in a table by its name; no address is ever built from the host. Access is decided
//! before anything else of an open port: whoever may not reach it learns nothing of the sandbox, and wakes nothing.

mod access;
mod host;
mod question;
mod uri;

use std::net::SocketAddr;

use proto::{
    host::Label,
    name::{NodeName, Port},
};

pub(super) use self::question::TOKENS;
pub use self::{
    access::{Grant, Identity, Redirect},
    host::Domain,
    question::{Origin, Question, Rules},
};

use self::access::Access;
use super::{Owner, State, Target};

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
        /// Permission that it has.
        grant: Grant,
    },
    /// 204, and nothing of the sandbox is asked: a page may send requests. They need a credential, or their server
    /// cannot answer now.
    Preflight {
        /// Origin of the page, or `*`.
        allowed: String,
        /// Time for which a browser may rely on this answer, in seconds.
        for_s: u32,
    },
    /// 303: the URL without the credential in it.
    Redirect(Redirect),
    /// 400: no sandbox gets a request of this form.
    Malformed(&'static str),
    /// 400: the credentials contradict each other.
    Ambiguous,
    /// 401: the port needs a credential.
    Unauthorized(&'static str),
    /// 403: the port is not for this request.
    Forbidden(&'static str),
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
pub fn decide(question: &Question<'_>, local: Option<&Target>, owner: &Owner) -> Verdict {
    let Some(label) = &question.label else { return Verdict::NotFound(NO_NAME) };
    if let Some(why) = question.flaw() {
        return Verdict::Malformed(why);
    }
    let verdict = of_sandbox(question, label, local, owner);
    match (label, &verdict) {
        // Names can be guessed: what is not open looks like what is not there, on every node.
        (
            Label::ByName { .. },
            Verdict::NotFound(_) | Verdict::NotExposed(_) | Verdict::Gone | Verdict::Misdirected,
        ) => Verdict::NotFound(NOT_BY_NAME),
        _ => verdict,
    }
}

fn of_sandbox(
    question: &Question<'_>,
    label: &Label,
    local: Option<&Target>,
    owner: &Owner,
) -> Verdict {
    match (local, question.via, owner) {
        (Some(target), ..) if target.state != State::Gone => match port_of(label, target) {
            Some(port) => on_this_node(question, port, target),
            None => Verdict::NotFound(NOBODY),
        },
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

/// Returns true when the owner can change the verdict on a sandbox.
pub fn needs_owner(local: Option<&Target>) -> bool {
    local.is_none_or(|target| target.state == State::Gone)
}

const NO_NAME: &str = "this host is no sandbox: the form is port-{port}-vm-{vmid}, \
                       port-{port}-{sandbox_id} or {port}-{sandbox_id} in front of the domain";
const NOBODY: &str = "there is no such sandbox";
const NOT_BY_NAME: &str = "no sandbox has an open port with this host name";
/// Time for which a browser may rely on the answer to a preflight, in seconds.
const PREFLIGHT_S: u32 = 600;

/// Returns the port that a host name leads to; `None` when the sandbox does not have this name, or no main port.
fn port_of(label: &Label, target: &Target) -> Option<Port> {
    match label {
        Label::ById { port, .. } => Some(*port),
        // The directory may be behind: only the record knows.
        Label::ByName { sandbox, .. } if target.name.as_ref() != Some(sandbox) => None,
        Label::ByName { port, .. } => port.or(target.main),
    }
}

fn on_this_node(question: &Question<'_>, port: Port, target: &Target) -> Verdict {
    let grant = match access::decide(question, target, port) {
        // Check this first: a closed port reveals nothing about the sandbox behind it.
        None => return Verdict::NotExposed(port),
        Some(Access::Redirected(redirect)) => return Verdict::Redirect(redirect),
        Some(Access::Unauthorized(why)) => return Verdict::Unauthorized(why),
        Some(Access::Forbidden(why)) => return Verdict::Forbidden(why),
        Some(Access::Ambiguous) => return Verdict::Ambiguous,
        // In every state of the sandbox alike: who asks is unknown.
        Some(Access::Preflight { allowed }) => {
            return Verdict::Preflight { allowed, for_s: PREFLIGHT_S };
        }
        Some(Access::Granted(grant)) => grant,
    };
    let is_up = target.state == State::Running && target.ip.is_some();
    if !is_up && question.is_allowed_preflight() {
        // The port is public, and its server cannot be asked. After a refusal a browser would not send the request, which
        // wakes the sandbox, waits for it, or is told why it cannot. The next preflight asks again: the server may say
        // otherwise by then.
        return Verdict::Preflight { allowed: "*".to_owned(), for_s: 0 };
    }
    match (target.state, target.ip) {
        (State::Running, Some(ip)) => Verdict::Local {
            upstream: SocketAddr::new(ip, port.get()),
            host: own_name(port),
            grant,
        },
        (State::Running | State::Booting, _) => Verdict::Unavailable(Unavailable::Booting),
        (State::Paused { wakes: true }, _) if grant.wakes => Verdict::Wake,
        (State::Paused { .. }, _) => Verdict::Unavailable(Unavailable::Paused),
        (State::Stopped, _) => Verdict::Unavailable(Unavailable::Stopped),
        (State::Gone, _) => Verdict::Gone,
    }
}

/// Port of HTTP, which clients do not write.
const HTTP: u16 = 80;

/// Returns the name and the port that a server is told it has.
fn own_name(port: Port) -> String {
    if port.get() == HTTP { "localhost".to_owned() } else { format!("localhost:{port}") }
}

#[cfg(test)]
mod name_tests;
#[cfg(test)]
mod tests;
