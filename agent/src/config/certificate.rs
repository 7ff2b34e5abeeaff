//! `[ingress.certificate]`: a certificate of the operator's own, with which Caddy itself ends TLS.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;

use super::{Ingress, Sources};

/// Port of https.
const HTTPS: u16 = 443;
/// Port of plain HTTP, where `redirect = true` listens.
const HTTP: u16 = 80;
/// Most addresses of the listener.
const LISTEN_MAX: usize = 4;
/// Most name servers for the challenge.
const RESOLVERS_MAX: usize = 4;

/// Certificate, by files or by ACME, and where Caddy listens with it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Certificate {
    /// File with the certificate and its chain, PEM.
    pub cert: Option<PathBuf>,
    /// File with its private key, PEM.
    pub key: Option<PathBuf>,
    /// Settings of a certificate that Caddy gets by itself, instead of files.
    pub acme_dns: Option<AcmeDns>,
    /// Addresses where clients reach Caddy by https.
    pub listen: Vec<SocketAddr>,
    /// Plain HTTP that is sent on to https.
    pub redirect: Redirect,
}

impl Default for Certificate {
    fn default() -> Self {
        Self {
            cert: None,
            key: None,
            acme_dns: None,
            listen: vec![SocketAddr::from(([0, 0, 0, 0], HTTPS))],
            redirect: Redirect::Switch(false),
        }
    }
}

/// Settings of ACME with the challenge by DNS, the only one that gives a wildcard.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcmeDns {
    /// Provider of the zone: the name of Caddy's module below `dns.providers`.
    pub provider: String,
    /// Address that the certificate authority writes to.
    pub email: String,
    /// File with the API token of the provider, readable by root alone.
    pub token_file: PathBuf,
    /// Field of the module that takes the token; `api_token` by default.
    #[serde(default)]
    pub token_field: Option<String>,
    /// Directory of the certificate authority; that of Caddy's default by default.
    #[serde(default)]
    pub directory: Option<String>,
    /// Name servers by which Caddy finds the zone and sees the challenge in it; those of the node by default.
    #[serde(default)]
    pub resolvers: Vec<SocketAddr>,
}

/// Setting of the redirect: a switch, or an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Redirect {
    /// True: port 80 of each address of `listen`.
    Switch(bool),
    /// This address.
    Address(SocketAddr),
}

impl Certificate {
    /// Lists the addresses where plain HTTP is sent on to https.
    pub fn redirects(&self) -> Vec<SocketAddr> {
        match self.redirect {
            Redirect::Switch(false) => Vec::new(),
            Redirect::Address(address) => vec![address],
            Redirect::Switch(true) => {
                let mut all: Vec<_> =
                    self.listen.iter().map(|listen| SocketAddr::new(listen.ip(), HTTP)).collect();
                all.sort();
                all.dedup();
                all
            }
        }
    }
}

/// Checks the certificate of an ingress, if it has one.
pub(super) fn check(from: &mut Sources<'_>, ingress: &Ingress) {
    const NAME: &str = "ingress.certificate";
    let Some(certificate) = &ingress.certificate else { return };
    from.must(ingress.domain.is_some(), NAME, "needs ingress.domain");
    match (&certificate.cert, &certificate.key, &certificate.acme_dns) {
        (Some(_), Some(_), None) | (None, None, Some(_)) => {}
        _ => from.mistake(NAME, "must have either cert and key, or acme_dns"),
    }
    let resolvers = certificate.acme_dns.as_ref().map_or(&[][..], |acme| &acme.resolvers);
    let is_fit = resolvers.len() <= RESOLVERS_MAX && resolvers.iter().all(|one| one.port() != 0);
    from.must(
        is_fit,
        "ingress.certificate.acme_dns.resolvers",
        "must be four addresses at most, with ports",
    );
    let listen = &certificate.listen;
    let counted = (1..=LISTEN_MAX).contains(&listen.len());
    from.must(counted, "ingress.certificate.listen", "must be one to four addresses");
    let redirects = certificate.redirects();
    let mut taken: Vec<_> = ingress.public.iter().chain(&ingress.peer).copied().collect();
    for (name, address) in listen
        .iter()
        .map(|address| ("ingress.certificate.listen", *address))
        .chain(redirects.iter().map(|address| ("ingress.certificate.redirect", *address)))
    {
        // The kernel would choose a port, another one at each start.
        from.must(address.port() != 0, name, "must have a port");
        if let Some(other) = taken.iter().find(|other| overlap(**other, address)) {
            from.mistake(name, format!("{address} is taken by {other} of [ingress]"));
        }
        taken.push(address);
    }
}

/// Returns true when no two servers can listen on both addresses.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let is_any = |ip: IpAddr| ip.is_unspecified();
    one.port() == other.port() && (one.ip() == other.ip() || is_any(one.ip()) || is_any(other.ip()))
}

#[cfg(test)]
mod tests {
    use super::{super::Flags, *};

    #[test]
    fn address_must_have_a_port() {
        let parse = |text: &str| toml::from_str::<Certificate>(text).expect("a certificate");
        for (text, name) in [
            ("listen = [\"10.0.0.1:443\", \"10.0.0.1:0\"]", "ingress.certificate.listen"),
            ("redirect = \"10.0.0.1:0\"", "ingress.certificate.redirect"),
        ] {
            let (flags, env) = (Flags::default(), |_: &str| -> Option<String> { None });
            let (mistakes, settings) = (Vec::new(), Vec::new());
            let mut from = Sources { flags: &flags, env: &env, mistakes, settings };
            check(&mut from, &Ingress { certificate: Some(parse(text)), ..Ingress::default() });
            let told =
                from.mistakes.iter().any(|one| one.what == name && one.why == "must have a port");
            assert!(told, "{text}");
        }
    }

    #[test]
    fn addresses_overlap_where_one_covers_the_other() {
        let overlap = |one: &str, other: &str| {
            overlap(one.parse().expect("an address"), other.parse().expect("an address"))
        };
        assert!(overlap("10.0.0.1:443", "10.0.0.1:443"));
        assert!(overlap("0.0.0.0:443", "10.0.0.1:443") && overlap("10.0.0.1:443", "[::]:443"));
        assert!(!overlap("10.0.0.1:443", "10.0.0.2:443") && !overlap("0.0.0.0:443", "0.0.0.0:80"));
    }

    #[test]
    fn redirect_by_switch_is_port_80_of_each_listener() {
        let of = |text: &str| {
            let parsed: Certificate = toml::from_str(text).expect("a certificate");
            parsed.redirects().iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(""), [""; 0]);
        assert_eq!(of("redirect = true"), ["0.0.0.0:80"]);
        let two = "listen = [\"10.0.0.1:443\", \"10.0.0.1:8443\"]\nredirect = true";
        assert_eq!(of(two), ["10.0.0.1:80"]);
        assert_eq!(of("redirect = \"10.0.0.2:8080\""), ["10.0.0.2:8080"]);
    }
}
