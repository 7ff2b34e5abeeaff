//! Check of the whole cluster: every agent checks its node, the controller compares the results.

use std::collections::BTreeMap;

use daemon::peer::Validity;
use futures_util::future::join_all;
use proto::{
    Invariant,
    name::{NodeName, RequestId, Team},
    sandbox::v1::Finding,
};

use crate::{inventory::Entry, sandbox::Sandboxes};

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
        for (node, check) in nodes.iter().zip(checks) {
            match check {
                Ok((findings, sandboxes)) => {
                    report.nodes += 1;
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
        let (late, now_ms) = (self.nodes.overdue_certificates(), self.clock.now_ms());
        report.findings.extend(late.into_iter().map(|late| overdue(late, now_ms)));
        let miscounted = self.nodes.cache.miscounted().into_iter();
        report.findings.extend(miscounted.map(|(team, counted, again)| Finding {
            invariant: Invariant::I12.into(),
            node: String::new(),
            subject: team.to_string(),
            detail: format!(
                "the controller counts {counted:?} of this team, and there is {again:?}"
            ),
        }));
        let miscounted = self.nodes.commands.miscounted().into_iter();
        report.findings.extend(miscounted.map(|(team, counted, again)| Finding {
            invariant: Invariant::I12.into(),
            node: String::new(),
            subject: team.to_string(),
            detail: format!(
                "the controller counts {counted:?} for the commands of this team, and there is \
                 {again:?}"
            ),
        }));
        report
    }
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
