//! `doctor`: says what is wrong with the connection, the token and, for operators, the whole system; each
//! finding with its remedy.

use std::{collections::BTreeMap, time::Duration};

use daemon::doctor::{Check, Report};
use proto::{
    Reason,
    sandbox::v1::{
        FsckRequest, FsckResponse, GetVersionRequest, ListNodesRequest, ListSandboxesRequest,
        ListTokensRequest, Node, Token,
    },
    scope::Scopes,
    token::split,
};
use tokio::time::timeout;

use crate::{
    client::{self, Controller, answer},
    config_file, exit,
    failure::Failure,
    output::{Output, time},
    progress::Spinner,
    settings::{Connection, HOW, Settings},
};

const OWN: &str = env!("CARGO_PKG_VERSION");
/// Longest wait for `fsck`, which looks at every node.
const FSCK: Duration = Duration::from_secs(30);
/// Most pages of tokens that are read to find our own.
const PAGES_MAX: usize = 20;
/// Time before the end of a token, and of an agent's certificate, from which it is told, seconds.
const TOKEN_SOON_S: i64 = 7 * 24 * 3600;
const CERTIFICATE_SOON_S: i64 = 24 * 3600;

pub(super) async fn run(connection: &Connection, output: Output) -> Result<u8, Failure> {
    let spinner = Spinner::new(output.json, "looking");
    let report = Report::new(examine(connection).await);
    drop(spinner);
    match output.json {
        true => output.value(&report.json())?,
        false => output.line(report.text())?,
    }
    Ok(if report.has_failed() { exit::REFUSED } else { 0 })
}

/// Looks at one thing after the other, as far as it gets.
async fn examine(connection: &Connection) -> Vec<Check> {
    let settings = match Settings::find(connection) {
        Ok(settings) => settings,
        Err(failure) => return vec![failed("context", "", &failure, HOW)],
    };
    let mut checks = vec![context(connection, &settings)];
    let login = login(connection);
    let ca = settings.ca.as_ref().map(|path| path.display().to_string());
    let ca = ca.unwrap_or_else(|| "the system's CAs".to_owned());
    let controller = match Controller::new(&settings) {
        Ok(controller) => controller,
        Err(failure) => {
            checks.push(failed("tls", &ca, &failure, "--ca must name the controller's CA"));
            return checks;
        }
    };
    let address = &settings.address;
    let asked = answer(controller.operator.clone().get_version(GetVersionRequest {})).await;
    let version = match &asked {
        // An answer with a reason is the controller's.
        Err(failure) if failure.reason.is_none() => {
            let remedy = "pve-sandbox-controller doctor, on the controller's machine";
            checks.push(failed("connection", address, failure, remedy));
            return checks;
        }
        Err(failure) => {
            checks.push(Check::ok("connection", address, "it answers"));
            checks.push(failed("token", "", failure, &login));
            return checks;
        }
        Ok(answer) => answer.version.clone(),
    };
    checks.push(Check::ok("connection", address, format!("it answers; its CA is {ca}")));
    checks.push(versions(&version));
    checks.extend(token_and_nodes(&controller, &settings, &login, &version).await);
    checks.push(snapshots(&controller).await);
    checks
}

/// Checks a call that failed, by its own hint if it has one.
fn failed(name: &'static str, subject: &str, failure: &Failure, remedy: &str) -> Check {
    let remedy = failure.hint.clone().unwrap_or_else(|| remedy.to_owned());
    let reason = failure.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    Check::failed(name, subject, format!("{}{reason}", failure.message), remedy)
}

fn context(connection: &Connection, settings: &Settings) -> Check {
    let found = match (&connection.endpoint, context_name(connection)) {
        (Some(_), _) => "by a flag or the environment".to_owned(),
        (None, Some(name)) => format!("context {name}"),
        (None, None) => "by the configuration file".to_owned(),
    };
    Check::ok("context", &settings.address, found)
}

/// Returns the command that gives the context in use another token.
fn login(connection: &Connection) -> String {
    match context_name(connection) {
        Some(name) if connection.endpoint.is_none() => format!("sandboxctl login {name}"),
        Some(_) | None => "sandboxctl login".to_owned(),
    }
}

fn context_name(connection: &Connection) -> Option<String> {
    let file = || config_file::read(connection.config.as_deref()).unwrap_or_default().context;
    connection.context.clone().or_else(file)
}

fn versions(theirs: &str) -> Check {
    match theirs == OWN {
        true => Check::ok("version", "", format!("sandboxctl and controller are {OWN}")),
        false => Check::warning(
            "version",
            "",
            format!("sandboxctl is {OWN}, the controller is {theirs}"),
            "install the packages of one version: the later one",
        ),
    }
}

async fn token_and_nodes(
    controller: &Controller,
    settings: &Settings,
    login: &str,
    version: &str,
) -> Vec<Check> {
    let read = ListSandboxesRequest { page_size: 1, include_ended: true, ..Default::default() };
    let listed = answer(controller.sandboxes.clone().list_sandboxes(read)).await;
    if let Err(failure) = &listed {
        return vec![failed("token", "", failure, login)];
    }
    let nodes = answer(controller.operator.clone().list_nodes(ListNodesRequest {})).await;
    let nodes = match nodes {
        Ok(nodes) => nodes.nodes,
        Err(failure) if failure.known() == Some(Reason::ScopeMissing) => {
            let found = "good, without the scope admin: nodes and fsck are not looked at";
            return vec![Check::ok("token", "", found)];
        }
        Err(failure) => return vec![failed("nodes", "", &failure, "sandboxctl node ls")],
    };
    let own = match settings.credential.token() {
        Some(text) => own_token(controller, text).await,
        None => None,
    };
    let mut checks = vec![token(own.as_ref(), login, time::now_seconds())];
    checks.extend(self::nodes(&nodes, version, time::now_seconds()));
    checks.push(fsck(controller).await);
    checks
}

/// Finds our own token in the list of all; `None` when it is not among the first.
async fn own_token(controller: &Controller, text: &str) -> Option<Token> {
    let (id, _) = split(text)?;
    let mut request = ListTokensRequest { page_size: 500, ..Default::default() };
    for _ in 0..PAGES_MAX {
        let page = answer(controller.operator.clone().list_tokens(request.clone())).await.ok()?;
        if let Some(own) = page.tokens.into_iter().find(|token| token.id == id) {
            return Some(own);
        }
        if page.next_page_token.is_empty() {
            return None;
        }
        request.page_token = page.next_page_token;
    }
    None
}

/// Judges our own token; `login`: the command that takes a new one into use. Pure.
fn token(own: Option<&Token>, login: &str, now_s: i64) -> Check {
    let Some(own) = own else { return Check::ok("token", "", "good, with the scope admin") };
    let scopes = own.scopes().fold(Scopes::NONE, Scopes::with);
    let subject = format!("{} of team {}", own.name, own.team);
    let left = own.expires_at.map(|end| end.seconds - now_s);
    match left {
        Some(left) if left < TOKEN_SOON_S => Check::warning(
            "token",
            subject,
            format!("it expires in {}", time::seconds(left.max(0).unsigned_abs())),
            format!(
                "sandboxctl token create --team {} --scope {}; {login}",
                own.team,
                scopes.to_string().replace(' ', ","),
            ),
        ),
        Some(_) | None => Check::ok("token", subject, format!("good, with the scopes {scopes}")),
    }
}

/// Judges the nodes. Pure.
fn nodes(nodes: &[Node], version: &str, now_s: i64) -> Vec<Check> {
    if nodes.is_empty() {
        let found = "none: no sandbox can be created";
        return vec![Check::failed("nodes", "", found, "sandboxctl node token NODE")];
    }
    let mut checks: Vec<_> = nodes.iter().flat_map(|node| of_node(node, version, now_s)).collect();
    if checks.is_empty() {
        checks.push(Check::ok("nodes", "", format!("all {} are ready", nodes.len())));
    }
    checks
}

fn of_node(node: &Node, version: &str, now_s: i64) -> Vec<Check> {
    let name = &node.name;
    let look = format!("pve-sandbox-agent doctor, on {name}");
    let mut checks = Vec::new();
    if !node.ready {
        let found = format!("not ready: {}", node.reason);
        checks.push(Check::failed("nodes", name, found, look.clone()));
    } else if node.version != version {
        let found = format!("its agent is {}, the controller is {version}", node.version);
        let remedy = format!("install pve-sandbox-agent {version} on {name}");
        checks.push(Check::warning("nodes", name, found, remedy));
    }
    let left = node.certificate_expires_at.map(|end| end.seconds - now_s);
    match left {
        Some(..=0) => {
            let remedy = format!("sandboxctl node token {name}; then run the line on {name}");
            checks.push(Check::failed("nodes", name, "its certificate has ended", remedy));
        }
        Some(left) if left < CERTIFICATE_SOON_S => {
            let found = format!("its certificate ends in {}", time::seconds(left.unsigned_abs()));
            checks.push(Check::warning("nodes", name, found, look));
        }
        Some(_) | None => {}
    }
    checks
}

async fn fsck(controller: &Controller) -> Check {
    let asked = timeout(FSCK, controller.operator.clone().fsck(FsckRequest {})).await;
    match asked {
        Ok(Ok(report)) => findings(report.get_ref()),
        Ok(Err(status)) => failed("fsck", "", &Failure::from(status), "sandboxctl admin fsck"),
        Err(_) => {
            let found = format!("it did not end within {} s", FSCK.as_secs());
            Check::warning("fsck", "", found, "sandboxctl admin fsck")
        }
    }
}

/// Judges what `fsck` found. Pure.
fn findings(report: &FsckResponse) -> Check {
    let FsckResponse { findings, sandboxes, nodes } = report;
    if findings.is_empty() {
        let found = format!("nothing is wrong with {sandboxes} sandboxes on {nodes} nodes");
        return Check::ok("fsck", "", found);
    }
    let mut counts = BTreeMap::<_, usize>::new();
    for finding in findings {
        *counts.entry(finding.invariant().name()).or_default() += 1;
    }
    let counts: Vec<_> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let found = format!("findings: {}", counts.join(", "));
    Check::failed("fsck", "", found, "sandboxctl admin fsck; docs/cleanup.md")
}

async fn snapshots(controller: &Controller) -> Check {
    match client::snapshots(controller).await {
        Ok(snapshots) if snapshots.is_empty() => Check::failed(
            "snapshots",
            "",
            "none: no sandbox can be created",
            "pve-sandbox-agent template init, on a node",
        ),
        Ok(snapshots) => match snapshots.iter().find(|one| !one.differing_nodes.is_empty()) {
            Some(one) => Check::warning(
                "snapshots",
                one.id.clone(),
                format!("its default services differ on {}", one.differing_nodes.join(", ")),
                "the same services and expose_on_listen in agent.toml of all nodes",
            ),
            None => Check::ok("snapshots", "", format!("{} are offered", snapshots.len())),
        },
        Err(failure) => failed("snapshots", "", &failure, "sandboxctl snapshot ls"),
    }
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    fn node(name: &str, ready: bool, ends_s: i64) -> Node {
        Node {
            name: name.into(),
            ready,
            reason: if ready { String::new() } else { "UNREACHABLE".into() },
            version: OWN.into(),
            certificate_expires_at: Some(prost_types::Timestamp { seconds: ends_s, nanos: 0 }),
            ..Node::default()
        }
    }

    #[test]
    fn each_flaw_of_a_node_is_a_finding_that_ends_with_it() {
        let day = 24 * 3600;
        let judged = |one: Node| nodes(&[one], OWN, 1000).remove(0);
        let good = judged(node("n1", true, 1000 + 3 * day));
        assert_eq!((good.state, good.found.as_str()), (State::Ok, "all 1 are ready"));
        let down = judged(node("n1", false, 1000 + 3 * day));
        assert_eq!(down.state, State::Failed);
        assert_eq!(down.remedy.as_deref(), Some("pve-sandbox-agent doctor, on n1"));
        assert_eq!(judged(node("n1", true, 1000 + day / 2)).state, State::Warning);
        let ended = judged(node("n1", true, 999));
        assert!(ended.remedy.is_some_and(|remedy| remedy.starts_with("sandboxctl node token n1")));
        let old = Node { version: "0.0.9".into(), ..node("n1", true, 1000 + 3 * day) };
        assert_eq!(judged(old).state, State::Warning);
        assert_eq!(nodes(&[], OWN, 1000)[0].state, State::Failed);
    }

    #[test]
    fn token_that_ends_soon_is_told() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let own = |expires_at| Token {
            name: "ci".into(),
            team: "lab".into(),
            scopes: vec![1, 4],
            expires_at,
            ..Token::default()
        };
        let judged = |own| token(Some(&own), "sandboxctl login lab", 1000);
        assert_eq!(judged(own(None)).found, "good, with the scopes read admin");
        assert_eq!(judged(own(at(1000 + 8 * 24 * 3600))).state, State::Ok);
        let soon = judged(own(at(1000 + 3600)));
        assert_eq!((soon.state, soon.found.as_str()), (State::Warning, "it expires in 60m"));
        let remedy = "sandboxctl token create --team lab --scope read,admin; sandboxctl login lab";
        assert_eq!(
            soon.remedy.as_deref(),
            Some(remedy),
            "the new token has the rights of the old one"
        );
    }
}
