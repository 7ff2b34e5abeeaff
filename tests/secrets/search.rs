//! The table of inputs and places, and the search.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

/// Input of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Input {
    EnvName,
    Env,
    FirstFile,
    Metadata,
    ExecEnv,
    Argv,
    Stdin,
    WrittenFile,
    Refused,
    WrongToken,
    /// Bytes of WriteExecStdin.
    WrittenStdin,
    /// Content of a file in an uploaded archive.
    Archive,
    /// Bytes of a forward, both ways.
    Forward,
    /// Variable of an SSH session.
    SshEnv,
    /// Command line of an SSH session.
    SshLine,
    /// Stdin of a command of an SSH session.
    SshStdin,
    /// Content of a file that is written by SFTP.
    SftpFile,
    /// Name of that file.
    SftpName,
    /// Secret of a token. This and those below are made by the product itself.
    Token,
    /// Secret of a node's one-time token.
    JoinToken,
    /// Credential for an open port.
    AccessLink,
}

/// Place where the product writes or shows something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// State directory of the agent: its journal.
    Journal,
    /// Directory of the shims: exec_ids, outputs.
    Shims,
    /// Database of the controller, with the event log.
    Store,
    Audit,
    /// Log of everything, at the level TRACE.
    Log,
    /// Errors, as callers and logs get them.
    Errors,
    /// Command lines of the processes of this machine.
    CommandLines,
    /// Answers of lists and of the sandbox itself.
    Lists,
}

/// Where an input may be seen, and why. It must not be seen anywhere else.
const ALLOWED: &[(Input, Place, &str)] = &[
    (Input::Metadata, Place::Journal, "the truth about a sandbox; lists are filtered by it"),
    (Input::Metadata, Place::Store, "known also while its node is down"),
    (Input::Metadata, Place::Lists, "callers put it there to see it in lists"),
    (Input::Argv, Place::CommandLines, "the command's own, as any process shows its own"),
    (Input::Argv, Place::Lists, "the list of commands says what runs"),
    (Input::SshLine, Place::CommandLines, "the command's own, and its client's"),
    (Input::SshLine, Place::Lists, "the list of commands says what runs"),
];

impl Input {
    const ALL: [Self; 18] = [
        Self::EnvName,
        Self::Env,
        Self::FirstFile,
        Self::Metadata,
        Self::ExecEnv,
        Self::Argv,
        Self::Stdin,
        Self::WrittenFile,
        Self::Refused,
        Self::WrongToken,
        Self::WrittenStdin,
        Self::Archive,
        Self::Forward,
        Self::SshEnv,
        Self::SshLine,
        Self::SshStdin,
        Self::SftpFile,
        Self::SftpName,
    ];

    /// Text that only this input has.
    pub(crate) fn canary(self) -> String {
        format!("canary5e1f{self:?}")
    }
}

/// Inputs that were searched for, with what was found of them.
pub(crate) struct Search {
    canaries: Vec<(Input, String)>,
    found: BTreeSet<(Input, Place)>,
}

impl Search {
    pub(crate) fn new(token_secret: &str) -> Self {
        let all = Input::ALL.map(|input| (input, input.canary()));
        let token = (Input::Token, token_secret.to_owned());
        Self { canaries: all.into_iter().chain([token]).collect(), found: BTreeSet::new() }
    }

    /// Adds a secret that the product has made: it is looked for from here on.
    pub(crate) fn add(&mut self, input: Input, secret: &str) {
        self.canaries.push((input, secret.to_owned()));
    }

    /// Looks for every input in some bytes of a place.
    pub(crate) fn look(&mut self, place: Place, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        for (input, canary) in &self.canaries {
            // Also as `Debug` shows bytes.
            let numbers = format!("{:?}", canary.as_bytes());
            if text.contains(canary) || text.contains(numbers.trim_matches(['[', ']'])) {
                self.found.insert((*input, place));
            }
        }
    }

    /// Looks into all files of a directory.
    pub(crate) fn look_into(&mut self, place: Place, dir: &Path) {
        for path in files(dir) {
            // One may have gone meanwhile.
            self.look(place, &std::fs::read(&path).unwrap_or_default());
        }
    }

    /// Looks at the command lines of this machine.
    pub(crate) fn look_at_processes(&mut self) {
        for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
            let line = std::fs::read(entry.path().join("cmdline"));
            self.look(Place::CommandLines, &line.unwrap_or_default());
        }
    }

    /// Compares what was found with the table. What the table allows must be there too: else the
    /// search would be worth nothing.
    pub(crate) fn judge(&self) {
        let allowed: BTreeSet<_> =
            ALLOWED.iter().map(|(input, place, _)| (*input, *place)).collect();
        let leaks: Vec<_> = self.found.difference(&allowed).collect();
        assert!(leaks.is_empty(), "secrets are where they must not be: {leaks:?}");
        let missing: Vec<_> = allowed.difference(&self.found).collect();
        assert!(missing.is_empty(), "the search does not find what is there: {missing:?}");
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).expect("listed").flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => all.extend(files(&entry.path())),
            Ok(kind) if kind.is_file() => all.push(entry.path()),
            Ok(_) | Err(_) => {}
        }
    }
    all
}

/// Log of the whole process, in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Records everything that is logged from here on, at every level.
    pub(crate) fn start() -> Self {
        let log = Self::default();
        let recorder = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE);
        recorder.with_ansi(false).with_writer(log.clone()).init();
        log
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().expect("no panic").clone()
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
