//! Renders Caddy's one configuration as a value. Pure.
//!
//! These properties must stay, for the reasons given (all are tested against the real Caddy):
//! - The connection to the agent has no keep-alive. Up to 2.11.4 Caddy may dial the sandbox's
//!   address for a question, and would then keep that connection for the next question. Later ones
//!   answer 499 to clients that are still there while others go away: 24 of 8750 requests in one run
//!   of the test of isolation with 2.11.7, none without keep-alive.
//! - An answer is a route only with the proof; any other answer of success is a 502.
//! - No passive health checks and no limits on connections to sandboxes: to Caddy all sandboxes are
//!   one upstream, so a dead one would affect the others.
//! - No keep-alive to sandboxes either: an address that got a new owner must not get the old
//!   connection.
//! - Connections to peers are kept alive, and never retried: a retry rewrites what a dial in the
//!   background may still read. The peer server has no peer branch, so there is one hop at most.
//! - Of upgrades, WebSocket alone passes: inside of HTTP/2 (`h2c`) requests would pass unseen.
//! - The peer server accepts TLS 1.3 only, since Caddy's client has no such setting: so a hop never
//!   uses anything older.
//! - The headers of a route are copied into `vars` before the sandbox is asked: the sandbox's own
//!   response would overwrite them.
//! - Nothing in it changes at run time, so there is no admin endpoint.
//! - The access log has no headers and no query: they hold credentials. `user_id` is the only field of it that
//!   a handler can set in every version, so the request's id and its sandbox are in there.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    answers,
    decide::{Domain, Via},
    headers, pages, secure,
    settings::{Peers, PlainPath, Secure, Settings},
    version::Generation,
};

/// Name in the certificate of every node's peer server. All nodes share it: a name that differs
/// from request to request would need a transport for each.
pub const PEER_NAME: &str = "ingress.pve-sandbox.internal";

/// Header of a peer's question with the certificate that the other node's Caddy has shown: DER, base64.
pub const PEER_CERTIFICATE: &str = "X-Sbx-Peer-Certificate";

/// Time for which Caddy asks again when the agent's connection breaks off: an agent takes less to restart.
pub(super) const ASKS_AGAIN: Duration = Duration::from_secs(15);

/// Beginning of the answer where the agent does not answer Caddy.
pub(crate) const NO_AGENT: &str = "the agent of this node does not answer";
/// Answer where something else than the agent answers Caddy, or an agent with another proof.
pub(crate) const NO_ROUTE: &str = "the node gave no route";
/// Beginning of the answer where the Caddy of the sandbox's node does not answer.
pub(crate) const NO_PEER: &str = "the node of this sandbox did not answer";

/// Kind of a route to another node.
const PEER: &str = "peer";
/// Kinds of routes to a sandbox of this node: `replies` says which is for what.
const LOCAL: &str = "local";
const KNOWN: &str = "known";
const STRIPPED: &str = "stripped";

/// Name of Caddy's logger of requests.
const ACCESS_LOGGER: &str = "http.log.access.access";

/// Renders the configuration. The agent's answers carry `proof`.
pub fn render(settings: &Settings, proof: &str) -> Value {
    let mut servers = json!({ "public": public_server(settings, proof) });
    let mut apps = json!({});
    let mut files = Vec::new();
    if let Some(secure) = &settings.secure {
        servers["secure"] = secure_server(settings, secure, proof);
        if let Some(redirect) = secure::redirect(secure, &host_pattern(&settings.domain)) {
            servers["redirect"] = redirect;
        }
        files.extend(secure::load_file(secure));
        if let Some((names, policies)) = secure::automation(secure, &settings.domain) {
            apps["tls"]["certificates"]["automate"] = names;
            apps["tls"]["automation"] = policies;
        }
    }
    if let Some(peers) = &settings.peers {
        servers["peer"] = peer_server(settings, peers, proof);
        files.push(json!({
            "certificate": peers.cert.as_str(), "key": peers.key.as_str(), "tags": ["peer"],
        }));
    }
    if !files.is_empty() {
        apps["tls"]["certificates"]["load_files"] = files.into();
    }
    apps["http"] = json!({ "grace_period": "10s", "servers": servers });
    let mut all =
        json!({ "admin": { "disabled": true, "config": { "persist": false } }, "apps": apps });
    all["logging"] = logs(settings.access_log.as_ref());
    all
}

/// Renders the logs: one for requests, and Caddy's own on stderr. Caddy's own also names requests, those that break off:
/// both leave out headers and queries, which hold credentials.
fn logs(access: Option<&PlainPath>) -> Value {
    let delete = json!({ "filter": "delete" });
    let encoder = json!({
        "format": "filter",
        "wrap": { "format": "json", "time_format": "rfc3339_nano" },
        "fields": {
            "headers": delete,
            "request>headers": delete,
            "request>tls": delete,
            "resp_headers": delete,
            "request>uri": { "filter": "regexp", "regexp": "[?].*$", "value": "" },
        },
    });
    let mut logs = json!({ "default": { "encoder": encoder } });
    if let Some(file) = access {
        logs["default"]["exclude"] = json!([ACCESS_LOGGER]);
        logs["access"] = json!({
            "include": [ACCESS_LOGGER],
            "writer": {
                "output": "file",
                "filename": file.as_str(),
                "roll_size_mb": 32,
                "roll_keep": 8,
                "roll_keep_days": 30,
            },
            "encoder": encoder,
        });
    }
    json!({ "logs": logs })
}

/// Makes the request's id and its sandbox the user of the request, for the access log.
fn log_entry(via: Via) -> Value {
    let id = match via {
        Via::Edge => "{http.request.uuid}",
        // The edge's.
        Via::Peer => "{http.request.header.X-Request-Id}",
    };
    json!({
        "handler": "map",
        "source": "{http.request.method}",
        "destinations": ["{http.auth.user.id}"],
        "defaults": [format!("{id} {} {{http.vars.sbx_sandbox}}", asks(via))],
    })
}

/// Server of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    /// For clients, by plain HTTP, behind a tunnel or a proxy on this host.
    Public,
    /// For clients, by https, with nobody in front.
    Secure,
    /// For the Caddys of other nodes.
    Peer,
}

impl Server {
    /// Returns the way that the agent is told of.
    fn via(self) -> Via {
        match self {
            Self::Public | Self::Secure => Via::Edge,
            Self::Peer => Via::Peer,
        }
    }

    /// Lists the senders whose X-Forwarded-For is trusted: the tunnel, on this host; behind mTLS, every peer.
    fn trusted(self) -> Value {
        match self {
            Self::Public => json!(["127.0.0.0/8", "::1/128"]),
            Self::Secure => json!([]),
            Self::Peer => json!(["0.0.0.0/0", "::/0"]),
        }
    }
}

/// Returns the word for the server that asks a route question.
fn asks(via: Via) -> &'static str {
    match via {
        Via::Edge => "edge",
        Via::Peer => "peer",
    }
}

fn public_server(settings: &Settings, proof: &str) -> Value {
    let mut server = server(settings, Server::Public, proof);
    server["listen"] = settings.public.iter().map(ToString::to_string).collect();
    // HTTP/2 without TLS, for gRPC from what stands in front. Earlier versions have no route for gRPC, and would keep the
    // whole body of a request with `Upgrade: h2c` in memory, whoever sends it.
    server["protocols"] = match settings.generation {
        Generation::Before => json!(["h1"]),
        Generation::Fixed => json!(["h1", "h2", "h2c"]),
    };
    server
}

fn secure_server(settings: &Settings, secure: &Secure, proof: &str) -> Value {
    let mut server = server(settings, Server::Secure, proof);
    let Value::Object(own) = secure::server(secure, &settings.domain) else { return server };
    for (key, value) in own {
        server[key] = value;
    }
    server
}

fn peer_server(settings: &Settings, peers: &Peers, proof: &str) -> Value {
    let mut server = server(settings, Server::Peer, proof);
    server["listen"] = json!([peers.listen.to_string()]);
    server["protocols"] = json!(["h1"]);
    // Asking for client certificates enables this, and it would refuse requests: the name in the
    // handshake is PEER_NAME, the Host is the sandbox's.
    server["strict_sni_host"] = json!(false);
    server["tls_connection_policies"] = json!([{
        "client_authentication": {
            "trusted_ca_certs_pem_files": [peers.ca.as_str()],
            "mode": "require_and_verify",
        },
        "certificate_selection": { "any_tag": ["peer"] },
        "protocol_min": "tls1.3",
    }]);
    server
}

/// Renders the common part of all servers that lead to sandboxes.
fn server(settings: &Settings, of: Server, proof: &str) -> Value {
    let mut handle = vec![only_websockets(), question(settings, of, proof)];
    if of == Server::Secure {
        handle.insert(0, secure::forget_claims());
    }
    if settings.access_log.is_some() {
        handle.insert(0, log_entry(of.via()));
    }
    let mut server = json!({
        "automatic_https": { "disable": true },
        "read_header_timeout": "10s",
        "idle_timeout": "3m",
        "max_header_bytes": 131_072,
        "routes": [
            {
                "match": [{ "header_regexp": { "Host": {
                    "name": "sbx",
                    "pattern": host_pattern(&settings.domain),
                } } }],
                "terminal": true,
                "handle": handle,
            },
            { "handle": [explanation(404, "this host is no sandbox\n")] },
        ],
        "errors": { "routes": failures(settings, of) },
    });
    if settings.access_log.is_some() {
        server["logs"] = json!({ "default_logger_name": "access" });
    }
    if settings.generation == Generation::Fixed {
        // Its default of a minute would end an upload that pauses.
        server["read_idle_timeout"] = json!("10m");
    }
    server
}

/// Renders what a client is told when somebody on the way does not answer. Before a route is known, that is most
/// likely the agent.
fn failures(settings: &Settings, of: Server) -> Vec<Value> {
    let failed = |said: &str| {
        let text = format!("{said} ({{http.error.status_code}})\n");
        explanation("{http.error.status_code}", &text)
    };
    let after = |kinds: &[&str], said: &str| {
        let routed = json!([{ "vars": { "sbx_kind": kinds } }]);
        json!({ "match": routed, "terminal": true, "handle": [failed(said)] })
    };
    let mut failures = vec![after(&[LOCAL, KNOWN, STRIPPED], "the sandbox did not answer")];
    if of.via() == Via::Edge && settings.peers.is_some() {
        failures.push(after(&[PEER], NO_PEER));
    }
    failures.push(json!({ "handle": [failed(NO_AGENT)] }));
    failures
}

/// Ignores that a client asks for another protocol than WebSocket, as a server may. Requests inside of such a connection
/// would be neither judged nor logged, and their headers would not be looked at. A client that asks for several gets
/// none: which of them a server takes is not known here.
fn only_websockets() -> Value {
    let asked = json!({ "{http.request.header.Upgrade}": { "pattern": "(?i)^websocket$" } });
    json!({
        "handler": "subroute",
        "routes": [{
            "match": [{ "not": [{ "vars_regexp": asked }] }],
            "handle": [{ "handler": "headers", "request": { "delete": ["Upgrade"] } }],
        }],
    })
}

/// Builds a coarse filter; the agent parses the host.
fn host_pattern(domain: &Domain) -> String {
    // A domain has no other character with a meaning in regular expressions.
    let domain = domain.as_str().replace('.', r"\.");
    format!(r"(?i)^{}\.{domain}(:[0-9]{{1,5}})?$", proto::host::PATTERN)
}

fn explanation(status: impl Into<Value>, body: &str) -> Value {
    json!({
        "handler": "static_response",
        "status_code": status.into(),
        "headers": {
            "Content-Type": ["text/plain; charset=utf-8"],
            "Cache-Control": ["no-store"],
            "Access-Control-Allow-Origin": ["*"],
            "Retry-After": ["2"],
        },
        "body": body,
    })
}

/// Renders the handler that asks the agent and follows its answer.
fn question(settings: &Settings, of: Server, proof: &str) -> Value {
    let via = of.via();
    let route = |kind: &str, then: Vec<Value>| {
        let vars = json!({
            "handler": "vars",
            "sbx_upstream": "{http.reverse_proxy.header.X-Sbx-Upstream}",
            "sbx_host": "{http.reverse_proxy.header.X-Sbx-Host}",
            "sbx_kind": "{http.reverse_proxy.header.X-Sbx-Kind}",
            "sbx_user": "{http.reverse_proxy.header.X-Sbx-User}",
            "sbx_access": "{http.reverse_proxy.header.X-Sbx-Access}",
            "sbx_remove": "{http.reverse_proxy.header.X-Sbx-Remove}",
            "sbx_sandbox": "{http.reverse_proxy.header.X-Sbx-Sandbox}",
            "sbx_ancestors": "{http.reverse_proxy.header.X-Sbx-Ancestors}",
            "sbx_origin": "{http.reverse_proxy.header.X-Sbx-Origin}",
            "sbx_max_age": "{http.reverse_proxy.header.X-Sbx-Max-Age}",
        });
        let handlers = [vec![vars], then].concat();
        json!({
            "match": {
                "status_code": [204],
                "headers": {
                    "X-Sbx-Proof": [proof],
                    "X-Sbx-Kind": [kind],
                    "X-Sbx-Upstream": ["*"],
                    "X-Sbx-Host": ["*"],
                },
            },
            "routes": [{ "handle": handlers }],
        })
    };
    let mut answers = vec![
        route(LOCAL, to_sandbox(settings, of, Visitor::Anybody)),
        route(KNOWN, to_sandbox(settings, of, Visitor::Known)),
        route(
            STRIPPED,
            [vec![without_credential()], to_sandbox(settings, of, Visitor::Known)].concat(),
        ),
    ];
    answers.push(route("preflight", vec![pages::preflight_without_its_server()]));
    if let (Via::Edge, Some(peers)) = (via, &settings.peers) {
        answers.push(route(PEER, vec![to_peer(peers, of)]));
    }
    // A successful answer that is not a route is not the agent's.
    answers.push(json!({
        "match": { "status_code": [1, 2] },
        "routes": [{ "handle": [explanation(502, &format!("{NO_ROUTE}\n"))] }],
    }));
    let mut set = json!({
        "X-Forwarded-Method": ["{http.request.method}"],
        "X-Forwarded-Uri": ["{http.request.uri}"],
        "X-Forwarded-Host": ["{http.request.host}"],
    });
    if via == Via::Peer {
        // Replaces what the client may have sent by this name.
        set[PEER_CERTIFICATE] = json!(["{http.request.tls.client.certificate_der_base64}"]);
    }
    json!({
        "handler": "reverse_proxy",
        "upstreams": [{ "dial": format!("unix/{}", settings.route_socket) }],
        // With a URI of its own, a question never has the client's path, and so never consumes the
        // client's body.
        "rewrite": {
            "method": "GET",
            "uri": format!("/v1/route?via={}&rid={{http.request.uuid}}", asks(via)),
        },
        "transport": no_keep_alive(),
        "load_balancing": {
            "try_duration": format!("{}s", ASKS_AGAIN.as_secs()),
            "try_interval": "50ms",
        },
        "trusted_proxies": of.trusted(),
        "headers": {
            "request": {
                "delete": ["Upgrade", "Connection", "Content-Type", "Expect"],
                "set": set,
            },
            "response": { "delete": headers::reserved() },
        },
        "handle_response": answers,
    })
}

/// Client of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visitor {
    /// Anybody: the port is public.
    Anybody,
    /// Somebody with a credential, of whom the sandbox is told.
    Known,
}

/// Removes the credential from the query. The agent says its text: nothing of the URI is expanded again, which a
/// new URI would be.
fn without_credential() -> Value {
    json!({
        "handler": "rewrite",
        "uri_substring": [{ "find": "{http.vars.sbx_remove}", "replace": "" }],
    })
}

/// Renders the handlers that send a request to a sandbox. A client's headers are deleted first, since Caddy would
/// delete what it has just set.
fn to_sandbox(settings: &Settings, of: Server, visitor: Visitor) -> Vec<Value> {
    let mut set = json!({
        "Host": ["{http.vars.sbx_host}"],
        // With the port, as browsers say it in Origin: servers compare the two.
        "X-Forwarded-Host": ["{http.request.hostport}"],
    });
    // Behind a tunnel the last leg to Caddy is plain HTTP, whatever the client used.
    if settings.https || of == Server::Secure {
        set["X-Forwarded-Proto"] = json!(["https"]);
    }
    // A peer's request already has the edge's id.
    if of.via() == Via::Edge {
        set["X-Request-Id"] = json!(["{http.request.uuid}"]);
    }
    if visitor == Visitor::Known {
        set["X-Sbx-User"] = json!(["{http.vars.sbx_user}"]);
        set["X-Sbx-Access"] = json!(["{http.vars.sbx_access}"]);
    }
    // Our own and the tunnel's cookies and headers are not for tenants.
    let no_cookie = |pattern: &str| {
        [
            json!({ "search_regexp": format!("{pattern}=[^;]*; *"), "replace": "" }),
            json!({ "search_regexp": format!("(; *)?{pattern}=[^;]*$"), "replace": "" }),
        ]
    };
    let cookies = [no_cookie("__Host-sbx[a-z0-9-]*"), no_cookie("CF_Authorization")].concat();
    // A page that was loaded by a signed URL says that URL with whatever it loads.
    let referer = json!([{ "search_regexp": "([?&])sbx_(link|token)=[^&]*", "replace": "$1" }]);
    let clean = json!({
        "handler": "headers",
        "request": { "delete": headers::for_a_sandbox() },
    });
    let proxy = json!({
        "handler": "reverse_proxy",
        "upstreams": [{ "dial": "{http.vars.sbx_upstream}" }],
        "transport": no_keep_alive(),
        "load_balancing": { "try_duration": "2s", "try_interval": "50ms" },
        "trusted_proxies": of.trusted(),
        "headers": {
            "request": { "replace": { "Cookie": cookies, "Referer": referer }, "set": set },
            "response": answers::changes(settings.frames, scheme(settings, of)),
        },
    });
    let mut routes = vec![json!({ "handle": [answers::interim_changes()] })];
    if visitor == Visitor::Known {
        routes.extend(answers::for_a_known_visitor());
    }
    if settings.generation == Generation::Fixed {
        let mut grpc = proxy.clone();
        grpc["transport"] = pages::grpc_transport();
        routes.push(json!({ "match": pages::is_grpc(), "terminal": true, "handle": [grpc] }));
    }
    if settings.cors {
        let mut preflight = proxy.clone();
        preflight["handle_response"] = pages::preflight_answers();
        routes.push(
            json!({ "match": pages::is_preflight(), "terminal": true, "handle": [preflight] }),
        );
        let handle: Vec<_> = pages::readable_by_all().into_iter().chain([proxy]).collect();
        routes.push(json!({ "handle": handle }));
    } else {
        routes.push(json!({ "handle": [proxy] }));
    }
    let by_kind = json!({ "handler": "subroute", "routes": routes });
    vec![clean, by_kind]
}

fn to_peer(peers: &Peers, of: Server) -> Value {
    json!({
        "handler": "reverse_proxy",
        "upstreams": [{ "dial": "{http.vars.sbx_upstream}" }],
        "transport": {
            "protocol": "http",
            "dial_timeout": "3s",
            "keep_alive": {
                "enabled": true,
                "max_idle_conns_per_host": 256,
                "idle_timeout": "60s",
            },
            "tls": {
                "client_certificate_file": peers.cert.as_str(),
                "client_certificate_key_file": peers.key.as_str(),
                "root_ca_pem_files": [peers.ca.as_str()],
                "server_name": PEER_NAME,
            },
        },
        "trusted_proxies": of.trusted(),
        "headers": {
            "request": {
                "delete": headers::for_a_peer(),
                "set": {
                    "Host": ["{http.request.hostport}"],
                    "X-Forwarded-Host": ["{http.request.hostport}"],
                    "X-Request-Id": ["{http.request.uuid}"],
                },
            },
            "response": { "delete": answers::of_a_response() },
        },
    })
}

/// Returns the scheme that clients use. Only the edge of a hop knows it where the settings do not say it.
fn scheme(settings: &Settings, of: Server) -> &'static str {
    match of {
        Server::Secure => "https",
        Server::Public | Server::Peer if settings.https => "https",
        Server::Public => "http",
        Server::Peer => "{http.request.header.X-Forwarded-Proto}",
    }
}

fn no_keep_alive() -> Value {
    json!({ "protocol": "http", "keep_alive": { "enabled": false }, "dial_timeout": "3s" })
}
