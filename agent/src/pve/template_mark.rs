//! The line in a template's description by which the agent finds it, so that no `[[template]]` has to
//! be written: `pve-sandbox-template:v1 snapshot=debian-12 cores=1 memory_mib=512 http=8000/`. Pure.

use std::{collections::BTreeMap, fmt, str::FromStr};

use proto::{
    name::{Port, SnapshotId},
    spec::limit,
};

const HEAD: &str = "pve-sandbox-template:v1";

/// Line of a template that is being made: it may be removed by whoever makes it again.
pub const UNFINISHED: &str = "pve-sandbox-template:v1 unfinished";

/// Settings of a snapshot that its template carries itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateMark {
    /// Name of the snapshot.
    pub snapshot: SnapshotId,
    /// Default number of cores of a sandbox.
    pub cores: u32,
    /// Default memory of a sandbox, MiB.
    pub memory_mib: u32,
    /// Port and path that answer when a sandbox is ready; the path starts with a slash.
    pub http: Option<(Port, String)>,
}

impl fmt::Display for TemplateMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { snapshot, cores, memory_mib, http } = self;
        write!(f, "{HEAD} snapshot={snapshot} cores={cores} memory_mib={memory_mib}")?;
        match http {
            Some((port, path)) => write!(f, " http={port}{path}"),
            None => Ok(()),
        }
    }
}

/// Error: the text is no such line of a known version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the mark of a template")]
pub struct NotAMark;

impl FromStr for TemplateMark {
    type Err = NotAMark;

    fn from_str(line: &str) -> Result<Self, NotAMark> {
        let mark = Self::with_any_name(line)?;
        (!mark.snapshot.is_reserved()).then_some(mark).ok_or(NotAMark)
    }
}

impl TemplateMark {
    /// Finds the mark in a (decoded) description. `None` when there are two: somebody edited it.
    pub fn find(description: &str) -> Option<Self> {
        let mut marks = description.lines().filter_map(|line| line.parse().ok());
        let mark = marks.next()?;
        marks.next().is_none().then_some(mark)
    }

    /// Finds the snapshot of a line that is no mark only because no template may have this name.
    pub fn reserved(description: &str) -> Option<SnapshotId> {
        let marks = description.lines().filter_map(|line| Self::with_any_name(line).ok());
        marks.map(|mark| mark.snapshot).find(SnapshotId::is_reserved)
    }

    /// Reads a line, also with a name that no template may have.
    fn with_any_name(line: &str) -> Result<Self, NotAMark> {
        let mut words = line.trim().split(' ');
        if words.next() != Some(HEAD) {
            return Err(NotAMark);
        }
        let mut fields = BTreeMap::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or(NotAMark)?;
            // A repeated key means that somebody edited it; keys of a later version are ignored.
            if fields.insert(key, value).is_some() {
                return Err(NotAMark);
            }
        }
        let field = |key| fields.get(key).copied().ok_or(NotAMark);
        let http = match fields.get("http") {
            Some(http) => {
                let slash = http.find('/').ok_or(NotAMark)?;
                let (port, path) = http.split_at(slash);
                Some((port.parse().map_err(|_| NotAMark)?, path.to_owned()))
            }
            None => None,
        };
        let snapshot: SnapshotId = field("snapshot")?.parse().map_err(|_| NotAMark)?;
        let cores = field("cores")?.parse().map_err(|_| NotAMark)?;
        let memory_mib = field("memory_mib")?.parse().map_err(|_| NotAMark)?;
        let fits =
            (1..=limit::CORES_MAX).contains(&cores) && limit::MEMORY_MIB.contains(&memory_mib);
        fits.then_some(Self { snapshot, cores, memory_mib, http }).ok_or(NotAMark)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mark(http: Option<(u16, &str)>) -> TemplateMark {
        let port = |port: u16| Port::try_from(u32::from(port)).expect("a port");
        let http = http.map(|(number, path)| (port(number), path.to_owned()));
        let snapshot = "debian-12".parse().expect("valid");
        TemplateMark { snapshot, cores: 2, memory_mib: 1024, http }
    }

    #[test]
    fn mark_is_found_among_other_lines() {
        for mark in [mark(None), mark(Some((8000, "/"))), mark(Some((1, "/a/b")))] {
            let text = format!("a note\n{mark}\nmore");
            assert_eq!(TemplateMark::find(&text), Some(mark.clone()), "{text}");
            assert_eq!(TemplateMark::find(&format!("{text}\n{mark}")), None, "two");
            let later = format!("{mark} more=1");
            assert_eq!(later.parse(), Ok(mark));
        }
        assert_eq!(TemplateMark::find(UNFINISHED), None);
        let none = mark(None).to_string().replace("cores=2", "cores=0");
        assert_eq!(TemplateMark::find(&none), None, "no size of a sandbox");
        let reserved = mark(None).to_string().replace("debian-12", SnapshotId::ADOPTED);
        assert_eq!(TemplateMark::find(&reserved), None, "a name that no template may have");
        let name = TemplateMark::reserved(&format!("a note\n{reserved}"));
        assert_eq!(name.as_ref().map(SnapshotId::as_str), Some(SnapshotId::ADOPTED));
        assert_eq!(TemplateMark::reserved(&format!("{}\n{none}", mark(None))), None);
        assert!(!super::super::Mark::resembles(UNFINISHED), "no sandbox");
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(
            line in "(pve-sandbox-template:v1)?( ?(snapshot|cores|memory_mib|http)=[ -~]{0,8}){0,5}"
        ) {
            if let Ok(mark) = line.parse::<TemplateMark>() {
                prop_assert_eq!(mark.to_string().parse(), Ok(mark));
            }
        }
    }
}
