//! Answers to route questions that carry more than a reason: routes, redirects, and refusals for want of access.

use std::{fmt, net::SocketAddr};

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE,
        HeaderName, LOCATION, REFERRER_POLICY, SET_COOKIE, VARY, WWW_AUTHENTICATE,
    },
};
use http_body_util::Full;
use proto::visibility::Visibility;
use serde_json::json;

use super::{
    caddy::Proof,
    decide::{Grant, Question, Redirect},
};

/// Answer to a question.
pub(super) type Reply = Response<Full<Bytes>>;

/// Header with the proof of a route.
const PROOF: HeaderName = HeaderName::from_static("x-sbx-proof");
/// Header with the kind of a route.
const KIND: HeaderName = HeaderName::from_static("x-sbx-kind");
/// Header with the address to send the request to.
const UPSTREAM: HeaderName = HeaderName::from_static("x-sbx-upstream");
/// Header with the Host to send it with.
const SANDBOX_HOST: HeaderName = HeaderName::from_static("x-sbx-host");
/// Header with the user who asks; the sandbox gets it.
const USER: HeaderName = HeaderName::from_static("x-sbx-user");
/// Header with the visibility of the port; the sandbox gets it.
const ACCESS: HeaderName = HeaderName::from_static("x-sbx-access");
/// Header with the pages that may show the answer in a frame, as a policy lists them.
const ANCESTORS: HeaderName = HeaderName::from_static("x-sbx-ancestors");
/// Header with the origin of the page that may read the answer.
const PAGE: HeaderName = HeaderName::from_static("x-sbx-origin");
/// Header with the text to remove from the query.
const REMOVE: HeaderName = HeaderName::from_static("x-sbx-remove");
/// Header with the time for which a browser may rely on the answer to a preflight, in seconds.
const MAX_AGE: HeaderName = HeaderName::from_static("x-sbx-max-age");

/// Where a request goes.
#[derive(Debug)]
pub(super) struct Route<'a> {
    /// Address to send it to.
    pub(super) upstream: SocketAddr,
    /// Host to send it with.
    pub(super) host: &'a str,
    /// Permission to reach a port of this node; `None`: another node decides.
    pub(super) grant: Option<&'a Grant>,
}

/// Kind of a route, by which Caddy picks what it does: `local` for a request that goes on as it is, `known` with the
/// identity of who asks, `stripped` also without the credential in its query, `peer` to another node. A `preflight`
/// goes nowhere.
fn kind(grant: Option<&Grant>) -> &'static str {
    match grant {
        None => "peer",
        Some(Grant { remove: Some(_), .. }) => "stripped",
        Some(Grant { identity: Some(_), .. }) => "known",
        Some(Grant { .. }) => "local",
    }
}

/// Builds a route. Only an answer with the proof is one.
pub(super) fn route(proof: &Proof, to: &Route<'_>) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    let headers = reply.headers_mut();
    for proof in proof.values() {
        headers.append(PROOF, proof.clone());
    }
    headers.insert(KIND, HeaderValue::from_static(kind(to.grant)));
    headers.insert(UPSTREAM, plain(to.upstream));
    headers.insert(SANDBOX_HOST, plain(to.host));
    let Some(Grant { identity, remove, wakes: _ }) = to.grant else { return reply };
    let visibility = identity.as_ref().map_or(Visibility::Public, |known| known.visibility);
    headers.insert(ACCESS, HeaderValue::from_static(visibility.word()));
    if let Some(user) = identity.as_ref().and_then(|known| known.user.as_ref()) {
        headers.insert(USER, plain(user));
    }
    if let Some(remove) = remove {
        headers.insert(REMOVE, plain(remove));
    }
    reply
}

/// Adds to the route of a known visitor what browsers let pages of other sites do with the answer.
pub(super) fn tell_pages(route: &mut Reply, question: &Question<'_>) {
    let headers = route.headers_mut();
    if let Some(ancestors) = question.frame_ancestors() {
        headers.insert(ANCESTORS, plain(ancestors));
    }
    if let Some(page) = question.parent() {
        headers.insert(PAGE, plain(page));
    }
}

/// Lets a page that the operator named read a refusal: with its user's session, `*` does not.
pub(super) fn readable_by(reply: &mut Reply, page: &str) {
    let headers = reply.headers_mut();
    if headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, plain(page));
        headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        headers.append(VARY, HeaderValue::from_static("Origin"));
    }
}

/// Lets Caddy answer a preflight itself, for an origin and so many seconds. Only an answer with the proof does.
pub(super) fn preflight(proof: &Proof, allowed: &str, for_s: u32) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    let headers = reply.headers_mut();
    for proof in proof.values() {
        headers.append(PROOF, proof.clone());
    }
    headers.insert(KIND, HeaderValue::from_static("preflight"));
    // Every route has these two.
    headers.insert(UPSTREAM, HeaderValue::from_static("-"));
    headers.insert(SANDBOX_HOST, HeaderValue::from_static("-"));
    headers.insert(ACCESS, plain(allowed));
    headers.insert(MAX_AGE, plain(for_s));
    reply
}

/// Leads a browser to the URL without a credential, with a session if it begins one.
pub(super) fn redirect(to: &Redirect) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()));
    *reply.status_mut() = StatusCode::SEE_OTHER;
    let headers = reply.headers_mut();
    headers.insert(LOCATION, plain(&to.location));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // The referrer of the next request is the page that sent the browser here, never this URL. The answer is for frames
    // of that page.
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("strict-origin"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    if let Some(cookie) = &to.cookie {
        headers.insert(SET_COOKIE, plain(cookie));
    }
    reply
}

/// Refuses access: a short page for a person, JSON for a program. `why` says what to do.
pub(crate) fn refuse(status: StatusCode, why: &'static str, is_page: bool) -> Reply {
    let (form, body) = if is_page {
        let title = if status == StatusCode::UNAUTHORIZED { "Access needed" } else { "No access" };
        // No text of a caller is in it.
        let page = format!(
            "<!doctype html><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <title>{title}</title><h1>{title}</h1><p>{why}.\n"
        );
        ("text/html; charset=utf-8", page)
    } else {
        ("application/json", format!("{}\n", json!({ "code": status.as_u16(), "message": why })))
    };
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(form));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(VARY, HeaderValue::from_static("Accept"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    if status == StatusCode::UNAUTHORIZED {
        // A scheme that no browser asks a password for.
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Sbx-Token"));
    }
    reply
}

/// Formats a value of ours, or one that was checked, as a header value.
pub(super) fn plain(value: impl fmt::Display) -> HeaderValue {
    HeaderValue::try_from(value.to_string()).expect("it is plain ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_is_a_page_for_people_and_json_for_programs() {
        for (is_page, form) in [(true, "text/html; charset=utf-8"), (false, "application/json")] {
            let reply = refuse(StatusCode::UNAUTHORIZED, "do this", is_page);
            assert_eq!(reply.status(), 401);
            assert_eq!(reply.headers()[CONTENT_TYPE], form);
            assert_eq!(reply.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
            assert!(!reply.headers().contains_key("x-sbx-kind"));
        }
    }
}
