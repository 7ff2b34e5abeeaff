//! Answers to requests that their sandbox cannot take yet: a page for people, which loads itself
//! again while that costs nothing, JSON or a line of text for programs. Pure.
//!
//! The page asks for nothing else: no script, no font, no picture. So it works under any policy, in a
//! frame of another site, and while nothing but the agent answers.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{
        ACCEPT, ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
        RETRY_AFTER,
    },
};
use http_body_util::Full;

use super::intent::Intent;

/// Time between two loads of the page, and what programs are told to wait.
const AGAIN: Duration = Duration::from_secs(2);
/// Styles of our own, in the page; anybody may frame it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
                      form-action 'none'";

/// Stage on the way to a sandbox that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A paused sandbox is woken.
    Waking,
    /// A sandbox boots.
    Booting,
}

/// Reason why a request is not sent to its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The sandbox is not ready yet; the wait goes on without the request.
    Waits {
        stage: Stage,
        /// Time since the first request began to wait.
        elapsed: Duration,
    },
    /// The sandbox is paused, and a request of this kind wakes none.
    Passive(&'static str),
    /// The last wake or boot failed; it is not tried again before this time is over.
    Failed { stage: Stage, again: Duration },
    /// The team's sandboxes are woken too often; one may be again after this time.
    TooManyWakes { again: Duration },
    /// Too many requests of the team wait already.
    TeamWaits,
    /// Too many requests of the node wait already.
    NodeWaits,
}

impl Refusal {
    /// Code that programs branch on.
    const fn code(self) -> &'static str {
        match self {
            Self::Waits { stage: Stage::Waking, .. } => "sandbox_waking",
            Self::Waits { stage: Stage::Booting, .. } => "sandbox_booting",
            Self::Passive(_) => "sandbox_paused",
            Self::Failed { stage: Stage::Waking, .. } => "wake_failed",
            Self::Failed { stage: Stage::Booting, .. } => "boot_failed",
            Self::TooManyWakes { .. } => "too_many_wakes",
            Self::TeamWaits | Self::NodeWaits => "too_many_requests_wait",
        }
    }

    /// Sentence for people, and what to do next.
    fn text(self) -> String {
        match self {
            Self::Waits { stage: Stage::Waking, .. } => {
                "this sandbox was paused and wakes up; try again".to_owned()
            }
            Self::Waits { stage: Stage::Booting, .. } => {
                "this sandbox is booting; try again".to_owned()
            }
            Self::Passive(kind) => format!(
                "this sandbox is paused, and {kind} does not wake it; open its page, send another \
                 request, or resume it"
            ),
            Self::Failed { stage: Stage::Waking, .. } => {
                "this sandbox is paused, and could not be woken; try again later".to_owned()
            }
            Self::Failed { stage: Stage::Booting, .. } => {
                "this sandbox has been booting for too long; try again later".to_owned()
            }
            Self::TooManyWakes { .. } => {
                "too many sandboxes of this team are woken; try again later".to_owned()
            }
            Self::TeamWaits => {
                "too many requests wait for sandboxes of this team; try again".to_owned()
            }
            Self::NodeWaits => {
                "too many requests wait for sandboxes of this node; try again".to_owned()
            }
        }
    }

    /// Time after which a request makes sense again.
    fn again(self) -> Duration {
        match self {
            Self::Waits { .. } | Self::TeamWaits | Self::NodeWaits => AGAIN,
            // It is not the request that changes this.
            Self::Passive(_) => Duration::from_secs(30),
            Self::Failed { again, .. } | Self::TooManyWakes { again } => again.max(AGAIN),
        }
    }

    /// True when the page loads itself again. After a failure, or too many wakes, each load is one more wake: a tab that
    /// nobody looks at would go on for ever.
    const fn reloads(self) -> bool {
        match self {
            Self::Waits { .. } | Self::Passive(_) | Self::TeamWaits | Self::NodeWaits => true,
            Self::Failed { .. } | Self::TooManyWakes { .. } => false,
        }
    }
}

/// Builds the answer, 503 in the form that the client asks for. Scripts can read it from any page.
pub(super) fn reply(refusal: Refusal, intent: Intent, asked: &HeaderMap) -> Response<Full<Bytes>> {
    let seconds = refusal.again().as_millis().div_ceil(1000);
    let wants = |kind: &str| {
        let in_it = |value: &HeaderValue| value.to_str().is_ok_and(|text| text.contains(kind));
        asked.get_all(ACCEPT).iter().any(in_it)
    };
    let (kind, body) = if intent == Intent::Navigation && wants("text/html") {
        ("text/html; charset=utf-8", page(refusal, seconds))
    } else if wants("application/json") {
        let body = serde_json::json!({
            "error": refusal.text(), "code": refusal.code(), "retry_after_s": seconds,
        });
        ("application/json", format!("{body}\n"))
    } else {
        ("text/plain; charset=utf-8", format!("{}\n", refusal.text()))
    };
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    if let Ok(seconds) = HeaderValue::try_from(seconds.to_string()) {
        headers.insert(RETRY_AFTER, seconds);
    }
    reply
}

/// Builds the page. Nothing of the request is in it.
fn page(refusal: Refusal, again_s: u128) -> String {
    let (title, line, elapsed) = match refusal {
        Refusal::Waits { stage, elapsed } => {
            let title = match stage {
                Stage::Waking => "Waking up",
                Stage::Booting => "Starting",
            };
            let line = format!("This page opens by itself. Waiting for {} s.", elapsed.as_secs());
            (title, line, Some(elapsed))
        }
        Refusal::Passive(_)
        | Refusal::Failed { .. }
        | Refusal::TooManyWakes { .. }
        | Refusal::TeamWaits
        | Refusal::NodeWaits => {
            let mut text = refusal.text();
            text.replace_range(..1, "T");
            let next = if refusal.reloads() {
                format!("This page tries again in {again_s} s.")
            } else {
                // A click is somebody's: it loads this very page, in a frame too.
                format!("After {again_s} s you can <a href=\"\">try again</a>.")
            };
            ("Not available now", format!("{text}. {next}"), None)
        }
    };
    let refresh = if refusal.reloads() {
        format!("<meta http-equiv=\"refresh\" content=\"{again_s}\">\n")
    } else {
        String::new()
    };
    // A full bar would promise too much: it nears its end, and reaches it when the page is there.
    let bar = elapsed.map_or_else(String::new, |elapsed| {
        let share = 100 - 100 * 5 / (5 + elapsed.as_secs());
        format!("<div class=\"bar\"><div style=\"width:{}%\"></div></div>", share.max(5))
    });
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         {refresh}\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"robots\" content=\"noindex\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body><main role=\"status\"><h1>{title}</h1>{bar}<p>{line}</p></main></body>\n</html>\n"
    )
}

const STYLE: &str = "html{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}\
    body{display:grid;min-height:90vh;place-items:center;margin:0}\
    main{width:20rem;max-width:90vw;text-align:center}\
    h1{font-size:1.25rem;font-weight:600}\
    .bar{height:6px;border-radius:3px;overflow:hidden;background:#8884}\
    .bar div{height:100%;background:#48f;animation:p 1.5s ease-in-out infinite alternate}\
    @keyframes p{from{opacity:.5}to{opacity:1}}";

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    const ALL: [Refusal; 8] = [
        Refusal::Waits { stage: Stage::Waking, elapsed: Duration::from_secs(3) },
        Refusal::Waits { stage: Stage::Booting, elapsed: Duration::from_secs(80) },
        Refusal::Passive("a WebSocket"),
        Refusal::Failed { stage: Stage::Waking, again: Duration::from_millis(3500) },
        Refusal::Failed { stage: Stage::Booting, again: Duration::from_secs(5) },
        Refusal::TooManyWakes { again: Duration::from_secs(9) },
        Refusal::TeamWaits,
        Refusal::NodeWaits,
    ];

    async fn answer(refusal: Refusal, intent: Intent, accept: &str) -> (HeaderMap, String) {
        let mut asked = HeaderMap::new();
        asked.insert(ACCEPT, accept.parse().expect("a value"));
        let (head, body) = reply(refusal, intent, &asked).into_parts();
        assert_eq!(head.status, StatusCode::SERVICE_UNAVAILABLE);
        let bytes = body.collect().await.expect("whole").to_bytes();
        (head.headers, String::from_utf8(bytes.to_vec()).expect("text"))
    }

    fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
        headers[name].to_str().expect("text")
    }

    #[tokio::test]
    async fn page_for_people_stands_alone() {
        for refusal in ALL {
            let (headers, page) = answer(refusal, Intent::Navigation, "text/html,*/*;q=0.8").await;
            // The link leads to the page itself.
            let page = page.replace("href=\"\"", "");
            assert_eq!(text(&headers, "content-type"), "text/html; charset=utf-8");
            assert_eq!(text(&headers, "cache-control"), "no-store");
            for outside in ["src=", "href=", "url(", "@import", "<script", "http:", "https:", "{"] {
                let style = page.find(STYLE).expect("the style") + STYLE.len();
                let rest = &page[style..];
                assert!(!rest.contains(outside), "{outside} in {page}");
            }
            // No header keeps it out of a frame.
            assert!(!headers.contains_key("x-frame-options"));
            assert!(!text(&headers, "content-security-policy").contains("frame-ancestors"));
            assert!(page.len() < 2000, "{}", page.len());
        }
        assert!(!STYLE.contains("url(") && !STYLE.contains("@import"));
    }

    /// A forgotten tab would else wake a sandbox that cannot wake for ever, and use up the wakes of its team.
    #[tokio::test]
    async fn page_loads_itself_again_only_where_that_wakes_nothing() {
        for refusal in ALL {
            let (headers, page) = answer(refusal, Intent::Navigation, "text/html").await;
            let seconds = text(&headers, "retry-after");
            let refresh = format!("http-equiv=\"refresh\" content=\"{seconds}\"");
            let wakes = matches!(refusal, Refusal::Failed { .. } | Refusal::TooManyWakes { .. });
            assert_eq!(page.contains(&refresh), !wakes, "{page}");
            assert_eq!(page.contains("http-equiv"), !wakes, "{page}");
            let by_hand = format!("After {seconds} s you can <a href=\"\">try again</a>.");
            assert_eq!(page.contains(&by_hand), wakes, "{page}");
        }
    }

    #[tokio::test]
    async fn page_says_how_long_it_waits() {
        let (_, page) = answer(ALL[0], Intent::Navigation, "text/html").await;
        assert!(page.contains("Waking up") && page.contains("Waiting for 3 s"), "{page}");
        let (_, page) = answer(ALL[1], Intent::Navigation, "text/html").await;
        assert!(page.contains("Starting") && page.contains("Waiting for 80 s"), "{page}");
        assert!(page.contains("width:95%"), "{page}");
    }

    #[tokio::test]
    async fn programs_get_json_or_a_line_with_the_time_to_wait() {
        for refusal in ALL {
            let (headers, body) = answer(refusal, Intent::Request, "application/json").await;
            assert_eq!(text(&headers, "content-type"), "application/json");
            let json: serde_json::Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!(json["code"], refusal.code());
            assert_eq!(json["retry_after_s"].to_string(), text(&headers, "retry-after"));
            assert_eq!(json["error"], refusal.text());
            // Also for a script of a page, which may say that it takes anything.
            let (headers, body) = answer(refusal, Intent::Request, "*/*").await;
            assert_eq!(text(&headers, "content-type"), "text/plain; charset=utf-8");
            assert_eq!(body, format!("{}\n", refusal.text()));
        }
        let (headers, _) = answer(ALL[3], Intent::Request, "*/*").await;
        assert_eq!(text(&headers, "retry-after"), "4", "rounded up");
    }
}
