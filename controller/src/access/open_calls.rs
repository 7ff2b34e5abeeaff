//! Tokens with calls under way. A token that ends (revoked, expired or removed) ends its calls, too.
//!
//! A token has an entry as long as one of its calls is under way. Its end is found in three ways: the
//! API of this controller revokes it, its time is over, or a look at the store every second finds it
//! ended: another process may revoke tokens in the same database.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use daemon::sync::Mutex;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::Access;
use crate::{
    store::Token,
    token::{Verdict, standing},
};

/// Time between two looks at the tokens that have calls under way.
const LOOK: Duration = Duration::from_secs(1);

/// Call that can be ended from outside, also while nobody polls it.
pub trait Cut: Send + Sync {
    /// Ends the call. Called again, it changes nothing.
    fn cut(&self, why: Verdict);
}

/// End of a token, which its calls share.
#[derive(Debug, Default)]
struct End {
    over: CancellationToken,
    why: OnceLock<Verdict>,
}

/// Token with calls under way.
struct Entry {
    expires_ms: u64,
    end: Arc<End>,
    /// Calls by their numbers; with what ends one that nobody may poll.
    calls: HashMap<u64, Option<Weak<dyn Cut>>>,
}

#[derive(Default)]
struct Table {
    next: u64,
    tokens: BTreeMap<String, Entry>,
}

/// Calls that are under way, by their tokens.
#[derive(Default)]
pub(super) struct OpenCalls {
    table: Mutex<Table>,
    /// Told when there is a call and there was none.
    begun: Notify,
}

impl std::fmt::Debug for OpenCalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenCalls").field("tokens", &self.table.lock().tokens.len()).finish()
    }
}

/// Call that is under way, until it is dropped.
#[derive(Debug)]
pub struct OpenCall(Ending);

/// End of a call by that of its token.
#[derive(Debug, Clone)]
pub struct Ending {
    all: Arc<OpenCalls>,
    token: String,
    number: u64,
    end: Arc<End>,
}

impl OpenCall {
    /// Returns how and when the call is ended by its token.
    pub fn ending(&self) -> Ending {
        self.0.clone()
    }
}

impl Ending {
    /// Returns a future that is ready when the token ends.
    pub fn over(&self) -> WaitForCancellationFutureOwned {
        self.end.over.clone().cancelled_owned()
    }

    /// Returns how the token has ended.
    pub fn why(&self) -> Verdict {
        // It is set before `over` is cancelled.
        self.end.why.get().copied().unwrap_or(Verdict::Revoked)
    }

    /// Binds what is to be cut when the token ends.
    pub fn bind(&self, cut: &Arc<impl Cut + 'static>) {
        let weak = Arc::downgrade(cut);
        let mut table = self.all.table.lock();
        let entry = table.tokens.get_mut(&self.token);
        if let Some(call) = entry.and_then(|entry| entry.calls.get_mut(&self.number)) {
            *call = Some(weak);
            return;
        }
        drop(table);
        // The token has ended since the call began.
        cut.cut(self.why());
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let mut table = self.0.all.table.lock();
        // A token that ended has no entry, or that of calls which began at that moment.
        let Some(entry) = table.tokens.get_mut(&self.0.token) else { return };
        entry.calls.remove(&self.0.number);
        if entry.calls.is_empty() {
            table.tokens.remove(&self.0.token);
        }
    }
}

impl OpenCalls {
    fn begin(self: &Arc<Self>, token: &Token) -> OpenCall {
        let mut table = self.table.lock();
        let number = table.next;
        table.next += 1;
        if table.tokens.is_empty() {
            self.begun.notify_one();
        }
        let new =
            || Entry { expires_ms: token.expires_ms, end: Arc::default(), calls: HashMap::new() };
        let entry = table.tokens.entry(token.id.clone()).or_insert_with(new);
        entry.calls.insert(number, None);
        let end = Arc::clone(&entry.end);
        OpenCall(Ending { all: Arc::clone(self), token: token.id.clone(), number, end })
    }

    /// Ends the calls of a token.
    fn end(&self, token: &str, why: Verdict) {
        let ended = self.table.lock().tokens.remove(token);
        let Some(Entry { end, calls, .. }) = ended else { return };
        tracing::info!(token, calls = calls.len(), ?why, "token has ended, and its calls with it");
        // Nobody sets it before: an entry ends once.
        end.why.get_or_init(|| why);
        end.over.cancel();
        // Without the lock: what is dropped here takes it.
        calls.into_values().flatten().filter_map(|cut| cut.upgrade()).for_each(|cut| cut.cut(why));
    }

    fn tokens(&self) -> Vec<String> {
        self.table.lock().tokens.keys().cloned().collect()
    }

    fn expired(&self, now_ms: u64) -> Vec<String> {
        let table = self.table.lock();
        let over = |entry: &Entry| entry.expires_ms != 0 && entry.expires_ms <= now_ms;
        let expired = table.tokens.iter().filter(|(_, entry)| over(entry));
        expired.map(|(token, _)| token.clone()).collect()
    }

    /// Waits until there are calls, and then for the next look, or for the next expiry before it.
    async fn next_look(&self, now_ms: u64) {
        while self.table.lock().tokens.is_empty() {
            self.begun.notified().await;
        }
        let expiries = |table: &Table| {
            let expiries = table.tokens.values().map(|entry| entry.expires_ms);
            expiries.filter(|expires_ms| *expires_ms != 0).min()
        };
        let expiry = expiries(&self.table.lock()).map(|ms| ms.saturating_sub(now_ms).max(1));
        sleep(expiry.map_or(LOOK, |ms| LOOK.min(Duration::from_millis(ms)))).await;
    }
}

impl Access {
    /// Begins a call with a token, which ends when the token does.
    pub fn begin_call(&self, token: &Token) -> OpenCall {
        self.open.begin(token)
    }

    /// Ends the calls of a token that was revoked.
    pub(super) fn end_calls(&self, token: &str) {
        self.open.end(token, Verdict::Revoked);
    }

    /// Ends the calls of tokens that have ended, within a second, until `stop`.
    pub async fn end_calls_of_ended_tokens(&self, stop: CancellationToken) {
        let mut failing = false;
        while stop.run_until_cancelled(self.open.next_look(self.now_ms())).await.is_some() {
            for token in self.open.expired(self.now_ms()) {
                self.open.end(&token, Verdict::Expired);
            }
            let asked = self.open.tokens();
            if asked.is_empty() {
                continue;
            }
            match self.store.tokens_by_id(asked.clone()).await {
                Ok(found) => {
                    failing = false;
                    self.end_ended(asked, &found);
                }
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(%error, "could not look whether tokens of running calls have ended");
                }
                Err(_) => {}
            }
        }
    }

    fn end_ended(&self, asked: Vec<String>, found: &[Token]) {
        let now_ms = self.now_ms();
        for id in asked {
            let row = found.iter().find(|token| token.id == id);
            // One without a row is unknown.
            match row.map_or(Verdict::Wrong, |token| standing(token, now_ms)) {
                Verdict::Valid => {}
                why @ (Verdict::Wrong | Verdict::Revoked | Verdict::Expired) => {
                    self.open.end(&id, why);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proto::scope::Scopes;

    use super::*;
    use crate::token::{Order, issue};

    fn token() -> Token {
        issue(Order::new("red".parse().expect("team"), Scopes::SANDBOX), 1).token
    }

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Cut for Counted {
        fn cut(&self, why: Verdict) {
            assert_eq!(why, Verdict::Revoked);
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn entries(open: &OpenCalls) -> usize {
        open.table.lock().tokens.len()
    }

    #[tokio::test]
    async fn entry_of_a_token_is_gone_with_its_last_call() {
        let (open, token) = (Arc::<OpenCalls>::default(), token());
        let first = open.begin(&token);
        let second = open.begin(&token);
        assert_eq!(entries(&open), 1);
        drop(first);
        assert_eq!(entries(&open), 1);
        drop(second);
        assert_eq!(entries(&open), 0);
    }

    #[tokio::test]
    async fn end_of_a_token_ends_its_calls_and_no_others() {
        let (open, red, blue) = (Arc::<OpenCalls>::default(), token(), token());
        let (first, second, other) = (open.begin(&red), open.begin(&red), open.begin(&blue));
        let cut = Arc::<Counted>::default();
        first.ending().bind(&cut);
        open.end(&red.id, Verdict::Revoked);
        for ended in [&first, &second] {
            ended.ending().over().await;
            assert_eq!(ended.ending().why(), Verdict::Revoked);
        }
        assert!(!other.0.end.over.is_cancelled());
        assert_eq!(cut.0.load(Ordering::Relaxed), 1);
        // One that is bound too late is cut at once.
        second.ending().bind(&cut);
        assert_eq!(cut.0.load(Ordering::Relaxed), 2);
        assert_eq!(entries(&open), 1);
        drop((first, second, other));
        assert_eq!(entries(&open), 0);
    }
}
