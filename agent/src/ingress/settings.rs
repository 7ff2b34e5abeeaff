//! Settings from which Caddy's configuration is rendered.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use proto::id::Invalid;

use super::{decide::Domain, version::Generation};

/// Settings of Caddy's configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Domain of the sandboxes' host names.
    pub domain: Domain,
    /// Addresses where clients reach Caddy; behind a tunnel, a port of loopback.
    pub public: Vec<SocketAddr>,
    /// Socket of the agent's route server.
    pub route_socket: PlainPath,
    /// True when clients use https, although Caddy itself is reached by plain HTTP.
    pub https: bool,
    /// Listener where Caddy itself serves https; `None` where something in front does.
    pub secure: Option<Secure>,
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

impl Settings {
    /// Returns these settings without the listener with a certificate of the operator's own.
    #[must_use]
    pub fn without_secure(&self) -> Self {
        Self { secure: None, ..self.clone() }
    }
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

/// Settings of the listener where Caddy itself serves https.
#[derive(Debug, Clone)]
pub struct Secure {
    /// Addresses where clients reach it.
    pub listen: Vec<SocketAddr>,
    /// Addresses where plain HTTP is sent on to the first of `listen`.
    pub redirect: Vec<SocketAddr>,
    /// Source of its certificate.
    pub certificate: Certificate,
}

impl Secure {
    /// Returns true when a port is one of those that need a capability.
    pub fn has_low_port(&self) -> bool {
        self.listen.iter().chain(&self.redirect).any(|address| address.port() < 1024)
    }
}

/// Source of the certificate of [`Secure`].
#[derive(Debug, Clone)]
pub enum Certificate {
    /// Files of an operator, which somebody else renews.
    Files(CertificateFiles),
    /// Caddy gets and renews it.
    Acme(AcmeDns),
}

impl Certificate {
    /// Returns the copy that Caddy reads.
    pub fn copy(&self) -> &PlainPath {
        match self {
            Self::Files(files) => &files.copy,
            Self::Acme(acme) => &acme.token_copy,
        }
    }
}

/// Files of a certificate that somebody else renews.
#[derive(Debug, Clone)]
pub struct CertificateFiles {
    /// Certificate and its chain, PEM.
    pub cert: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Copy of both in one file, which Caddy reads: so it never sees one of two that do not fit.
    pub copy: PlainPath,
}

/// Settings of ACME with the challenge by DNS.
#[derive(Debug, Clone)]
pub struct AcmeDns {
    /// Name of Caddy's module below `dns.providers`.
    pub provider: Word,
    /// Address that the certificate authority writes to.
    pub email: Text,
    /// Field of the module that takes the token.
    pub token_field: Word,
    /// Directory of the certificate authority, if it is not Caddy's default.
    pub directory: Option<Text>,
    /// Name servers by which Caddy finds the zone and sees the challenge in it; none: those of the system.
    pub resolvers: Vec<SocketAddr>,
    /// File with the token of the provider.
    pub token: PathBuf,
    /// Copy of the token, which Caddy reads.
    pub token_copy: PlainPath,
}

impl AcmeDns {
    /// Returns the id of the module of Caddy that answers the challenge.
    pub fn module(&self) -> String {
        format!("dns.providers.{}", self.provider)
    }
}

/// Name in Caddy's configuration: lower-case letters, digits, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word(String);

impl FromStr for Word {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
        if (1..=40).contains(&text.len()) && text.bytes().all(is_plain) {
            return Ok(Self(text.to_owned()));
        }
        let why = "must be 1 to 40 lower-case letters, digits, _ and -";
        Err(Invalid::new("name in ingress.certificate.acme_dns", why))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that Caddy's configuration takes literally: no space, no placeholder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text(String);

impl Text {
    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Text {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let is_plain = |b: u8| b.is_ascii_graphic() && !b"{}\\\"'".contains(&b);
        if (1..=254).contains(&text.len()) && text.bytes().all(is_plain) {
            return Ok(Self(text.to_owned()));
        }
        let why = "must be 1 to 254 characters without spaces, quotes and braces";
        Err(Invalid::new("text in ingress.certificate.acme_dns", why))
    }
}

/// Absolute path that Caddy's configuration takes literally: no placeholder, no control character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainPath(String);

impl PlainPath {
    /// Returns the text.
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
    fn only_plain_names_and_texts_are_accepted() {
        for text in ["cloudflare", "api_token", "acme-dns2"] {
            assert!(text.parse::<Word>().is_ok(), "{text}");
        }
        for text in ["", "Cloudflare", "a.b", "{env.HOME}", "a b"] {
            assert!(text.parse::<Word>().is_err(), "{text:?}");
        }
        for text in ["ops@example.com", "https://acme.example.com/directory"] {
            assert!(text.parse::<Text>().is_ok(), "{text}");
        }
        for text in ["", "a b", "{env.HOME}", "a\nb", "a\"b", "a\\b", "\u{e4}"] {
            assert!(text.parse::<Text>().is_err(), "{text:?}");
        }
    }

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
