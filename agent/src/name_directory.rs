//! Directory of all named sandboxes with open ports, on all nodes, as the controller told: host names by name lead
//! through it to the owner of a sandbox. Kept in a file, so that a restart of the agent forgets none.
//!
//! Nothing is ever decided by it alone: the owner's record decides. So the file need not be durable, and the digest
//! of the whole shows the controller what got lost.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    ops::Bound,
    path::PathBuf,
};

use daemon::{
    replace::{Access, replace},
    sync::{Mutex, RwLock},
};
use proto::{
    host::{FullName, NAMES_MAX},
    id::SandboxId,
};

/// Most lines of the file beyond one for each name, before it is rewritten.
const LINES_SPARE: usize = 10_000;
/// Largest file that is read, bytes.
const FILE_MAX: u64 = 32 * 1024 * 1024;

/// Change of the directory.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// True when host names by name are answered.
    pub is_enabled: bool,
    /// Names that are dropped unless `set` has them: those after the first and up to the second.
    pub replaced: Option<Range>,
    /// Names that are dropped.
    pub removed: Vec<FullName>,
    /// Names with the sandbox that each leads to.
    pub set: BTreeMap<FullName, SandboxId>,
}

/// Range of names: after one, and up to another; `None`: without an end there.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Last name before the range.
    pub after: Option<FullName>,
    /// Last name of the range.
    pub until: Option<FullName>,
}

/// Names of sandboxes of all nodes, in memory and in a file.
#[derive(Debug)]
pub struct NameDirectory {
    path: PathBuf,
    names: RwLock<Names>,
    /// Number of lines of the file; held during a change.
    lines: Mutex<usize>,
}

#[derive(Debug, Default)]
struct Names {
    is_enabled: bool,
    ids: BTreeMap<FullName, SandboxId>,
    digest: u64,
}

impl Names {
    fn remove(&mut self, name: &FullName) -> bool {
        let Some(id) = self.ids.remove(name) else { return false };
        self.digest ^= name.digest(&id);
        true
    }

    /// Returns false when the name leads there already, or there is no room.
    fn set(&mut self, name: &FullName, id: SandboxId) -> bool {
        let before = self.ids.get(name);
        if before == Some(&id) || before.is_none() && self.ids.len() >= NAMES_MAX {
            return false;
        }
        self.remove(name);
        self.digest ^= name.digest(&id);
        self.ids.insert(name.clone(), id);
        true
    }

    /// Applies a line of the file; a line cut short by a power failure is skipped.
    fn apply_line(&mut self, line: &str) -> Option<()> {
        let mut words = line.strip_suffix(" .")?.split(' ');
        match words.next()? {
            "on" => self.is_enabled = true,
            "off" => self.is_enabled = false,
            "+" => drop(self.set(&words.next()?.parse().ok()?, words.next()?.parse().ok()?)),
            "-" => drop(self.remove(&words.next()?.parse().ok()?)),
            _ => return None,
        }
        Some(())
    }

    /// Applies a change; returns the lines that say it.
    fn apply(&mut self, update: &Update) -> String {
        let mut lines = String::new();
        if self.is_enabled != update.is_enabled {
            self.is_enabled = update.is_enabled;
            push(&mut lines, format_args!("{}", switch(update.is_enabled)));
        }
        let mut dropped: Vec<FullName> =
            update.replaced.iter().flat_map(|r| self.within(r)).collect();
        dropped.extend(update.removed.iter().cloned());
        for name in dropped.iter().filter(|name| !update.set.contains_key(*name)) {
            if self.remove(name) {
                push(&mut lines, format_args!("- {name}"));
            }
        }
        for (name, id) in &update.set {
            if self.set(name, *id) {
                push(&mut lines, format_args!("+ {name} {id}"));
            }
        }
        lines
    }

    fn within(&self, range: &Range) -> Vec<FullName> {
        let from = range.after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let to = range.until.as_ref().map_or(Bound::Unbounded, Bound::Included);
        // An empty range the wrong way round would panic.
        if range.after.is_some() && range.until.is_some() && range.after >= range.until {
            return Vec::new();
        }
        self.ids.range((from, to)).map(|(name, _)| name.clone()).collect()
    }

    /// Returns the lines of a new file.
    fn to_lines(&self) -> String {
        let mut lines = String::new();
        push(&mut lines, format_args!("{}", switch(self.is_enabled)));
        for (name, id) in &self.ids {
            push(&mut lines, format_args!("+ {name} {id}"));
        }
        lines
    }
}

const fn switch(is_enabled: bool) -> &'static str {
    if is_enabled { "on" } else { "off" }
}

/// Adds a line; its last word shows that it is complete.
fn push(lines: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(lines, "{line} .").expect("a String takes all");
}

impl NameDirectory {
    /// Reads the file. Without one, or when it cannot be read, the directory is empty until the controller has told it
    /// again.
    pub fn load(path: PathBuf) -> Self {
        let text = match crate::sys::read::whole_text(&path, FILE_MAX) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, "the names of other nodes' sandboxes are lost");
                }
                String::new()
            }
        };
        let mut names = Names::default();
        for line in text.lines() {
            if names.apply_line(line).is_none() {
                tracing::warn!("the directory of names has a line that is not complete");
            }
        }
        // More than any file has: the first change rewrites it.
        Self { path, names: RwLock::new(names), lines: Mutex::new(usize::MAX) }
    }

    /// True when host names by name are answered.
    pub fn is_enabled(&self) -> bool {
        self.names.read().is_enabled
    }

    /// Finds the sandbox that has a name, wherever it is.
    pub fn find(&self, name: &FullName) -> Option<SandboxId> {
        self.names.read().ids.get(name).copied()
    }

    /// Applies a change in memory and then to the file, and returns the digest of all names. Blocks.
    ///
    /// # Errors
    /// When the file cannot be written; in memory the change is made then, too.
    pub fn apply(&self, update: &Update) -> io::Result<u64> {
        let mut written = self.lines.lock();
        let (lines, digest, kept) = {
            let mut names = self.names.write();
            (names.apply(update), names.digest, names.ids.len())
        };
        if lines.is_empty() {
            return Ok(digest);
        }
        let before = std::mem::replace(&mut *written, usize::MAX);
        if before > kept + LINES_SPARE {
            let all = self.names.read().to_lines();
            replace(&self.path, all.as_bytes(), Access::PRIVATE)?;
            *written = kept + 1;
        } else {
            File::options().append(true).open(&self.path)?.write_all(lines.as_bytes())?;
            *written = before + lines.lines().count();
        }
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> FullName {
        text.parse().expect("a name")
    }

    fn id(number: u16) -> SandboxId {
        let [a, b] = number.to_be_bytes();
        SandboxId::new(1, &[a, b, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    fn setting(names: &[(&str, u16)]) -> Update {
        let set = names.iter().map(|(text, number)| (name(text), id(*number))).collect();
        Update { is_enabled: true, set, ..Update::default() }
    }

    fn found(directory: &NameDirectory, names: &[&str]) -> Vec<Option<SandboxId>> {
        names.iter().map(|text| directory.find(&name(text))).collect()
    }

    #[test]
    fn names_survive_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("sandbox-names");
        let directory = NameDirectory::load(path.clone());
        assert!(!directory.is_enabled());
        directory.apply(&setting(&[("a--red", 1), ("b--red", 2)])).expect("written");
        // Of the second change only the lines are appended.
        directory.apply(&setting(&[("b--red", 3), ("c--blue", 4)])).expect("written");
        let removed = vec![name("a--red"), name("x--red")];
        let digest = directory.apply(&Update { removed, ..setting(&[]) }).expect("written");
        assert_eq!(digest, name("b--red").digest(&id(3)) ^ name("c--blue").digest(&id(4)));
        let text = std::fs::read_to_string(&path).expect("a file");
        assert_eq!(text.lines().count(), 6, "{text}");
        // What a power failure cut short is skipped.
        std::fs::write(&path, format!("{text}+ d--red pvelxc-01")).expect("written");
        let again = NameDirectory::load(path);
        let names = ["a--red", "b--red", "c--blue", "d--red"];
        assert_eq!(found(&again, &names), [None, Some(id(3)), Some(id(4)), None]);
        assert!(again.is_enabled());
        assert_eq!(again.apply(&setting(&[])).expect("nothing to write"), digest);
    }

    #[test]
    fn range_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let directory = NameDirectory::load(dir.path().join("sandbox-names"));
        let all = [("z--blue", 1), ("a--red", 2), ("b--red", 3), ("c--red", 4), ("d--red", 5)];
        directory.apply(&setting(&all)).expect("written");
        let range = |after: &str, until: &str| {
            let end = |text: &str| (!text.is_empty()).then(|| name(text));
            Some(Range { after: end(after), until: end(until) })
        };
        let replaced = range("a--red", "c--red");
        directory.apply(&Update { replaced, ..setting(&[("c--red", 6)]) }).expect("written");
        let names = ["z--blue", "a--red", "b--red", "c--red", "d--red"];
        let expected = [Some(id(1)), Some(id(2)), None, Some(id(6)), Some(id(5))];
        assert_eq!(found(&directory, &names), expected);
        // The wrong way round, or without anything between, it is empty.
        for (after, until) in [("d--red", "a--red"), ("a--red", "a--red")] {
            let replaced = range(after, until);
            directory.apply(&Update { replaced, ..setting(&[]) }).expect("nothing to write");
        }
        assert_eq!(found(&directory, &names), expected);
        let everything = Update { replaced: range("", ""), ..Update::default() };
        assert_eq!(directory.apply(&everything).expect("written"), 0);
        assert_eq!(found(&directory, &names), [None; 5]);
        assert!(!directory.is_enabled());
    }

    #[test]
    fn file_stays_small_and_is_written_again_after_a_failure() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("missing/sandbox-names");
        let directory = NameDirectory::load(path.clone());
        directory.apply(&setting(&[("a--red", 1)])).expect_err("there is no directory");
        assert_eq!(directory.find(&name("a--red")), Some(id(1)), "it counts all the same");
        std::fs::create_dir(dir.path().join("missing")).expect("made");
        for number in 0..12_000 {
            directory.apply(&setting(&[("b--red", number)])).expect("written");
        }
        let again = NameDirectory::load(path.clone());
        assert_eq!(found(&again, &["a--red", "b--red"]), [Some(id(1)), Some(id(11_999))]);
        let lines = std::fs::read_to_string(&path).expect("a file").lines().count();
        assert!(lines < LINES_SPARE, "{lines}");
    }

    #[test]
    fn directory_is_bounded() {
        let mut names = Names::default();
        let full = |number: usize| name(&format!("a{number}--red"));
        for number in 0..NAMES_MAX {
            assert!(names.set(&full(number), id(1)));
        }
        assert!(!names.set(&full(NAMES_MAX), id(1)), "there is no room");
        assert!(names.set(&full(0), id(2)), "a name that is there may change");
        assert!(names.remove(&full(1)) && names.set(&full(NAMES_MAX), id(1)));
    }

    #[test]
    fn file_with_something_else_is_an_empty_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("sandbox-names");
        for bytes in [&b"\xff\xfe"[..], b"+ .\n+ a--red .\n- .\n .\n\non\n", b"+ a-red x .\n"] {
            std::fs::write(&path, bytes).expect("written");
            let directory = NameDirectory::load(path.clone());
            assert_eq!(directory.apply(&Update::default()).expect("nothing to write"), 0);
        }
    }
}
