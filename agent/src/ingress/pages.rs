//! What Caddy does to requests and answers so that pages of sandboxes work inside pages of other sites. Pure.
//!
//! A backend shows an editor, a terminal or a preview in a frame, and talks to servers in sandboxes from its own
//! page. Who may reach a port is decided before, and browsers send no cookies with what is allowed to all. Where the
//! ingress is reached from a local network alone, a page that somebody there visits reaches what he does:
//! `ingress.cors` switches it off.

use serde_json::{Value, json};

/// Header by which a server allows pages of other sites to read its answers.
const ALLOW_ORIGIN: &str = "Access-Control-Allow-Origin";

/// Lists the headers of an answer that would forbid a frame in another site.
pub(super) fn frame_headers() -> Vec<String> {
    vec!["X-Frame-Options".to_owned()]
}

/// Headers with policies of which one may forbid that.
pub(super) const POLICIES: [&str; 2] =
    ["Content-Security-Policy", "Content-Security-Policy-Report-Only"];

/// Renders the change to a policy that would forbid a frame in another site. The rest of the policy stays, and so do
/// others in the same header, behind a comma.
pub(super) fn without_frame_ancestors() -> Value {
    let own = "(?i)(^|[;,])[[:space:]]*frame-ancestors[^;,]*";
    json!([{ "search_regexp": own, "replace": "$1" }])
}

/// First digits of the statuses of a final answer. Caddy 2.6.2 would keep what is set in one before it, such as 103.
pub(super) const FINAL: [u8; 4] = [2, 3, 4, 5];

/// Header of an answer, inside Caddy alone, whose server allows some origins and not this one.
const OWN_CORS: &str = "X-Sbx-Own-Cors";

/// Renders the handlers that let other sites read an answer whose server says nothing about that. The answer
/// of one that does stays as it is, so there is never more than one such header. `Vary: Origin` says something:
/// the server allows other origins than this one. Browsers send no cookies with such requests.
///
/// The last handler sees an answer first. A condition has no `not`, so the mark stands for that.
pub(super) fn readable_by_all() -> [Value; 3] {
    let change = |response: Value| json!({ "handler": "headers", "response": response });
    [
        change(json!({ "deferred": true, "delete": [OWN_CORS] })),
        change(json!({
            "deferred": true,
            "require": { "status_code": FINAL, "headers": { ALLOW_ORIGIN: null, OWN_CORS: null } },
            "set": { ALLOW_ORIGIN: ["*"], "Access-Control-Expose-Headers": ["*"] },
        })),
        change(json!({
            "deferred": true,
            "require": { "status_code": FINAL, "headers": { "Vary": OF_ORIGIN } },
            "set": { OWN_CORS: ["yes"] },
        })),
    ]
}

/// Values of `Vary` by which a server says that its answer depends on the origin.
const OF_ORIGIN: [&str; 2] = ["*Origin*", "*origin*"];

/// Matches the question of a browser whether a page of another site may send a request.
pub(super) fn is_preflight() -> Value {
    json!([{ "method": ["OPTIONS"], "header": { "Access-Control-Request-Method": ["*"] } }])
}

/// Renders what becomes of a server's answer to such a question. One that says anything about other sites counts, and
/// so does a refusal; else the ingress allows the request.
pub(super) fn preflight_answers() -> Value {
    let keep = |matched: Value| json!({ "match": matched, "routes": [{ "handle": [{ "handler": "copy_response" }] }] });
    let allow = json!({
        "match": { "headers": { ALLOW_ORIGIN: null } },
        "routes": [{ "handle": [allowance("*", "false", "600")] }],
    });
    json!([
        keep(json!({ "status_code": [401, 403] })),
        keep(json!({ "headers": { "Vary": OF_ORIGIN } })),
        keep(json!({ "headers": { "Access-Control-Allow-Methods": ["*"] } })),
        keep(json!({ "headers": { "Access-Control-Allow-Headers": ["*"] } })),
        allow,
    ])
}

/// Renders the answer to such a question without its server: the question has no credential, which a port that is not
/// public needs, or the server cannot answer now. The agent says which origin is allowed, and for how long.
pub(super) fn preflight_without_its_server() -> Value {
    allowance("{http.vars.sbx_access}", "true", "{http.vars.sbx_max_age}")
}

fn allowance(origin: &str, credentials: &str, max_age: &str) -> Value {
    json!({
        "handler": "static_response",
        "status_code": 204,
        "headers": {
            ALLOW_ORIGIN: [origin],
            "Access-Control-Allow-Credentials": [credentials],
            "Access-Control-Allow-Methods": ["GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"],
            "Access-Control-Allow-Headers": ["{http.request.header.Access-Control-Request-Headers}"],
            "Access-Control-Max-Age": [max_age],
            "Vary": ["Origin, Access-Control-Request-Headers"],
        },
    })
}

/// Matches a request of gRPC, which needs HTTP/2 up to its server. gRPC-Web does not.
pub(super) fn is_grpc() -> Value {
    json!([{ "header_regexp": { "Content-Type": { "pattern": r"(?i)^application/grpc($|[+;])" } } }])
}

/// Renders the transport to a server of gRPC: HTTP/2 without TLS. Versions of Caddy before [`Generation::Fixed`] would keep
/// its connections for ever, so they have no such route.
///
/// [`Generation::Fixed`]: super::version::Generation::Fixed
pub(super) fn grpc_transport() -> Value {
    json!({
        "protocol": "http",
        "versions": ["h2c", "2"],
        "keep_alive": { "enabled": false },
        "dial_timeout": "3s",
    })
}
