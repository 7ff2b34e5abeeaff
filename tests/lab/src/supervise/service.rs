//! What a service is, as data.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

/// A program that is kept running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name in orders and in the file names of its log.
    pub name: String,
    /// The program, by absolute path, and its arguments.
    pub argv: Vec<String>,
    /// Its whole environment, but for PATH, HOME and NOTIFY_SOCKET.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where stdout and stderr go, at the end of what is there.
    pub log: PathBuf,
    /// When it is started again by itself.
    #[serde(default)]
    pub restart: Restart,
    /// It says READY=1 over NOTIFY_SOCKET; else it is ready as soon as it runs.
    #[serde(default)]
    pub notify: bool,
    /// It starts with its supervisor.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// The named network namespace that it runs in, if not its supervisor's.
    #[serde(default)]
    pub netns: Option<String>,
}

fn yes() -> bool {
    true
}

/// When a service is started again by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it did not exit with 0.
    OnFailure,
    /// However it ended.
    Always,
}

/// How a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It does not run and will not by itself.
    Stopped,
    /// It runs and has not said that it is ready.
    Starting,
    /// It runs.
    Ready,
    /// It ended and is about to be started again.
    Waiting,
}

/// How a service is, for the one who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: State,
    /// Its process, as its supervisor sees it.
    pub pid: Option<i32>,
    /// How often it was started again by itself.
    pub restarts: u32,
    /// How it ended last: `exit code 1`, `killed by SIGKILL`.
    pub last_end: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    service: Vec<Service>,
}

/// Reads a list of services; a missing file is an empty list.
pub fn load(file: &Path) -> Result<Vec<Service>> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(format!("cannot read {}", file.display())),
    };
    let parsed: File =
        toml::from_str(&text).with_context(|| format!("{} is broken", file.display()))?;
    parsed.service.iter().try_for_each(check)?;
    Ok(parsed.service)
}

/// Writes a list of services.
pub fn save(file: &Path, services: &[Service]) -> Result<()> {
    let text = toml::to_string(&File { service: services.to_vec() })?;
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = file.with_extension("new");
    fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, file).with_context(|| format!("cannot write {}", file.display()))
}

/// A service's name is part of paths.
pub fn check(service: &Service) -> Result<()> {
    let name = &service.name;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if name.is_empty() || !name.bytes().all(plain) {
        bail!("{name:?} is no name for a service: letters, digits, - and _ only");
    }
    if !service.argv.first().is_some_and(|program| program.starts_with('/')) {
        bail!("service {name}: the program must be named by its absolute path");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_survives_the_disk() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("sub/services.toml");
        assert_eq!(load(&file).expect("missing is empty"), []);
        let service = Service {
            name: "agent".to_owned(),
            argv: vec!["/bin/true".to_owned(), "a b".to_owned()],
            env: BTreeMap::from([("K".to_owned(), "V=\"1\"\n".to_owned())]),
            log: PathBuf::from("/var/log/lab/agent.log"),
            restart: Restart::OnFailure,
            notify: true,
            autostart: false,
            netns: Some("x".to_owned()),
        };
        save(&file, std::slice::from_ref(&service)).expect("saved");
        assert_eq!(load(&file).expect("loaded"), std::slice::from_ref(&service));
        let bad = Service { name: "a/b".to_owned(), ..service.clone() };
        assert!(check(&bad).is_err());
        assert!(check(&Service { argv: vec!["true".to_owned()], ..service }).is_err());
    }
}
