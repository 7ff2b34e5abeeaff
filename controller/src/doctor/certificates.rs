//! Certificates of the controller: its own, those of the CAs, and the public one. `look` reads the files, `judge` decides
//! and is pure.

use std::path::Path;

use daemon::{
    doctor::{
        Check,
        certificate::{self, Now},
    },
    peer::{CONTROLLER_NAME, Validity},
};

use super::{RESTART, config_option, data_dir};
use crate::{ca, config::Config};

/// Name of the check of the controller's own certificate.
const OWN: &str = "certificate";

/// Maker of a new certificate in the place of one that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    /// An operator, by the commands of the remedy.
    Operator,
    /// The next start of the controller.
    NextStart,
}

/// Certificate, with what is expected of it.
#[derive(Debug)]
struct Listed {
    expected: certificate::Expected,
    maker: Maker,
}

/// Certificate, with what is expected of it and what is there.
#[derive(Debug)]
pub(super) struct Looked {
    listed: Listed,
    facts: certificate::Facts,
}

/// Observations that decide which command makes a new certificate.
#[derive(Debug, Clone, Copy)]
struct Ground<'a> {
    /// Files that `setup` and `init` would make; `None` where a CA is broken, so that they refuse.
    lacks: Option<&'a [String]>,
    /// Whether the controller's certificate has readable names, or is not there: all commands keep its names.
    has_names: bool,
}

/// Reads all certificates.
pub(super) fn look(path: &Path, config: &Config, host_names: &[String]) -> Vec<Looked> {
    let lacks = ca::lacks(&config.data_dir).ok();
    let has_names = ca::names(&config.data_dir).is_ok();
    let ground = Ground { lacks: lacks.as_deref(), has_names };
    let look = |listed: Listed| {
        let facts = certificate::look(&listed.expected);
        Looked { listed, facts }
    };
    list(path, config, host_names, ground).into_iter().map(look).collect()
}

/// Judges a certificate. Where the next start makes a new one, it is no failure that there is none.
pub(super) fn judge(looked: &Looked, now: Now) -> Vec<Check> {
    let Looked { listed: Listed { expected, maker }, facts } = looked;
    let checks = certificate::check(expected, facts, now);
    match maker {
        Maker::NextStart => mended_at_start(checks),
        Maker::Operator => checks,
    }
}

/// Judges a certificate of a controller that does not run. It renews its own before it serves, where nothing else is
/// wrong with that.
pub(super) fn judge_before_start(looked: &Looked, now: Now) -> Vec<Check> {
    let checks = judge(looked, now);
    let is_invalid = |life: &Validity| life.not_after_ms <= now.ms || !life.has_begun(now.ms);
    let is_invalid = looked.facts.validity.as_ref().is_ok_and(is_invalid);
    match looked.listed.expected.name == OWN && is_invalid && checks.len() == 1 {
        true => mended_at_start(checks),
        false => checks,
    }
}

fn mended_at_start(checks: Vec<Check>) -> Vec<Check> {
    let warning = |check: Check| {
        let found = format!("{}; the next start makes a new one", check.found);
        Check::warning(check.name, check.subject, found, RESTART)
    };
    checks.into_iter().map(warning).collect()
}

/// Lists the certificates.
fn list(path: &Path, config: &Config, host_names: &[String], ground: Ground<'_>) -> Vec<Listed> {
    let Ground { lacks, has_names } = ground;
    let (files, option) = (ca::Files::new(&config.data_dir), data_dir(config));
    let names: String = host_names.iter().map(|name| format!(" --name {name}")).collect();
    let remove = match has_names {
        true => String::new(),
        false => format!("rm {}; ", files.certificate().display()),
    };
    let rotate = format!(
        "restore both files of the CA from a backup; or make new CAs, after which all nodes join again: \
         {remove}pve-sandbox-controller ca rotate{}",
        config_option(path)
    );
    let setup = format!("{remove}pve-sandbox-controller setup{}", config_option(path));
    let is_to_make = |file: &str| lacks.is_some_and(|all| all.iter().any(|name| name == file));
    let init = match lacks {
        None => rotate.clone(),
        Some(_) if is_to_make("ca.crt") => setup.clone(),
        Some(_) => format!("{remove}pve-sandbox-controller init{names}{option}; {RESTART}"),
    };
    let at_start = format!("{RESTART}; it renews it at its start");
    let own = certificate::Expected {
        name: OWN,
        certificate: files.certificate(),
        key: files.key(),
        ca: Some(files.ca()),
        for_group: false,
        names: vec![CONTROLLER_NAME.to_owned(), "localhost".to_owned()],
        replace: init.clone(),
        rename: init,
        overdue: Some(at_start.clone()),
        early: Some(at_start),
        restart: RESTART.to_owned(),
    };
    let of_a_ca = |name: &'static str, file: &str| certificate::Expected {
        name,
        certificate: config.data_dir.join("ca").join(format!("{file}.crt")),
        key: config.data_dir.join("ca").join(format!("{file}.key")),
        ca: None,
        names: Vec::new(),
        replace: if is_to_make(&format!("{file}.crt")) { setup.clone() } else { rotate.clone() },
        overdue: None,
        early: None,
        ..own.clone()
    };
    let of_callers = of_a_ca("client-ca", "client-ca");
    let (maker, replace) = match is_to_make("client-ca.crt") {
        // The start of a controller with all else makes it.
        true if lacks.is_some_and(|all| all == ca::CLIENT_CA_FILES) => {
            (Maker::NextStart, RESTART.to_owned())
        }
        true => (Maker::Operator, setup.clone()),
        false => {
            let commands = format!(
                "restore both files of the CA from a backup; or make a new CA, after which callers need new client \
                 certificates: {remove}rm -f {} {}; pve-sandbox-controller init{option}; {RESTART}",
                of_callers.certificate.display(),
                of_callers.key.display()
            );
            (Maker::Operator, commands)
        }
    };
    let of_callers = certificate::Expected { replace, ..of_callers };
    let public = public(config, &own);
    let by_operator = |expected| Listed { expected, maker: Maker::Operator };
    let [ca, ingress] = [of_a_ca("ca", "ca"), of_a_ca("ingress-ca", "ingress-ca")].map(by_operator);
    let own = by_operator(own);
    [ca, ingress, Listed { expected: of_callers, maker }, own]
        .into_iter()
        .chain(public.map(by_operator))
        .collect()
}

/// Returns the certificate that callers see, where that is not the controller's own.
fn public(config: &Config, own: &certificate::Expected) -> Option<certificate::Expected> {
    let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) else { return None };
    Some(certificate::Expected {
        name: "public-certificate",
        certificate: cert.clone(),
        key: key.clone(),
        ca: None,
        for_group: true,
        names: Vec::new(),
        replace: format!("renew it where it comes from; then: {RESTART}"),
        overdue: None,
        early: None,
        ..own.clone()
    })
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    fn listed(tls: &str, ground: Ground<'_>) -> Vec<certificate::Expected> {
        let text = format!("url_template = \"https://port-{{port}}-vm-{{vmid}}.x.test\"\n{tls}");
        let config = Config::parse(Path::new("controller.toml"), &text).expect("valid");
        let all = list(Path::new("controller.toml"), &config, &["c1".to_owned()], ground);
        all.into_iter().map(|listed| listed.expected).collect()
    }

    const SOUND: Ground<'_> = Ground { lacks: Some(&[]), has_names: true };

    #[test]
    fn public_certificate_is_looked_at_where_there_is_one() {
        let names =
            |all: &[certificate::Expected]| all.iter().map(|one| one.name).collect::<Vec<_>>();
        let ours = ["ca", "ingress-ca", "client-ca", "certificate"];
        assert_eq!(names(&listed("", SOUND)), ours);
        let tls = "[tls]\ncert = \"/etc/ssl/api.crt\"\nkey = \"/etc/ssl/api.key\"\n";
        let all = listed(tls, SOUND);
        assert_eq!(names(&all), [&ours[..], &["public-certificate"]].concat());
        let public = all.last().expect("the last");
        assert_eq!(public.certificate, Path::new("/etc/ssl/api.crt"));
        assert_eq!(
            (public.ca.as_deref(), &public.overdue),
            (None, &None),
            "nothing here renews it"
        );
        assert!(public.replace.contains("where it comes from"), "{}", public.replace);
        assert!(public.replace.contains(RESTART), "it is read at the start: {}", public.replace);
    }

    #[test]
    fn certificate_without_readable_names_is_removed_before_every_command_that_reads_them() {
        let lacks = ca::CLIENT_CA_FILES.map(str::to_owned);
        for lacks in [Some(&[][..]), Some(&lacks[..1]), None] {
            for has_names in [true, false] {
                for expected in listed("", Ground { lacks, has_names }) {
                    for remedy in [&expected.replace, &expected.rename] {
                        let commands = remedy.split_once("pve-sandbox-controller ");
                        let removes = commands.is_some_and(|(before, _)| before.contains("rm /"));
                        assert_eq!(removes, !has_names, "{}: {remedy}", expected.name);
                    }
                }
            }
        }
    }

    #[test]
    fn own_certificate_of_a_clock_that_was_ahead_is_renewed_by_the_next_start() {
        const DAY_MS: u64 = 24 * 3_600_000;
        let own = listed("", SOUND).into_iter().find(|one| one.name == OWN).expect("listed");
        let (not_before_ms, not_after_ms) = (30 * DAY_MS, 37 * DAY_MS);
        let facts = certificate::Facts {
            validity: Ok(Validity { serial: "1".into(), not_before_ms, not_after_ms }),
            names: own.names.clone(),
            key: Ok(0o600),
            fits: true,
            next_fits: false,
            signed: Ok(()),
            ca: Some(Ok(4000 * DAY_MS)),
        };
        let looked = Looked { listed: Listed { expected: own, maker: Maker::Operator }, facts };
        let now = Now { ms: DAY_MS, synchronised: Some(true) };
        let [failed, warning] = [judge(&looked, now), judge_before_start(&looked, now)];
        assert_eq!((failed.len(), failed[0].state), (1, State::Failed), "{failed:?}");
        assert_eq!((warning.len(), warning[0].state), (1, State::Warning), "{warning:?}");
        for check in failed.into_iter().chain(warning) {
            assert!(check.remedy.is_some_and(|remedy| remedy.starts_with(RESTART)));
        }
    }
}
