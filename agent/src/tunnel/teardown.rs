//! `tunnel teardown`: takes this node out of the tunnel; with `everything` also removes the DNS records and the
//! tunnel. Only what carries our mark is removed at Cloudflare.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    UNIT,
    api::{self, Api, model::Connector},
    node::{self, Node},
    record,
    settings::{Hostname, METRICS, Settings, is_ours, name_of},
};

/// Times that a tunnel with connections is tried again: Cloudflare notices a connector's end some seconds late.
const TRIES: usize = 5;
/// Wait before the next try.
const PAUSE: Duration = Duration::from_secs(2);

/// Order of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Whether connectors of other nodes are cut off.
    pub force: bool,
    /// Whether changes are only told.
    pub dry_run: bool,
}

/// Reason why nothing more was removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call of Cloudflare's API failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// A step on this node failed.
    #[error(transparent)]
    Node(#[from] node::Error),
    /// Other nodes are connected.
    #[error(
        "other nodes are connected to this tunnel ({0}): run `pve-sandbox-agent tunnel teardown` on them first, or use \
         --force, which cuts them off"
    )]
    Connected(String),
}

/// Removes. `cloud` is there where everything is to go: the API, and the domain by which the tunnel is found on a
/// node that has left it already.
///
/// # Errors
/// When other nodes are connected, or something fails. A repeated call goes on where this one ended.
pub async fn run(
    order: Order,
    cloud: Option<(&Api, &Hostname)>,
    node: &Node,
    say: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let own = node::settings(node.paths())?;
    if own.is_none() {
        say("this node is no connector of a tunnel");
    }
    let cloud = match (cloud, own) {
        (Some((api, _)), Some(settings)) => Some((api, settings)),
        (Some((api, domain)), None) => find(api, domain).await?.map(|found| (api, found)),
        (None, _) => None,
    };
    if let Some((api, settings)) = &cloud {
        others(order, api, settings).await?;
    }
    let mut removes = |what: &str| {
        say(&format!("{} {what}", if order.dry_run { "would " } else { "change" }));
        !order.dry_run
    };
    let state = node::unit_state(node.paths()).await.unwrap_or_default();
    if (state.is_active || state.is_enabled) && removes(&format!("stop and disable {UNIT}")) {
        node.systemctl(&["disable", "--now", "--quiet", UNIT]).await?;
    }
    if let Some((api, settings)) = &cloud {
        records(api, settings, &mut removes).await?;
        tunnel(api, settings, &mut removes).await?;
    }
    if node.paths().dir.exists() && removes(&format!("remove {}", node.paths().dir.display())) {
        node::remove_files(node.paths())?;
    }
    Ok(())
}

/// Finds the tunnel of a domain by the name that `setup` gives it.
async fn find(api: &Api, domain: &Hostname) -> Result<Option<Settings>, api::Error> {
    let Some(zone) = api.zone_of(domain).await? else { return Ok(None) };
    let name = name_of(domain);
    let found = api.tunnel(&zone.account.id, &name).await?;
    Ok(found.map(|tunnel| Settings {
        name,
        tunnel: tunnel.id,
        account: zone.account.id,
        zone: zone.id,
        zone_name: Some(zone.name),
        domain: domain.clone(),
        controller: None,
        metrics: METRICS,
    }))
}

/// Refuses to cut off other nodes.
async fn others(order: Order, api: &Api, settings: &Settings) -> Result<(), Error> {
    let own = node::ready(settings.metrics).await.map(|ready| ready.connector);
    let connectors = match api.connectors(&settings.account, &settings.tunnel).await {
        Err(error) if error.is_missing() => Vec::new(),
        found => found?,
    };
    let others: Vec<_> =
        connectors.iter().filter(|one| Some(&one.id) != own.as_ref()).map(shown).collect();
    if others.is_empty() || order.force { Ok(()) } else { Err(Error::Connected(others.join(", "))) }
}

fn shown(connector: &Connector) -> String {
    let from = connector.conns.first().map(|conn| format!(" from {}", conn.origin_ip));
    format!("{}{}", connector.id, from.unwrap_or_default())
}

async fn records(
    api: &Api,
    settings: &Settings,
    removes: &mut dyn FnMut(&str) -> bool,
) -> Result<(), Error> {
    let found = api.records_to(&settings.zone, &settings.tunnel).await?;
    for one in found.iter().filter(|one| record::is_removed(one, &settings.tunnel)) {
        if removes(&format!("delete the DNS record: {}", record::shown(one))) {
            api.delete_record(&settings.zone, &one.id).await?;
        }
    }
    Ok(())
}

async fn tunnel(
    api: &Api,
    settings: &Settings,
    removes: &mut dyn FnMut(&str) -> bool,
) -> Result<(), Error> {
    let Settings { name, account, tunnel, .. } = settings;
    let found = api.tunnel(account, name).await?;
    let is_there = found.is_some_and(|found| found.id == *tunnel);
    // A name that is not of ours was given by an operator: the tunnel may have been there before.
    if !is_there || !is_ours(name) || !removes(&format!("delete the tunnel {name} ({tunnel})")) {
        return Ok(());
    }
    for left in (0..TRIES).rev() {
        api.disconnect(account, tunnel).await?;
        match api.delete_tunnel(account, tunnel).await {
            Err(error) if error.is_missing() => return Ok(()),
            Err(error) if error.is_still_connected() && left > 0 => sleep(PAUSE).await,
            done => return Ok(done?),
        }
    }
    Ok(())
}
