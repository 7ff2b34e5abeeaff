//! What Caddy says of a request, as far as the verdict depends on it. Every method is total: a header may hold
//! any bytes.

use std::str::FromStr;

use http::{
    HeaderMap, HeaderName,
    header::{
        ACCEPT, ACCESS_CONTROL_REQUEST_METHOD, COOKIE, HOST, ORIGIN, REFERER, SEC_WEBSOCKET_KEY,
    },
};
use proto::{host::Label, id::Invalid, name::Port};

use super::{Via, host::Domain, uri::Uri};

/// Method of the request, as Caddy got it.
const METHOD: HeaderName = HeaderName::from_static("x-forwarded-method");
/// Path and query of the request, as Caddy got them.
const URI: HeaderName = HeaderName::from_static("x-forwarded-uri");
/// Headers with a token: ours, then those that the SDKs of E2B and Daytona send.
pub(in crate::ingress) const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-sbx-token"),
    HeaderName::from_static("e2b-traffic-access-token"),
    HeaderName::from_static("x-daytona-preview-token"),
];
/// Headers in which a browser says where a request comes from; a page cannot set them.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");
/// Values of `Sec-Fetch-Dest` of what is shown inside another page.
const FRAMES: [&[u8]; 4] = [b"iframe", b"frame", b"embed", b"object"];

/// Reasons why a request goes to no sandbox. Caddy sends the body of a CONNECT on without its length, and a target that
/// is no path to the agent in place of the path of the question.
const TUNNEL: &str = "CONNECT is not passed on to sandboxes";
const NO_PATH: &str = "the target of the request must be a path";

/// Most cookies with our name that are looked at; a browser has one.
const SESSIONS_MAX: usize = 4;

/// Origin of a page: `https://host` or `https://host:port`, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// Returns the host, with its port if it is not the usual one.
    fn host(&self) -> &str {
        self.0.split_once("://").map_or("", |(_, host)| host)
    }
}

impl FromStr for Origin {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.:".contains(&b);
        if rest.is_some_and(|host| !host.is_empty() && host.bytes().all(plain)) {
            return Ok(Self(text.to_owned()));
        }
        let why = "must be origins in lower case, such as `https://app.example.com`";
        Err(Invalid::new("ingress.parent_origins", why))
    }
}

/// Settings that the verdict depends on.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Domain of the sandboxes' host names.
    pub domain: Domain,
    /// Pages that may use a browser's session for a sandbox in its user's name.
    pub parents: Vec<Origin>,
    /// True when scripts of other sites may call public servers that say nothing about that.
    pub cors: bool,
}

/// A request of a client, as Caddy tells it.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Server that asks.
    pub via: Via,
    /// Parsed host; `None` when it has no form of ours, or there is not exactly one.
    pub label: Option<Label>,
    /// Time of the question, seconds since 1970.
    pub now_s: u64,
    headers: &'a HeaderMap,
    rules: &'a Rules,
}

impl<'a> Question<'a> {
    /// Reads a question.
    pub fn new(via: Via, headers: &'a HeaderMap, rules: &'a Rules, now_s: u64) -> Self {
        let mut hosts = headers.get_all(HOST).iter();
        let host = hosts.next().and_then(|host| host.to_str().ok());
        let host = host.filter(|_| hosts.next().is_none());
        let label = host.and_then(|host| rules.domain.label_of(host));
        Self { via, label, now_s, headers, rules }
    }

    fn value(&self, name: &HeaderName) -> Option<&'a [u8]> {
        self.headers.get(name).map(http::HeaderValue::as_bytes)
    }

    /// Returns why no sandbox may get a request of this form. A CONNECT by HTTP/2 with a body would be two requests to
    /// another node: the body is the second, on a connection that requests of others use, too.
    pub(super) fn flaw(&self) -> Option<&'static str> {
        if self.value(&METHOD) == Some(b"CONNECT") {
            return Some(TUNNEL);
        }
        let target = self.value(&URI).unwrap_or(b"/");
        (!target.starts_with(b"/") && target != b"*").then_some(NO_PATH)
    }

    /// Returns the path and query.
    pub(super) fn uri(&self) -> Uri<'a> {
        Uri::new(self.value(&URI).unwrap_or(b"/"))
    }

    /// Lists the tokens in headers.
    pub(super) fn tokens(&self) -> impl Iterator<Item = &'a [u8]> {
        TOKENS.into_iter().filter_map(|name| self.value(&name))
    }

    /// Lists the values of the session cookie of a port.
    pub(super) fn sessions(&self, port: Port) -> impl Iterator<Item = &'a [u8]> {
        let name = cookie_name(port);
        let pairs = self.headers.get_all(COOKIE).iter();
        let pairs = pairs.flat_map(|value| value.as_bytes().split(|&byte| byte == b';'));
        let own = pairs.filter_map(move |pair| {
            pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=")
        });
        own.take(SESSIONS_MAX)
    }

    /// True for a request that by HTTP's rules changes nothing.
    pub(super) fn reads(&self) -> bool {
        matches!(self.value(&METHOD), Some(b"GET" | b"HEAD"))
    }

    /// True for the request that opens a WebSocket. Caddy drops `Upgrade` from a question.
    pub(super) fn opens_websocket(&self) -> bool {
        self.headers.contains_key(SEC_WEBSOCKET_KEY)
            || self.value(&FETCH_MODE) == Some(b"websocket")
    }

    /// True when a browser loads a page or a frame. An older one says so by what it accepts alone.
    pub(super) fn loads_page(&self) -> bool {
        self.reads()
            && !self.opens_websocket()
            && match self.value(&FETCH_MODE) {
                Some(mode) => mode == b"navigate",
                None => self.wants_html(),
            }
    }

    /// True for the question of a browser whether a page may send a request. It never has credentials.
    pub(super) fn is_preflight(&self) -> bool {
        self.value(&METHOD) == Some(b"OPTIONS")
            && self.headers.contains_key(ORIGIN)
            && self.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }

    /// True for such a question that the ingress answers itself while no server of a public port can.
    pub(super) fn is_allowed_preflight(&self) -> bool {
        self.rules.cors && self.is_preflight()
    }

    /// Returns the origin that is told that it may send requests: a page that the operator named, by its name, so
    /// that its session counts; all others as `*`, with which browsers send no cookies.
    pub(super) fn allowed_origin(&self) -> &'a str {
        let named = self.value(&ORIGIN).filter(|origin| self.is_trusted(origin));
        named.and_then(|origin| std::str::from_utf8(origin).ok()).unwrap_or("*")
    }

    /// True when the answer is shown to a person.
    pub fn wants_html(&self) -> bool {
        let mut accepted = self.headers.get_all(ACCEPT).iter();
        accepted.any(|value| value.as_bytes().windows(9).any(|part| part == b"text/html"))
    }

    /// Returns the page that sends the request, if the operator named it.
    pub(in crate::ingress) fn parent(&self) -> Option<&'a str> {
        let origin = self.value(&ORIGIN)?;
        let mut parents = self.rules.parents.iter();
        parents.find(|Origin(own)| own.as_bytes() == origin).map(|Origin(own)| own.as_str())
    }

    /// Returns the origin of the page that a browser says it comes from. A page may keep that to itself, but cannot
    /// name another.
    fn referrer(&self) -> Option<Origin> {
        let referrer = std::str::from_utf8(self.value(&REFERER)?).ok()?;
        let (scheme, rest) = referrer.split_once("://")?;
        let host = rest.split(['/', '?', '#']).next()?;
        format!("{scheme}://{host}").parse().ok()
    }

    /// True for a page of any sandbox, which may be hostile to all others.
    fn is_of_a_sandbox(&self, page: &Origin) -> bool {
        self.rules.domain.label_of(page.host()).is_some()
    }

    /// Lists the pages that may show the answer in a frame, as a policy says it: those of the same host, those that
    /// the operator named, and the one that asks, unless it is a sandbox's. A browser wants each page around the frame
    /// to be among them. `None` for a frame in a page of the same host: which pages are around that one is not known
    /// here, and was judged when it came. What a script fetches is not that: a service worker may show it in any frame.
    pub(in crate::ingress) fn frame_ancestors(&self) -> Option<String> {
        let referrer = self.referrer();
        let is_own =
            |page: &Origin| page.host().as_bytes() == self.value(&HOST).unwrap_or_default();
        let within = match self.value(&FETCH_SITE) {
            Some(site) => site == b"same-origin" && self.loads_frame(),
            None => referrer.as_ref().is_some_and(is_own),
        };
        if within {
            return None;
        }
        let asks = referrer.filter(|page| !self.is_of_a_sandbox(page));
        let mut all = "'self'".to_owned();
        for Origin(page) in self.rules.parents.iter().chain(&asks) {
            all.push(' ');
            all.push_str(page);
        }
        Some(all)
    }

    fn loads_frame(&self) -> bool {
        self.value(&FETCH_DEST).is_some_and(|dest| FRAMES.contains(&dest))
    }

    /// True when the page around a frame may show the sandbox, as far as is known. The answer names the pages that may.
    fn may_be_framed(&self) -> bool {
        match self.referrer() {
            Some(page) => self.rules.parents.contains(&page) || !self.is_of_a_sandbox(&page),
            None => !self.rules.parents.is_empty(),
        }
    }

    /// True when a browser's session counts for this request. All sandboxes are one site to a browser, so it sends
    /// the cookie with what another sandbox's page asks for, too: such a request counts only when it loads a
    /// page, or a frame of a page that is no sandbox's, or comes from a page that the operator named.
    pub(super) fn may_use_session(&self) -> bool {
        let origin = self.value(&ORIGIN);
        if origin.is_some_and(|origin| self.is_trusted(origin)) {
            return true;
        }
        let is_foreign = match self.value(&FETCH_SITE) {
            Some(b"same-origin" | b"none") => false,
            Some(_) => true,
            None => origin.is_some(),
        };
        if self.opens_websocket() {
            // A browser always says the origin.
            return origin.is_none() && !is_foreign;
        }
        let loads = self.reads() && self.value(&FETCH_MODE) == Some(b"navigate");
        // Browsers say what they load for; a program that does not, such as an earlier sandboxctl, shows no frame.
        let is_framed = self.value(&FETCH_DEST).is_some_and(|dest| dest != b"document");
        !is_foreign || loads && (!is_framed || self.may_be_framed())
    }

    /// True for the origin of this host, or of a page that the operator named.
    fn is_trusted(&self, origin: &[u8]) -> bool {
        let host = self.value(&HOST).unwrap_or_default();
        let own = |scheme: &[u8]| {
            origin.strip_prefix(scheme).is_some_and(|other| other.eq_ignore_ascii_case(host))
        };
        let mut parents = self.rules.parents.iter();
        own(b"https://") || own(b"http://") || parents.any(|Origin(own)| own.as_bytes() == origin)
    }
}

/// Name of the cookie with the session of a port. The prefix keeps other hosts from setting it.
pub(super) fn cookie_name(port: Port) -> String {
    format!("__Host-sbx-{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (name.parse::<HeaderName>().expect("a name"), value.parse().expect("a value"))
        };
        pairs.iter().map(pair).collect()
    }

    fn rules() -> Rules {
        let parents = vec!["https://app.example.com".parse().expect("an origin")];
        Rules { domain: "sbx.test".parse().expect("a domain"), parents, cors: true }
    }

    fn may_use_session(method: &str, more: &[(&str, &str)]) -> bool {
        let host = ("host", "port-80-vm-100001.sbx.test");
        let all = [&[host, ("x-forwarded-method", method)], more].concat();
        Question::new(Via::Edge, &headers(&all), &rules(), 0).may_use_session()
    }

    #[test]
    fn session_counts_for_the_pages_of_its_own_host_and_of_named_parents() {
        let site = |site: &'static str| ("sec-fetch-site", site);
        let mode = |mode: &'static str| ("sec-fetch-mode", mode);
        let origin = |origin: &'static str| ("origin", origin);
        let own = origin("https://port-80-vm-100001.sbx.test");
        let sibling = origin("https://port-80-vm-100002.sbx.test");
        let parent = origin("https://app.example.com");
        let document = ("sec-fetch-dest", "document");
        for (allowed, method, more) in [
            (true, "GET", vec![site("none"), mode("navigate")]),
            (true, "GET", vec![site("cross-site"), mode("navigate"), document]),
            (true, "GET", vec![site("same-site"), mode("navigate"), document]),
            (false, "POST", vec![site("same-site"), mode("navigate"), sibling]),
            (false, "POST", vec![site("cross-site"), mode("navigate"), origin("null")]),
            (true, "POST", vec![site("same-origin"), mode("cors"), own]),
            (true, "POST", vec![site("cross-site"), mode("cors"), parent]),
            (false, "GET", vec![site("same-site"), mode("cors"), sibling]),
            (false, "GET", vec![site("same-site"), mode("no-cors")]),
            (false, "GET", vec![site("cross-site"), mode("no-cors")]),
            (false, "GET", vec![site("something new"), mode("cors")]),
            (true, "GET", vec![site("same-origin"), mode("no-cors")]),
            // Browsers without these headers, and programs.
            (true, "GET", vec![]),
            (true, "POST", vec![own]),
            (false, "POST", vec![sibling]),
            (true, "POST", vec![]),
        ] {
            assert_eq!(may_use_session(method, &more), allowed, "{method} {more:?}");
        }
        let socket = ("sec-websocket-key", "x");
        for (allowed, more) in [
            (true, vec![socket, own]),
            (true, vec![socket, parent, site("cross-site")]),
            (true, vec![socket]),
            (false, vec![socket, sibling]),
            (false, vec![socket, sibling, site("same-site"), mode("websocket")]),
            (false, vec![socket, origin("null")]),
            (false, vec![site("cross-site"), mode("websocket")]),
        ] {
            assert_eq!(may_use_session("GET", &more), allowed, "{more:?}");
        }
    }

    /// Asks for a frame from a page of this site, with this referrer, where these pages are named. Returns whether the
    /// session counts, and who may show the answer.
    fn framed(site: &str, referrer: Option<&str>, parents: &[&str]) -> (bool, Option<String>) {
        let mut all = vec![
            ("host", "port-80-vm-100001.sbx.test"),
            ("x-forwarded-method", "GET"),
            ("sec-fetch-site", site),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "iframe"),
        ];
        all.extend(referrer.map(|page| ("referer", page)));
        let headers = headers(&all);
        let parents = parents.iter().map(|page| page.parse().expect("an origin")).collect();
        let rules = Rules { parents, ..rules() };
        let question = Question::new(Via::Edge, &headers, &rules, 0);
        (question.may_use_session(), question.frame_ancestors())
    }

    #[test]
    fn frame_is_for_the_page_that_asks_and_for_no_sandbox_around_it() {
        let to = |pages: &str| Some(format!("'self'{pages}"));
        let app = Some("https://app.example.com/");
        assert_eq!(framed("cross-site", app, &[]), (true, to(" https://app.example.com")));
        // An application below the same domain is no sandbox.
        let below = Some("https://app.sbx.test:8443/a?b#c");
        assert_eq!(framed("same-site", below, &[]), (true, to(" https://app.sbx.test:8443")));
        for sibling in [
            "https://port-80-vm-100002.sbx.test/",
            "https://port-80-vm-100002.sbx.test:8443/",
            "https://box--blue.sbx.test/",
        ] {
            assert_eq!(framed("same-site", Some(sibling), &[]), (false, to("")), "{sibling}");
        }
        // Pages that do not say who they are, such as those without an origin, must be named in the settings.
        for unsaid in [None, Some("null"), Some("https://*/"), Some("https://a.b; script-src c/")] {
            assert_eq!(framed("cross-site", unsaid, &[]), (false, to("")), "{unsaid:?}");
            let named = framed("cross-site", unsaid, &["https://a.b"]);
            assert_eq!(named, (true, to(" https://a.b")), "{unsaid:?}");
        }
        // A sandbox's page that the operator named.
        let named = "https://port-80-vm-100002.sbx.test";
        let (counts, ancestors) = framed("same-site", Some(&format!("{named}/a")), &[named]);
        assert_eq!((counts, ancestors), (true, to(&format!(" {named}"))));
        // Frames in the frame's own pages stay in it.
        let own = Some("https://port-80-vm-100001.sbx.test/");
        assert_eq!(framed("same-origin", own, &[]), (true, None));
        assert_eq!(framed("same-origin", None, &[]), (true, None));
    }

    #[test]
    fn session_counts_for_a_program_that_loads_a_page_where_no_page_is_named() {
        let rules = Rules { parents: Vec::new(), ..rules() };
        let program = [
            ("host", "port-80-vm-100001.sbx.test"),
            ("x-forwarded-method", "GET"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
        ];
        for (counts, more) in [(true, &[][..]), (false, &[("sec-fetch-dest", "iframe")][..])] {
            let headers = headers(&[&program, more].concat());
            let question = Question::new(Via::Edge, &headers, &rules, 0);
            assert_eq!(question.may_use_session(), counts, "{more:?}");
            assert_eq!(question.frame_ancestors().as_deref(), Some("'self'"), "{more:?}");
        }
    }

    #[test]
    fn page_in_a_tab_is_later_shown_in_no_frame_of_a_sandbox_either() {
        let ancestors = |more: &[(&str, &str)]| {
            let all = [&[("host", "port-80-vm-100001.sbx.test")], more].concat();
            Question::new(Via::Edge, &headers(&all), &rules(), 0).frame_ancestors()
        };
        let named = Some("'self' https://app.example.com".to_owned());
        for site in ["none", "same-origin"] {
            let tab = [("sec-fetch-site", site), ("sec-fetch-dest", "document")];
            assert_eq!(ancestors(&tab), named, "{site}");
        }
        // A service worker keeps what it has fetched, and shows it in frames of other pages.
        for (dest, expected) in
            [("empty", &named), ("iframe", &None), ("embed", &None), ("object", &None)]
        {
            let own = [("sec-fetch-site", "same-origin"), ("sec-fetch-dest", dest)];
            assert_eq!(&ancestors(&own), expected, "{dest}");
        }
        // A browser without these headers says the page around a frame, and then the frame's own.
        assert_eq!(ancestors(&[("referer", "https://port-80-vm-100002.sbx.test/")]), named);
        assert_eq!(ancestors(&[("referer", "https://port-80-vm-100001.sbx.test/")]), None);
        // A page around it may keep to itself who it is.
        assert_eq!(ancestors(&[]), named);
    }

    #[test]
    fn parent_is_an_origin() {
        for text in ["https://a.b", "http://localhost:3000"] {
            assert!(text.parse::<Origin>().is_ok(), "{text}");
        }
        for text in ["", "a.b", "https://", "https://a.b/", "https://A.b", "https://*.b", "null"] {
            assert!(text.parse::<Origin>().is_err(), "{text}");
        }
    }
}
