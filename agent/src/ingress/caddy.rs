//! Files of Caddy: its configuration, and beside it the proof that the agent's answers carry.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use daemon::replace::Access;
use data_encoding::HEXLOWER;
use http::HeaderValue;

use super::{render, settings::Settings, version::Generation};
use crate::sys::read;

/// Secret by which Caddy recognizes the agent's answers: random, known only to these two.
///
/// The previous proof stays valid, so that a Caddy that still runs the previous configuration gets
/// its routes until it is restarted.
#[derive(Clone, PartialEq, Eq)]
pub struct Proof(Vec<HeaderValue>);

/// Most proofs that are valid: the current and the previous one.
const PROOFS: usize = 2;

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proof(..)")
    }
}

impl Proof {
    /// Reads the proof beside a configuration; makes one where there is none. A present one is kept, so that a
    /// Caddy that runs keeps its routes.
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds something else.
    pub fn ensure(config: &Path) -> io::Result<Self> {
        match Self::read(config) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => return read,
        }
        let mut random = [0u8; 32];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let fresh = HEXLOWER.encode(&random);
        // The Caddy that runs may use the one in its configuration, until it is replaced.
        let proofs: Vec<_> = [Some(fresh), written(config)].into_iter().flatten().collect();
        replace(&proof_path(config), 0o600, None, proofs.join("\n").as_bytes())?;
        Self::read(config)
    }

    /// Reads the proof beside a configuration. Its file has the extension `proof`, mode 0600.
    ///
    /// # Errors
    /// When the file cannot be read or holds no proof.
    pub fn read(config: &Path) -> io::Result<Self> {
        let path = proof_path(config);
        let text = read::whole_text(&path, read::SMALL).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        let proofs: Vec<_> = text.lines().take(PROOFS).map(secret).collect::<Result<_, _>>()?;
        if proofs.is_empty() {
            return Err(io::Error::other(format!("{} holds no proof", path.display())));
        }
        Ok(Self(proofs))
    }

    /// Returns the current proof, which a configuration written now contains.
    fn newest(&self) -> &str {
        // `read` accepts only hexadecimal digits, and at least one line of them.
        self.0.first().and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub(super) fn values(&self) -> &[HeaderValue] {
        &self.0
    }
}

/// Returns the proof in a configuration that was written before.
fn written(config: &Path) -> Option<String> {
    let text = read::whole_text(config, read::LARGE).ok()?;
    let (_, after) = text.split_once("\"X-Sbx-Proof\"")?;
    let quoted = after.split('"').nth(1)?;
    secret(quoted).is_ok().then(|| quoted.to_owned())
}

fn secret(line: &str) -> io::Result<HeaderValue> {
    if line.len() != 64 || !line.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(io::Error::other("a proof is 64 hexadecimal digits"));
    }
    let mut value = HeaderValue::try_from(line).map_err(io::Error::other)?;
    value.set_sensitive(true);
    Ok(value)
}

fn proof_path(config: &Path) -> PathBuf {
    config.with_extension("proof")
}

/// Renders the configuration as text, with a placeholder for the proof.
pub fn show(settings: &Settings) -> String {
    pretty(settings, "(made when the file is written)")
}

/// Renders the configuration as text, with the current proof.
pub fn text(settings: &Settings, proof: &Proof) -> String {
    pretty(settings, proof.newest())
}

/// Replaces a configuration of Caddy, or another file for it: mode 0640 for the group that Caddy runs as.
///
/// # Errors
/// When the file cannot be written, or the group does not exist.
pub fn put(path: &Path, text: &str, group: Option<&str>) -> io::Result<()> {
    replace(path, 0o640, group, text.as_bytes())
}

/// Returns true when Caddy's configuration has these settings and the agent's current proof.
///
/// A configuration in the form for any version of Caddy counts.
///
/// # Errors
/// When the configuration or the proof cannot be read.
pub fn is_current(settings: &Settings, path: &Path) -> io::Result<bool> {
    let (there, proof) = (read::whole_text(path, read::LARGE)?, Proof::read(path)?);
    let form = |generation| text(&Settings { generation, ..settings.clone() }, &proof);
    Ok(Generation::ALL.into_iter().any(|generation| there == form(generation)))
}

/// Reason why the ingress would not start. Its certificates are checked elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// There is no such group.
    #[error("there is no group {0}")]
    NoGroup(String),
    /// The group cannot be looked up.
    #[error("the group {0} cannot be looked up: {1}")]
    Group(String, String),
    /// The folder of Caddy's configuration is missing.
    #[error("there is no folder {}", .0.display())]
    NoFolder(PathBuf),
    /// The file of the proof has something else in it.
    #[error("{why}; remove {}", .path.display())]
    Proof {
        /// File.
        path: PathBuf,
        /// Error of its content.
        why: String,
    },
    /// Caddy's group cannot read a file.
    #[error("Caddy cannot read {}: give it to ingress.group, mode 0640", .path.display())]
    Unreadable {
        /// File.
        path: PathBuf,
        /// Caddy's group.
        group: String,
    },
}

impl Obstacle {
    /// Returns the setting that it is about.
    pub const fn setting(&self) -> &'static str {
        match self {
            Self::NoGroup(_) | Self::Group(..) => "ingress.group",
            Self::NoFolder(_) | Self::Proof { .. } => "ingress.caddy_config",
            Self::Unreadable { .. } => "ingress.tls",
        }
    }

    /// Returns the command that takes it out of the way.
    pub fn remedy(&self) -> String {
        match self {
            Self::NoGroup(group) => format!("groupadd --system {group}"),
            Self::Group(group, _) => format!("getent group {group}"),
            Self::NoFolder(path) => format!("mkdir -p {}", path.display()),
            Self::Proof { path, .. } => format!("rm {}", path.display()),
            Self::Unreadable { path, group } => {
                let path = path.display();
                format!("chgrp {group} {path}; chmod 0640 {path}")
            }
        }
    }
}

/// Lists what would prevent the ingress from starting with these settings, but for its certificates.
pub fn obstacles(settings: &Settings, path: &Path, group: Option<&str>) -> Vec<Obstacle> {
    let mut found = Vec::new();
    let gid = match group.map(|name| (name, nix::unistd::Group::from_name(name))) {
        None => None,
        Some((name, Ok(Some(group)))) => Some((name, group.gid)),
        Some((name, Ok(None))) => {
            found.push(Obstacle::NoGroup(name.to_owned()));
            None
        }
        Some((name, Err(error))) => {
            found.push(Obstacle::Group(name.to_owned(), error.to_string()));
            None
        }
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        found.push(Obstacle::NoFolder(folder.to_owned()));
    }
    if let Err(error) = Proof::read(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        found.push(Obstacle::Proof { path: proof_path(path), why: error.to_string() });
    }
    if let (Some(peers), Some((group, gid))) = (&settings.peers, gid) {
        let files = [&peers.ca, &peers.cert, &peers.key].map(|path| Path::new(path.as_str()));
        let unreadable = files.into_iter().filter(|path| !may_read(path, gid));
        let obstacle = |path: &Path| {
            let (path, group) = (path.to_owned(), group.to_owned());
            Obstacle::Unreadable { path, group }
        };
        found.extend(unreadable.map(obstacle));
    }
    found
}

/// Returns true when a group can read a file, or the file does not exist.
fn may_read(path: &Path, group: nix::unistd::Gid) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(about) = std::fs::metadata(path) else { return true };
    let all = about.mode() & 0o004 != 0;
    all || (about.mode() & 0o040 != 0 && about.gid() == group.as_raw())
}

fn pretty(settings: &Settings, proof: &str) -> String {
    format!("{:#}\n", render::render(settings, proof))
}

/// Replaces a file that this group may read.
fn replace(path: &Path, mode: u32, group: Option<&str>, bytes: &[u8]) -> io::Result<()> {
    let group = group.map(|name| {
        let found = nix::unistd::Group::from_name(name)?;
        found.ok_or_else(|| io::Error::other(format!("there is no group {name}")))
    });
    let group = group.transpose()?.map(|group| group.gid.as_raw());
    daemon::replace::replace(path, bytes, Access { mode, group })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{
        super::settings::{Certificate, CertificateFiles, Peers, PlainPath, Secure},
        *,
    };

    fn settings() -> Settings {
        let path = |text: &str| text.parse().expect("a path");
        Settings {
            domain: "sbx.test".parse().expect("a domain"),
            public: vec!["127.0.0.1:8480".parse().expect("an address")],
            route_socket: path("/run/pve-sandbox/route.sock"),
            https: true,
            secure: None,
            frames: true,
            cors: true,
            access_log: Some(path("/var/log/pve-sandbox-ingress/access.log")),
            generation: Generation::Before,
            peers: Some(Peers {
                listen: "10.99.0.1:8481".parse().expect("an address"),
                ca: path("/etc/pve-sandbox/ingress/ca.crt"),
                cert: path("/etc/pve-sandbox/ingress/node.crt"),
                key: path("/etc/pve-sandbox/ingress/node.key"),
            }),
        }
    }

    #[test]
    fn rendered_configuration_matches_the_tested_one() {
        insta::assert_snapshot!(show(&settings()));
    }

    #[test]
    fn listener_with_a_certificate_of_ones_own_routes_as_the_public_one_and_trusts_nobody() {
        let copy = "/etc/pve-sandbox/caddy-certificate.pem";
        let files = CertificateFiles {
            cert: "/etc/ssl/own.crt".into(),
            key: "/etc/ssl/own.key".into(),
            copy: copy.parse().expect("a path"),
        };
        let own = Secure {
            listen: vec!["0.0.0.0:443".parse().expect("an address")],
            redirect: Vec::new(),
            certificate: Certificate::Files(files),
        };
        let all = |https| -> serde_json::Value {
            let secure = Some(own.clone());
            let text = show(&Settings { secure, https, ..settings() });
            serde_json::from_str(&text).expect("JSON")
        };
        let servers = all(true)["apps"]["http"]["servers"].clone();
        let trusted = r#""trusted_proxies":["127.0.0.0/8","::1/128"]"#;
        let public = servers["public"]["routes"].to_string();
        assert!(public.matches(trusted).count() > 3, "{public}");
        let public = public.replace(trusted, r#""trusted_proxies":[]"#);
        let mut secure = servers["secure"]["routes"].clone();
        let handlers = secure[0]["handle"].as_array_mut().expect("handlers");
        let forgets = handlers.remove(1);
        assert!(forgets["request"]["delete"].to_string().contains("X-Forwarded-*"), "{forgets}");
        assert_eq!(secure.to_string(), public);
        // Its clients use https, also where those of the public one do not.
        let proto = r#""X-Forwarded-Proto":["https"]"#;
        let servers = all(false)["apps"]["http"]["servers"].clone();
        assert!(servers["secure"].to_string().contains(proto));
        assert!(!servers["public"].to_string().contains(proto));
        // The operator's own files are not named.
        assert!(!all(true).to_string().contains("/etc/ssl"));
        let files = all(true)["apps"]["tls"]["certificates"]["load_files"].clone();
        assert_eq!((&files[0]["certificate"], &files[0]["key"]), (&copy.into(), &copy.into()));
        assert_eq!(files[1]["tags"], serde_json::json!(["peer"]));
    }

    #[test]
    fn configuration_of_a_lone_node_has_no_peers() {
        let alone = Settings { peers: None, ..settings() };
        let text = show(&alone);
        for word in ["8481", "\"peer\"", "\"tls\""] {
            assert!(!text.contains(word), "{word}");
        }
    }

    #[test]
    fn files_are_readable_only_by_caddy_and_the_agent() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("caddy.json");
        let mode =
            |path: &Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o7777;
        assert!(Proof::read(&path).is_err());
        let proof = Proof::ensure(&path).expect("made");
        assert_eq!(Proof::ensure(&path).expect("kept"), proof);
        put(&path, &text(&settings(), &proof), None).expect("written");
        assert_eq!((mode(&path), mode(&path.with_extension("proof"))), (0o640, 0o600));
        let written = std::fs::read_to_string(&path).expect("readable");
        assert!(written.contains(proof.newest()));
        assert!(!format!("{proof:?}").contains(proof.newest()));
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 2);

        // A fresh one is made where it was removed, and a Caddy that runs keeps its routes.
        std::fs::remove_file(path.with_extension("proof")).expect("removed");
        let fresh = Proof::ensure(&path).expect("made");
        assert_eq!(fresh.values().len(), 2);
        assert_eq!(fresh.values()[1], proof.values()[0]);
        assert_ne!(fresh.values()[0], proof.values()[0]);

        // One of the version before is valid beside the current one.
        let both = format!("{}\n{}", "a".repeat(64), proof.newest());
        std::fs::write(path.with_extension("proof"), both).expect("written");
        let two = Proof::read(&path).expect("two");
        assert_eq!(two.values().len(), 2);
        assert_eq!(two.values()[1], proof.values()[0]);
        // A malformed proof is somebody's mistake and is not overwritten.
        std::fs::write(path.with_extension("proof"), "short").expect("written");
        Proof::ensure(&path).expect_err("no proof");
    }

    #[test]
    fn configuration_is_current_in_the_form_for_any_caddy() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("caddy.json");
        let proof = Proof::ensure(&path).expect("made");
        is_current(&settings(), &path).expect_err("none is there");
        for generation in Generation::ALL {
            let settings = Settings { generation, ..settings() };
            put(&path, &text(&settings, &proof), None).expect("written");
            assert!(is_current(&settings, &path).expect("read"), "{generation:?}");
        }
        let other = Settings { domain: "other.test".parse().expect("a domain"), ..settings() };
        assert!(!is_current(&other, &path).expect("read"));
    }

    #[test]
    fn obstacles_to_the_ingress_are_reported() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("caddy.json");
        let alone = Settings { peers: None, ..settings() };
        assert_eq!(obstacles(&alone, &path, None), []);
        assert_eq!(obstacles(&alone, &path, Some("root")), []);
        let told = |settings: &Settings, path: &Path, group| {
            let all = obstacles(settings, path, group);
            all.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        assert!(told(&alone, &path, Some("no-such-group")).contains("no group no-such-group"));
        let nowhere = dir.path().join("nowhere/caddy.json");
        assert!(told(&alone, &nowhere, None).contains("no folder"));
        std::fs::write(path.with_extension("proof"), "short").expect("written");
        assert!(told(&alone, &path, None).contains("remove "));
        std::fs::remove_file(path.with_extension("proof")).expect("removed");

        // A key that only its owner can read.
        let file = |name: &str| dir.path().join(name);
        let plain = |name: &str| PlainPath::try_from(file(name).as_path()).expect("a path");
        let listen = "10.99.0.1:8481".parse().expect("an address");
        let peers = Peers { listen, ca: plain("ca"), cert: plain("crt"), key: plain("key") };
        let settings = Settings { peers: Some(peers), ..alone };
        assert_eq!(obstacles(&settings, &path, Some("root")), [], "nothing is there yet");
        for name in ["ca", "crt", "key"] {
            std::fs::write(file(name), "x").expect("written");
        }
        let mode = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file("key"), mode).expect("changed");
        };
        mode(0o600);
        assert!(told(&settings, &path, Some("root")).contains("Caddy cannot read"));
        mode(0o644);
        assert!(!told(&settings, &path, Some("root")).contains("Caddy cannot read"));
    }
}
