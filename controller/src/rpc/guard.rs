//! Guard in front of every call. Checks in this order: does the method exist, whose call is it, has
//! the team a free permit, has the token the scope. An unknown caller gets nothing that lasts, is answered
//! at a pace (`pace`), and a call lasts no longer than its token (`cut`).
//! Behind the calls it gives every error our form, whoever made it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use daemon::status::Refusal;
use http::{HeaderValue, Request, Response, Version, header::CONNECTION};
use http_body_util::{BodyExt, Full, Limited};
use proto::Reason;
use tokio::time::timeout;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{
    auth::{self, Credentials, Tokens},
    calls::{Made, Recorder, Ticket},
    connections::ConnectionHandle,
    cut::{self, Held},
    pace::{Crowded, Pace},
    permits::{Full as NoRoom, Permit, Permits},
    scope::{self, Method, Need, Shape},
    status,
};
use crate::{
    access::{Access, OpenCall},
    sandbox::{Caller, Sandboxes},
    store,
};

/// Longest call without a token, from its headers to its answer.
const OPEN_TIME: Duration = Duration::from_secs(5);
/// Largest message of a call without a token, bytes: it contains the name of a service.
const OPEN_BYTES: usize = 4096;
/// Longest unary call. Handlers answer within 20 s; the rest is for a message of the largest size
/// over a slow line.
const UNARY_TIME: Duration = Duration::from_secs(120);
/// Retry hint when all permits are taken.
const AGAIN: Duration = Duration::from_secs(1);

/// Makes `Guard`s.
#[derive(Debug, Clone)]
pub(super) struct GuardLayer(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    tokens: Tokens,
    permits: Permits,
    /// Sandboxes, which know the limits of the teams.
    sandboxes: Arc<Sandboxes>,
    recorder: Arc<Recorder>,
    pace: Pace,
}

impl GuardLayer {
    pub(super) fn new(
        access: Arc<Access>,
        permits: Permits,
        sandboxes: Arc<Sandboxes>,
        recorder: Recorder,
    ) -> Self {
        let (tokens, recorder) = (Tokens::new(access), Arc::new(recorder));
        let pace = Pace::default();
        Self(Arc::new(Rules { tokens, permits, sandboxes, recorder, pace }))
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { rules: Arc::clone(&self.0), inner }
    }
}

/// The guarded service.
#[derive(Debug, Clone)]
pub(super) struct Guard<S> {
    rules: Arc<Rules>,
    inner: S,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The clone that was polled ready is the one to call.
        let fresh = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, fresh);
        let rules = Arc::clone(&self.rules);
        let version = request.version();
        Box::pin(async move {
            let Some(connection) = request.extensions().get::<ConnectionHandle>().cloned() else {
                return Ok(unread(Status::internal("a call came over no connection"), version));
            };
            let path = request.uri().path();
            let Some(method) = scope::method(path) else {
                rules.wait_to_refuse(&connection).await;
                let message = format!("there is no method {path}");
                return Ok(unread(Status::unimplemented(message), version));
            };
            match method.need {
                Need::Open | Need::OneTime => {
                    open(&rules, method, &connection, request, inner).await
                }
                Need::Token | Need::Scope(_) => {
                    known(&rules, method, &connection, request, inner).await
                }
            }
        })
    }
}

/// Handles a call that needs no token: few per connection, short and with little to read. The whole
/// answer is made before any of it is sent, so that a caller who does not read it holds no permit.
async fn open<S>(
    rules: &Rules,
    method: Method,
    connection: &ConnectionHandle,
    mut request: Request<Body>,
    mut inner: S,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let version = request.version();
    // The call writes its entry itself, when it knows whether its one-time token is good.
    if let Some(call) = rules.recorder.begin(method, None, connection.peer()) {
        request.extensions_mut().insert(call);
    }
    let in_turn = rules.wait_to_handle(connection).await;
    let Some(_place) = in_turn.ok().and_then(|()| connection.open_call_permit()) else {
        rules.recorder.count_refused();
        rules.wait_to_refuse(connection).await;
        let message = "too many calls without a token on this connection; try again in a moment";
        return Ok(unread(no_room(message.to_owned()), version));
    };
    let answered = timeout(OPEN_TIME, async {
        let (parts, body) = request.into_parts();
        let Ok(message) = Limited::new(body, OPEN_BYTES).collect().await else {
            let message = format!("a call without a token may have {OPEN_BYTES} bytes at most");
            let refusal = Refusal::new(Reason::TooLarge, message);
            return Ok(unread(refusal.into(), version));
        };
        let body = Body::new(Full::new(message.to_bytes()));
        let response = inner.call(Request::from_parts(parts, body)).await?;
        let (parts, body) = response.into_parts();
        Ok(match body.collect().await {
            Ok(answer) => Response::from_parts(parts, Body::new(answer)),
            Err(status) => status.into_http(),
        })
    });
    answered.await.unwrap_or_else(|_| {
        let message = "the message of this call did not come in time";
        let refusal = Refusal::new(Reason::OutcomeUnknown, message);
        Ok(unread(refusal.into(), version))
    })
}

/// Handles a call with a token.
async fn known<S>(
    rules: &Rules,
    method: Method,
    connection: &ConnectionHandle,
    mut request: Request<Body>,
    mut inner: S,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let version = request.version();
    // Only the headers, not the request: its body must not be shared between threads.
    let credentials = Credentials::of(request.headers());
    let admitted = rules.admit(method, connection, &credentials).await;
    let Admitted { caller, permit, open } = match admitted {
        Ok(admitted) => admitted,
        Err(Denied { status, by }) => {
            match by {
                Known::Caller(caller) => {
                    rules.recorder.refuse(method, &caller, connection.peer(), &status);
                }
                Known::Team => rules.recorder.count_refused(),
                Known::Nothing => {
                    rules.recorder.count_refused();
                    // Where the store fails, it is not the caller who asks too often.
                    if status.code() != Code::Unavailable {
                        rules.wait_to_refuse(connection).await;
                    }
                }
            }
            return Ok(unread(*status, version));
        }
    };
    let call = rules.recorder.begin(method, Some(&caller), connection.peer());
    if let Some(call) = &call {
        request.extensions_mut().insert(call.clone());
    }
    request.extensions_mut().insert(caller);
    let ticket = Ticket::new(call);
    let mut held = Held { _permit: permit, _busy: connection.busy(), open, ticket };
    let ending = held.open.ending();
    if method.shape == Shape::Stream {
        request = request.map(|body| cut::request(body, ending.clone()));
    }
    let answer = inner.call(request);
    let answered = async {
        match method.shape {
            Shape::Stream => Some(answer.await),
            Shape::Unary => timeout(UNARY_TIME, answer).await.ok(),
        }
    };
    let status = tokio::select! {
        // An answer that is there counts: a token may revoke itself.
        biased;
        answered = answered => match answered {
            Some(response) => return Ok(finish(response?, method.shape, held)),
            None => late(),
        },
        () = ending.over() => auth::refusal(ending.why()),
    };
    held.ticket.end(&status);
    Ok(unread(status, version))
}

/// Call that is admitted.
struct Admitted {
    caller: Caller,
    permit: Arc<Permit>,
    open: OpenCall,
}

/// Refusal of a call.
struct Denied {
    status: Box<Status>,
    by: Known,
}

/// Knowledge of a caller that is refused.
enum Known {
    /// Its token is not valid.
    Nothing,
    /// Its token was valid at its last look-up, and its team has no room.
    Team,
    /// The token is good, and the scope is missing.
    Caller(Caller),
}

impl From<Status> for Denied {
    fn from(status: Status) -> Self {
        Self { status: Box::new(status), by: Known::Nothing }
    }
}

impl Rules {
    async fn admit(
        &self,
        method: Method,
        connection: &ConnectionHandle,
        credentials: &Credentials,
    ) -> Result<Admitted, Denied> {
        let shown = credentials.shown(connection.client())?;
        let early = match self.tokens.team(shown) {
            Some(team) => Some(self.permit(&team, method.shape)?),
            None => None,
        };
        let turn = match &early {
            Some(_) => None,
            None => {
                let place = connection.unknown_caller_permit().ok_or_else(|| {
                    let message = "too many calls with unknown tokens on this connection";
                    no_room(message.to_owned())
                })?;
                Some((place, self.tokens.turn().await))
            }
        };
        let token = self.tokens.verify(shown).await?;
        drop(turn);
        connection.belongs_to(&token.team);
        let open = self.tokens.begin_call(&token);
        let store::Token { team, id, user, scopes, .. } = token;
        let mut caller = Caller { team, token: id, user, scopes, permit: None };
        if let Need::Scope(needed) = method.need
            && !caller.scopes.allow(needed)
        {
            let message = format!(
                "this call needs the scope `{}`, and this token has: {}",
                needed.name(),
                caller.scopes
            );
            let status = Status::from(Refusal::new(Reason::ScopeMissing, message));
            return Err(Denied { status: Box::new(status), by: Known::Caller(caller) });
        }
        // The team of a token never changes.
        let permit = match early {
            Some(permit) => permit,
            None => self.permit(&caller.team, method.shape)?,
        };
        let permit = Arc::new(permit);
        caller.permit = Some(permit.clone());
        Ok(Admitted { caller, permit, open })
    }

    /// Waits until a caller without a valid token may be refused. Where too many wait, its connection is closed.
    async fn wait_to_refuse(&self, connection: &ConnectionHandle) {
        let Some(_place) = connection.waiting_permit() else {
            return connection.close_if_anonymous();
        };
        if self.pace.refusal().await == Err(Crowded) {
            connection.close_if_anonymous();
        }
    }

    /// Waits until a call that needs no token may be handled.
    async fn wait_to_handle(&self, connection: &ConnectionHandle) -> Result<(), Crowded> {
        let _place = connection.waiting_permit().ok_or(Crowded)?;
        self.pace.open_call(connection.open_calls()).await
    }

    fn permit(&self, team: &proto::name::Team, shape: Shape) -> Result<Permit, Denied> {
        let (kind, own) = match shape {
            Shape::Unary => ("calls", None),
            Shape::Stream => ("streams", self.sandboxes.streams_max(team)),
        };
        let told = |full| match full {
            NoRoom::Team(max) => {
                let message = format!(
                    "team {team} has {max} {kind} under way, and may not have more; \
                     try again when some have ended"
                );
                let refusal = Refusal::new(Reason::TooManyCalls, message).retry_after(AGAIN);
                let refusal = refusal.with("limit", kind).with("used", max.to_string());
                refusal.with("max", max.to_string()).into()
            }
            NoRoom::All => no_room(format!("too many {kind} are under way; try again in a moment")),
        };
        let taken = self.permits.take(team, shape, own);
        taken.map_err(|full| Denied { status: Box::new(told(full)), by: Known::Team })
    }
}

fn no_room(message: String) -> Status {
    Refusal::new(Reason::TooManyCalls, message).retry_after(AGAIN).into()
}

fn late() -> Status {
    let message = format!("no answer within {} s; it may be done, or not", UNARY_TIME.as_secs());
    Refusal::new(Reason::OutcomeUnknown, message).into()
}

/// Answers before the body was read. HTTP/1.1 ends such a connection; a client that is not told so
/// would lose its next call on it.
fn unread(status: Status, version: Version) -> Response<Body> {
    let mut response: Response<Body> = status.into_http();
    if version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Gives tonic's own errors our form, and sends the rest as long as the token is good.
fn finish(response: Response<Body>, shape: Shape, mut held: Held) -> Response<Body> {
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != Code::Ok
    {
        let ours = status::completed(&status);
        held.ticket.end(ours.as_ref().unwrap_or(&status));
        return match ours {
            Some(ours) => ours.into_http(),
            None => response,
        };
    }
    held.ticket.answered(response.extensions().get::<Made>());
    match shape {
        Shape::Stream => cut::answer(response, held),
        // It is made, and a message at most.
        Shape::Unary => response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let held = &mut held;
                if let Some(status) = frame.trailers_ref().and_then(Status::from_header_map) {
                    held.ticket.end(&status);
                }
                frame
            }))
        }),
    }
}
