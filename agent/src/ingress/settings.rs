//! Settings from which Caddy's configuration is rendered.

use std::{fmt, net::SocketAddr, path::Path, str::FromStr};

use proto::id::Invalid;

use super::{decide::Domain, version::Generation};

/// Settings of Caddy's configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    pub domain: Domain,
    /// Addresses where clients reach Caddy; behind a tunnel, a port of loopback.
    pub public: Vec<SocketAddr>,
    /// Socket of the agent's route server.
    pub route_socket: PlainPath,
    /// True when clients use https, although Caddy itself is reached by plain HTTP.
    pub https: bool,
    /// True when pages of sandboxes may be shown in frames of other sites, whatever they say themselves.
    pub frames: bool,
    /// True when scripts of other sites may read and call servers that say nothing about that.
    pub cors: bool,
    /// Peer settings; `None` where there are no other nodes.
    pub peers: Option<Peers>,
    /// File for a line about each request; `None`: there is no access log.
    pub access_log: Option<PlainPath>,
    /// Form of the configuration, by the version of Caddy.
    pub generation: Generation,
}

/// Settings of requests between nodes: TLS with certificates of a dedicated CA, since the holder of
/// one may ask for any sandbox. Caddy reads them only when it starts.
#[derive(Debug, Clone)]
pub struct Peers {
    /// Address where the others reach this node's Caddy: its cluster address.
    pub listen: SocketAddr,
    /// Certificate of the CA, PEM.
    pub ca: PlainPath,
    /// This node's certificate, PEM, for server and client, in the name of `render::PEER_NAME`.
    pub cert: PlainPath,
    /// Private key of the certificate, PEM.
    pub key: PlainPath,
}

/// Absolute path that Caddy's configuration takes literally: no placeholder, no control character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainPath(String);

impl PlainPath {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PlainPath {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let plain = |c: char| !c.is_control() && !matches!(c, '{' | '}' | '|' | '\\');
        if text.starts_with('/') && text.chars().all(plain) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Invalid::new(
                "ingress path",
                "must be absolute, without braces or control characters",
            ))
        }
    }
}

impl TryFrom<&Path> for PlainPath {
    type Error = Invalid;

    fn try_from(path: &Path) -> Result<Self, Invalid> {
        path.to_str().unwrap_or("").parse()
    }
}

impl fmt::Display for PlainPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_accepted() {
        for text in ["/a/b", "/run/pve-sandbox/route.sock"] {
            assert!(text.parse::<PlainPath>().is_ok(), "{text}");
        }
        for text in ["", "a", "/{env.HOME}", "/a\nb", "/a|0222"] {
            assert!(text.parse::<PlainPath>().is_err(), "{text:?}");
        }
    }
}
