//! Files that a creation brings. The store keeps them until they are written in the sandbox, which
//! is before anybody sees it run.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use prost::Message;
use proto::{
    Progress, Reason,
    agent::v1::{files_request::Message as Ask, files_response::Message as Said},
    id::{Invalid, SandboxId},
    name::NodeName,
    sandbox::v1::{CreateSandboxRequest, Failure, Phase, Sandbox, WriteFilesRequest},
};
use tokio::time::{Instant, sleep, timeout};

use super::creation::{AttemptResult, Creation, POLL};
use crate::{
    node::{self, Node, StreamOwner},
    sandbox::{RETRY, Sandboxes, files::check_files},
};

/// Most creations whose files are being written at the same time: each holds up to 1.5 MiB. A team
/// gets a share of them, as in `TeamSlots`.
pub(in crate::sandbox) const WRITERS: usize = 16;
/// Longest wait for a node to write them.
const WRITE: Duration = Duration::from_secs(18);
/// Shortest time for all tries, for a sandbox that came up just before its creation's deadline.
const TRIES: Duration = Duration::from_secs(60);

/// Result of one try.
enum Tried {
    Written,
    /// Another try would get the same answer.
    Refused(Failure),
    /// Not written now; writing them again does no harm.
    NotNow(Failure),
    /// The node has not answered, so they may be written. As harmless.
    Silent(Failure),
}

/// Takes the files out of a request: they are kept apart, and the node gets them last.
pub(super) fn take(request: &mut CreateSandboxRequest) -> Result<Option<Vec<u8>>, Invalid> {
    let (files, user) =
        (std::mem::take(&mut request.files), std::mem::take(&mut request.files_user));
    if files.is_empty() {
        let why = "must be empty without `files`";
        return if user.is_empty() { Ok(None) } else { Err(Invalid::new("files_user", why)) };
    }
    proto::exec::check_user(&user).map_err(|invalid| invalid.named("files_user"))?;
    check_files(&files)?;
    Ok(Some(WriteFilesRequest { id: String::new(), files, user }.encode_to_vec()))
}

impl Sandboxes {
    /// Writes the files of a creation whose sandbox runs. When they cannot be written, the sandbox
    /// is deleted, and its creation has failed.
    pub(super) async fn write_files_of(
        &self,
        creation: &Creation,
        name: &NodeName,
        attempt: AttemptResult,
    ) -> AttemptResult {
        let AttemptResult::Running(sandbox) = attempt else { return attempt };
        if !creation.may_have_files {
            return AttemptResult::Running(sandbox);
        }
        if self.may_be_in_use(creation, &sandbox) {
            tracing::warn!(sandbox_id = sandbox.id, node = %name,
                "sandbox may be in use, so the files of its creation are not written");
            return AttemptResult::Running(sandbox);
        }
        let id = creation.order.id;
        let until = (creation.begun + self.options.deadline).max(Instant::now() + TRIES);
        let mut answered = Instant::now();
        loop {
            // As in `attempt`. Without a node, a pending cancel waits for it to come back.
            let Some(node) = self.nodes.get(name) else { return AttemptResult::Abandoned };
            self.nodes.cache.progressed(&id, Progress::Files);
            let tried = tokio::select! {
                biased;
                () = self.nodes.epoch.replaced() => return AttemptResult::Replaced,
                () = creation.cancel.cancelled() => return self.cancel_attempt(creation, name).await,
                tried = self.write_first_files(creation, &node, until) => tried,
            };
            if !matches!(tried, Tried::Silent(_)) {
                answered = Instant::now();
            }
            let failure = match tried {
                Tried::Written => return AttemptResult::Running(sandbox),
                Tried::Refused(failure) => failure,
                // As before it ran: nobody has seen it, so another node may make it.
                Tried::Silent(_)
                    if node.down().is_some()
                        && (answered.elapsed() > self.options.patience
                            || Instant::now() >= until) =>
                {
                    return AttemptResult::Abandoned;
                }
                Tried::NotNow(failure) | Tried::Silent(failure) if Instant::now() < until => {
                    let why = failure.message;
                    tracing::info!(sandbox_id = %id, node = %name, why, "files not written yet");
                    sleep(RETRY).await;
                    continue;
                }
                Tried::NotNow(failure) | Tried::Silent(failure) => failure,
            };
            let removed = self.cancel_attempt(creation, name).await;
            let goes_on = matches!(removed, AttemptResult::Replaced | AttemptResult::Abandoned);
            return if goes_on { removed } else { AttemptResult::Permanent(failure) };
        }
    }

    /// Returns true when the store may be an old copy, by which the creation seems to go on: its
    /// sandbox came up long ago, and is its user's now.
    fn may_be_in_use(&self, creation: &Creation, sandbox: &Sandbox) -> bool {
        let up_s = sandbox.started_at.as_ref().map(|up| u64::try_from(up.seconds).unwrap_or(0));
        let longest = self.options.deadline.as_secs();
        let old = up_s.is_some_and(|up| up + longest < self.clock.now_ms() / 1000);
        let changed = sandbox.phase() != Phase::Running || sandbox.boot > 1;
        creation.resumed && (self.nodes.epoch.behind() || old || changed)
    }

    async fn write_first_files(&self, creation: &Creation, node: &Node, until: Instant) -> Tried {
        if let Some(why) = node.down() {
            return Tried::Silent(failure(Reason::NodeUnreachable, &why));
        }
        // The store's bytes are in memory only while they are written.
        let _slot = loop {
            match self.writers.take(&creation.team) {
                Some(slot) => break slot,
                None if Instant::now() < until => sleep(POLL).await,
                None => {
                    let why = "the files of other creations came first";
                    return Tried::NotNow(failure(Reason::TooManyCalls, why));
                }
            }
        };
        let id = creation.order.id;
        let stored = match self.store.files(&id).await {
            Ok(Some(stored)) => stored,
            Ok(None) => return Tried::Written,
            Err(error) => {
                if let Err(lost) = &creation.spec {
                    return Tried::Refused(failure(lost.reason(), &lost.message));
                }
                return Tried::NotNow(failure(Reason::StoreFailed, &error.to_string()));
            }
        };
        let Ok(request) = WriteFilesRequest::decode(stored.as_slice()) else {
            return Tried::Refused(failure(Reason::StoreFailed, "the stored files are damaged"));
        };
        let owner = StreamOwner { team: creation.team.clone(), sandbox: id };
        match timeout(WRITE, ask(node, &owner, id, request)).await {
            Ok(Ok(())) => Tried::Written,
            Ok(Err(error)) => {
                self.nodes.fence_if_replaced(&error);
                by_error(&error)
            }
            Err(_) => Tried::Silent(failure(Reason::NodeUnreachable, "it did not answer in time")),
        }
    }
}

async fn ask(
    node: &Node,
    owner: &StreamOwner,
    id: SandboxId,
    request: WriteFilesRequest,
) -> Result<(), node::Error> {
    let write = Ask::Write(WriteFilesRequest { id: id.to_string(), ..request });
    let asked = stream::once(std::future::ready(write));
    let mut said = std::pin::pin!(node.client.files(owner, asked).await?);
    match said.next().await.transpose()? {
        Some(Said::Write(_)) => Ok(()),
        Some(_) | None => Err(node::Error::Nonsense("it answered another question".into())),
    }
}

/// Tells a refusal that passes from one that stays.
fn by_error(error: &node::Error) -> Tried {
    let node::Error::Refused { reason, message, retry_after, .. } = error else {
        return Tried::Silent(failure(Reason::NodeUnreachable, &error.to_string()));
    };
    let failure = failure(*reason, message);
    // It boots again, an idle rule paused it, or its shim ended.
    let passes = matches!(
        reason,
        Reason::SandboxNotRunning
            | Reason::SandboxPaused
            | Reason::SandboxBusy
            | Reason::ExecFailed
            | Reason::ExecLost
    );
    if passes || retry_after.is_some() { Tried::NotNow(failure) } else { Tried::Refused(failure) }
}

fn failure(reason: Reason, why: &str) -> Failure {
    let message = format!("its files could not be written: {why}");
    Failure { reason: reason.into(), message, rollback: "the sandbox was deleted again".into() }
}
