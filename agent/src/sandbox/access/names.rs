//! Sandboxes that reach the names of a list alone: what the resolver must know of them, and what of it
//! they need.

use std::{collections::BTreeSet, net::Ipv4Addr};

use proto::{Reason, egress::AllowList, id::SandboxId, spec::Egress};

use crate::{
    firewall::{self, Grant},
    journal::Record,
    sandbox::{Error, Result, Sandboxes},
};

/// Resolver of the node, as far as creations are concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Resolver {
    /// There is none: sandboxes do not send their questions through this host.
    #[default]
    None,
    /// Sandboxes get no answers at the moment.
    Silent,
    /// Sandboxes get answers.
    Answers,
}

impl Sandboxes {
    /// Takes notice that this node has a resolver for sandboxes with lists, which does not answer yet.
    pub fn expect_resolver(&self) {
        self.resolver_answers(false);
    }

    /// Takes notice whether sandboxes with lists get answers.
    pub fn resolver_answers(&self, answers: bool) {
        if let Some(isolation) = self.isolation.get() {
            *isolation.resolver.lock() = if answers { Resolver::Answers } else { Resolver::Silent };
        }
    }

    /// Returns true when this node can let a sandbox reach the names of a list alone.
    pub fn filters_egress(&self) -> bool {
        self.resolver() != Resolver::None
    }

    fn resolver(&self) -> Resolver {
        self.isolation.get().map_or(Resolver::None, |isolation| *isolation.resolver.lock())
    }

    /// Returns the reach of a sandbox on this node: nothing where its list cannot be followed.
    pub(super) fn egress_here(&self, record: &Record) -> Egress {
        match &record.egress {
            Egress::Allow(_) if !self.filters_egress() => Egress::None,
            Egress::None | Egress::Allow(_) | Egress::Open => record.egress.clone(),
        }
    }

    /// Refuses a sandbox that this node cannot keep from reaching what it shall not reach.
    pub(in crate::sandbox) fn check_egress(&self, egress: &Egress) -> Result<()> {
        let why = match egress {
            Egress::Open => return Ok(()),
            Egress::None | Egress::Allow(_) if !self.isolates() => {
                "sandboxes of this node are not isolated (network.isolation), so none can be closed"
            }
            Egress::None => return Ok(()),
            Egress::Allow(_) => match self.resolver() {
                Resolver::Answers | Resolver::Silent => return Ok(()),
                Resolver::None => {
                    "this node is not the gateway of its sandboxes, so none can have an allow-list"
                }
            },
        };
        Err(Error::new(Reason::IsolationFailed, why))
    }

    /// Refuses a sandbox that would get no answers for the names of its list. One that there is already
    /// is closed meanwhile.
    pub(in crate::sandbox) fn check_resolver(&self, egress: &Egress) -> Result<()> {
        self.check_egress(egress)?;
        if egress.list().is_none() || self.resolver() == Resolver::Answers {
            return Ok(());
        }
        let why = "the node's resolver of allow-lists does not answer: see the log of its agent";
        Err(Error::new(Reason::IsolationFailed, why))
    }

    /// Returns what is wrong with the resolver, if a sandbox needs it.
    pub(in crate::sandbox) fn resolver_finding(&self) -> Option<&'static str> {
        let live = self.live();
        let is_needed = live.iter().any(|record| record.egress.list().is_some());
        let silent = self.resolver() != Resolver::Answers && is_needed;
        silent.then_some("sandboxes with an allow-list get no answers to their DNS questions")
    }

    /// Returns the living sandbox with this address and its list, if it has one.
    pub fn allow_list_of(&self, source: Ipv4Addr) -> Option<(SandboxId, AllowList, u64)> {
        let live = self.live();
        let record = live.iter().find(|record| record.lease() == Some(source))?;
        Some((record.id, record.egress.list()?.clone(), record.revision))
    }

    /// Returns true when a sandbox that is open reaches this address.
    pub fn is_within_reach(&self, address: Ipv4Addr) -> bool {
        let isolation = self.isolation.get();
        isolation.is_some_and(|isolation| isolation.grounds().is_within_reach(address))
    }

    /// Lets sandboxes reach addresses, as far as their lists in the host's rules allow the names. Returns the
    /// sandboxes and names that they do not allow, or not yet.
    ///
    /// # Errors
    /// When the host does not let them.
    pub async fn allow(&self, grants: &[Grant]) -> firewall::Result<BTreeSet<(Ipv4Addr, String)>> {
        match self.isolation.get() {
            Some(isolation) => isolation.firewall.allow(grants).await,
            None => Ok(BTreeSet::new()),
        }
    }
}
