//! What Caddy changes in the answers of sandboxes, so that they do harm to nobody but themselves, and what it tells
//! browsers of a port that not everybody reaches. Pure.

use serde_json::{Value, json};

use super::{
    headers,
    pages::{self, FINAL},
};

/// Lists headers of a response that do not reach the client. Caddy adds a `Server` or a `Via` of its own: one is
/// enough. What a sandbox runs is nobody's business, and neither is whether a request took a hop: a 404 with one `Via`
/// more would tell that another node knows the name.
pub(super) fn of_a_response() -> Vec<String> {
    [headers::reserved(), ["Server", "Via"].map(str::to_owned).to_vec()].concat()
}

/// Lists headers of a sandbox's response that do not reach the client. `Clear-Site-Data` would clear the cookies of
/// all sandboxes, which are one site to a browser.
fn of_a_sandbox() -> Vec<String> {
    [of_a_response(), vec!["Clear-Site-Data".to_owned()]].concat()
}

/// Renders the changes to the headers of a sandbox's answer. `scheme`: the scheme that its clients use.
pub(super) fn changes(frames: bool, scheme: &str) -> Value {
    let mut delete = of_a_sandbox();
    let mut replace = json!({
        "Location": public_location(scheme),
        "Set-Cookie": cookies_of_the_host(),
    });
    if frames {
        delete.extend(pages::frame_headers());
        for policy in pages::POLICIES {
            replace[policy] = pages::without_frame_ancestors();
        }
    }
    json!({
        "delete": delete,
        "set": {
            "X-Robots-Tag": ["noindex, nofollow"],
            // A shared cache knows neither sessions nor visibilities. It would go on answering for a port that was
            // hidden, and for the sandbox that had the vmid before. Browsers do not read these.
            "CDN-Cache-Control": ["no-store"],
            "Cloudflare-CDN-Cache-Control": ["no-store"],
        },
        "replace": replace,
    })
}

/// Renders the changes to an answer that Caddy would pass on unchanged: 103, which comes before the final one, and
/// 101, after which the connection is a WebSocket's. Caddy 2.6.2 writes a 101 past every handler.
pub(super) fn interim_changes() -> Value {
    json!({
        "handler": "headers",
        "response": {
            "deferred": true,
            "require": { "status_code": [1] },
            "delete": of_a_sandbox(),
            "replace": { "Set-Cookie": cookies_of_the_host() },
        },
    })
}

/// Headers of a request that the answer of a port depends on, where not everybody reaches it.
const DEPENDS_ON: &str = "Origin, Referer, Sec-Fetch-Site, Sec-Fetch-Dest";

/// Renders the routes for the answers of a port that not everybody reaches. The agent says which pages may show the
/// answer in a frame, and which page may read it with its user's session; it says neither where there is none.
pub(super) fn for_a_known_visitor() -> Vec<Value> {
    let change = |require: Value, mut response: Value| {
        response["deferred"] = json!(true);
        response["require"] = require;
        json!({ "handler": "headers", "response": response })
    };
    // What the agent does not say is no empty text to Caddy 2.6.2, so the beginning of what it says is looked for.
    let said = |name: &str, beginning: &str, then: Value| {
        let mut says = json!({});
        says[format!("{{http.vars.{name}}}")] = json!({ "pattern": format!("^{beginning}") });
        json!({ "match": [{ "vars_regexp": says }], "handle": [then] })
    };
    vec![
        // A browser must not show what it got for one page to another. This comes after `readable_by_all`, which reads
        // the server's own `Vary`.
        json!({ "handle": [change(
            json!({ "status_code": FINAL }),
            json!({ "add": { "Vary": [DEPENDS_ON] } }),
        )] }),
        json!({ "handle": [change(
            json!({ "status_code": FINAL, "headers": { "Cache-Control": null } }),
            json!({ "set": { "Cache-Control": ["private"] } }),
        )] }),
        // A server that forbids frames itself, where `ingress.frames` leaves that in, would be overruled.
        said(
            "sbx_ancestors",
            "'self'",
            change(
                json!({ "status_code": FINAL, "headers": { "X-Frame-Options": null } }),
                json!({ "add": {
                    "Content-Security-Policy": ["frame-ancestors {http.vars.sbx_ancestors}"],
                } }),
            ),
        ),
        said(
            "sbx_origin",
            "https?://",
            change(
                json!({ "status_code": FINAL }),
                json!({
                    "set": {
                        "Access-Control-Allow-Origin": ["{http.vars.sbx_origin}"],
                        "Access-Control-Allow-Credentials": ["true"],
                    },
                }),
            ),
        ),
    ]
}

/// Renders the change to a redirect: what its server takes for its own address is the visitor's machine to a browser.
/// Caddy searches only for a text what it finds out at run time, and `localhost:80` begins `localhost:8080`. So a space
/// marks the end of the host meanwhile; no address has one.
fn public_location(scheme: &str) -> Value {
    let own = |its: &str| {
        json!({
            "search": format!("{its}://{{http.vars.sbx_host}} "),
            "replace": format!("{scheme}://{{http.request.hostport}}"),
        })
    };
    json!([
        { "search_regexp": "^(https?://localhost(:[0-9]+)?)([/?#]|$)", "replace": "$1 $3" },
        own("http"),
        own("https"),
        { "search_regexp": "^(https?://localhost(:[0-9]+)?) ", "replace": "$1" },
    ])
}

/// Renders the change to a cookie that a server sets for a whole domain: other sandboxes would get it. It becomes one
/// of the host alone.
fn cookies_of_the_host() -> Value {
    json!([{ "search_regexp": "(?i);[[:space:]]*domain[[:space:]]*=[^;]*", "replace": "" }])
}
