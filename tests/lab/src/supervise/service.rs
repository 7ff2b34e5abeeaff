//! Definition and state of a service, as data.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

/// A program that the supervisor keeps running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Name in orders and in the file names of the log.
    pub name: String,
    /// Absolute path of the program, and its arguments.
    pub argv: Vec<String>,
    /// Whole environment, except for PATH, HOME and NOTIFY_SOCKET.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// File to which stdout and stderr are appended.
    pub log: PathBuf,
    /// Policy of automatic restarts.
    #[serde(default)]
    pub restart: Restart,
    /// Whether the service sends READY=1 over NOTIFY_SOCKET; otherwise it is ready once it runs.
    #[serde(default)]
    pub notify: bool,
    /// Whether the service starts with its supervisor.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Named network namespace of the service, if not its supervisor's.
    #[serde(default)]
    pub netns: Option<String>,
    /// Share of the CPUs beside the other services, as `CPUWeight=` of its unit: 1 to 10000, usually 100.
    #[serde(default)]
    pub cpu_weight: Option<u32>,
}

fn yes() -> bool {
    true
}

/// Policy of automatic restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    No,
    /// After an exit code other than 0 or a signal.
    OnFailure,
    /// After every end.
    Always,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not running, with no start pending.
    Stopped,
    /// Running, but not ready yet.
    Starting,
    /// Running and ready.
    Ready,
    /// Ended, with a restart pending.
    Waiting,
}

/// Report on a service in an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub name: String,
    pub state: State,
    /// Pid as the supervisor sees it.
    pub pid: Option<i32>,
    /// Number of automatic restarts.
    pub restarts: u32,
    /// Last end: `exit code 1`, `killed by SIGKILL`.
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

/// Checks the name of a service, which becomes part of paths.
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
    fn service_list_round_trips_through_its_file() {
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
            cpu_weight: Some(1000),
        };
        save(&file, std::slice::from_ref(&service)).expect("saved");
        assert_eq!(load(&file).expect("loaded"), std::slice::from_ref(&service));
        let bad = Service { name: "a/b".to_owned(), ..service.clone() };
        assert!(check(&bad).is_err());
        assert!(check(&Service { argv: vec!["true".to_owned()], ..service }).is_err());
    }
}
