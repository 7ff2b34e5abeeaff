//! Judges the answers that a service gave to a browser's requests. Pure.

use daemon::{chain::Chain, doctor::Check, web};
use http::{
    HeaderMap, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, CACHE_CONTROL, CONTENT_SECURITY_POLICY, X_FRAME_OPTIONS,
    },
};

/// Most characters of an answer's text that are shown.
const TEXT_MAX: usize = 120;
/// Beginnings of what the ingress says where a node is at fault, and its sandbox was not asked.
const OF_A_NODE: [&str; 3] =
    ["the agent of this node", "the node gave no route", "the node of this sandbox"];

/// Answers of one service, each to a request as a browser sends it from a page of another site.
#[derive(Debug)]
pub(super) struct Answers {
    /// True when the service is for everybody.
    pub(super) is_public: bool,
    /// Answer to a GET.
    pub(super) get: Result<web::Answer, web::Error>,
    /// Answer to the question whether the page may send a request.
    pub(super) preflight: Result<web::Answer, web::Error>,
    /// Answer to a WebSocket's handshake.
    pub(super) websocket: Result<web::Answer, web::Error>,
    /// Answers to what the page's script asks in its user's name, where there are sessions.
    pub(super) with_session: Option<WithSession>,
}

/// Answers to requests that a script of the page sends with its user's session.
#[derive(Debug)]
pub(super) struct WithSession {
    /// Answer to a GET.
    pub(super) get: Result<web::Answer, web::Error>,
    /// Answer to a WebSocket's handshake.
    pub(super) websocket: Result<web::Answer, web::Error>,
}

/// Judges a service by the answers to a page of `origin`.
pub(super) fn judge(service: &str, origin: &str, answers: &Answers) -> Vec<Check> {
    let get = match &answers.get {
        Ok(answer) => answer,
        Err(error) => {
            let found = Chain(error).to_string();
            let remedy = "pve-sandbox-agent tunnel test ID, on a node, says where it ends";
            return vec![Check::failed("answer", service, found, remedy)];
        }
    };
    let state = answer(service, get, answers.is_public);
    if state.state == daemon::doctor::State::Failed {
        return vec![state];
    }
    let mut checks = vec![
        state,
        across_origins(service, origin, &get.headers),
        frame(service, origin, &get.headers),
        preflight(service, origin, &answers.preflight),
        websocket(service, &answers.websocket),
    ];
    if let Some(WithSession { get, websocket }) = &answers.with_session {
        checks.push(session(service, origin, get));
        checks.push(session_socket(service, origin, websocket));
    }
    checks
}

/// Judges the state of the service. What the server itself answers is right, but for what only Caddy and the agent
/// say.
fn answer(service: &str, get: &web::Answer, is_public: bool) -> Check {
    let status = get.status.as_u16();
    let is_of_a_node = || OF_A_NODE.iter().any(|said| text(get).starts_with(said));
    let remedy = match status {
        // The ingress asks nobody for access to a public port.
        401 if is_public => return own(service, status),
        403 if is_public && !is_of_the_ingress(get) => return own(service, status),
        401 => "sandboxctl link ID PORT gives access",
        403 => "sandboxctl expose ID PORT opens the port",
        404 => return Check::ok("answer", service, "404: the server has no page at /"),
        410 => "the sandbox is deleted",
        500..=599 if is_of_a_node() => {
            "pve-sandbox-agent doctor, on the sandbox's node and on the one that is asked"
        }
        502 => "sandboxctl port ls ID shows what listens, and where",
        503 => "sandboxctl get ID shows the sandbox's state",
        _ => return Check::ok("answer", service, format!("{status}")),
    };
    Check::failed("answer", service, format!("{status}: {}", text(get)), remedy)
}

fn own(service: &str, status: u16) -> Check {
    Check::ok("answer", service, format!("{status}: the answer of the server itself"))
}

/// True for an answer of the ingress: every page may read it, and nobody keeps it. Where the ingress lets pages read the
/// answer of a server, it exposes its headers, too.
fn is_of_the_ingress(answer: &web::Answer) -> bool {
    let has = |name, value: &str| answer.headers.get(name).is_some_and(|found| found == value);
    has(CACHE_CONTROL, "no-store")
        && has(ACCESS_CONTROL_ALLOW_ORIGIN, "*")
        && !answer.headers.contains_key(ACCESS_CONTROL_EXPOSE_HEADERS)
}

/// Returns the first line of an answer's body.
fn text(answer: &web::Answer) -> String {
    let body = String::from_utf8_lossy(&answer.body);
    body.lines().next().unwrap_or_default().chars().take(TEXT_MAX).collect()
}

/// Judges whether a page of another site may read an answer.
fn across_origins(service: &str, origin: &str, headers: &HeaderMap) -> Check {
    match allowed(origin, headers) {
        Ok(value) => Check::ok("cross-origin", service, format!("one header, {value}")),
        Err(found) => {
            let remedy = "let the server send one Access-Control-Allow-Origin, or none";
            Check::failed("cross-origin", service, found, remedy)
        }
    }
}

/// Returns the origin that an answer allows, if there is one header, and it allows this origin.
fn allowed(origin: &str, headers: &HeaderMap) -> Result<String, String> {
    let all: Vec<_> = headers.get_all(ACCESS_CONTROL_ALLOW_ORIGIN).iter().collect();
    let [one] = all.as_slice() else {
        return Err(format!("{} headers Access-Control-Allow-Origin", all.len()));
    };
    match one.to_str() {
        Ok(value) if value == "*" || value == origin => Ok(value.to_owned()),
        Ok(value) => Err(format!("it allows {value}, not {origin}")),
        Err(_) => Err("the header is no text".to_owned()),
    }
}

/// Judges whether a page of another site may show the service in a frame.
fn frame(service: &str, origin: &str, headers: &HeaderMap) -> Check {
    let policies = headers.get_all(CONTENT_SECURITY_POLICY).iter();
    let mut rules = policies
        .filter_map(|policy| policy.to_str().ok())
        .flat_map(|policy| policy.split([';', ',']))
        .map(str::split_ascii_whitespace);
    // Each of them must allow it.
    let is_bound = rules.any(|mut words| {
        let is_about_frames =
            words.next().is_some_and(|name| name.eq_ignore_ascii_case("frame-ancestors"));
        is_about_frames && !words.any(|page| page == "*" || page.eq_ignore_ascii_case(origin))
    });
    if headers.contains_key(X_FRAME_OPTIONS) || is_bound {
        let remedy = "ingress.frames = true, or name the page in ingress.parent_origins";
        return Check::warning("frame", service, "it may not be shown in a frame", remedy);
    }
    Check::ok("frame", service, "it may be shown in a frame")
}

fn preflight(service: &str, origin: &str, answer: &Result<web::Answer, web::Error>) -> Check {
    let remedy = "let the server answer OPTIONS, or leave it to the ingress";
    match answer {
        Err(error) => Check::failed("preflight", service, Chain(error).to_string(), remedy),
        Ok(answer) if !answer.status.is_success() => {
            let found = format!("{}: {}", answer.status.as_u16(), text(answer));
            Check::failed("preflight", service, found, remedy)
        }
        Ok(answer) => match allowed(origin, &answer.headers) {
            Ok(value) => Check::ok("preflight", service, format!("one header, {value}")),
            Err(found) => Check::failed("preflight", service, found, remedy),
        },
    }
}

/// Judges a WebSocket's handshake. Many servers have none, or have them elsewhere: that is no flaw.
fn websocket(service: &str, answer: &Result<web::Answer, web::Error>) -> Check {
    match answer {
        Ok(answer) if answer.status == StatusCode::SWITCHING_PROTOCOLS => {
            Check::ok("websocket", service, "accepted at /")
        }
        Ok(answer) if answer.status.as_u16() >= 502 => Check::failed(
            "websocket",
            service,
            format!("{}: {}", answer.status.as_u16(), text(answer)),
            "sandboxctl port ls ID shows what listens",
        ),
        Ok(answer) => {
            let found = format!("passed on; the server has none at / ({})", answer.status.as_u16());
            Check::ok("websocket", service, found)
        }
        Err(error) => Check::failed(
            "websocket",
            service,
            Chain(error).to_string(),
            "look whether what stands in front of the ingress passes WebSockets on",
        ),
    }
}

/// Command or edit that lets a page use sessions.
const NAME_THE_PAGE: &str = "name the page in ingress.parent_origins";

/// Judges whether a script of the page reads the service with its user's session. A browser shows it only an answer that
/// names the page, which each answer does that a page of `parent_origins` gets.
fn session(service: &str, origin: &str, answer: &Result<web::Answer, web::Error>) -> Check {
    match answer {
        Ok(answer) if names(origin, &answer.headers) => {
            let found = format!("{}: the page is named", answer.status.as_u16());
            Check::ok("session", service, found)
        }
        Ok(answer) => {
            let status = answer.status.as_u16();
            let found = format!("{status}: a script of {origin} cannot use its user's session");
            Check::warning("session", service, found, NAME_THE_PAGE)
        }
        Err(error) => Check::failed("session", service, Chain(error).to_string(), "try again"),
    }
}

/// Judges the same of a WebSocket, whose answer is for the browser alone.
fn session_socket(service: &str, origin: &str, answer: &Result<web::Answer, web::Error>) -> Check {
    match answer {
        Ok(answer) if answer.status == StatusCode::FORBIDDEN && !names(origin, &answer.headers) => {
            let found = format!("403: a WebSocket of {origin} cannot use its user's session");
            Check::warning("session-websocket", service, found, NAME_THE_PAGE)
        }
        Ok(answer) => {
            let found = format!("passed on ({})", answer.status.as_u16());
            Check::ok("session-websocket", service, found)
        }
        Err(error) => {
            Check::failed("session-websocket", service, Chain(error).to_string(), "try again")
        }
    }
}

/// True when an answer names this page, and not all pages: with `*` a browser does not show what it got by a cookie.
fn names(origin: &str, headers: &HeaderMap) -> bool {
    let credentials = headers.get(ACCESS_CONTROL_ALLOW_CREDENTIALS);
    allowed(origin, headers).is_ok_and(|allowed| allowed == origin)
        && credentials.is_some_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use daemon::doctor::State;
    use http::HeaderValue;

    use super::*;

    const ORIGIN: &str = "https://app.test";

    fn reply(status: u16, headers: &[(&'static str, &'static str)]) -> web::Answer {
        let mut answer = web::Answer {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: HeaderMap::new(),
            body: Bytes::from_static(b"the reason\nmore"),
            is_whole: true,
        };
        for (name, value) in headers {
            answer.headers.append(*name, HeaderValue::from_static(value));
        }
        answer
    }

    /// Answers of a public service.
    fn answers(get: web::Answer, preflight: web::Answer, websocket: web::Answer) -> Answers {
        Answers {
            is_public: true,
            get: Ok(get),
            preflight: Ok(preflight),
            websocket: Ok(websocket),
            with_session: None,
        }
    }

    fn states(answers: &Answers) -> Vec<(&'static str, State)> {
        judge("web", ORIGIN, answers).iter().map(|check| (check.name, check.state)).collect()
    }

    #[test]
    fn good_service_has_no_findings() {
        let open = [("access-control-allow-origin", "*")];
        let preflight = reply(204, &[("access-control-allow-origin", ORIGIN)]);
        let answers = answers(reply(200, &open), preflight, reply(404, &open));
        assert!(states(&answers).iter().all(|(_, state)| *state == State::Ok));
    }

    #[test]
    fn each_flaw_is_found_by_its_own_check() {
        let twice = [("access-control-allow-origin", "*"), ("access-control-allow-origin", "*")];
        let bound = [
            ("access-control-allow-origin", "https://other.test"),
            ("content-security-policy", "default-src 'self'; frame-ancestors 'none'"),
        ];
        for headers in [&twice, &bound] {
            let answers = answers(reply(200, headers), reply(405, &[]), reply(502, &[]));
            let failed: Vec<_> = states(&answers)
                .into_iter()
                .filter(|(_, state)| *state == State::Failed)
                .map(|(name, _)| name)
                .collect();
            assert_eq!(failed, ["cross-origin", "preflight", "websocket"]);
        }
        let answers = answers(reply(200, &bound), reply(204, &bound), reply(101, &[]));
        let framed = judge("web", ORIGIN, &answers);
        let frame = framed.iter().find(|check| check.name == "frame").expect("it is judged");
        assert_eq!(frame.state, State::Warning);
    }

    #[test]
    fn frame_is_right_where_each_policy_names_the_page() {
        const OURS: (&str, &str) =
            ("content-security-policy", "frame-ancestors 'self' https://app.test");
        for (headers, state) in [
            (vec![OURS], State::Ok),
            (vec![("content-security-policy", "img-src *"), OURS], State::Ok),
            (vec![OURS, ("content-security-policy", "Frame-Ancestors 'self'")], State::Warning),
            (vec![("content-security-policy", "a b, frame-ancestors")], State::Warning),
            (vec![OURS, ("x-frame-options", "DENY")], State::Warning),
        ] {
            assert_eq!(frame("web", ORIGIN, &reply(200, &headers).headers).state, state);
        }
    }

    #[test]
    fn service_that_does_not_answer_is_one_finding_with_the_reason() {
        for status in [401, 403, 410, 502, 503] {
            let refused = || reply(status, &[]);
            let answers = answers(refused(), refused(), refused());
            let found = judge("web", ORIGIN, &Answers { is_public: false, ..answers });
            assert_eq!(found.len(), 1, "{status}");
            assert_eq!(found[0].found, format!("{status}: the reason"));
        }
    }

    #[test]
    fn refusal_of_a_public_service_is_its_own_unless_the_ingress_says_it() {
        for status in [401, 403] {
            let own = || reply(status, &[OPEN, EXPOSED]);
            let found = judge("web", ORIGIN, &answers(own(), reply(204, &[OPEN]), own()));
            assert_eq!(found[0].state, State::Ok, "{status}: {found:?}");
            assert_eq!(found[0].remedy, None, "no link helps");
        }
        let closed = || reply(403, &[("cache-control", "no-store"), OPEN]);
        let found = judge("web", ORIGIN, &answers(closed(), closed(), closed()));
        assert_eq!((found.len(), found[0].state), (1, State::Failed), "{found:?}");
        assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("expose")));
    }

    #[test]
    fn node_that_is_at_fault_is_told_from_a_silent_server() {
        let said = |text: &'static str| {
            let mut answer = reply(502, &[]);
            answer.body = Bytes::from_static(text.as_bytes());
            let found = judge("web", ORIGIN, &answers(answer, reply(502, &[]), reply(502, &[])));
            found[0].remedy.clone().unwrap_or_default()
        };
        for text in [
            "the agent of this node does not answer (502)\n",
            "the node gave no route\n",
            "the node of this sandbox did not answer (502)\n",
        ] {
            assert!(said(text).contains("doctor"), "{text}");
        }
        assert!(said("nothing listens on port 80 in the sandbox\n").contains("port ls"));
    }

    #[test]
    fn page_that_is_not_named_cannot_use_the_session_of_its_user() {
        let named =
            [("access-control-allow-origin", ORIGIN), ("access-control-allow-credentials", "true")];
        let found = |get: web::Answer, websocket: web::Answer| {
            let with_session = Some(WithSession { get: Ok(get), websocket: Ok(websocket) });
            let open = || reply(200, &[OPEN]);
            let answers = answers(open(), open(), open());
            let found = judge("web", ORIGIN, &Answers { with_session, ..answers });
            let remedies: Vec<_> = found.iter().filter_map(|check| check.remedy.clone()).collect();
            assert!(remedies.iter().all(|remedy| remedy == NAME_THE_PAGE), "{remedies:?}");
            let states = found.iter().map(|check| (check.name, check.state));
            states
                .skip_while(|(name, _)| *name != "session")
                .map(|(_, state)| state)
                .collect::<Vec<_>>()
        };
        let (ok, warning) = (State::Ok, State::Warning);
        let states = found(reply(403, &[OPEN]), reply(403, &[OPEN]));
        assert_eq!(states, [warning, warning], "the ingress refuses");
        let states = found(reply(200, &[OPEN]), reply(101, &[]));
        assert_eq!(states, [warning, ok], "a browser does not show it");
        let states = found(reply(200, &named), reply(101, &[]));
        assert_eq!(states, [ok, ok]);
        // The server's own refusal, of a page that is named.
        let states = found(reply(403, &named), reply(403, &named));
        assert_eq!(states, [ok, ok]);
    }

    const OPEN: (&str, &str) = ("access-control-allow-origin", "*");
    const EXPOSED: (&str, &str) = ("access-control-expose-headers", "*");
}
