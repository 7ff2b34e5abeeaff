//! `tunnel setup`: makes or joins the tunnel, its DNS records, this node's files and its unit. What is right is left
//! alone, so it can be repeated; what is somebody else's is refused before anything is changed.

mod earlier;
pub(super) mod place;

use std::{io, net::SocketAddr, time::Duration};

use daemon::chain::Chain;
use proto::secret::Secret;

use super::{
    UNIT,
    api::{
        self, Api,
        model::{Cname, ConfigSource, Connector, Record, Tunnel, Zone},
    },
    credentials::{Credentials, fresh_secret},
    ids::{CloudId, TunnelId},
    judge::{UPGRADE, outdated},
    look,
    node::{self, Node, Ready},
    record::{self, Plan},
    render::{Origin, render},
    settings::{Address, Controller, Hostname, Settings},
    teller::{Say, Teller},
};
use place::{Known, Place};

/// Longest wait for the first connection to Cloudflare.
const CONNECT: Duration = Duration::from_secs(30);

/// Operator's request to `setup`.
#[derive(Debug, Clone)]
pub struct Order {
    /// Name of the tunnel.
    pub name: String,
    /// Zone; looked up where it is not given.
    pub zone: Option<CloudId>,
    /// Account; that of the zone where it is not given.
    pub account: Option<CloudId>,
    /// Controller to publish. Without one, that of an earlier call stays.
    pub controller: Option<Controller>,
    /// Address where cloudflared is to tell whether it is connected. That of an earlier call stays.
    pub metrics: SocketAddr,
    /// Whether records of somebody else are replaced.
    pub replace_record: bool,
    /// Whether changes are only told.
    pub dry_run: bool,
    /// Whether the unit is started.
    pub start: bool,
    /// Time, milliseconds since 1970.
    pub now_ms: u64,
}

/// Outcome of `setup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// Number of changes.
    pub changes: usize,
    /// Connections to Cloudflare; `None` where the connector was not started or did not connect in time.
    pub ready: Option<Ready>,
    /// Whether the connector should be connected now.
    pub is_started: bool,
}

/// Reason why nothing more was changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call of Cloudflare's API failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// A step on this node failed.
    #[error(transparent)]
    Node(#[from] node::Error),
    /// A secret cannot be made or read.
    #[error("the secret of the tunnel cannot be used")]
    Secret(#[source] io::Error),
    /// No zone is found.
    #[error(
        "the API token sees no zone of {0}: add the domain to Cloudflare, or give the token the permission {perm} for \
         it; or give --zone-id and --account-id",
        perm = api::Permission::ZoneRead
    )]
    NoZone(Hostname),
    /// Several zones have the name, and none is better than the others.
    #[error(
        "the API token sees several zones of this name, and nothing says which one is meant ({}): repeat this with \
         --zone-id and the id of one, or with --account-id",
        zones(.0)
    )]
    SeveralZones(Vec<Zone>),
    /// The zone is another domain's.
    #[error(
        "the zone that was given is {zone}, and {domain} is not in it: leave --zone-id and CF_ZONE_ID out, or give another"
    )]
    OtherZone {
        /// Name of the zone.
        zone: String,
        /// Domain.
        domain: Hostname,
    },
    /// The account that was given is not the zone's.
    #[error(
        "the account that was given is {given}, and the zone {zone} belongs to {account}, so its records cannot lead \
         to a tunnel there: leave --account-id and CF_ACCOUNT_ID out, or give --zone-id of a zone of that account"
    )]
    OtherAccount {
        /// Name of the zone.
        zone: String,
        /// Account that was given.
        given: CloudId,
        /// Account of the zone.
        account: CloudId,
    },
    /// A name leads to another tunnel that works.
    #[error(
        "{name} leads to the tunnel {tunnel}, and {connectors} connectors of other nodes are connected to that: to \
         join it, repeat this with --name {tunnel}; to lead the name to another tunnel, with --replace-record"
    )]
    InUse {
        /// Name of the record.
        name: String,
        /// Name of the other tunnel.
        tunnel: String,
        /// Its connectors.
        connectors: usize,
    },
    /// Another node publishes the controller, and this one would not.
    #[error(
        "{0} leads to this tunnel: another node publishes the controller there, and each node of the tunnel needs the \
         same rule; repeat this with --controller-host {0} --controller-address HOST:PORT, or delete the DNS record \
         of {0}, if nobody needs it"
    )]
    Unpublished(String),
    /// The tunnel is configured at Cloudflare.
    #[error(
        "the tunnel {0} is configured in Cloudflare's dashboard, so it would ignore this node's configuration: give \
         another --name, or delete it there"
    )]
    Remote(String),
    /// A name has records of somebody else.
    #[error(
        "{}: not made by pve-sandbox, so left alone; delete it in Cloudflare's dashboard (DNS > Records), or repeat \
         this with --replace-record, which replaces it",
        shown(.0)
    )]
    Taken(Vec<Record>),
    /// The host of the controller is in another zone.
    #[error(
        "the controller's public name {host} is not in the zone {zone}, so its record cannot be made there: repeat \
         this with a name in that zone, such as --controller-host api.{zone} --controller-address {address}"
    )]
    ControllerZone {
        /// Host.
        host: Hostname,
        /// Address of the controller.
        address: Address,
        /// Zone.
        zone: String,
    },
}

/// Most zones that an error lists.
const ZONES_SHOWN: usize = 10;

fn zones(zones: &[Zone]) -> String {
    let shown = zones.iter().take(ZONES_SHOWN).map(|zone| {
        let Zone { id, name, status, account, .. } = zone;
        format!("{id}: {name}, {status}, account {}", account.id)
    });
    shown.collect::<Vec<_>>().join("; ")
}

fn shown(records: &[Record]) -> String {
    records.iter().map(record::shown).collect::<Vec<_>>().join("; ")
}

/// Sets the tunnel up.
///
/// # Errors
/// When something is missing, somebody else's, or fails. A repeated call goes on where this one ended.
pub async fn run(
    order: &Order,
    origin: &Origin,
    api: &Api,
    node: &Node,
    say: Say<'_>,
) -> Result<Done, Error> {
    let mut teller = Teller::new(say, order.dry_run);
    let version = node::version(node.paths()).await?;
    match outdated(version, order.now_ms) {
        None => teller.fine(&format!("cloudflared {version}")),
        Some(why) => teller.note(&format!("cloudflared {version} is {why}; {UPGRADE}")),
    }
    let before = node::settings(node.paths())?;
    let known = Known {
        zone: order.zone.as_ref(),
        account: order.account.as_ref(),
        before: before.as_ref().map(|before| &before.zone),
    };
    let place = place::find(api, &origin.domain, known).await?;
    let kept = before.as_ref().and_then(|before| before.controller.clone());
    let controller = order.controller.clone().or(kept);
    remarks(&place, controller.as_ref(), &mut teller)?;

    // All that is somebody else's is refused before the first change.
    let tunnel = api.tunnel(&place.account, &order.name).await?;
    if let Some(tunnel) = &tunnel {
        refuse_remote(tunnel)?;
        if controller.is_none() {
            refuse_unpublished(tunnel, &place, api).await?;
        }
    }
    let metrics = before.as_ref().map_or(order.metrics, |before| before.metrics);
    let hosts = hosts(&origin.domain, controller.as_ref());
    let mut plans = Vec::new();
    for host in &hosts {
        let existing = api.records(&place.zone, host).await?;
        let own = tunnel.as_ref().map(|tunnel| &tunnel.id);
        let plan = record::plan(&existing, own, order.replace_record);
        match &plan {
            Plan::Refuse(records) => return Err(Error::Taken(records.clone())),
            Plan::Replace(old) if !order.replace_record => {
                let target = record::tunnel_of(old).filter(|target| Some(target) != own);
                if let Some(target) = target {
                    refuse_in_use(host, &target, &place, api, metrics).await?;
                }
            }
            Plan::Keep | Plan::Create | Plan::Replace(_) | Plan::Evict(_) => {}
        }
        plans.push((host, plan));
    }

    let made = make_tunnel(order, &place, api, tunnel, &mut teller).await?;
    let wanted = made.as_ref().map(|(tunnel, _)| tunnel);
    for (host, plan) in plans {
        make_record(host, plan, wanted, order, &place, api, &mut teller).await?;
    }
    let now =
        earlier::Now { tunnel: wanted.map(|tunnel| &tunnel.id), zone: &place.zone, names: &hosts };
    let earlier = earlier::tell(before.as_ref(), &now, api, &mut teller).await;
    let Some((tunnel, credentials)) = made else {
        teller.makes(&format!("write the files in {}", node.paths().dir.display()));
        teller.makes(&format!("enable and start {UNIT}"));
        return Ok(Done { changes: teller.changes, ready: None, is_started: false });
    };
    let settings = Settings {
        name: order.name.clone(),
        tunnel: tunnel.id,
        account: place.account,
        zone: place.zone,
        zone_name: place.zone_name,
        domain: origin.domain.clone(),
        controller,
        metrics,
        earlier,
    };
    let is_new = files(&settings, before.as_ref(), &credentials, origin, node, &mut teller).await?;
    let done = start(&settings, is_new, order, node, &mut teller).await?;
    if order.controller.is_some() {
        tell_other_nodes(&settings, api, &mut teller).await;
    }
    Ok(done)
}

/// Tells what will not work, and refuses a controller that is elsewhere.
fn remarks(
    place: &Place,
    controller: Option<&Controller>,
    teller: &mut Teller<'_>,
) -> Result<(), Error> {
    place.notes.iter().for_each(|note| teller.note(note));
    if let (Some(controller), Some(zone)) = (controller, &place.zone_name) {
        let host = &controller.host;
        if !host.is_in(zone) {
            let (address, zone) = (controller.address.clone(), zone.clone());
            return Err(Error::ControllerZone { host: host.clone(), address, zone });
        }
        let depth = |name: &str| name.split('.').count();
        if depth(host.as_str()) > depth(zone) + 1 {
            teller.note(&place::certificate(host.as_str(), zone));
        }
    }
    Ok(())
}

fn hosts(domain: &Hostname, controller: Option<&Controller>) -> Vec<String> {
    let of_controller = controller.map(|controller| controller.host.to_string());
    [domain.wildcard()].into_iter().chain(of_controller).collect()
}

/// Refuses a tunnel that is configured at Cloudflare.
fn refuse_remote(tunnel: &Tunnel) -> Result<(), Error> {
    match tunnel.config_src {
        Some(ConfigSource::Local) | None => Ok(()),
        Some(ConfigSource::Cloudflare | ConfigSource::Unknown) => {
            Err(Error::Remote(tunnel.name.clone()))
        }
    }
}

/// Refuses a node that would answer 404 where the others of the tunnel lead to the controller.
async fn refuse_unpublished(tunnel: &Tunnel, place: &Place, api: &Api) -> Result<(), Error> {
    let records = api.records_to(&place.zone, &tunnel.id).await?;
    match records.into_iter().find(|one| record::is_of_controller(one, &tunnel.id)) {
        Some(record) => Err(Error::Unpublished(record.name)),
        None => Ok(()),
    }
}

/// Refuses to take a name from another tunnel that other nodes are connected to.
async fn refuse_in_use(
    name: &str,
    target: &TunnelId,
    place: &Place,
    api: &Api,
    metrics: SocketAddr,
) -> Result<(), Error> {
    let Some(tunnel) = api.tunnel_of(&place.account, target).await? else { return Ok(()) };
    let others = look::other_connectors(api, &place.account, target, metrics).await?;
    if others.is_empty() {
        return Ok(());
    }
    Err(Error::InUse { name: name.to_owned(), tunnel: tunnel.name, connectors: others.len() })
}

/// Says that each other node of the tunnel needs the rule of the controller, too.
async fn tell_other_nodes(settings: &Settings, api: &Api, teller: &mut Teller<'_>) {
    let Settings { account, tunnel, metrics, .. } = settings;
    let connected = match look::other_connectors(api, account, tunnel, *metrics).await {
        Ok(others) => {
            let mut from: Vec<_> = others.iter().filter_map(Connector::origin).collect();
            from.sort_unstable();
            from.dedup();
            match from.is_empty() {
                true => String::new(),
                false => format!(" (connected now: {})", from.join(", ")),
            }
        }
        Err(error) => format!(" (which are connected is not known: {})", Chain(&error)),
    };
    teller.note(&format!(
        "run this command on each other node of the tunnel, too{connected}: a node without this rule answers the \
         controller's name with 404"
    ));
}

/// Makes the tunnel, or takes the one that is there; returns it with its secret. `None` in a dry run where it
/// is still to be made.
async fn make_tunnel(
    order: &Order,
    place: &Place,
    api: &Api,
    there: Option<Tunnel>,
    teller: &mut Teller<'_>,
) -> Result<Option<(Tunnel, Credentials)>, Error> {
    let name = &order.name;
    let tunnel = match there {
        Some(tunnel) => {
            teller.fine(&format!("tunnel {name} ({}) is there", tunnel.id));
            tunnel
        }
        None => {
            if !teller.makes(&format!("make the tunnel {name}")) {
                return Ok(None);
            }
            let secret = fresh_secret().map_err(Error::Secret)?;
            match api.create_tunnel(&place.account, name, &secret).await {
                Ok(tunnel) => {
                    let account = place.account.clone();
                    let credentials = Credentials { account, secret, tunnel: tunnel.id.clone() };
                    return Ok(Some((tunnel, credentials)));
                }
                // Another node was faster.
                Err(error) if error.is_name_taken() => {
                    let found = api.tunnel(&place.account, name).await?;
                    let tunnel = found.ok_or(error)?;
                    refuse_remote(&tunnel)?;
                    teller.fine(&format!("tunnel {name} ({}) was made by another node", tunnel.id));
                    tunnel
                }
                Err(error) => return Err(error.into()),
            }
        }
    };
    let token: Secret<String> = api.tunnel_token(&place.account, &tunnel.id).await?;
    let credentials = Credentials::from_token(&token).map_err(Error::Secret)?;
    Ok(Some((tunnel, credentials)))
}

/// Makes the record of a name right.
async fn make_record(
    host: &str,
    plan: Plan,
    tunnel: Option<&Tunnel>,
    order: &Order,
    place: &Place,
    api: &Api,
    teller: &mut Teller<'_>,
) -> Result<(), Error> {
    let target = tunnel.map_or_else(|| "the tunnel".to_owned(), |tunnel| tunnel.id.target());
    let evicted = match plan {
        Plan::Keep => {
            teller.fine(&format!("DNS record {host} leads to {target}"));
            return Ok(());
        }
        Plan::Refuse(records) => return Err(Error::Taken(records)),
        Plan::Create => Vec::new(),
        Plan::Replace(old) => {
            let does =
                teller.makes(&format!("lead {host} to {target}; now {}", record::shown(&old)));
            if let (true, Some(tunnel)) = (does, tunnel) {
                let wanted = record::wanted(host, &tunnel.id, &order.name);
                api.replace_record(&place.zone, &old.id, &wanted).await?;
            }
            return Ok(());
        }
        Plan::Evict(others) => others,
    };
    for old in evicted {
        if teller.makes(&format!("delete the DNS record: {}", record::shown(&old))) {
            api.delete_record(&place.zone, &old.id).await?;
        }
    }
    let does = teller.makes(&format!("make the DNS record {host} CNAME {target}, proxied"));
    if let (true, Some(tunnel)) = (does, tunnel) {
        create(&record::wanted(host, &tunnel.id, &order.name), tunnel, place, api).await?;
    }
    Ok(())
}

/// Makes a record. One that another node has made in between is as good.
async fn create(wanted: &Cname, tunnel: &Tunnel, place: &Place, api: &Api) -> Result<(), Error> {
    match api.create_record(&place.zone, wanted).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_record_taken() => {
            let existing = api.records(&place.zone, &wanted.name).await?;
            match record::plan(&existing, Some(&tunnel.id), false) {
                Plan::Keep => Ok(()),
                Plan::Create => Err(error.into()),
                Plan::Replace(other) => Err(Error::Taken(vec![other])),
                Plan::Evict(others) | Plan::Refuse(others) => Err(Error::Taken(others)),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes what differs of this node's files; returns true when cloudflared must read them anew.
async fn files(
    settings: &Settings,
    before: Option<&Settings>,
    credentials: &Credentials,
    origin: &Origin,
    node: &Node,
    teller: &mut Teller<'_>,
) -> Result<bool, Error> {
    let paths = node.paths();
    let file = |path: &std::path::Path, error| node::Error::File(path.to_owned(), error);
    if !teller.dry_run {
        node.make_dir()?;
    }
    let mut is_new = false;
    let path = paths.credentials();
    if Credentials::read(&path).as_ref() == Some(credentials) {
        teller.fine(&format!("{} has the tunnel's secret", path.display()));
    } else if teller.makes(&format!("write {}", path.display())) {
        credentials.write(&path).map_err(|error| file(&path, error))?;
        is_new = true;
    }
    let (path, wanted) = (paths.config(), render(settings, origin));
    let there = daemon::text::read_if_there(&path).map_err(|error| file(&path, error))?;
    if there.as_ref() == Some(&wanted) {
        teller.fine(&format!("{} is right", path.display()));
    } else if teller.makes(&format!("write {}, checked by cloudflared", path.display())) {
        node.validate(&wanted).await?;
        node.write_config(&wanted)?;
        is_new = true;
    }
    // Last: from here on the agent looks after the files.
    let path = paths.settings();
    if before == Some(settings) {
        teller.fine(&format!("{} is right", path.display()));
    } else if teller.makes(&format!("write {}", path.display())) {
        settings.write(&path).map_err(|error| file(&path, error))?;
    }
    if !teller.dry_run {
        // One from before there were these files.
        node::leave_problem(paths, None)?;
    }
    let runs_other = paths.running_config().is_some_and(|running| running != wanted);
    Ok(is_new || runs_other || paths.runs_other_secret(credentials))
}

/// Starts the unit, or restarts it where its files are new, and waits for its first connection.
async fn start(
    settings: &Settings,
    is_new: bool,
    order: &Order,
    node: &Node,
    teller: &mut Teller<'_>,
) -> Result<Done, Error> {
    let none = |changes| Done { changes, ready: None, is_started: false };
    let state = node::unit_state(node.paths()).await;
    let Some(state) = state.filter(|_| order.start) else {
        teller.note(&format!(
            "nothing was started: systemctl enable {UNIT}; systemctl restart {UNIT}"
        ));
        if state.is_some_and(|state| state.is_enabled && !state.is_up()) {
            teller.note(&format!(
                "the agent starts {UNIT} within 30 s, since it is enabled: systemctl disable {UNIT} keeps it stopped"
            ));
        }
        return Ok(none(teller.changes));
    };
    if !state.is_enabled && teller.makes(&format!("enable {UNIT}")) {
        node.systemctl(&["enable", "--quiet", UNIT]).await?;
    }
    let what = match (state.is_active, is_new) {
        (true, false) => None,
        (true, true) => {
            Some(format!("restart {UNIT}: other nodes' connectors take over meanwhile"))
        }
        (false, _) => Some(format!("start {UNIT}")),
    };
    match what {
        None => teller.fine(&format!("{UNIT} runs")),
        // Not waited for: it is started when it has its first connection, which may take for ever.
        Some(what) => {
            if teller.makes(&what) {
                node.systemctl(&["restart", "--no-block", UNIT]).await?;
            }
        }
    }
    if teller.dry_run {
        return Ok(none(teller.changes));
    }
    let ready = node::until_ready(settings.metrics, CONNECT).await;
    if let Some(ready) = &ready {
        teller.fine(&format!("connected to Cloudflare: {} connections", ready.connections));
    }
    Ok(Done { changes: teller.changes, ready, is_started: true })
}
