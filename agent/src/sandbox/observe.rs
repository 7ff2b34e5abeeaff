//! What is really there: one look at the host, as data for the reconciler and the check.

use std::{collections::BTreeMap, net::Ipv4Addr};

use proto::{id::Vmid, name::NodeName};

use crate::pve::{self, Cluster, Mark, Pve, config_file::Interface, hold, ownership};

/// A container of this node, as far as it matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// The mark in its description.
    pub mark: Option<Mark>,
    /// It is a template.
    pub template: bool,
    /// PVE's lock.
    pub lock: Option<String>,
    /// Its init runs.
    pub running: bool,
    /// Nothing in it gets to run.
    pub frozen: bool,
    /// Its first interface.
    pub net0: Option<Interface>,
    /// The static addresses of all its interfaces.
    pub ips: Vec<Ipv4Addr>,
    /// PVE's lock on it is ours, of a pause.
    pub held: bool,
    /// Something of such a lock is left, be it the line that explains it.
    pub noted: bool,
    /// A destruction was cut off before its last write: its lock is all that is left.
    pub gutted: bool,
    /// Volumes of its own that its config names, as `volume::key` writes them.
    pub volumes: Vec<String>,
}

impl Container {
    /// True when the mark says that this very container is ours.
    pub fn is_marked_as(&self, vmid: Vmid) -> Option<&Mark> {
        self.mark.as_ref().filter(|mark| mark.vmid == vmid && !self.template)
    }
}

/// One look at the host.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Which node it is; `None` before the first look.
    pub node: Option<NodeName>,
    /// The cluster.
    pub cluster: Cluster,
    /// The containers of this node.
    pub containers: BTreeMap<Vmid, Container>,
    /// Volumes by the vmid in their names, where they were looked for.
    pub volumes: BTreeMap<Vmid, Vec<String>>,
}

/// Looks at the containers, and not at the storages.
///
/// # Errors
/// When /etc/pve cannot be read.
pub async fn observe(pve: &dyn Pve) -> Result<Observed, pve::Error> {
    let mut observed = Observed {
        node: Some(pve.node().clone()),
        cluster: pve.cluster().await,
        ..Observed::default()
    };
    for (vmid, config) in pve.configs().await? {
        let mark = config.mark();
        // A look at each of somebody else's would be for nothing.
        let frozen = mark.is_some() && pve.frozen(vmid).await;
        let container = Container {
            mark,
            template: config.is_template(),
            lock: config.lock().map(str::to_owned),
            running: pve.running(vmid).await,
            frozen,
            net0: config.net0(),
            ips: config.static_addresses().collect(),
            held: hold::held(&config),
            noted: hold::leaves(&config),
            gutted: ownership::is_gutted(&config),
            volumes: config.own_volumes(vmid),
        };
        observed.containers.insert(vmid, container);
    }
    Ok(observed)
}

/// Looks at the containers, then at the volumes of every number.
///
/// # Errors
/// When /etc/pve or a storage cannot be read.
pub async fn observe_all(pve: &dyn Pve) -> Result<Observed, pve::Error> {
    let observed = observe(pve).await?;
    Ok(Observed { volumes: pve.all_volumes().await?, ..observed })
}
