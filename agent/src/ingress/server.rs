//! Answers Caddy's route questions: HTTP/1.1 over a unix socket, one question per connection.
//!
//! A question is `GET /v1/route?via=edge|peer&rid=UUID` with the client's Host. An answer of 204
//! with four headers is a route; any other answer is passed to the client unchanged, so it contains
//! nothing internal. The proof shows Caddy that this agent answered: a sandbox that receives a
//! question cannot answer it.

use std::{io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use daemon::{
    keyed_count::{Counted, KeyedCount},
    seldom::Seldom,
};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderName, RETRY_AFTER,
    },
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{host::Label, id::SandboxRef, name::Team};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Owner, Routes, Target,
    caddy::Proof,
    decide::{self, Question, Rules, Unavailable, Verdict, Via},
    hold::Holds,
    intent::{self, Intent},
    interstitial,
    metrics::Metrics,
    probe::{Answer, Probe},
    render::PEER_CERTIFICATE,
    replies::{self, Reply, Route},
};
use crate::{clock::Clock, revoked::Revoked};

/// Header with the sandbox, for Caddy's access log.
const SANDBOX: HeaderName = HeaderName::from_static("x-sbx-sandbox");

/// Most concurrent questions; more wait in the socket's backlog.
const QUESTIONS_MAX: usize = 4096;
/// Most concurrent questions about one sandbox: they wait while it is woken, and questions about
/// others must not wait with them.
const ABOUT_ONE_MAX: usize = 512;
/// Most concurrent questions about the sandboxes of one team on this node: a question about a server that is
/// silent takes seconds, and a team may have many of them.
const ABOUT_TEAM_MAX: usize = 1024;
/// Most concurrent questions about sandboxes that are not of this node: anybody makes up names of them, and each waits
/// while the state of the cluster cannot be read.
const ELSEWHERE_MAX: usize = QUESTIONS_MAX / 2;
/// Longest time for a question to arrive.
const ARRIVAL: Duration = Duration::from_secs(5);
/// Longest time for an answer, whatever it waits for, beside the time that a request is held.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest time for the last answers when the agent stops: longer than a connect of the probe.
const DRAIN: Duration = Duration::from_secs(4);
/// Most headers of a question, which are the client's.
const HEADERS_MAX: usize = 512;
/// Refusal of a question beyond a bound.
const TOO_MANY: &str =
    "too many requests wait for this sandbox, others of its team, or sandboxes of other nodes";

/// Server that answers Caddy's route questions.
#[derive(Debug)]
pub struct Ingress {
    /// Sandboxes, and the nodes that own them.
    pub routes: Arc<dyn Routes>,
    /// Rules of this node for requests.
    pub rules: Rules,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Proof by which Caddy recognizes this agent.
    pub proof: Proof,
    /// Prober that tests whether something listens.
    pub probe: Probe,
    /// Nodes whose peers are refused.
    pub revoked: Arc<Revoked>,
    /// Counters of the answers.
    pub metrics: Arc<Metrics>,
    /// Requests that wait for their sandbox.
    pub holds: Holds,
}

/// Creates the socket, for the group that Caddy runs as. An existing socket is replaced in one
/// step, so that Caddy always reaches either the old agent or this one.
///
/// # Errors
/// When the directory is not writable, or the group does not exist.
pub fn listen(path: &Path, group: Option<&str>) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // The standard library requests the longest backlog that the kernel allows; tokio requests
    // 1024.
    let listener = std::os::unix::net::UnixListener::bind(&fresh)?;
    if let Some(name) = group {
        let group = nix::unistd::Group::from_name(name)?;
        let gid = group.ok_or_else(|| io::Error::other(format!("there is no group {name}")))?.gid;
        nix::unistd::chown(&fresh, None, Some(gid))?;
    }
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o660))?;
    std::fs::rename(&fresh, path)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Answers questions until `stop`, then completes the pending ones.
pub async fn serve(listener: UnixListener, ingress: Arc<Ingress>, stop: CancellationToken) {
    let questions = TaskTracker::new();
    let asked = Asked::default();
    let slots = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let refused = Seldom::new();
    while let Some(accepted) = stop.run_until_cancelled(accept(&listener, &slots)).await {
        match accepted {
            Ok((stream, slot)) => {
                let (ingress, asked) = (Arc::clone(&ingress), asked.clone());
                questions.spawn(async move {
                    answer_one(stream, ingress, asked).await;
                    drop(slot);
                });
            }
            Err(error) => {
                if let Some(left_out) = refused.admit() {
                    tracing::warn!(%error, left_out, "a route question could not be accepted");
                }
                // Most likely out of descriptors: wait until some are released.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    drop(listener);
    ingress.holds.stop();
    questions.close();
    if timeout(DRAIN, questions.wait()).await.is_err() {
        tracing::warn!(left = questions.len(), "route questions remained unanswered at shutdown");
    }
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

/// Counts of pending questions. Clones share them.
#[derive(Debug, Clone, Default)]
struct Asked {
    sandboxes: KeyedCount<String>,
    /// By team; `None` for sandboxes that are not of this node.
    teams: KeyedCount<Option<Team>>,
}

/// Subject of a question.
#[derive(Debug, Clone)]
struct Subject {
    sandbox: SandboxRef,
    /// Team of a sandbox of this node.
    team: Option<Team>,
}

/// Counts as pending until it is dropped, for its sandbox and its team.
type Pending = (Counted<String>, Counted<Option<Team>>);

/// Counts a question; `None` when too many are pending.
fn begin(asked: &Asked, about: Subject) -> Option<Pending> {
    let of_sandbox = asked.sandboxes.begin(about.sandbox.to_string(), ABOUT_ONE_MAX)?;
    let most = if about.team.is_some() { ABOUT_TEAM_MAX } else { ELSEWHERE_MAX };
    Some((of_sandbox, asked.teams.begin(about.team, most)?))
}

/// Returns the sandbox that a host name may lead to, if there is one.
fn labelled(routes: &dyn Routes, label: &Label) -> Option<SandboxRef> {
    match label {
        Label::ById { sandbox, .. } => Some(*sandbox),
        Label::ByName { sandbox, .. } => routes.named(sandbox).map(SandboxRef::Id),
    }
}

/// Returns what a question is about: the sandbox by its id where it is known, so that questions by its id, its
/// vmid and its name count together.
fn subject(routes: &dyn Routes, named: SandboxRef) -> Subject {
    match routes.local(named) {
        Some(target) => Subject { sandbox: SandboxRef::Id(target.id), team: Some(target.team) },
        None => Subject { sandbox: named, team: None },
    }
}

async fn answer_one(stream: UnixStream, ingress: Arc<Ingress>, asked: Asked) {
    let longest = ARRIVAL + DEADLINE + ingress.holds.longest();
    let service = service_fn(move |request| {
        let (ingress, asked) = (Arc::clone(&ingress), asked.clone());
        async move { Ok::<_, std::convert::Infallible>(ingress.answer(&request, &asked).await) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_headers(HEADERS_MAX)
        .timer(TokioTimer::new())
        .header_read_timeout(ARRIVAL)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(longest, connection).await {
        Ok(Ok(())) => {}
        // A client that goes away cancels its question.
        Ok(Err(error)) => tracing::debug!(%error, "a route question was aborted"),
        Err(_) => tracing::debug!("a route question took too long"),
    }
}

impl Ingress {
    async fn answer(&self, request: &Request<Incoming>, asked: &Asked) -> Reply {
        let Some(via) = via(request) else {
            if request.uri().path() == "/v1/metrics" {
                return Response::new(Full::new(Bytes::from(self.metrics.text())));
            }
            return explain(StatusCode::NOT_FOUND, "there is only /v1/route here");
        };
        let begun = Instant::now();
        let reply = self.answer_question(request, via, asked).await;
        self.metrics.count(via, reply.status().as_u16(), begun.elapsed());
        reply
    }

    async fn answer_question(&self, request: &Request<Incoming>, via: Via, asked: &Asked) -> Reply {
        if via == Via::Peer && self.is_revoked(request.headers()) {
            return explain(StatusCode::FORBIDDEN, "the node that asks has been revoked");
        }
        let now_s = self.clock.now_ms() / 1000;
        let question = Question::new(via, request.headers(), &self.rules, now_s);
        let sandbox = question.label.as_ref().and_then(|label| labelled(&*self.routes, label));
        let about = sandbox.map(|sandbox| subject(&*self.routes, sandbox));
        let Some(_question) = about.map_or(Some(None), |about| begin(asked, about).map(Some))
        else {
            return later(TOO_MANY);
        };
        let longest = DEADLINE + self.holds.longest();
        let mut reply =
            match timeout(longest, self.route(&question, sandbox, request.headers())).await {
                Ok(reply) => reply,
                Err(_) => later("the node did not find out where this sandbox is in time"),
            };
        if let Some(page) = question.parent() {
            replies::readable_by(&mut reply, page);
        }
        tracing::debug!(
            status = reply.status().as_u16(),
            host = ?request.headers().get(HOST),
            question = request.uri().query(),
            "route question answered"
        );
        reply
    }

    /// Returns true when a peer's question came with a revoked certificate. Without one: the Caddy that runs
    /// has the configuration of an earlier version, and is about to be replaced.
    fn is_revoked(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(PEER_CERTIFICATE);
        shown.is_some_and(|certificate| self.revoked.refuses(certificate.as_bytes()))
    }

    /// Asks which node has the sandbox, where it is not this one.
    async fn owner(&self, sandbox: Option<SandboxRef>, local: Option<&Target>) -> Owner {
        match sandbox {
            Some(sandbox) if decide::needs_owner(local) => self.routes.owner(sandbox).await,
            Some(_) | None => Owner::Nobody,
        }
    }

    async fn route(
        &self,
        question: &Question<'_>,
        sandbox: Option<SandboxRef>,
        asked: &HeaderMap,
    ) -> Reply {
        let look = || sandbox.and_then(|sandbox| self.routes.local(sandbox));
        let (mut local, intent) = (look(), intent_of(asked));
        // Once: a sandbox that is paused again by then was paused on purpose.
        if let Some(target) = &local
            && decide::decide(question, Some(target), &Owner::Nobody).waits()
        {
            if let Err(refusal) = self.holds.wait(&self.routes, target, intent).await {
                return interstitial::reply(refusal, intent, asked);
            }
            local = look();
        }
        let owner = self.owner(sandbox, local.as_ref()).await;
        let mut verdict = decide::decide(question, local.as_ref(), &owner);
        let mut answer = Answer::Open;
        if let Verdict::Local { upstream: probed, .. } = verdict {
            answer = self.probe.ask(probed).await;
            // Again: a connect may take seconds, in which the port may have been hidden, this credential revoked, or
            // the sandbox moved to another node.
            local = look();
            let owner = self.owner(sandbox, local.as_ref()).await;
            verdict = decide::decide(question, local.as_ref(), &owner);
            if matches!(verdict, Verdict::Local { upstream, .. } if upstream != probed) {
                return later("this sandbox has just got another address");
            }
        }
        match verdict {
            Verdict::Local { upstream, host, grant } => match answer {
                Answer::Open => {
                    // Who is unknown does not keep a sandbox awake, either.
                    let is_use = grant.wakes && intent.is_use();
                    if let Some(target) = local.as_ref().filter(|_| is_use) {
                        self.routes.used(&target.id);
                    }
                    let mut reply = self.go(&Route { upstream, host: &host, grant: Some(&grant) });
                    if grant.identity.is_some() {
                        replies::tell_pages(&mut reply, question);
                    }
                    if let Some(Target { id, vmid, .. }) = &local {
                        let port = upstream.port();
                        let entry = replies::plain(format_args!("{id} vmid={vmid} port={port}"));
                        reply.headers_mut().insert(SANDBOX, entry);
                    }
                    reply
                }
                Answer::Refused => self.nothing_listens(local.as_ref(), upstream.port()).await,
                Answer::Silent => explain(
                    StatusCode::BAD_GATEWAY,
                    &format!("the sandbox does not answer on port {}", upstream.port()),
                ),
                Answer::Busy => later(TOO_MANY),
            },
            Verdict::Wake => later("this sandbox is paused, and did not wake in time"),
            Verdict::Preflight { allowed, for_s } => {
                replies::preflight(&self.proof, &allowed, for_s)
            }
            Verdict::Redirect(redirect) => replies::redirect(&redirect),
            Verdict::Malformed(why) => explain(StatusCode::BAD_REQUEST, why),
            Verdict::Ambiguous => explain(
                StatusCode::BAD_REQUEST,
                "the query has more than one sbx_link or sbx_token, or one that cannot be read",
            ),
            Verdict::Unauthorized(why) => {
                replies::refuse(StatusCode::UNAUTHORIZED, why, question.wants_html())
            }
            Verdict::Forbidden(why) => {
                replies::refuse(StatusCode::FORBIDDEN, why, question.wants_html())
            }
            // The owner's Caddy gets the original Host; the header must only be present.
            Verdict::Peer { upstream } => self.go(&Route { upstream, host: "-", grant: None }),
            Verdict::NotFound(why) => explain(StatusCode::NOT_FOUND, why),
            Verdict::NotExposed(port) => explain(
                StatusCode::FORBIDDEN,
                &format!("port {port} of this sandbox is not exposed"),
            ),
            Verdict::Gone => explain(StatusCode::GONE, "this sandbox has been deleted"),
            Verdict::Unavailable(Unavailable::Booting) => later("this sandbox is booting"),
            Verdict::Unavailable(Unavailable::Paused) => {
                later("this sandbox is paused, and a request does not wake it")
            }
            Verdict::Unavailable(Unavailable::Stopped) => later("this sandbox is stopped"),
            Verdict::Unavailable(Unavailable::NodeDown(node)) => {
                // Who asks is unknown yet, and the names of nodes are for operators.
                tracing::debug!(%node, "a request was for a sandbox whose node is down");
                later("the node of this sandbox is down")
            }
            Verdict::Unavailable(Unavailable::Blind) => {
                later("this node cannot read the state of its cluster now")
            }
            Verdict::Misdirected => explain(
                StatusCode::MISDIRECTED_REQUEST,
                "this sandbox is on another node; try again",
            ),
        }
    }

    /// Says why a connection was refused: a server that listens on 127.0.0.1 alone is no absent one.
    async fn nothing_listens(&self, target: Option<&Target>, port: u16) -> Reply {
        let local = match target {
            Some(Target { vmid, .. }) => {
                let look = self.routes.on_loopback(*vmid, port);
                self.probe.on_loopback(*vmid, port, look).await
            }
            None => false,
        };
        let why = if local {
            format!(
                "something listens on 127.0.0.1:{port} in the sandbox, which only the sandbox itself \
                 reaches; let it listen on 0.0.0.0:{port}"
            )
        } else {
            format!("nothing listens on port {port} in the sandbox")
        };
        explain(StatusCode::BAD_GATEWAY, &why)
    }

    fn go(&self, to: &Route<'_>) -> Reply {
        replies::route(&self.proof, to)
    }
}

/// Returns the server that asks, if this is a route question.
fn via<B>(request: &Request<B>) -> Option<Via> {
    if request.method() != Method::GET || request.uri().path() != "/v1/route" {
        return None;
    }
    let (key, value) = request.uri().query()?.split('&').next()?.split_once('=')?;
    match (key, value) {
        ("via", "edge") => Some(Via::Edge),
        ("via", "peer") => Some(Via::Peer),
        _ => None,
    }
}

/// Returns what the client's request is, from what Caddy says of it.
fn intent_of(asked: &HeaderMap) -> Intent {
    let said = |name: &str| asked.get(name).and_then(|value| value.to_str().ok());
    let method = said("x-forwarded-method").unwrap_or("GET");
    intent::of(method, said("x-forwarded-uri").unwrap_or("/"), asked)
}

fn later(why: &str) -> Reply {
    let mut reply = explain(StatusCode::SERVICE_UNAVAILABLE, why);
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("2"));
    reply
}

/// Builds a refusal for people. Scripts in a browser can read it too, from any page.
fn explain(status: StatusCode, why: &str) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(format!("{why}\n"))));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    reply
}

#[cfg(test)]
mod tests {
    use daemon::sync::Mutex;
    use proto::{
        host::FullName,
        id::{SandboxId, Vmid},
        name::Port,
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::{
        clock::SystemClock,
        ingress::{OpenPort, State, hold::Limits},
    };

    /// A node with one sandbox, which may have been another one until the first look.
    #[derive(Debug)]
    struct One {
        before: Mutex<Option<Target>>,
        now: Target,
    }

    #[async_trait::async_trait]
    impl Routes for One {
        fn local(&self, sandbox: SandboxRef) -> Option<Target> {
            let names = [SandboxRef::Id(self.now.id), SandboxRef::Vmid(self.now.vmid)];
            let look = || self.before.lock().take().unwrap_or_else(|| self.now.clone());
            names.contains(&sandbox).then(look)
        }

        fn named(&self, name: &FullName) -> Option<SandboxId> {
            (self.now.name.as_ref() == Some(name)).then_some(self.now.id)
        }

        async fn owner(&self, _: SandboxRef) -> Owner {
            Owner::Nobody
        }

        fn used(&self, _: &SandboxId) {}

        async fn on_loopback(&self, _: Vmid, _: u16) -> bool {
            false
        }

        async fn wake(&self, _: SandboxRef) {}
    }

    /// A sandbox with this port open to everybody.
    fn target(port: Port, state: State, ip: Option<std::net::IpAddr>) -> Target {
        Target {
            id: SandboxId::new(1, &[1; 10]),
            vmid: Vmid::try_from(100_001).expect("a vmid"),
            team: "red".parse().expect("a team"),
            state,
            ip,
            ports: [(port, OpenPort::PUBLIC)].into(),
            main: None,
            key: None,
            name: None,
        }
    }

    fn ingress(dir: &Path, routes: One) -> Ingress {
        let domain = "sbx.test".parse().expect("a domain");
        Ingress {
            routes: Arc::new(routes),
            rules: Rules { domain, parents: Vec::new(), cors: true },
            clock: Arc::new(SystemClock::default()),
            proof: Proof::ensure(&dir.join("caddy.json")).expect("a proof"),
            probe: Probe::default(),
            revoked: Arc::new(Revoked::load(dir.join("revoked")).expect("a list")),
            metrics: Arc::default(),
            holds: Holds::new(Limits::default()),
        }
    }

    /// Caddy gives up a question that breaks off after so long, and the request with it.
    #[tokio::test(start_paused = true)]
    async fn request_that_is_held_for_long_is_answered_when_the_agent_stops() {
        let port = Port::try_from(80).expect("a port");
        let now = target(port, State::Booting, None);
        let dir = tempfile::tempdir().expect("a directory");
        let ingress = ingress(dir.path(), One { before: Mutex::default(), now });
        let (path, stop) = (dir.path().join("route.sock"), CancellationToken::new());
        let listener = listen(&path, None).expect("a socket");
        let serving = tokio::spawn(serve(listener, Arc::new(ingress), stop.clone()));

        let mut caddy = UnixStream::connect(&path).await.expect("connected");
        let question =
            "GET /v1/route?via=edge&rid=1 HTTP/1.1\r\nHost: 80-vm-100001.sbx.test\r\n\r\n";
        caddy.write_all(question.as_bytes()).await.expect("sent");
        tokio::time::sleep(Duration::from_secs(12)).await;
        stop.cancel();
        let mut answer = String::new();
        let read = timeout(DRAIN, caddy.read_to_string(&mut answer)).await;
        read.expect("before the agent ends").expect("read");
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.contains("\r\nretry-after: 2\r\n"), "{answer}");
        serving.await.expect("ended");
    }

    /// A server with a full queue lets the connect of a question wait for seconds.
    #[tokio::test]
    async fn port_that_is_hidden_while_its_server_is_tried_gets_no_request() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = server.local_addr().expect("an address");
        let port = Port::try_from(u32::from(address.port())).expect("a port");
        let open = target(port, State::Running, Some(address.ip()));
        let (vmid, hidden) = (open.vmid, Target { ports: Default::default(), ..open.clone() });
        let dir = tempfile::tempdir().expect("a directory");
        let host = format!("{port}-vm-{vmid}.sbx.test");
        let asked = HeaderMap::from_iter([(HOST, HeaderValue::try_from(host).expect("a value"))]);
        for (now, status) in [(open.clone(), 204), (hidden, 403)] {
            let ingress = ingress(dir.path(), One { before: Mutex::new(Some(open.clone())), now });
            let question = Question::new(Via::Edge, &asked, &ingress.rules, 0);
            let reply = ingress.route(&question, Some(SandboxRef::Vmid(vmid)), &asked).await;
            assert_eq!(reply.status(), status);
            assert_eq!(reply.headers().contains_key("x-sbx-proof"), status == 204);
        }
    }

    #[test]
    fn questions_about_one_sandbox_count_together_under_all_its_names() {
        let port = Port::try_from(80).expect("a port");
        let name = "box--red".parse().ok();
        let now = Target { name, ..target(port, State::Running, None) };
        let one = One { before: Mutex::default(), now };
        let (asked, id) = (Asked::default(), SandboxRef::Id(one.now.id));
        let ask = |host: &str| {
            let label = Label::parse(host).expect("a label");
            begin(&asked, subject(&one, labelled(&one, &label).expect("a sandbox")))
        };
        let by_id = format!("80-{id}");
        let all = [by_id.as_str(), "port-80-vm-100001", "80-box--red", "box--red"];
        let mut held = Vec::new();
        for host in all.into_iter().cycle().take(ABOUT_ONE_MAX) {
            held.push(ask(host).expect("there is room"));
        }
        for host in all {
            assert!(ask(host).is_none(), "{host}");
        }
        // One that is unknown here counts by the name that it was asked by.
        assert!(ask("port-80-vm-100002").is_some());
    }

    fn about(sandbox: &str, team: Option<&str>) -> Subject {
        let team = team.map(|team| team.parse().expect("a team"));
        Subject { sandbox: sandbox.parse().expect("a name"), team }
    }

    #[test]
    fn questions_about_one_sandbox_leave_room_for_others() {
        let asked = Asked::default();
        for team in [None, Some("red")] {
            let one = about("100001", team);
            let held: Vec<_> = std::iter::from_fn(|| begin(&asked, one.clone())).collect();
            assert_eq!(held.len(), ABOUT_ONE_MAX);
            drop(begin(&asked, about("100002", team)).expect("another's"));
            drop(held);
            assert!(begin(&asked, one).is_some());
        }
    }

    #[test]
    fn questions_about_the_sandboxes_of_one_team_leave_room_for_other_teams() {
        let asked = Asked::default();
        let red = ["100001", "100002", "100003"].map(|sandbox| about(sandbox, Some("red")));
        let all = || red.iter().filter_map(|about| begin(&asked, about.clone()));
        let mut held = Vec::new();
        for _ in 0..ABOUT_ONE_MAX {
            held.extend(all());
        }
        assert_eq!(held.len(), ABOUT_TEAM_MAX);
        assert!(all().next().is_none(), "each is below the bound of one sandbox");
        drop(begin(&asked, about("100004", Some("blue"))).expect("another team's"));
        // A sandbox of another node has no team here, and neither has a name that somebody made up.
        let elsewhere = |number: usize| begin(&asked, about(&number.to_string(), None));
        let made_up: Vec<_> = (200_000..).map_while(elsewhere).collect();
        assert_eq!(made_up.len(), ELSEWHERE_MAX);
        drop(begin(&asked, about("100004", Some("blue"))).expect("one of this node"));
        drop(held.pop());
        assert!(all().next().is_some());
        drop(held);
        assert_eq!(all().count(), red.len());
    }
}
