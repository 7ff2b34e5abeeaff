//! Check of the whole cluster: every agent checks its node, the controller compares the results.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use daemon::peer::Validity;
use futures_util::{StreamExt as _, future::join_all, stream};
use proto::{
    Invariant,
    id::{SandboxId, SandboxRef},
    name::{NodeName, RequestId, Team},
    sandbox::v1::{Finding, Sandbox},
    visibility::Visibility,
};
use tokio::time::timeout;

use crate::{
    inventory::Entry,
    node::{Node, NodeStatus},
    sandbox::Sandboxes,
};

/// Most sandboxes whose nodes are asked for their ports at once.
const AT_ONCE: usize = 32;
/// Longest comparison of all ports: callers wait for the whole check.
const COMPARED: Duration = Duration::from_secs(10);
/// Longest wait for the report of ports that a node has in its answer already.
const REPORTED: Duration = Duration::from_secs(5);
/// Difference between the clocks of a node and the controller that is a finding. A report takes some seconds at most.
const APART_MS: u64 = 60_000;

/// Result of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// Violations; empty when all is well.
    pub findings: Vec<Finding>,
    /// Number of sandboxes that agents checked.
    pub sandboxes: u32,
    /// Number of nodes that were checked.
    pub nodes: u32,
}

impl Sandboxes {
    /// Checks the invariants over all nodes. A node that cannot be checked is a finding too.
    pub async fn fsck(&self) -> Report {
        let mut report = Report::default();
        let nodes = self.nodes.all();
        let checks = join_all(nodes.iter().map(|node| node.client.check())).await;
        let mut checked = BTreeMap::new();
        for (node, check) in nodes.iter().zip(checks) {
            match check {
                Ok((findings, sandboxes)) => {
                    report.nodes += 1;
                    checked.insert(node.name.clone(), Arc::clone(node));
                    report.sandboxes += sandboxes;
                    let of_node = |found| Finding { node: node.name.to_string(), ..found };
                    report.findings.extend(findings.into_iter().map(of_node));
                }
                Err(error) => report.findings.push(Finding {
                    invariant: Invariant::Unchecked.into(),
                    node: node.name.to_string(),
                    subject: node.name.to_string(),
                    detail: format!("its agent did not check it: {error}"),
                }),
            }
        }
        report.findings.extend(compare(&self.nodes.cache.all()));
        report.findings.extend(self.compare_ports(&checked).await);
        let (late, now_ms) = (self.nodes.overdue_certificates(), self.clock.now_ms());
        report.findings.extend(late.into_iter().map(|late| overdue(late, now_ms)));
        let own = self.nodes.overdue_own_certificate();
        report.findings.extend(own.map(|own| overdue_own(&own, now_ms)));
        let statuses = self.nodes.statuses().into_iter();
        report.findings.extend(statuses.filter_map(|node| clocks_apart(&node, now_ms)));
        let sandboxes = self.nodes.cache.miscounted().into_iter();
        report.findings.extend(sandboxes.map(|(team, had, has)| miscounted(&team, had, has)));
        let commands = self.nodes.commands.miscounted().into_iter();
        report.findings.extend(commands.map(|(team, had, has)| miscounted(&team, had, has)));
        report
    }

    /// Compares the open ports that callers are shown with those that the checked nodes have.
    async fn compare_ports(&self, checked: &BTreeMap<NodeName, Arc<Node>>) -> Vec<Finding> {
        let all = self.nodes.cache.all().into_iter();
        let alive = all.filter(|entry| !entry.ended() && !entry.creating && !entry.lost);
        let asked = alive.filter_map(|entry| {
            let node = checked.get(entry.node.as_ref()?)?;
            Some(self.other_ports(Arc::clone(node), entry.id))
        });
        let (mut answers, mut found) = (stream::iter(asked).buffer_unordered(AT_ONCE), Vec::new());
        let all = async {
            while let Some(answer) = answers.next().await {
                found.extend(answer);
            }
        };
        if timeout(COMPARED, all).await.is_err() {
            found.push(Finding {
                invariant: Invariant::Unchecked.into(),
                node: String::new(),
                subject: "open ports".into(),
                detail: "not all nodes told those of their sandboxes in time".into(),
            });
        }
        found
    }

    /// Finding of a sandbox whose node has other open ports than callers are shown.
    async fn other_ports(&self, node: Arc<Node>, id: SandboxId) -> Option<Finding> {
        // A sandbox that has ended or moved meanwhile is none, and a node that is away was found by its check.
        let there = node.client.get(&id).await.ok().filter(|there| !there.phase().has_ended())?;
        let differs = || {
            let shown = self.nodes.cache.get(&SandboxRef::Id(id))?;
            // A later report than the answer proves nothing.
            let is_of_it =
                shown.node.as_ref() == Some(&node.name) && shown.sandbox.revision <= there.revision;
            is_of_it.then(|| port_difference(&shown.sandbox, &there)).flatten()
        };
        differs()?;
        let mut changes = self.nodes.cache.watch(id);
        let agree = async { while differs().is_some() && changes.changed().await.is_ok() {} };
        timeout(REPORTED, agree).await.ok();
        Some(Finding {
            invariant: Invariant::I12.into(),
            node: node.name.to_string(),
            subject: id.to_string(),
            detail: differs()?,
        })
    }
}

/// Describes how the open ports that callers are shown differ from those of the node; `None`: they are the same.
fn port_difference(shown: &Sandbox, there: &Sandbox) -> Option<String> {
    let (shown, there) = (open_ports(shown), open_ports(there));
    let list = |ports: &BTreeSet<String>| match ports.len() {
        0 => "none".to_owned(),
        _ => ports.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
    };
    (shown != there).then(|| {
        format!(
            "callers are shown other open ports ({}) than its node has ({}): restart the controller, which then \
             reads them again",
            list(&shown),
            list(&there)
        )
    })
}

/// Describes the open ports of a sandbox. An older node says nothing of who reaches a port: there, everybody does.
fn open_ports(sandbox: &Sandbox) -> BTreeSet<String> {
    let services = sandbox.services.iter().map(|service| {
        let who = Visibility::read(service.visibility, "visibility").ok();
        let who = who.map_or("unknown", |who| who.unwrap_or(Visibility::Public).word());
        format!("{} {} {who}", service.name, service.port)
    });
    services.collect()
}

/// Finding of a certificate that should have been renewed.
fn overdue((node, shown): (NodeName, Validity), now_ms: u64) -> Finding {
    Finding {
        invariant: Invariant::Certificate.into(),
        node: node.to_string(),
        subject: format!("certificate {}", shown.serial),
        detail: format!(
            "its renewal is overdue: it ends in {} h, and then the node is out of reach; see the \
             controller's log, or join the node again",
            shown.hours_left(now_ms)
        ),
    }
}

/// Finding of the controller's own certificate, which should have been renewed.
fn overdue_own(own: &Validity, now_ms: u64) -> Finding {
    Finding {
        invariant: Invariant::Certificate.into(),
        node: String::new(),
        subject: format!("controller's certificate {}", own.serial),
        detail: format!(
            "its renewal is overdue: it ends in {} h, and then no node is reached, and without `[tls]` no caller; see \
             the controller's log and `pve-sandbox-controller doctor`",
            own.hours_left(now_ms)
        ),
    }
}

/// Finding of a node whose clock is another one than the controller's, by its last report.
fn clocks_apart(node: &NodeStatus, now_ms: u64) -> Option<Finding> {
    let (load, age) = node.report.as_ref()?;
    let taken = load.taken_at?;
    let taken_ms =
        taken.seconds.saturating_mul(1000).saturating_add(i64::from(taken.nanos) / 1_000_000);
    let received_ms = now_ms.saturating_sub(daemon::clock::millis(*age));
    let ahead_ms = taken_ms.saturating_sub(i64::try_from(received_ms).ok()?);
    let (apart, way) = (ahead_ms.unsigned_abs(), if ahead_ms > 0 { "ahead of" } else { "behind" });
    (apart >= APART_MS).then(|| Finding {
        invariant: Invariant::Clock.into(),
        node: node.name.to_string(),
        subject: "clock".to_owned(),
        detail: format!(
            "its clock is {} s {way} the controller's: certificates and the ends of lifetimes depend on both; \
             `timedatectl` on each of the machines says which one is not synchronised",
            apart / 1000
        ),
    })
}

/// Finds violations that only show across nodes, or against the controller's cache.
fn compare(entries: &[Entry]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |invariant: Invariant, entry: &Entry, detail: String| {
        findings.push(Finding {
            invariant: invariant.into(),
            node: entry.node.as_ref().map(ToString::to_string).unwrap_or_default(),
            subject: entry.id.to_string(),
            detail,
        });
    };
    let mut vmids: BTreeMap<u32, &Entry> = BTreeMap::new();
    let mut ips: BTreeMap<&str, &Entry> = BTreeMap::new();
    let mut names: BTreeMap<(&Team, &str), &Entry> = BTreeMap::new();
    let mut requests: BTreeMap<(&Team, RequestId), &Entry> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| !entry.ended()) {
        if entry.lost {
            find(Invariant::I2, entry, "its node does not know it any more".into());
        }
        let vmid = entry.sandbox.vmid;
        if vmid != 0
            && let Some(other) = vmids.insert(vmid, entry)
        {
            find(Invariant::I3, entry, format!("has the vmid {vmid} of {}", other.id));
        }
        let ip = entry.sandbox.ip.as_str();
        if !ip.is_empty()
            && let Some(other) = ips.insert(ip, entry)
        {
            find(Invariant::I3, entry, format!("has the address {ip} of {}", other.id));
        }
        let name = entry.sandbox.name.as_str();
        if !name.is_empty()
            && let Some(other) = names.insert((&entry.team, name), entry)
        {
            find(
                Invariant::Name,
                entry,
                format!("has the name {name} of {}; rename one", other.id),
            );
        }
        if let Ok(request) = entry.sandbox.request_id.parse::<RequestId>()
            && let Some(other) = requests.insert((&entry.team, request), entry)
        {
            find(Invariant::I4, entry, format!("has the request_id of {}", other.id));
        }
    }
    findings
}

/// Says that what a team has was counted wrongly while it changed.
fn miscounted(team: &Team, counted: impl fmt::Display, again: impl fmt::Display) -> Finding {
    Finding {
        invariant: Invariant::I12.into(),
        node: String::new(),
        subject: team.to_string(),
        detail: format!(
            "the controller counts {counted} for this team, but a recount gives {again}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use proto::sandbox::v1::{HttpService, NodeLoad, Visibility as Wire};

    use super::*;
    use crate::inventory::{Usage, commands::CommandUse};

    type Services<'a> = &'a [(&'a str, u32, Wire)];

    fn with(services: Services<'_>) -> Sandbox {
        let services = services.iter().map(|(name, port, who)| HttpService {
            name: (*name).to_owned(),
            port: *port,
            visibility: (*who).into(),
            ..HttpService::default()
        });
        Sandbox { services: services.collect(), ..Sandbox::default() }
    }

    #[test]
    fn clock_that_is_a_minute_from_the_controllers_is_found() {
        let now_ms = 1_700_000_000_000;
        let at = |taken_ms: i64| NodeStatus {
            name: "n1".parse().expect("a name"),
            address: String::new(),
            not_ready: None,
            version: String::new(),
            report: Some((
                NodeLoad {
                    taken_at: Some(prost_types::Timestamp {
                        seconds: taken_ms.div_euclid(1000),
                        nanos: 0,
                    }),
                    ..NodeLoad::default()
                },
                Duration::from_secs(5),
            )),
            sandboxes: 0,
            certificate: None,
        };
        let received_ms = 1_700_000_000_000 - 5000;
        for near in [0, 59_000, -59_000] {
            assert_eq!(clocks_apart(&at(received_ms + near), now_ms), None, "{near}");
        }
        for (far, words) in [
            (60_000, "60 s ahead of"),
            (-90_000, "90 s behind"),
            (-received_ms, "s behind"),
            (i64::MIN + received_ms.abs(), "s behind"),
            (i64::MAX - received_ms, "s ahead of"),
        ] {
            let found = clocks_apart(&at(received_ms.saturating_add(far)), now_ms);
            let found = found.expect("found");
            assert!(found.detail.contains(words), "{found:?}");
            assert_eq!((found.node.as_str(), found.invariant()), ("n1", Invariant::Clock));
        }
        let untold = NodeStatus { report: Some((NodeLoad::default(), Duration::ZERO)), ..at(0) };
        assert_eq!(clocks_apart(&untold, now_ms), None, "an agent that does not tell");
    }

    #[test]
    fn wrong_counts_are_told_in_words() {
        let team: Team = "acme".parse().expect("a team");
        let used = |sandboxes| Usage { sandboxes, cpu_cores: 6, memory_mib: 12_288, disk_gib: 60 };
        let found = miscounted(&team, used(3), used(2));
        assert_eq!((found.subject.as_str(), found.invariant()), ("acme", Invariant::I12));
        assert_eq!(
            found.detail,
            "the controller counts 3 sandboxes, 6 cores, 12288 MiB, 60 GiB for this team, but a recount gives \
             2 sandboxes, 6 cores, 12288 MiB, 60 GiB"
        );
        let ran = |running| CommandUse { running, kept_bytes: 4096 };
        assert_eq!(
            miscounted(&team, ran(2), ran(1)).detail,
            "the controller counts 2 commands, 4096 bytes of output for this team, but a recount gives \
             1 commands, 4096 bytes of output"
        );
    }

    #[test]
    fn other_open_ports_and_another_visibility_are_a_difference() {
        let web = with(&[("web", 80, Wire::Token)]);
        let cases: [(Services<'_>, Services<'_>, bool); 8] = [
            (&[], &[], false),
            (&[], &[("web", 80, Wire::Token)], true),
            (&[("web", 80, Wire::Token)], &[], true),
            (&[("web", 80, Wire::Token)], &[("web", 80, Wire::Public)], true),
            (&[("web", 80, Wire::Token)], &[("web", 81, Wire::Token)], true),
            (&[("web", 80, Wire::Token)], &[("www", 80, Wire::Token)], true),
            (&[("web", 80, Wire::Unspecified)], &[("web", 80, Wire::Public)], false),
            (
                &[("a", 80, Wire::Team), ("b", 81, Wire::Team)],
                &[("b", 81, Wire::Team), ("a", 80, Wire::Team)],
                false,
            ),
        ];
        for (shown, there, differs) in cases {
            let difference = port_difference(&with(shown), &with(there));
            assert_eq!(difference.is_some(), differs, "{shown:?} {there:?}");
        }
        let told = port_difference(&with(&[]), &web).expect("a difference");
        assert!(told.contains("(none)") && told.contains("(web 80 token)"), "{told}");
    }
}
