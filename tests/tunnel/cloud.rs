//! A server that plays Cloudflare's API: it checks each request against the shapes of Cloudflare's own client.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use super::shapes;

pub(crate) const ACCOUNT: &str = "699d98642c564d2e855e9661899b7252";
pub(crate) const ZONE: &str = "023e105f4ecef8ad9ca31a8372d0c353";
pub(crate) const TOKEN: &str = "canary-token-of-the-api";

/// Permissions of the token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct May {
    pub(crate) tunnels: bool,
    pub(crate) dns: bool,
    pub(crate) zones: bool,
}

/// Way in which a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is done.
    Refused,
    /// All is done, and the answer is lost.
    Lost,
}

/// State of the account.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) zones: Vec<Value>,
    pub(crate) tunnels: Vec<Value>,
    pub(crate) records: BTreeMap<String, Vec<Value>>,
    /// Connectors of each tunnel.
    pub(crate) connectors: BTreeMap<String, Vec<Value>>,
    secrets: BTreeMap<String, String>,
    pub(crate) may: May,
    /// Zone whose records the token may not see.
    pub(crate) hidden_zone: Option<&'static str>,
    /// State of the token, such as `active`; `None`: nobody knows it.
    pub(crate) token: Option<&'static str>,
    /// Answers to the next calls: 429, with this `retry-after`. An empty one lets its call pass.
    pub(crate) busy: VecDeque<&'static str>,
    /// Entries of a page, fewer than are asked for.
    pub(crate) page_max: usize,
    /// Times that a deletion of a tunnel finds connections.
    pub(crate) lingers: usize,
    /// Whether the token belongs to the account, and to no user.
    pub(crate) token_of_account: bool,
    /// Tunnel that somebody makes just before our own creation.
    pub(crate) faster: Option<Value>,
    /// DNS record that somebody makes just before our own creation.
    pub(crate) rival: Option<Value>,
    /// Number of requests that go well before the one that fails, and how that one fails. `None` once it has failed.
    pub(crate) fault: Option<(usize, Fault)>,
    /// Method and path of each request.
    pub(crate) calls: Vec<String>,
    /// Faults of requests.
    wrong: Vec<String>,
    next: u32,
}

/// Server; see the module.
#[derive(Debug)]
pub(crate) struct Cloud {
    state: Arc<Mutex<State>>,
    pub(crate) base: String,
    serving: AbortHandle,
}

struct Request {
    method: String,
    path: Vec<String>,
    query: Vec<(String, String)>,
    body: Value,
}

type Answer = (u16, Value);

impl Cloud {
    /// Starts one with the zone `example.com` and nothing in it.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self::serve(listener, "example.com")
    }

    /// Serves one with this zone and nothing in it.
    pub(crate) fn serve(listener: TcpListener, name: &str) -> Self {
        let state = State {
            zones: vec![zone(ZONE, name)],
            tunnels: Vec::new(),
            records: BTreeMap::new(),
            connectors: BTreeMap::new(),
            secrets: BTreeMap::new(),
            may: May { tunnels: true, dns: true, zones: true },
            hidden_zone: None,
            token: Some("active"),
            busy: VecDeque::new(),
            page_max: 50,
            lingers: 0,
            token_of_account: false,
            faster: None,
            rival: None,
            fault: None,
            calls: Vec::new(),
            wrong: Vec::new(),
            next: 1,
        };
        let state = Arc::new(Mutex::new(state));
        let base = format!("http://{}/client/v4", listener.local_addr().expect("bound"));
        let shared = Arc::clone(&state);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Self { state, base, serving: serving.abort_handle() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    /// Returns the calls since the last question that change something.
    pub(crate) fn writes(&self) -> Vec<String> {
        let mut state = self.state();
        let calls = std::mem::take(&mut state.calls);
        calls.into_iter().filter(|call| !call.starts_with("GET ")).collect()
    }

    /// Returns all calls since the last question.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state().calls)
    }

    pub(crate) fn add_tunnel(&self, name: &str, config_src: &str) -> String {
        self.state().add_tunnel(name, config_src, "c2VjcmV0IG9mIGFub3RoZXIgbm9kZSwgMzIgYnl0ZXMh")
    }

    pub(crate) fn add_record(&self, record: &Value) {
        let mut state = self.state();
        let id = state.id();
        let mut record = record.clone();
        record["id"] = json!(format!("{id:032x}"));
        state.records.entry(ZONE.to_owned()).or_default().push(record);
    }

    pub(crate) fn records(&self) -> Vec<Value> {
        self.state().records.get(ZONE).cloned().unwrap_or_default()
    }

    pub(crate) fn tunnel(&self) -> Value {
        self.state().tunnels.first().cloned().expect("a tunnel")
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.serving.abort();
        let wrong = self.state.lock().map(|state| state.wrong.clone()).unwrap_or_default();
        assert!(
            std::thread::panicking() || wrong.is_empty(),
            "not of Cloudflare's shapes: {wrong:?}"
        );
    }
}

pub(crate) fn zone(id: &str, name: &str) -> Value {
    json!({
        "id": id, "name": name, "status": "active", "type": "full", "paused": false,
        "account": { "id": ACCOUNT, "name": "acme" },
        "name_servers": ["a.ns.test", "b.ns.test"],
    })
}

/// Returns a connector of another node.
pub(crate) fn connector(id: &str) -> Value {
    json!({
        "id": id, "version": "2026.8.2", "arch": "linux_amd64", "run_at": "2026-11-30T10:00:00Z",
        "conns": [{ "colo_name": "FRA", "origin_ip": "192.0.2.9" }],
    })
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut stream = BufReader::new(stream);
    let Some((request, authorization, agent)) = read(&mut stream).await else { return };
    let (status, retry, body) = {
        let mut state = state.lock().expect("not poisoned");
        if !agent.starts_with("pve-sandbox-agent/") {
            state.wrong.push(format!("the user agent is {agent:?}"));
        }
        let fault = state.next_fault();
        let lost = || (500, None, failure(10_001, "Internal error"));
        let busy = state.busy.pop_front().filter(|after| !after.is_empty());
        match (busy, fault) {
            (Some(after), _) => (429, Some(after), failure(10_429, "Too many requests")),
            (None, Some(Fault::Refused)) => lost(),
            (None, Some(Fault::Lost)) => {
                state.answer(&request, &authorization);
                lost()
            }
            (None, None) => {
                let (status, body) = state.answer(&request, &authorization);
                (status, None, body)
            }
        }
    };
    let body = body.to_string();
    let retry = retry.map(|after| format!("retry-after: {after}\r\n")).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{retry}content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.ok();
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<(Request, String, String)> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut authorization, mut agent) = (0, String::new(), String::new());
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        let value = value.trim().to_owned();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "authorization" => authorization = value,
            "user-agent" => agent = value,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).ok()? };
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let path = path.strip_prefix("/client/v4/")?.split('/').map(decoded).collect();
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = pairs.map(|(name, value)| (decoded(name), decoded(value))).collect();
    Some((Request { method, path, query, body }, authorization, agent))
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits: String = rest.by_ref().take(2).map(char::from).collect();
        bytes.push(u8::from_str_radix(&digits, 16).expect("percent and two digits"));
    }
    String::from_utf8(bytes).expect("UTF-8")
}

fn success(result: Value) -> Answer {
    (200, json!({ "success": true, "errors": [], "messages": [], "result": result }))
}

fn failure(code: u32, message: &str) -> Value {
    json!({
        "success": false, "messages": [], "result": null,
        "errors": [{ "code": code, "message": message }],
    })
}

impl State {
    fn id(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Counts a request; returns how it fails.
    fn next_fault(&mut self) -> Option<Fault> {
        let (left, fault) = self.fault?;
        self.fault = left.checked_sub(1).map(|left| (left, fault));
        (left == 0).then_some(fault)
    }

    fn add_tunnel(&mut self, name: &str, config_src: &str, secret: &str) -> String {
        let id = format!("f70ff985-a4ef-4643-bbbc-4a0ed4fc{:04x}", self.id());
        self.tunnels.push(json!({
            "id": id, "account_tag": ACCOUNT, "config_src": config_src, "connections": [],
            "created_at": "2026-11-30T00:00:00Z", "deleted_at": null, "name": name,
            "remote_config": config_src != "local", "status": "inactive", "tun_type": "cfd_tunnel",
        }));
        self.secrets.insert(id.clone(), secret.to_owned());
        id
    }

    fn answer(&mut self, request: &Request, authorization: &str) -> Answer {
        let Request { method, path, query, body } = request;
        self.calls.push(format!("{method} /{}", path.join("/")));
        if authorization != format!("Bearer {TOKEN}") {
            self.wrong.push(format!("{method} {path:?} without the token"));
        }
        let path: Vec<_> = path.iter().map(String::as_str).collect();
        match (method.as_str(), path.as_slice()) {
            ("GET", ["user", "tokens", "verify"]) => return self.verify(!self.token_of_account),
            ("GET", ["accounts", account, "tokens", "verify"]) => {
                return self.verify(self.token_of_account && *account == ACCOUNT);
            }
            _ => {}
        }
        if let Some(refusal) = self.refusal(&path) {
            return refusal;
        }
        match (method.as_str(), path.as_slice()) {
            ("GET", ["zones"]) => {
                self.check(shapes::query("ZoneListParams", query));
                let found = of_name(&self.zones, "name", value(query, "name"));
                self.page(&found, query, "Zone")
            }
            ("GET", ["zones", id]) => one(&self.zones, id),
            (_, ["zones", zone, "dns_records", rest @ ..]) => {
                self.records_of(method, zone, rest, query, body)
            }
            (_, ["accounts", ACCOUNT, "cfd_tunnel", rest @ ..]) => {
                self.tunnels_of(method, rest, query, body)
            }
            _ => (404, failure(7003, "Could not route to the path")),
        }
    }

    fn verify(&self, is_here: bool) -> Answer {
        match self.token.filter(|_| is_here) {
            Some(status) => {
                success(json!({ "id": "ed17574386854bf78a67040be0a770b0", "status": status }))
            }
            None => (401, failure(1000, "Invalid API Token")),
        }
    }

    /// Refuses what the token may not do, as Cloudflare does: it names no permission.
    fn refusal(&self, path: &[&str]) -> Option<Answer> {
        let may = match path {
            ["zones", zone, "dns_records", ..] => self.may.dns && self.hidden_zone != Some(*zone),
            ["zones", ..] => self.may.zones,
            ["accounts", ..] => self.may.tunnels,
            _ => false,
        };
        let is_active = self.token == Some("active");
        (!may || !is_active).then(|| (403, failure(10_000, "Authentication error")))
    }

    fn check(&mut self, wrong: Vec<String>) {
        self.wrong.extend(wrong);
    }

    fn page(&mut self, all: &[Value], query: &[(String, String)], shape: &str) -> Answer {
        for entry in all {
            self.check(shapes::result(shape, entry));
        }
        let number = |name, or| value(query, name).and_then(|text| text.parse().ok()).unwrap_or(or);
        let (page, per_page) = (number("page", 1), number("per_page", 20).min(self.page_max));
        let entries: Vec<_> = all.iter().skip((page - 1) * per_page).take(per_page).collect();
        let info = json!({
            "page": page, "per_page": per_page, "count": entries.len(), "total_count": all.len(),
            "total_pages": all.len().div_ceil(per_page),
        });
        let (status, mut body) = success(json!(entries));
        body["result_info"] = info;
        (status, body)
    }

    fn records_of(
        &mut self,
        method: &str,
        zone: &str,
        rest: &[&str],
        query: &[(String, String)],
        body: &Value,
    ) -> Answer {
        let id = self.id();
        let records = self.records.entry(zone.to_owned()).or_default();
        match (method, rest) {
            ("GET", []) => {
                let found = of_name(records, "name", value(query, "name.exact"));
                let found = of_name(&found, "content", value(query, "content.exact"));
                self.check(shapes::query("RecordListParams", query));
                self.page(&found, query, "RecordResponse")
            }
            ("POST", []) => {
                records.extend(self.rival.take());
                let is_taken = records.iter().any(|there| {
                    let kind = there["type"].as_str().unwrap_or_default();
                    there["name"] == body["name"] && ["A", "AAAA", "CNAME"].contains(&kind)
                });
                if is_taken {
                    let text = "An A, AAAA, or CNAME record with that host already exists.";
                    return (400, failure(81_053, text));
                }
                let mut record = body.clone();
                record["id"] = json!(format!("{id:032x}"));
                records.push(record.clone());
                self.check(shapes::body("CNAMERecordParam", body));
                success(record)
            }
            ("PUT", [id]) => {
                let Some(there) = records.iter_mut().find(|there| there["id"] == **id) else {
                    return (404, failure(81_044, "Record does not exist."));
                };
                let mut record = body.clone();
                record["id"] = json!(id);
                *there = record.clone();
                self.check(shapes::body("CNAMERecordParam", body));
                success(record)
            }
            ("DELETE", [id]) => {
                records.retain(|there| there["id"] != **id);
                success(json!({ "id": id }))
            }
            _ => (404, failure(7003, "Could not route to the path")),
        }
    }

    fn tunnels_of(
        &mut self,
        method: &str,
        rest: &[&str],
        query: &[(String, String)],
        body: &Value,
    ) -> Answer {
        match (method, rest) {
            ("GET", []) => {
                self.check(shapes::query("CloudflaredListParams", query));
                let found = of_name(&self.tunnels, "name", value(query, "name"));
                self.page(&found, query, "CloudflareTunnel")
            }
            ("POST", []) => {
                self.check(shapes::body("CloudflaredCreateParams", body));
                self.tunnels.extend(self.faster.take());
                if self.tunnels.iter().any(|there| there["name"] == body["name"]) {
                    return (409, failure(1013, "You already have a tunnel with this name."));
                }
                let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
                let secret = text("tunnel_secret");
                self.add_tunnel(&text("name"), &text("config_src"), &secret);
                success(self.tunnels.last().cloned().unwrap_or_default())
            }
            ("GET", [id]) => one(&self.tunnels, id),
            ("GET", [id, "token"]) => {
                let Some(secret) = self.secrets.get(*id) else {
                    return (404, failure(1003, "Tunnel not found"));
                };
                let token = json!({ "a": ACCOUNT, "t": id, "s": secret }).to_string();
                success(json!(base64(token.as_bytes())))
            }
            ("GET", [id, "connections"])
                if self.tunnels.iter().any(|there| there["id"] == **id) =>
            {
                let found = self.connectors.get(*id).cloned().unwrap_or_default();
                for one in &found {
                    self.check(shapes::result("Client", one));
                }
                success(json!(found))
            }
            ("DELETE", [id, "connections"]) => {
                self.connectors.remove(*id);
                success(json!({}))
            }
            ("DELETE", [id]) => {
                if self.lingers > 0 {
                    self.lingers -= 1;
                    return (
                        400,
                        failure(1022, "Cannot delete tunnel because it has active connections."),
                    );
                }
                self.tunnels.retain(|there| there["id"] != **id);
                success(json!({ "id": id }))
            }
            _ => (404, failure(1003, "Tunnel not found")),
        }
    }
}

fn value<'a>(query: &'a [(String, String)], name: &str) -> Option<&'a str> {
    query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

fn of_name(all: &[Value], key: &str, wanted: Option<&str>) -> Vec<Value> {
    let fits = |entry: &&Value| wanted.is_none_or(|wanted| entry[key] == *wanted);
    all.iter().filter(fits).cloned().collect()
}

fn one(all: &[Value], id: &str) -> Answer {
    let found = all.iter().find(|entry| entry["id"] == *id).cloned();
    found.map_or_else(|| (404, failure(1001, "Invalid zone identifier")), success)
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let digit = DIGITS[usize::try_from(group >> (18 - 6 * at) & 63).expect("small")];
            text.push(if at <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}
