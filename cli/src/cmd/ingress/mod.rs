//! `ingress test`: asks the open ports of a sandbox what a browser asks from a page of another site.

mod judge;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use clap::{Args, Subcommand};
use daemon::{
    doctor::{Check, Report},
    web::{self, Client},
};
use http::{Method, Request, header};
use proto::sandbox::v1::{
    AccessKind, CreateAccessLinkRequest, GetSandboxRequest, HttpService, Visibility,
};

use super::targets::One;
use crate::{
    client::{Controller, answer, read},
    failure::Failure,
    output::Output,
};

use judge::{Answers, WithSession, judge};

/// Longest wait for one answer; a sandbox that wakes may take some seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of an answer that are read.
const BODY_MAX: usize = 4096;
/// Header with the token of a port.
const TOKEN: &str = "x-sbx-token";
/// Life of a credential that is made for one test, seconds: it is left behind.
const CREDENTIAL_S: i64 = 60;
/// Headers of a WebSocket's handshake; the key is any 16 bytes.
const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA=="),
];

/// Headers of a browser that loads a frame in a page of another site.
const FRAME: [(&str, &str); 3] = [
    ("sec-fetch-site", "cross-site"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-dest", "iframe"),
];

/// Verbs about the way in from the web.
#[derive(Debug, Subcommand)]
pub(crate) enum Ingress {
    /// Ask a sandbox's open ports what a browser asks from a page of another site
    Test(IngressTest),
}

/// Arguments of `ingress test`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl ingress test ID                    all open ports
  sandboxctl ingress test ID web --origin https://app.example.com

For each port: does it answer, may a page of another site read the answer and
show it in a frame, may it send a request (preflight), do WebSockets pass; and
for a team's port: may the page use its user's session.
Ends with 1 when something fails.")]
pub(crate) struct IngressTest {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Port or name of one service [default: all]
    #[arg(value_name = "PORT|NAME")]
    service: Option<String>,
    /// Page that asks
    #[arg(long, value_name = "URL", default_value = "https://page.example")]
    origin: String,
    /// Address of the ingress, in place of the one in DNS
    #[arg(long, value_name = "IP:PORT")]
    at: Option<SocketAddr>,
    /// Certificate of the CA of the ingress, PEM [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

pub(super) async fn run(
    controller: Controller,
    Ingress::Test(asked): Ingress,
    output: Output,
) -> Result<u8, Failure> {
    let call = || {
        let (mut client, request) =
            (controller.sandboxes.clone(), GetSandboxRequest { id: asked.sandbox.id.clone() });
        async move { client.get_sandbox(request).await }
    };
    let sandbox = read(call).await?.sandbox.unwrap_or_default();
    let is_asked = |service: &&HttpService| match &asked.service {
        Some(wanted) => *wanted == service.name || *wanted == service.port.to_string(),
        None => true,
    };
    let services: Vec<_> = sandbox.services.iter().filter(is_asked).collect();
    if services.is_empty() {
        let hint = "`sandboxctl expose` opens a port, `sandboxctl get` lists the open ones";
        return Err(Failure::usage("there is no such open port", hint));
    }
    let mut checks = Vec::new();
    for service in services {
        checks.extend(look(&controller, &sandbox.id, service, &asked).await?);
    }
    let report = Report::new(checks);
    if output.json {
        output.value(&report.json())?;
    } else {
        for line in report.text().lines() {
            output.line(line)?;
        }
    }
    Ok(u8::from(report.has_failed()))
}

/// Asks one service.
async fn look(
    controller: &Controller,
    id: &str,
    service: &HttpService,
    asked: &IngressTest,
) -> Result<Vec<Check>, Failure> {
    let name = format!("{} ({})", service.name, service.port);
    if let Some(unasked) = unasked(&name, service) {
        return Ok(vec![unasked]);
    }
    let client = match &asked.ca {
        None if service.url.starts_with("http://") => Client::without_tls(LIMIT, BODY_MAX),
        ca => Client::new(ca.as_deref(), LIMIT, BODY_MAX).map_err(|error| {
            Failure::usage(format!("--ca: {error}"), "name a file with a certificate")
        })?,
    };
    let asker = Asker { client, at: asked.at, origin: asked.origin.clone() };
    let access = match service.visibility() {
        Visibility::Unspecified | Visibility::Public | Visibility::Private => None,
        Visibility::Token => {
            let made = credential(controller, id, service, AccessKind::Token).await?;
            Some((TOKEN, made.0))
        }
        Visibility::Team => {
            let (_, link) = credential(controller, id, service, AccessKind::Link).await?;
            match asker.session(&link).await {
                Ok(cookie) => Some((header::COOKIE.as_str(), cookie)),
                Err(why) => {
                    let remedy = "sandboxctl link ID PORT, and open it in a browser";
                    return Ok(vec![Check::failed("access", name, why, remedy)]);
                }
            }
        }
    };
    let access = access.as_ref().map(|(name, value)| (*name, value.as_str()));
    // A session counts for a page or a frame that is loaded, and for requests of the sandbox's own page.
    let is_team = service.visibility() == Visibility::Team;
    let own = service.url.trim_end_matches('/');
    let from = ("origin", asker.origin.as_str());
    let page_of_socket = if is_team { ("origin", own) } else { from };
    // A browser says so which page asks, and the ingress lets that page show the answer.
    let referrer = format!("{}/", asker.origin);
    let mut page = vec![("referer", referrer.as_str())];
    page.extend_from_slice(if is_team { &FRAME } else { std::slice::from_ref(&from) });
    let answers = Answers {
        is_public: access.is_none(),
        get: asker.ask(&service.url, Method::GET, access, &page).await,
        preflight: asker
            .ask(
                &service.url,
                Method::OPTIONS,
                None,
                &[
                    from,
                    ("access-control-request-method", "POST"),
                    ("access-control-request-headers", "content-type"),
                ],
            )
            .await,
        websocket: asker
            .ask(&service.url, Method::GET, access, &[&HANDSHAKE[..], &[page_of_socket]].concat())
            .await,
        // The last ones: a script of an open page does not wake a sandbox.
        with_session: if is_team {
            Some(asker.with_session(&service.url, access).await)
        } else {
            None
        },
    };
    Ok(judge(&name, &asker.origin, &answers))
}

/// Judges a service to which nothing is sent; `None` for all others.
fn unasked(name: &str, service: &HttpService) -> Option<Check> {
    if service.url.is_empty() {
        let remedy = "sandboxctl get ID shows when it has one";
        return Some(Check::failed("answer", name, "it has no URL yet", remedy));
    }
    if service.bypasses_access {
        // A credential would go to the sandbox itself.
        let found = "there is no ingress: this URL leads to the container itself";
        let remedy = "pve-sandbox-controller setup --domain DOMAIN, and [ingress] domain in agent.toml: \
                      docs/local.md";
        return Some(Check::failed("answer", name, found, remedy));
    }
    (service.visibility() == Visibility::Private)
        .then(|| Check::ok("answer", name, "private: nobody reaches it by HTTP"))
}

/// Makes a credential of a port; returns it alone and as a URL.
async fn credential(
    controller: &Controller,
    id: &str,
    service: &HttpService,
    kind: AccessKind,
) -> Result<(String, String), Failure> {
    let request = order(id, service, kind);
    let made = answer(controller.sandboxes.clone().create_access_link(request)).await?;
    Ok((made.credential, made.url))
}

fn order(id: &str, service: &HttpService, kind: AccessKind) -> CreateAccessLinkRequest {
    CreateAccessLinkRequest {
        id: id.to_owned(),
        service: service.name.clone(),
        kind: kind.into(),
        ttl: Some(prost_types::Duration { seconds: CREDENTIAL_S, nanos: 0 }),
    }
}

/// Page of another site.
struct Asker {
    client: Client,
    at: Option<SocketAddr>,
    origin: String,
}

impl Asker {
    /// Sends one request.
    async fn ask(
        &self,
        url: &str,
        method: Method,
        access: Option<(&str, &str)>,
        headers: &[(&str, &str)],
    ) -> Result<web::Answer, web::Error> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in access.into_iter().chain(headers.iter().copied()) {
            request = request.header(name, value);
        }
        let request =
            request.body(Bytes::new()).map_err(|_| web::Error::Address(url.to_owned()))?;
        self.client.send(request, self.at.as_ref().map(std::slice::from_ref)).await
    }

    /// Asks as a script of the page does in its user's name.
    async fn with_session(&self, url: &str, access: Option<(&str, &str)>) -> WithSession {
        let from = [("origin", self.origin.as_str()), ("sec-fetch-site", "cross-site")];
        let fetch =
            [&from[..], &[("sec-fetch-mode", "cors"), ("sec-fetch-dest", "empty")]].concat();
        let socket = [&HANDSHAKE[..], &from, &[("sec-fetch-mode", "websocket")]].concat();
        WithSession {
            get: self.ask(url, Method::GET, access, &fetch).await,
            websocket: self.ask(url, Method::GET, access, &socket).await,
        }
    }

    /// Begins a session with a link, as a browser does; returns its cookie.
    async fn session(&self, link: &str) -> Result<String, String> {
        let answer = self.ask(link, Method::GET, None, &[]).await;
        let answer = answer.map_err(|error| daemon::chain::Chain(&error).to_string())?;
        let cookie = answer.headers.get(header::SET_COOKIE).and_then(|value| value.to_str().ok());
        let pair = cookie.and_then(|cookie| cookie.split(';').next());
        pair.map(str::to_owned)
            .ok_or_else(|| format!("{}: the link began no session", answer.status.as_u16()))
    }
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    fn service(visibility: Visibility) -> HttpService {
        HttpService {
            name: "web".into(),
            port: 80,
            url: "http://10.100.1.7:80".into(),
            visibility: visibility.into(),
            ..HttpService::default()
        }
    }

    /// Whatever is sent there reaches the sandbox itself, and a token of the port would, too.
    #[test]
    fn container_without_an_ingress_is_sent_nothing() {
        for visibility in
            [Visibility::Public, Visibility::Team, Visibility::Token, Visibility::Private]
        {
            let past = HttpService { bypasses_access: true, ..service(visibility) };
            let told = unasked("web (80)", &past).expect("nothing is sent");
            assert_eq!(told.state, State::Failed, "{told:?}");
            assert!(told.found.contains("leads to the container itself"), "{told:?}");
            let is_asked = unasked("web (80)", &service(visibility)).is_none();
            assert_eq!(is_asked, visibility != Visibility::Private, "{visibility:?}");
            let without = HttpService { url: String::new(), ..service(visibility) };
            assert!(unasked("web (80)", &without).is_some());
        }
    }

    #[test]
    fn credential_of_a_test_is_good_for_a_minute() {
        let ordered = order("pvelxc-01", &service(Visibility::Token), AccessKind::Token);
        assert_eq!(ordered.ttl.map(|ttl| (ttl.seconds, ttl.nanos)), Some((60, 0)));
        assert_eq!((ordered.service.as_str(), ordered.kind()), ("web", AccessKind::Token));
    }
}
