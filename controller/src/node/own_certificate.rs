//! The controller's own certificate. When its renewal is overdue, that is an event and a finding, as for those
//! of the nodes: once it has ended, no node is reached any more, and without a certificate of the operator's own no caller.

use std::{sync::Arc, time::Duration};

use daemon::{
    peer::{Validity, validity},
    tls::LiveIdentity,
};
use proto::sandbox::v1::EventKind;
use tokio_util::sync::CancellationToken;

use super::Nodes;
use crate::{events, store::Event};

/// Longest and shortest time between two looks.
const LOOK: Duration = Duration::from_mins(1);
const SHORTEST: Duration = Duration::from_millis(50);

impl Nodes {
    /// Looks at the certificate that the controller serves with, until `stop`.
    pub async fn watch_own_certificate(
        self: Arc<Self>,
        live: LiveIdentity,
        stop: CancellationToken,
    ) {
        let mut unreadable = false;
        loop {
            let mut pause = LOOK;
            match validity(&live.certificate()) {
                Ok(own) => {
                    unreadable = false;
                    // Often enough for the shortest lives, which tests have.
                    let quarter_ms = own.overdue_ms().saturating_sub(own.renew_ms());
                    pause = Duration::from_millis(quarter_ms / 10).clamp(SHORTEST, LOOK);
                    self.note_own_certificate(own);
                }
                Err(why) if !unreadable => {
                    unreadable = true;
                    tracing::error!(why, "the controller's certificate cannot be looked at");
                }
                Err(_) => {}
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Records the certificate that the controller serves with. The first time that its renewal is overdue is an
    /// event.
    fn note_own_certificate(&self, own: Validity) {
        let now_ms = self.clock.now_ms();
        let is_overdue = own.overdue_ms() <= now_ms;
        let before = self.own_certificate.lock().replace((own.clone(), is_overdue));
        let was_told = before.is_some_and(|(before, told)| told && before.serial == own.serial);
        if !is_overdue || was_told {
            return;
        }
        let hours = own.hours_left(now_ms);
        tracing::warn!(hours, "the renewal of the controller's own certificate is overdue");
        self.log.append(Event {
            // After a restart of the controller it is still the same one.
            once: Some(format!("certificate of the controller {}", own.serial)),
            detail: format!("the controller's own: it ends in {hours} h"),
            ..self.log.event(EventKind::CertificateOverdue, events::CONTROLLER)
        });
    }

    /// Returns the controller's own certificate, if it should have been renewed by now.
    pub fn overdue_own_certificate(&self) -> Option<Validity> {
        let own = self.own_certificate.lock();
        let (own, _) = own.as_ref()?;
        (own.overdue_ms() <= self.clock.now_ms()).then(|| own.clone())
    }
}
