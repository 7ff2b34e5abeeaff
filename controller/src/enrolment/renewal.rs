//! Renews the certificates of the nodes at half of their lives, and those that are not valid yet, over the connections
//! that there are.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::ready, stream};
use proto::{name::NodeName, sandbox::v1::EventKind};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Enrolment, refused};
use crate::{
    node::{self, Node},
    store::{Event, enrolments::Issued},
};

/// Longest time between two looks.
const LOOK: Duration = Duration::from_mins(1);
/// Longest time until a renewal that failed is tried again: each one makes keys on the node, and a row in the store.
const AGAIN: Duration = Duration::from_hours(1);
/// Most renewals at once.
const AT_ONCE: usize = 8;

/// Reason why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Node(#[from] node::Error),
    #[error("{0}")]
    Ours(#[from] crate::sandbox::Error),
    #[error("its agent is of a version that cannot renew: install a later one")]
    TooOld,
    #[error("it is revoked")]
    Revoked,
}

impl Enrolment {
    /// Looks after the certificates of all nodes until `stop`: renews them, and tells each node which of others
    /// are revoked.
    pub async fn keep(self: Arc<Self>, stop: CancellationToken) {
        tokio::join!(self.renew_all(&stop), self.tell_revocations(&stop));
    }

    async fn renew_all(&self, stop: &CancellationToken) {
        // Often enough for the shortest lives, which tests have.
        let life = self.signer.lives().agent;
        let pause = (life / 20).min(LOOK);
        let again = (life / 160).clamp(pause, AGAIN);
        let mut failed = BTreeMap::new();
        loop {
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            if !self.nodes.epoch.fenced() {
                // A renewal that has begun ends: the store knows of the certificate already.
                failed.retain(|_, at: &mut Instant| at.elapsed() < again);
                self.look(&mut failed).await;
            }
        }
    }

    /// Renews what is due, but for the nodes of `failed`, and adds those whose renewal fails now.
    async fn look(&self, failed: &mut BTreeMap<NodeName, Instant>) {
        let (now_ms, certificates) = (self.clock.now_ms(), self.nodes.certificates());
        let due = |node: &Arc<Node>| {
            let shown = certificates.shown(&node.name);
            let is_due = shown.is_some_and(|shown| shown.is_due(now_ms));
            is_due && node.down().is_none() && !failed.contains_key(&node.name)
        };
        let due: Vec<_> = self.nodes.all().into_iter().filter(due).collect();
        let renewals = stream::iter(due).map(async |node| {
            match self.renew(&node).await {
                Ok(()) => return None,
                // Left alone. An overdue renewal is told below.
                Err(error @ Failure::TooOld) => {
                    tracing::debug!(node = %node.name, %error, "certificate not renewed");
                }
                Err(error) => {
                    tracing::warn!(node = %node.name, %error, "certificate not renewed");
                }
            }
            Some((node.name.clone(), Instant::now()))
        });
        failed
            .extend(renewals.buffer_unordered(AT_ONCE).filter_map(ready).collect::<Vec<_>>().await);
        for (node, shown) in self.nodes.overdue_certificates() {
            let log = &self.nodes.log;
            log.append(Event {
                once: Some(format!("certificate {node} {}", shown.serial)),
                detail: format!("it ends in {} h", shown.hours_left(now_ms)),
                node: Some(node),
                ..log.event(EventKind::CertificateOverdue, crate::events::CONTROLLER)
            });
        }
    }

    async fn renew(&self, node: &Node) -> Result<(), Failure> {
        let (name, epoch) = (&node.name, self.nodes.epoch.get());
        let requests = node.client.request_certificates(epoch).await;
        let requests = requests.inspect_err(|error| self.nodes.fence_if_replaced(error))?;
        let requests = requests.ok_or(Failure::TooOld)?;
        let agent = self.signer.agent(name, &requests.agent).map_err(refused)?;
        let hop = requests.ingress.map(|csr| self.signer.ingress(name, &csr));
        let hop = hop.transpose().map_err(refused)?;
        let certificates = self.nodes.certificates();
        let issued = Issued {
            serial: agent.validity.serial.clone(),
            not_after_ms: agent.validity.not_after_ms,
            in_use: certificates.shown(name).map(|shown| shown.serial),
        };
        let stored = self.store.add_certificate(name, issued, self.clock.now_ms()).await;
        if !stored.map_err(crate::sandbox::Error::from)? {
            return Err(Failure::Revoked);
        }
        certificates.issued(name, &agent.validity);
        let hop = hop.map(|hop| hop.pem);
        let restart = node.client.install_certificates(epoch, agent.pem, hop).await;
        let restart = restart.inspect_err(|error| self.nodes.fence_if_replaced(error))?;
        certificates.renewed(name, agent.validity);
        tracing::info!(node = %name, "certificate renewed");
        if restart {
            tracing::warn!(node = %name, "restart pve-sandbox-ingress there: it has a new certificate");
        }
        Ok(())
    }
}
