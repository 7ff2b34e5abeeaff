//! Changes by hand of configuration files that the agent keeps: which file it put back, and when. Operators see
//! them as an event of the node, in `doctor` and in the agent's counters. Kept in a file, which `doctor` and the
//! next agent read.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use daemon::{
    replace::{Access, replace},
    sync::Mutex,
};

use crate::sys::read;

/// Name of the file, in the agent's run directory.
pub const FILE: &str = "hand-edits.json";
/// Time for which a change is told, milliseconds: a day.
const TOLD_MS: u64 = 24 * 3_600_000;

/// Files that were changed by hand, each with the time at which it was put back last, milliseconds since 1970.
pub type Edits = BTreeMap<String, u64>;

/// Changes by hand of one node's files.
#[derive(Debug, Default)]
pub struct HandEdits {
    /// File that has them, too; `None` keeps them in memory only.
    file: Option<PathBuf>,
    held: Mutex<Held>,
    /// Locked for a write of the file, which is slow; before `held`.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Held {
    edits: Edits,
    /// Number of changes since the start of the agent.
    count: u64,
}

impl HandEdits {
    /// Begins with what the previous agent has left in this file.
    pub fn load(file: PathBuf, now_ms: u64) -> Self {
        let edits = recent(&file, now_ms);
        Self {
            file: Some(file),
            held: Mutex::new(Held { edits, count: 0 }),
            writing: Mutex::default(),
        }
    }

    /// Logs and records that a file was changed by hand, and was put back.
    pub fn put_back(&self, path: &Path, now_ms: u64) {
        tracing::warn!(
            path = %path.display(),
            "a configuration file was changed by hand, and was put back"
        );
        {
            let mut held = self.held.lock();
            held.count = held.count.saturating_add(1);
            held.edits.retain(|_, at_ms| is_recent(*at_ms, now_ms));
            held.edits.insert(path.display().to_string(), now_ms);
        }
        let Some(file) = &self.file else { return };
        // Every report reads `held`, so it is not locked during the write.
        let _writing = self.writing.lock();
        let edits = self.held.lock().edits.clone();
        let left = serde_json::to_vec(&edits)
            .map_err(std::io::Error::other)
            .and_then(|bytes| replace(file, &bytes, Access::PRIVATE));
        if let Err(error) = left {
            tracing::warn!(path = %file.display(), %error, "could not write the file in which doctor reads this");
        }
    }

    /// Returns the changes of the last day.
    pub fn recent(&self, now_ms: u64) -> Edits {
        let held = self.held.lock();
        let recent = held.edits.iter().filter(|(_, at_ms)| is_recent(**at_ms, now_ms));
        recent.map(|(file, at_ms)| (file.clone(), *at_ms)).collect()
    }

    /// Returns the number of changes since the start of the agent.
    pub fn count(&self) -> u64 {
        self.held.lock().count
    }
}

/// Reads the changes of the last day; none where the file cannot be read.
pub fn recent(file: &Path, now_ms: u64) -> Edits {
    let bytes = read::whole(file, read::SMALL).unwrap_or_default();
    let mut edits: Edits = serde_json::from_slice(&bytes).unwrap_or_default();
    edits.retain(|_, at_ms| is_recent(*at_ms, now_ms));
    edits
}

fn is_recent(at_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(at_ms) < TOLD_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn change_by_hand_is_told_for_a_day_and_over_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE);
        let edits = HandEdits::load(file.clone(), 0);
        assert_eq!((edits.recent(0), edits.count()), (Edits::new(), 0));
        edits.put_back(Path::new("/etc/caddy.json"), 1000);
        edits.put_back(Path::new("/etc/caddy.json"), 2000);
        let told = Edits::from([("/etc/caddy.json".to_owned(), 2000)]);
        assert_eq!((edits.recent(2000), edits.count()), (told.clone(), 2));
        assert_eq!(recent(&file, 1999 + TOLD_MS), told, "as doctor reads it");
        assert_eq!(recent(&file, 2000 + TOLD_MS), Edits::new());
        let next = HandEdits::load(file.clone(), 3000);
        assert_eq!((next.recent(3000), next.count()), (told, 0));
        // Those that are not told any more are forgotten.
        next.put_back(Path::new("/etc/config.yml"), 2000 + TOLD_MS);
        assert_eq!(recent(&file, 0).into_keys().collect::<Vec<_>>(), ["/etc/config.yml"]);
        std::fs::write(&file, "not json").expect("written");
        assert_eq!(recent(&file, 0), Edits::new());
    }

    #[test]
    fn change_by_hand_can_be_read_while_the_file_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE);
        let edits = HandEdits::load(file.clone(), 0);
        std::thread::scope(|scope| {
            let writing = edits.writing.lock();
            scope.spawn(|| edits.put_back(Path::new("/etc/caddy.json"), 1000));
            for _ in 0..1_000_000 {
                if !edits.recent(1000).is_empty() {
                    break;
                }
                std::thread::yield_now();
            }
            let told = edits.recent(1000).len();
            let left = recent(&file, 1000).len();
            drop(writing);
            assert_eq!((told, left), (1, 0));
        });
        assert_eq!(recent(&file, 1000).len(), 1);
    }
}
