//! Checks the invariants once the faults have stopped: compares what the daemons report with the
//! real content of the fake PVE and of the journals.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use agent::{
    clock::Clock,
    firewall::Entry,
    journal::{Feed, Phase, Record},
    pve::{fake::Guest, pause_lock},
};
use controller::store::{State, Store};
use proto::{
    Invariant,
    id::Vmid,
    name::NodeName,
    sandbox::v1::{
        EventKind, FsckRequest, ListSandboxesRequest, WatchAllEventsRequest,
        operator_service_client::OperatorServiceClient,
        sandbox_service_client::SandboxServiceClient,
    },
};
use tokio::time::Instant;

use crate::{
    calls::{MORTAL, Memory, authorised},
    cluster::{Cluster, STRANGER, VMIDS},
    drains,
};

/// Longest convergence after the last fault (I9). It is long because an operation that hangs first
/// runs until its own deadline.
const CONVERGES: Duration = Duration::from_secs(600);

/// Waits until nothing is in progress, then checks everything.
pub(crate) async fn settles(cluster: &mut Cluster, memory: &Memory) -> Result<(), Vec<String>> {
    let deadline = Instant::now() + CONVERGES;
    loop {
        cluster.pve.release();
        drains::finish(cluster).await;
        cluster.look(memory).await;
        let mut wrong = cluster.watch.seen();
        wrong.extend(at_rest(cluster, memory).await);
        if wrong.is_empty() {
            break;
        }
        if Instant::now() >= deadline {
            return Err(wrong);
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    let wrong = fenced(cluster).await;
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// Records of living sandboxes, each with the node that holds it.
type Living = BTreeMap<String, (NodeName, Record)>;

/// Runs all checks and returns the violations.
async fn at_rest(cluster: &Cluster, memory: &Memory) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut living = Living::new();
    for host in &cluster.hosts {
        for record in host.journal.all().await.expect("a journal") {
            if record.phase.ended() {
                continue;
            }
            if !matches!(record.phase, Phase::Running | Phase::Paused | Phase::Stopped) {
                wrong.push(format!("I9: {} is still {:?}", record.id, record.phase));
            }
            let (id, node) = (record.id.to_string(), host.name.clone());
            if let Some((other, _)) = living.insert(id.clone(), (node.clone(), record)) {
                wrong.push(format!("I4: {id} lives on {other} and on {node}"));
            }
        }
    }
    wrong.extend(on_the_hosts(cluster, &living));
    wrong.extend(counted(cluster, &living).await);
    wrong.extend(remembered(cluster, memory, &living));
    wrong.extend(by_the_controller(cluster, &living).await);
    wrong.extend(by_the_log(cluster, &living).await);
    wrong.extend(by_the_store(cluster).await);
    wrong
}

/// Checks that the store has no creation on which nobody works.
async fn by_the_store(cluster: &Cluster) -> Vec<String> {
    let rows = cluster.store.all().await.expect("a store");
    let placing = rows.iter().filter(|row| row.state == State::Placing);
    placing.map(|row| format!("I9: {} is still being placed", row.id)).collect()
}

/// Compares containers, volumes and locks with the records.
fn on_the_hosts(cluster: &Cluster, living: &Living) -> Vec<String> {
    let mut wrong = Vec::new();
    let guests = cluster.pve.guests();
    let of_us = guests.iter().filter(|(vmid, _)| !cluster.foreign.contains_key(vmid));
    for (vmid, guest) in of_us {
        if guest.config.is_template() {
            if let Some(lock) = guest.config.lock() {
                wrong.push(format!("I1: template {vmid} is locked ({lock})"));
            }
            continue;
        }
        let Some(mark) = guest.config.mark() else {
            let (node, lock) = (&guest.node, guest.config.lock());
            wrong.push(format!("I1: container {vmid} on {node} is nobody's, with lock {lock:?}"));
            continue;
        };
        match living.get(&mark.sandbox_id.to_string()) {
            Some((node, record)) if record.vmid == *vmid && *node == guest.node => {}
            _ => {
                let known = cluster.hosts.iter().filter_map(|host| {
                    let record = host.journal.durable(&mark.sandbox_id)?;
                    let Record { attempt, vmid, phase, .. } = record;
                    Some(format!("{}: attempt {attempt}, {vmid}, {phase:?}", host.name))
                });
                let known: Vec<_> = known.collect();
                let (node, id, attempt) = (&guest.node, mark.sandbox_id, mark.attempt);
                wrong.push(format!(
                    "I1: container {vmid} on {node} of attempt {attempt} of {id}: known are {known:?}"
                ));
            }
        }
    }
    for (_, record) in living.values() {
        let down = record.phase == Phase::Stopped && record.cause == proto::Cause::FoundDown;
        if down && cluster.rebooted.contains(&record.id.to_string()) {
            let failure = &record.failure;
            wrong.push(format!("I2: {} ran before its node's reboot: {failure:?}", record.id));
        }
    }
    for (node, record) in living.values() {
        match guests.get(&record.vmid) {
            Some(guest) if guest.node == *node => wrong.extend(as_recorded(record, guest)),
            _ => wrong.push(format!("I2: {} has no container {}", record.id, record.vmid)),
        }
    }
    for (node, record) in living.values() {
        let host = cluster.hosts.iter().find(|host| host.name == *node);
        let rules = host.and_then(|host| host.firewall.rules()).unwrap_or_else(|| panic!("{node}"));
        let entry = rules.sandboxes.get(&record.vmid);
        let differs = |entry: &Entry| entry.ip != record.lease() || entry.egress != record.egress;
        if entry.is_none_or(differs) {
            wrong.push(format!("I5: {} is not isolated on {node}: {entry:?}", record.id));
        }
    }
    let owned: BTreeSet<(NodeName, Vmid)> =
        living.values().map(|(node, record)| (node.clone(), record.vmid)).collect();
    let volumes = cluster.pve.volumes();
    let ours = |volume: &String| !cluster.strays.contains_key(volume);
    let full = |place: &(NodeName, Vmid)| {
        volumes.get(place).is_some_and(|volumes| volumes.iter().any(ours))
    };
    for (node, vmid) in volumes.keys().filter(|place| full(place)) {
        let template = guests.get(vmid).is_some_and(|guest| guest.config.is_template());
        if !template && !owned.contains(&(node.clone(), *vmid)) {
            wrong.push(format!("I1: a volume of {vmid} on {node} is nobody's"));
        }
    }
    for (node, vmid) in owned.iter().filter(|place| !full(place)) {
        wrong.push(format!("I2: {vmid} on {node} has lost its volume"));
    }
    wrong
}

/// Checks I13 and I12: the container is in the state that its record says.
fn as_recorded(record: &Record, guest: &Guest) -> Option<String> {
    let (id, phase) = (record.id, record.phase);
    let paused = phase == Phase::Paused;
    if (guest.frozen, pause_lock::is_held(&guest.config)) != (paused, paused) {
        let (frozen, config) = (guest.frozen, pause_lock::is_held(&guest.config));
        return Some(format!("I13: {id} is {phase:?}; frozen: {frozen}, locked: {config}"));
    }
    let given = (guest.config.cores(), guest.config.memory_mib());
    if record.resizing.is_some() || given != (Some(record.size.cpu_cores), record.size.memory_mib) {
        let (size, resizing) = (record.size, record.resizing);
        return Some(format!("I12: {id} has {given:?}; recorded: {size:?}, {resizing:?}"));
    }
    let runs = guest.pid.is_some();
    let should = matches!(phase, Phase::Running | Phase::Paused);
    (runs != should).then(|| format!("I12: {id} is {phase:?}; its container runs: {runs}"))
}

/// Checks I12: the agents' counts equal a recount.
async fn counted(cluster: &Cluster, living: &Living) -> Vec<String> {
    let mut wrong = Vec::new();
    for host in &cluster.hosts {
        let Some(agent) = host.agent() else { continue };
        let tally = agent.sandboxes().tally().await.expect("a journal");
        let here = || living.values().filter(|(node, _)| *node == host.name).map(|(_, r)| r);
        let up = || here().filter(|r| matches!(r.phase, Phase::Running | Phase::Paused));
        let memory: u64 = up().map(|record| u64::from(record.size.memory_mib) << 20).sum();
        let (first, last) = host.journal.vmids();
        let own = here().filter(|record| (first..=last).contains(&record.vmid));
        let leases = u32::try_from(own.count()).expect("few");
        let counts = (tally.vmids_free, tally.memory_allocated, tally.starting, tally.queued);
        let recount = (VMIDS - leases, memory, 0, 0);
        if counts != recount {
            wrong.push(format!("I12: {} counts {counts:?}, there are {recount:?}", host.name));
        }
    }
    wrong
}

/// Checks that the answers that callers got are true.
fn remembered(cluster: &Cluster, memory: &Memory, living: &Living) -> Vec<String> {
    let mut wrong = Vec::new();
    for (key, known) in memory {
        let Some(id) = &known.id else { continue };
        let mortal = key.starts_with(MORTAL);
        if let Some((node, record)) = living.get(id).filter(|_| mortal && known.extended.is_none())
            && !may_outlive(cluster, node, record)
        {
            wrong.push(format!("I9: {id} has outlived its time"));
        }
        let stays = known.acked && known.deleted.is_none();
        let stays = stays && (!mortal || known.extended == Some(true));
        if stays && !living.contains_key(id) {
            wrong.push(format!("I2, I6: {key} was acked as {id} and is gone"));
        }
        if let Some((_, record)) = living.get(id).filter(|_| known.is_paused())
            && record.phase != Phase::Paused
        {
            let (phase, failure) = (record.phase, &record.failure);
            wrong.push(format!("I13: {id} was paused, and is {phase:?}, {failure:?}"));
        }
        if known.deleted == Some(true) {
            if living.contains_key(id) {
                wrong.push(format!("I7: {id} was deleted and is there"));
            }
            let is_of = |guest: &Guest| guest.config.mark().map(|m| m.sandbox_id.to_string());
            if cluster.pve.guests().values().any(|guest| is_of(guest).as_ref() == Some(id)) {
                wrong.push(format!("I7: {id} was deleted and its container is there"));
            }
        }
    }
    let mut of_request: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, record) in living.values() {
        *of_request.entry(record.request_id.as_str()).or_default() += 1;
    }
    for (key, count) in of_request.iter().filter(|(_, count)| **count > 1) {
        wrong.push(format!("I4: {key} is {count} sandboxes"));
    }
    wrong
}

/// Returns whether a sandbox may live past its time to live: its node has booted since, so only the
/// wall clock counts, and that has not reached the time yet.
fn may_outlive(cluster: &Cluster, node: &NodeName, record: &Record) -> bool {
    let host = cluster.hosts.iter().find(|host| host.name == *node).expect("a host");
    let now = host.clock.moment();
    record.lifetime.expires.as_ref().is_some_and(|at| at.boot != now.boot && !at.reached(&now))
}

/// Checks that the controller's log leads to the present state through all crashes: no event twice,
/// no gap.
async fn by_the_log(cluster: &Cluster, living: &Living) -> Vec<String> {
    use EventKind as E;
    let mut of: BTreeMap<String, Vec<EventKind>> = BTreeMap::new();
    let answer = OperatorServiceClient::new(cluster.controller().channel())
        .watch_all_events(authorised(&cluster.token, WatchAllEventsRequest::default()))
        .await;
    let mut stream = match answer {
        Ok(stream) => stream.into_inner(),
        Err(status) => return vec![format!("I9: the log does not answer: {status}")],
    };
    let (mut wrong, mut seen) = (Vec::new(), 0);
    loop {
        match stream.message().await {
            Ok(Some(said)) => {
                let Some(event) = said.event else { continue };
                if event.revision <= seen {
                    wrong.push(format!("I12: the log: {} comes after {seen}", event.revision));
                }
                seen = event.revision;
                let told = [
                    E::Created,
                    E::CreateFailed,
                    E::Started,
                    E::Stopped,
                    E::Paused,
                    E::Resumed,
                    E::Deleted,
                    E::Lost,
                    E::Found,
                ];
                if told.contains(&event.kind()) {
                    of.entry(event.sandbox_id.clone()).or_default().push(event.kind());
                }
            }
            Ok(None) => break,
            Err(status) => return vec![format!("I9: the log broke: {status}")],
        }
    }
    for (id, told) in &of {
        // A boot can follow a boot, and a failed start ends where it began; every other state must
        // be left before it can be entered again.
        let again = [E::Started, E::Stopped];
        let twice = told.windows(2).any(|two| two[0] == two[1] && !again.contains(&two[0]));
        let over =
            told.iter().rev().skip(1).any(|kind| matches!(kind, E::Deleted | E::CreateFailed));
        if twice || over || told.iter().filter(|kind| **kind == E::Created).count() > 1 {
            wrong.push(format!("I12: the log: {id} cannot have gone {told:?}"));
        }
    }
    for (id, (_, record)) in living {
        let last = of.get(id).and_then(|told| told.last());
        // The log says no more about a sandbox that a controller had to find again.
        let found = cluster.forgot && last == Some(&E::Found);
        let fits = match record.phase {
            Phase::Paused => found || last == Some(&E::Paused),
            Phase::Stopped => found || last == Some(&E::Stopped),
            Phase::Running => {
                matches!(last, Some(E::Created | E::Started | E::Resumed | E::Found))
            }
            // Reported by the checks of the records.
            Phase::Creating
            | Phase::Undoing
            | Phase::Starting
            | Phase::Stopping
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => true,
        };
        if !fits {
            wrong.push(format!(
                "I12: the log: {id} is {:?}, and the log has {:?}",
                record.phase,
                of.get(id)
            ));
        }
    }
    wrong
}

/// Compares the controller's lists and findings with the nodes.
async fn by_the_controller(cluster: &Cluster, living: &Living) -> Vec<String> {
    let mut wrong = Vec::new();
    let request = ListSandboxesRequest { page_size: 1000, ..ListSandboxesRequest::default() };
    let listed = SandboxServiceClient::new(cluster.controller().channel())
        .list_sandboxes(authorised(&cluster.token, request))
        .await;
    match listed {
        Ok(page) => {
            let told: BTreeSet<String> =
                page.into_inner().sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
            let have: BTreeSet<String> = living.keys().cloned().collect();
            for id in told.symmetric_difference(&have) {
                wrong.push(format!("I12: controller and nodes do not agree about {id}"));
            }
        }
        Err(status) => wrong.push(format!("I9: the controller does not list: {status}")),
    }
    let fsck = OperatorServiceClient::new(cluster.controller().channel())
        .fsck(authorised(&cluster.token, FsckRequest {}))
        .await;
    match fsck {
        Ok(found) => {
            let (mut strangers, mut strays) = (0, cluster.strays.clone());
            // A volume under the number of a foreign container is reported with that container.
            strays.retain(|_, vmid| !cluster.foreign.contains_key(vmid));
            for finding in found.into_inner().findings {
                if finding.invariant() == Invariant::I1
                    && cluster.strays.contains_key(&finding.subject)
                {
                    strays.remove(&finding.subject);
                    continue;
                }
                if finding.invariant() == Invariant::I1 && finding.subject == STRANGER.to_string() {
                    strangers += 1;
                    continue;
                }
                // The hosts' clocks are wrong on purpose.
                if finding.invariant() == Invariant::Clock {
                    continue;
                }
                wrong.push(format!(
                    "fsck {}: {} {}: {}",
                    finding.invariant().name(),
                    finding.node,
                    finding.subject,
                    finding.detail
                ));
            }
            for stray in strays.into_keys() {
                wrong.push(format!("I1: fsck does not see {stray}, which no sandbox made"));
            }
            if strangers != 1 {
                wrong.push("I1: fsck does not see the mark that no journal knows".into());
            }
        }
        Err(status) => wrong.push(format!("I9: fsck does not answer: {status}")),
    }
    wrong
}

/// Checks I10: agents refuse a controller of an earlier epoch, also after they restart.
async fn fenced(cluster: &mut Cluster) -> Vec<String> {
    let mut wrong = Vec::new();
    for index in 0..cluster.hosts.len() {
        let Some(agent) = cluster.hosts[index].agent().cloned() else { continue };
        let old = agent.sandboxes().epoch().saturating_sub(1);
        let refused = agent.sandboxes().fence(old).await.is_err();
        cluster.kill_agent(index).await;
        cluster.start_the_dead().await;
        let Some(agent) = cluster.hosts[index].agent() else { continue };
        let refused_later = agent.sandboxes().fence(old).await.is_err();
        if !refused || !refused_later {
            wrong.push(format!(
                "I10: {} obeys a controller of epoch {old}",
                agent_of(cluster, index)
            ));
        }
    }
    wrong
}

fn agent_of(cluster: &Cluster, index: usize) -> &NodeName {
    &cluster.hosts[index].name
}
