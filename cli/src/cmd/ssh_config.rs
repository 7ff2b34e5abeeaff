//! `ssh-config`: the lines for OpenSSH by which `ssh NAME` reaches a sandbox.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use clap::Args;
use daemon::replace::{Access, replace};
use proto::{
    id::SandboxId,
    name::SandboxName,
    sandbox::v1::{GetVersionRequest, ListSandboxesRequest, Phase, Sandbox, SshServer},
};
use serde_json::json;

use super::ssh_key::home;
use crate::{
    client::{Controller, list_all, read},
    failure::Failure,
    output::Output,
};

/// Directory of our files below ~/.ssh.
const DIR: &str = "sandboxctl";
/// Line in ~/.ssh/config that reads our files.
const INCLUDE: &str = "Include ~/.ssh/sandboxctl/*.conf";
/// Files that nobody else reads.
const PRIVATE: Access = Access { mode: 0o600, group: None };
/// Most bytes of ~/.ssh/config.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Arguments of `ssh-config`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ssh-config          print the lines
  sandboxctl ssh-config --write  write them, and read them from ~/.ssh/config
  ssh web                        then: the sandbox that is named web
  ssh web.sbx                    the same, where web is a Host of your own
  scp file web:/root/ ; sftp web ; ssh -L 8080:localhost:80 web

Run it again after sandboxes have come or gone. Your key must be known:
`sandboxctl ssh-key add`.")]
pub(crate) struct SshConfig {
    /// Write ~/.ssh/sandboxctl/HOST.conf and its host key, and include it in ~/.ssh/config
    #[arg(long)]
    write: bool,
    /// Private key to log in with [default: those that ssh finds]
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
}

pub(super) async fn run(
    controller: Controller,
    args: SshConfig,
    output: Output,
) -> Result<u8, Failure> {
    let place = Place::of(&controller).await?;
    let mut sandboxes = list_all(&controller, ListSandboxesRequest::default()).await?;
    sandboxes.retain(|sandbox| !matches!(sandbox.phase(), Phase::Deleted | Phase::Failed));
    let main = place.main();
    let (own, _) = read_config(&main).map_err(|error| {
        let message = format!("cannot read {}: {error}", main.display());
        Failure::usage(message, "sandboxes must not take the names of your own hosts")
    })?;
    let (lines, taken) = place.config(&sandboxes, &own, args.identity.as_deref())?;
    for name in taken {
        output.note(format!("{name} is a Host in {}: use `ssh {name}.sbx`", main.display()));
    }
    if args.write {
        place.write(&lines).map_err(|(path, error)| {
            let message = format!("cannot write {}: {error}", path.display());
            Failure::usage(message, "without --write the lines are printed")
        })?;
    }
    if output.json {
        output.value(&json!({
            "host": place.host, "port": place.server.port, "host_key": place.server.host_key,
            "known_hosts": place.known_hosts(),
            "config": lines,
            "file": args.write.then(|| place.file("conf").to_string_lossy().into_owned()),
        }))?;
    } else if args.write {
        let count = sandboxes.len();
        output.line(format!("wrote {}: {count} sandboxes", place.file("conf").display()))?;
    } else {
        output.line(lines.trim_end())?;
        output.note(format!("the host key, for {}:", place.file("known_hosts").display()));
        output.note(place.known_hosts());
    }
    Ok(0)
}

/// SSH server, and where its files are.
pub(super) struct Place {
    host: String,
    server: SshServer,
    dir: PathBuf,
}

impl Place {
    /// Asks the controller for its SSH server.
    pub(super) async fn of(controller: &Controller) -> Result<Self, Failure> {
        let call = || {
            let mut client = controller.operator.clone();
            async move { client.get_version(GetVersionRequest {}).await }
        };
        let server = read(call).await?.ssh.ok_or_else(|| {
            Failure::usage(
                "the controller has no SSH server",
                "an operator switches it on: `[ssh]` in controller.toml",
            )
        })?;
        Self::new(&controller.address, server, home()?.join(".ssh").join(DIR))
    }

    /// Checks what the controller says of itself: it is written to files that `ssh` obeys.
    fn new(address: &str, server: SshServer, dir: PathBuf) -> Result<Self, Failure> {
        let own = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = if server.host.is_empty() { own } else { &server.host };
        let host = host.trim_matches(['[', ']']).to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let key = |c: char| c.is_ascii_alphanumeric() || "-+/= @.".contains(c);
        let is_good = !host.is_empty()
            && !host.starts_with('-')
            && host.chars().all(plain)
            && server.host_key.chars().all(key)
            && (1..=65_535).contains(&server.port);
        if !is_good {
            return Err(Failure::local(
                "the controller told of its SSH server in a form that is not safe to use",
            ));
        }
        Ok(Self { host, server, dir })
    }

    fn alias(&self) -> String {
        format!("sandboxctl-{}-{}", self.host.replace(':', "_"), self.server.port)
    }

    fn file(&self, ending: &str) -> PathBuf {
        self.dir.join(format!("{}.{ending}", self.alias()))
    }

    /// Line of the host key.
    fn known_hosts(&self) -> String {
        format!("{} {}", self.alias(), self.server.host_key)
    }

    /// Returns ssh's own configuration.
    fn main(&self) -> PathBuf {
        self.dir.parent().unwrap_or(&self.dir).join("config")
    }

    /// Returns lines for ssh's configuration, and the names that the user's own one has already.
    fn config(
        &self,
        sandboxes: &[Sandbox],
        own: &str,
        identity: Option<&Path>,
    ) -> Result<(String, Vec<String>), Failure> {
        let mut text = String::from("# Written by `sandboxctl ssh-config`.\n");
        let (mut all, mut taken) = (Vec::new(), Vec::new());
        let patterns = patterns(own);
        for Sandbox { id, name, .. } in sandboxes {
            let is_good = id.parse::<SandboxId>().is_ok()
                && (name.is_empty() || name.parse::<SandboxName>().is_ok());
            if !is_good {
                return Err(Failure::local(
                    "the controller told of a sandbox in a form that is not safe to use",
                ));
            }
            let mut names = Vec::new();
            if name.is_empty() {
                names.extend([id.clone(), format!("{id}.sbx")]);
            } else if patterns.iter().any(|pattern| matches(pattern.as_bytes(), name.as_bytes())) {
                taken.push(name.clone());
                names.extend([format!("{name}.sbx"), id.clone()]);
            } else {
                names.extend([name.clone(), format!("{name}.sbx"), id.clone()]);
            }
            text.push_str(&format!("Host {}\n  User {id}\n", names.join(" ")));
            all.extend(names);
        }
        if all.is_empty() {
            return Ok((text, taken));
        }
        text.push_str(&format!("Host {}\n", all.join(" ")));
        for (name, value) in self.options(identity) {
            text.push_str(&format!("  {name} {value}\n"));
        }
        Ok((text, taken))
    }

    /// Returns the options of `ssh` that lead to any sandbox, and pin the host key.
    pub(super) fn options(&self, identity: Option<&Path>) -> Vec<(&'static str, String)> {
        let quoted = |path: &Path| format!("\"{}\"", path.display());
        let mut options = vec![
            ("HostName", self.host.clone()),
            ("Port", self.server.port.to_string()),
            ("HostKeyAlias", self.alias()),
            ("UserKnownHostsFile", quoted(&self.file("known_hosts"))),
            ("StrictHostKeyChecking", "yes".to_owned()),
            ("ForwardAgent", "no".to_owned()),
            ("ForwardX11", "no".to_owned()),
        ];
        if let Some(identity) = identity {
            options.push(("IdentityFile", quoted(identity)));
            options.push(("IdentitiesOnly", "yes".to_owned()));
        }
        options
    }

    /// Writes the host key where the options say that it is.
    pub(super) fn write_known_hosts(&self) -> Result<(), (PathBuf, io::Error)> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(at(&self.dir))?;
        let known = self.file("known_hosts");
        let line = format!("{}\n", self.known_hosts());
        replace(&known, line.as_bytes(), PRIVATE).map_err(at(&known))
    }

    fn write(&self, lines: &str) -> Result<(), (PathBuf, io::Error)> {
        self.write_known_hosts()?;
        let conf = self.file("conf");
        replace(&conf, lines.as_bytes(), PRIVATE).map_err(at(&conf))?;
        let main = self.main();
        include(&main).map_err(at(&main))
    }
}

/// Names the path of a failure.
fn at(path: &Path) -> impl FnOnce(io::Error) -> (PathBuf, io::Error) + use<> {
    let path = path.to_owned();
    move |error| (path, error)
}

/// Returns the patterns of the lines `Host` of a configuration, in lower case, but for those of all hosts.
fn patterns(config: &str) -> Vec<String> {
    let hosts = config.lines().filter_map(|line| {
        let (word, rest) = line.trim().split_once([' ', '\t', '='])?;
        word.eq_ignore_ascii_case("host").then_some(rest)
    });
    let all = hosts.flat_map(|rest| rest.split([' ', '\t', '=', '"']));
    // What is left out by `!` is no host of the line.
    let own =
        all.filter(|one| !one.starts_with('!') && one.contains(|c: char| c != '*' && c != '?'));
    own.map(str::to_ascii_lowercase).collect()
}

/// Returns true when a pattern with `*` and `?` matches a name.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // A star that comes later decides alone: the earlier ones have matched as little as they can.
    let (mut at, mut seen, mut star) = (0, 0, None);
    while seen < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((last, from)) = star else { return false };
                star = Some((last, from + 1));
                (at, seen) = (last + 1, from + 1);
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// Reads ssh's configuration, and its mode. Empty where there is none.
fn read_config(path: &Path) -> io::Result<(String, u32)> {
    let mut text = String::new();
    let mut mode = 0o600;
    match File::open(path) {
        Ok(file) => {
            mode = file.metadata()?.permissions().mode() & 0o7777;
            let read = file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)? as u64;
            if read > CONFIG_BYTES_MAX {
                return Err(io::Error::other("it is too large"));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok((text, mode))
}

/// Lets ssh's configuration read our files: before its first `Host`, where it holds for all hosts.
fn include(path: &Path) -> io::Result<()> {
    // A link to a file elsewhere stays one.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let (text, mode) = read_config(path)?;
    if text.lines().any(|line| line.trim() == INCLUDE) {
        return Ok(());
    }
    let text = format!("{INCLUDE}\n\n{text}");
    replace(path, text.as_bytes(), Access { mode, group: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(dir: &Path) -> Place {
        let host_key = "ssh-ed25519 AAAA".to_owned();
        let server = SshServer { host: String::new(), port: 2222, host_key };
        Place::new("api.test:7443", server, dir.join("sandboxctl")).expect("good")
    }

    const ID: &str = "pvelxc-01h455vb4peh5vsknk084sn02q";
    const OTHER: &str = "pvelxc-01h455vb4peh5vsknk084sn03q";

    fn sandbox(id: &str, name: &str) -> Sandbox {
        Sandbox { id: id.into(), name: name.into(), ..Sandbox::default() }
    }

    #[test]
    fn name_and_id_lead_to_the_sandbox_with_the_host_key_pinned() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = [sandbox(ID, "web"), sandbox(OTHER, "")];
        let made = place(dir.path()).config(&all, "Host *\n  User me\n", Some(Path::new("/k")));
        let (text, taken) = made.expect("good");
        assert!(taken.is_empty(), "{taken:?}");
        assert!(text.contains(&format!("Host web web.sbx {ID}\n  User {ID}\n")), "{text}");
        let common = format!(
            "Host web web.sbx {ID} {OTHER} {OTHER}.sbx\n  HostName api.test\n  Port 2222\n"
        );
        assert!(text.contains(&common), "{text}");
        assert!(
            text.contains("HostKeyAlias sandboxctl-api.test-2222")
                && text.contains("IdentitiesOnly")
        );
    }

    #[test]
    fn sandbox_does_not_take_the_name_of_a_host_of_the_user() {
        let dir = tempfile::tempdir().expect("a directory");
        for (own, is_taken) in [
            ("Host prod\n", true),
            ("  host=PROD other\n", true),
            ("Host a \"pro?\"\n", true),
            ("Host\tp*d\n", true),
            ("Host *\nHost !prod *.test\nHostName prod\n", false),
            ("Host production p*x pro\n", false),
        ] {
            let made = place(dir.path()).config(&[sandbox(ID, "prod")], own, None);
            let (text, taken) = made.expect("good");
            assert_eq!(taken.len(), usize::from(is_taken), "{own}");
            let line = if is_taken { "Host prod.sbx" } else { "Host prod prod.sbx" };
            assert!(text.contains(&format!("{line} {ID}\n")), "{own}: {text}");
        }
    }

    #[test]
    fn sandbox_whose_id_or_name_is_none_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        for (id, name) in [("sb1", "web"), (ID, "*"), (ID, "web\n  ProxyCommand x")] {
            let made = place(dir.path()).config(&[sandbox(id, name)], "", None);
            assert!(made.is_err(), "{id} {name:?}");
        }
    }

    #[test]
    fn configuration_of_the_user_is_kept_and_changed_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("config");
        fs::write(&config, "Host mine\n  User me\n").expect("written");
        for _ in 0..2 {
            place(dir.path()).write("lines\n").expect("written");
        }
        let text = fs::read_to_string(&config).expect("read");
        assert_eq!(text, format!("{INCLUDE}\n\nHost mine\n  User me\n"));
        let known = dir.path().join("sandboxctl/sandboxctl-api.test-2222.known_hosts");
        let known = fs::read_to_string(known).expect("read");
        assert_eq!(known, "sandboxctl-api.test-2222 ssh-ed25519 AAAA\n");
    }

    #[test]
    fn answer_that_would_change_the_configuration_is_refused() {
        for (host, port, key) in [
            ("a\n  ProxyCommand x", 22, "ssh-ed25519 AAAA"),
            ("-oProxyCommand=x", 22, "ssh-ed25519 AAAA"),
            ("a", 22, "ssh-ed25519 AAAA\n* x"),
            ("a", 0, "ssh-ed25519 AAAA"),
        ] {
            let server = SshServer { host: host.into(), port, host_key: key.into() };
            assert!(Place::new("api.test:7443", server, PathBuf::new()).is_err(), "{host:?}");
        }
    }
}
