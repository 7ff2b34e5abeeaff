//! Translates the flags that describe a sandbox to a request of the API.

use std::str::FromStr;

use clap::Args;
use proto::{
    id::Invalid,
    sandbox::v1::{self as wire, CreateSandboxRequest, HttpService, NetworkMode, Placement, Size},
    spec::Egress,
    visibility::Visibility,
};

use super::{
    first_files::{self, FirstFile},
    lifetime::Lifetime,
    wake_on::switch,
};
use crate::{
    client::{self, Controller},
    exit,
    failure::Failure,
    sizes::{cores, disk, memory},
    values::{Pair, variable},
};

/// Environment variable that names the snapshot where no flag does.
const SNAPSHOT: &str = "SANDBOXCTL_SNAPSHOT";

/// Description of the sandbox to create.
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct Wanted {
    /// Name, unique among the living sandboxes of your team; wherever an ID is asked for, it will do
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// Snapshot to create from [default: $SANDBOXCTL_SNAPSHOT, or the only one there is]
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
    /// Cores [default: as the snapshot says]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = cores)]
    cpus: u32,
    /// Memory, such as 2g or 512m; a bare number is MiB [default: as the snapshot says]
    #[arg(long, value_name = "SIZE", default_value_t = 0, hide_default_value = true, value_parser = memory)]
    memory: u32,
    /// Root disk, at least so large, such as 20g; a bare number is GiB [default: as the snapshot says]
    #[arg(long, value_name = "SIZE", default_value_t = 0, hide_default_value = true, value_parser = disk)]
    disk: u32,
    /// Size by its name in the controller's configuration; --cpus, --memory and --disk win
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    size: String,
    /// Variable for every command in it, or K alone for its value here; may be given often
    #[arg(short, long, value_name = "K[=V]", value_parser = variable)]
    env: Vec<Pair>,
    /// Key and value of your own to find it by; may be given often
    #[arg(long, value_name = "K=V")]
    meta: Vec<Pair>,
    /// Port to open as soon as it runs: NAME=PORT, or PORT, with who reaches it (public, team, token or private) as
    /// in 8080:public; may be given often
    #[arg(long, value_name = "NAME=PORT[:WHO]")]
    expose: Vec<Service>,
    /// Leave the services closed that the snapshot exposes by default
    #[arg(long)]
    no_services: bool,
    /// Whether a port is exposed as soon as something listens on it [default: as the snapshot says]
    #[arg(long, value_name = "on|off", value_parser = switch)]
    expose_on_listen: Option<bool>,
    /// File that is in it from the start, with its permissions; may be given often, 1.5 MiB in all
    #[arg(long, value_name = "LOCAL:PATH")]
    file: Vec<FirstFile>,
    /// Node that it must be on
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Labels of its node.
    #[command(flatten)]
    labels: Labels,
    /// Ask a DHCP server on the node's bridge for the address
    #[arg(long)]
    dhcp: bool,
    #[arg(
        long,
        value_name = "open|none|allow=NAMES",
        help = "What it reaches outside: open, none or allow=NAME,NAME [default: as the controller says]"
    )]
    egress: Option<Egress>,
    /// How long it lives.
    #[command(flatten)]
    lifetime: Lifetime,
}

/// Labels of nodes that a creation cares for.
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct Labels {
    /// Only nodes with this label, such as gpu or zone=a; may be given often
    #[arg(long, value_name = "LABEL")]
    require: Vec<String>,
    /// No node with this label; may be given often
    #[arg(long, value_name = "LABEL")]
    forbid: Vec<String>,
    /// Rather a node with this label; may be given often
    #[arg(long, value_name = "LABEL")]
    prefer: Vec<String>,
    /// Rather a node without this label; may be given often
    #[arg(long, value_name = "LABEL")]
    avoid: Vec<String>,
}

impl Labels {
    /// Returns the labels as the API takes them; none when none was given.
    fn wire(self) -> Option<Placement> {
        let Self { require, forbid, prefer, avoid } = self;
        let placement = Placement { require, forbid, prefer, avoid };
        (placement != Placement::default()).then_some(placement)
    }
}

/// `NAME=PORT` or `PORT`, each with `:WHO` or without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Service {
    /// Empty: the controller names it after the port.
    name: String,
    /// Port inside the sandbox.
    port: u32,
    /// Visibility; `None`: as the controller says.
    visibility: Option<Visibility>,
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, port) = text.split_once('=').unwrap_or(("", text));
        let (port, who) = match port.split_once(':') {
            Some((port, who)) => (port, Some(who)),
            None => (port, None),
        };
        let visibility = who.map(str::parse).transpose();
        let visibility = visibility.map_err(|wrong: Invalid| wrong.to_string())?;
        let port = port.parse().ok().filter(|port| (1..=65535).contains(port));
        let port = port.ok_or("must be NAME=PORT or PORT, with a port of 1 to 65535")?;
        Ok(Self { name: name.to_owned(), port, visibility })
    }
}

/// Builds the request; without a named snapshot it uses that of the environment, or the only one.
pub(super) async fn request(
    controller: &Controller,
    wanted: Wanted,
    request_id: String,
) -> Result<CreateSandboxRequest, Failure> {
    let files = first_files::read(&wanted.file)?;
    // Not read by the parser: `explain ID` would take it for a flag that somebody gave.
    let set = || std::env::var_os(SNAPSHOT)?.into_string().ok().filter(|set| !set.is_empty());
    let snapshot_id = match wanted.snapshot.or_else(set) {
        Some(snapshot) => snapshot,
        None => only_snapshot(controller).await?,
    };
    let pairs =
        |pairs: Vec<Pair>| pairs.into_iter().map(|Pair { key, value }| (key, value)).collect();
    let network = if wanted.dhcp { NetworkMode::Dhcp } else { NetworkMode::Unspecified };
    let service = |service: Service| HttpService {
        name: service.name,
        port: service.port,
        visibility: service.visibility.map(wire::Visibility::from).unwrap_or_default().into(),
        ..HttpService::default()
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
        no_default_services: wanted.no_services,
        expose_on_listen: wanted.expose_on_listen,
        node: wanted.node.unwrap_or_default(),
        wait: None,
        lifetime: wanted.lifetime.wire(),
        size_preset: wanted.size,
        placement: wanted.labels.wire(),
        name: wanted.name.unwrap_or_default(),
        files,
        files_user: String::new(),
        egress: wanted.egress.as_ref().map(wire::Egress::from).unwrap_or_default().into(),
        egress_names: wanted.egress.as_ref().map(Egress::names).unwrap_or_default(),
    })
}

async fn only_snapshot(controller: &Controller) -> Result<String, Failure> {
    let known = client::snapshots(controller).await?;
    let ids: Vec<_> = known.into_iter().map(|snapshot| snapshot.id).collect();
    match ids.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::local("no node has a snapshot to create from")
            .hint("on a node: `pve-sandbox-agent template init`, then `systemctl restart pve-sandbox-agent`; `sandboxctl node ls` shows whether the agents answer")
            .exit(exit::NOT_FOUND)),
        several => Err(Failure::usage(
            format!("there are {} snapshots: {}", several.len(), several.join(", ")),
            "choose one with --snapshot ID, or set SANDBOXCTL_SNAPSHOT",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::parse, *};

    #[test]
    fn pairs_and_services_are_parsed() {
        let line = "--env A=b=c --expose web=8080 --expose 81:private";
        let wanted: Wanted = parse(line).expect(line);
        assert_eq!(wanted.env, [Pair { key: "A".into(), value: "b=c".into() }]);
        assert_eq!(wanted.expose[0], Service { name: "web".into(), port: 8080, visibility: None });
        let sized: Wanted = parse("--memory 2g --disk 20G --cpus 2").expect("sizes");
        assert_eq!((sized.memory, sized.disk, sized.cpus), (2048, 20, 2));
        assert_eq!(
            wanted.expose[1],
            Service { name: String::new(), port: 81, visibility: Some(Visibility::Private) }
        );
        assert!(parse::<Wanted>("--expose 81:everybody").is_err());
        assert_eq!((wanted.no_services, wanted.expose_on_listen), (false, None));
        let bare: Wanted = parse("--no-services --expose-on-listen off").expect("switches");
        assert_eq!((bare.no_services, bare.expose_on_listen), (true, Some(false)));
        assert!(parse::<Wanted>("--expose-on-listen maybe").is_err());
    }
}
