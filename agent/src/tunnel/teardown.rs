//! `tunnel teardown`: takes this node out of the tunnel; with `everything` also removes the DNS records and the
//! tunnel. Only what carries our mark is removed at Cloudflare.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    UNIT,
    api::{self, Api, model::Connector},
    ids::CloudId,
    look,
    node::{self, Node},
    record,
    settings::{Hostname, METRICS, Settings, is_ours, name_of},
    setup::{self, place},
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
    /// Zone or account are not found.
    #[error(transparent)]
    Place(#[from] setup::Error),
    /// Nothing says which tunnel it is.
    #[error(
        "no tunnel is set up on this node, and agent.toml has no ingress.domain: nothing says which tunnel is to go; \
         set domain below [ingress], or run this on a node of the tunnel"
    )]
    NoDomain,
    /// Other nodes are connected.
    #[error(
        "other nodes are connected to this tunnel ({0}): run `pve-sandbox-agent tunnel teardown` on them first, or use \
         --force, which cuts them off"
    )]
    Connected(String),
}

/// Cloudflare, and what the tunnel is found by on a node that has left it already.
#[derive(Debug, Clone, Copy)]
pub struct CloudScope<'a> {
    /// API.
    pub api: &'a Api,
    /// Domain of the sandboxes.
    pub domain: Option<&'a Hostname>,
    /// Zone; looked up where it is not given.
    pub zone: Option<&'a CloudId>,
    /// Account; that of the zone where it is not given.
    pub account: Option<&'a CloudId>,
}

/// Removes. `cloud` is there where everything is to go.
///
/// # Errors
/// When other nodes are connected, or something fails. A repeated call goes on where this one ended.
pub async fn run(
    order: Order,
    cloud: Option<CloudScope<'_>>,
    node: &Node,
    say: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let own = node::settings(node.paths())?;
    if own.is_none() {
        say("this node is no connector of a tunnel");
    }
    let cloud = match (cloud, own) {
        (Some(cloud), Some(settings)) => {
            cloud.api.know_account(&settings.account);
            Some((cloud.api, settings))
        }
        (Some(cloud), None) => {
            let found = find(&cloud, say).await?;
            found.map(|found| (cloud.api, found))
        }
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
    let mut stays = None;
    if let Some((api, settings)) = &cloud {
        records(api, settings, &mut removes).await?;
        if !tunnel(api, settings, &mut removes).await? {
            stays = Some(&settings.name);
        }
    }
    if node.paths().dir.exists() && removes(&format!("remove {}", node.paths().dir.display())) {
        node::remove_files(node.paths())?;
    }
    if let Some(name) = stays {
        say(&format!(
            "note   the tunnel {name} stays: its name is not one that pve-sandbox gives; delete it in Cloudflare's \
             dashboard, if nobody needs it"
        ));
    }
    Ok(())
}

/// Finds the tunnel that our record leads to, or else the one with the name that `setup` gives it. Says where there is
/// none.
async fn find(
    cloud: &CloudScope<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<Option<Settings>, Error> {
    let CloudScope { api, domain, zone, account } = *cloud;
    let domain = domain.ok_or(Error::NoDomain)?;
    let place = place::find(api, domain, zone, account).await?;
    let (account, usual) = (place.account, name_of(domain));
    let records = api.records(&place.zone, &domain.wildcard()).await?;
    let target = records.iter().filter(|one| record::is_ours(one)).find_map(record::tunnel_of);
    let found = match target {
        // The record is to go, too, where its tunnel is gone already.
        Some(id) => {
            let tunnel = api.tunnel_of(&account, &id).await?;
            Some((tunnel.map_or(usual, |tunnel| tunnel.name), id))
        }
        None => api.tunnel(&account, &usual).await?.map(|tunnel| (usual, tunnel.id)),
    };
    if found.is_none() {
        say(&format!(
            "nothing was found at Cloudflare: no record of ours for {}, and no tunnel of its name",
            domain.wildcard()
        ));
    }
    Ok(found.map(|(name, tunnel)| Settings {
        name,
        tunnel,
        account,
        zone: place.zone,
        zone_name: place.zone_name,
        domain: domain.clone(),
        controller: None,
        metrics: METRICS,
    }))
}

/// Refuses to cut off other nodes.
async fn others(order: Order, api: &Api, settings: &Settings) -> Result<(), Error> {
    let Settings { account, tunnel, metrics, .. } = settings;
    let others = look::other_connectors(api, account, tunnel, *metrics).await?;
    let others: Vec<_> = others.iter().map(shown).collect();
    if others.is_empty() || order.force { Ok(()) } else { Err(Error::Connected(others.join(", "))) }
}

fn shown(connector: &Connector) -> String {
    let from = connector.origin().map(|from| format!(" from {from}"));
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

/// Deletes the tunnel. Returns false where it stays: a name that is not of ours was given by an operator, and the
/// tunnel may have been there before.
async fn tunnel(
    api: &Api,
    settings: &Settings,
    removes: &mut dyn FnMut(&str) -> bool,
) -> Result<bool, Error> {
    let Settings { name, account, tunnel, .. } = settings;
    if api.tunnel_of(account, tunnel).await?.is_none() {
        return Ok(true);
    }
    if !is_ours(name) {
        return Ok(false);
    }
    if !removes(&format!("delete the tunnel {name} ({tunnel})")) {
        return Ok(true);
    }
    for left in (0..TRIES).rev() {
        api.disconnect(account, tunnel).await?;
        match api.delete_tunnel(account, tunnel).await {
            Err(error) if error.is_missing() => return Ok(true),
            Err(error) if error.is_still_connected() && left > 0 => sleep(PAUSE).await,
            done => return Ok(done.map(|()| true)?),
        }
    }
    Ok(true)
}
