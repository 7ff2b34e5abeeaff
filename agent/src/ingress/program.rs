//! Caddy's program: asks for its version, and lets it check a configuration. Each call is bounded in time.

use std::{ffi::OsString, io, path::PathBuf, time::Duration};

use tokio::time::Instant;

use super::version::Version;
use crate::run::{Exit, Finished, Program, Runner};

/// Path of Debian's Caddy.
pub const CADDY: &str = "/usr/bin/caddy";
/// Program that starts another one as another user.
const SETPRIV: &str = "/usr/bin/setpriv";
/// Program that sets variables for another one.
const ENV: &str = "/usr/bin/env";
/// Longest run of one call. On a busy host Caddy needs a second.
const DEADLINE: Duration = Duration::from_secs(20);
/// Most bytes of Caddy's explanation that are told.
const EXPLANATION_MAX: usize = 600;

/// Caddy's program on this host.
#[derive(Debug, Clone)]
pub struct Caddy {
    /// Its path.
    pub path: PathBuf,
    /// Runner of its commands.
    pub runner: Runner,
    /// User and group that Caddy runs as; `None`: those of this process.
    pub user: Option<(u32, u32)>,
}

impl Caddy {
    /// Returns the version of the program that is installed.
    ///
    /// # Errors
    /// When it cannot be started, does not end in time, or prints something else.
    pub async fn version(&self) -> io::Result<Version> {
        let finished = self.run(vec![OsString::from("version")]).await?;
        finished.stdout.parse().map_err(io::Error::other)
    }

    /// Lets Caddy check a configuration, as the user that it runs as: so files that it cannot read are
    /// found, too.
    ///
    /// # Errors
    /// Says what is wrong with the configuration, or why it was not checked.
    pub async fn validate(&self, config: &std::path::Path) -> Result<(), String> {
        let words = ["validate", "--config"].map(OsString::from);
        let words = words.into_iter().chain([config.into()]).collect();
        let finished = self.run(words).await.map_err(|error| error.to_string())?;
        match finished.exit {
            Exit::Code(0) => Ok(()),
            Exit::Code(_) | Exit::Signal(_) => Err(explanation(&finished)),
        }
    }

    /// Returns whether the program was built with a module.
    ///
    /// # Errors
    /// When it cannot be started, does not end in time, or fails.
    pub async fn has_module(&self, module: &str) -> io::Result<bool> {
        let finished = self.run(vec![OsString::from("list-modules")]).await?;
        match finished.exit {
            Exit::Code(0) => Ok(lists(&finished.stdout, module)),
            Exit::Code(_) | Exit::Signal(_) => Err(io::Error::other(explanation(&finished))),
        }
    }

    async fn run(&self, words: Vec<OsString>) -> io::Result<Finished> {
        // It makes directories where these lead. Nothing is to be kept.
        let mut argv: Vec<OsString> = ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"]
            .map(|name| format!("{name}=/dev/null").into())
            .into();
        argv.push(self.path.clone().into());
        argv.extend(words);
        let path = match self.user {
            None => ENV,
            Some((user, group)) => {
                let ids = [format!("--reuid={user}"), format!("--regid={group}")];
                let ids = ids
                    .into_iter()
                    .chain(["--clear-groups", "--no-new-privs", ENV].map(str::to_owned));
                argv.splice(0..0, ids.map(OsString::from));
                SETPRIV
            }
        };
        let program = Program { path: path.into(), arguments: argv };
        let finished = self.runner.run(program, Instant::now() + DEADLINE).await;
        finished.map_err(io::Error::other)
    }
}

/// Returns whether a list of modules, as `caddy list-modules` prints it, has a module.
pub fn lists(modules: &str, module: &str) -> bool {
    modules.lines().any(|line| line.split_whitespace().next() == Some(module))
}

/// Returns Caddy's reason: the last line that it printed.
fn explanation(finished: &Finished) -> String {
    let lines = finished.stderr.lines().chain(finished.stdout.lines());
    let last = lines.rev().find(|line| line.contains("rror")).unwrap_or_default();
    let end = last.char_indices().map(|(at, _)| at).nth(EXPLANATION_MAX).unwrap_or(last.len());
    format!("Caddy refuses it: {}", &last[..end])
}

/// Returns user and group of Caddy: the group of the configuration, and the user of the same name.
pub fn user_of(group: Option<&str>) -> Option<(u32, u32)> {
    let name = group?;
    let group = nix::unistd::Group::from_name(name).ok().flatten()?;
    let user = nix::unistd::User::from_name(name).ok().flatten()?;
    Some((user.uid.as_raw(), group.gid.as_raw()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn caddy(script: &str, dir: &std::path::Path) -> Caddy {
        let path = dir.join("caddy");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("set");
        let runner =
            Runner::new(dir.join("output"), "/proc".into(), |_| false, 1).expect("a runner");
        Caddy { path, runner, user: None }
    }

    #[tokio::test]
    async fn program_that_is_missing_or_says_nothing_has_no_version() {
        let dir = tempfile::tempdir().expect("a directory");
        let good = caddy("echo v2.11.7 h1:x", dir.path());
        assert_eq!(good.version().await.expect("a version"), Version::FIXED);
        caddy("exit 1", dir.path()).version().await.expect_err("none");
        let missing = Caddy { path: dir.path().join("none"), ..good };
        missing.version().await.expect_err("none");
    }

    #[tokio::test]
    async fn module_is_there_only_under_its_whole_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let listing = "test $1 = list-modules && printf 'http\\n\\n  Standard modules: 1\\n\\ndns.providers.cloudflare v1\\n'";
        let some = caddy(listing, dir.path());
        assert!(some.has_module("dns.providers.cloudflare").await.expect("told"));
        for other in ["dns.providers.cloud", "dns.providers", "v1", "dns.providers.hetzner"] {
            assert!(!some.has_module(other).await.expect("told"), "{other}");
        }
        caddy("exit 1", dir.path()).has_module("http").await.expect_err("not told");
    }

    #[tokio::test]
    async fn refusal_tells_the_reason_of_caddy() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("caddy.json");
        let good =
            caddy("test \"$1 $2\" = 'validate --config' && test \"$HOME\" = /dev/null", dir.path());
        assert_eq!(good.validate(&config).await, Ok(()));
        let bad = caddy("echo one >&2; echo Error: unknown field >&2; exit 1", dir.path());
        let why = bad.validate(&config).await.expect_err("refused");
        assert_eq!(why, "Caddy refuses it: Error: unknown field");
    }
}
