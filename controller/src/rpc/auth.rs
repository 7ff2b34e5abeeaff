//! In front of every call: is there room, who is it, may they; who it is goes into the request's
//! extensions. And behind it: every error leaves in
//! our form, whoever made it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use daemon::status::Refusal;
use http::{
    HeaderValue, Request, Response, Version,
    header::{AUTHORIZATION, CONNECTION},
};
use http_body_util::BodyExt;
use proto::reason;
use tokio::sync::Semaphore;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{scope, status};
use crate::{
    sandbox::{self, Caller},
    store::Store,
    token,
};

/// Makes `Guard`s.
#[derive(Debug, Clone)]
pub(super) struct GuardLayer {
    store: Arc<dyn Store>,
    calls: Arc<Semaphore>,
}

impl GuardLayer {
    pub(super) fn new(store: Arc<dyn Store>, calls_max: usize) -> Self {
        Self { store, calls: Arc::new(Semaphore::new(calls_max)) }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { guard: self.clone(), inner }
    }
}

/// The service behind the guard.
#[derive(Debug, Clone)]
pub(super) struct Guard<S> {
    guard: GuardLayer,
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The clone that was polled ready is the one to call.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let guard = self.guard.clone();
        Box::pin(async move {
            let version = request.version();
            let Ok(permit) = guard.calls.clone().try_acquire_owned() else {
                let answer = refused(Code::ResourceExhausted, reason::TOO_MANY_CALLS, BUSY);
                return Ok(unread(answer, version));
            };
            // Not the request itself: a body must not be shared between threads.
            let path = request.uri().path().to_owned();
            let header = request.headers().get(AUTHORIZATION).cloned();
            match guard.admit(&path, header.as_ref()).await {
                Ok(Some(caller)) => drop(request.extensions_mut().insert(caller)),
                Ok(None) => {}
                Err(status) => return Ok(unread(status.into_http(), version)),
            }
            let response = inner.call(request).await?;
            Ok(finish(response, permit))
        })
    }
}

const BUSY: &str = "too many calls are under way; try again in a moment";

impl GuardLayer {
    async fn admit(
        &self,
        path: &str,
        header: Option<&HeaderValue>,
    ) -> Result<Option<Caller>, Status> {
        let needed = match scope::need(path) {
            Some(scope::Need::Open) => return Ok(None),
            Some(scope::Need::Scope(scope)) => scope,
            None => return Err(Status::unimplemented(format!("there is no method {path}"))),
        };
        let text = header
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, text)| text.trim());
        let (id, secret) = text.and_then(token::split).ok_or_else(invalid)?;
        let found = self.store.token(id).await.map_err(sandbox::Error::from)?;
        let token = found.filter(|found| token::verify(found, secret)).ok_or_else(invalid)?;
        if !token.scopes.split(' ').any(|scope| scope == needed) {
            let message = format!("this token has not the scope `{needed}`");
            return Err(Refusal::new(Code::PermissionDenied, reason::SCOPE_MISSING, message).into());
        }
        Ok(Some(Caller { team: token.team, token: token.id }))
    }
}

fn invalid() -> Status {
    let message = "send a valid token as `authorization: Bearer pvesb_...`; \
                   `pve-sandbox-controller token create` makes one";
    Refusal::new(Code::Unauthenticated, reason::TOKEN_INVALID, message).into()
}

fn refused(code: Code, reason: &'static str, message: &str) -> Response<Body> {
    let after = std::time::Duration::from_secs(1);
    Status::from(Refusal::new(code, reason, message).retry_after(after)).into_http()
}

/// An answer before the body was read. HTTP/1.1 ends such a connection; a client that is not told
/// would lose its next call on it.
fn unread(mut response: Response<Body>, version: Version) -> Response<Body> {
    if version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Holds the place of the call until its last byte, and gives errors that tonic made our form.
fn finish(response: Response<Body>, permit: tokio::sync::OwnedSemaphorePermit) -> Response<Body> {
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != Code::Ok
    {
        return match status::completed(&status) {
            Some(ours) => ours.into_http(),
            None => response,
        };
    }
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &permit;
            frame
        }))
    })
}
