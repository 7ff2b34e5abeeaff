//! Judges the ingress: what Caddy reads, whether it runs with the agent's proof, and what it answers. Pure.

use std::net::{IpAddr, SocketAddr};

use daemon::{
    doctor::{Check, reach::local},
    peer,
};

use super::{
    facts::{Ingress, Node, WebAnswer, Written},
    listeners_of,
};
use crate::{
    config::{AcmeDns, Config, PEER_PORT},
    ingress::{keeper, program::CADDY, version::Version},
    pve::Cluster,
};

const AGENT: &str = "systemctl restart pve-sandbox-agent";
/// Command that shows what Caddy says.
const LOG: &str = "journalctl -u 'pve-sandbox-ingress*' says why";
/// Time before its end from which a certificate that Caddy renews is late, milliseconds; of one that lives for days, its last
/// quarter. Caddy renews with a third of its life left.
const SOON_MS: u64 = 14 * 86_400_000;

/// Difference between two clocks of the kernel, milliseconds: the start of a process is known less exactly.
const SLACK_MS: u64 = 2000;

/// Judges what Caddy and the agent's route server need to start.
pub(super) fn files(config: &Config, node: &Node) -> Vec<Check> {
    let Some(ingress) = &node.ingress else { return Vec::new() };
    match &ingress.obstacles {
        Ok(obstacles) => obstacles
            .iter()
            .map(|obstacle| {
                Check::failed(
                    "ingress-files",
                    obstacle.setting(),
                    obstacle.to_string(),
                    obstacle.remedy(),
                )
            })
            .collect(),
        Err(why) => {
            let domain = config.ingress.domain.clone().unwrap_or_default();
            let remedy = "mend [ingress] in agent.toml, then: pve-sandbox-agent check-config";
            vec![Check::failed("ingress-files", domain, why.clone(), remedy)]
        }
    }
}

/// Judges Caddy, and its way to the agent.
pub(super) fn caddy(config: &Config, node: &Node, now_ms: u64) -> Vec<Check> {
    let Some(ingress) = &node.ingress else { return Vec::new() };
    let mut checks: Vec<_> =
        ingress.public.iter().map(|(address, found)| answer(*address, *found)).collect();
    for (address, found, shown) in &ingress.secure {
        checks.push(answer(*address, *found));
        if let (Some(_), Some(domain)) = (acme(config), &config.ingress.domain) {
            checks.extend(shown_certificate(domain, *address, shown, now_ms));
        }
    }
    if let (Some(false), Some(acme)) = (ingress.has_dns_module, acme(config)) {
        let module = format!("dns.providers.{}", acme.provider);
        let found = keeper::without_module(CADDY, &module);
        let remedy =
            format!("{CADDY} list-modules has to show {module}; docs/caddy.md has the steps");
        checks.push(Check::failed("web-certificate", module, found, remedy));
    }
    checks.push(proof(config, ingress));
    checks.extend(ingress.version.map(version));
    checks.extend(ingress.strays.iter().map(|(address, stray)| {
        let found = format!("{} (pid {}) listens there, too", stray.argv.join(" "), stray.pid);
        Check::failed("caddy-listeners", address.to_string(), found, listeners_of(*address))
    }));
    let socket = config.ingress.socket.as_deref().map(|path| path.display().to_string());
    let socket = socket.unwrap_or_default();
    checks.push(match ingress.routes {
        true => Check::ok("route-socket", socket, "the agent answers"),
        false => Check::failed("route-socket", socket, "the agent does not answer", AGENT),
    });
    checks
}

/// Judges what an address answers where clients reach Caddy.
fn answer(address: SocketAddr, answer: WebAnswer) -> Check {
    let (subject, local) = (address.to_string(), local(address));
    let failed =
        |found: &str, remedy: String| Check::failed("caddy", subject.clone(), found, remedy);
    match answer {
        WebAnswer::Ours => Check::ok("caddy", subject, "it answers, with the agent behind it"),
        WebAnswer::Nobody => failed(
            "nothing listens: Caddy does not run, or not with this address",
            "systemctl enable pve-sandbox-ingress; systemctl start pve-sandbox-ingress".to_owned(),
        ),
        WebAnswer::Silent => failed("Caddy gets no answer from the agent", AGENT.to_owned()),
        WebAnswer::OtherDomain => {
            failed("Caddy runs with the configuration of another domain", AGENT.to_owned())
        }
        WebAnswer::Other => failed("something else listens there", listeners_of(local)),
        WebAnswer::NoTls => failed(
            "no https: Caddy has no certificate for this domain, or something else listens there",
            format!("{LOG}; {}", listeners_of(local)),
        ),
    }
}

/// Judges where the other nodes' Caddys reach this one, if there are others: they dial the address that the cluster has for
/// it.
pub(super) fn peer(config: &Config, cluster: &Cluster) -> Option<Check> {
    let own = cluster.members.get(&config.node.value)?.ip?;
    let is_dialled = config.ingress.domain.is_some() && cluster.members.len() > 1;
    is_dialled.then(|| listener_of_peers(config.ingress.peer, own))
}

fn listener_of_peers(peer: Option<SocketAddr>, own: IpAddr) -> Check {
    let wanted = SocketAddr::new(own, peer.map_or(PEER_PORT, |peer| peer.port()));
    let subject = "ingress.peer";
    let remedy = format!("set peer = \"{wanted}\" below [ingress] in agent.toml; {AGENT}");
    let Some(peer) = peer else {
        let found =
            "not set: requests for sandboxes of this node that another node gets are not answered";
        return Check::warning("peer", subject, found, remedy);
    };
    let has_all = peer.ip().is_unspecified() && (peer.is_ipv6() || own.is_ipv4());
    if peer.ip() == own || has_all {
        return Check::ok("peer", subject, format!("the other nodes dial {wanted}"));
    }
    let found = format!("{peer}, where no other node looks for it: they dial {wanted}");
    Check::failed("peer", subject, found, remedy)
}

fn acme(config: &Config) -> Option<&AcmeDns> {
    config.ingress.certificate.as_ref()?.acme_dns.as_ref()
}

/// Judges the certificate that Caddy shows where it gets certificates by itself. Those in files are judged there.
fn shown_certificate(
    domain: &str,
    address: SocketAddr,
    shown: &[u8],
    now_ms: u64,
) -> Option<Check> {
    let (validity, names) = (peer::validity(shown).ok()?, peer::names(shown).ok()?);
    let name = format!("*.{domain}");
    let subject = address.to_string();
    let days = validity.hours_left(now_ms) / 24;
    let life_ms = validity.not_after_ms.saturating_sub(validity.not_before_ms);
    let left_ms = validity.not_after_ms.saturating_sub(now_ms);
    let failed = |found: String| Check::failed("web-certificate", subject.clone(), found, LOG);
    Some(if validity.not_after_ms <= now_ms {
        failed("the certificate that Caddy shows has ended".to_owned())
    } else if !names.iter().any(|other| other.eq_ignore_ascii_case(&name)) {
        failed(format!("Caddy shows a certificate for {}, and not for {name}", names.join(", ")))
    } else if left_ms < SOON_MS.min(life_ms / 4) {
        let found = format!("the certificate that Caddy shows ends in {days} days");
        Check::warning("web-certificate", subject, found, LOG)
    } else {
        Check::ok("web-certificate", subject, format!("good for {days} days"))
    })
}

/// Judges the version. The configuration avoids the fault of earlier ones.
fn version(version: Version) -> Check {
    let subject = version.to_string();
    if version >= Version::FIXED {
        return Check::ok("caddy-version", subject, "it has no fault that is known to us");
    }
    let found = format!(
        "below {}: under load it may send a question for the agent to a sandbox; the agent's configuration \
         avoids that",
        Version::FIXED
    );
    let remedy = "install a later Caddy as /usr/bin/caddy when your distribution has one";
    Check::warning("caddy-version", subject, found, remedy)
}

fn proof(config: &Config, ingress: &Ingress) -> Check {
    let path = config.ingress.caddy_config.display().to_string();
    let is_older = |written: u64, started: u64| written > started.saturating_add(SLACK_MS);
    if let Some(problem) = &ingress.problem {
        let log = "journalctl -u pve-sandbox-agent; once it is mended: systemctl restart pve-sandbox-agent";
        return Check::failed("caddy-config", path, problem.clone(), log);
    }
    // Where the agent starts Caddy, it knows; elsewhere the times tell.
    let written_ms = match ingress.used {
        Some(true) => None,
        Some(false) => Some(u64::MAX),
        None => ingress.written_ms,
    };
    match (ingress.written, written_ms, ingress.started_ms) {
        (Written::Missing, ..) => {
            Check::failed("caddy-config", path, "missing: the agent writes it at its start", AGENT)
        }
        (Written::Other, ..) => Check::failed(
            "caddy-config",
            path,
            "not that of the agent's settings and proof: the agent puts it back within a minute",
            AGENT,
        ),
        (Written::Current, Some(written), Some(started)) if is_older(written, started) => {
            let found = "newer than the Caddy that runs: its proof may not be accepted any more";
            Check::warning("caddy-config", path, found, AGENT)
        }
        (Written::Current, ..) => Check::ok("caddy-config", path, "it has the agent's proof"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use daemon::doctor::State;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// Begin of the tests' certificates, days since 1970.
    const BEGIN: u64 = 20_000;

    fn shown(name: &str, life: u64, day: u64) -> (State, String) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let at = |day| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_hours(day * 24);
        (params.not_before, params.not_after) = (at(BEGIN), at(BEGIN + life));
        let key = KeyPair::generate().expect("a key");
        let der = params.self_signed(&key).expect("signed").der().to_vec();
        let (address, now_ms) =
            (SocketAddr::from(([10, 0, 0, 1], 443)), (BEGIN + day) * 86_400_000);
        let check = shown_certificate("sbx.test", address, &der, now_ms).expect("a certificate");
        assert_eq!(check.subject, "10.0.0.1:443");
        (check.state, check.found)
    }

    #[test]
    fn peer_listens_where_the_other_nodes_dial_this_one() {
        let judged = |peer: Option<&str>, own: &str| {
            let peer = peer.map(|peer| peer.parse().expect("an address"));
            listener_of_peers(peer, own.parse().expect("an address")).state
        };
        let own = "192.0.2.11";
        assert_eq!(judged(Some("192.0.2.11:8481"), own), State::Ok);
        assert_eq!(judged(Some("0.0.0.0:8481"), own), State::Ok, "all of them");
        assert_eq!(judged(Some("[::]:8481"), own), State::Ok, "all of them");
        assert_eq!(judged(Some("0.0.0.0:8481"), "2001:db8::1"), State::Failed);
        assert_eq!(judged(Some("10.0.0.1:8481"), own), State::Failed);
        assert_eq!(judged(None, own), State::Warning);
        let check = listener_of_peers("10.0.0.1:9000".parse().ok(), own.parse().expect("one"));
        let remedy = check.remedy.unwrap_or_default();
        assert!(remedy.starts_with("set peer = \"192.0.2.11:9000\" "), "{remedy}");
    }

    #[test]
    fn certificate_that_caddy_does_not_renew_is_told_of_before_its_end() {
        for (name, life, day, state, word) in [
            ("*.SBX.test", 90, 1, State::Ok, "good for 89 days"),
            ("*.sbx.test", 90, 76, State::Ok, "good for 14 days"),
            ("*.sbx.test", 90, 77, State::Warning, "ends in 13 days"),
            ("*.sbx.test", 90, 90, State::Failed, "has ended"),
            // One that lives for a week.
            ("*.sbx.test", 8, 6, State::Ok, "good for 2 days"),
            ("*.sbx.test", 8, 7, State::Warning, "ends in 1 days"),
            ("a.sbx.test", 90, 1, State::Failed, "for a.sbx.test, and not for *.sbx.test"),
        ] {
            let (found, why) = shown(name, life, day);
            assert_eq!(found, state, "{name}, day {day} of {life}: {why}");
            assert!(why.contains(word), "{word}: {why}");
        }
        let none = shown_certificate("sbx.test", SocketAddr::from(([10, 0, 0, 1], 443)), &[], 0);
        assert_eq!(none, None, "the answer says that there is none");
    }
}
