//! Settings of the connection to the controller: from flags, then environment, then file.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{args::Global, failure::Failure};

/// Settings needed to call the controller.
#[derive(Clone)]
pub struct Settings {
    /// Address, `host:port`.
    pub address: String,
    /// Name that the controller's certificate must have.
    pub server_name: String,
    /// Bearer token.
    pub token: String,
    /// PEM file of the CA.
    pub ca: PathBuf,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Logs must not contain the token.
        f.debug_struct("Settings")
            .field("address", &self.address)
            .field("ca", &self.ca)
            .finish_non_exhaustive()
    }
}

/// Content of the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    endpoint: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
}

const HOW: &str = "set SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN (or _TOKEN_FILE) and SANDBOXCTL_CA, or write endpoint, token_file and ca to ~/.config/sandboxctl/config.toml; in a lab: `. target/lab/env`";

impl Settings {
    /// Combines the sources.
    ///
    /// # Errors
    /// When a required setting is missing, or a given one cannot be used.
    pub fn find(global: &Global) -> Result<Self, Failure> {
        let file = read_file(global.config.as_deref())?;
        let missing = |what: &str| Failure::usage(format!("{what} is not configured"), HOW);
        let endpoint = global
            .endpoint
            .clone()
            .or(file.endpoint)
            .ok_or_else(|| missing("the controller's endpoint"))?;
        let (address, server_name) = parse_endpoint(&endpoint)?;
        let ca = global.ca.clone().or(file.ca).ok_or_else(|| missing("the controller's CA"))?;
        // A token given directly overrides a token file, whichever source names the file.
        let token = match (&global.token, &global.token_file, file.token, &file.token_file) {
            (Some(token), ..) => token.clone(),
            (None, Some(path), ..) => read_token(path)?,
            (None, None, Some(token), _) => token,
            (None, None, None, Some(path)) => read_token(path)?,
            (None, None, None, None) => return Err(missing("the token")),
        };
        let token = token.trim().to_owned();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Failure::usage(
                "the token is empty or has characters that no token has",
                HOW,
            ));
        }
        Ok(Self { address, server_name, token, ca })
    }
}

fn read_file(named: Option<&Path>) -> Result<File, Failure> {
    let usual = || std::env::home_dir().map(|home| home.join(".config/sandboxctl/config.toml"));
    let Some(path) = named.map(Path::to_owned).or_else(usual) else { return Ok(File::default()) };
    // The default file may be missing; a named one may not.
    if named.is_none() && !path.exists() {
        return Ok(File::default());
    }
    daemon::config::load(&path).map_err(|error| {
        let message = daemon::chain::Chain(&error).to_string();
        Failure::usage(
            message.trim_end().to_owned(),
            "correct the file, or name another with --config",
        )
    })
}

fn read_token(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error: io::Error| {
        Failure::usage(format!("cannot read the token in {}: {error}", path.display()), HOW)
    })
}

/// Splits `https://host[:port]` into the address and the name that the certificate must have.
fn parse_endpoint(endpoint: &str) -> Result<(String, String), Failure> {
    let wrong = || {
        Failure::usage(
            format!("the endpoint {endpoint:?} is not of the form https://host:port"),
            "for example SANDBOXCTL_ENDPOINT=https://controller.example:7443",
        )
    };
    let rest = endpoint.strip_prefix("https://").ok_or_else(wrong)?.trim_end_matches('/');
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port))
            if !host.ends_with(':') && (!host.contains(':') || host.starts_with('[')) =>
        {
            (host, port.parse::<u16>().map_err(|_| wrong())?)
        }
        _ => (rest, 7443),
    };
    let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if name.is_empty() || name.contains(['/', '@', '?', '#', ' ', '[', ']']) {
        return Err(wrong());
    }
    Ok((format!("{host}:{port}"), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for (endpoint, address, name) in [
            ("https://c.example:7443", "c.example:7443", "c.example"),
            ("https://c.example/", "c.example:7443", "c.example"),
            ("https://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1"),
            ("https://[::1]:7443", "[::1]:7443", "::1"),
            ("https://[::1]", "[::1]:7443", "::1"),
        ] {
            let parsed = parse_endpoint(endpoint).expect(endpoint);
            assert_eq!((parsed.0.as_str(), parsed.1.as_str()), (address, name), "{endpoint}");
        }
        for wrong in
            ["", "c:1", "http://c:1", "https://", "https://c:x", "https://a@c:1", "https://c/x"]
        {
            assert!(parse_endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "endpoint = \"https://c:1\"\nca = \"/ca.pem\"\n").expect("write");
        let mut global = Global { config: Some(path.clone()), ..Global::default() };
        let failure = Settings::find(&global).expect_err("no token");
        assert!(failure.to_string().contains("the token is not configured"), "{failure}");
        assert!(failure.to_string().contains("hint: set SANDBOXCTL_ENDPOINT"), "{failure}");

        let secret = dir.path().join("token");
        std::fs::write(&secret, "s3cret\n").expect("write");
        global.token_file = Some(secret);
        assert_eq!(Settings::find(&global).expect("complete").token, "s3cret");
        global.token = Some("typed".into());
        let settings = Settings::find(&global).expect("complete");
        assert_eq!(settings.token, "typed");
        assert!(!format!("{settings:?}").contains("typed"), "a token must not be printed");

        std::fs::write(&path, "endpont = 1\n").expect("write");
        let failure = Settings::find(&global).expect_err("unknown key");
        assert!(failure.to_string().contains("endpont"), "{failure}");
    }
}
