//! Client of the controller: TLS with its CA, a bearer token on every call or a client certificate, a
//! deadline on every wait.

use std::time::Duration;

use proto::sandbox::v1::{
    GetSandboxRequest, ListSandboxesRequest, ListSnapshotsRequest, Phase, Sandbox, Snapshot,
    WatchSandboxRequest, enrolment_service_client::EnrolmentServiceClient,
    operator_service_client::OperatorServiceClient, sandbox_service_client::SandboxServiceClient,
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
};

use crate::{
    exit,
    failure::Failure,
    settings::{Credential, Settings},
    state::State,
    trace::{self, Traced},
};

/// Deadline of a call: the API answers within 20 s, the rest is for the network.
const CALL: Duration = Duration::from_secs(30);
/// Pause before a broken watch is reopened.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// Adds the token to every call, if there is one.
#[derive(Debug, Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

type Authorized = InterceptedService<Traced, Bearer>;
/// Client of the service for the sandboxes of our team.
pub type Sandboxes = SandboxServiceClient<Authorized>;

/// Client of the controller, which connects at the first call.
#[derive(Debug, Clone)]
pub struct Controller {
    /// Service for the sandboxes of our team.
    pub sandboxes: Sandboxes,
    /// Service for operators.
    pub operator: OperatorServiceClient<Authorized>,
    /// Service that admits nodes.
    pub enrolment: EnrolmentServiceClient<Authorized>,
    /// Address of the controller, `host:port`.
    pub address: String,
    /// Memory about the controller's sandboxes.
    pub state: State,
}

/// Builds the header with a token.
fn header(token: &str) -> Result<MetadataValue<Ascii>, Failure> {
    let mut header: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| {
        Failure::usage(
            "the token has characters that a token cannot have",
            "check SANDBOXCTL_TOKEN",
        )
    })?;
    header.set_sensitive(true);
    Ok(header)
}

impl Controller {
    /// Prepares the connection.
    ///
    /// # Errors
    /// When the CA or the name of the controller cannot be used.
    pub fn new(settings: &Settings) -> Result<Self, Failure> {
        let unusable = |error: &dyn std::error::Error| {
            let message = daemon::chain::Chain(error).to_string();
            let hint = match &settings.credential {
                Credential::Token(_) => {
                    "SANDBOXCTL_CA must name the PEM file of the controller's CA; without it, the system's CAs count"
                }
                Credential::Certificate(_) => {
                    "--client-cert must name the one PEM file with certificate and key that `sandboxctl token create --certificate` writes, and --ca that of the controller's CA"
                }
            };
            Failure::usage(message, hint)
        };
        let tls = match (&settings.credential, &settings.ca) {
            (Credential::Certificate(own), ca) => {
                daemon::tls::client_with_certificate(own, ca.as_deref())
            }
            (Credential::Token(_), Some(ca)) => daemon::tls::client_with_roots(ca),
            (Credential::Token(_), None) => daemon::tls::client_with_system_roots(),
        };
        let tls = tls.map_err(|error| unusable(&error))?;
        let channel = daemon::channel::tls(
            daemon::flow::Leg::Api,
            &settings.address,
            &settings.server_name,
            tls,
        )
        .map_err(|error| unusable(&error))?;
        let bearer = Bearer(settings.credential.token().map(header).transpose()?);
        if settings.debug {
            trace::say(&format!("the controller is {}", settings.address));
        }
        let channel = Traced::new(channel, settings.debug);
        Ok(Self {
            sandboxes: SandboxServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            operator: OperatorServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            enrolment: EnrolmentServiceClient::with_interceptor(channel, bearer),
            address: settings.address.clone(),
            state: State::of(&settings.address),
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
            Err(_) => Err(broken.unwrap_or_else(|| {
                Failure::deadline(&format!("the operation on {id} did not finish"), wait)
            })),
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
                exit: exit::NOT_NOW,
                ..Failure::local("the controller ended the watch of the sandbox too early")
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

/// Longest wait for a node's agent that restarts, and for a controller that has too much to do.
const AWAY: Duration = Duration::from_secs(15);
/// Pause between attempts meanwhile.
const AGAIN: Duration = Duration::from_millis(500);
/// Longest pause that the other side can ask for.
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// Makes an idempotent call, and repeats it while the sandbox's node cannot be reached, or the
/// controller has too much to do: an agent that is upgraded is back within seconds. The hint of a
/// final error says that the verb can be repeated.
///
/// # Errors
/// As `answer`.
pub async fn patient<T, C>(call: impl FnMut() -> C) -> Result<T, Failure>
where
    C: Future<Output = Result<Response<T>, Status>>,
{
    read(call).await.map_err(Failure::repeatable)
}

/// Makes a call that changes nothing, and repeats it like `patient`.
///
/// # Errors
/// As `answer`.
pub async fn read<T, C>(mut call: impl FnMut() -> C) -> Result<T, Failure>
where
    C: Future<Output = Result<Response<T>, Status>>,
{
    let since = Instant::now();
    loop {
        let failure = match answer(call()).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        let pause = failure.retry_after.unwrap_or(AGAIN).clamp(AGAIN, AGAIN_MAX);
        let may_pass = failure.is_of_a_restart() || failure.is_overload();
        if !may_pass || since.elapsed() + pause >= AWAY {
            return Err(failure);
        }
        tokio::time::sleep(pause).await;
    }
}

/// Reads one sandbox.
///
/// # Errors
/// When there is no such sandbox, or the call failed.
pub async fn fetch(controller: &Controller, id: String) -> Result<Sandbox, Failure> {
    let call = || {
        let (mut client, request) =
            (controller.sandboxes.clone(), GetSandboxRequest { id: id.clone() });
        async move { client.get_sandbox(request).await }
    };
    promised(read(call).await?.sandbox)
}

/// Reads all pages of the list of the team's sandboxes.
///
/// # Errors
/// When a call failed.
pub async fn list(controller: &Controller, include_ended: bool) -> Result<Vec<Sandbox>, Failure> {
    list_all(controller, ListSandboxesRequest { include_ended, ..Default::default() }).await
}

/// Reads all pages of a list.
///
/// # Errors
/// When a call failed.
pub async fn list_all(
    controller: &Controller,
    mut request: ListSandboxesRequest,
) -> Result<Vec<Sandbox>, Failure> {
    let mut sandboxes = Vec::new();
    loop {
        let call = || {
            let (mut client, request) = (controller.sandboxes.clone(), request.clone());
            async move { client.list_sandboxes(request).await }
        };
        let page = read(call).await?;
        sandboxes.extend(page.sandboxes);
        if page.next_page_token.is_empty() {
            return Ok(sandboxes);
        }
        request.page_token = page.next_page_token;
    }
}

/// Reads the snapshots.
///
/// # Errors
/// When the call failed.
pub async fn snapshots(controller: &Controller) -> Result<Vec<Snapshot>, Failure> {
    let call = || {
        let mut client = controller.sandboxes.clone();
        async move { client.list_snapshots(ListSnapshotsRequest {}).await }
    };
    Ok(read(call).await?.snapshots)
}

/// Unwraps a field that the API promises to set.
///
/// # Errors
/// When it is not set: the controller is not of a matching version.
pub fn promised<T>(field: Option<T>) -> Result<T, Failure> {
    field.ok_or_else(|| {
        Failure::local("the controller's answer lacks a field that it must have")
            .hint("`sandboxctl version` shows both versions; they may not be compatible")
    })
}
