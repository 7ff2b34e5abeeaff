//! Decides from a request alone whether somebody wants its sandbox now. Pure.
//!
//! Browsers ask for icons, repeat the requests of forgotten tabs and reconnect their sockets for ever.
//! A paused sandbox that these wake would never stay paused. So a table says which requests are sent
//! by nobody in particular, with the reason; all others wake.

use http::HeaderMap;

/// Sign of a person or a program behind a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// A browser opens a page, or loads it again.
    Navigation,
    /// Anything that the table does not know: a program's request, or an action on a page.
    Request,
    /// A page or a program that has been open goes on by itself.
    Follows(Follower),
    /// Sent by a browser or a robot without anybody's doing. Not even a use of a running sandbox.
    Background(Background),
}

/// Request of something that has been open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follower {
    /// WebSocket: those of an old tab reconnect for ever.
    WebSocket,
    /// Stream of events, which browsers open again by themselves.
    EventStream,
    /// Socket.IO's form of a socket without WebSocket.
    Polling,
    /// Report that a page sends when it is left.
    Beacon,
    /// Part of a page, or a script of it that fetches: it comes after the page itself.
    PartOfPage,
}

/// Request that nobody made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    Head,
    /// Question of a browser whether it may send a request; it carries no credentials.
    Preflight,
    /// Page that somebody may open later.
    Prefetch,
    /// Look for a newer service worker.
    ServiceWorker,
    /// Icon, manifest, or a file for robots.
    WellKnown,
}

impl Intent {
    /// True when the request is a use of a running sandbox.
    pub const fn is_use(self) -> bool {
        !matches!(self, Self::Background(_))
    }

    /// Kind of request, for people; `None` for one that wakes a sandbox always.
    pub const fn passive(self) -> Option<&'static str> {
        Some(match self {
            Self::Navigation | Self::Request => return None,
            Self::Follows(Follower::WebSocket) => "a WebSocket",
            Self::Follows(Follower::EventStream) => "a stream of events",
            Self::Follows(Follower::Polling) => "a poll of Socket.IO",
            Self::Follows(Follower::Beacon) => "a report of a page",
            Self::Follows(Follower::PartOfPage) => "a request of an open page",
            Self::Background(Background::Head) => "a HEAD request",
            Self::Background(Background::Preflight) => "an OPTIONS request",
            Self::Background(Background::Prefetch) => "a prefetch",
            Self::Background(Background::ServiceWorker) => "an update of a service worker",
            Self::Background(Background::WellKnown) => "a request for an icon or a robot's file",
        })
    }
}

/// A request, as the table reads it.
struct Seen<'a> {
    method: &'a str,
    path: &'a str,
    query: &'a str,
    headers: &'a HeaderMap,
}

type Rule = (fn(&Seen<'_>) -> bool, Intent);

/// The first rule that holds decides.
const RULES: &[Rule] = &[
    (|seen| seen.method == "HEAD", Intent::Background(Background::Head)),
    (|seen| seen.method == "OPTIONS", Intent::Background(Background::Preflight)),
    (is_prefetch, Intent::Background(Background::Prefetch)),
    (|seen| seen.is("service-worker", "script"), Intent::Background(Background::ServiceWorker)),
    (is_well_known, Intent::Background(Background::WellKnown)),
    (is_websocket, Intent::Follows(Follower::WebSocket)),
    (
        |seen| seen.method == "GET" && seen.has("accept", "text/event-stream"),
        Intent::Follows(Follower::EventStream),
    ),
    (is_polling, Intent::Follows(Follower::Polling)),
    (is_navigation, Intent::Navigation),
    (
        |seen| seen.method == "POST" && seen.by_browser() && seen.is("sec-fetch-mode", "no-cors"),
        Intent::Follows(Follower::Beacon),
    ),
    (|seen| seen.method == "GET" && seen.by_browser(), Intent::Follows(Follower::PartOfPage)),
];

/// Decides what a request is. `target` is its path with its query. Total over any input.
pub fn of(method: &str, target: &str, headers: &HeaderMap) -> Intent {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let seen = Seen { method, path, query, headers };
    RULES.iter().find(|(holds, _)| holds(&seen)).map_or(Intent::Request, |(_, intent)| *intent)
}

impl Seen<'_> {
    /// True when a header has this value, in any case.
    fn is(&self, name: &str, value: &str) -> bool {
        self.any(name, |found| found.trim().eq_ignore_ascii_case(value))
    }

    /// True when a header has this word in it, in any case.
    fn has(&self, name: &str, word: &str) -> bool {
        self.any(name, |found| found.to_ascii_lowercase().contains(word))
    }

    fn any(&self, name: &str, holds: impl Fn(&str) -> bool) -> bool {
        self.headers.get_all(name).iter().any(|value| value.to_str().is_ok_and(&holds))
    }

    /// True for a browser, which says where each request comes from. Programs that set one of these
    /// headers do not set both.
    fn by_browser(&self) -> bool {
        self.headers.contains_key("sec-fetch-site") && self.headers.contains_key("sec-fetch-dest")
    }
}

fn is_prefetch(seen: &Seen<'_>) -> bool {
    let names = ["purpose", "sec-purpose", "x-purpose", "x-moz"];
    names.iter().any(|name| seen.has(name, "prefetch") || seen.has(name, "preview"))
}

fn is_well_known(seen: &Seen<'_>) -> bool {
    const FILES: &[&str] = &[
        "robots.txt",
        "ads.txt",
        "security.txt",
        "sitemap.xml",
        "browserconfig.xml",
        "manifest.json",
    ];
    let path = seen.path.to_ascii_lowercase();
    let file = path.rsplit('/').next().unwrap_or_default();
    seen.method == "GET"
        && (FILES.contains(&file)
            || file.ends_with(".webmanifest")
            || file.starts_with("favicon.")
            || file.starts_with("apple-touch-icon")
            || path.starts_with("/.well-known/")
            || seen.is("sec-fetch-dest", "manifest"))
}

/// Caddy takes `Upgrade` out of its question, and leaves what belongs to the handshake.
fn is_websocket(seen: &Seen<'_>) -> bool {
    seen.headers.contains_key("sec-websocket-key")
        || seen.headers.contains_key("sec-websocket-version")
        || seen.is("sec-fetch-mode", "websocket")
}

fn is_polling(seen: &Seen<'_>) -> bool {
    let mut pairs = seen.query.split('&');
    let (mut version, mut polling) = (false, false);
    pairs.by_ref().for_each(|pair| {
        version |= pair.starts_with("EIO=");
        polling |= pair == "transport=polling";
    });
    version && polling
}

/// A browser says so. Without that, a GET that prefers HTML is taken for one of an older browser.
fn is_navigation(seen: &Seen<'_>) -> bool {
    seen.method == "GET"
        && if seen.headers.contains_key("sec-fetch-mode") {
            seen.is("sec-fetch-mode", "navigate")
        } else {
            seen.has("accept", "text/html")
        }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    const WAKES: Intent = Intent::Request;

    /// Method, target, headers, and what the request is.
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], Intent);

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().expect("a name");
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).expect("a value"));
        }
        headers
    }

    fn browser<'a>(mode: &'a str, dest: &'a str) -> [(&'a str, &'a str); 3] {
        [("sec-fetch-site", "same-origin"), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)]
    }

    #[test]
    fn requests_are_told_apart_by_the_table() {
        use super::{Background::*, Follower::*, Intent::*};
        let html = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        let table: &[Case<'_>] = &[
            // Programs.
            ("GET", "/", &[], WAKES),
            ("GET", "/api", &[("accept", "*/*"), ("user-agent", "curl/8")], WAKES),
            ("POST", "/api", &[("accept", "application/json, text/event-stream")], WAKES),
            // A program's fetch names the mode, and nothing else.
            ("GET", "/", &[("sec-fetch-mode", "cors"), ("accept", "*/*")], WAKES),
            ("DELETE", "/x", &[], WAKES),
            // People.
            ("GET", "/", &[html], Navigation),
            ("GET", "/?folder=/root", &browser("navigate", "document"), Navigation),
            ("GET", "/", &browser("navigate", "iframe"), Navigation),
            ("POST", "/login", &browser("navigate", "document"), WAKES),
            ("POST", "/save", &browser("cors", "empty"), WAKES),
            // Open pages.
            ("GET", "/poll", &browser("cors", "empty"), Follows(PartOfPage)),
            ("GET", "/a.png", &browser("no-cors", "image"), Follows(PartOfPage)),
            ("GET", "/page.html", &[html, ("sec-fetch-mode", "cors")], WAKES),
            ("POST", "/beacon", &browser("no-cors", "empty"), Follows(Beacon)),
            ("GET", "/events", &[("accept", "text/event-stream")], Follows(EventStream)),
            ("GET", "/ws", &[("sec-websocket-key", "x")], Follows(WebSocket)),
            ("GET", "/ws", &browser("websocket", "websocket"), Follows(WebSocket)),
            ("GET", "/socket.io/?EIO=4&transport=polling&t=x", &[], Follows(Polling)),
            ("POST", "/socket.io/?EIO=4&transport=polling&sid=x", &[], Follows(Polling)),
            ("GET", "/?transport=polling", &[], WAKES),
            // Nobody.
            ("HEAD", "/", &[html], Background(Head)),
            (
                "OPTIONS",
                "/api",
                &[("access-control-request-method", "POST")],
                Background(Preflight),
            ),
            ("GET", "/", &[html, ("purpose", "prefetch")], Background(Prefetch)),
            ("GET", "/", &[html, ("Sec-Purpose", "prefetch;prerender")], Background(Prefetch)),
            ("GET", "/sw.js", &[("service-worker", "script")], Background(ServiceWorker)),
            ("GET", "/favicon.ico", &[], Background(WellKnown)),
            ("GET", "/static/FavIcon.svg?v=2", &[], Background(WellKnown)),
            ("GET", "/robots.txt", &[html], Background(WellKnown)),
            ("GET", "/manifest.json", &[], Background(WellKnown)),
            ("GET", "/site.webmanifest", &[], Background(WellKnown)),
            ("GET", "/m", &browser("cors", "manifest"), Background(WellKnown)),
            (
                "GET",
                "/.well-known/appspecific/com.chrome.devtools.json",
                &[],
                Background(WellKnown),
            ),
            ("GET", "/apple-touch-icon-120x120.png", &[], Background(WellKnown)),
            ("POST", "/robots.txt", &[], WAKES),
            ("GET", "/docs/robots.txt.html", &[], WAKES),
        ];
        for (method, target, pairs, expected) in table {
            assert_eq!(
                of(method, target, &headers(pairs)),
                *expected,
                "{method} {target} {pairs:?}"
            );
        }
    }

    #[test]
    fn intent_with_a_reason_is_the_one_that_may_not_wake() {
        for (_, intent) in RULES {
            assert_eq!(intent.passive().is_none(), *intent == Intent::Navigation, "{intent:?}");
            let background = matches!(intent, Intent::Background(_));
            assert_eq!(intent.is_use(), !background, "{intent:?}");
        }
        assert!(WAKES.passive().is_none() && WAKES.is_use());
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_apart_without_a_panic(
            method in ".*", target in ".*", value in proptest::collection::vec(32u8..=255, 0..50),
            name in 0usize..8,
        ) {
            let names = [
                "accept", "purpose", "sec-purpose", "service-worker", "sec-fetch-mode",
                "sec-fetch-dest", "sec-fetch-site", "sec-websocket-key",
            ];
            let mut headers = HeaderMap::new();
            let bytes: Vec<u8> = value.into_iter().filter(|byte| *byte != 127).collect();
            headers.insert(names[name], HeaderValue::from_bytes(&bytes).expect("a value"));
            let intent = of(&method, &target, &headers);
            prop_assert!(intent.is_use() || intent.passive().is_some());
        }
    }
}
