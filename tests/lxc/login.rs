//! Keys of the team, and logins with OpenSSH's client to any of its sandboxes, by id.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::world::{Caller, World, ran, unique};

/// Longest login with its command, in seconds.
const LOGIN_S: &str = "10";

/// SSH key of the team in a home directory of its own, until this is dropped.
pub(crate) struct Key {
    name: String,
    home: TempDir,
    caller: Caller,
}

impl Key {
    /// Makes a key and adds it to the team.
    pub(crate) fn new(world: &World) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let key = Self { name: unique("key"), home, caller: world.caller() };
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(key.file())
            .status()
            .expect("openssh-client is installed");
        assert!(made.success());
        let public = key.file().with_extension("pub");
        let added = world.ctl(&["ssh-key", "add", &public.to_string_lossy(), "--name", &key.name]);
        assert_eq!(added.code, 0, "{}", added.stderr);
        key
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Returns the path of the private key.
    pub(crate) fn file(&self) -> PathBuf {
        self.home().join("id_ed25519")
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        let (code, _, why) = self.caller.ctl(&["ssh-key", "rm", &self.name]);
        // The test may have removed it. A second panic would end the other tests, too.
        let is_gone = code == 0 || why.contains("TOKEN_NOT_FOUND");
        assert!(is_gone || thread::panicking(), "{why}");
    }
}

/// A key of the team, and the options with which OpenSSH's client uses it.
pub(crate) struct Logins {
    host: String,
    options: Vec<String>,
    _key: Key,
}

impl Logins {
    /// Makes a key and adds it to the team.
    pub(crate) fn new(world: &World) -> Self {
        let key = Key::new(world);
        let (file, known) = (key.file(), key.home().join("known_hosts"));
        // It looks at ~/.ssh/config, and this machine's is nobody's business here.
        let mut ask = world.command(&["--json", "ssh-config"]);
        let told = ran(ask.env("HOME", key.home()).output().expect("sandboxctl"));
        assert_eq!(told.code, 0, "{}", told.stderr);
        let server: Value = serde_json::from_slice(&told.stdout).expect("JSON");
        let line = server["known_hosts"].as_str().expect("the host key");
        fs::write(&known, format!("{line}\n")).expect("written");
        let alias = line.split(' ').next().expect("a name");
        let mut options = vec!["-F".to_owned(), "/dev/null".to_owned(), "-i".to_owned()];
        options.extend([file.display().to_string(), "-p".into(), server["port"].to_string()]);
        for option in [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=yes",
            &format!("HostKeyAlias={alias}"),
            &format!("UserKnownHostsFile={}", known.display()),
        ] {
            options.extend(["-o".to_owned(), option.to_owned()]);
        }
        let host = server["host"].as_str().expect("an address").to_owned();
        Self { host, options, _key: key }
    }

    /// Returns the output of a command in a sandbox, or `None` if the login or the command fails or takes too long.
    pub(crate) fn run(&self, id: &str, line: &str) -> Option<String> {
        let mut ssh = Command::new("timeout");
        ssh.args(["-k", "5", LOGIN_S, "ssh"]).args(&self.options);
        ssh.arg(format!("{id}@{}", self.host)).arg(line).stdin(Stdio::null());
        let ran = ssh.output().expect("ssh starts");
        ran.status.success().then(|| String::from_utf8_lossy(&ran.stdout).into_owned())
    }
}
