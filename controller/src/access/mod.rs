//! Who may call: looks up tokens, makes and revokes them, ends the calls of those that end, and records
//! when each was last used.
//!
//! A use is noted in memory and written once a minute for all tokens together, so that no call
//! waits for a write.

mod manage;
mod open_calls;
pub mod ssh_keys;

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use daemon::sync::Mutex;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    ca::ClientSigner,
    clock::Clock,
    store::{self, Store, Token},
};

use open_calls::OpenCalls;
pub use open_calls::{Cut, Ending, OpenCall};

/// Time between two writes of the last uses, and the precision of a last use.
const WRITE_USED: Duration = Duration::from_mins(1);

/// Tokens of all teams.
#[derive(Debug)]
pub struct Access {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    /// Last uses that are not written yet, milliseconds since 1970, by the ids of the tokens.
    used: Mutex<BTreeMap<String, u64>>,
    /// Calls under way, which end with their tokens.
    open: Arc<OpenCalls>,
    /// CA of client certificates, once it is there.
    signer: OnceLock<ClientSigner>,
}

impl Access {
    /// Creates the service over a store.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock, used: Mutex::default(), open: Arc::default(), signer: OnceLock::new() }
    }

    /// Lets tokens be client certificates. Called once.
    pub fn certify(&self, signer: ClientSigner) {
        drop(self.signer.set(signer));
    }

    /// Returns the wall clock, milliseconds since 1970.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Looks up a token by its id, revoked or not.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn token(&self, id: &str) -> store::Result<Option<Token>> {
        self.store.token(id).await
    }

    /// Notes that a valid token was used.
    pub fn note_use(&self, token: &Token) {
        let now_ms = self.now_ms();
        if now_ms < token.used_ms.saturating_add(daemon::clock::millis(WRITE_USED)) {
            return;
        }
        let mut used = self.used.lock();
        // Two look-ups instead of a clone of the id for each call.
        match used.get_mut(&token.id) {
            Some(used_ms) => *used_ms = now_ms,
            None => drop(used.insert(token.id.clone(), now_ms)),
        }
    }

    /// Writes the last uses from time to time, and once more at the end.
    pub async fn write_uses(&self, stop: CancellationToken) {
        let mut ticks = interval(WRITE_USED);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.write_uses_once().await;
        }
        self.write_uses_once().await;
    }

    async fn write_uses_once(&self) {
        let used = std::mem::take(&mut *self.used.lock());
        if used.is_empty() {
            return;
        }
        if let Err(error) = self.store.tokens_used(used.into_iter().collect()).await {
            // The next use of each token notes it again.
            tracing::warn!(%error, "could not write when tokens were last used");
        }
    }
}
