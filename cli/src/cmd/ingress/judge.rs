//! Judges the answers that a service gave to a browser's requests. Pure.

use daemon::{chain::Chain, doctor::Check, web};
use http::{
    HeaderMap, StatusCode,
    header::{ACCESS_CONTROL_ALLOW_ORIGIN, CONTENT_SECURITY_POLICY, X_FRAME_OPTIONS},
};

/// Most characters of an answer's text that are shown.
const TEXT_MAX: usize = 120;

/// Answers of one service, each to a request as a browser sends it from a page of another site.
#[derive(Debug)]
pub(super) struct Answers {
    /// Answer to a GET.
    pub(super) get: Result<web::Answer, web::Error>,
    /// Answer to the question whether the page may send a request.
    pub(super) preflight: Result<web::Answer, web::Error>,
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
    let state = answer(service, get);
    if state.state == daemon::doctor::State::Failed {
        return vec![state];
    }
    vec![
        state,
        across_origins(service, origin, &get.headers),
        frame(service, origin, &get.headers),
        preflight(service, origin, &answers.preflight),
        websocket(service, &answers.websocket),
    ]
}

/// Judges the state of the service. What the server itself answers is right, but for what only Caddy and the agent
/// say.
fn answer(service: &str, get: &web::Answer) -> Check {
    let status = get.status.as_u16();
    let remedy = match status {
        401 => "sandboxctl link ID PORT gives access",
        403 => "sandboxctl expose ID PORT opens the port",
        404 => return Check::ok("answer", service, "404: the server has no page at /"),
        410 => "the sandbox is deleted",
        502 => "sandboxctl port ls ID shows what listens, and where",
        503 => "sandboxctl get ID shows the sandbox's state",
        _ => return Check::ok("answer", service, format!("{status}")),
    };
    Check::failed("answer", service, format!("{status}: {}", text(get)), remedy)
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

    fn states(answers: &Answers) -> Vec<(&'static str, State)> {
        judge("web", ORIGIN, answers).iter().map(|check| (check.name, check.state)).collect()
    }

    #[test]
    fn good_service_has_no_findings() {
        let open = [("access-control-allow-origin", "*")];
        let answers = Answers {
            get: Ok(reply(200, &open)),
            preflight: Ok(reply(204, &[("access-control-allow-origin", ORIGIN)])),
            websocket: Ok(reply(404, &open)),
        };
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
            let answers = Answers {
                get: Ok(reply(200, headers)),
                preflight: Ok(reply(405, &[])),
                websocket: Ok(reply(502, &[])),
            };
            let failed: Vec<_> = states(&answers)
                .into_iter()
                .filter(|(_, state)| *state == State::Failed)
                .map(|(name, _)| name)
                .collect();
            assert_eq!(failed, ["cross-origin", "preflight", "websocket"]);
        }
        let framed = judge(
            "web",
            ORIGIN,
            &Answers {
                get: Ok(reply(200, &bound)),
                preflight: Ok(reply(204, &bound)),
                websocket: Ok(reply(101, &[])),
            },
        );
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
            let answers = Answers {
                get: Ok(reply(status, &[])),
                preflight: Ok(reply(status, &[])),
                websocket: Ok(reply(status, &[])),
            };
            let found = judge("web", ORIGIN, &answers);
            assert_eq!(found.len(), 1, "{status}");
            assert_eq!(found[0].found, format!("{status}: the reason"));
        }
    }
}
