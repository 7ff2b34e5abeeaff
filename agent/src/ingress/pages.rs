//! What Caddy does to requests and answers so that pages of sandboxes work inside pages of other sites. Pure.
//!
//! A backend shows an editor, a terminal or a preview in a frame, and talks to servers in sandboxes from its own
//! page. None of this gives anybody more than a request without a browser has: who may reach a port is decided before.

use serde_json::{Value, json};

/// Header by which a server allows pages of other sites to read its answers.
const ALLOW_ORIGIN: &str = "Access-Control-Allow-Origin";

/// Lists the headers of an answer that would forbid a frame in another site.
pub(super) fn frame_headers() -> Vec<String> {
    vec!["X-Frame-Options".to_owned()]
}

/// Renders the change to a policy that would forbid a frame in another site. The rest of the policy stays.
pub(super) fn without_frame_ancestors() -> Value {
    let strip = json!([{ "search_regexp": "(?i)frame-ancestors[^;]*(; *|$)", "replace": "" }]);
    json!({ "Content-Security-Policy": strip, "Content-Security-Policy-Report-Only": strip })
}

/// Renders the handler that lets other sites read an answer whose server says nothing about that. The answer
/// of one that does stays as it is, so there is never more than one such header. Browsers send no cookies with
/// such requests.
pub(super) fn readable_by_all() -> Value {
    json!({
        "handler": "headers",
        "response": {
            "deferred": true,
            "require": { "headers": { ALLOW_ORIGIN: null } },
            "set": { ALLOW_ORIGIN: ["*"], "Access-Control-Expose-Headers": ["*"] },
        },
    })
}

/// Matches the question of a browser whether a page of another site may send a request.
pub(super) fn is_preflight() -> Value {
    json!([{ "method": ["OPTIONS"], "header": { "Access-Control-Request-Method": ["*"] } }])
}

/// Renders the answer to such a question for a server that does not know it. One that answers it is asked first,
/// and its answer counts.
pub(super) fn preflight_answer() -> Value {
    json!([{
        "match": { "headers": { ALLOW_ORIGIN: null } },
        "routes": [{ "handle": [{
            "handler": "static_response",
            "status_code": 204,
            "headers": {
                ALLOW_ORIGIN: ["*"],
                "Access-Control-Allow-Methods": ["GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"],
                "Access-Control-Allow-Headers": ["{http.request.header.Access-Control-Request-Headers}"],
                "Access-Control-Max-Age": ["600"],
                "Vary": ["Access-Control-Request-Headers"],
            },
        }] }],
    }])
}

/// Matches a request of gRPC, which needs HTTP/2 up to its server. gRPC-Web does not.
pub(super) fn is_grpc() -> Value {
    json!([{ "header_regexp": { "Content-Type": { "pattern": r"(?i)^application/grpc($|[+;])" } } }])
}

/// Renders the transport to a server of gRPC: HTTP/2 without TLS.
pub(super) fn grpc_transport() -> Value {
    json!({ "protocol": "http", "versions": ["h2c", "2"], "dial_timeout": "3s" })
}
