//! Checks invariants: compares journal, configs, volumes and containers with each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use proto::{
    Invariant, Reason,
    id::{SandboxId, Vmid},
};

use super::observe::{Container, Observed, observe_all};
use crate::{
    journal::{Phase, Record},
    pve::{OwnVolumes, Settings, pmxcfs, volume},
    sandbox::{Sandboxes, Tombstone, lifecycle::address},
};

/// Most tombstones that are checked, the latest first.
const ENDED_MAX: usize = 1000;

/// Violated invariant, or one that could not be checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Invariant that is violated.
    pub invariant: Invariant,
    /// Sandbox id, vmid or volume.
    pub subject: String,
    /// Explanation, one sentence.
    pub detail: String,
}

/// Further check of the node.
#[async_trait::async_trait]
pub trait Check: Send + Sync + std::fmt::Debug {
    /// Returns all findings.
    async fn check(&self) -> Vec<Finding>;
}

impl Finding {
    /// Creates a finding.
    pub fn new(invariant: Invariant, subject: impl ToString, detail: impl Into<String>) -> Self {
        Self { invariant, subject: subject.to_string(), detail: detail.into() }
    }
}

/// State by the journal, which the host is compared with.
#[derive(Debug, Default)]
struct Intended {
    live: Vec<Arc<Record>>,
    ended: Vec<Tombstone>,
    busy: BTreeSet<SandboxId>,
    /// Expected settings of each container's interface.
    connected: BTreeMap<SandboxId, Settings>,
    /// Addresses that DHCP gave in the middle of a boot, where they differ from the lease.
    given: BTreeMap<SandboxId, Ipv4Addr>,
    /// Volumes of ended sandboxes.
    made: BTreeMap<SandboxId, OwnVolumes>,
    /// Vmids that a sandbox had before the observation, or has after it.
    used: BTreeSet<Vmid>,
    /// Range of vmids that this node leases, inclusive.
    range: Option<(Vmid, Vmid)>,
}

impl Sandboxes {
    /// Checks the node. Returns the findings and how many sandboxes were checked.
    pub async fn check(&self) -> (Vec<Finding>, usize) {
        let mut ended = self.ended();
        ended.sort_by_key(|tombstone| std::cmp::Reverse(tombstone.ended_ms));
        ended.truncate(ENDED_MAX);
        let live = self.live();
        let connected = live.iter().map(|record| (record.id, self.settings(record))).collect();
        let mut given = BTreeMap::new();
        for record in &live {
            given.extend(self.given_otherwise(record).await.map(|ip| (record.id, ip)));
        }
        let used = live.iter().map(|record| record.vmid).collect();
        let mut intended = Intended {
            live,
            ended,
            busy: self.busy(),
            connected,
            given,
            used,
            range: Some(self.records.feed().vmids()),
            ..Intended::default()
        };
        let looked_at = intended.live.len();
        let observed = match observe_all(&*self.pve).await {
            Ok(observed) => observed,
            Err(error) => {
                return (
                    vec![Finding::new(Invariant::Unchecked, self.pve.node(), error.to_string())],
                    0,
                );
            }
        };
        // Where an operation changed a sandbox between the two reads, a difference proves nothing.
        intended.busy.extend(self.busy());
        let after = self.live();
        intended.used.extend(after.iter().map(|record| record.vmid));
        let after: BTreeMap<_, _> = after.into_iter().map(|r| (r.id, r.revision)).collect();
        let moved = |record: &Arc<Record>| after.get(&record.id) != Some(&record.revision);
        intended.busy.extend(intended.live.iter().filter(|r| moved(r)).map(|r| r.id));
        let all = match self.records.feed().all().await {
            Ok(all) => all,
            Err(error) => {
                return (vec![Finding::new(Invariant::Unchecked, "journal", error.to_string())], 0);
            }
        };
        let over = all.iter().filter(|record| record.phase.ended());
        intended.made = over.map(|record| (record.id, record.volumes.clone())).collect();
        let mut findings = findings(&intended, &observed);
        for template in &self.options.templates {
            // A template that cannot be read was reported by the observation above.
            if let Err(error) = self.check_template(template).await
                && error.reason == Reason::ContainerUnfit
            {
                findings.push(Finding::new(Invariant::I3, template.vmid, error.message));
            }
        }
        findings.extend(self.against_the_journal(&all));
        findings.extend(self.lost_environments());
        findings.extend(self.isolation_findings().await);
        let node = self.pve.node();
        findings.extend(self.unlimited().into_iter().map(|(id, why)| {
            let subject = id.map_or_else(|| node.to_string(), |id| id.to_string());
            Finding::new(Invariant::Unchecked, subject, why)
        }));
        findings.sort();
        (findings, looked_at)
    }

    /// Checks I6 for environments: each can be read.
    fn lost_environments(&self) -> Vec<Finding> {
        let lost = self.live().into_iter().filter(|record| record.env_lost);
        let detail = "its environment cannot be read, because the key that sealed it is lost: \
                      no command starts in it";
        lost.map(|record| Finding::new(Invariant::I6, record.id, detail)).collect()
    }

    /// Checks I12: the records in memory equal those in the journal.
    fn against_the_journal(&self, all: &[Record]) -> Vec<Finding> {
        let known: BTreeMap<_, _> = self.live().into_iter().map(|r| (r.id, r)).collect();
        let differs = |record: &&Record| match known.get(&record.id) {
            Some(known) => **known != **record && known.revision >= record.revision,
            None => !record.phase.ended() && !self.busy().contains(&record.id),
        };
        all.iter()
            .filter(differs)
            .map(|record| {
                Finding::new(
                    Invariant::I12,
                    record.id,
                    "the index in memory is not what the journal says",
                )
            })
            .collect()
    }
}

/// Returns all findings about the observed state. Pure.
fn findings(intended: &Intended, observed: &Observed) -> Vec<Finding> {
    if !observed.cluster.quorate {
        let detail = "no quorum, or pmxcfs is down: the configs prove nothing";
        return vec![Finding::new(Invariant::Unchecked, pmxcfs::ROOT, detail)];
    }
    let mut findings = Vec::new();
    let idle = |id: &SandboxId| !intended.busy.contains(id);
    for record in intended.live.iter().filter(|record| idle(&record.id)) {
        findings.extend(of_record(record, observed));
        findings.extend(connection(record, intended, observed));
    }
    strangers(&intended.live, observed, &mut findings);
    twice(&intended.live, &mut findings);
    for tombstone in intended.ended.iter().filter(|tombstone| idle(&tombstone.id)) {
        findings.extend(of_tombstone(tombstone, intended, observed));
    }
    findings.extend(observed.volumes.iter().flat_map(|(vmid, volumes)| {
        volumes.iter().filter_map(|volume| of_volume(*vmid, volume, intended, observed))
    }));
    let live = intended.live.iter().map(|record| (record.id, record.vmid));
    let known: BTreeSet<_> =
        live.chain(intended.ended.iter().map(|ended| (ended.id, ended.vmid))).collect();
    for (vmid, container) in &observed.containers {
        let Some(mark) = container.is_marked_as(*vmid) else { continue };
        let id = mark.sandbox_id;
        if !intended.busy.contains(&id) && !known.contains(&(id, *vmid)) {
            let detail = format!(
                "the container carries the mark of {id}, but the journal has no record of {id} with this vmid"
            );
            findings.push(Finding::new(Invariant::I1, vmid, detail));
        }
    }
    findings
}

fn of_record(record: &Record, observed: &Observed) -> Option<Finding> {
    let subject = record.id;
    match record.phase {
        Phase::Creating | Phase::Undoing | Phase::Starting | Phase::Stopping | Phase::Deleting => {
            return Some(Finding::new(
                Invariant::I9,
                subject,
                format!("it is {}, and no operation works on it", record.phase),
            ));
        }
        Phase::Running | Phase::Paused | Phase::Stopped | Phase::Deleted | Phase::Failed => {}
    }
    let Some(container) = observed.containers.get(&record.vmid) else {
        let detail = format!("its container {} is not on this node", record.vmid);
        return Some(Finding::new(Invariant::I2, subject, detail));
    };
    if container.mark.as_ref() != Some(&record.mark()) {
        let detail = format!("container {} does not carry its mark", record.vmid);
        return Some(Finding::new(Invariant::I5, subject, detail));
    }
    let volumes = observed.volumes.get(&record.vmid).map_or(&[][..], Vec::as_slice);
    let named =
        |text: &String| volume::key(text).is_some_and(|key| container.volumes.contains(&key));
    if volumes.is_empty() || !(container.volumes.is_empty() || volumes.iter().any(named)) {
        let detail = format!("container {} has no volume", record.vmid);
        return Some(Finding::new(Invariant::I2, subject, detail));
    }
    let should_run = record.phase.is_up();
    if container.running != should_run {
        let is = if container.running { "runs" } else { "is stopped" };
        let detail = format!("container {} {is}, against the journal", record.vmid);
        return Some(Finding::new(Invariant::I12, subject, detail));
    }
    pause(record, container)
}

/// Checks I13: frozen and locked while paused, and neither otherwise.
fn pause(record: &Record, container: &Container) -> Option<Finding> {
    let vmid = record.vmid;
    let detail = match (record.phase == Phase::Paused, container) {
        (true, Container { frozen: false, .. }) => {
            format!("it is paused, and container {vmid} is not frozen")
        }
        (true, Container { held: false, .. }) => {
            format!("it is paused, and container {vmid} is not locked: a snapshot of it would hang")
        }
        (false, Container { frozen: true, .. }) => {
            format!("it is not paused, and container {vmid} is frozen")
        }
        (false, Container { noted: true, .. }) => {
            format!("it is not paused, and container {vmid} still has the lock of a pause")
        }
        (true | false, _) => return None,
    };
    Some(Finding::new(Invariant::I13, record.id, detail))
}

/// Checks I5: the container is connected as the record says.
fn connection(record: &Record, intended: &Intended, observed: &Observed) -> Option<Finding> {
    let container = observed.containers.get(&record.vmid);
    let container =
        container.filter(|container| container.mark.as_ref() == Some(&record.mark()))?;
    let expected = intended.connected.get(&record.id)?;
    if let Some(why) = address::differs(record, expected, container.net0.as_ref()) {
        return Some(Finding::new(Invariant::I5, record.id, why));
    }
    let (given, lease) = (intended.given.get(&record.id)?, record.lease()?);
    let detail = format!(
        "a DHCP reply gave container {} {given} in the middle of its boot; its address stays {lease} \
         until it is started again",
        record.vmid
    );
    Some(Finding::new(Invariant::I5, record.id, detail))
}

/// Checks I3: no container that is no sandbox has the address of one.
fn strangers(live: &[Arc<Record>], observed: &Observed, findings: &mut Vec<Finding>) {
    let own: BTreeSet<Vmid> = live.iter().map(|record| record.vmid).collect();
    for (vmid, container) in &observed.containers {
        // A container with our mark for its vmid that is no sandbox is a finding by itself.
        let marked = container.is_marked_as(*vmid).is_some();
        if container.template || marked || own.contains(vmid) {
            continue;
        }
        let holds = |record: &&Arc<Record>| {
            record.lease().is_some_and(|lease| container.ips.contains(&lease))
        };
        for record in live.iter().filter(holds) {
            let detail =
                format!("container {vmid}, which is no sandbox, has the address of {}", record.id);
            findings.push(Finding::new(Invariant::I3, vmid, detail));
        }
    }
}

/// Checks I3: no vmid and no address twice; and I4: no request twice.
fn twice(live: &[Arc<Record>], findings: &mut Vec<Finding>) {
    let mut requests = BTreeMap::new();
    for record in live {
        if let Some(other) = requests.insert((&record.team, &record.request_id), record.id) {
            let detail = format!("{other} was made for its request, too");
            findings.push(Finding::new(Invariant::I4, record.id, detail));
        }
    }
    let mut vmids = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    for record in live {
        if let Some(other) = vmids.insert(record.vmid, record.id) {
            let detail = format!("vmid {} is {other}'s too", record.vmid);
            findings.push(Finding::new(Invariant::I3, record.id, detail));
        }
        if let Some(ip) = record.lease()
            && let Some(other) = addresses.insert(ip, record.id)
        {
            findings.push(Finding::new(Invariant::I3, record.id, format!("{ip} is {other}'s too")));
        }
    }
}

/// Checks I1: nothing is left of a sandbox that has ended.
fn of_tombstone(
    tombstone: &Tombstone,
    intended: &Intended,
    observed: &Observed,
) -> Option<Finding> {
    let vmid: Vmid = tombstone.vmid;
    if let Some(container) = observed.containers.get(&vmid) {
        let mark = container.is_marked_as(vmid);
        let ours = mark.is_some_and(|mark| mark.sandbox_id == tombstone.id);
        let lives = intended.live.iter().any(|record| record.vmid == vmid);
        return (ours || container.gutted && !lives).then(|| {
            let detail = format!("container {vmid} of this ended sandbox is still there");
            Finding::new(Invariant::I1, tombstone.id, detail)
        });
    }
    // The vmid is in use again, so the volumes belong to its user.
    if observed.cluster.guests.contains_key(&vmid) || intended.used.contains(&vmid) {
        return None;
    }
    let made = intended.made.get(&tombstone.id)?;
    let left = observed.volumes.get(&vmid)?.iter().filter(|volume| made.owns(volume));
    let left: Vec<&str> = left.map(String::as_str).collect();
    (!left.is_empty()).then(|| {
        let detail = format!("left of {}, which has ended", tombstone.id);
        Finding::new(Invariant::I1, left.join(" "), detail)
    })
}

/// Checks I1: a volume has a vmid of ours and no sandbox made it. It is left to its owner.
fn of_volume(
    vmid: Vmid,
    volume: &str,
    intended: &Intended,
    observed: &Observed,
) -> Option<Finding> {
    if let Some(record) = intended.live.iter().find(|record| record.vmid == vmid) {
        let container = observed.containers.get(&vmid)?;
        let its_own = container.mark.as_ref() == Some(&record.mark());
        let named = volume::key(volume).is_some_and(|key| container.volumes.contains(&key));
        let known = named || record.volumes.owns(volume);
        if !its_own || known || intended.busy.contains(&record.id) {
            return None;
        }
        let detail = format!(
            "it carries the number of {}, which did not make it: it stays when that one is deleted",
            record.id
        );
        return Some(Finding::new(Invariant::I1, volume, detail));
    }
    let ended = || intended.ended.iter().filter(|tombstone| tombstone.vmid == vmid);
    let in_range = intended.range.is_some_and(|(first, last)| (first..=last).contains(&vmid));
    let taken = observed.cluster.guests.contains_key(&vmid)
        || observed.containers.contains_key(&vmid)
        || intended.used.contains(&vmid);
    if taken || !in_range && ended().next().is_none() {
        return None;
    }
    // Skips a volume of a sandbox that an operation works on, and one that its own sandbox left:
    // `of_tombstone` reports that.
    let told = |tombstone: &Tombstone| {
        let made = intended.made.get(&tombstone.id);
        intended.busy.contains(&tombstone.id) || made.is_some_and(|made| made.owns(volume))
    };
    if ended().any(told) {
        return None;
    }
    let detail = format!(
        "it carries {vmid}, a number of this node's, and no sandbox made it: it is left alone"
    );
    Some(Finding::new(Invariant::I1, volume, detail))
}

#[cfg(test)]
mod tests;
