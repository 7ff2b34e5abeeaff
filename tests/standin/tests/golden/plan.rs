//! Plan for the replay of a transcript: its fixture, and what each command needs.
//!
//! ```text
//! fixture                      shell lines up to "end", run before the first command
//! skip-plain 60-84             commands that need running containers
//! faults 3 [JSON]              the fault plan for a command
//! before 20 SHELL              a shell line before a command
//! edit 3 |from|to|             a literal replacement in a command's text
//! drop 20 TEXT                 ignores lines that contain TEXT ("=TEXT": that equal TEXT)
//! unordered 3                  ignores the order of lines
//! either 3 |A|B|               also accepts output with the two words exchanged
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub fixture: String,
    pub needs_lxc: BTreeSet<usize>,
    pub faults: BTreeMap<usize, String>,
    pub before: BTreeMap<usize, Vec<String>>,
    pub edits: Vec<(Lines, String, String)>,
    pub drops: Vec<(Lines, String)>,
    pub unordered: BTreeSet<usize>,
    pub either: BTreeMap<usize, (String, String)>,
}

/// A range of line numbers, or all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lines(usize, usize);

impl Lines {
    pub(crate) fn contains(self, line: usize) -> bool {
        (self.0..=self.1).contains(&line)
    }

    fn parse(text: &str) -> Self {
        if text == "*" {
            return Self(0, usize::MAX);
        }
        let (from, to) = text.split_once('-').unwrap_or((text, text));
        let number = |n: &str| n.parse().unwrap_or_else(|_| panic!("{text} is no line number"));
        Self(number(from), number(to))
    }
}

/// Reads a plan; returns none if the file is missing.
pub(crate) fn read(path: &Path) -> Option<Plan> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut plan = Plan::default();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        if line == "fixture" {
            for line in lines.by_ref().take_while(|line| *line != "end") {
                plan.fixture.push_str(line);
                plan.fixture.push('\n');
            }
            continue;
        }
        plan.take(line);
    }
    Some(plan)
}

impl Plan {
    fn take(&mut self, line: &str) {
        let mut words = line.splitn(3, ' ');
        let (word, range) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let rest = words.next().unwrap_or("").to_owned();
        let numbers = |range: &str| {
            let lines = Lines::parse(range);
            lines.0..=lines.1
        };
        match word {
            "skip-plain" => {
                let ranges = line.split(' ').skip(1);
                self.needs_lxc.extend(ranges.flat_map(numbers));
            }
            "unordered" => self.unordered.extend(numbers(range)),
            "faults" => {
                self.faults.insert(Lines::parse(range).0, rest);
            }
            "before" => self.before.entry(Lines::parse(range).0).or_default().push(rest),
            "drop" => self.drops.push((Lines::parse(range), rest)),
            "edit" => {
                let (from, to) = pair(&rest);
                self.edits.push((Lines::parse(range), from, to));
            }
            "either" => {
                self.either.insert(Lines::parse(range).0, pair(&rest));
            }
            _ => panic!("a plan says {line:?}"),
        }
    }

    /// Returns the command as it is run here.
    pub(crate) fn edited(&self, line: usize, text: &str) -> String {
        let mut text = text.to_owned();
        for (lines, from, to) in &self.edits {
            if lines.contains(line) {
                text = text.replace(from, to);
            }
        }
        text
    }

    /// Returns whether a line of output is compared.
    pub(crate) fn counts(&self, line: usize, said: &str) -> bool {
        let fits = |text: &str| match text.strip_prefix('=') {
            Some(whole) => said == whole,
            None => said.contains(text),
        };
        !self.drops.iter().any(|(lines, text)| lines.contains(line) && fits(text))
    }
}

/// Parses `|from|to|`; the first character is the separator.
fn pair(text: &str) -> (String, String) {
    let separator = text.chars().next().expect("a pair has a separator");
    let mut parts = text.split(separator).skip(1);
    let mut next = || parts.next().unwrap_or("").replace("\\n", "\n");
    (next(), next())
}
