//! Settings of the connection to the controller: from flags, then environment, then the context that is
//! chosen, then the top level of the file.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Args, parser::ValueSource};
use proto::secret::Secret;

use crate::{config_file, failure::Failure};

/// Longest token file that is read.
const TOKEN_MAX: u64 = 8192;

/// Flags of the connection, which every verb takes.
#[derive(Debug, Clone, Default, Args)]
pub struct Connection {
    /// Where the controller listens, such as https://controller:7443
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_ENDPOINT",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Connection"
    )]
    pub endpoint: Option<String>,
    /// Bearer token. Others on this machine can read arguments: prefer the environment or a file
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN",
        help_heading = "Connection"
    )]
    pub token: Option<Secret<String>>,
    /// File that holds the bearer token
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_TOKEN_FILE",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub token_file: Option<PathBuf>,
    /// CA of the controller's certificate, PEM [default: the system's CAs]
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CA",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub ca: Option<PathBuf>,
    /// Client certificate with its key, in one PEM file, in place of a token
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CLIENT_CERT",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub client_cert: Option<PathBuf>,
    /// Context to use, in place of the chosen one; `sandboxctl context ls` lists them
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CONTEXT",
        hide_env_values = true,
        value_name = "NAME",
        help_heading = "Connection"
    )]
    pub context: Option<String>,
    /// Show each call on stderr: its name, its time and its result
    #[arg(long, global = true, help_heading = "Connection")]
    pub debug: bool,
    /// Configuration file [default: ~/.config/sandboxctl/config.toml]
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CONFIG",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub config: Option<PathBuf>,
    /// Names of what came from the environment.
    #[arg(skip)]
    pub from_environment: BTreeSet<&'static str>,
}

/// Proof by which the controller knows the team.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// Bearer token.
    Token(String),
    /// PEM file of a client certificate and its key.
    Certificate(PathBuf),
}

impl Credential {
    /// Returns the text of a bearer token.
    pub fn token(&self) -> Option<&str> {
        match self {
            Self::Token(token) => Some(token),
            Self::Certificate(_) => None,
        }
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Token(_) => f.write_str("Token"),
            Self::Certificate(path) => f.debug_tuple("Certificate").field(path).finish(),
        }
    }
}

/// Settings needed to call the controller.
#[derive(Clone)]
pub struct Settings {
    /// Address, `host:port`.
    pub address: String,
    /// Name that the controller's certificate must have.
    pub server_name: String,
    /// Proof of the team.
    pub credential: Credential,
    /// PEM file of the CA; none trusts those of the system.
    pub ca: Option<PathBuf>,
    /// Whether each call is shown on stderr.
    pub debug: bool,
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

/// How to set what is missing.
pub const HOW: &str = "`sandboxctl login` asks for it and saves it; or set SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN (or _TOKEN_FILE) and SANDBOXCTL_CA; in a lab: `. target/lab/env`";

impl Connection {
    /// Orders what came from the command line and from the environment. A flag is meant for this call, and
    /// the environment for all of them: a context that is named by a flag wins over all of it, and a token
    /// file over its token.
    pub fn order_sources(&mut self, matches: &ArgMatches) {
        let from = |name: &str, source| matches.value_source(name) == Some(source);
        self.from_environment = ["endpoint", "token", "token_file", "ca", "client_cert", "context"]
            .into_iter()
            .filter(|name| from(name, ValueSource::EnvVariable))
            .collect();
        let is_flag = |name: &str| from(name, ValueSource::CommandLine);
        if is_flag("context") {
            *self = self.without_environment();
            return;
        }
        let is_set = |name: &str| self.from_environment.contains(name);
        let [token, token_file, client_cert] = ["token", "token_file", "client_cert"].map(is_set);
        if is_flag("client_cert") {
            self.token.take_if(|_| token);
            self.token_file.take_if(|_| token_file);
        } else if is_flag("token") || is_flag("token_file") {
            self.client_cert.take_if(|_| client_cert);
        }
        if is_flag("token_file") {
            self.token.take_if(|_| token);
        }
    }

    /// Returns what the command line says alone.
    #[must_use]
    pub fn without_environment(&self) -> Self {
        let mut own = self.clone();
        let is_set = |name: &str| self.from_environment.contains(name);
        own.endpoint.take_if(|_| is_set("endpoint"));
        own.token.take_if(|_| is_set("token"));
        own.token_file.take_if(|_| is_set("token_file"));
        own.ca.take_if(|_| is_set("ca"));
        own.client_cert.take_if(|_| is_set("client_cert"));
        own.context.take_if(|_| is_set("context"));
        own
    }
}

impl Settings {
    /// Combines the sources, the first that is set first.
    ///
    /// # Errors
    /// When a required setting is missing, or a given one cannot be used.
    pub fn find(flags: &Connection) -> Result<Self, Failure> {
        let file = config_file::read(flags.config.as_deref())?;
        let missing = |what: &str| Failure::usage(format!("{what} is not configured"), HOW);
        let chosen = flags.context.as_ref().or(file.context.as_ref());
        let chosen = chosen.map(|name| file.named(name)).transpose()?.cloned();
        // A context has a CA of its own, or none.
        let (its_ca, its_certificate) = match &chosen {
            Some(context) => (context.ca.clone(), context.client_cert.clone()),
            None => (file.ca, file.client_cert),
        };
        let chosen = chosen.unwrap_or_default();
        let endpoint = flags
            .endpoint
            .clone()
            .or(chosen.endpoint)
            .or(file.endpoint)
            .ok_or_else(|| missing("the controller's endpoint"))?;
        let ca = flags.ca.clone().or(its_ca);
        let given = (&flags.client_cert, &flags.token, &flags.token_file);
        let certificate = match given {
            (Some(given), ..) => Some(given.clone()),
            (None, None, None) => its_certificate,
            (None, ..) => None,
        };
        if let Some(certificate) = certificate {
            return Self::new(&endpoint, Credential::Certificate(certificate), ca, flags.debug);
        }
        // A token given directly overrides a token file of the same place.
        let given =
            (flags.token.clone(), flags.token_file.as_deref().or(chosen.token_file.as_deref()));
        let token = match (given, file.token, &file.token_file) {
            ((Some(token), _), ..) => token.reveal(),
            ((None, Some(path)), ..) => read_token(path)?,
            (_, Some(token), _) => token.reveal(),
            (_, None, Some(path)) => read_token(path)?,
            (_, None, None) => return Err(missing("the token")),
        };
        Self::new(&endpoint, Credential::Token(token), ca, flags.debug)
    }

    /// Checks the form of the endpoint and of the token.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub fn new(
        endpoint: &str,
        credential: Credential,
        ca: Option<PathBuf>,
        debug: bool,
    ) -> Result<Self, Failure> {
        let (address, server_name) = parse_endpoint(endpoint)?;
        let credential = match credential {
            Credential::Token(token) => Credential::Token(token.trim().to_owned()),
            certificate @ Credential::Certificate(_) => certificate,
        };
        let is_wrong =
            |token: &str| token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic());
        if credential.token().is_some_and(is_wrong) {
            return Err(Failure::usage(
                "the token is empty or has characters that a token cannot have",
                HOW,
            ));
        }
        Ok(Self { address, server_name, credential, ca, debug })
    }
}

/// Reads a token from its file.
///
/// # Errors
/// When it cannot be read.
pub fn read_token(path: &Path) -> Result<String, Failure> {
    let mut token = String::new();
    let read = File::open(path).and_then(|file| file.take(TOKEN_MAX).read_to_string(&mut token));
    read.map_err(|error: io::Error| {
        Failure::usage(format!("cannot read the token in {}: {error}", path.display()), HOW)
    })?;
    Ok(token)
}

/// Checks the form of an endpoint.
///
/// # Errors
/// When it cannot be used.
pub fn check_endpoint(endpoint: &str) -> Result<(), Failure> {
    parse_endpoint(endpoint).map(drop)
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
    fn endpoints_are_split_into_address_and_name() {
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
    fn missing_setting_is_named_with_a_hint() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "endpoint = \"https://c:1\"\nca = \"/ca.pem\"\n").expect("write");
        let mut flags = Connection { config: Some(path.clone()), ..Connection::default() };
        let failure = Settings::find(&flags).expect_err("no token");
        assert!(failure.to_string().contains("the token is not configured"), "{failure}");
        assert!(failure.to_string().contains("hint: `sandboxctl login` asks"), "{failure}");

        let secret = dir.path().join("token");
        std::fs::write(&secret, "s3cret\n").expect("write");
        flags.token_file = Some(secret);
        let found = |flags: &Connection| Settings::find(flags).expect("complete").credential;
        assert_eq!(found(&flags).token(), Some("s3cret"));
        flags.token = Some("typed".into());
        let settings = Settings::find(&flags).expect("complete");
        assert_eq!(settings.credential.token(), Some("typed"));
        assert!(!format!("{settings:?}").contains("typed"), "a token must not be printed");

        // A certificate in the same place, or of the context, is used without a token.
        flags.client_cert = Some("/own.pem".into());
        assert_eq!(found(&flags), Credential::Certificate("/own.pem".into()));
        let text =
            "context = \"a\"\n[contexts.a]\nendpoint = \"https://c:1\"\nclient_cert = \"/a.pem\"\n";
        std::fs::write(&path, text).expect("write");
        let bare = Connection { config: flags.config.clone(), ..Connection::default() };
        assert_eq!(found(&bare), Credential::Certificate("/a.pem".into()));
        let typed = Connection { token: Some("typed".into()), ..bare };
        assert_eq!(found(&typed).token(), Some("typed"), "a token by flag wins over the context");

        std::fs::write(&path, "endpont = 1\n").expect("write");
        let failure = Settings::find(&flags).expect_err("unknown key");
        assert!(failure.to_string().contains("endpont"), "{failure}");
    }
}
