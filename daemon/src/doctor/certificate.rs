//! Checks a certificate, its key and its CA. `look` reads the files, `check` decides and is pure.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::Check;
use crate::{
    peer::{self, Validity},
    text, tls,
};

/// Time before its end from which one is told that nothing renews, milliseconds: after that of a CA all
/// nodes must join again.
const SOON_MS: u64 = 90 * DAY_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
const HOUR_MS: u64 = 3_600_000;

/// A certificate with its files, and what is expected of it.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Name of the check.
    pub name: &'static str,
    /// File with the certificate, PEM.
    pub certificate: PathBuf,
    /// File with its key, PEM.
    pub key: PathBuf,
    /// File with the CA that must have signed it, PEM; `None` for a CA of somebody else.
    pub ca: Option<PathBuf>,
    /// True when a group may read the key.
    pub for_group: bool,
    /// Names that must be in it.
    pub names: Vec<String>,
    /// Way to a new certificate.
    pub replace: String,
    /// Way to a certificate with names that are missing.
    pub rename: String,
    /// Way to find out why nothing has renewed it; `None` for one that nothing renews by itself.
    pub overdue: Option<String>,
    /// Way to one that is valid, where it was made while its maker's clock was ahead; `None`: as `replace`.
    pub early: Option<String>,
    /// Command after which a key that waits is used.
    pub restart: String,
}

/// Time by this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since 1970.
    pub ms: u64,
    /// Whether the clock is synchronised; `None` where nobody was asked, or nothing knows.
    pub synchronised: Option<bool>,
}

/// Observations of the files of a certificate.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Life of the certificate, or why it cannot be read.
    pub validity: Result<Validity, String>,
    /// Names in it.
    pub names: Vec<String>,
    /// Mode of the key, or why it cannot be read.
    pub key: Result<u32, String>,
    /// Whether the key is that of the certificate.
    pub fits: bool,
    /// Whether a key that waits is: a renewal was interrupted.
    pub next_fits: bool,
    /// Whether the CA has signed it, or why not; true without a CA of ours.
    pub signed: Result<(), String>,
    /// End of the CA, milliseconds since 1970, or why it cannot be read; `None` without one of ours.
    pub ca: Option<Result<u64, String>>,
}

/// Reads the files.
pub fn look(expected: &Expected) -> Facts {
    let Expected { certificate, key, ca, .. } = expected;
    let pem = read(certificate);
    let der = pem.clone().and_then(|pem| der(&pem));
    let key_pem = read(key);
    let both = |key: &Result<String, String>| match (&pem, key) {
        (Ok(pem), Ok(key)) => tls::fits(pem.as_bytes(), key.as_bytes()),
        (Ok(_) | Err(_), Err(_)) | (Err(_), Ok(_)) => false,
    };
    let ca_pem = ca.as_deref().map(read);
    let signed = match (&pem, &ca_pem) {
        (Ok(pem), Some(Ok(ca))) => tls::signed_by(pem.as_bytes(), ca.as_bytes()),
        (Ok(_), Some(Err(why))) => Err(why.clone()),
        (Ok(_), None) | (Err(_), _) => Ok(()),
    };
    let mode = |_| {
        let about = fs::metadata(key).map_err(|error| error.to_string())?;
        Ok(about.permissions().mode() & 0o777)
    };
    Facts {
        validity: der.clone().and_then(|der| peer::validity(&der)),
        names: der.and_then(|der| peer::names(&der)).unwrap_or_default(),
        fits: both(&key_pem),
        next_fits: both(&read(&key.with_added_extension("next"))),
        key: key_pem.and_then(mode),
        signed,
        ca: ca_pem.map(|pem| Ok(peer::validity(&der_of(pem)?)?.not_after_ms)),
    }
}

fn read(path: &Path) -> Result<String, String> {
    text::read(path).map_err(|error| error.to_string())
}

fn der(pem: &str) -> Result<CertificateDer<'static>, String> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| "it holds no certificate".to_owned())
}

fn der_of(pem: Result<String, String>) -> Result<CertificateDer<'static>, String> {
    pem.and_then(|pem| der(&pem))
}

/// Judges a certificate: what is wrong with it, or one check that says how long it is good.
pub fn check(expected: &Expected, facts: &Facts, now: Now) -> Vec<Check> {
    let now_ms = now.ms;
    let Expected { certificate, key, .. } = expected;
    let name = expected.name;
    let (path, key_path) = (certificate.display().to_string(), key.display().to_string());
    let failed =
        |subject: &str, found: String, remedy: &str| Check::failed(name, subject, found, remedy);
    let mut found = Vec::new();
    let validity = match &facts.validity {
        Ok(validity) => validity,
        Err(why) => return vec![failed(&path, why.clone(), &expected.replace)],
    };
    match &facts.key {
        Err(why) if facts.next_fits => {
            let why = format!("{why}; the key of an interrupted renewal is there");
            found.push(failed(&key_path, why, &expected.restart));
        }
        Err(why) => found.push(failed(&key_path, why.clone(), &expected.replace)),
        Ok(mode) => {
            found.extend(mode_of(expected, *mode));
            if !facts.fits {
                let (why, remedy) = match facts.next_fits {
                    true => ("a renewal was interrupted before its key", &expected.restart),
                    false => ("it is not the key of the certificate", &expected.replace),
                };
                found.push(failed(&key_path, why.to_owned(), remedy));
            }
        }
    }
    if let Err(why) = &facts.signed {
        let ca = expected.ca.as_deref().unwrap_or(Path::new("")).display();
        let why = format!("the CA in {ca} has not signed it: {why}");
        found.push(failed(&path, why, &expected.replace));
    }
    if let (Some(Ok(end_ms)), Some(ca)) = (facts.ca.clone(), &expected.ca)
        && end_ms < now_ms + SOON_MS
    {
        let remedy = "make a new CA, and join all nodes again: docs/operations.md";
        let ca = ca.display().to_string();
        found.push(match end_ms.checked_sub(now_ms) {
            Some(left) => {
                Check::warning(name, ca, format!("the CA ends in {}", span(left)), remedy)
            }
            None => failed(&ca, "the CA has ended".to_owned(), remedy),
        });
    }
    if validity.not_after_ms <= now_ms {
        let ago = span(now_ms - validity.not_after_ms);
        found.push(failed(&path, format!("it ended {ago} ago"), &expected.replace));
    } else if !validity.has_begun(now_ms) {
        let (why, remedy) = early(expected, validity, now);
        found.push(failed(&path, why, &remedy));
    } else {
        let left = validity.not_after_ms - now_ms;
        let why = match &expected.overdue {
            Some(remedy) if validity.overdue_ms() <= now_ms => {
                Some(("its renewal is overdue; ", remedy))
            }
            // A public certificate lives for 90 days in all.
            None if left < SOON_MS.min((validity.not_after_ms - validity.not_before_ms) / 4) => {
                Some(("", &expected.replace))
            }
            Some(_) | None => None,
        };
        found.extend(why.map(|(why, remedy)| {
            let why = format!("{why}it ends in {}", span(left));
            Check::warning(name, path.clone(), why, remedy)
        }));
    }
    let has = |name: &&String| !facts.names.iter().any(|known| known.eq_ignore_ascii_case(name));
    let missing: Vec<_> = expected.names.iter().filter(has).map(String::as_str).collect();
    if !missing.is_empty() {
        let why = format!("it is not for {}", missing.join(", "));
        found.push(failed(&path, why, &expected.rename));
    }
    if found.is_empty() {
        let left = span(validity.not_after_ms - now_ms);
        found.push(Check::ok(name, path, format!("good for {left}")));
    }
    found
}

fn mode_of(expected: &Expected, mode: u32) -> Option<Check> {
    let allowed = if expected.for_group { 0o640 } else { 0o600 };
    let path = expected.key.display().to_string();
    (mode & !allowed & 0o077 != 0).then(|| {
        let found = format!("its mode is {mode:04o}: others can read the key");
        let remedy = format!("chmod {allowed:04o} {path}");
        Check::failed(expected.name, path, found, remedy)
    })
}

/// Says why a certificate is not valid yet, and the remedy. Either this machine's clock is behind, or that of the machine
/// which made the certificate was ahead.
fn early(expected: &Expected, validity: &Validity, now: Now) -> (String, String) {
    let made_early = expected.early.as_ref().unwrap_or(&expected.replace);
    let (why, remedy) = match now.synchronised {
        Some(true) => ("it was made while a clock was ahead", made_early.clone()),
        Some(false) => (
            "the clock of this machine is behind",
            "timedatectl set-ntp true || systemctl enable --now chrony".to_owned(),
        ),
        None => (
            "the clock of this machine is behind, or it was made while a clock was ahead",
            format!("timedatectl; if it shows the right time: {made_early}"),
        ),
    };
    (format!("it begins in {}: {why}", span(validity.not_before_ms - now.ms)), remedy)
}

/// Time in the largest unit that fits.
fn span(ms: u64) -> String {
    match ms {
        0..HOUR_MS => format!("{} min", ms / 60_000),
        HOUR_MS..=TWO_DAYS_MS => format!("{} h", ms / HOUR_MS),
        _ => format!("{} days", ms / DAY_MS),
    }
}

const TWO_DAYS_MS: u64 = 2 * DAY_MS;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    fn expected() -> Expected {
        let text = |text: &str| text.to_owned();
        Expected {
            name: "certificate",
            certificate: "/t/node.crt".into(),
            key: "/t/node.key".into(),
            ca: Some("/t/ca.crt".into()),
            for_group: false,
            names: vec![text("n1.test")],
            replace: text("replace it"),
            rename: text("rename it"),
            overdue: Some(text("see why")),
            early: Some(text("renew it")),
            restart: text("restart it"),
        }
    }

    /// A certificate of four days after the hour by which it is backdated.
    fn good() -> Facts {
        let (not_before_ms, not_after_ms) = (0, HOUR_MS + 4 * DAY_MS);
        Facts {
            validity: Ok(Validity { serial: "1".into(), not_before_ms, not_after_ms }),
            names: vec!["N1.test".into(), "other.test".into()],
            key: Ok(0o600),
            fits: true,
            next_fits: false,
            signed: Ok(()),
            ca: Some(Ok(4000 * DAY_MS)),
        }
    }

    /// Time by a clock that is right.
    fn at(ms: u64) -> Now {
        Now { ms, synchronised: Some(true) }
    }

    #[track_caller]
    fn one(facts: &Facts, now_ms: u64) -> (State, String, String) {
        let mut found = check(&expected(), facts, at(now_ms));
        assert_eq!(found.len(), 1, "{found:?}");
        let Check { state, found, remedy, .. } = found.remove(0);
        (state, found, remedy.unwrap_or_default())
    }

    #[test]
    fn each_flaw_of_a_certificate_is_one_finding_with_its_remedy() {
        let day = DAY_MS;
        assert_eq!(one(&good(), day), (State::Ok, "good for 3 days".into(), String::new()));
        let missing = Facts { validity: Err("no such file".into()), ..good() };
        assert_eq!(one(&missing, day), (State::Failed, "no such file".into(), "replace it".into()));
        let open = Facts { key: Ok(0o644), ..good() };
        assert_eq!(one(&open, day).2, "chmod 0600 /t/node.key");
        let other_key = Facts { fits: false, ..good() };
        assert_eq!(one(&other_key, day).2, "replace it");
        let interrupted = Facts { fits: false, next_fits: true, ..good() };
        assert_eq!(one(&interrupted, day).2, "restart it");
        let foreign = Facts { signed: Err("another".into()), ..good() };
        assert!(one(&foreign, day).1.contains("/t/ca.crt has not signed it"));
        let renamed = Facts { names: vec!["n2.test".into()], ..good() };
        assert_eq!(
            one(&renamed, day),
            (State::Failed, "it is not for n1.test".into(), "rename it".into())
        );
        let old_ca = Facts { ca: Some(Ok(20 * DAY_MS)), ..good() };
        assert_eq!(one(&old_ca, day).0, State::Warning);
    }

    #[test]
    fn certificate_is_overdue_at_three_quarters_and_fails_at_its_end() {
        let after = |days: u64| one(&good(), HOUR_MS + days * DAY_MS);
        assert_eq!(after(2).0, State::Ok);
        let overdue = (State::Warning, "its renewal is overdue; it ends in 24 h".into());
        assert_eq!(after(3), (overdue.0, overdue.1, "see why".into()));
        assert_eq!(after(5), (State::Failed, "it ended 24 h ago".into(), "replace it".into()));
        let by_hand = Expected { overdue: None, ..expected() };
        let warned = check(&by_hand, &good(), at(HOUR_MS + 3 * DAY_MS + HOUR_MS)).remove(0);
        assert_eq!((warned.state, warned.remedy.as_deref()), (State::Warning, Some("replace it")));
    }

    #[test]
    fn certificate_that_begins_later_blames_the_clock_that_is_wrong() {
        let life =
            Validity { serial: "1".into(), not_before_ms: 9 * DAY_MS, not_after_ms: 20 * DAY_MS };
        let facts = Facts { validity: Ok(life), ..good() };
        let by_replacement = Expected { early: None, ..expected() };
        let told = |expected: &Expected, synchronised| {
            let mut found = check(expected, &facts, Now { ms: DAY_MS, synchronised });
            assert_eq!((found.len(), found[0].state), (1, State::Failed), "{found:?}");
            let Check { found, remedy, .. } = found.remove(0);
            assert!(found.starts_with("it begins in 8 days: "), "{found}");
            (found.contains("of this machine is behind"), remedy.expect("a remedy"))
        };
        assert_eq!(told(&expected(), Some(true)), (false, "renew it".into()));
        assert_eq!(told(&by_replacement, Some(true)), (false, "replace it".into()));
        let (behind, remedy) = told(&expected(), Some(false));
        assert!(behind && remedy.starts_with("timedatectl set-ntp true"), "{remedy}");
        let (maybe, remedy) = told(&expected(), None);
        assert!(maybe && remedy.starts_with("timedatectl; ") && remedy.ends_with("renew it"));
    }

    #[test]
    fn certificate_that_nothing_here_renews_is_told_of_in_its_last_quarter_or_90_days() {
        let public = Expected { overdue: None, ca: None, names: Vec::new(), ..expected() };
        let of = |life: u64, day: u64| {
            let (not_before_ms, not_after_ms) = (0, life * DAY_MS);
            let validity = Ok(Validity { serial: "1".into(), not_before_ms, not_after_ms });
            let facts = Facts { validity, ca: None, ..good() };
            let mut found = check(&public, &facts, at(day * DAY_MS));
            assert_eq!(found.len(), 1, "{found:?}");
            let Check { state, found, remedy, .. } = found.remove(0);
            (state, found, remedy.unwrap_or_default())
        };
        // One of Let's Encrypt is renewed with a third of its life left.
        for (life, day, state) in [
            (90, 60, State::Ok),
            (90, 67, State::Ok),
            (90, 68, State::Warning),
            (6, 4, State::Ok),
            (6, 5, State::Warning),
            (3650, 3559, State::Ok),
            (3650, 3561, State::Warning),
            (90, 91, State::Failed),
        ] {
            let told = of(life, day);
            assert_eq!(told.0, state, "day {day} of {life}: {told:?}");
            assert_eq!(told.2.is_empty(), state == State::Ok, "{told:?}");
        }
        assert_eq!(of(90, 80).1, "it ends in 10 days");
        assert_eq!(of(90, 80).2, "replace it");
    }
}
