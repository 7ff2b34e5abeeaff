//! Isolation of the sandboxes from each other, the host and its networks.
//!
//! The rules follow from the records: whoever changes a record that they depend on calls `isolate`.
//! A sandbox gets its rules before its container starts, and does not start without them. Each pass of
//! the reconciler compares the host's rules with ours, and puts back what somebody else took away.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use daemon::sync::Mutex;
use ipnet::Ipv4Net;
use proto::{
    Invariant, Reason,
    id::{SandboxId, Vmid},
    spec::{Egress, Network},
};

use super::names::Resolver;
use crate::{
    firewall::{self, Entry, Firewall, Grounds, Rules},
    journal::Record,
    pve::{ContainerConfig, interface},
    sandbox::{
        Error, Result, Sandboxes,
        drift::fsck::Finding,
        lifecycle::address::{Mac, parse_mac, was_found},
    },
};

/// Isolation of a node's sandboxes, with what it remembers.
#[derive(Debug)]
pub struct Isolation {
    pub(super) firewall: Arc<dyn Firewall>,
    grounds: Grounds,
    pub(super) resolver: Mutex<Resolver>,
    /// Held while rules are made and applied, so that older ones never replace newer ones.
    turn: tokio::sync::Mutex<()>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Creations whose container is ours for certain, although their record may not say so.
    starting: BTreeSet<SandboxId>,
    /// Interfaces of containers that the agent did not make.
    found: BTreeMap<Vmid, Connected>,
    /// Addresses of the cluster's nodes; none is ever dropped, since absence proves nothing.
    nodes: BTreeSet<Ipv4Addr>,
    /// Differences that were put right since `fsck` asked last.
    restored: Option<String>,
    /// Why the last pass could not put the rules in force.
    broken: Option<String>,
}

/// Interface of a sandbox.
#[derive(Debug, Clone)]
struct Connected {
    mac: Option<Mac>,
    bridge: String,
    /// Default route, if it is not the node's.
    router: Option<Ipv4Addr>,
}

impl Sandboxes {
    /// Isolates the sandboxes by this firewall from now on. Only the first call counts.
    pub fn isolate_by(&self, firewall: Arc<dyn Firewall>, grounds: Grounds) {
        let (resolver, turn, memory) = Default::default();
        drop(self.isolation.set(Isolation { firewall, grounds, resolver, turn, memory }));
    }

    /// Isolates a sandbox whose container is about to start, and all others.
    ///
    /// # Errors
    /// CONTAINER_UNFIT when one of its interfaces would not be filtered; ISOLATION_FAILED when the
    /// rules are not in force: then it must not start.
    pub(in crate::sandbox) async fn isolate_before_start(
        &self,
        record: &Record,
        config: &ContainerConfig,
    ) -> Result<()> {
        self.check_egress(&record.egress)?;
        let Some(isolation) = self.isolation.get() else { return Ok(()) };
        self.check_interfaces(record.vmid, config)?;
        isolation.memory.lock().starting.insert(record.id);
        self.isolate().await
    }

    /// Refuses a container with interfaces that would not be filtered.
    pub(in crate::sandbox) fn check_interfaces(
        &self,
        vmid: Vmid,
        config: &ContainerConfig,
    ) -> Result<()> {
        let Some(isolation) = self.isolation.get() else { return Ok(()) };
        if let Some(net0) = config.net0() {
            isolation.firewall.can_filter(&net0.bridge).map_err(failed)?;
        }
        interface::further(config).map_or(Ok(()), |line| {
            let message = format!(
                "container {vmid} has more interfaces than net0 ({line}), which are not isolated: \
                 take them out, or switch isolation off (network.isolation)"
            );
            Err(Error::new(Reason::ContainerUnfit, message))
        })
    }

    /// Makes the host's rules follow the records.
    ///
    /// # Errors
    /// ISOLATION_FAILED when they are not in force.
    pub(in crate::sandbox) async fn isolate(&self) -> Result<()> {
        let Some(isolation) = self.isolation.get() else { return Ok(()) };
        let _turn = isolation.turn.lock().await;
        let rules = self.rules(isolation).await?;
        isolation.firewall.apply(&rules).await.map_err(failed)
    }

    /// Does the same after a change that stands whatever becomes of the rules: the next pass tries
    /// again.
    pub(in crate::sandbox) async fn isolate_after_change(&self, id: &SandboxId) {
        if let Err(error) = self.isolate().await {
            tracing::warn!(sandbox_id = %id, %error, "isolation rules do not follow the change yet");
        }
    }

    /// Compares the host's rules with the records', and puts right what differs.
    pub async fn enforce_isolation(&self) {
        let Some(isolation) = self.isolation.get() else { return };
        let enforced = self.enforce(isolation).await;
        let mut memory = isolation.memory.lock();
        match enforced {
            Ok(differences) => {
                memory.broken = None;
                if let Some(differences) = differences {
                    tracing::error!(
                        differences,
                        "isolation rules had been changed by somebody else; they were put back"
                    );
                    memory.restored = Some(differences);
                }
            }
            Err(error) => {
                tracing::error!(%error, "isolation rules are not in force");
                memory.broken = Some(error.message);
            }
        }
    }

    async fn enforce(&self, isolation: &Isolation) -> Result<Option<String>> {
        let cluster = self.pve.cluster().await;
        let members = cluster.members.values().filter_map(|member| member.ip);
        let addresses = members.chain(cluster.links).filter_map(|address| match address {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        let _turn = isolation.turn.lock().await;
        isolation.memory.lock().nodes.extend(addresses);
        let differences = isolation.firewall.check().await.map_err(failed)?;
        let rules = self.rules(isolation).await?;
        isolation.firewall.apply(&rules).await.map_err(failed)?;
        Ok(differences)
    }

    /// Returns true when sandboxes of this node are isolated at all.
    pub fn isolates(&self) -> bool {
        self.isolation.get().is_some()
    }

    /// Refuses creations while the rules are not in force.
    pub(in crate::sandbox) fn check_isolation_works(&self) -> Result<()> {
        let broken = self.isolation.get().and_then(|one| one.memory.lock().broken.clone());
        broken.map_or(Ok(()), |why| Err(Error::new(Reason::IsolationFailed, why)))
    }

    /// Returns what is or was wrong with the rules; what was put right is told once.
    pub(in crate::sandbox) async fn isolation_findings(&self) -> Vec<Finding> {
        let Some(isolation) = self.isolation.get() else {
            let live = self.live().into_iter();
            let open = live.filter(|record| record.phase.is_up() && record.egress != Egress::Open);
            let finding = |record: Arc<Record>| {
                let word = record.egress.word();
                let detail = format!("its egress is `{word}`, and this node isolates no sandboxes");
                Finding::new(Invariant::I5, record.id, detail)
            };
            return open.map(finding).collect();
        };
        let subject = self.pve.node();
        let (restored, broken) = {
            let mut memory = isolation.memory.lock();
            (memory.restored.take(), memory.broken.clone())
        };
        let restored = restored.map(|what| {
            let detail = format!("isolation rules had been changed, and were put back: {what}");
            Finding::new(Invariant::I5, subject, detail)
        });
        let broken = broken.map(|why| {
            let detail = format!("isolation rules are not in force: {why}");
            Finding::new(Invariant::I5, subject, detail)
        });
        let uncounted = !isolation.firewall.counts_connections();
        let uncounted = uncounted.then(|| {
            let detail = "this kernel cannot count connections (nft_connlimit): the connections of sandboxes are \
                          not limited";
            Finding::new(Invariant::Unchecked, subject, detail)
        });
        let silent = self.resolver_finding().map(|why| Finding::new(Invariant::I5, subject, why));
        restored.into_iter().chain(broken).chain(uncounted).chain(silent).collect()
    }

    /// Makes the rules for the records as they are.
    async fn rules(&self, isolation: &Isolation) -> Result<Rules> {
        let live = self.live();
        let starting = {
            let mut memory = isolation.memory.lock();
            memory.starting.retain(|id| live.iter().any(|record| record.id == *id));
            memory.starting.clone()
        };
        let mut rules = Rules {
            grounds: isolation.grounds(),
            bridges: BTreeSet::new(),
            routers: BTreeSet::new(),
            sandboxes: BTreeMap::new(),
        };
        for record in &live {
            // Until the clone is made, a container with its number may be somebody else's.
            let made = record.progress.is_past_clone() || starting.contains(&record.id);
            if record.phase.is_creation() && !made {
                continue;
            }
            let Connected { mac, bridge, router } = self.interface_of(isolation, record).await?;
            rules.bridges.insert(bridge);
            rules.routers.extend(router);
            let entry = Entry {
                mac,
                ip: record.lease(),
                dhcp: record.network == Network::Dhcp,
                egress: self.egress_here(record),
            };
            rules.sandboxes.insert(record.vmid, entry);
        }
        Ok(rules)
    }

    /// Returns the interface of a sandbox. Where the agent did not choose it, it is read from its
    /// config, and remembered while /etc/pve cannot be read.
    async fn interface_of(&self, isolation: &Isolation, record: &Record) -> Result<Connected> {
        let settings = self.settings(record);
        let ours = Connected { mac: Some(settings.mac), bridge: settings.bridge, router: None };
        if !was_found(record) {
            return Ok(ours);
        }
        let net0 = self.pve.config(record.vmid).await.map(|config| config?.net0());
        let mut memory = isolation.memory.lock();
        match net0 {
            Ok(Some(net0)) => {
                let (mac, bridge) = (parse_mac(&net0.mac), net0.bridge);
                let found = Connected { mac, bridge, router: net0.gateway };
                memory.found.insert(record.vmid, found.clone());
                Ok(found)
            }
            // Its container is gone, or is somewhere else.
            Ok(None) => Ok(Connected { mac: None, ..ours }),
            Err(error) => memory.found.get(&record.vmid).cloned().ok_or_else(|| error.into()),
        }
    }
}

impl Isolation {
    /// Returns the addresses that the rules are about, with the nodes that are known by now.
    pub(super) fn grounds(&self) -> Grounds {
        let nodes = self.memory.lock().nodes.iter().copied().map(Ipv4Net::from).collect();
        let mut grounds = self.grounds.clone();
        grounds.closed = &grounds.closed | &nodes;
        grounds
    }
}

fn failed(error: firewall::Error) -> Error {
    Error::new(Reason::IsolationFailed, format!("the sandbox would not be isolated: {error}"))
}
