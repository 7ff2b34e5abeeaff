//! Drains nodes and makes them schedulable again.

use std::time::Duration;

use agent::journal::{Feed, Phase};
use proto::{
    Reason,
    name::NodeName,
    sandbox::v1::{
        DrainNodeRequest, UncordonNodeRequest, operator_service_client::OperatorServiceClient,
    },
};
use tonic::transport::Channel;

use crate::{calls::authorised, cluster::Cluster};

/// Drains a node and uncordons it after `pause`, whatever the results are; returns the number of
/// moved sandboxes.
pub(crate) fn drain(
    cluster: &Cluster,
    node: NodeName,
    pause: Duration,
) -> impl Future<Output = usize> + Send + use<> {
    let (channel, token) = (cluster.controller().channel(), cluster.token.clone());
    async move {
        let moved = ask(channel.clone(), &token, &node).await;
        tokio::time::sleep(pause).await;
        open(channel, &token, &node).await;
        moved
    }
}

/// Returns the node with the most stopped sandboxes.
pub(crate) async fn fullest(cluster: &Cluster) -> NodeName {
    let mut most = (0, &cluster.hosts[0].name);
    for host in &cluster.hosts {
        let records = host.journal.all().await.expect("a journal");
        let still = records.iter().filter(|record| record.phase == Phase::Stopped).count();
        most = most.max((still, &host.name));
    }
    most.1.clone()
}

/// Drains a node and returns the number of sandboxes that it reports as moved.
async fn ask(channel: Channel, token: &str, node: &NodeName) -> usize {
    let request = DrainNodeRequest { node: node.to_string(), why: String::new() };
    let drained = OperatorServiceClient::new(channel).drain_node(authorised(token, request)).await;
    drained.map_or(0, |drained| drained.into_inner().moved.len())
}

async fn open(channel: Channel, token: &str, node: &NodeName) {
    let request = UncordonNodeRequest { node: node.to_string() };
    drop(OperatorServiceClient::new(channel).uncordon_node(authorised(token, request)).await);
}

/// Finishes the drains as an operator would: moves under way arrive, and every node is schedulable.
pub(crate) async fn finish(cluster: &Cluster) {
    let (channel, token) = (cluster.controller().channel(), &cluster.token);
    for host in &cluster.hosts {
        let records = host.journal.all().await.expect("a journal");
        let mut living = records.iter().filter(|record| !record.phase.ended());
        let under_way = living.any(|record| match &record.failure {
            Some(why) => why.reason == Reason::ContainerGone || record.phase == Phase::Deleting,
            None => false,
        });
        if under_way {
            ask(channel.clone(), token, &host.name).await;
        }
        open(channel.clone(), token, &host.name).await;
    }
}
