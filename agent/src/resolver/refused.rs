//! Remembers which names sandboxes were refused, and logs them at a bounded rate.

use std::{collections::BTreeMap, time::Duration};

use daemon::sync::Mutex;
use proto::id::SandboxId;
use tokio::time::Instant;

/// Names of a sandbox that are remembered, so that each is logged once.
const NAMES_MAX: usize = 20;
/// Sandboxes that are remembered.
const SANDBOXES_MAX: usize = 1024;
/// Shortest time between two lines about one sandbox.
const PAUSE: Duration = Duration::from_secs(1);

/// Names that were refused.
#[derive(Debug, Default)]
pub(super) struct Refused(Mutex<BTreeMap<SandboxId, Names>>);

#[derive(Debug)]
struct Names {
    /// Names that were logged, the last one at the end.
    told: Vec<String>,
    at: Instant,
    /// Questions that were refused since then without a line.
    silent: u64,
}

impl Refused {
    /// Records that a sandbox asked for a name that it may not ask for. Returns how many were refused
    /// without a line before, if this one is to be logged.
    pub(super) fn add(&self, sandbox: SandboxId, name: &str) -> Option<u64> {
        let now = Instant::now();
        let mut all = self.0.lock();
        if let Some(names) = all.get_mut(&sandbox) {
            let known = names.told.iter().any(|told| told == name);
            if known || now.saturating_duration_since(names.at) < PAUSE {
                names.silent += 1;
                return None;
            }
            if names.told.len() == NAMES_MAX {
                names.told.remove(0);
            }
            names.told.push(name.to_owned());
            names.at = now;
            return Some(std::mem::take(&mut names.silent));
        }
        if all.len() == SANDBOXES_MAX {
            let oldest = all.iter().min_by_key(|(_, names)| names.at).map(|(id, _)| *id);
            oldest.and_then(|id| all.remove(&id));
        }
        all.insert(sandbox, Names { told: vec![name.to_owned()], at: now, silent: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_name_is_logged_once_and_not_more_than_one_a_second() {
        let (refused, one) = (Refused::default(), SandboxId::new(1, &[0; 10]));
        assert_eq!(refused.add(one, "a.b"), Some(0));
        assert_eq!(refused.add(one, "a.b"), None);
        assert_eq!(refused.add(one, "c.d"), None, "within a second");
        assert_eq!(refused.add(SandboxId::new(2, &[0; 10]), "c.d"), Some(0), "another's");
        tokio::time::advance(PAUSE).await;
        assert_eq!(refused.add(one, "a.b"), None);
        assert_eq!(refused.add(one, "c.d"), Some(3));
        for number in 0..3000_u64 {
            refused.add(SandboxId::new(10 + number, &[0; 10]), "a.b");
        }
        assert_eq!(refused.0.lock().len(), SANDBOXES_MAX);
    }
}
