//! Firewall in memory, for the simulation and the tests.

use daemon::sync::Mutex;

use super::{Error, Firewall, Result, Rules};

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
}

impl MemoryFirewall {
    /// Returns the rules that are in force.
    pub fn rules(&self) -> Option<Rules> {
        self.state.lock().rules.clone()
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
        Ok(())
    }

    async fn check(&self) -> Result<Option<String>> {
        let flushed = std::mem::take(&mut self.state.lock().flushed);
        Ok(flushed.then(|| "the tables are missing".to_owned()))
    }

    fn counts_connections(&self) -> bool {
        !self.state.lock().cannot_count
    }
}
