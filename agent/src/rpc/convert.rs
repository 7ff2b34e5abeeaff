//! Conversions between wire and domain types, by hand: neither knows the other's types.

use std::time::Duration;

use proto::{
    agent::v1 as agent,
    duration,
    id::Invalid,
    name::{NodeName, Port, ServiceName},
    sandbox::v1 as wire,
    spec::{Egress, Spec},
    time::timestamp,
    visibility::Visibility,
};

use super::SILENCE_MAX;
use crate::{
    journal::{Lifetime, OpenPort, Phase, PortRules, Record},
    sandbox::{DefaultPorts, DefaultService, Order, access::credential::Purpose},
};

pub(super) fn order(request: &agent::CreateSandboxRequest) -> Result<Order, Invalid> {
    let spec = request.spec.as_ref().ok_or_else(|| Invalid::new("spec", "must be given"))?;
    let spec = Spec::try_from(spec)?;
    if request.request_id != spec.request_id.as_str() {
        return Err(Invalid::new("request_id", "must be that of the spec"));
    }
    let digest = &request.body_digest;
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if digest.len() != 64 || !digest.bytes().all(hex) {
        return Err(Invalid::new("body_digest", "must be 64 hexadecimal digits in lower case"));
    }
    Ok(Order {
        id: request.sandbox_id.parse()?,
        team: request.team.parse()?,
        attempt: attempt(request.attempt)?,
        body_digest: digest.clone(),
        spec,
        port_rules: request.port_rules.as_ref().map(port_rules).transpose()?,
    })
}

fn port_rules(rules: &agent::PortRules) -> Result<PortRules, Invalid> {
    let default = Visibility::read(rules.default_visibility, "port_rules.default_visibility")?;
    let denied = rules.denied_ports.iter().map(|port| {
        Port::try_from(*port).map_err(|invalid| invalid.named("port_rules.denied_ports"))
    });
    Ok(PortRules {
        default: default.unwrap_or(Visibility::Team),
        denied: denied.collect::<Result<_, _>>()?,
    })
}

/// Converts the ports that sandboxes of a snapshot expose without a word of their callers.
pub(super) fn default_ports(ports: &DefaultPorts) -> wire::SnapshotPorts {
    let service = |service: &DefaultService| wire::HttpService {
        visibility: service.visibility.map(wire::Visibility::from).unwrap_or_default().into(),
        ..closed(&service.name, service.port)
    };
    wire::SnapshotPorts {
        services: ports.services.iter().map(service).collect(),
        expose_on_listen: ports.on_listen,
    }
}

/// Reads what a container that becomes a sandbox reaches; older controllers do not say it.
pub(super) fn egress(value: i32, names: &[String]) -> Result<Egress, Invalid> {
    Ok(Egress::read(value, names, "egress")?.unwrap_or_default())
}

pub(super) fn attempt(number: u32) -> Result<u32, Invalid> {
    if number == 0 { Err(Invalid::new("attempt", "must be 1 or more")) } else { Ok(number) }
}

/// Validates how long a call may wait: the requested time, within the limits.
pub(super) fn wait(wait: Option<prost_types::Duration>) -> Result<Duration, Invalid> {
    let wait = duration::check("wait", wait)?;
    Ok(wait.unwrap_or(SILENCE_MAX).min(SILENCE_MAX))
}

/// Converts a service that was closed.
pub(super) fn closed(name: &ServiceName, port: Port) -> wire::HttpService {
    wire::HttpService { name: name.to_string(), port: port.into(), ..Default::default() }
}

fn service(open: &OpenPort) -> wire::HttpService {
    wire::HttpService {
        visibility: wire::Visibility::from(open.visibility).into(),
        ..closed(&open.name, open.port)
    }
}

/// Converts the kind of a credential; `None`: the one that the port takes.
pub(super) fn purpose(kind: i32) -> Result<Option<Purpose>, Invalid> {
    let kind = wire::AccessKind::try_from(kind)
        .map_err(|_| Invalid::new("kind", "must be LINK or TOKEN"))?;
    Ok(match kind {
        wire::AccessKind::Unspecified => None,
        wire::AccessKind::Link => Some(Purpose::Link),
        wire::AccessKind::Token => Some(Purpose::Token),
    })
}

/// Converts the purpose of a credential that was made.
pub(super) fn access_kind(purpose: Purpose) -> wire::AccessKind {
    match purpose {
        Purpose::Link | Purpose::Session => wire::AccessKind::Link,
        Purpose::Token => wire::AccessKind::Token,
    }
}

pub(super) fn sandbox(record: &Record, node: &NodeName) -> wire::Sandbox {
    let open = record.open_ports();
    wire::Sandbox {
        id: record.id.to_string(),
        vmid: record.vmid.get(),
        // For a sandbox that has moved, the node where it is now.
        node: record.moved_to.as_ref().unwrap_or(node).to_string(),
        team: record.team.to_string(),
        phase: phase(record.phase).into(),
        snapshot_id: record.snapshot.to_string(),
        size: Some(record.size.into()),
        ip: record.lease().map(|ip| ip.to_string()).unwrap_or_default(),
        addresses: record.addresses().map(|ip| ip.to_string()).collect(),
        services: open.iter().map(service).collect(),
        name: record.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        metadata: record.metadata.clone(),
        created_at: Some(timestamp(record.created_ms)),
        started_at: (record.started_ms != 0).then(|| timestamp(record.started_ms)),
        boot: record.boot,
        attempt: record.attempt,
        revision: record.revision,
        failure: record.failure.as_ref().map(|failure| wire::Failure {
            reason: failure.reason.into(),
            message: failure.message.clone(),
            rollback: failure.rollback.clone(),
        }),
        request_id: record.request_id.to_string(),
        progress: record.progress.into(),
        wake_on: Some(wire::WakeOn {
            http: record.wake_on.http,
            ssh: record.wake_on.ssh,
            exec: record.wake_on.exec,
        }),
        cause: record.cause.into(),
        expires_at: record.lifetime.expires.as_ref().map(|at| timestamp(at.wall_ms)),
        lifetime: Some(lifetime(&record.lifetime)),
        stop_result: record.stop_result.into(),
        egress: wire::Egress::from(&record.egress).into(),
        egress_names: record.egress.names(),
        since: (record.since.wall_ms != 0).then(|| timestamp(record.since.wall_ms)),
    }
}

fn lifetime(lifetime: &Lifetime) -> wire::Lifetime {
    let duration = |ms| prost_types::Duration::try_from(Duration::from_millis(ms)).ok();
    wire::Lifetime {
        ttl: duration(lifetime.ttl_ms),
        ttl_action: wire::ExpiryAction::from(lifetime.ttl_action).into(),
        idle: duration(lifetime.idle_ms),
        idle_action: wire::ExpiryAction::from(lifetime.idle_action).into(),
        idle_cpu: Some(lifetime.idle_cpu),
    }
}

/// Converts a phase. A creation that is being undone is still CREATING on the wire: FAILED means
/// that nothing of it is left. Its failure already tells that it will not start.
fn phase(phase: Phase) -> wire::Phase {
    match phase {
        Phase::Creating | Phase::Undoing => wire::Phase::Creating,
        Phase::Running => wire::Phase::Running,
        Phase::Paused => wire::Phase::Paused,
        Phase::Starting => wire::Phase::Starting,
        Phase::Stopping => wire::Phase::Stopping,
        Phase::Stopped => wire::Phase::Stopped,
        Phase::Deleting => wire::Phase::Deleting,
        Phase::Deleted => wire::Phase::Deleted,
        Phase::Failed => wire::Phase::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> agent::CreateSandboxRequest {
        agent::CreateSandboxRequest {
            epoch: 1,
            sandbox_id: proto::id::SandboxId::new(1, &[0; 10]).to_string(),
            team: "acme".into(),
            request_id: "r-1".into(),
            body_digest: "0".repeat(64),
            attempt: 1,
            spec: Some(wire::CreateSandboxRequest {
                request_id: "r-1".into(),
                snapshot_id: "base".into(),
                ..Default::default()
            }),
            wait: None,
            port_rules: None,
        }
    }

    #[track_caller]
    fn refused(field: &str, change: impl FnOnce(&mut agent::CreateSandboxRequest)) {
        let mut request = request();
        change(&mut request);
        assert_eq!(order(&request).expect_err(field).what, field);
    }

    #[test]
    fn creation_order_is_checked_field_by_field() {
        assert_eq!(order(&request()).map(|order| order.attempt), Ok(1));
        refused("sandbox_id", |r| r.sandbox_id = "pvelxc-1".into());
        refused("team", |r| r.team = "a\nb".into());
        refused("request_id", |r| r.request_id = "r-2".into());
        refused("body_digest", |r| r.body_digest = "X".repeat(64));
        refused("attempt", |r| r.attempt = 0);
        refused("spec", |r| r.spec = None);
        let ruled = |default_visibility, denied_ports: &[u32]| {
            Some(agent::PortRules { default_visibility, denied_ports: denied_ports.into() })
        };
        refused("port_rules.default_visibility", |r| r.port_rules = ruled(9, &[]));
        refused("port_rules.denied_ports", |r| r.port_rules = ruled(1, &[22, 0]));
        let with = agent::CreateSandboxRequest { port_rules: ruled(0, &[22, 22]), ..request() };
        let rules = order(&with).expect("valid").port_rules.expect("rules");
        assert_eq!((rules.default, rules.denied.len()), (Visibility::Team, 1));
        assert_eq!(order(&request()).expect("valid").port_rules, None, "an older controller");
    }

    #[test]
    fn all_addresses_of_a_sandbox_are_told_and_the_lease_apart() {
        let node = "node1".parse().expect("a name");
        let told = |ip: Option<[u8; 4]>| {
            let record = Record {
                ip: ip.map(Into::into),
                further_ips: vec![[192, 168, 9, 7].into()],
                ..crate::journal::conformance::record(1)
            };
            let sandbox = sandbox(&record, &node);
            (sandbox.ip, sandbox.addresses)
        };
        let (one, other) = ("10.100.1.7".to_owned(), "192.168.9.7".to_owned());
        assert_eq!(told(Some([10, 100, 1, 7])), (one.clone(), vec![one, other.clone()]));
        assert_eq!(told(None), (String::new(), vec![other]));
    }

    #[test]
    fn wait_is_limited_to_the_longest_silence() {
        let of = |seconds| wait(Some(prost_types::Duration { seconds, nanos: 0 }));
        assert_eq!(of(3), Ok(Duration::from_secs(3)));
        assert_eq!(of(3600), Ok(SILENCE_MAX));
        assert_eq!(wait(None), Ok(SILENCE_MAX));
        assert!(of(-1).is_err());
    }
}
