//! `tunnel teardown`: takes this node out of the tunnel; with `everything` also removes the DNS records and the
//! tunnel, and what earlier setups of this node have left. Only what carries our mark is removed at Cloudflare.

use std::{net::SocketAddr, time::Duration};

use daemon::chain::Chain;
use tokio::time::sleep;

use super::{
    UNIT,
    api::{self, Api, model::Connector},
    ids::{CloudId, TunnelId},
    look,
    node::{self, Node},
    record,
    settings::{Footprint, Hostname, METRICS, is_ours, name_of},
    setup::{
        self,
        place::{self, Known},
    },
    teller::{Say, Teller},
};

/// Times that a tunnel with connections is tried again: Cloudflare notices a connector's end some seconds late.
const TRIES: usize = 5;
/// Wait before the next try.
const PAUSE: Duration = Duration::from_secs(2);

/// Operator's request to `teardown`.
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
        "other nodes are connected to the tunnel {0}: run `pve-sandbox-agent tunnel teardown` on them first, or use \
         --force, which cuts them off"
    )]
    Connected(String),
    /// An earlier setup's tunnel or records cannot be removed. Those of the other setups were tried.
    #[error(
        "not all of {place}, of an earlier setup, is removed: {source}; `tunnel teardown` without --everything removes \
         this node's files all the same"
    )]
    Earlier {
        /// Tunnel and zone, for people.
        place: String,
        /// Reason.
        source: Box<Error>,
    },
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
    say: Say<'_>,
) -> Result<(), Error> {
    let mut teller = Teller::new(say, order.dry_run);
    let own = node::settings(node.paths())?;
    if own.is_none() {
        teller.line("this node is no connector of a tunnel");
    }
    let metrics = own.as_ref().map_or(METRICS, |settings| settings.metrics);
    // That of now first: an earlier one that cannot be removed does not keep it from being so.
    let footprints: Vec<Footprint> = match (&cloud, &own) {
        (Some(cloud), Some(settings)) => {
            cloud.api.know_account(&settings.account);
            [settings.footprint()].into_iter().chain(settings.earlier.iter().cloned()).collect()
        }
        (Some(cloud), None) => find(cloud, &mut teller).await?.into_iter().collect(),
        (None, _) => Vec::new(),
    };
    if let (Some(cloud), Some(first)) = (&cloud, footprints.first()) {
        others(order, cloud.api, first, metrics).await?;
    }
    let state = node::unit_state(node.paths()).await.unwrap_or_default();
    if (state.is_up() || state.is_enabled) && teller.makes(&format!("stop and disable {UNIT}")) {
        node.systemctl(&["disable", "--now", "--quiet", UNIT]).await?;
    }
    let stay = match (&cloud, &own) {
        (Some(cloud), _) => {
            at_cloudflare(order, cloud.api, &footprints, metrics, &mut teller).await?
        }
        (None, settings) => {
            for earlier in settings.iter().flat_map(|settings| &settings.earlier) {
                teller.note(&format!(
                    "an earlier setup had {earlier}: they stay, and after this call no command finds them; delete them \
                     in Cloudflare's dashboard, if nobody needs them (--everything in place of this call removes them)"
                ));
            }
            Vec::new()
        }
    };
    if node.paths().dir.exists() && teller.makes(&format!("remove {}", node.paths().dir.display()))
    {
        node::remove_files(node.paths())?;
    }
    for name in stay {
        teller.note(&format!(
            "the tunnel {name} stays: its name is not one that pve-sandbox gives; delete it in Cloudflare's dashboard, \
             if nobody needs it"
        ));
    }
    Ok(())
}

/// Removes the records and tunnels; returns the names of tunnels that stay. That nobody is cut off from the first one
/// is known already. An earlier one that fails does not keep the others; the first such error is returned at the end.
async fn at_cloudflare<'a>(
    order: Order,
    api: &Api,
    footprints: &'a [Footprint],
    metrics: SocketAddr,
    teller: &mut Teller<'_>,
) -> Result<Vec<&'a str>, Error> {
    let Some((now, earlier)) = footprints.split_first() else { return Ok(Vec::new()) };
    let mut stay: Vec<&str> = Vec::new();
    if !remove(api, now, true, teller).await? {
        stay.push(&now.name);
    }
    let mut seen: Vec<&TunnelId> = vec![&now.tunnel];
    let mut failed: Option<Error> = None;
    for footprint in earlier {
        teller.note(&format!("an earlier setup of this node had {footprint}"));
        // One tunnel can have records in several zones.
        let is_new = !seen.contains(&&footprint.tunnel);
        match remove_earlier(order, api, footprint, metrics, is_new, teller).await {
            Ok(is_gone) => {
                seen.push(&footprint.tunnel);
                if !is_gone {
                    stay.push(&footprint.name);
                }
            }
            // An old zone can have left the account, or be none of the token's: the others go all the same.
            Err(error) if failed.is_some() => {
                teller.note(&format!("not all of {footprint} is removed: {}", Chain(&error)));
            }
            Err(error) => {
                let (place, source) = (footprint.to_string(), Box::new(error));
                failed = Some(Error::Earlier { place, source });
            }
        }
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(stay),
    }
}

/// Removes what an earlier setup has left, unless other nodes would be cut off; returns false where its tunnel stays.
async fn remove_earlier(
    order: Order,
    api: &Api,
    footprint: &Footprint,
    metrics: SocketAddr,
    is_new: bool,
    teller: &mut Teller<'_>,
) -> Result<bool, Error> {
    if is_new {
        others(order, api, footprint, metrics).await?;
    }
    remove(api, footprint, is_new, teller).await
}

/// Removes the records of one setup, and its tunnel where that was not looked at before; returns false where the tunnel
/// stays.
async fn remove(
    api: &Api,
    footprint: &Footprint,
    is_new: bool,
    teller: &mut Teller<'_>,
) -> Result<bool, Error> {
    records(api, footprint, teller).await?;
    if !is_new {
        return Ok(true);
    }
    tunnel(api, footprint, teller).await
}

/// Finds the tunnel that our record leads to, or else the one with the name that `setup` gives it. Says where there is
/// none.
async fn find(cloud: &CloudScope<'_>, teller: &mut Teller<'_>) -> Result<Option<Footprint>, Error> {
    let CloudScope { api, domain, zone, account } = *cloud;
    let domain = domain.ok_or(Error::NoDomain)?;
    let place = place::find(api, domain, Known { zone, account, before: None }).await?;
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
        teller.line(&format!(
            "nothing was found at Cloudflare: no record of ours for {}, and no tunnel of its name",
            domain.wildcard()
        ));
    }
    Ok(found.map(|(name, tunnel)| Footprint {
        name,
        tunnel,
        account,
        zone: place.zone,
        zone_name: place.zone_name,
        domain: domain.clone(),
    }))
}

/// Refuses to cut off other nodes.
async fn others(
    order: Order,
    api: &Api,
    footprint: &Footprint,
    metrics: SocketAddr,
) -> Result<(), Error> {
    let Footprint { name, account, tunnel, .. } = footprint;
    let others = look::other_connectors(api, account, tunnel, metrics).await?;
    if others.is_empty() || order.force {
        return Ok(());
    }
    let others: Vec<_> = others.iter().map(shown).collect();
    Err(Error::Connected(format!("{name} ({})", others.join(", "))))
}

fn shown(connector: &Connector) -> String {
    let from = connector.origin().map(|from| format!(" from {from}"));
    format!("{}{}", connector.id, from.unwrap_or_default())
}

/// Deletes our records of the tunnel, and names the others.
async fn records(api: &Api, footprint: &Footprint, teller: &mut Teller<'_>) -> Result<(), Error> {
    let Footprint { name, tunnel, zone, .. } = footprint;
    let found = match api.records_to(zone, tunnel).await {
        // The zone itself is gone.
        Err(error) if error.is_missing() => return Ok(()),
        found => found?,
    };
    for one in &found {
        if !record::is_removed(one, tunnel) {
            teller.note(&format!(
                "the DNS record {} leads to the tunnel {name}, and stays: it has no comment of pve-sandbox; without the \
                 tunnel it leads nowhere: delete it in Cloudflare's dashboard (DNS > Records), if nobody needs it",
                one.name
            ));
        } else if teller.makes(&format!("delete the DNS record: {}", record::shown(one))) {
            api.delete_record(zone, &one.id).await?;
        }
    }
    Ok(())
}

/// Deletes the tunnel. Returns false where it stays: a name that is not of ours was given by an operator, and the
/// tunnel may have been there before.
async fn tunnel(api: &Api, footprint: &Footprint, teller: &mut Teller<'_>) -> Result<bool, Error> {
    let Footprint { name, account, tunnel, .. } = footprint;
    if api.tunnel_of(account, tunnel).await?.is_none() {
        return Ok(true);
    }
    if !is_ours(name) {
        return Ok(false);
    }
    if !teller.makes(&format!("delete the tunnel {name} ({tunnel})")) {
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
