//! Cloudflare's API, version 4, as far as a tunnel needs it. Each call has a deadline and a bounded answer; a call
//! that comes too often waits as long as Cloudflare says, within a bound. The token is shown nowhere.

mod error;
pub mod model;
#[cfg(test)]
mod tests;

use std::{path::Path, sync::OnceLock, time::Duration};

use bytes::Bytes;
use daemon::web::{Answer, Client};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use proto::secret::Secret;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep};

pub use error::{Error, Permission};
use model::{
    Cname, Connector, Envelope, NewTunnel, Page, Problem, Record, TokenState, Tunnel, Zone,
};

use super::{
    ids::{CloudId, TunnelId},
    settings::Hostname,
};

/// Address of the API.
pub const BASE: &str = "https://api.cloudflare.com/client/v4";
/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(20);
/// Most bytes of an answer.
const BODY_MAX: usize = 4 << 20;
/// Longest wait of one call for its turn, all waits together.
const TURN_MAX: Duration = Duration::from_secs(60);
/// Wait for a turn where the answer names none.
const TURN: Duration = Duration::from_secs(5);
/// Entries of a page.
const PER_PAGE: u32 = 50;
/// Most pages of a list.
const PAGES_MAX: u32 = 20;
/// Longest token, bytes. Those of today have 40 to 60.
const TOKEN_MAX: usize = 256;

/// Client of the API.
#[derive(Debug)]
pub struct Api {
    web: Client,
    base: String,
    authorization: HeaderValue,
    /// Account of the calls, where it is known; see [`Api::know_account`].
    account: OnceLock<CloudId>,
}

/// Call, without the token.
struct Call {
    method: Method,
    path: String,
    body: Bytes,
    /// Permission that it needs.
    permission: Permission,
}

impl Call {
    fn new(method: Method, path: String, permission: Permission) -> Self {
        Self { method, path, body: Bytes::new(), permission }
    }

    fn get(path: String, permission: Permission) -> Self {
        Self::new(Method::GET, path, permission)
    }

    fn with(self, body: &impl serde::Serialize) -> Self {
        // Messages of ours have no map with other keys than text, so this cannot fail.
        Self { body: serde_json::to_vec(body).unwrap_or_default().into(), ..self }
    }

    /// Returns method and path, for people.
    fn name(&self) -> String {
        let path = self.path.split('?').next().unwrap_or_default();
        format!("{} {path}", self.method)
    }
}

impl Api {
    /// Makes a client. `ca` are CAs in place of the system's.
    ///
    /// # Errors
    /// When the base address or the token must not be used.
    pub fn new(base: &str, token: &Secret<String>, ca: Option<&Path>) -> Result<Self, Error> {
        let token = token.trim();
        let is_plain = |b: u8| b.is_ascii_graphic();
        if token.is_empty() || token.len() > TOKEN_MAX || !token.bytes().all(is_plain) {
            return Err(Error::TokenForm);
        }
        let bearer = Secret::new(format!("Bearer {token}"));
        let mut authorization = HeaderValue::try_from(&**bearer).map_err(|_| Error::TokenForm)?;
        authorization.set_sensitive(true);
        let uri: Uri = base.parse().map_err(|_| Error::Base(base.to_owned()))?;
        let is_here = uri.host().is_some_and(|host| ["127.0.0.1", "localhost"].contains(&host));
        let web = match uri.scheme_str() {
            Some("https") => Client::new(ca, LIMIT, BODY_MAX).map_err(Error::Client)?,
            Some("http") if is_here => Client::without_tls(LIMIT, BODY_MAX),
            Some(_) | None => return Err(Error::Base(base.to_owned())),
        };
        let base = base.trim_end_matches('/').to_owned();
        Ok(Self { web, base, authorization, account: OnceLock::new() })
    }

    /// Names the account of the calls. A token that belongs to an account, and to no user, is verified there: without
    /// it, such a token that lacks a permission is not told from one that nobody knows. The first one counts.
    pub fn know_account(&self, account: &CloudId) {
        self.account.get_or_init(|| account.clone());
    }

    /// Finds the zones of a host: those of the longest suffix of it that is one. Several accounts can have a zone of one
    /// name. None when the token sees none.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn zones_of(&self, host: &Hostname) -> Result<Vec<Zone>, Error> {
        let mut name = host.as_str();
        // A zone has two labels at least.
        while name.contains('.') {
            let path = format!("/zones?name={name}");
            let mut zones: Vec<Zone> = self.list(path, Permission::ZoneRead).await?;
            zones.retain(|zone| zone.name == name);
            if !zones.is_empty() {
                return Ok(zones);
            }
            name = name.split_once('.').map_or("", |(_, rest)| rest);
        }
        Ok(Vec::new())
    }

    /// Reads a zone.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn zone(&self, id: &CloudId) -> Result<Zone, Error> {
        self.one(Call::get(format!("/zones/{id}"), Permission::ZoneRead)).await
    }

    /// Finds a tunnel by its name.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn tunnel(&self, account: &CloudId, name: &str) -> Result<Option<Tunnel>, Error> {
        let path =
            format!("/accounts/{account}/cfd_tunnel?name={}&is_deleted=false", encoded(name));
        let tunnels: Vec<Tunnel> = self.list(path, Permission::TunnelEdit).await?;
        let mut tunnels = tunnels.into_iter();
        Ok(tunnels.find(|tunnel| tunnel.name == name && tunnel.deleted_at.is_none()))
    }

    /// Reads a tunnel; `None` when it is there no more.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn tunnel_of(
        &self,
        account: &CloudId,
        id: &TunnelId,
    ) -> Result<Option<Tunnel>, Error> {
        let path = format!("/accounts/{account}/cfd_tunnel/{id}");
        match self.one::<Tunnel>(Call::get(path, Permission::TunnelEdit)).await {
            Err(error) if error.is_missing() => Ok(None),
            found => Ok(Some(found?).filter(|tunnel| tunnel.deleted_at.is_none())),
        }
    }

    /// Makes a tunnel that is configured by a file beside each connector.
    ///
    /// # Errors
    /// When the call fails, or the name is taken.
    pub async fn create_tunnel(
        &self,
        account: &CloudId,
        name: &str,
        secret: &Secret<String>,
    ) -> Result<Tunnel, Error> {
        let order = NewTunnel { name, config_src: "local", tunnel_secret: secret };
        let path = format!("/accounts/{account}/cfd_tunnel");
        self.one(Call::new(Method::POST, path, Permission::TunnelEdit).with(&order)).await
    }

    /// Reads the token of a tunnel, which has its secret.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn tunnel_token(
        &self,
        account: &CloudId,
        id: &TunnelId,
    ) -> Result<Secret<String>, Error> {
        let path = format!("/accounts/{account}/cfd_tunnel/{id}/token");
        self.one(Call::get(path, Permission::TunnelEdit)).await
    }

    /// Lists the connectors of a tunnel that are connected: none of a tunnel that is not there.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn connectors(
        &self,
        account: &CloudId,
        id: &TunnelId,
    ) -> Result<Vec<Connector>, Error> {
        let path = format!("/accounts/{account}/cfd_tunnel/{id}/connections");
        match self.one::<Option<_>>(Call::get(path, Permission::TunnelEdit)).await {
            Err(error) if error.is_missing() => Ok(Vec::new()),
            found => Ok(found?.unwrap_or_default()),
        }
    }

    /// Ends all connections of a tunnel.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn disconnect(&self, account: &CloudId, id: &TunnelId) -> Result<(), Error> {
        let path = format!("/accounts/{account}/cfd_tunnel/{id}/connections");
        self.call(&Call::new(Method::DELETE, path, Permission::TunnelEdit)).await.map(drop)
    }

    /// Deletes a tunnel.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn delete_tunnel(&self, account: &CloudId, id: &TunnelId) -> Result<(), Error> {
        let path = format!("/accounts/{account}/cfd_tunnel/{id}");
        self.call(&Call::new(Method::DELETE, path, Permission::TunnelEdit)).await.map(drop)
    }

    /// Lists the DNS records of a name.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn records(&self, zone: &CloudId, name: &str) -> Result<Vec<Record>, Error> {
        let path = format!("/zones/{zone}/dns_records?name.exact={}", encoded(name));
        let mut records: Vec<Record> = self.list(path, Permission::DnsEdit).await?;
        records.retain(|record| record.name.eq_ignore_ascii_case(name));
        Ok(records)
    }

    /// Lists the DNS records that lead to a tunnel, whatever their names.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn records_to(
        &self,
        zone: &CloudId,
        tunnel: &TunnelId,
    ) -> Result<Vec<Record>, Error> {
        let path = format!("/zones/{zone}/dns_records?content.exact={}", tunnel.target());
        self.list(path, Permission::DnsEdit).await
    }

    /// Makes a DNS record.
    ///
    /// # Errors
    /// When the call fails, or there is another of its name.
    pub async fn create_record(&self, zone: &CloudId, record: &Cname) -> Result<Record, Error> {
        let path = format!("/zones/{zone}/dns_records");
        self.one(Call::new(Method::POST, path, Permission::DnsEdit).with(record)).await
    }

    /// Replaces a DNS record.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn replace_record(
        &self,
        zone: &CloudId,
        id: &str,
        record: &Cname,
    ) -> Result<Record, Error> {
        let path = format!("/zones/{zone}/dns_records/{}", encoded(id));
        self.one(Call::new(Method::PUT, path, Permission::DnsEdit).with(record)).await
    }

    /// Deletes a DNS record.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn delete_record(&self, zone: &CloudId, id: &str) -> Result<(), Error> {
        let path = format!("/zones/{zone}/dns_records/{}", encoded(id));
        self.call(&Call::new(Method::DELETE, path, Permission::DnsEdit)).await.map(drop)
    }

    async fn one<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        let envelope = self.call(&call).await?;
        parsed(&call, envelope.result)
    }

    /// Reads all pages of a list. `path` has a query.
    async fn list<T: DeserializeOwned>(
        &self,
        path: String,
        permission: Permission,
    ) -> Result<Vec<T>, Error> {
        let mut all = Vec::new();
        for page in 1..=PAGES_MAX {
            let call = Call::get(format!("{path}&page={page}&per_page={PER_PAGE}"), permission);
            let Envelope { result, result_info, .. } = self.call(&call).await?;
            let entries: Vec<T> = parsed(&call, result)?;
            let is_last = is_last(page, entries.len(), result_info);
            all.extend(entries);
            if is_last {
                return Ok(all);
            }
        }
        Err(Error::TooLong(Call::get(path, permission).name()))
    }

    async fn call(&self, call: &Call) -> Result<Envelope, Error> {
        let answer = self.in_turn(&call.method, &call.path, &call.body).await?;
        self.judge(call, &answer).await
    }

    /// Sends a request, and waits for its turn where Cloudflare says so.
    async fn in_turn(&self, method: &Method, path: &str, body: &Bytes) -> Result<Answer, Error> {
        let until = Instant::now() + TURN_MAX;
        loop {
            let answer = self.send(method, path, body.clone()).await?;
            if answer.status != StatusCode::TOO_MANY_REQUESTS {
                return Ok(answer);
            }
            let wait = retry_after(&answer.headers).unwrap_or(TURN);
            // Compared with what is left: a sum of a time and a number of somebody else's can overflow.
            if wait >= until.saturating_duration_since(Instant::now()) {
                return Err(Error::Busy(wait));
            }
            sleep(wait).await;
        }
    }

    async fn send(&self, method: &Method, path: &str, body: Bytes) -> Result<Answer, Error> {
        let name = || format!("{method} {}", path.split('?').next().unwrap_or_default());
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, self.authorization.clone())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("pve-sandbox-agent/", env!("CARGO_PKG_VERSION")));
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let malformed = |why: String| Error::Malformed { call: name(), why };
        let request = request.body(body).map_err(|error| malformed(error.to_string()))?;
        let sent = self.web.send(request, None).await;
        let answer = sent.map_err(|source| Error::Web { call: name(), source })?;
        if answer.is_whole { Ok(answer) } else { Err(malformed("it is too long".to_owned())) }
    }

    async fn judge(&self, call: &Call, answer: &Answer) -> Result<Envelope, Error> {
        let status = answer.status;
        let parsed: Result<Envelope, _> = serde_json::from_slice(&answer.body);
        let malformed = |why: String| Error::Malformed { call: call.name(), why };
        let envelope = match parsed {
            Ok(envelope) => envelope,
            // A proxy on the way, or the edge itself, answers with a page.
            Err(_) if !status.is_success() => Envelope::empty(),
            Err(error) => return Err(malformed(error.to_string())),
        };
        // A token of no use is told with 400, too.
        let is_weak = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status)
            || is_unreadable(&envelope.errors);
        if is_weak {
            return Err(self.weak(call, status, envelope.errors).await);
        }
        if status.is_success() && envelope.success {
            return Ok(envelope);
        }
        Err(Error::Refused {
            call: call.name(),
            status: status.as_u16(),
            problems: envelope.errors,
        })
    }

    /// Finds out why a call was refused with these problems: the token is worth nothing, or lacks a permission, or it is
    /// for another reason, such as the address that it is used from.
    async fn weak(&self, call: &Call, status: StatusCode, problems: Vec<Problem>) -> Error {
        let of_call = call.path.strip_prefix("/accounts/").and_then(|path| path.split('/').next());
        let known = self.account.get().map(ToString::to_string);
        let account = of_call.map(str::to_owned).or(known);
        let state = match self.verify(account.as_deref()).await {
            Err(error) => return error,
            Ok(Verified::State(state)) if state == "active" => {
                return Error::Lacks { permission: call.permission, call: call.name(), problems };
            }
            Ok(Verified::State(other)) => other,
            Ok(Verified::Unknown) if account.is_some() => "unknown".to_owned(),
            Ok(Verified::Unknown) => format!(
                "unknown, or it belongs to an account and lacks {} ({}; --account-id lets this command tell which)",
                call.permission,
                call.name()
            ),
            Ok(Verified::NotTold) if is_unreadable(&problems) => "malformed".to_owned(),
            Ok(Verified::NotTold) => {
                return Error::Refused { call: call.name(), status: status.as_u16(), problems };
            }
        };
        Error::Token { state, problems }
    }

    /// Asks for the state of the token, first as a user's and then as that of an account.
    async fn verify(&self, account: Option<&str>) -> Result<Verified, Error> {
        let of_user = self.verify_at("/user/tokens/verify").await?;
        let (Some(account), Verified::Unknown | Verified::NotTold) = (account, &of_user) else {
            return Ok(of_user);
        };
        let of_account = self.verify_at(&format!("/accounts/{account}/tokens/verify")).await?;
        Ok(match (of_user, of_account) {
            (_, Verified::State(state)) => Verified::State(state),
            (Verified::Unknown, Verified::Unknown) => Verified::Unknown,
            (_, Verified::Unknown | Verified::NotTold) => Verified::NotTold,
        })
    }

    async fn verify_at(&self, path: &str) -> Result<Verified, Error> {
        Ok(verified(&self.in_turn(&Method::GET, path, &Bytes::new()).await?))
    }
}

/// Cloudflare's word on the token.
#[derive(Debug, PartialEq, Eq)]
enum Verified {
    /// State, such as `active`.
    State(String),
    /// Nobody knows the token there.
    Unknown,
    /// The question itself was refused.
    NotTold,
}

impl Envelope {
    fn empty() -> Self {
        Self {
            success: false,
            errors: Vec::new(),
            result: serde_json::Value::Null,
            result_info: None,
        }
    }
}

/// Codes of a token that cannot be read at all.
const INVALID_TOKEN: &[u32] = &[6003, 6111];

/// Code of a token that nobody knows.
const UNKNOWN_TOKEN: u32 = 1000;

/// Returns true when Cloudflare could not read the token at all.
fn is_unreadable(problems: &[Problem]) -> bool {
    problems.iter().any(|problem| INVALID_TOKEN.contains(&problem.code))
}

/// Reads an answer to the question for the state of the token.
fn verified(answer: &Answer) -> Verified {
    let envelope: Envelope =
        serde_json::from_slice(&answer.body).unwrap_or_else(|_| Envelope::empty());
    let is_unknown = answer.status == StatusCode::UNAUTHORIZED
        || envelope.errors.iter().any(|problem| problem.code == UNKNOWN_TOKEN);
    match serde_json::from_value(envelope.result) {
        Ok(TokenState { status }) if envelope.success && !status.is_empty() => {
            Verified::State(error::plain(&status))
        }
        _ if is_unknown => Verified::Unknown,
        _ => Verified::NotTold,
    }
}

fn parsed<T: DeserializeOwned>(call: &Call, result: serde_json::Value) -> Result<T, Error> {
    // The error of serde could show a value; its kind and place are enough.
    serde_json::from_value(result).map_err(|error| Error::Malformed {
        call: call.name(),
        why: format!("{:?} error", error.classify()),
    })
}

/// Returns true when no page follows.
fn is_last(page: u32, entries: usize, info: Option<Page>) -> bool {
    let Some(info) = info else { return true };
    if info.total_pages > 0 {
        return page >= info.total_pages;
    }
    let per_page = if info.per_page > 0 { info.per_page } else { PER_PAGE };
    match info.total_count {
        0 => entries == 0 || info.count < per_page,
        total => page.saturating_mul(per_page) >= total,
    }
}

/// Returns the wait that an answer asks for, in seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// Returns a text as a part of a query or a path.
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
