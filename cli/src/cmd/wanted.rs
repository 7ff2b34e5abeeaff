//! Translates the flags that describe a sandbox to a request of the API.

use proto::sandbox::v1::{
    CreateSandboxRequest, HttpService, ListSnapshotsRequest, NetworkMode, Size,
};

use crate::{
    args::{Pair, Wanted},
    client::{Controller, answer},
    exit,
    failure::Failure,
};

/// Builds the request; without a named snapshot it uses the only one.
pub(super) async fn request(
    controller: &Controller,
    wanted: Wanted,
    request_id: String,
) -> Result<CreateSandboxRequest, Failure> {
    let snapshot_id = match wanted.snapshot {
        Some(snapshot) => snapshot,
        None => only_snapshot(controller).await?,
    };
    let pairs =
        |pairs: Vec<Pair>| pairs.into_iter().map(|Pair { key, value }| (key, value)).collect();
    let network = if wanted.dhcp { NetworkMode::Dhcp } else { NetworkMode::Unspecified };
    let service = |service: crate::args::Service| HttpService {
        name: service.name,
        port: service.port,
        url: String::new(),
    };
    Ok(CreateSandboxRequest {
        request_id,
        snapshot_id,
        size: Some(Size {
            cpu_cores: wanted.cpus,
            memory_mib: wanted.memory,
            disk_gib: wanted.disk,
        }),
        metadata: pairs(wanted.meta),
        env: pairs(wanted.env),
        network: network.into(),
        services: wanted.expose.into_iter().map(service).collect(),
        node: wanted.node.unwrap_or_default(),
        wait: None,
        lifetime: wanted.lifetime.wire(),
        size_preset: wanted.size,
        placement: wanted.labels.wire(),
    })
}

async fn only_snapshot(controller: &Controller) -> Result<String, Failure> {
    let known =
        answer(controller.sandboxes.clone().list_snapshots(ListSnapshotsRequest {})).await?;
    let ids: Vec<_> = known.snapshots.into_iter().map(|snapshot| snapshot.id).collect();
    match ids.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::local("no node has a snapshot to create from")
            .hint("name a template in `[[template]]` of an agent's configuration; `sandboxctl nodes` shows whether the agents answer")
            .exit(exit::NOT_FOUND)),
        several => Err(Failure::usage(
            format!("there are {} snapshots: {}", several.len(), several.join(", ")),
            "choose one with --snapshot ID",
        )),
    }
}
