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

use crate::{
    client::{Controller, answer, read},
    failure::Failure,
    output::Output,
};

use judge::{Answers, judge};

/// Longest wait for one answer; a sandbox that wakes may take some seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of an answer that are read.
const BODY_MAX: usize = 4096;
/// Header with the token of a port.
const TOKEN: &str = "x-sbx-token";
/// Key of a WebSocket's handshake: any 16 bytes.
const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAA==";

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
show it in a frame, may it send a request (preflight), do WebSockets pass.
Ends with 1 when something fails.")]
pub(crate) struct IngressTest {
    /// Sandbox: its id or a part of it from either end, a vmid, @current or @last
    pub(super) id: String,
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
            (controller.sandboxes.clone(), GetSandboxRequest { id: asked.id.clone() });
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
    if service.url.is_empty() {
        let remedy = "sandboxctl get ID shows when it has one";
        return Ok(vec![Check::failed("answer", name, "it has no URL yet", remedy)]);
    }
    let client = match &asked.ca {
        None if service.url.starts_with("http://") => Client::without_tls(LIMIT, BODY_MAX),
        ca => Client::new(ca.as_deref(), LIMIT, BODY_MAX).map_err(|error| {
            Failure::usage(format!("--ca: {error}"), "name a file with a certificate")
        })?,
    };
    let asker = Asker { client, at: asked.at, origin: asked.origin.clone() };
    let access = match service.visibility() {
        Visibility::Private => {
            return Ok(vec![Check::ok("answer", name, "private: nobody reaches it by HTTP")]);
        }
        Visibility::Unspecified | Visibility::Public => None,
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
            .ask(
                &service.url,
                Method::GET,
                access,
                &[
                    page_of_socket,
                    ("connection", "Upgrade"),
                    ("upgrade", "websocket"),
                    ("sec-websocket-version", "13"),
                    ("sec-websocket-key", KEY),
                ],
            )
            .await,
    };
    Ok(judge(&name, &asker.origin, &answers))
}

/// Makes a credential of a port; returns it alone and as a URL.
async fn credential(
    controller: &Controller,
    id: &str,
    service: &HttpService,
    kind: AccessKind,
) -> Result<(String, String), Failure> {
    let request = CreateAccessLinkRequest {
        id: id.to_owned(),
        service: service.name.clone(),
        kind: kind.into(),
        ttl: None,
    };
    let made = answer(controller.sandboxes.clone().create_access_link(request)).await?;
    Ok((made.credential, made.url))
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
