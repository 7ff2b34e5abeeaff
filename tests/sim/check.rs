//! The invariants, once the faults have stopped.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use agent::journal::{Journal, Phase, Record};
use proto::sandbox::v1::{
    EventKind, FsckRequest, ListSandboxesRequest, WatchAllEventsRequest,
    operator_service_client::OperatorServiceClient, sandbox_service_client::SandboxServiceClient,
};
use tokio::time::Instant;
use tonic::{Request, metadata::MetadataValue};

use crate::{
    cluster::{Cluster, FOREIGN, vmid},
    story::{MORTAL, Memory},
};

/// After the last fault everything converges within this: I9. An operation that hangs is given up
/// after its own deadline first.
const CONVERGES: Duration = Duration::from_secs(600);

/// Waits until nothing is under way, then checks everything.
pub(crate) async fn settles(cluster: &mut Cluster, memory: &Memory) {
    let deadline = Instant::now() + CONVERGES;
    loop {
        cluster.pve.release();
        let wrong = wrong(cluster, memory).await;
        if wrong.is_empty() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "not right {CONVERGES:?} after the last fault:\n  {}",
            wrong.join("\n  ")
        );
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

/// Everything that does not fit.
async fn wrong(cluster: &Cluster, memory: &Memory) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut records: BTreeMap<String, Record> = BTreeMap::new();
    let (mut vmids, mut ips) = (BTreeSet::new(), BTreeSet::new());
    for host in &cluster.hosts {
        for record in host.journal.all().await.expect("a journal") {
            if !record.phase.ended() {
                if !vmids.insert(record.vmid) {
                    wrong.push(format!("I3: vmid {} is held twice", record.vmid));
                }
                if record.ip.is_some_and(|ip| !ips.insert(ip)) {
                    wrong.push(format!("I3: address {:?} is held twice", record.ip));
                }
                if !matches!(record.phase, Phase::Running | Phase::Paused | Phase::Stopped) {
                    wrong.push(format!("I9: {} is still {:?}", record.id, record.phase));
                }
                records.insert(record.id.to_string(), record);
            }
        }
    }
    let guests = cluster.pve.guests();
    for (number, guest) in &guests {
        let Some(mark) = guest.config.mark() else { continue };
        match records.get(&mark.sandbox_id.to_string()) {
            Some(record) if record.vmid == *number => {}
            _ => wrong.push(format!("I1: container {number} of {} has no record", mark.sandbox_id)),
        }
    }
    for record in records.values() {
        if !guests.contains_key(&record.vmid) {
            wrong.push(format!("I2: {} has no container {}", record.id, record.vmid));
        }
    }
    match guests.get(&vmid(FOREIGN)) {
        Some(guest) if guest.pid.is_none() => {}
        _ => wrong.push("I8: the foreign container was touched".into()),
    }
    for (key, known) in memory {
        let Some(id) = &known.id else { continue };
        let mortal = key.starts_with(MORTAL);
        if mortal && records.contains_key(id) {
            wrong.push(format!("I9: {id} has outlived its time"));
        }
        if known.acked && known.deleted.is_none() && !mortal && !records.contains_key(id) {
            wrong.push(format!("I2: {key} was acked as {id} and is gone"));
        }
        if known.deleted == Some(true) && records.contains_key(id) {
            wrong.push(format!("I7: {id} was deleted and is there"));
        }
    }
    let mut of_request: BTreeMap<&str, usize> = BTreeMap::new();
    for record in records.values() {
        *of_request.entry(record.request_id.as_str()).or_default() += 1;
    }
    for (key, count) in of_request.iter().filter(|(_, count)| **count > 1) {
        wrong.push(format!("I4: {key} is {count} sandboxes"));
    }
    wrong.extend(by_the_controller(cluster, &records).await);
    wrong.extend(by_the_log(cluster, &records).await);
    wrong
}

/// The controller's log must lead to what is, through all of its crashes: nothing twice, no gap.
async fn by_the_log(cluster: &Cluster, records: &BTreeMap<String, Record>) -> Vec<String> {
    use EventKind as E;
    let mut of: BTreeMap<String, Vec<EventKind>> = BTreeMap::new();
    let answer = OperatorServiceClient::new(cluster.channel())
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
                    wrong.push(format!("log: {} comes after {seen}", event.revision));
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
        // A boot can follow a boot, and a start that comes to nothing ends where it began; every
        // other state is left before it comes again.
        let again = [E::Started, E::Stopped];
        let twice = told.windows(2).any(|two| two[0] == two[1] && !again.contains(&two[0]));
        let over =
            told.iter().rev().skip(1).any(|kind| matches!(kind, E::Deleted | E::CreateFailed));
        if twice || over || told.iter().filter(|kind| **kind == E::Created).count() > 1 {
            wrong.push(format!("log: {id} cannot have gone {told:?}"));
        }
    }
    for (id, record) in records {
        let last = of.get(id).and_then(|told| told.last());
        let fits = match record.phase {
            Phase::Paused => last == Some(&E::Paused),
            Phase::Stopped => last == Some(&E::Stopped),
            Phase::Running => {
                matches!(last, Some(E::Created | E::Started | E::Resumed | E::Found))
            }
            // Said above.
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
                "log: {id} is {:?}, and the log has {:?}",
                record.phase,
                of.get(id)
            ));
        }
    }
    wrong
}

/// What the controller says must be what the nodes have.
async fn by_the_controller(cluster: &Cluster, records: &BTreeMap<String, Record>) -> Vec<String> {
    let mut wrong = Vec::new();
    let request = ListSandboxesRequest { page_size: 1000, ..ListSandboxesRequest::default() };
    let listed = SandboxServiceClient::new(cluster.channel())
        .list_sandboxes(authorised(&cluster.token, request))
        .await;
    match listed {
        Ok(page) => {
            let told: BTreeSet<String> =
                page.into_inner().sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
            let have: BTreeSet<String> = records.keys().cloned().collect();
            for id in told.symmetric_difference(&have) {
                wrong.push(format!("I12: controller and nodes do not agree about {id}"));
            }
        }
        Err(status) => wrong.push(format!("I9: the controller does not list: {status}")),
    }
    let fsck = OperatorServiceClient::new(cluster.channel())
        .fsck(authorised(&cluster.token, FsckRequest {}))
        .await;
    match fsck {
        Ok(found) => wrong.extend(found.into_inner().findings.into_iter().map(|finding| {
            format!(
                "fsck {}: {} {}: {}",
                finding.invariant, finding.node, finding.subject, finding.detail
            )
        })),
        Err(status) => wrong.push(format!("I9: fsck does not answer: {status}")),
    }
    wrong
}

fn authorised<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer {token}")).expect("ascii");
    request.metadata_mut().insert("authorization", value);
    request
}
