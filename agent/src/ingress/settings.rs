//! Settings from which Caddy's configuration is rendered.

use std::{fmt, net::SocketAddr, path::Path, str::FromStr};

use proto::id::Invalid;

use super::decide::Domain;

/// What Caddy's configuration is rendered from.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The domain of the sandboxes.
    pub domain: Domain,
    /// Where clients reach Caddy; behind a tunnel, a port of loopback.
    pub public: Vec<SocketAddr>,
    /// The agent's socket.
    pub route_socket: PlainPath,
    /// Clients come by https, although Caddy itself is reached in plain.
    pub https: bool,
    /// The other nodes; `None` where there are none.
    pub peers: Option<Peers>,
}

/// How nodes send each other requests: TLS with certificates of a CA for this alone, since whoever
/// has one may ask for any sandbox. Caddy reads them at its start only.
#[derive(Debug, Clone)]
pub struct Peers {
    /// Where the others reach this node's Caddy: its cluster address.
    pub listen: SocketAddr,
    /// Certificate of the CA, PEM.
    pub ca: PlainPath,
    /// This node's certificate, PEM, for server and client, in the name of `render::PEER_NAME`.
    pub cert: PlainPath,
    /// Its key, PEM.
    pub key: PlainPath,
}

/// An absolute path that means itself in Caddy's configuration: no placeholder, no control
/// character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainPath(String);

impl PlainPath {
    /// The text.
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
    fn paths_mean_themselves() {
        for text in ["/a/b", "/run/pve-sandbox/route.sock"] {
            assert!(text.parse::<PlainPath>().is_ok(), "{text}");
        }
        for text in ["", "a", "/{env.HOME}", "/a\nb", "/a|0222"] {
            assert!(text.parse::<PlainPath>().is_err(), "{text:?}");
        }
    }
}
