//! Converts domain types to wire types, where the two differ.

use proto::{agent::v1 as agent, sandbox::v1 as wire, time::timestamp};

use crate::{
    node::NodeStatus,
    placement::{Decision, Filtered},
    sandbox::Piece,
    store::Event,
    store::Why,
    url::{Url, Urls},
};

/// Fills in the URLs of the sandbox's open ports.
pub(super) fn sandbox(mut sandbox: wire::Sandbox, urls: &Urls) -> wire::Sandbox {
    // Which of its ports is the main one depends on all of them.
    let made: Vec<Url> =
        sandbox.services.iter().map(|service| urls.of(&sandbox, service.port)).collect();
    for (service, url) in sandbox.services.iter_mut().zip(made) {
        Url {
            text: service.url,
            missing: service.no_url,
            bypasses_access: service.bypasses_access,
        } = url;
    }
    sandbox
}

/// Builds the answer with a credential for the port at `url`. A URL that leads past the ingress gets none: the sandbox
/// itself would receive the credential.
pub(super) fn access_link(
    made: agent::CreateAccessLinkResponse,
    url: &Url,
) -> wire::CreateAccessLinkResponse {
    let parameter = match made.kind() {
        wire::AccessKind::Token => "sbx_token",
        wire::AccessKind::Unspecified | wire::AccessKind::Link => "sbx_link",
    };
    let takes_none = url.bypasses_access || url.text.is_empty();
    let with_it = || format!("{}/?{parameter}={}", url.text, made.credential);
    wire::CreateAccessLinkResponse {
        url: if takes_none { String::new() } else { with_it() },
        credential: made.credential,
        kind: made.kind,
        expires_at: made.expires_at,
        port: made.port,
    }
}

/// Converts an event with its revision.
pub(super) fn event((revision, event): (u64, Event)) -> wire::Event {
    wire::Event {
        revision,
        at: Some(timestamp(event.at_ms)),
        sandbox_id: event.sandbox.map(|id| id.to_string()).unwrap_or_default(),
        team: event.team.map(|team| team.to_string()).unwrap_or_default(),
        node: event.node.map(|node| node.to_string()).unwrap_or_default(),
        kind: event.kind.into(),
        actor: event.actor,
        why: match event.why {
            Why::Unsaid => None,
            Why::Reason(reason) => Some(wire::event::Why::Reason(reason.into())),
            Why::Cause(cause) => Some(wire::event::Why::Cause(cause.into())),
        },
        detail: event.detail,
        node_revision: event.node_revision,
    }
}

/// Kind of a part of a score; unspecified for a name that an earlier version has stored.
fn kind(name: &str) -> wire::ScorePartKind {
    let name = format!("SCORE_PART_KIND_{}", name.to_uppercase());
    wire::ScorePartKind::from_str_name(&name).unwrap_or_default()
}

pub(super) fn decision(decision: Decision) -> wire::PlacementDecision {
    let node = decision.node().map(ToString::to_string).unwrap_or_default();
    let nodes = decision.verdicts.into_iter().map(|verdict| wire::NodeVerdict {
        node: verdict.node.to_string(),
        filtered: verdict.filtered.map(Filtered::wire).unwrap_or_default().into(),
        detail: verdict.detail,
        score: verdict.score,
        parts: verdict
            .parts
            .into_iter()
            .map(|part| wire::ScorePart { kind: kind(&part.name).into(), value: part.value })
            .collect(),
    });
    wire::PlacementDecision {
        node,
        decided_at: Some(timestamp(decision.decided_ms)),
        nodes: nodes.collect(),
        attempt: decision.attempt,
        holders: decision.holders,
    }
}

pub(super) fn node(status: NodeStatus) -> wire::Node {
    let (load, report_age) = match status.report {
        Some((load, age)) => (Some(load), prost_types::Duration::try_from(age).ok()),
        None => (None, None),
    };
    wire::Node {
        name: status.name.to_string(),
        address: status.address,
        ready: status.not_ready.is_none(),
        reason: status.not_ready.unwrap_or_default(),
        version: status.version,
        load,
        report_age,
        sandboxes: status.sandboxes,
        certificate_expires_at: status.certificate.map(|shown| timestamp(shown.not_after_ms)),
    }
}

pub(super) fn piece_of_file(piece: Piece) -> wire::ReadFileResponse {
    match piece {
        Piece::File(file) => {
            wire::ReadFileResponse { file: Some(file), ..wire::ReadFileResponse::default() }
        }
        Piece::Data(data) => wire::ReadFileResponse { file: None, data },
    }
}

/// Drops the metadata: the archive contains it.
pub(super) fn piece_of_archive(piece: Piece) -> wire::DownloadArchiveResponse {
    match piece {
        Piece::File(_) => wire::DownloadArchiveResponse::default(),
        Piece::Data(data) => wire::DownloadArchiveResponse { data },
    }
}
