//! Tells where a request that went wrong ended: DNS, Cloudflare's edge, cloudflared, Caddy or the sandbox. Pure.

use daemon::doctor::Check;
use proto::visibility::Visibility;

use super::{Answer, Failure, Seen};
use crate::{
    ingress::render::{NO_AGENT, NO_PEER, NO_ROUTE},
    tunnel::UNIT,
};

/// Part of the way where a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The name leads nowhere, or not to Cloudflare.
    Dns,
    /// Cloudflare's edge answered by itself.
    Edge,
    /// cloudflared, on a node.
    Cloudflared,
    /// Caddy or the agent behind it.
    Caddy,
    /// The sandbox.
    Sandbox,
}

impl Place {
    /// Returns the word for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Edge => "edge",
            Self::Cloudflared => "cloudflared",
            Self::Caddy => "caddy",
            Self::Sandbox => "sandbox",
        }
    }
}

/// Verdict on one open port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Where the request ended.
    pub place: Place,
    /// Whether something does not work.
    pub is_failed: bool,
    /// Observation, one sentence.
    pub found: String,
    /// Remedy; none where nothing is to be done.
    pub remedy: String,
}

impl Verdict {
    /// Returns it as a line of a report.
    pub fn check(&self, subject: String) -> Check {
        match (self.is_failed, self.remedy.as_str()) {
            (true, remedy) => Check::failed(self.place.name(), subject, self.found.clone(), remedy),
            (false, "") => Check::ok(self.place.name(), subject, self.found.clone()),
            (false, remedy) => {
                Check::warning(self.place.name(), subject, self.found.clone(), remedy)
            }
        }
    }
}

/// Text of Cloudflare's page when cloudflared reached nobody.
const NO_ORIGIN: &str = "Unable to reach the origin service";
/// Text of Caddy for a host that is not of its domain.
const NO_SANDBOX: &str = "this host is no sandbox";
/// Text of the agent for a closed port.
const NOT_EXPOSED: &str = "is not exposed";
/// Command that shows who reaches a port.
const WHO: &str = "sandboxctl get ID shows who reaches the port";
/// Command that makes the record and joins the tunnel.
const SETUP: &str = "pve-sandbox-agent tunnel setup --token-file FILE";
const STATUS: &str = "pve-sandbox-agent tunnel status --token-file FILE";
const DOCTOR: &str = "pve-sandbox-agent doctor";

/// Decides.
pub fn verdict(seen: &Seen) -> Verdict {
    let answer = match &seen.public {
        Err(failure) => return of_failure(failure, seen),
        Ok(answer) => answer,
    };
    if !answer.is_from_cloudflare {
        return failed(
            Place::Dns,
            format!("the name leads to a server that is not Cloudflare's ({})", answer.status),
            format!(
                "{STATUS}: the record must be a proxied CNAME; or a name server of this network says otherwise"
            ),
        );
    }
    of_edge(answer, seen)
        .or_else(|| of_connector(answer, seen))
        .unwrap_or_else(|| of_node(answer, seen))
}

fn of_failure(failure: &Failure, seen: &Seen) -> Verdict {
    match failure {
        Failure::NoName => failed(
            Place::Dns,
            "the name has no address".to_owned(),
            format!("{SETUP}: it makes the record; a new one takes some minutes, and `resolvectl flush-caches` helps"),
        ),
        Failure::NoConnection(why) => failed(
            Place::Edge,
            format!("no connection to Cloudflare's edge: {why}"),
            "this node must reach port 443 of the internet: curl -I https://www.cloudflare.com".to_owned(),
        ),
        Failure::NoTls(why) => failed(
            Place::Edge,
            format!("the edge shows no certificate for this name: {why}"),
            "a new zone gets its certificate within a day; names two labels below the zone need an advanced \
             certificate: docs/tunnel.md"
                .to_owned(),
        ),
        Failure::Slow if seen.local.as_ref().is_ok_and(|local| local.status < 500) => failed(
            Place::Cloudflared,
            "no answer in time by the public name, and one from this node's Caddy".to_owned(),
            format!("{STATUS}; journalctl -u {UNIT} -n 20"),
        ),
        Failure::Slow => failed(
            Place::Sandbox,
            "no answer in time, neither by the public name nor from this node's Caddy".to_owned(),
            "look whether the server in the sandbox answers at all: sandboxctl exec ID -- curl -m 5 localhost:PORT"
                .to_owned(),
        ),
        Failure::Broken(why) => failed(
            Place::Edge,
            format!("the exchange broke off: {why}"),
            format!("try again; then {STATUS}"),
        ),
    }
}

/// Judges an answer that Cloudflare's edge gives by itself.
fn of_edge(answer: &Answer, seen: &Seen) -> Option<Verdict> {
    let code = edge_code(&answer.body);
    Some(match (answer.status, code) {
        (530, Some(1033)) | (_, Some(1033)) => match seen.connections {
            Some(connections) if connections > 0 => failed(
                Place::Edge,
                "1033: the record leads to a tunnel without a connector, and this node is connected to another"
                    .to_owned(),
                format!("{STATUS} shows where the record leads; {SETUP} corrects it"),
            ),
            Some(_) | None => failed(
                Place::Edge,
                "1033: no connector of the tunnel is connected".to_owned(),
                format!("systemctl restart {UNIT}; then {DOCTOR}"),
            ),
        },
        (530, Some(1016)) | (_, Some(1016)) => failed(
            Place::Dns,
            "1016: the record leads to a name that does not exist, such as a deleted tunnel".to_owned(),
            SETUP.to_owned(),
        ),
        (403, Some(code @ (1010 | 1020 | 1015))) | (429, Some(code @ 1015)) => failed(
            Place::Edge,
            format!("{code}: a security rule of the zone refused the request"),
            "Cloudflare's dashboard, Security > Events, shows which rule".to_owned(),
        ),
        (530, code) => failed(
            Place::Edge,
            format!("530{}: the edge does not reach the tunnel", code.map(|code| format!(", {code}")).unwrap_or_default()),
            format!("{STATUS}; systemctl restart {UNIT}"),
        ),
        (524, _) => failed(
            Place::Sandbox,
            "524: the service did not answer within the 100 s that Cloudflare waits".to_owned(),
            "let it answer sooner, or stream; long work belongs into sandboxctl exec".to_owned(),
        ),
        (520..=526, _) => failed(
            Place::Edge,
            format!("{}: the edge did not understand the tunnel's answer", answer.status),
            format!("journalctl -u {UNIT} -n 20"),
        ),
        _ => return None,
    })
}

/// Judges an answer that cloudflared gives by itself.
fn of_connector(answer: &Answer, seen: &Seen) -> Option<Verdict> {
    if matches!(answer.status, 502 | 504) && answer.body.contains(NO_ORIGIN) {
        return Some(match &seen.local {
            Ok(_) => failed(
                Place::Cloudflared,
                "502: a connector does not reach its node's Caddy; that of this node answers"
                    .to_owned(),
                format!("run `{DOCTOR}` on the other nodes of the tunnel"),
            ),
            Err(_) => failed(
                Place::Cloudflared,
                "502: cloudflared does not reach Caddy, which does not answer here".to_owned(),
                format!("systemctl restart pve-sandbox-ingress; then {DOCTOR}"),
            ),
        });
    }
    // Its last rule answers with nothing at all.
    (answer.status == 404 && answer.body.trim().is_empty() && !answer.is_of_node).then(|| {
        failed(
            Place::Cloudflared,
            "404: no rule of cloudflared is for this host: it runs with the configuration of another domain".to_owned(),
            format!("systemctl restart {UNIT}; then {DOCTOR}"),
        )
    })
}

/// Judges an answer that came from a node: of Caddy, of the agent, or of the sandbox.
fn of_node(answer: &Answer, seen: &Seen) -> Verdict {
    let visibility = seen.visibility;
    let status = answer.status;
    if !answer.is_of_node {
        // Nobody stands between this node and its own Caddy: whatever the sandbox answers there, it was let through.
        let is_open = seen.local.as_ref().is_ok_and(|local| !local.is_of_node);
        return of_sandbox(status, visibility, is_open);
    }
    let said: String = answer.body.trim().chars().take(200).collect();
    let in_words = format!("{status}: {said}");
    match (status, visibility) {
        (404, _) if said.contains(NO_SANDBOX) => failed(
            Place::Caddy,
            in_words,
            "Caddy has another domain: systemctl restart pve-sandbox-agent; systemctl restart pve-sandbox-ingress"
                .to_owned(),
        ),
        // The way in works up to the rule that the port has.
        (401, Visibility::Team | Visibility::Token) => passed(
            Place::Caddy,
            format!("reachable: it asks for access, as a `{}` port should ({status})", visibility.word()),
            "",
        ),
        (403, _) if said.contains(NOT_EXPOSED) => {
            failed(Place::Caddy, in_words, "sandboxctl expose ID PORT --name NAME".to_owned())
        }
        (403, Visibility::Private) => passed(
            Place::Caddy,
            format!("reachable: it lets nobody in, as a `private` port should ({status})"),
            "",
        ),
        (401, Visibility::Public | Visibility::Private) => {
            failed(Place::Caddy, in_words, format!("{WHO}; then try again"))
        }
        (404 | 410 | 421, _) => failed(
            Place::Caddy,
            in_words,
            "the node that was asked does not know the sandbox: sandboxctl get ID; sandboxctl admin fsck".to_owned(),
        ),
        // Before the sandbox: nobody has asked it.
        (500..=599, _) if said.contains(NO_AGENT) || said.contains(NO_ROUTE) => failed(
            Place::Caddy,
            in_words,
            format!("systemctl restart pve-sandbox-agent, on the node that was asked; then {DOCTOR}"),
        ),
        (500..=599, _) if said.contains(NO_PEER) => failed(
            Place::Caddy,
            in_words,
            format!("run `{DOCTOR}` on the node of the sandbox: sandboxctl get ID names it"),
        ),
        (503, _) => failed(Place::Caddy, in_words, "sandboxctl get ID tells its state; then try again".to_owned()),
        (502 | 504, _) => failed(
            Place::Sandbox,
            in_words,
            "start the server in the sandbox, and let it listen on 0.0.0.0: sandboxctl exec ID -- ss -ltn".to_owned(),
        ),
        _ => failed(Place::Caddy, in_words, DOCTOR.to_owned()),
    }
}

/// Judges an answer that neither Caddy nor the agent gave; `is_open` when this node lets requests through, too.
fn of_sandbox(status: u16, visibility: Visibility, is_open: bool) -> Verdict {
    let word = visibility.word();
    match (status, visibility) {
        (500.., Visibility::Public) => passed(
            Place::Sandbox,
            format!("the sandbox answers with an error of its own ({status})"),
            "the way in works: look at the log of the service in the sandbox",
        ),
        (_, Visibility::Public) => {
            passed(Place::Sandbox, format!("the sandbox answers ({status})"), "")
        }
        (_, Visibility::Team | Visibility::Token | Visibility::Private)
            if is_open || (200..=299).contains(&status) =>
        {
            failed(
                Place::Sandbox,
                format!("an answer ({status}) without access, and this port is `{word}`"),
                WHO.to_owned(),
            )
        }
        (_, Visibility::Team | Visibility::Token | Visibility::Private) => passed(
            Place::Edge,
            format!("{status}, which is not how a `{word}` port asks for access"),
            "look for a rule before the tunnel, such as Cloudflare Access; sandboxctl get ID",
        ),
    }
}

/// Finds the number of an error of the edge, such as `error code: 1033`.
fn edge_code(body: &str) -> Option<u32> {
    let lower = body.to_ascii_lowercase();
    let start = ["error code: ", "error 1"].iter().find_map(|mark| {
        let at = lower.find(mark)?;
        Some(at + mark.len() - usize::from(mark.ends_with('1')))
    })?;
    let digits: String = lower[start..].chars().take_while(char::is_ascii_digit).take(5).collect();
    digits.parse().ok().filter(|code| (1000..2000).contains(code))
}

/// Builds the verdict on what works; a remedy makes it a warning.
fn passed(place: Place, found: String, remedy: &str) -> Verdict {
    Verdict { place, is_failed: false, found, remedy: remedy.to_owned() }
}

fn failed(place: Place, found: String, remedy: String) -> Verdict {
    Verdict { place, is_failed: true, found, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status, body: body.to_owned(), is_from_cloudflare: true, is_of_node: false }
    }

    fn of_node(status: u16, body: &str) -> Answer {
        Answer { is_of_node: true, ..answer(status, body) }
    }

    fn seen(public: Result<Answer, Failure>) -> Seen {
        let visibility = Visibility::Public;
        Seen { visibility, public, local: Ok(answer(200, "hello")), connections: Some(4) }
    }

    #[track_caller]
    fn ends(seen: &Seen, place: Place, remedy: &str) {
        let verdict = verdict(seen);
        assert_eq!((verdict.place, verdict.is_failed), (place, true), "{verdict:?}");
        assert!(verdict.remedy.contains(remedy), "{verdict:?}");
    }

    #[test]
    fn answer_of_the_sandbox_is_success_whatever_it_says() {
        for status in [200, 204, 301, 404, 418] {
            let verdict = verdict(&seen(Ok(answer(status, "mine"))));
            assert_eq!((verdict.place, verdict.is_failed), (Place::Sandbox, false), "{verdict:?}");
        }
        let own = verdict(&seen(Ok(answer(500, "oops"))));
        assert!(!own.is_failed && own.remedy.contains("log of the service"), "{own:?}");
    }

    #[test]
    fn guarded_port_is_to_ask_for_access() {
        let guarded = |answer, visibility| verdict(&Seen { visibility, ..seen(Ok(answer)) });
        for (status, visibility) in
            [(401, Visibility::Team), (401, Visibility::Token), (403, Visibility::Private)]
        {
            let asks = guarded(of_node(status, "this port of the sandbox is"), visibility);
            assert_eq!((asks.place, asks.is_failed), (Place::Caddy, false), "{asks:?}");
            let told =
                asks.found.starts_with("reachable") && asks.found.contains(visibility.word());
            assert!(told && asks.remedy.is_empty(), "{asks:?}");

            for status in [200, 302, 404, 500] {
                let open = guarded(answer(status, "mine"), visibility);
                assert!(open.is_failed && open.remedy.contains("sandboxctl get"), "{open:?}");
            }
            let local = Ok(of_node(status, "this port of the sandbox is"));
            let before = verdict(&Seen { visibility, local, ..seen(Ok(answer(302, ""))) });
            assert_eq!((before.place, before.is_failed), (Place::Edge, false), "{before:?}");
            assert!(before.remedy.contains("Cloudflare Access"), "{before:?}");
            let closed =
                guarded(of_node(403, "port 80 of this sandbox is not exposed"), visibility);
            assert!(closed.is_failed && closed.remedy.contains("expose ID PORT"), "{closed:?}");
        }
        let public = guarded(of_node(401, "this port asks for a token"), Visibility::Public);
        assert!(public.is_failed && public.remedy.contains("sandboxctl get"), "{public:?}");
    }

    #[test]
    fn dns_is_told_from_the_edge() {
        ends(&seen(Err(Failure::NoName)), Place::Dns, "tunnel setup");
        let elsewhere = Answer { is_from_cloudflare: false, ..answer(200, "parked") };
        ends(&seen(Ok(elsewhere)), Place::Dns, "proxied CNAME");
        ends(&seen(Ok(answer(530, "error code: 1016"))), Place::Dns, "tunnel setup");
        ends(&seen(Err(Failure::NoConnection("refused".into()))), Place::Edge, "port 443");
        ends(
            &seen(Err(Failure::NoTls("not valid for name".into()))),
            Place::Edge,
            "advanced certificate",
        );
        ends(&seen(Err(Failure::Broken("reset".into()))), Place::Edge, "try again");
    }

    #[test]
    fn record_of_another_tunnel_is_told_from_a_connector_that_is_down() {
        let page = "<title>Cloudflare Tunnel error | Error 1033</title>";
        for body in ["error code: 1033", page] {
            ends(&seen(Ok(answer(530, body))), Place::Edge, "where the record leads");
            for connections in [Some(0), None] {
                let down = Seen { connections, ..seen(Ok(answer(530, body))) };
                ends(&down, Place::Edge, "systemctl restart pve-sandbox-tunnel");
            }
        }
        ends(&seen(Ok(answer(530, ""))), Place::Edge, "tunnel status");
        ends(&seen(Ok(answer(403, "error code: 1010"))), Place::Edge, "Security > Events");
        ends(&seen(Ok(answer(524, "error code: 524"))), Place::Sandbox, "answer sooner");
        ends(&seen(Ok(answer(520, ""))), Place::Edge, "journalctl");
    }

    #[test]
    fn cloudflared_is_told_from_caddy() {
        let page = "Unable to reach the origin service. The service may be down";
        ends(&seen(Ok(answer(502, page))), Place::Cloudflared, "on the other nodes");
        let here = Seen {
            local: Err(Failure::NoConnection("refused".into())),
            ..seen(Ok(answer(502, page)))
        };
        ends(&here, Place::Cloudflared, "restart pve-sandbox-ingress");
        ends(&seen(Ok(answer(404, ""))), Place::Cloudflared, "restart pve-sandbox-tunnel");
        ends(&seen(Ok(of_node(404, "this host is no sandbox\n"))), Place::Caddy, "another domain");
        ends(&seen(Err(Failure::Slow)), Place::Cloudflared, "journalctl");
    }

    #[test]
    fn agents_refusals_are_told_from_a_sandbox_that_does_not_answer() {
        ends(
            &seen(Ok(of_node(403, "port 80 of this sandbox is not exposed"))),
            Place::Caddy,
            "sandboxctl expose ID PORT --name NAME",
        );
        ends(
            &seen(Ok(of_node(410, "this sandbox has been deleted"))),
            Place::Caddy,
            "sandboxctl get",
        );
        ends(&seen(Ok(of_node(503, "this sandbox is stopped"))), Place::Caddy, "tells its state");
        ends(&seen(Ok(of_node(502, "nothing listens on port 80"))), Place::Sandbox, "0.0.0.0");
        ends(&seen(Ok(of_node(418, "?"))), Place::Caddy, "doctor");
        ends(
            &seen(Ok(of_node(502, "the sandbox did not answer (502)"))),
            Place::Sandbox,
            "ss -ltn",
        );
        let both = Seen { local: Err(Failure::Slow), ..seen(Err(Failure::Slow)) };
        ends(&both, Place::Sandbox, "sandboxctl exec");
    }

    /// The sandbox was not asked: whoever looks into it finds nothing.
    #[test]
    fn silent_agents_and_nodes_are_told_from_a_silent_sandbox() {
        for status in [502, 503, 504] {
            for (said, remedy) in [
                (NO_AGENT, "restart pve-sandbox-agent"),
                (NO_ROUTE, "restart pve-sandbox-agent"),
                (NO_PEER, "on the node of the sandbox"),
            ] {
                let told = of_node(status, &format!("{said} ({status})\n"));
                ends(&seen(Ok(told.clone())), Place::Caddy, remedy);
                ends(&seen(Ok(told)), Place::Caddy, "doctor");
            }
        }
    }

    #[test]
    fn number_of_the_edge_is_read_and_no_other() {
        assert_eq!(edge_code("error code: 1033"), Some(1033));
        assert_eq!(edge_code("<h1>Error 1016</h1>"), Some(1016));
        for other in
            ["", "error", "error code: 12", "error code: 524", "Error 100000", "error code: x"]
        {
            assert_eq!(edge_code(other), None, "{other}");
        }
    }
}
