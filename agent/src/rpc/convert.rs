//! Conversions between wire and domain types, by hand: neither knows the other's types.

use std::time::{Duration, UNIX_EPOCH};

use proto::{
    agent::v1 as agent,
    duration,
    id::Invalid,
    name::{NodeName, Port, ServiceName},
    sandbox::v1 as wire,
    spec::{Egress, Spec},
};

use super::SILENCE_MAX;
use crate::{
    journal::{Lifetime, Phase, Record},
    sandbox::Order,
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
    })
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

pub(super) fn service(name: &ServiceName, port: Port) -> wire::HttpService {
    let (name, port) = (name.to_string(), port.into());
    wire::HttpService { name, port, ..wire::HttpService::default() }
}

pub(super) fn sandbox(record: &Record, node: &NodeName) -> wire::Sandbox {
    let services = record.services.iter().map(|(name, port)| service(name, *port));
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
        services: services.collect(),
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

pub(super) fn timestamp(ms: u64) -> prost_types::Timestamp {
    (UNIX_EPOCH + Duration::from_millis(ms)).into()
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
