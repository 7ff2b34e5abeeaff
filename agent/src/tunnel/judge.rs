//! Judges the tunnel, for `tunnel status` and `doctor`. Pure.

use daemon::doctor::{Check, State};

use super::{
    UNIT,
    api::model::{Connector, Record},
    look::{Cloud, Facts, Secrets, Written},
    node::{Paths, UnitState, Version},
    record,
};

/// Command that sets up again what is not right at Cloudflare or in the files. It needs a token.
const SETUP: &str = "pve-sandbox-agent tunnel setup --token-file FILE";
/// Command that lets the agent write cloudflared's configuration at once; it looks every 30 s anyway.
const AGENT: &str = "systemctl restart pve-sandbox-agent";
/// Command that shows the agent's log.
const LOG: &str = "journalctl -u pve-sandbox-agent";
/// Age of a cloudflared that Cloudflare does not support any more, months.
const OLD_MONTHS: u32 = 12;
/// Most connectors that one tunnel has, by Cloudflare's limits.
const CONNECTORS_MAX: usize = 25;

/// Judges everything.
pub fn checks(facts: &Facts, paths: &Paths) -> Vec<Check> {
    let mut checks = vec![
        domain(facts),
        config(facts, paths),
        credentials(facts, paths),
        version(facts),
        unit(facts.unit),
        ready(facts),
    ];
    match &facts.cloud {
        None => checks.push(Check::ok(
            "tunnel-record",
            facts.settings.domain.wildcard(),
            "not looked at: the node keeps no API token; `tunnel status --token-file FILE` asks Cloudflare",
        )),
        Some(Err(why)) => checks.push(Check::warning(
            "tunnel-cloud",
            facts.settings.name.clone(),
            why.clone(),
            "give another token, or try again later",
        )),
        Some(Ok(cloud)) => checks.extend(of_cloud(facts, cloud)),
    }
    if let Some(problem) = facts.problem.as_ref().filter(|problem| !problem.is_refusal) {
        let found = format!("the agent cannot look after the connector: {}", problem.text);
        checks.push(Check::failed("tunnel", facts.settings.name.clone(), found, LOG));
    }
    checks
}

fn restart() -> String {
    format!("systemctl restart {UNIT}")
}

fn domain(facts: &Facts) -> Check {
    let set_up = facts.settings.domain.as_str();
    let subject = facts.settings.name.clone();
    match facts.domain.as_deref() {
        Some(domain) if domain == set_up => {
            Check::ok("tunnel", subject, format!("{set_up}, tunnel {}", facts.settings.tunnel))
        }
        Some(domain) => Check::failed(
            "tunnel",
            subject,
            format!("ingress.domain is {domain}, and the tunnel was set up for {set_up}"),
            SETUP,
        ),
        None => Check::failed(
            "tunnel",
            subject,
            format!("set up for {set_up}, and agent.toml has no ingress.domain"),
            format!("set domain = \"{set_up}\" below [ingress] in agent.toml, then: {AGENT}"),
        ),
    }
}

fn config(facts: &Facts, paths: &Paths) -> Check {
    let path = paths.config().display().to_string();
    if let Some(problem) = facts.problem.as_ref().filter(|problem| problem.is_refusal) {
        let remedy = format!("change what it names, or upgrade cloudflared; the log: {LOG}");
        return Check::failed("tunnel-config", path, problem.text.clone(), remedy);
    }
    match (facts.file, facts.runs_wanted) {
        (Written::Missing, _) => {
            Check::failed("tunnel-config", path, "missing: the agent writes it", AGENT)
        }
        (Written::Other, _) => Check::failed(
            "tunnel-config",
            path,
            "not that of the agent's settings, such as after an edit by hand: the agent puts it back",
            AGENT,
        ),
        (Written::Current, Some(false)) => Check::warning(
            "tunnel-config",
            path,
            "cloudflared runs with another one: it reads the file at its start only",
            restart(),
        ),
        (Written::Current, _) => Check::ok("tunnel-config", path, "that of the agent's settings"),
    }
}

fn credentials(facts: &Facts, paths: &Paths) -> Check {
    const NAME: &str = "tunnel-credentials";
    let path = paths.credentials().display().to_string();
    match facts.credentials {
        Secrets::Missing => Check::failed(NAME, path, "missing, or no such file", SETUP),
        Secrets::Other => Check::failed(NAME, path, "those of another tunnel", SETUP),
        Secrets::Open => {
            let remedy = format!("chmod 600 {path}");
            let found = "others than root can read them: the agent sets mode 0600";
            Check::failed(NAME, path, found, remedy)
        }
        Secrets::Private => Check::ok(NAME, path, "those of the tunnel, for root alone"),
    }
}

fn version(facts: &Facts) -> Check {
    const NAME: &str = "cloudflared";
    match facts.version {
        None => Check::failed(
            NAME,
            "",
            "not there, or it does not run",
            "apt-get install cloudflared; it is in Cloudflare's apt repository: docs/tunnel.md",
        ),
        Some(version) => match outdated(version, facts.now_ms) {
            Some(found) => Check::warning(
                NAME,
                version.to_string(),
                found,
                format!("{UPGRADE}; {}", restart()),
            ),
            None => Check::ok(NAME, version.to_string(), "supported by Cloudflare"),
        },
    }
}

/// Commands that upgrade cloudflared.
pub(super) const UPGRADE: &str = "apt-get update; apt-get install cloudflared";

/// Says that Cloudflare does not support a version any more; `None` where it does.
pub(super) fn outdated(version: Version, now_ms: u64) -> Option<String> {
    let age = version.months_before(now_ms);
    let found = format!("{age} months old: Cloudflare supports versions of the last year");
    (age > OLD_MONTHS).then_some(found)
}

fn unit(unit: Option<UnitState>) -> Check {
    const NAME: &str = "tunnel-unit";
    let start = format!("systemctl enable {UNIT}; systemctl restart {UNIT}");
    match unit {
        None => Check::warning(
            NAME,
            UNIT,
            "systemd cannot be asked for it",
            format!("systemctl status {UNIT}"),
        ),
        Some(UnitState { is_starting: true, .. }) => Check::failed(
            NAME,
            UNIT,
            "it is being started: it has no connection to Cloudflare yet, or ends again and again",
            format!("journalctl -u {UNIT} -n 20"),
        ),
        Some(UnitState { is_active: false, .. }) => {
            Check::failed(NAME, UNIT, "it does not run: this node is no connector", start)
        }
        Some(UnitState { is_enabled: false, .. }) => Check::warning(
            NAME,
            UNIT,
            "it does not start with the node",
            format!("systemctl enable {UNIT}"),
        ),
        Some(UnitState { .. }) => Check::ok(NAME, UNIT, "it runs, and starts with the node"),
    }
}

fn ready(facts: &Facts) -> Check {
    const NAME: &str = "tunnel-ready";
    let subject = facts.settings.metrics.to_string();
    let why = format!("journalctl -u {UNIT} -n 20; it needs port 7844 to the internet, UDP or TCP");
    match &facts.ready {
        None => Check::failed(
            NAME,
            subject,
            "cloudflared does not answer",
            format!("{}; {why}", restart()),
        ),
        Some(ready) if ready.connections == 0 => {
            Check::failed(NAME, subject, "cloudflared has no connection to Cloudflare", why)
        }
        Some(ready) => {
            Check::ok(NAME, subject, format!("{} connections to Cloudflare", ready.connections))
        }
    }
}

fn of_cloud(facts: &Facts, cloud: &Cloud) -> Vec<Check> {
    let (settings, mut checks) = (&facts.settings, Vec::new());
    checks.push(match &cloud.tunnel {
        None => Check::failed(
            "tunnel-cloud",
            settings.name.clone(),
            "Cloudflare has no such tunnel",
            SETUP,
        ),
        Some(tunnel) if tunnel.id != settings.tunnel => Check::failed(
            "tunnel-cloud",
            settings.name.clone(),
            format!(
                "the tunnel of this name is {}, and this node has {}",
                tunnel.id, settings.tunnel
            ),
            SETUP,
        ),
        Some(tunnel) => {
            Check::ok("tunnel-cloud", settings.name.clone(), format!("it is {}", tunnel.status))
        }
    });
    let own = facts.ready.as_ref().map(|ready| ready.connector.as_str());
    checks.extend(cloud.connectors.iter().map(|one| connector(one, own)));
    if cloud.connectors.len() >= CONNECTORS_MAX {
        checks.push(Check::warning(
            "tunnel-cloud",
            settings.name.clone(),
            format!(
                "it has {} connectors, and Cloudflare takes {CONNECTORS_MAX}",
                cloud.connectors.len()
            ),
            format!("systemctl disable --now {UNIT} on some nodes: two connectors are enough"),
        ));
    }
    let of_name = |(name, records): &(String, Vec<Record>)| of_record(facts, name, records);
    checks.extend(cloud.records.iter().map(of_name));
    checks.extend(cloud.without_rule.iter().map(|name| {
        Check::failed(
            "tunnel-record",
            name.clone(),
            "it leads to this tunnel, and this node has no rule for it: what Cloudflare gives to this node gets 404",
            format!(
                "{SETUP} --controller-host {name} --controller-address HOST:PORT, as on the other nodes; or delete \
                 the record, if nobody needs it"
            ),
        )
    }));
    checks
}

fn connector(one: &Connector, own: Option<&str>) -> Check {
    let mut colos: Vec<_> = one.conns.iter().map(|conn| conn.colo_name.as_str()).collect();
    colos.sort_unstable();
    colos.dedup();
    let from = one.origin().unwrap_or_default();
    let place = match own == Some(one.id.as_str()) {
        true => "this node".to_owned(),
        false => format!("another node, from {from}"),
    };
    let found = format!(
        "{place}: {} connections ({}), cloudflared {}, since {}",
        one.conns.len(),
        colos.join(", "),
        one.version,
        one.run_at
    );
    Check::ok("connector", one.id.clone(), found)
}

fn of_record(facts: &Facts, name: &str, records: &[Record]) -> Check {
    const NAME: &str = "tunnel-record";
    let tunnel = &facts.settings.tunnel;
    match record::plan(records, Some(tunnel), false) {
        record::Plan::Keep => Check::ok(NAME, name, format!("it leads to {}", tunnel.target())),
        record::Plan::Create => Check::failed(NAME, name, "there is no such record", SETUP),
        record::Plan::Replace(wrong) => Check::failed(NAME, name, record::shown(&wrong), SETUP),
        record::Plan::Evict(others) | record::Plan::Refuse(others) => {
            let shown: Vec<_> = others.iter().map(record::shown).collect();
            let remedy = format!("{SETUP} --replace-record, if nobody needs it");
            Check::failed(NAME, name, format!("not ours: {}", shown.join("; ")), remedy)
        }
    }
}

/// Returns true when nothing has failed.
pub fn is_fine(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.state != State::Failed)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            api::model,
            node::{Problem, Ready},
            render::tests::settings,
        },
        *,
    };

    const NOW_MS: u64 = 1_796_000_000_000;
    const RUNS: UnitState = UnitState { is_active: true, is_starting: false, is_enabled: true };

    fn facts() -> Facts {
        Facts {
            settings: settings(),
            domain: Some("example.com".into()),
            file: Written::Current,
            problem: None,
            runs_wanted: Some(true),
            credentials: Secrets::Private,
            version: Some(Version { year: 2026, month: 8, patch: 2 }),
            unit: Some(RUNS),
            ready: Some(Ready { connections: 4, connector: "c1".into() }),
            now_ms: NOW_MS,
            cloud: None,
        }
    }

    fn cloud() -> Cloud {
        let tunnel = settings().tunnel;
        let connector = |id: &str| model::Connector {
            id: id.into(),
            version: "2026.8.2".into(),
            run_at: "2026-11-30T10:00:00Z".into(),
            conns: vec![model::Connection {
                colo_name: "FRA".into(),
                origin_ip: "192.0.2.9".into(),
            }],
        };
        let record = Record {
            id: "r1".into(),
            kind: "CNAME".into(),
            name: "*.example.com".into(),
            content: tunnel.target(),
            proxied: true,
            comment: None,
        };
        Cloud {
            tunnel: Some(model::Tunnel {
                id: tunnel,
                name: settings().name,
                status: "healthy".into(),
                config_src: None,
                deleted_at: None,
            }),
            connectors: vec![connector("c1"), connector("c2")],
            records: vec![("*.example.com".into(), vec![record])],
            without_rule: Vec::new(),
        }
    }

    fn paths() -> Paths {
        Paths {
            dir: "/etc/pve-sandbox/tunnel".into(),
            cloudflared: "/usr/bin/cloudflared".into(),
            systemctl: "/usr/bin/systemctl".into(),
            systemd: "/run/systemd/system".into(),
            given: "/run/credentials/x".into(),
        }
    }

    fn found(facts: &Facts) -> Vec<Check> {
        let all = checks(facts, &paths()).into_iter();
        all.filter(|check| check.state != State::Ok).collect()
    }

    #[test]
    fn nothing_is_wrong_with_a_whole_tunnel() {
        assert_eq!(found(&facts()), []);
        let with_cloud = Facts { cloud: Some(Ok(cloud())), ..facts() };
        assert_eq!(found(&with_cloud), []);
        let all = checks(&with_cloud, &paths());
        let shown: Vec<_> = all.iter().filter(|check| check.name == "connector").collect();
        assert!(shown[0].found.starts_with("this node: 1 connections (FRA)"), "{shown:?}");
        assert!(shown[1].found.contains("another node, from 192.0.2.9"), "{shown:?}");
    }

    #[test]
    fn each_flaw_has_one_finding_with_its_remedy() {
        let down = UnitState { is_active: false, ..RUNS };
        let starts = UnitState { is_active: false, is_starting: true, ..RUNS };
        let late = UnitState { is_enabled: false, ..RUNS };
        let alone = Ready { connections: 0, connector: "c1".into() };
        let old = Version { year: 2025, month: 8, patch: 0 };
        let problem = |is_refusal| Some(Problem { text: "the reason".into(), is_refusal });
        for (broken, name, remedy) in [
            (Facts { domain: None, ..facts() }, "tunnel", "domain = \"example.com\""),
            (Facts { domain: Some("b.test".into()), ..facts() }, "tunnel", SETUP),
            (Facts { file: Written::Missing, ..facts() }, "tunnel-config", AGENT),
            (Facts { file: Written::Other, ..facts() }, "tunnel-config", AGENT),
            // The reason, and not the difference that it leaves.
            (
                Facts { file: Written::Other, problem: problem(true), ..facts() },
                "tunnel-config",
                "upgrade cloudflared",
            ),
            (Facts { problem: problem(false), ..facts() }, "tunnel", LOG),
            (
                Facts { runs_wanted: Some(false), ..facts() },
                "tunnel-config",
                "systemctl restart pve-sandbox-tunnel",
            ),
            (Facts { credentials: Secrets::Missing, ..facts() }, "tunnel-credentials", SETUP),
            (Facts { credentials: Secrets::Other, ..facts() }, "tunnel-credentials", SETUP),
            (Facts { credentials: Secrets::Open, ..facts() }, "tunnel-credentials", "chmod 600 "),
            (Facts { version: None, ..facts() }, "cloudflared", "apt-get install cloudflared"),
            (Facts { version: Some(old), ..facts() }, "cloudflared", "apt-get update"),
            (Facts { unit: None, ..facts() }, "tunnel-unit", "systemctl status"),
            (Facts { unit: Some(down), ..facts() }, "tunnel-unit", "systemctl enable"),
            (Facts { unit: Some(starts), ..facts() }, "tunnel-unit", "journalctl"),
            (Facts { unit: Some(late), ..facts() }, "tunnel-unit", "systemctl enable"),
            (Facts { ready: None, ..facts() }, "tunnel-ready", "systemctl restart"),
            (Facts { ready: Some(alone), ..facts() }, "tunnel-ready", "journalctl"),
            (Facts { cloud: Some(Err("no".into())), ..facts() }, "tunnel-cloud", "another token"),
        ] {
            let found = found(&broken);
            let [one] = &found[..] else { panic!("{name}: {found:?}") };
            assert_eq!(one.name, name);
            assert!(
                one.remedy
                    .as_deref()
                    .is_some_and(|text| text.starts_with(remedy) || text.contains(remedy)),
                "{one:?}"
            );
        }
    }

    #[test]
    fn each_flaw_at_cloudflare_has_one_finding() {
        let told = |cloud: Cloud| {
            let found = found(&Facts { cloud: Some(Ok(cloud)), ..facts() });
            let [one] = &found[..] else { panic!("{found:?}") };
            format!("{} {} {}", one.name, one.found, one.remedy.as_deref().unwrap_or_default())
        };
        let gone = told(Cloud { tunnel: None, ..cloud() });
        assert!(gone.starts_with("tunnel-cloud Cloudflare has no such tunnel"), "{gone}");
        let mut other = cloud();
        if let Some(tunnel) = &mut other.tunnel {
            tunnel.id = "00000000-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("an id");
        }
        assert!(told(other).contains("this node has f70ff985"));
        let mut elsewhere = cloud();
        // The tunnel is healthy, and the name leads to another one: visitors see 530.
        elsewhere.records[0].1[0].content = "x.cfargotunnel.com".into();
        let text = told(elsewhere);
        assert!(text.contains("another tunnel") && text.contains("--replace-record"), "{text}");
        let mut none = cloud();
        none.records[0].1.clear();
        assert!(told(none).contains("there is no such record"));
        let told_name = told(Cloud { without_rule: vec!["api.example.com".into()], ..cloud() });
        assert!(told_name.contains("--controller-host api.example.com"), "{told_name}");
        let mut many = cloud();
        many.connectors = vec![many.connectors[1].clone(); 25];
        assert!(told(many).contains("25 connectors"));
    }
}
