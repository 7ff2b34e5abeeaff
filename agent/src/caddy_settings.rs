//! Settings of Caddy, from the agent's configuration.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    config::{Config, Wake},
    ingress::{
        hold::{HOLD_MAX, Limits},
        settings::{Peers, Settings},
    },
};

/// Builds the settings of Caddy's configuration; `None` without a domain.
///
/// # Errors
/// When a value must not appear in Caddy's configuration.
pub fn of(config: &Config) -> Result<Option<Settings>> {
    let ingress = &config.ingress;
    let Some(domain) = &ingress.domain else { return Ok(None) };
    let path = |path: &Path| path.try_into().with_context(|| path.display().to_string());
    let peers = |listen| -> Result<Peers> {
        let tls = &ingress.tls;
        Ok(Peers { listen, ca: path(&tls.ca)?, cert: path(&tls.cert)?, key: path(&tls.key)? })
    };
    Ok(Some(Settings {
        domain: domain.parse().context("ingress.domain")?,
        public: ingress.public.clone(),
        route_socket: path(&socket(config))?,
        https: ingress.https,
        peers: ingress.peer.map(peers).transpose()?,
    }))
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
