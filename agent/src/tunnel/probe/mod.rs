//! `tunnel test`: fetches the exposed services of a sandbox by their public names, and from this node's Caddy, and
//! says where a request that goes wrong ends.

mod verdict;

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use daemon::{
    chain::Chain,
    doctor::Check,
    web::{self, Client},
};
use http::{HeaderMap, Request, header};
use proto::{id::SandboxId, name::Port};

pub use verdict::{Place, Verdict, verdict};

/// Longest wait for an answer; a sandbox that wakes may take some seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of an answer that are read.
const BODY_MAX: usize = 64 * 1024;

/// Exposed service of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Port.
    pub port: Port,
}

/// Answer, as far as the verdict needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Beginning of the body.
    pub body: String,
    /// Whether it passed Cloudflare.
    pub is_from_cloudflare: bool,
    /// Whether Caddy or the agent gives it, and not the sandbox.
    pub is_of_node: bool,
}

/// Reason why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The name has no address.
    NoName,
    /// No connection.
    NoConnection(String),
    /// No TLS.
    NoTls(String),
    /// No answer in time.
    Slow,
    /// The exchange broke off.
    Broken(String),
}

/// Observations of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Answer by the public name.
    pub public: Result<Answer, Failure>,
    /// Answer of this node's Caddy for the same host.
    pub local: Result<Answer, Failure>,
    /// Connections of this node's cloudflared; `None` where it does not answer.
    pub connections: Option<u32>,
}

/// Places that are asked.
#[derive(Debug)]
pub struct Probe {
    /// Client for the public names.
    pub web: Client,
    /// Domain of the sandboxes' host names.
    pub domain: String,
    /// Addresses of the public names in place of those of DNS, in tests.
    pub at: Option<Vec<SocketAddr>>,
    /// This node's Caddy.
    pub caddy: SocketAddr,
    /// Connections of this node's cloudflared.
    pub connections: Option<u32>,
}

impl Probe {
    /// Makes the client for public names.
    ///
    /// # Errors
    /// When the system has no CAs.
    pub fn client(ca: Option<&std::path::Path>) -> Result<Client, daemon::tls::Error> {
        Client::new(ca, LIMIT, BODY_MAX)
    }

    /// Returns the public name of a service.
    pub fn host(&self, sandbox: &SandboxId, port: Port) -> String {
        format!("port-{port}-{sandbox}.{}", self.domain)
    }

    /// Asks for a service, and judges what comes.
    pub async fn check(&self, sandbox: &SandboxId, service: &Service) -> Check {
        let host = self.host(sandbox, service.port);
        let local = Client::without_tls(LIMIT, BODY_MAX);
        let (caddy, url) = (format!("http://{}/", self.caddy), format!("https://{host}/"));
        let (public, local) = tokio::join!(
            get(&self.web, &url, None, self.at.as_deref()),
            get(&local, &caddy, Some(&host), None),
        );
        let seen = Seen { public, local, connections: self.connections };
        verdict(&seen).check(format!("{} {url}", service.name))
    }
}

async fn get(
    web: &Client,
    url: &str,
    host: Option<&str>,
    at: Option<&[SocketAddr]>,
) -> Result<Answer, Failure> {
    let mut request = Request::get(url)
        .header(header::ACCEPT, "*/*")
        .header(header::USER_AGENT, concat!("pve-sandbox-agent/", env!("CARGO_PKG_VERSION")));
    if let Some(host) = host {
        request = request.header(header::HOST, host);
    }
    let request = request.body(Bytes::new()).map_err(|error| Failure::Broken(error.to_string()))?;
    let answer = web.send(request, at).await.map_err(|error| failure(&error))?;
    Ok(Answer {
        status: answer.status.as_u16(),
        is_from_cloudflare: answer.headers.contains_key("cf-ray"),
        is_of_node: is_of_node(&answer.headers),
        body: String::from_utf8_lossy(&answer.body).into_owned(),
    })
}

/// Returns true for the headers of a refusal by Caddy or the agent: sandboxes rarely have all three.
fn is_of_node(headers: &HeaderMap) -> bool {
    let has = |name, value: &str| headers.get(name).is_some_and(|found| found == value);
    has(header::CONTENT_TYPE, "text/plain; charset=utf-8")
        && has(header::CACHE_CONTROL, "no-store")
        && has(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")
}

fn failure(error: &web::Error) -> Failure {
    let text = Chain(error).to_string();
    match error {
        web::Error::Resolve { .. } => Failure::NoName,
        web::Error::Connect(..) => Failure::NoConnection(text),
        web::Error::Tls(..) => Failure::NoTls(text),
        web::Error::Slow(_) => Failure::Slow,
        web::Error::Exchange(_) | web::Error::Address(_) => Failure::Broken(text),
    }
}
