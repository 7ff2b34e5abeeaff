//! Observation of the host: containers and volumes as they are, for the reconciler and the check.

use std::{collections::BTreeMap, net::Ipv4Addr};

use proto::{id::Vmid, name::NodeName};

use crate::pve::{self, Cluster, Mark, Pve, config_file::Interface, ownership, pause_lock};

/// Container of this node, with the facts that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// Mark in its description.
    pub mark: Option<Mark>,
    /// True for a template.
    pub template: bool,
    /// PVE's lock on it.
    pub lock: Option<String>,
    /// True when its init runs.
    pub running: bool,
    /// True when nothing in it gets to run.
    pub frozen: bool,
    /// First interface.
    pub net0: Option<Interface>,
    /// Static addresses of all its interfaces.
    pub ips: Vec<Ipv4Addr>,
    /// True when PVE's lock on it is ours, of a pause.
    pub held: bool,
    /// True when anything of such a lock is left, even only the line that explains it.
    pub noted: bool,
    /// True when a destruction was cut off before its last write, so that only its lock is left.
    pub gutted: bool,
    /// Volumes of its own that its config names, as `volume::key` writes them.
    pub volumes: Vec<String>,
}

impl Container {
    /// Returns the mark if it says that this very container is ours.
    pub fn is_marked_as(&self, vmid: Vmid) -> Option<&Mark> {
        self.mark.as_ref().filter(|mark| mark.vmid == vmid && !self.template)
    }
}

/// State of the host when it was observed.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Name of this node; `None` before the first observation.
    pub node: Option<NodeName>,
    /// State of the cluster.
    pub cluster: Cluster,
    /// Containers of this node.
    pub containers: BTreeMap<Vmid, Container>,
    /// Volumes by the vmid in their names; empty unless the storages were read.
    pub volumes: BTreeMap<Vmid, Vec<String>>,
}

/// Observes the containers, but not the storages.
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
        // Only containers with a mark are checked: for others the answer is not needed.
        let frozen = mark.is_some() && pve.frozen(vmid).await;
        let container = Container {
            mark,
            template: config.is_template(),
            lock: config.lock().map(str::to_owned),
            running: pve.running(vmid).await,
            frozen,
            net0: config.net0(),
            ips: config.static_addresses().collect(),
            held: pause_lock::is_held(&config),
            noted: pause_lock::is_noted(&config),
            gutted: ownership::is_gutted(&config),
            volumes: config.own_volumes(vmid),
        };
        observed.containers.insert(vmid, container);
    }
    Ok(observed)
}

/// Observes the containers, then the volumes of every vmid.
///
/// # Errors
/// When /etc/pve or a storage cannot be read.
pub async fn observe_all(pve: &dyn Pve) -> Result<Observed, pve::Error> {
    let observed = observe(pve).await?;
    Ok(Observed { volumes: pve.all_volumes().await?, ..observed })
}
