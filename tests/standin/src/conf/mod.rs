//! Grammar of `ID.conf`: parses it, changes it, writes it as PVE does.
//!
//! A file is a main part, then sections: `[pve:pending]` and one per snapshot. In each, leading `#`
//! lines are the description, `key: value` lines are sorted, raw `lxc.*` lines come last.

pub mod encode;
pub mod net;
pub mod values;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::failure::ignore;

/// Name of the section with changes that take effect at the next start.
const PENDING: &str = "pve:pending";

/// One part of a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Section {
    /// Text of the comment lines, each followed by a newline.
    pub description: Option<String>,
    /// Settings (`key: value`).
    pub keys: BTreeMap<String, String>,
    /// Raw LXC settings (`lxc.key: value`), in the order of the file.
    pub lxc: Vec<(String, String)>,
}

/// A whole `ID.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conf {
    /// Current settings.
    pub main: Section,
    /// Changes that take effect at the next start.
    pub pending: Option<Section>,
    /// One section per snapshot.
    pub snapshots: BTreeMap<String, Section>,
    /// Warnings of the parser; not written back.
    pub warnings: Vec<Warning>,
}

/// A line that the parser rejects or warns about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// A line that is no setting; the next write drops it.
    Line(String),
    /// A setting with a bad value; the setting is kept.
    Value {
        /// Name of the setting.
        key: String,
        /// Description of the error.
        complaint: String,
    },
}

impl Warning {
    /// Returns the text for stderr.
    #[must_use]
    pub fn text(&self, vmid: u32) -> String {
        match self {
            Self::Line(line) => format!("vm {vmid} - unable to parse config: {line}"),
            Self::Value { key, complaint } => {
                format!("vm {vmid} - unable to parse value of '{key}' - {complaint}")
            }
        }
    }
}

impl Section {
    /// Returns the value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.keys.get(key).map(String::as_str)
    }

    /// Returns whether a boolean key is on.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(|v| v == "1")
    }

    /// Returns the value of a key as a whole number, if it is one.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key)?.parse().ok()
    }

    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.keys.insert(key.to_owned(), value.into());
    }

    /// Returns the keys that are a stem and a number, in order: `net` gives `net0`...
    pub fn numbered<'a>(&'a self, stem: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.keys.iter().filter_map(move |(key, value)| {
            let number = key.strip_prefix(stem)?;
            let all_digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            all_digits.then_some((key.as_str(), value.as_str()))
        })
    }

    /// Returns the lines that `pct config` prints.
    #[must_use]
    pub fn listing(&self) -> Vec<(String, String)> {
        let mut lines: BTreeMap<String, String> = self.keys.clone();
        if let Some(description) = &self.description {
            lines.insert("description".to_owned(), encode::encode(description));
        }
        lines.into_iter().chain(self.lxc.iter().cloned()).collect()
    }

    fn write(&self, out: &mut String) {
        for line in self.description.as_deref().unwrap_or("").trim_end_matches('\n').split('\n') {
            if self.description.as_deref().is_some_and(|d| !d.trim_end_matches('\n').is_empty()) {
                ignore(writeln!(out, "#{}", encode::encode(line)));
            }
        }
        for (key, value) in &self.keys {
            ignore(writeln!(out, "{key}: {value}"));
        }
        for (key, value) in &self.lxc {
            ignore(writeln!(out, "{key}: {value}"));
        }
    }
}

impl Conf {
    /// Parses a file. Bad lines become warnings, as in the real `pct`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        let mut section = Section::default();
        let mut name: Option<String> = None;
        for line in text.lines() {
            if let Some(next) = heading(line) {
                conf.keep(name.take(), std::mem::take(&mut section));
                name = Some(next.to_owned());
            } else if let Some(warning) = section.read_line(line) {
                conf.warnings.push(warning);
            }
        }
        conf.keep(name, section);
        conf
    }

    fn keep(&mut self, name: Option<String>, section: Section) {
        match name {
            None => self.main = section,
            Some(name) if name == PENDING => self.pending = Some(section),
            Some(name) => {
                self.snapshots.insert(name, section);
            }
        }
    }

    /// Returns the text of the file.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.main.write(&mut out);
        let pending = self.pending.iter().filter(|p| !p.keys.is_empty());
        let sections = pending
            .map(|section| (PENDING, section))
            .chain(self.snapshots.iter().map(|(name, section)| (name.as_str(), section)));
        for (name, section) in sections {
            ignore(writeln!(out, "\n[{name}]"));
            section.write(&mut out);
        }
        out
    }

    /// Returns the main part with the pending changes applied, as `pct config` shows it.
    #[must_use]
    pub fn with_pending(&self) -> Section {
        let mut section = self.main.clone();
        let Some(pending) = &self.pending else { return section };
        for key in self.pending_deletes() {
            section.keys.remove(&key);
        }
        for (key, value) in pending.keys.iter().filter(|(k, _)| *k != "delete") {
            section.set(key, value.clone());
        }
        section
    }

    /// Returns the keys that the next start removes.
    #[must_use]
    pub fn pending_deletes(&self) -> Vec<String> {
        let list = self.pending.as_ref().and_then(|p| p.get("delete")).unwrap_or("");
        list.split(',').filter(|k| !k.is_empty()).map(str::to_owned).collect()
    }

    /// Applies the pending changes; returns whether there were any.
    pub fn apply_pending(&mut self) -> bool {
        if self.pending.is_none() {
            return false;
        }
        self.main = self.with_pending();
        self.pending = None;
        true
    }
}

impl Section {
    fn read_line(&mut self, line: &str) -> Option<Warning> {
        if let Some(comment) = line.strip_prefix('#') {
            let text = self.description.get_or_insert_default();
            text.push_str(&encode::decode(comment.trim_end()));
            text.push('\n');
            return None;
        }
        if line.trim().is_empty() {
            return None;
        }
        let Some((key, value)) = line.split_once([':', '=']) else {
            return Some(Warning::Line(line.to_owned()));
        };
        let (key, value) = (key.trim_end(), value.trim());
        if key.starts_with("lxc.") {
            self.lxc.push((key.to_owned(), value.to_owned()));
            return None;
        }
        let known = line.as_bytes().get(key.len()) == Some(&b':') && values::is_key(key);
        if !known || value.is_empty() {
            return Some(Warning::Line(line.to_owned()));
        }
        self.set(key, value);
        let complaint = values::complaint_when_read(key, value)?;
        Some(Warning::Value { key: key.to_owned(), complaint })
    }
}

fn heading(line: &str) -> Option<&str> {
    let name = line.trim_end().strip_prefix('[')?.strip_suffix(']')?;
    let body = if name == PENDING { "pending" } else { name };
    values::is_snapshot_name(body).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "#running\narch: amd64\nfeatures: nesting=1\nmemory: 600\nparent: s2\n\
        lxc.cgroup2.devices.allow: c 10:200 rwm\n\n[pve:pending]\ndelete: features\nmemory: 700\n\
        \n[s1]\n#first snap\narch: amd64\nsnaptime: 1795446858\n\n[s2]\narch: amd64\nparent: s1\n";

    #[test]
    fn config_file_is_written_back_unchanged() {
        assert_eq!(Conf::parse(FILE).text(), FILE);
    }

    #[test]
    fn a_comment_in_the_middle_joins_the_description() {
        let conf = Conf::parse("#desc\n#second\narch: amd64\n# hand comment\nmemory: 1\n");
        assert_eq!(conf.text(), "#desc\n#second\n# hand comment\narch: amd64\nmemory: 1\n");
    }

    #[test]
    fn pending_changes_are_shown_and_applied() {
        let mut conf = Conf::parse(FILE);
        assert_eq!(conf.with_pending().get("memory"), Some("700"));
        assert_eq!(conf.with_pending().get("features"), None);
        assert_eq!(conf.main.get("features"), Some("nesting=1"));
        assert!(conf.apply_pending());
        assert!(!conf.text().contains("pending"));
    }

    #[test]
    fn bad_lines_are_reported_and_unknown_ones_dropped() {
        let conf = Conf::parse("arch: amd64\ngarbage line\nmemory: abc\n");
        let said: Vec<_> = conf.warnings.iter().map(|w| w.text(302)).collect();
        assert_eq!(
            said,
            [
                "vm 302 - unable to parse config: garbage line",
                "vm 302 - unable to parse value of 'memory' - type check ('integer') failed - got 'abc'",
            ]
        );
        assert_eq!(conf.text(), "arch: amd64\nmemory: abc\n");
    }

    #[test]
    fn an_empty_description_line_stays() {
        let conf = Conf::parse("## Sandbox\n#\n#x\narch: amd64\n");
        assert_eq!(conf.main.description.as_deref(), Some("# Sandbox\n\nx\n"));
        assert_eq!(conf.text(), "## Sandbox\n#\n#x\narch: amd64\n");
    }
}
