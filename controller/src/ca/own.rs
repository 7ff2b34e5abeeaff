//! The controller's own certificate: renewed by the controller at half of its life, with the names
//! that it has.

use std::{path::Path, time::Duration};

use daemon::{
    peer,
    tls::{Identity, LiveIdentity},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio_util::sync::CancellationToken;

use super::{Error, Files, Result, issue_own, names_before, read_certificate};
use crate::clock::{Clock, SystemClock};

/// Shortest and longest time between two looks, and the time after a failure.
const SOONEST: Duration = Duration::from_millis(500);
const LATEST: Duration = Duration::from_hours(1);
const AGAIN: Duration = Duration::from_mins(1);

/// Controller's own certificate, as the daemon keeps it.
#[derive(Debug)]
pub struct Own {
    /// Files of the CA.
    pub files: Files,
    /// Life of a new certificate.
    pub life: Duration,
}

impl Own {
    /// Finishes an interrupted renewal, renews a certificate that is due, and reads it. A CA that is not
    /// there only means that nothing is renewed.
    ///
    /// # Errors
    /// When certificate or key cannot be read.
    pub fn load(&self) -> Result<LiveIdentity, daemon::tls::Error> {
        let pair = self.files.pair();
        if let Err(error) = pair.recover() {
            tracing::error!(%error, "could not finish the renewal of the controller's certificate");
        }
        if self.due_in(&SystemClock).is_ok_and(|due| due.is_zero()) {
            self.renew();
        }
        LiveIdentity::new(&self.identity()?)
    }

    /// Renews the certificate in time until `stop`; `live` serves with the new one from then on. Once the CA
    /// has been replaced, nothing is renewed: this process, and the agents that it talks to, trust the old
    /// one.
    pub async fn keep(self, live: LiveIdentity, stop: CancellationToken) {
        let (first, mut told) = (self.authority(), false);
        loop {
            let soonest = if told { LATEST } else { SOONEST };
            let due = self.due_in(&SystemClock).unwrap_or(AGAIN).clamp(soonest, LATEST);
            if stop.run_until_cancelled(tokio::time::sleep(due)).await.is_none() {
                return;
            }
            if self.authority() != first {
                if !told {
                    tracing::warn!(
                        "the CA was replaced: the controller's certificate is not renewed until the \
                         controller is restarted"
                    );
                }
                told = true;
                continue;
            }
            if self.due_in(&SystemClock).is_ok_and(|due| due.is_zero()) && self.renew() {
                let replaced = self.identity().and_then(|identity| live.replace(&identity));
                match replaced {
                    Ok(()) => tracing::info!("the controller's certificate is renewed"),
                    Err(error) => tracing::error!(%error, "the new certificate cannot be used"),
                }
            }
        }
    }

    /// Returns the certificate of the CA, PEM; `None` if it cannot be read.
    fn authority(&self) -> Option<Vec<u8>> {
        read_certificate(&self.files.ca()).ok().flatten()
    }

    fn renew(&self) -> bool {
        match renew_own(&self.files, self.life) {
            Ok(()) => true,
            Err(error) => {
                let error = daemon::chain::Chain(&error);
                tracing::error!(%error, "the controller's certificate is not renewed");
                false
            }
        }
    }

    /// Returns the time until it is to be renewed; zero when that is due.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn due_in(&self, clock: &dyn Clock) -> Result<Duration> {
        let validity = validity(&self.files)?;
        Ok(Duration::from_millis(validity.renew_ms().saturating_sub(clock.now_ms())))
    }

    /// Reads certificate and key, and sends the CA with them.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn identity(&self) -> Result<Identity, daemon::tls::Error> {
        let files = &self.files;
        Identity::load_with_ca(&files.certificate(), &files.key(), &files.ca())
    }
}

/// Renews the controller's certificate; its names stay.
///
/// # Errors
/// When the CA is not there, the old certificate cannot be read, or a file cannot be written.
pub fn renew_own(files: &Files, life: Duration) -> Result<()> {
    let names = names_before(&files.certificate())?;
    issue_own(files, &names, life)
}

/// Returns the names in the controller's certificate; none without one.
///
/// # Errors
/// When it cannot be read.
pub fn names(data_dir: &Path) -> Result<Vec<String>> {
    names_before(&Files::new(data_dir).certificate())
}

fn validity(files: &Files) -> Result<peer::Validity> {
    let path = files.certificate();
    let invalid = |why: String| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, why);
        Error::File { path: path.clone(), source }
    };
    let pem = read_certificate(&path)?.ok_or_else(|| invalid("it is not there".to_owned()))?;
    let der = CertificateDer::from_pem_slice(&pem).map_err(|error| invalid(error.to_string()))?;
    peer::validity(&der).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{Rotation, init};

    #[test]
    fn renewal_keeps_the_names_and_is_due_at_half_of_the_life() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, names) = init(dir.path(), &["api.example.com".into()]).expect("init");
        let life = Duration::from_hours(7 * 24);
        renew_own(&files, life).expect("renewed");
        assert_eq!(super::names(dir.path()).expect("names"), names);
        let own = Own { files, life };
        let due = own.due_in(&SystemClock).expect("read");
        let half = life / 2;
        assert!(due <= half && due > half - Duration::from_mins(1), "{due:?}");
        own.identity().expect("certificate and key fit");
    }

    #[tokio::test(start_paused = true)]
    async fn certificate_is_not_renewed_under_a_ca_that_came_later() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, names) = init(dir.path(), &[]).expect("init");
        let life = Duration::from_hours(1);
        let live = Own { files: files.clone(), life }.load().expect("identity");
        let (before, stop) = (live.certificate(), CancellationToken::new());
        let own = Own { files: files.clone(), life };
        let keeping = tokio::spawn(own.keep(live.clone(), stop.clone()));
        // The keeper has read the old CA.
        tokio::task::yield_now().await;
        Rotation::new(dir.path(), &names, |_| Ok(())).expect("prepared").run().expect("replaced");
        // Due at once.
        renew_own(&files, Duration::ZERO).expect("renewed");
        let there = std::fs::read(files.certificate()).expect("there");
        tokio::time::sleep(3 * LATEST).await;
        assert_eq!(std::fs::read(files.certificate()).expect("there"), there);
        assert_eq!(live.certificate(), before);
        stop.cancel();
        keeping.await.expect("no panic");
    }
}
