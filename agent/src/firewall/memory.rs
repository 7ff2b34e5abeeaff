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
    /// Whether the kernel cannot count connections.
    cannot_count: bool,
    book: Book,
    allowed: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
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
        state.rules = Some(rules.clone());
        state.book.follow(rules);
        let gone = state.book.gone().clone();
        state.allowed.retain(|pair| !gone.contains(pair));
        state.book.remove(&gone);
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
        let flushed = std::mem::take(&mut self.state.lock().flushed);
        Ok(flushed.then(|| "the tables are missing".to_owned()))
    }

    fn counts_connections(&self) -> bool {
        !self.state.lock().cannot_count
    }
}
