//! `tunnel test`: fetches the open ports of a sandbox by their public names, and from this node's Caddy, and
//! says where a request that goes wrong ends.

mod verdict;

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use daemon::{
    chain::Chain,
    doctor::Check,
    web::{self, Client},
};
use http::{HeaderMap, Request, StatusCode, header};
use proto::{id::SandboxId, name::Port, visibility::Visibility};
use serde::Deserialize;

pub use verdict::{Place, Verdict, verdict};

/// Longest wait for an answer; a sandbox that wakes may take some seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of an answer that are read.
const BODY_MAX: usize = 64 * 1024;

/// Open port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Name; one of them, if it has more.
    pub name: String,
    /// Port.
    pub port: Port,
    /// Visibility.
    pub visibility: Visibility,
}

/// Answer, as far as the verdict needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Beginning of the body; of a refusal in JSON, its sentence.
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

/// Observations of one open port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Visibility of the port.
    pub visibility: Visibility,
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
        let Service { name, visibility, .. } = service;
        let seen = Seen { visibility: *visibility, public, local, connections: self.connections };
        verdict(&seen).check(format!("{name} {url}"))
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
    let body = String::from_utf8_lossy(&answer.body).into_owned();
    let refusal = refusal(answer.status, &answer.headers, &body);
    Ok(Answer {
        status: answer.status.as_u16(),
        is_from_cloudflare: answer.headers.contains_key("cf-ray"),
        is_of_node: refusal.is_some(),
        body: refusal.unwrap_or(body),
    })
}

/// Refusal of the agent in JSON.
#[derive(Deserialize)]
struct Refusal {
    code: u16,
    message: String,
}

/// Returns the sentence of a refusal by Caddy or the agent; `None` for an answer of the sandbox.
///
/// All refusals may be read by every page and kept by nobody. Where Caddy lets pages read a sandbox's answer, it
/// exposes its headers, too. The agent says who gets in as JSON, and all else as text.
fn refusal(status: StatusCode, headers: &HeaderMap, body: &str) -> Option<String> {
    let has = |name, value: &str| headers.get(name).is_some_and(|found| found == value);
    let is_alike = (status.is_client_error() || status.is_server_error())
        && has(header::CACHE_CONTROL, "no-store")
        && has(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")
        && !headers.contains_key(header::ACCESS_CONTROL_EXPOSE_HEADERS);
    if is_alike && has(header::CONTENT_TYPE, "text/plain; charset=utf-8") {
        return Some(body.to_owned());
    }
    let is_of_access = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    let is_json = is_alike && is_of_access && has(header::CONTENT_TYPE, "application/json");
    let refusal: Refusal = is_json.then(|| serde_json::from_str(body).ok())??;
    (refusal.code == status.as_u16()).then_some(refusal.message)
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::ingress::refuse;

    /// Takes the agent's refusal for want of access apart, as a client that accepts anything gets it.
    async fn refused(status: StatusCode) -> (HeaderMap, String) {
        let (head, body) = refuse(status, "send a token", false).into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        (head.headers, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn refusal_for_want_of_access_is_recognised_by_what_the_agent_sends() {
        for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
            let (headers, body) = refused(status).await;
            let sentence = refusal(status, &headers, &body);
            assert_eq!(sentence.as_deref(), Some("send a token"), "{headers:?}");
        }
    }

    #[tokio::test]
    async fn answer_of_the_sandbox_is_taken_for_no_refusal() {
        let status = StatusCode::UNAUTHORIZED;
        let (headers, body) = refused(status).await;
        let own = refusal(status, &headers, "{\"error\":\"log in\"}");
        assert_eq!(own, None, "JSON of another form");
        assert_eq!(refusal(StatusCode::OK, &headers, &body), None, "a success");
        let absent = r#"{"code":404,"message":"Not Found"}"#;
        assert_eq!(refusal(StatusCode::NOT_FOUND, &headers, absent), None, "its own 404");
        // Caddy adds both headers where the server says nothing of other pages.
        let mut exposed = headers.clone();
        let all = HeaderValue::from_static("*");
        exposed.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, all);
        assert_eq!(refusal(status, &exposed, &body), None, "an answer with exposed headers");
        for name in [header::CACHE_CONTROL, header::ACCESS_CONTROL_ALLOW_ORIGIN] {
            let mut others = headers.clone();
            others.remove(&name);
            assert_eq!(refusal(status, &others, &body), None, "without {name}");
        }
    }
}
