//! Arguments of `pve-sandbox-agent tunnel`, and where its token comes from: never from an argument, which everybody
//! on the machine can read.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use daemon::text;
use proto::{id::SandboxRef, secret::Secret};

use super::{
    api::BASE,
    ids::CloudId,
    settings::{Address, Hostname, METRICS},
};

/// Commands of the tunnel.
#[derive(Debug, Subcommand)]
pub enum TunnelCommand {
    /// Make the tunnel or join it: DNS record, this node's files, the connector; again: say that it is right
    #[command(after_help = SETUP_HELP)]
    Setup(Setup),
    /// Look at the tunnel: connectors, DNS records, this node's part; exit 1 if something does not work
    #[command(after_help = STATUS_HELP)]
    Status(Status),
    /// Take this node out of the tunnel, and with --everything remove the tunnel and its DNS records
    #[command(after_help = TEARDOWN_HELP)]
    Teardown(Teardown),
    /// Fetch the open ports of a sandbox of this node by their public names, and say where a request ends
    /// that goes wrong
    #[command(after_help = TEST_HELP)]
    Test(Test),
}

const SETUP_HELP: &str = "\
Examples:
  pve-sandbox-agent tunnel setup --domain example.com --token-file t --dry-run
  pve-sandbox-agent tunnel setup --domain example.com --token-file token
  pass cloudflare | pve-sandbox-agent tunnel setup --token-file -

The API token is read from the file, from stdin (-) or from CF_API_TOKEN, and is
not kept. It needs Account > Cloudflare Tunnel > Edit, Zone > DNS > Edit and
Zone > Zone > Read. On each further node the same command joins the same tunnel.
Exit 3: this node has no cloudflared.";

const STATUS_HELP: &str = "\
Examples:
  pve-sandbox-agent tunnel status
  pve-sandbox-agent tunnel status --token-file token --json

Without a token only this node is looked at.";

const TEARDOWN_HELP: &str = "\
Examples:
  pve-sandbox-agent tunnel teardown --dry-run
  pve-sandbox-agent tunnel teardown
  pve-sandbox-agent tunnel teardown --everything --token-file token

The settings of this node name the tunnel, its zone and its account, and those
of earlier setups. A node that has left already finds those of now by
ingress.domain, --zone-id and --account-id.";

const TEST_HELP: &str = "\
Examples:
  pve-sandbox-agent tunnel test 100001
  pve-sandbox-agent tunnel test pvelxc-01ja8z...

A port that asks for access is right when it does: no credential is sent.
A public port wakes a paused sandbox, as by any request.";

/// Arguments of all commands.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Configuration file of the agent
    #[arg(long, value_name = "FILE", default_value = "/etc/pve-sandbox/agent.toml")]
    pub config: PathBuf,
}

/// Cloudflare's account.
#[derive(Debug, Clone, Args)]
pub struct Account {
    /// File with the API token; - is stdin [default: the variable CF_API_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Address of the API, in tests
    #[arg(long, env = "PVE_SANDBOX_CLOUDFLARE_API", hide = true, default_value = BASE)]
    pub api: String,
}

/// Zone and account.
#[derive(Debug, Clone, Args)]
pub struct ZoneFlags {
    /// Zone of the domain [default: the variable CF_ZONE_ID, else looked up]
    #[arg(long)]
    pub zone_id: Option<CloudId>,
    /// Account [default: the variable CF_ACCOUNT_ID, else that of the zone]
    #[arg(long)]
    pub account_id: Option<CloudId>,
}

/// Arguments of `setup`.
#[derive(Debug, Args)]
pub struct Setup {
    /// Cloudflare's account.
    #[command(flatten)]
    pub account: Account,
    /// Domain of the sandboxes' host names [default: ingress.domain of the configuration, else
    /// PVE_PUBLIC_DOMAIN, else CF_DOMAIN]
    #[arg(long)]
    pub domain: Option<Hostname>,
    /// Name of the tunnel [default: that of an earlier call, else pve-sandbox- and the domain]
    #[arg(long, value_parser = name)]
    pub name: Option<String>,
    /// Zone and account.
    #[command(flatten)]
    pub zone: ZoneFlags,
    /// Replace DNS records of these names that somebody else has made
    #[arg(long)]
    pub replace_record: bool,
    /// Public name for the controller's API (gRPC-Web)
    #[arg(long, value_name = "HOST", requires = "controller_address")]
    pub controller_host: Option<Hostname>,
    /// Address where this node reaches the controller's API
    #[arg(long, value_name = "HOST:PORT", requires = "controller_host")]
    pub controller_address: Option<Address>,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Start nothing
    #[arg(long)]
    pub no_start: bool,
    /// Address where cloudflared tells whether it is connected, in tests
    #[arg(long, hide = true, default_value_t = METRICS)]
    pub metrics: SocketAddr,
    /// Configuration.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Cloudflare's account.
    #[command(flatten)]
    pub account: Account,
    /// Print one object in JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `teardown`.
#[derive(Debug, Args)]
pub struct Teardown {
    /// Cloudflare's account.
    #[command(flatten)]
    pub account: Account,
    /// Remove the tunnel and its DNS records, too; it needs the token
    #[arg(long)]
    pub everything: bool,
    /// Cut off other nodes that are connected
    #[arg(long, requires = "everything")]
    pub force: bool,
    /// Zone and account.
    #[command(flatten)]
    pub zone: ZoneFlags,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Configuration.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `test`.
#[derive(Debug, Args)]
pub struct Test {
    /// Sandbox: its id or its vmid
    pub id: SandboxRef,
    /// CAs in place of the system's, in tests
    #[arg(long, hide = true)]
    pub ca: Option<PathBuf>,
    /// Address of all public names, in tests
    #[arg(long, hide = true)]
    pub edge: Option<SocketAddr>,
    /// Print one object in JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration.
    #[command(flatten)]
    pub common: Common,
}

/// Longest name of a tunnel, characters.
const NAME_MAX: usize = 100;

fn name(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let fits = (1..=NAME_MAX).contains(&text.len()) && text.chars().all(is_plain);
    if fits {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 100 letters, digits, -, _ and .".to_owned())
    }
}

/// Most bytes that are read from stdin.
const STDIN_MAX: u64 = 4096;

/// Reads the API token: from a file, from stdin, or from the environment; `None` where there is none.
///
/// # Errors
/// When the file cannot be read.
pub fn token(
    file: Option<&Path>,
    env: &dyn Fn(&str) -> Option<String>,
) -> io::Result<Option<Secret<String>>> {
    let text = match file {
        None => {
            return Ok(env("CF_API_TOKEN")
                .filter(|token| !token.trim().is_empty())
                .map(Secret::new));
        }
        Some(path) if path == Path::new("-") => {
            let mut text = String::new();
            io::stdin().lock().take(STDIN_MAX).read_to_string(&mut text)?;
            text
        }
        Some(path) => text::read(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?,
    };
    Ok(Some(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_comes_from_a_file_or_the_environment_and_is_never_shown() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        std::fs::write(&path, "canary-file\n").expect("written");
        let env = |name: &str| (name == "CF_API_TOKEN").then(|| "canary-env".to_owned());
        let read = |file: Option<&Path>| token(file, &env).expect("read").expect("a token");
        assert_eq!(read(Some(&path)).trim(), "canary-file");
        assert_eq!(read(None).as_str(), "canary-env");
        assert_eq!(format!("{:?}", read(None)), proto::secret::HIDDEN);
        assert_eq!(token(None, &|_| Some(" ".into())).expect("read"), None);
        let error = token(Some(&dir.path().join("none")), &env).expect_err("none").to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn name_of_a_tunnel_is_plain() {
        name("pve-sandbox-example-com").expect("plain");
        for bad in ["", "a b", "a\"b", "a/b", &"x".repeat(101)] {
            name(bad).expect_err(bad);
        }
    }
}
