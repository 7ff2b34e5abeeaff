//! Renders the parts of Caddy's configuration for https with a certificate of the operator's own. Pure.
//!
//! These properties must stay, for the reasons given:
//! - Nobody in front of this listener is trusted: what a client says of itself in `X-Forwarded-*` and `Cf-*` is deleted
//!   first of all, so Caddy's own words are the only ones.
//! - The certificate is chosen by its tag. That of the hop between the nodes is never shown here.
//! - The token of the DNS provider stands in a file that Caddy reads, and not in the configuration.

use serde_json::{Value, json};

use super::{
    decide::Domain,
    settings::{AcmeDns, Certificate, Secure},
};

/// Tag of the certificate.
const TAG: &str = "own";
/// Port of https, which is not written in an address.
const HTTPS: u16 = 443;

/// Renders what the server of the listener has beside the common part.
pub(super) fn server(secure: &Secure, domain: &Domain) -> Value {
    let policy = match &secure.certificate {
        Certificate::Files(_) => json!({ "certificate_selection": { "any_tag": [TAG] } }),
        // A certificate that Caddy gets has no tag; no other name gets one.
        Certificate::Acme(_) => json!({ "match": { "sni": [wildcard(domain)] } }),
    };
    json!({
        "listen": secure.listen.iter().map(ToString::to_string).collect::<Vec<_>>(),
        // HTTP/3 would need UDP, and its connections do not survive a change to another Caddy.
        "protocols": ["h1", "h2"],
        "tls_connection_policies": [policy],
    })
}

/// Renders the handler that deletes what only a trusted proxy may say of a client.
pub(super) fn forget_claims() -> Value {
    json!({
        "handler": "headers",
        "request": { "delete": ["Forwarded", "X-Forwarded-*", "Cf-*"] },
    })
}

/// Renders the server that sends plain HTTP on to https, for hosts that match this pattern.
pub(super) fn redirect(secure: &Secure, host_pattern: &str) -> Option<Value> {
    let port = secure.listen.first().filter(|_| !secure.redirect.is_empty())?.port();
    let port = if port == HTTPS { String::new() } else { format!(":{port}") };
    let answer = |status: u16, headers: Value| json!([{ "handler": "static_response", "status_code": status, "headers": headers }]);
    let location = format!("https://{{http.request.host}}{port}{{http.request.uri}}");
    Some(json!({
        "automatic_https": { "disable": true },
        "listen": secure.redirect.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "protocols": ["h1"],
        "read_header_timeout": "10s",
        "idle_timeout": "30s",
        "routes": [
            {
                "match": [{
                    "header_regexp": { "Host": { "name": "sbx", "pattern": host_pattern } },
                    // `GET x:@evil.example/` has no path: behind our host it would lead to another one.
                    "path_regexp": { "pattern": "^/" },
                }],
                "terminal": true,
                // The method and the body stay with 308.
                "handle": answer(308, json!({ "Location": [location], "Cache-Control": ["no-store"] })),
            },
            { "handle": answer(404, json!({ "Cache-Control": ["no-store"] })) },
        ],
    }))
}

/// Renders the file that Caddy loads the certificate from; `None` for one that it gets by itself.
pub(super) fn load_file(secure: &Secure) -> Option<Value> {
    let Certificate::Files(files) = &secure.certificate else { return None };
    let copy = files.copy.as_str();
    Some(json!({ "certificate": copy, "key": copy, "tags": [TAG] }))
}

/// Renders the certificate that Caddy gets by itself, and how; `None` where it is in a file.
pub(super) fn automation(secure: &Secure, domain: &Domain) -> Option<(Value, Value)> {
    let Certificate::Acme(acme) = &secure.certificate else { return None };
    let names = json!([wildcard(domain)]);
    let policy = json!({ "subjects": names, "issuers": [issuer(acme)] });
    Some((names, json!({ "policies": [policy] })))
}

fn issuer(acme: &AcmeDns) -> Value {
    let mut provider = json!({ "name": acme.provider.to_string() });
    provider[acme.token_field.to_string()] = format!("{{file.{}}}", acme.token_copy).into();
    let mut issuer = json!({
        "module": "acme",
        "email": acme.email.as_str(),
        "challenges": {
            "http": { "disabled": true },
            "tls-alpn": { "disabled": true },
            "dns": { "provider": provider },
        },
    });
    if let Some(directory) = &acme.directory {
        issuer["ca"] = directory.as_str().into();
    }
    if !acme.resolvers.is_empty() {
        let resolvers = acme.resolvers.iter().map(ToString::to_string);
        issuer["challenges"]["dns"]["resolvers"] = resolvers.collect();
    }
    issuer
}

/// Returns the name that the certificate must have.
pub fn wildcard(domain: &Domain) -> String {
    format!("*.{domain}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::settings::CertificateFiles;

    fn files() -> Secure {
        let certificate = Certificate::Files(CertificateFiles {
            cert: "/etc/ssl/wildcard.pem".into(),
            key: "/etc/ssl/wildcard.key".into(),
            copy: "/etc/pve-sandbox/caddy-certificate.pem".parse().expect("a path"),
        });
        let (listen, redirect) = (address("0.0.0.0:443"), address("0.0.0.0:80"));
        Secure { listen: vec![listen], redirect: vec![redirect], certificate }
    }

    fn address(text: &str) -> std::net::SocketAddr {
        text.parse().expect("an address")
    }

    fn domain() -> Domain {
        "sbx.test".parse().expect("a domain")
    }

    fn acme(directory: Option<&str>) -> Secure {
        let certificate = Certificate::Acme(AcmeDns {
            provider: "cloudflare".parse().expect("a name"),
            email: "ops@example.com".parse().expect("a text"),
            token_field: "api_token".parse().expect("a name"),
            directory: directory.map(|text| text.parse().expect("a text")),
            resolvers: directory.map(|_| address("192.0.2.53:53")).into_iter().collect(),
            token: "/root/token".into(),
            token_copy: "/etc/pve-sandbox/caddy-dns-token".parse().expect("a path"),
        });
        Secure { certificate, ..files() }
    }

    fn all(secure: &Secure) -> String {
        let parts = json!({
            "server": server(secure, &domain()),
            "redirect": redirect(secure, "^x$"),
            "load_file": load_file(secure),
            "automation": automation(secure, &domain()),
        });
        format!("{parts:#}\n")
    }

    #[test]
    fn parts_of_a_certificate_in_files_match_the_tested_ones() {
        insta::assert_snapshot!(all(&files()));
    }

    #[test]
    fn parts_of_a_certificate_by_acme_name_the_module_and_the_file_of_the_token() {
        insta::assert_snapshot!(all(&acme(Some("https://acme.example.com/directory"))));
        let plain = all(&acme(None));
        assert!(!plain.contains("\"ca\"") && !plain.contains("\"resolvers\""), "{plain}");
    }

    #[test]
    fn redirect_names_a_port_that_is_not_that_of_https() {
        let mut secure = files();
        secure.listen = vec![address("10.0.0.1:8443")];
        let text = redirect(&secure, "^x$").expect("a server").to_string();
        assert!(text.contains("https://{http.request.host}:8443{http.request.uri}"), "{text}");
        secure.redirect.clear();
        assert_eq!(redirect(&secure, "^x$"), None);
    }
}
