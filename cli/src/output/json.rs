//! The objects of `--json`. Scripts rely on them: fields are added, never renamed.

use std::collections::BTreeMap;

use proto::sandbox::v1 as wire;
use serde::Serialize;

use super::time::rfc3339;

/// JSON of a sandbox.
#[derive(Debug, Serialize)]
pub struct Sandbox<'a> {
    id: &'a str,
    name: &'a str,
    vmid: u32,
    node: &'a str,
    team: &'a str,
    phase: &'static str,
    step: &'static str,
    snapshot_id: &'a str,
    size: Size,
    ip: &'a str,
    services: Vec<Service<'a>>,
    metadata: &'a BTreeMap<String, String>,
    created_at: Option<String>,
    started_at: Option<String>,
    boot: u32,
    attempt: u32,
    revision: u64,
    request_id: &'a str,
    failure: Option<Recorded<'a>>,
    wake_on: WakeOn,
    cause: String,
    stop_result: &'static str,
    expires_at: Option<String>,
    lifetime: Lifetime,
    egress: &'static str,
    egress_names: &'a [String],
}

/// JSON of a lifetime; seconds, 0 is for ever.
#[derive(Debug, Serialize)]
pub struct Lifetime {
    ttl_s: u64,
    ttl_action: &'static str,
    idle_s: u64,
    idle_action: &'static str,
    idle_cpu: u32,
}

/// JSON of the events that wake a paused sandbox.
#[derive(Debug, Serialize)]
pub struct WakeOn {
    http: bool,
    ssh: bool,
    exec: bool,
}

/// JSON of a size: cores, memory, and the disk if it was requested.
#[derive(Debug, Serialize)]
pub struct Size {
    cpu_cores: u32,
    memory_mib: u32,
    disk_gib: u32,
}

/// JSON of an open port.
#[derive(Debug, Serialize)]
pub struct Service<'a> {
    name: &'a str,
    port: u32,
    url: &'a str,
    visibility: &'static str,
    bypasses_access: bool,
    /// Why there is no URL.
    #[serde(skip_serializing_if = "str::is_empty")]
    no_url: &'a str,
}

#[derive(Debug, Serialize)]
struct Recorded<'a> {
    reason: &'a str,
    message: &'a str,
    rollback: &'a str,
}

/// Name of a phase in lower case, without its prefix.
pub fn phase(phase: wire::Phase) -> &'static str {
    match phase {
        wire::Phase::Unspecified => "unknown",
        wire::Phase::Creating => "creating",
        wire::Phase::Running => "running",
        wire::Phase::Paused => "paused",
        wire::Phase::Starting => "starting",
        wire::Phase::Stopping => "stopping",
        wire::Phase::Stopped => "stopped",
        wire::Phase::Deleting => "deleting",
        wire::Phase::Deleted => "deleted",
        wire::Phase::Failed => "failed",
        wire::Phase::Unreachable => "unreachable",
    }
}

fn size(size: Option<wire::Size>) -> Size {
    let size = size.unwrap_or_default();
    Size { cpu_cores: size.cpu_cores, memory_mib: size.memory_mib, disk_gib: size.disk_gib }
}

/// Converts an open port.
pub fn service(service: &wire::HttpService) -> Service<'_> {
    Service {
        name: &service.name,
        port: service.port,
        url: &service.url,
        visibility: service.visibility().word(),
        bypasses_access: service.bypasses_access,
        no_url: &service.no_url,
    }
}

/// Converts a sandbox.
pub fn sandbox(sandbox: &wire::Sandbox) -> Sandbox<'_> {
    Sandbox {
        id: &sandbox.id,
        name: &sandbox.name,
        vmid: sandbox.vmid,
        node: &sandbox.node,
        team: &sandbox.team,
        phase: phase(sandbox.phase()),
        step: sandbox.progress().name(),
        snapshot_id: &sandbox.snapshot_id,
        size: size(sandbox.size),
        ip: &sandbox.ip,
        services: sandbox.services.iter().map(service).collect(),
        metadata: &sandbox.metadata,
        created_at: rfc3339(sandbox.created_at),
        started_at: rfc3339(sandbox.started_at),
        boot: sandbox.boot,
        attempt: sandbox.attempt,
        revision: sandbox.revision,
        request_id: &sandbox.request_id,
        failure: sandbox.failure.as_ref().map(|failure| Recorded {
            reason: failure.reason().name(),
            message: &failure.message,
            rollback: &failure.rollback,
        }),
        wake_on: wake_on(sandbox.wake_on),
        cause: sandbox.cause().name().to_lowercase(),
        stop_result: stop_result(sandbox.stop_result()),
        expires_at: rfc3339(sandbox.expires_at),
        lifetime: lifetime(sandbox.lifetime),
        egress: egress(sandbox.egress()),
        egress_names: &sandbox.egress_names,
    }
}

/// Returns the reach of a sandbox in a word; empty when its node does not say it.
pub fn egress(egress: wire::Egress) -> &'static str {
    match egress {
        wire::Egress::Unspecified => "",
        wire::Egress::Open => "open",
        wire::Egress::None => "none",
        wire::Egress::Allow => "allow",
    }
}

/// How a sandbox was stopped, in words; empty when it is not stopped, or nobody knows.
pub fn stop_result(result: wire::StopResult) -> &'static str {
    match result {
        wire::StopResult::Unspecified => "",
        wire::StopResult::ShutDown => "shut_down",
        wire::StopResult::Killed => "killed",
    }
}

/// Converts the events that wake a paused sandbox.
pub fn wake_on(wake_on: Option<wire::WakeOn>) -> WakeOn {
    let wire::WakeOn { http, ssh, exec } = wake_on.unwrap_or_default();
    WakeOn { http, ssh, exec }
}

/// Converts a lifetime.
fn lifetime(lifetime: Option<wire::Lifetime>) -> Lifetime {
    let rules = lifetime.unwrap_or_default();
    let seconds = |time: Option<prost_types::Duration>| {
        time.and_then(|time| u64::try_from(time.seconds).ok()).unwrap_or_default()
    };
    Lifetime {
        ttl_s: seconds(rules.ttl),
        ttl_action: expiry_action(rules.ttl_action()),
        idle_s: seconds(rules.idle),
        idle_action: expiry_action(rules.idle_action()),
        idle_cpu: rules.idle_cpu(),
    }
}

/// Name of an expiry action on the command line.
pub fn expiry_action(action: wire::ExpiryAction) -> &'static str {
    match action {
        wire::ExpiryAction::Unspecified | wire::ExpiryAction::Pause => "pause",
        wire::ExpiryAction::Stop => "stop",
        wire::ExpiryAction::Delete => "delete",
    }
}

/// JSON of a snapshot.
#[derive(Debug, Serialize)]
pub struct Snapshot<'a> {
    id: &'a str,
    size: Size,
    nodes: &'a [String],
    services: Vec<DefaultService<'a>>,
    expose_on_listen: bool,
    differing_nodes: &'a [String],
}

/// JSON of a service that sandboxes expose by default.
#[derive(Debug, Serialize)]
struct DefaultService<'a> {
    name: &'a str,
    port: u32,
    visibility: &'static str,
}

/// Converts a snapshot.
pub fn snapshot(snapshot: &wire::Snapshot) -> Snapshot<'_> {
    let services = snapshot.services.iter().map(|service| DefaultService {
        name: &service.name,
        port: service.port,
        visibility: service.visibility().word(),
    });
    Snapshot {
        id: &snapshot.id,
        size: size(snapshot.size),
        nodes: &snapshot.nodes,
        services: services.collect(),
        expose_on_listen: snapshot.expose_on_listen,
        differing_nodes: &snapshot.differing_nodes,
    }
}

/// JSON of a node.
#[derive(Debug, Serialize)]
pub struct Node<'a> {
    id: &'a str,
    address: &'a str,
    ready: bool,
    reason: &'a str,
    version: &'a str,
    sandboxes: u32,
    report_age_ms: Option<u64>,
    certificate_expires_at: Option<String>,
    load: Option<Load<'a>>,
}

#[derive(Debug, Serialize)]
struct Load<'a> {
    cores: f64,
    cpu_busy: f64,
    psi_cpu: f64,
    psi_memory: f64,
    psi_io: f64,
    memory_total: u64,
    memory_available: u64,
    memory_allocated: u64,
    cores_allocated: u32,
    starting: u32,
    queued: u32,
    running: u32,
    storage_free: u64,
    storage_total: u64,
    vmids_free: u32,
    ips_free: u32,
    quorate: bool,
    cordoned: bool,
    draining: bool,
    maintenance: bool,
    renumbered_to: u32,
    foreign_cores: Option<f64>,
    foreign_memory: Option<u64>,
    booting_cores: Option<f64>,
    thin_data_used: f64,
    thin_metadata_used: f64,
    snapshots: &'a [String],
    start_ms: u32,
    seq: u64,
    taken_at: Option<String>,
}

/// Duration in whole milliseconds.
pub fn millis(span: Option<prost_types::Duration>) -> Option<u64> {
    let span = span?;
    u64::try_from(span.seconds * 1000 + i64::from(span.nanos / 1_000_000)).ok()
}

/// Converts a node.
pub fn node(node: &wire::Node) -> Node<'_> {
    Node {
        id: &node.name,
        address: &node.address,
        ready: node.ready,
        reason: &node.reason,
        version: &node.version,
        sandboxes: node.sandboxes,
        report_age_ms: millis(node.report_age),
        certificate_expires_at: rfc3339(node.certificate_expires_at),
        load: node.load.as_ref().map(|load| Load {
            cores: load.cores,
            cpu_busy: load.cpu_busy,
            psi_cpu: load.psi_cpu,
            psi_memory: load.psi_memory,
            psi_io: load.psi_io,
            memory_total: load.memory_total,
            memory_available: load.memory_available,
            memory_allocated: load.memory_allocated,
            cores_allocated: load.cores_allocated,
            starting: load.starting,
            queued: load.queued,
            running: load.running,
            storage_free: load.storage_free,
            storage_total: load.storage_total,
            vmids_free: load.vmids_free,
            ips_free: load.ips_free,
            quorate: load.quorate,
            cordoned: load.cordoned,
            draining: load.draining,
            maintenance: load.maintenance,
            renumbered_to: load.renumbered_to,
            foreign_cores: load.foreign_cores,
            foreign_memory: load.foreign_memory,
            booting_cores: load.booting_cores,
            thin_data_used: load.thin_data_used,
            thin_metadata_used: load.thin_metadata_used,
            snapshots: &load.snapshots,
            start_ms: load.start_ms,
            seq: load.seq,
            taken_at: rfc3339(load.taken_at),
        }),
    }
}

/// JSON of a placement decision.
#[derive(Debug, Serialize)]
pub struct Decision<'a> {
    id: Option<&'a str>,
    node: &'a str,
    decided_at: Option<String>,
    attempt: u32,
    nodes: Vec<Verdict<'a>>,
}

#[derive(Debug, Serialize)]
struct Verdict<'a> {
    id: &'a str,
    chosen: bool,
    filtered: &'a str,
    detail: &'a str,
    score: f64,
    parts: BTreeMap<String, f64>,
}

/// Converts a decision; `id` is the sandbox's, and absent in a dry run.
pub fn decision<'a>(id: Option<&'a str>, decision: &'a wire::PlacementDecision) -> Decision<'a> {
    let verdict = |verdict: &'a wire::NodeVerdict| Verdict {
        id: &verdict.node,
        chosen: !decision.node.is_empty() && verdict.node == decision.node,
        filtered: verdict.filtered().name(),
        detail: &verdict.detail,
        score: verdict.score,
        parts: verdict
            .parts
            .iter()
            .map(|part| (part.kind().name().to_lowercase(), part.value))
            .collect(),
    };
    Decision {
        id,
        node: &decision.node,
        decided_at: rfc3339(decision.decided_at),
        attempt: decision.attempt,
        nodes: decision.nodes.iter().map(verdict).collect(),
    }
}

/// JSON of an event; its sandbox is its `id`.
#[derive(Debug, Serialize)]
pub struct Event<'a> {
    revision: u64,
    at: Option<String>,
    kind: String,
    id: &'a str,
    team: &'a str,
    node: &'a str,
    actor: &'a str,
    reason: &'a str,
    detail: &'a str,
    node_revision: u64,
}

/// Name of a kind of events in lower case, without its prefix.
pub fn event_kind(kind: wire::EventKind) -> String {
    if kind == wire::EventKind::Unspecified {
        // Kind of a later version of the controller.
        return "unknown".into();
    }
    kind.as_str_name().trim_start_matches("EVENT_KIND_").to_lowercase()
}

/// Why an event happened: the name of a reason or of a cause; empty where nobody says.
pub fn why(event: &wire::Event) -> &'static str {
    use wire::event::Why;
    // Numbers from a later version of the controller have no name here.
    match event.why {
        Some(Why::Reason(number)) => {
            proto::Reason::try_from(number).map_or("", proto::Reason::name)
        }
        Some(Why::Cause(number)) => proto::Cause::try_from(number).map_or("", proto::Cause::name),
        None => "",
    }
}

/// An event.
pub fn event(event: &wire::Event) -> Event<'_> {
    Event {
        revision: event.revision,
        at: rfc3339(event.at),
        kind: event_kind(event.kind()),
        id: &event.sandbox_id,
        team: &event.team,
        node: &event.node,
        actor: &event.actor,
        reason: why(event),
        detail: &event.detail,
        node_revision: event.node_revision,
    }
}

/// JSON of the findings of a check.
#[derive(Debug, Serialize)]
pub struct Fsck<'a> {
    findings: Vec<Finding<'a>>,
    sandboxes: u32,
    nodes: u32,
}

#[derive(Debug, Serialize)]
struct Finding<'a> {
    id: &'a str,
    invariant: &'a str,
    node: &'a str,
    detail: &'a str,
}

/// Converts the findings of a check; the subject of a finding is its `id`.
pub fn fsck(response: &wire::FsckResponse) -> Fsck<'_> {
    let findings = response.findings.iter().map(|finding| Finding {
        id: &finding.subject,
        invariant: finding.invariant().name(),
        node: &finding.node,
        detail: &finding.detail,
    });
    Fsck { findings: findings.collect(), sandboxes: response.sandboxes, nodes: response.nodes }
}
