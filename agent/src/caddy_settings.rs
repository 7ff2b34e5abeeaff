//! Settings of Caddy, from the agent's configuration.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};

pub use crate::ingress::own_certificate::copies;
use crate::{
    config::{self, Config, Wake},
    ingress::{
        decide::Rules,
        hold::{HOLD_MAX, Limits},
        settings::{AcmeDns, Certificate, CertificateFiles, Peers, PlainPath, Secure, Settings},
        version::Generation,
    },
};

/// Name of the file in which the agent records which Caddy it started last; `uninstall` knows it, too.
pub const RECORD: &str = "ingress-run";
/// Field of most modules of Caddy that takes the token of their provider.
const TOKEN_FIELD: &str = "api_token";

/// Builds the settings of Caddy's configuration, in the form for every version; `None` without a domain.
///
/// # Errors
/// When a value must not appear in Caddy's configuration.
pub fn of(config: &Config) -> Result<Option<Settings>> {
    let ingress = &config.ingress;
    let Some(Rules { domain, parents: _, cors }) = rules(config)? else { return Ok(None) };
    let path = |path: &Path| path.try_into().with_context(|| path.display().to_string());
    let peers = |listen| -> Result<Peers> {
        let tls = &ingress.tls;
        Ok(Peers { listen, ca: path(&tls.ca)?, cert: path(&tls.cert)?, key: path(&tls.key)? })
    };
    let has_log = !ingress.access_log.as_os_str().is_empty();
    Ok(Some(Settings {
        domain,
        public: ingress.public.clone(),
        route_socket: path(&socket(config))?,
        https: ingress.https,
        secure: ingress.certificate.as_ref().map(|own| secure(config, own)).transpose()?,
        frames: ingress.frames,
        cors,
        peers: ingress.peer.map(peers).transpose()?,
        access_log: has_log.then(|| path(&ingress.access_log)).transpose()?,
        generation: Generation::Before,
    }))
}

/// Builds the settings of the listener with a certificate of the operator's own.
fn secure(config: &Config, own: &config::Certificate) -> Result<Secure> {
    let copy = |path: &Path| -> Result<PlainPath> {
        path.try_into().with_context(|| path.display().to_string())
    };
    let [certificate_copy, token_copy] = copies(&config.ingress.caddy_config);
    let certificate = match (&own.cert, &own.key, &own.acme_dns) {
        (Some(cert), Some(key), None) => Certificate::Files(CertificateFiles {
            cert: cert.clone(),
            key: key.clone(),
            copy: copy(&certificate_copy)?,
        }),
        (None, None, Some(acme)) => Certificate::Acme(AcmeDns {
            provider: acme.provider.parse()?,
            email: acme.email.parse()?,
            token_field: acme.token_field.as_deref().unwrap_or(TOKEN_FIELD).parse()?,
            directory: acme.directory.as_deref().map(str::parse).transpose()?,
            resolvers: acme.resolvers.clone(),
            token: acme.token_file.clone(),
            token_copy: copy(&token_copy)?,
        }),
        _ => anyhow::bail!("ingress.certificate must have either cert and key, or acme_dns"),
    };
    Ok(Secure { listen: own.listen.clone(), redirect: own.redirects(), certificate })
}

/// Builds the settings of the verdict on a request; `None` without a domain.
///
/// # Errors
/// When the domain is no domain, or a page that may use sessions is no origin.
pub fn rules(config: &Config) -> Result<Option<Rules>> {
    let ingress = &config.ingress;
    let Some(domain) = &ingress.domain else { return Ok(None) };
    let parents = ingress.parent_origins.iter().map(|origin| origin.parse());
    let parents = parents.collect::<Result<_, _>>().context("ingress.parent_origins")?;
    let domain = domain.parse().context("ingress.domain")?;
    Ok(Some(Rules { domain, parents, cors: ingress.cors }))
}

/// Returns the file in which the agent records which Caddy it started last.
pub fn record(config: &Config) -> std::path::PathBuf {
    config.state_dir.join(RECORD)
}

/// Returns the file in which the agent leaves why Caddy is not as it should be.
pub fn problem(config: &Config) -> std::path::PathBuf {
    config.run_dir.join("ingress-problem")
}

/// Returns the path of the agent's socket for route questions.
pub fn socket(config: &Config) -> std::path::PathBuf {
    config.ingress.socket.clone().unwrap_or_else(|| config.run_dir.join("ingress.sock"))
}

/// Returns the bounds of the requests that wait for their sandbox.
pub fn holds(wake: &Wake) -> Limits {
    Limits {
        hold: Duration::from_secs(wake.hold_s).min(HOLD_MAX),
        page_after: Duration::from_millis(wake.page_after_ms),
        team_wakes: wake.team_wakes_per_min,
        team_held: wake.team_held_max,
        node_held: wake.held_max,
        rest: Duration::from_secs(wake.rest_s),
        followers_wake: wake.followers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_the_file_are_those_of_the_ingress() {
        assert_eq!(holds(&Wake::default()), Limits::default());
    }
}
