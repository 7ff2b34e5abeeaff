//! Firewall in memory, for the simulation and the tests.

use std::{collections::BTreeSet, net::Ipv4Addr};

use daemon::sync::Mutex;
use tokio::time::Instant;

use super::{Error, Firewall, Grant, Grounds, Result, Rules, names::Book};

/// Rules of a host that exists in memory only.
#[derive(Debug, Default)]
pub struct MemoryFirewall {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: Option<Rules>,
    /// Whether somebody else has removed the rules.
    flushed: bool,
    fails: bool,
    /// Whether rules are in force only once `check` has compared them.
    is_late: bool,
    /// Rules that are not in force yet.
    late: Option<Rules>,
    /// Whether the kernel cannot count connections.
    cannot_count: bool,
    book: Book,
    allowed: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
}

impl State {
    fn put(&mut self, rules: Rules) {
        self.book.follow(&rules);
        self.rules = Some(rules);
        let gone = self.book.gone().clone();
        self.allowed.retain(|pair| !gone.contains(pair));
        self.book.remove(&gone);
    }
}

impl MemoryFirewall {
    /// Returns the rules that are in force.
    pub fn rules(&self) -> Option<Rules> {
        self.state.lock().rules.clone()
    }

    /// Returns the addresses that a sandbox reaches by its list.
    pub fn allowed(&self, sandbox: Ipv4Addr) -> Vec<Ipv4Addr> {
        let state = self.state.lock();
        let of = state.allowed.iter().filter(|(of, _)| *of == sandbox);
        of.map(|(_, address)| *address).collect()
    }

    /// Removes the rules, as `nft flush ruleset` does.
    pub fn flush(&self) {
        let mut state = self.state.lock();
        (state.rules, state.flushed) = (None, true);
    }

    /// Lets the kernel be one that cannot count connections.
    pub fn set_cannot_count(&self) {
        self.state.lock().cannot_count = true;
    }

    /// Activates a defect: rules are reported as applied, and are in force from the next comparison on.
    pub fn set_late(&self) {
        self.state.lock().is_late = true;
    }

    /// Lets every change fail from now on, or succeed again.
    pub fn set_failing(&self, fails: bool) {
        self.state.lock().fails = fails;
    }
}

#[async_trait::async_trait]
impl Firewall for MemoryFirewall {
    fn can_filter(&self, _bridge: &str) -> Result<()> {
        Ok(())
    }

    async fn apply(&self, rules: &Rules) -> Result<()> {
        let mut state = self.state.lock();
        if state.fails {
            return Err(Error::Refused("told to fail".to_owned()));
        }
        if state.is_late {
            state.late = Some(rules.clone());
        } else {
            state.put(rules.clone());
        }
        Ok(())
    }

    async fn can_allow(&self, _grounds: &Grounds) -> Result<()> {
        Ok(())
    }

    async fn allow(&self, grants: &[Grant]) -> Result<BTreeSet<(Ipv4Addr, String)>> {
        let mut state = self.state.lock();
        if state.fails {
            return Err(Error::Refused("told to fail".to_owned()));
        }
        let change = state.book.grant(grants, Instant::now());
        state.allowed.retain(|pair| !change.remove.contains(pair));
        state.allowed.extend(change.add);
        state.book.remove(&change.remove);
        Ok(change.refused)
    }

    async fn check(&self) -> Result<Option<String>> {
        let mut state = self.state.lock();
        if let Some(rules) = state.late.take() {
            state.put(rules);
        }
        let flushed = std::mem::take(&mut state.flushed);
        Ok(flushed.then(|| "the tables are missing".to_owned()))
    }

    fn counts_connections(&self) -> bool {
        !self.state.lock().cannot_count
    }
}
