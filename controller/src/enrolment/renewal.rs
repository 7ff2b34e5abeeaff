//! Renews the certificates of the nodes at half of their lives, over the connections that there are.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use proto::sandbox::v1::EventKind;
use tokio_util::sync::CancellationToken;

use super::{Enrolment, refused};
use crate::{
    node::{self, Node},
    store::{Event, enrolments::Issued},
};

/// Longest time between two looks.
const LOOK: Duration = Duration::from_mins(1);
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
        let pause = (self.signer.lives().agent / 20).min(LOOK);
        loop {
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            if !self.nodes.epoch.fenced() {
                // A renewal that has begun ends: the store knows of the certificate already.
                self.look().await;
            }
        }
    }

    async fn look(&self) {
        let (now_ms, certificates) = (self.clock.now_ms(), self.nodes.certificates());
        let due = |node: &Arc<Node>| {
            let shown = certificates.shown(&node.name);
            node.down().is_none() && shown.is_some_and(|shown| shown.renew_ms() <= now_ms)
        };
        let due = self.nodes.all().into_iter().filter(due);
        let renewals = stream::iter(due).map(async |node| {
            match self.renew(&node).await {
                Ok(()) => {}
                // Left alone. An overdue renewal is told below.
                Err(error @ Failure::TooOld) => {
                    tracing::debug!(node = %node.name, %error, "certificate not renewed");
                }
                Err(error) => {
                    tracing::warn!(node = %node.name, %error, "certificate not renewed");
                }
            }
        });
        renewals.buffer_unordered(AT_ONCE).collect::<()>().await;
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
        let issued = Issued {
            serial: agent.validity.serial.clone(),
            not_after_ms: agent.validity.not_after_ms,
        };
        let stored = self.store.add_certificate(name, issued, self.clock.now_ms()).await;
        if !stored.map_err(crate::sandbox::Error::from)? {
            return Err(Failure::Revoked);
        }
        let certificates = self.nodes.certificates();
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
