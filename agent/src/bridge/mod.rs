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
use toml_edit::{DocumentMut, Item, Table, value};

pub use render::NAT_TABLE;

use crate::{
    config::{File, Pool},
    detect::{self, Roots},
};

/// Directory of our own files.
const ETC: &str = "/etc/pve-sandbox";
/// File with the configuration of the bridge's name server.
const DNS: &str = "dns.conf";

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
        (Some(named), _) => return Ok(Plan::Named(named.clone())),
        // An agent has run here with the bridge that it found: its sandboxes stay where they are.
        (None, None) if subnet.is_none() && config.journal().exists() => {
            if let Ok(found) = detect::bridge(roots) {
                return Ok(Plan::Named(found));
            }
        }
        (None, _) => {}
    }
    if subnet.is_none() && config.network.pool.is_some_and(|pool| network_of(pool).is_none()) {
        return Err(Error::PartOfNetwork);
    }
    let interfaces = text(&paths.interfaces)?;
    if !render::includes(&interfaces, &paths.interfaces_d) {
        return Err(Error::NotIncluded(paths.interfaces.clone(), paths.interfaces_d.clone()));
    }
    let name = match made {
        Some(made) => made,
        None => free_name(&interfaces, paths, net)?,
    };
    let of_pool = || config.network.pool.and_then(network_of);
    let by_number = || numbered(detect::identity(roots).ok()?.number?);
    let is_named = subnet.is_some();
    let subnet = subnet.or_else(of_pool).or_else(by_number).ok_or(Error::NoNumber)?.trunc();
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
    // A bridge that was made before keeps its network, whatever route has come since: sandboxes use it.
    if render::address_in(&file) != Some(address) {
        let overlaps = |other: &Ipv4Net| other.contains(&subnet) || subnet.contains(other);
        let mut others = detect::routed(roots).into_iter();
        if let Some((interface, other)) = others.find(|(on, other)| *on != name && overlaps(other))
        {
            let used = if is_named { Error::Used } else { Error::PoolUsed };
            return Err(used(subnet, other, interface));
        }
    }
    Ok(Plan::Make(Bridge { name, address }))
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
