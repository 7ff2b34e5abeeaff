//! Client of the controller: TLS with its CA, a bearer token on every call, a deadline on every
//! wait.

use std::time::Duration;

use proto::sandbox::v1::{
    GetSandboxRequest, Phase, Sandbox, WatchSandboxRequest,
    operator_service_client::OperatorServiceClient, sandbox_service_client::SandboxServiceClient,
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{failure::Failure, settings::Settings};

/// Deadline of a call: the API answers within 20 s, the rest is for the network.
const CALL: Duration = Duration::from_secs(30);
/// Pause before a broken watch is reopened.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// Adds the token to every call.
#[derive(Debug, Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

type Authorized = InterceptedService<Channel, Bearer>;

/// Client of the controller, which connects at the first call.
#[derive(Debug, Clone)]
pub struct Controller {
    /// Service for the sandboxes of our team.
    pub sandboxes: SandboxServiceClient<Authorized>,
    /// Service for operators.
    pub operator: OperatorServiceClient<Authorized>,
}

impl Controller {
    /// Prepares the connection.
    ///
    /// # Errors
    /// When the CA or the name of the controller cannot be used.
    pub fn new(settings: &Settings) -> Result<Self, Failure> {
        let unusable = |error: &dyn std::error::Error| {
            let message = daemon::chain::Chain(error).to_string();
            Failure::usage(message, "SANDBOXCTL_CA must name the PEM file of the controller's CA")
        };
        let tls = daemon::tls::client_with_roots(&settings.ca).map_err(|error| unusable(&error))?;
        let channel = daemon::channel::tls(
            daemon::flow::Leg::Api,
            &settings.address,
            &settings.server_name,
            tls,
        )
        .map_err(|error| unusable(&error))?;
        let mut token: MetadataValue<Ascii> =
            format!("Bearer {}", settings.token).parse().map_err(|_| {
                Failure::usage(
                    "the token has characters that no token has",
                    "check SANDBOXCTL_TOKEN",
                )
            })?;
        token.set_sensitive(true);
        let bearer = Bearer(token);
        Ok(Self {
            sandboxes: SandboxServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            operator: OperatorServiceClient::with_interceptor(channel, bearer),
        })
    }

    /// Passes the sandbox to `done` at every change, until that returns true or the sandbox has
    /// ended. Reopens a watch that breaks.
    ///
    /// # Errors
    /// When it ends without `done`, or the deadline passes.
    pub async fn follow(
        &self,
        id: &str,
        deadline: Option<Instant>,
        done: impl FnMut(&Sandbox) -> Result<bool, Failure>,
    ) -> Result<Sandbox, Failure> {
        let now = Instant::now();
        // About 30 years, for a wait without a deadline.
        let wait = match deadline {
            Some(deadline) => deadline.saturating_duration_since(now),
            None => Duration::from_secs(1_000_000_000),
        };
        self.follow_since(id, now, wait, done).await
    }

    /// Follows like `follow`, for a caller that has waited since an earlier time.
    ///
    /// # Errors
    /// As `follow`.
    pub async fn follow_since(
        &self,
        id: &str,
        since: Instant,
        wait: Duration,
        mut done: impl FnMut(&Sandbox) -> Result<bool, Failure>,
    ) -> Result<Sandbox, Failure> {
        let end = since + wait;
        let mut broken = None;
        let followed = timeout_at(end, async {
            loop {
                match self.follow_once(id, &mut done).await {
                    Err(failure) if failure.transient => {
                        broken = Some(failure);
                        tokio::time::sleep(WATCH_AGAIN).await;
                    }
                    ended => return ended,
                }
            }
        });
        match followed.await {
            Ok(ended) => ended,
            Err(_) => {
                Err(broken
                    .unwrap_or_else(|| Failure::deadline(&format!("{id} was not done"), wait)))
            }
        }
    }

    async fn follow_once(
        &self,
        id: &str,
        done: &mut impl FnMut(&Sandbox) -> Result<bool, Failure>,
    ) -> Result<Sandbox, Failure> {
        let mut client = self.sandboxes.clone();
        let watch = client.watch_sandbox(WatchSandboxRequest { id: id.to_owned() });
        let mut changes = answer(watch).await?;
        let mut last = None;
        while let Some(change) = changes.message().await? {
            let Some(sandbox) = change.sandbox else { continue };
            if done(&sandbox)? {
                return Ok(sandbox);
            }
            last = Some(sandbox);
        }
        match last {
            Some(gone) if matches!(gone.phase(), Phase::Deleted | Phase::Failed) => Ok(gone),
            _ => Err(Failure {
                transient: true,
                ..Failure::local("the controller ended the watch before the sandbox did")
            }),
        }
    }
}

/// Waits for an answer.
///
/// # Errors
/// With the API's error, or when no answer comes.
pub async fn answer<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match timeout(CALL, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Failure::deadline("the controller did not answer", CALL)),
    }
}

/// Longest wait for a node's agent that restarts.
const AGENT_AWAY: Duration = Duration::from_secs(15);
/// Pause between attempts meanwhile.
const AGENT_AGAIN: Duration = Duration::from_millis(500);

/// Makes an idempotent call, and repeats it while the sandbox's node cannot be reached: an agent
/// that is upgraded is back within seconds. The hint of a final error says that the verb can be
/// repeated.
///
/// # Errors
/// As `answer`.
pub async fn patient<T, C>(mut call: impl FnMut() -> C) -> Result<T, Failure>
where
    C: Future<Output = Result<Response<T>, Status>>,
{
    let since = Instant::now();
    loop {
        let failure = match answer(call()).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        let pause = failure.retry_after.unwrap_or(AGENT_AGAIN).max(AGENT_AGAIN);
        if !failure.is_of_a_restart() || since.elapsed() + pause >= AGENT_AWAY {
            return Err(failure.repeatable());
        }
        tokio::time::sleep(pause).await;
    }
}

/// Reads one sandbox.
///
/// # Errors
/// When there is no such sandbox, or the call failed.
pub async fn fetch(controller: &Controller, id: String) -> Result<Sandbox, Failure> {
    let request = GetSandboxRequest { id };
    promised(answer(controller.sandboxes.clone().get_sandbox(request)).await?.sandbox)
}

/// Unwraps a field that the API promises to set.
///
/// # Errors
/// When it is not set: the controller is not of a matching version.
pub fn promised<T>(field: Option<T>) -> Result<T, Failure> {
    field.ok_or_else(|| {
        Failure::local("the controller's answer lacks a field that it must have")
            .hint("`sandboxctl version` shows both versions; they may not fit together")
    })
}
