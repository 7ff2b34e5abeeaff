//! Certificates of the nodes: which are accepted, and which each agent has shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use daemon::{
    peer::{Validity, validity},
    sync::Mutex,
};
use proto::name::NodeName;
use tokio_util::sync::CancellationToken;

use crate::store::enrolments::Enrolment;

/// Certificates of our CA that are accepted of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Accepted {
    /// All with its name.
    #[default]
    All,
    /// Those that it was given since it was revoked and joined again.
    Listed(BTreeSet<String>),
    /// None: it is revoked.
    None,
}

#[derive(Debug, Default)]
struct Known {
    accepted: Accepted,
    shown: Option<Validity>,
    /// Cancelled to close its connections.
    connections: CancellationToken,
}

/// Certificates of all nodes.
#[derive(Debug, Default)]
pub struct NodeCertificates(Mutex<BTreeMap<NodeName, Known>>);

impl NodeCertificates {
    /// Takes over which nodes are revoked, or were.
    pub fn load(&self, enrolments: &[Enrolment]) {
        let mut nodes = self.0.lock();
        for enrolment in enrolments {
            let accepted = match (enrolment.revoked_ms, enrolment.only_listed) {
                (0, false) => Accepted::All,
                (0, true) => Accepted::Listed(enrolment.serials.iter().cloned().collect()),
                (1.., _) => Accepted::None,
            };
            nodes.entry(enrolment.node.clone()).or_default().accepted = accepted;
        }
    }

    /// Judges the verified certificate (DER) of an agent. Returns the token that ends its connection.
    ///
    /// # Errors
    /// When the node or the certificate is revoked.
    pub fn check(&self, node: &NodeName, der: &[u8]) -> io::Result<CancellationToken> {
        let shown = validity(der).map_err(io::Error::other)?;
        let mut nodes = self.0.lock();
        let known = nodes.entry(node.clone()).or_default();
        let accepted = match &known.accepted {
            Accepted::All => true,
            Accepted::Listed(serials) => serials.contains(&shown.serial),
            Accepted::None => false,
        };
        if !accepted {
            let why = format!("the certificate of {node} is revoked");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        known.shown = Some(shown);
        Ok(known.connections.clone())
    }

    /// Records a certificate before its node gets it.
    pub fn issued(&self, node: &NodeName, certificate: &Validity) {
        let mut nodes = self.0.lock();
        if let Accepted::Listed(serials) = &mut nodes.entry(node.clone()).or_default().accepted {
            serials.insert(certificate.serial.clone());
        }
    }

    /// Records that a node joined with this certificate. A revoked one is accepted again, with this
    /// certificate alone.
    pub fn joined(&self, node: &NodeName, certificate: &Validity) {
        let mut nodes = self.0.lock();
        let known = nodes.entry(node.clone()).or_default();
        match &mut known.accepted {
            Accepted::All => {}
            Accepted::Listed(serials) => drop(serials.insert(certificate.serial.clone())),
            none @ Accepted::None => {
                *none = Accepted::Listed(BTreeSet::from([certificate.serial.clone()]));
            }
        }
        known.shown = Some(certificate.clone());
    }

    /// Accepts no certificate of a node any more, and closes its connections.
    pub fn revoke(&self, node: &NodeName) {
        let mut nodes = self.0.lock();
        let known = nodes.entry(node.clone()).or_default();
        known.accepted = Accepted::None;
        known.shown = None;
        std::mem::take(&mut known.connections).cancel();
    }

    /// Returns true when a node is revoked.
    pub fn is_revoked(&self, node: &NodeName) -> bool {
        self.0.lock().get(node).is_some_and(|known| known.accepted == Accepted::None)
    }

    /// Records the certificate that new connections of an agent will show.
    pub fn renewed(&self, node: &NodeName, certificate: Validity) {
        self.0.lock().entry(node.clone()).or_default().shown = Some(certificate);
    }

    /// Returns the certificate that an agent showed last.
    pub fn shown(&self, node: &NodeName) -> Option<Validity> {
        self.0.lock().get(node)?.shown.clone()
    }

    /// Returns the nodes whose certificate should have been renewed by now.
    pub fn overdue(&self, now_ms: u64) -> Vec<(NodeName, Validity)> {
        let nodes = self.0.lock();
        let shown = nodes.iter().filter_map(|(node, known)| Some((node, known.shown.as_ref()?)));
        let late = shown.filter(|(_, shown)| shown.overdue_ms() <= now_ms);
        late.map(|(node, shown)| (node.clone(), shown.clone())).collect()
    }
}
