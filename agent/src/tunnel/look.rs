//! Sees the tunnel: this node's files, its unit and, with a token, what Cloudflare has. Changes nothing.

use std::net::SocketAddr;

use daemon::text;

use super::{
    api::{self, Api, model},
    credentials::{Credentials, is_open},
    ids::{CloudId, TunnelId},
    node::{self, Error, Paths, Problem, Ready, UnitState, Version},
    record,
    render::{Origin, render},
    settings::Settings,
};

/// Observations.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Settings of this node's connector.
    pub settings: Settings,
    /// Domain of the agent's configuration; `None` where it has none.
    pub domain: Option<String>,
    /// cloudflared's configuration on the disk.
    pub file: Written,
    /// Whether the connector that runs was started with the wanted one; `None` where that is not known.
    pub runs_wanted: Option<bool>,
    /// Problem that the agent has left; `None` where all went well.
    pub problem: Option<Problem>,
    /// File of the secret.
    pub credentials: Secrets,
    /// Version of cloudflared; `None` where there is none.
    pub version: Option<Version>,
    /// State of the unit; `None` where it cannot be asked.
    pub unit: Option<UnitState>,
    /// Answer of the connector; `None` where nothing answers.
    pub ready: Option<Ready>,
    /// Time, milliseconds since 1970.
    pub now_ms: u64,
    /// State at Cloudflare, or why it was not told; `None` without a token.
    pub cloud: Option<Result<Cloud, String>>,
}

/// State of a file that is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// None is there.
    Missing,
    /// The file has the wanted text.
    Current,
    /// The file has another.
    Other,
}

/// State of the file of the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secrets {
    /// The file is missing or is no such file.
    Missing,
    /// The file is another tunnel's.
    Other,
    /// Others than root can read it.
    Open,
    /// Nothing is wrong.
    Private,
}

/// State at Cloudflare.
#[derive(Debug, Clone)]
pub struct Cloud {
    /// Tunnel of this name.
    pub tunnel: Option<model::Tunnel>,
    /// Its connectors.
    pub connectors: Vec<model::Connector>,
    /// Records of each name that leads to the tunnel.
    pub records: Vec<(String, Vec<model::Record>)>,
    /// Names by which other nodes publish the controller, and for which this node has no rule.
    pub without_rule: Vec<String>,
}

/// Sees everything; `None` where no tunnel was set up.
///
/// # Errors
/// When the settings cannot be read.
pub async fn look(
    paths: &Paths,
    origin: Option<&Origin>,
    api: Option<&Api>,
    now_ms: u64,
) -> Result<Option<Facts>, Error> {
    let Some(settings) = node::settings(paths)? else { return Ok(None) };
    let wanted = origin.map(|origin| render(&settings, origin));
    let file = text::read_if_there(&paths.config()).ok().flatten();
    let file = match (file, &wanted) {
        (None, _) => Written::Missing,
        (Some(file), Some(wanted)) if file == *wanted => Written::Current,
        (Some(_), _) => Written::Other,
    };
    let running = paths.running_config();
    let cloud = async {
        match api {
            Some(api) => Some(cloud(api, &settings).await.map_err(|error| chain(&error))),
            None => None,
        }
    };
    let (unit, ready, version, cloud) = tokio::join!(
        node::unit_state(paths),
        node::ready(settings.metrics),
        node::version(paths),
        cloud,
    );
    Ok(Some(Facts {
        domain: origin.map(|origin| origin.domain.to_string()),
        file,
        // Without a domain the agent does not look after the connector: what it has left is old.
        problem: origin.and_then(|_| Problem::read(paths)),
        runs_wanted: running.map(|running| wanted.as_ref() == Some(&running)),
        credentials: secrets(paths, &settings),
        version: version.ok(),
        unit,
        ready,
        now_ms,
        cloud,
        settings,
    }))
}

fn chain(error: &api::Error) -> String {
    daemon::chain::Chain(error).to_string()
}

fn secrets(paths: &Paths, settings: &Settings) -> Secrets {
    let path = paths.credentials();
    let Some(credentials) = Credentials::read(&path) else { return Secrets::Missing };
    match credentials.tunnel == settings.tunnel {
        false => Secrets::Other,
        true if is_open(&path).unwrap_or(true) => Secrets::Open,
        true => Secrets::Private,
    }
}

/// Names whose records lead to the tunnel.
pub(super) fn names(settings: &Settings) -> Vec<String> {
    let controller = settings.controller.iter().map(|controller| controller.host.to_string());
    [settings.domain.wildcard()].into_iter().chain(controller).collect()
}

async fn cloud(api: &Api, settings: &Settings) -> Result<Cloud, api::Error> {
    let Settings { account, zone, name, .. } = settings;
    api.know_account(account);
    let tunnel = api.tunnel(account, name).await?;
    let connectors = match &tunnel {
        Some(tunnel) => api.connectors(account, &tunnel.id).await?,
        None => Vec::new(),
    };
    let (mut records, names) = (Vec::new(), names(settings));
    let leading = api.records_to(zone, &settings.tunnel).await?;
    let of_controller =
        leading.iter().filter(|one| record::is_of_controller(one, &settings.tunnel));
    let without_rule = of_controller.map(|one| one.name.clone());
    let without_rule = without_rule.filter(|name| !names.contains(name)).collect();
    for name in names {
        let found = api.records(zone, &name).await?;
        records.push((name, found));
    }
    Ok(Cloud { tunnel, connectors, records, without_rule })
}

/// Lists the connectors of a tunnel but for this node's, which tells its name at `metrics`.
///
/// # Errors
/// When a call fails.
pub(super) async fn other_connectors(
    api: &Api,
    account: &CloudId,
    tunnel: &TunnelId,
    metrics: SocketAddr,
) -> Result<Vec<model::Connector>, api::Error> {
    let own = node::ready(metrics).await.map(|ready| ready.connector);
    let mut connectors = api.connectors(account, tunnel).await?;
    connectors.retain(|one| Some(&one.id) != own.as_ref());
    Ok(connectors)
}
