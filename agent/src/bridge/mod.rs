//! Makes the sandboxes' own bridge on a bare node: `pve-sandbox-agent bridge init`.
//!
//! | file | what |
//! |---|---|
//! | `/etc/network/interfaces.d/pve-sandbox` | the bridge, for ifupdown2: no port, one address |
//! | `/etc/pve-sandbox/nat.nft` | its addresses leave by the node's own, loaded when the bridge comes up |
//! | `/etc/pve-sandbox/dns.conf` | the name server on that address, for `pve-sandbox-dns.service` |
//! | `agent.toml` | `network.bridge` |
//!
//! Nothing of another bridge is touched. Every step can be repeated.

mod render;

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use daemon::replace::{Access, replace};
use ipnet::Ipv4Net;
use proto::id::Vmid;
use toml_edit::{DocumentMut, Item, Table, value};

pub use render::NAT_TABLE;

use crate::{
    config::{File, Pool},
    detect::{self, Roots, Undecided},
    pve::{
        ContainerConfig,
        config_file::{Interface, Ip},
    },
};

/// Directory of our own files.
const ETC: &str = "/etc/pve-sandbox";
/// File with the configuration of the bridge's name server.
const DNS: &str = "dns.conf";
/// Most sandboxes that an error names.
const SHOWN_MAX: usize = 10;

/// Files that describe the network and the bridge. Below another root in tests.
#[derive(Debug, Clone)]
pub struct Paths {
    /// ifupdown2's own file, which must include those of `interfaces_d`.
    pub interfaces: PathBuf,
    /// Directory of further files of ifupdown2.
    pub interfaces_d: PathBuf,
    /// Directory for the rules and the name server's configuration.
    pub etc: PathBuf,
    /// The agent's configuration.
    pub config: PathBuf,
}

impl Paths {
    /// Paths on a PVE node.
    pub fn of_host(config: &Path) -> Self {
        Self {
            interfaces: "/etc/network/interfaces".into(),
            interfaces_d: "/etc/network/interfaces.d".into(),
            etc: ETC.into(),
            config: config.to_owned(),
        }
    }

    /// File of the bridge.
    pub fn bridge(&self) -> PathBuf {
        self.interfaces_d.join("pve-sandbox")
    }

    /// Rules of its way out.
    pub fn nat(&self) -> PathBuf {
        self.etc.join("nat.nft")
    }

    /// Configuration of its name server.
    pub fn dns(&self) -> PathBuf {
        self.etc.join(DNS)
    }
}

/// Returns the bridge that this command has made; `None` also when its file cannot be read.
pub fn made(paths: &Paths) -> Option<String> {
    render::name_in(&text(&paths.bridge()).ok()?)
}

/// Returns the address of the bridge that this command has made; `None` also when its file cannot be read.
pub fn made_address(paths: &Paths) -> Option<Ipv4Addr> {
    Some(render::address_in(&text(&paths.bridge()).ok()?)?.addr())
}

/// Says how the configuration comes to a bridge that can be used, in place of the one that it names. `made`: the one that
/// this command has made.
pub fn instead(made: Option<&str>, config: &Path) -> String {
    let config = config.display();
    match made {
        Some(made) => format!("set network.bridge = \"{made}\" in {config}"),
        None => format!(
            "take network.bridge out of {config}, or name a bridge of this node there; then: pve-sandbox-agent bridge init"
        ),
    }
}

/// Returns true when a bridge of this node has a name server.
pub fn has_name_server() -> bool {
    Path::new(ETC).join(DNS).exists()
}

/// A bridge of the sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Name of the interface, `vmbr1`.
    pub name: String,
    /// The node's address on it, with the prefix length.
    pub address: Ipv4Net,
}

/// Result of [`plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The configuration names a bridge that this command did not make, or sandboxes have used one: it
    /// stays.
    Named(String),
    /// This bridge is made, or completed.
    Make(Bridge),
}

/// Reason why no bridge can be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be read.
    #[error("the configuration was not read")]
    Config(#[from] daemon::config::Error),
    /// The configuration names a bridge that is not there, and that this command did not make.
    #[error("network.bridge is {name}, and this node has no such interface: {}", instead(.made.as_deref(), .config))]
    Missing {
        /// Name in the configuration.
        name: String,
        /// Name of the bridge that this command has made.
        made: Option<String>,
        /// File of the configuration.
        config: PathBuf,
    },
    /// The network that the operator names is in use.
    #[error("{0} overlaps with {1}, which {2} leads to: choose another with --subnet")]
    Used(Ipv4Net, Ipv4Net, String),
    /// The network of the pool is in use. The controller must know the pool, so only a join changes it.
    #[error(
        "{0} overlaps with {1}, which {2} leads to: choose another private network and join with --pool, or set \
         network.pool in agent.toml and join; a node that has joined already needs a new token for it"
    )]
    PoolUsed(Ipv4Net, Ipv4Net, String),
    /// The pool is elsewhere than the network that the operator names.
    #[error(
        "the addresses of the sandboxes (network.pool) are {0}, which are not in {1}: join with --pool {1}; a node \
         that has joined already needs a new token for it"
    )]
    PoolElsewhere(Pool, Ipv4Net),
    /// The pool is elsewhere than the network of a bridge that stays as it is.
    #[error(
        "the addresses of the sandboxes (network.pool) are {0}, which are not in {2}, the network of their bridge {1}: \
         join with --pool and a part of {2}, or name another bridge (network.bridge in agent.toml). For a bridge of their \
         own, without network.bridge in agent.toml: pve-sandbox-agent bridge init --subnet NETWORK"
    )]
    PoolOffBridge(Pool, String, Ipv4Net),
    /// Sandboxes are in the network that the bridge would lose.
    #[error(
        "with {address} the bridge {bridge} would cut off sandboxes of this node, which keep their address and their \
         gateway: {sandboxes}. Keep their network (without --pool and --subnet, and with network.pool in agent.toml as it \
         was), or first move or delete them: sandboxctl node drain NODE --wait, sandboxctl rm ID"
    )]
    CutsOff {
        /// Name of the bridge.
        bridge: String,
        /// Address that it would get.
        address: Ipv4Net,
        /// Numbers of the sandboxes' containers, the first few.
        sandboxes: String,
    },
    /// Nobody can tell which containers are this node's.
    #[error(
        "the bridge would get another network, and whether a sandbox is in the present one is not known now"
    )]
    Unknown(#[source] Undecided),
    /// The network is no network for sandboxes.
    #[error("{0} cannot be the sandboxes' network: it must be a private one of /8 to /29")]
    Unfit(Ipv4Net),
    /// The pool is a part of a network, which is then another bridge's.
    #[error(
        "the pool is no whole network: name the bridge that it belongs to (network.bridge in agent.toml)"
    )]
    PartOfNetwork,
    /// No network is known.
    #[error("the node's number in its cluster is not known now: name a network with --subnet")]
    NoNumber,
    /// ifupdown2 does not read the directory.
    #[error("{0} does not include {1}: add the line `source {1}/*` at its end")]
    NotIncluded(PathBuf, PathBuf),
    /// A file cannot be read or written.
    #[error("cannot use {0}")]
    File(PathBuf, #[source] io::Error),
}

/// Decides which bridge is made. Changes nothing.
///
/// # Errors
/// When the network is in use, or cannot be chosen.
pub fn plan(subnet: Option<Ipv4Net>, paths: &Paths, net: &Path) -> Result<Plan, Error> {
    decide(&read(paths)?, subnet, paths, net)
}

/// Checks that the bridge can be made that a node gets when it joins. `pool`: its addresses, if they are named; of
/// those that the controller gives, the likely ones are checked.
///
/// # Errors
/// When it cannot be made.
pub fn check(pool: Option<Pool>, paths: &Paths, net: &Path) -> Result<(), Error> {
    let mut config = read(paths)?;
    config.network.pool = pool.or(config.network.pool);
    let decided = match decide(&config, None, paths, net) {
        // The controller gives the first that is free.
        Err(Error::NoNumber) => {
            config.network.pool = numbered(1).map(Pool::of);
            decide(&config, None, paths, net)
        }
        decided => decided,
    };
    decided.map(drop)
}

fn read(paths: &Paths) -> Result<File, Error> {
    match paths.config.exists() {
        true => Ok(daemon::config::load(&paths.config)?),
        false => Ok(File::default()),
    }
}

fn decide(
    config: &File,
    subnet: Option<Ipv4Net>,
    paths: &Paths,
    net: &Path,
) -> Result<Plan, Error> {
    let roots = Roots { pve: &config.pve.root, proc: &config.pve.proc, net };
    let file = text(&paths.bridge())?;
    let made = render::name_in(&file);
    match (&config.network.bridge, &made) {
        (Some(named), Some(made)) if named == made => {}
        (Some(named), _) if !net.join(named).exists() => {
            let (name, config) = (named.clone(), paths.config.clone());
            return Err(Error::Missing { name, made: made.clone(), config });
        }
        (Some(named), _) => return keep(named.clone(), config, roots),
        // An agent has run here with the bridge that it found: its sandboxes stay where they are.
        (None, None) if subnet.is_none() && config.journal().exists() => {
            if let Ok(found) = detect::bridge(roots)
                && (may_have_used(&found, config, roots) || config.has_sandboxes())
            {
                return keep(found, config, roots);
            }
        }
        (None, _) => {}
    }
    // A bridge that was made before keeps its network unless another is named: sandboxes use it.
    let before = render::address_in(&file);
    let is_within = |pool: Pool| before.is_some_and(|before| pool.is_in(before));
    let of_pool = match config.network.pool {
        Some(pool) if subnet.is_none() && !is_within(pool) => {
            Some(network_of(pool).ok_or(Error::PartOfNetwork)?)
        }
        Some(_) | None => None,
    };
    let interfaces = text(&paths.interfaces)?;
    if !render::includes(&interfaces, &paths.interfaces_d) {
        return Err(Error::NotIncluded(paths.interfaces.clone(), paths.interfaces_d.clone()));
    }
    let name = match made {
        Some(made) => made,
        None => free_name(&interfaces, paths, net)?,
    };
    let by_number = || numbered(detect::identity(roots).ok()?.number?);
    let is_named = subnet.is_some();
    let subnet = subnet.or(of_pool).or(before).or_else(by_number).ok_or(Error::NoNumber)?.trunc();
    if !(8..=29).contains(&subnet.prefix_len()) || !subnet.network().is_private() {
        return Err(Error::Unfit(subnet));
    }
    if let Some(pool) = config.network.pool
        && !pool.is_in(subnet)
    {
        return Err(Error::PoolElsewhere(pool, subnet));
    }
    let first = Ipv4Addr::from(u32::from(subnet.network()) + 1);
    let address = Ipv4Net::new(first, subnet.prefix_len()).map_err(|_| Error::Unfit(subnet))?;
    let bridge = Bridge { name, address };
    // Whatever route has come since, it may keep its address.
    if before != Some(address) {
        check_sandboxes(roots, &bridge, before)?;
        let overlaps = |other: &Ipv4Net| other.contains(&subnet) || subnet.contains(other);
        let mut others = detect::routed(roots).into_iter();
        if let Some((interface, other)) =
            others.find(|(on, other)| *on != bridge.name && overlaps(other))
        {
            let used = if is_named { Error::Used } else { Error::PoolUsed };
            return Err(used(subnet, other, interface));
        }
    }
    Ok(Plan::Make(bridge))
}

/// Plans that a bridge stays as it is, which the pool must then suit.
fn keep(bridge: String, config: &File, roots: Roots<'_>) -> Result<Plan, Error> {
    match (config.network.pool, network_on(&bridge, roots)) {
        (Some(pool), Some(network)) if !pool.is_in(network) => {
            Err(Error::PoolOffBridge(pool, bridge, network))
        }
        _ => Ok(Plan::Named(bridge)),
    }
}

/// Returns true when sandboxes with addresses of the pool can have used this bridge, which nobody has named.
fn may_have_used(bridge: &str, config: &File, roots: Roots<'_>) -> bool {
    match (config.network.pool, network_on(bridge, roots)) {
        (Some(pool), Some(network)) => pool.is_in(network),
        // Without an address of the node on it, only an operator can say what its gateway is.
        (Some(_), None) => config.network.gateway.is_some(),
        (None, _) => true,
    }
}

/// Returns the network of a bridge that this node has an address on.
fn network_on(bridge: &str, roots: Roots<'_>) -> Option<Ipv4Net> {
    let on = detect::on_bridge(roots, bridge)?;
    Ipv4Net::new(on.address, on.prefix).ok().map(|network| network.trunc())
}

/// Checks that a bridge with another address than before cuts off no sandbox of this node: each keeps its own address,
/// and the bridge's as its gateway.
fn check_sandboxes(
    roots: Roots<'_>,
    bridge: &Bridge,
    before: Option<Ipv4Net>,
) -> Result<(), Error> {
    // Not the name in the file: of another node, or without pmxcfs, its directory looks empty.
    let node = match detect::identity(roots) {
        Ok(found) => found.node,
        // There is no bridge that a sandbox could be on.
        Err(_) if before.is_none() => return Ok(()),
        Err(error) => return Err(Error::Unknown(error)),
    };
    let configs = detect::configs(roots.pve, &node).into_iter();
    let cut_off =
        configs.filter(|(_, config)| config.has_mark() && cuts_off(bridge, before, config));
    let cut_off: Vec<Vmid> = cut_off.map(|(vmid, _)| vmid).collect();
    if cut_off.is_empty() {
        return Ok(());
    }
    let shown: Vec<_> = cut_off.iter().take(SHOWN_MAX).map(Vmid::to_string).collect();
    let more = cut_off.len() - shown.len();
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let sandboxes = format!("{}{and_more}", shown.join(", "));
    Err(Error::CutsOff { bridge: bridge.name.clone(), address: bridge.address, sandboxes })
}

/// Returns true when a container is in the network that the bridge had, or on the bridge, and would not reach it with
/// its new address. Pure.
fn cuts_off(bridge: &Bridge, before: Option<Ipv4Net>, config: &ContainerConfig) -> bool {
    let (first, gateway) = match config.net0() {
        Some(Interface { bridge: on, ip: Ip::Static(ip, _), gateway, .. }) => {
            (Some(ip).filter(|_| on == bridge.name), gateway)
        }
        Some(_) | None => (None, None),
    };
    let of_before =
        config.static_addresses().filter(|ip| before.is_some_and(|net| net.contains(ip)));
    let mut addresses = of_before.chain(first);
    let was_its_gateway = before.is_some_and(|net| gateway == Some(net.addr()));
    let is_lost = |ip: Ipv4Addr| !bridge.address.contains(&ip);
    addresses.any(is_lost)
        || (was_its_gateway && gateway.is_some_and(|ip| ip != bridge.address.addr()))
}

/// Writes the files of a bridge; returns those that are new or have changed.
///
/// # Errors
/// When a file cannot be written.
pub fn write(bridge: &Bridge, paths: &Paths) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    let before = text(&paths.config)?;
    let failed = |error| Error::File(paths.config.clone(), error);
    let mut document: DocumentMut =
        before.parse().map_err(|error| failed(io::Error::other::<toml_edit::TomlError>(error)))?;
    let network = document.entry("network").or_insert_with(|| Item::Table(Table::new()));
    if let Some(network) = network.as_table_like_mut() {
        network.insert("bridge", value(bridge.name.as_str()));
    }
    for (path, now) in [
        (paths.nat(), render::nat(bridge)),
        (paths.dns(), render::dns(bridge)),
        (paths.bridge(), render::interfaces(bridge, &paths.nat())),
        // Last: the bridge that the configuration names has its files.
        (paths.config.clone(), document.to_string()),
    ] {
        let failed = |error| Error::File(path.clone(), error);
        if text(&path)? != now {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(failed)?;
            }
            replace(&path, now.as_bytes(), Access { mode: 0o644, group: None }).map_err(failed)?;
            changed.push(path);
        }
    }
    Ok(changed)
}

/// Removes the files of the bridge that this command has made, and its name from the configuration; returns
/// those that were removed or changed.
///
/// # Errors
/// When a file cannot be removed or written.
pub fn remove(paths: &Paths) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    let before = text(&paths.config)?;
    let failed = |error| Error::File(paths.config.clone(), error);
    let mut document: DocumentMut =
        before.parse().map_err(|error| failed(io::Error::other::<toml_edit::TomlError>(error)))?;
    if let Some(network) = document.get_mut("network").and_then(Item::as_table_like_mut) {
        network.remove("bridge");
    }
    // First, so that no configuration names a bridge that is gone.
    let now = document.to_string();
    if now != before {
        replace(&paths.config, now.as_bytes(), Access { mode: 0o644, group: None })
            .map_err(failed)?;
        changed.push(paths.config.clone());
    }
    for path in [paths.bridge(), paths.dns(), paths.nat()] {
        match fs::remove_file(&path) {
            Ok(()) => changed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::File(path, error)),
        }
    }
    Ok(changed)
}

/// Returns the network of a node by its number.
fn numbered(number: u32) -> Option<Ipv4Net> {
    let third = u8::try_from(number).ok()?;
    Ipv4Net::new(Ipv4Addr::new(10, 100, third, 0), 24).ok()
}

/// Returns the network that a pool is the whole of.
fn network_of(pool: Pool) -> Option<Ipv4Net> {
    (8..=29).find_map(|prefix| {
        let network = Ipv4Net::new(pool.first, prefix).ok()?;
        (Pool::of(network) == pool).then_some(network)
    })
}

/// Finds a name that neither the kernel nor a file of ifupdown2 has.
fn free_name(interfaces: &str, paths: &Paths, net: &Path) -> Result<String, Error> {
    let mut texts = vec![interfaces.to_owned()];
    let files = fs::read_dir(&paths.interfaces_d).into_iter().flatten().flatten();
    for path in files.map(|entry| entry.path()).filter(|path| path.is_file()) {
        texts.push(text(&path)?);
    }
    let named = |name: &str| {
        let mut words = texts.iter().flat_map(|text| text.split_whitespace());
        words.any(|word| word == name)
    };
    let mut names = (1..4095).map(|number| format!("vmbr{number}"));
    let free = names.find(|name| !net.join(name).exists() && !named(name));
    Ok(free.unwrap_or_else(|| "vmbr4095".to_owned()))
}

fn text(path: &Path) -> Result<String, Error> {
    let text = daemon::text::read_if_there(path);
    text.map(Option::unwrap_or_default).map_err(|error| Error::File(path.to_owned(), error))
}

#[cfg(test)]
mod tests;
