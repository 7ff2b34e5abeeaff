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

/// Shortest and longest time between two looks. A clock that was set back is noticed within the longest, and a renewal
/// that failed is tried again after it.
const SOONEST: Duration = Duration::from_millis(500);
const LATEST: Duration = Duration::from_mins(1);

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
        self.load_by(&SystemClock)
    }

    fn load_by(&self, clock: &dyn Clock) -> Result<LiveIdentity, daemon::tls::Error> {
        let pair = self.files.pair();
        if let Err(error) = pair.recover() {
            tracing::error!(%error, "could not finish the renewal of the controller's certificate");
        }
        if self.due_in(clock).is_ok_and(|due| due.is_zero()) {
            self.renew(clock);
        }
        LiveIdentity::new(&self.identity()?)
    }

    /// Renews the certificate in time until `stop`; `live` serves with the new one from then on. Once the CA
    /// has been replaced, nothing is renewed: this process, and the agents that it talks to, trust the old
    /// one.
    pub async fn keep(self, live: LiveIdentity, stop: CancellationToken) {
        self.keep_by(&SystemClock, live, stop).await;
    }

    async fn keep_by(&self, clock: &dyn Clock, live: LiveIdentity, stop: CancellationToken) {
        let (first, mut told, mut failed) = (self.authority(), false, false);
        loop {
            let soonest = if told || failed { LATEST } else { SOONEST };
            let due = self.due_in(clock).unwrap_or(LATEST).clamp(soonest, LATEST);
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
            if !self.due_in(clock).is_ok_and(|due| due.is_zero()) {
                failed = false;
                continue;
            }
            failed = !self.renew(clock);
            if !failed {
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

    fn renew(&self, clock: &dyn Clock) -> bool {
        match renew_by(clock, &self.files, self.life) {
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
        let (validity, now_ms) = (validity(&self.files)?, clock.now_ms());
        let left_ms = match validity.is_due(now_ms) {
            true => 0,
            false => validity.renew_ms().saturating_sub(now_ms),
        };
        Ok(Duration::from_millis(left_ms))
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
    renew_by(&SystemClock, files, life)
}

fn renew_by(clock: &dyn Clock, files: &Files, life: Duration) -> Result<()> {
    let names = names_before(&files.certificate())?;
    issue_own(files, &names, life, clock)
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
    use std::{
        fs,
        sync::atomic::{AtomicU64, Ordering},
    };

    use super::*;
    use crate::ca::{Rotation, init};

    /// Life of a certificate.
    const WEEK: Duration = Duration::from_hours(7 * 24);

    /// Clock that is ahead of the machine's by milliseconds, and counts how often it is read.
    #[derive(Debug, Default)]
    struct Ahead {
        ms: AtomicU64,
        reads: AtomicU64,
    }

    impl Ahead {
        fn by(&self, ahead: Duration) {
            self.ms.store(daemon::clock::millis(ahead), Ordering::Relaxed);
        }
    }

    impl Clock for Ahead {
        fn now_ms(&self) -> u64 {
            self.reads.fetch_add(1, Ordering::Relaxed);
            SystemClock.now_ms() + self.ms.load(Ordering::Relaxed)
        }
    }

    /// Returns true when a certificate is valid at a time of this clock.
    fn is_valid(der: &[u8], clock: &dyn Clock) -> bool {
        let (validity, now_ms) = (peer::validity(der).expect("a certificate"), clock.now_ms());
        validity.has_begun(now_ms) && now_ms < validity.not_after_ms
    }

    #[tokio::test(start_paused = true)]
    async fn certificate_of_a_clock_that_was_ahead_is_renewed_once_it_is_set_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let (own, clock) = (Own { files, life: WEEK }, Ahead::default());
        let live = own.load_by(&clock).expect("identity");
        assert!(is_valid(&live.certificate(), &clock));
        let (stop, minutes) = (CancellationToken::new(), Duration::from_mins(3));
        let story = async {
            clock.by(Duration::from_hours(30 * 24));
            tokio::time::sleep(minutes).await;
            assert!(is_valid(&live.certificate(), &clock), "renewed while the clock is ahead");
            clock.by(Duration::ZERO);
            tokio::time::sleep(minutes).await;
            assert!(is_valid(&live.certificate(), &clock), "and again, once it is right");
            stop.cancel();
        };
        tokio::join!(own.keep_by(&clock, live.clone(), stop.clone()), story);

        // Over a restart, too.
        clock.by(Duration::from_hours(30 * 24));
        own.load_by(&clock).expect("identity");
        clock.by(Duration::ZERO);
        assert!(own.due_in(&clock).expect("read").is_zero());
        let live = own.load_by(&clock).expect("identity");
        assert!(is_valid(&live.certificate(), &clock));
    }

    #[tokio::test(start_paused = true)]
    async fn renewal_that_fails_is_tried_again_once_a_minute() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let (own, clock) = (Own { files, life: WEEK }, Ahead::default());
        let live = own.load_by(&clock).expect("identity");
        fs::remove_file(dir.path().join("ca/ca.key")).expect("removed");
        clock.by(WEEK);
        clock.reads.store(0, Ordering::Relaxed);
        let keeping = own.keep_by(&clock, live, CancellationToken::new());
        tokio::time::timeout(Duration::from_mins(10), keeping).await.expect_err("it goes on");
        // Two looks a try.
        let reads = clock.reads.load(Ordering::Relaxed);
        assert!((4..=24).contains(&reads), "{reads}");
    }

    #[test]
    fn renewal_does_not_lose_the_key_of_an_interrupted_one() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let next = dir.path().join("ca/controller.key.next");
        // Killed behind the certificate, and then the CA cannot be read.
        fs::rename(files.key(), &next).expect("it waits");
        let ca = dir.path().join("ca/ca.key");
        let ca_key = fs::read(&ca).expect("there");
        fs::remove_file(&ca).expect("removed");
        renew_own(&files, WEEK).expect_err("no CA");
        let own = Own { files: files.clone(), life: WEEK };
        own.identity().expect("certificate and key fit");
        fs::write(&ca, ca_key).expect("restored");
        renew_own(&files, WEEK).expect("renewed");
        own.identity().expect("certificate and key fit");
    }

    #[test]
    fn renewal_keeps_the_names_and_is_due_at_half_of_the_life() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, names) = init(dir.path(), &["api.example.com".into()]).expect("init");
        renew_own(&files, WEEK).expect("renewed");
        assert_eq!(super::names(dir.path()).expect("names"), names);
        let own = Own { files, life: WEEK };
        let due = own.due_in(&SystemClock).expect("read");
        let half = WEEK / 2;
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
        let there = fs::read(files.certificate()).expect("there");
        tokio::time::sleep(3 * LATEST).await;
        assert_eq!(fs::read(files.certificate()).expect("there"), there);
        assert_eq!(live.certificate(), before);
        stop.cancel();
        keeping.await.expect("no panic");
    }
}
