//! Client that is logged in, which the channels of its connection share.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::{Reason, name::Team, sandbox::v1::Phase};
use russh::{Disconnect, server::Handle};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    Shared,
    capacity::CountGuard,
    channels::Channels,
    login::Login,
    record::{self, Action, Entry},
    transport::Gate,
};
use crate::{
    access::OpenCall,
    rpc::Permit,
    sandbox::{Error, Result},
};

/// Time in which a client may read why its connection ends.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(300);

/// Logged-in client, which its channels share.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) login: Login,
    /// Address of the client.
    pub(super) peer: SocketAddr,
    /// Cancelled when the connection closes.
    pub(super) closed: CancellationToken,
    pub(super) gate: Arc<Gate>,
    pub(super) channels: Channels,
    /// Place among the connections of the team.
    pub(super) _counted: CountGuard,
    /// Keeps the key under watch.
    pub(super) open: OpenCall,
}

impl Session {
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn team(&self) -> &Team {
        &self.login.caller.team
    }

    /// Returns the id of the sandbox.
    pub(super) fn sandbox(&self) -> String {
        self.login.sandbox.to_string()
    }

    /// Returns the names under which the sandbox knows itself.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = vec![self.sandbox()];
        if let Ok(view) = self.shared.sandboxes.get(self.team(), &self.sandbox()) {
            names.extend([view.ip, view.name].into_iter().filter(|name| !name.is_empty()));
        }
        names
    }

    /// Begins an entry of the audit log.
    pub(super) fn begin(&self, action: Action) -> Entry {
        record::begin(&self.shared, &self.login, self.peer, action)
    }

    /// Notes the refusal of an action that has no entry. Of many of one kind, all but the first of a minute
    /// are counted.
    pub(super) fn refuse(&self, action: Action, error: &Error) {
        record::refuse(&self.shared, &self.login, self.peer, action, error);
    }

    /// Does some work, unless the connection closes before it is done.
    pub(super) async fn until_closed<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.closed.run_until_cancelled(work).await
    }

    /// Waits for the end of the key, or of the controller.
    pub(super) async fn ended(&self) {
        tokio::select! {
            () = self.open.ending().over() => {}
            () = self.shared.stop.cancelled() => {}
        }
    }

    /// Ends the connection. A client that does not read why does not hold up its end.
    pub(super) async fn part(&self, handle: &Handle, reason: Disconnect, why: &str) {
        let told = async {
            drop(handle.disconnect(reason, why.to_owned(), String::new()).await);
            self.closed.cancelled().await;
        };
        timeout(LAST_WORDS, told).await.ok();
        self.gate.shut();
    }

    /// Takes a place among the team's streams, to enter the sandbox.
    pub(super) fn enter(&self) -> Result<Permit> {
        self.is_paused()?;
        let own = self.shared.sandboxes.streams_max(self.team());
        self.shared.permits.take_stream(self.team(), own).ok_or_else(|| {
            let message = "too many streams of the team are open; try again when some have ended";
            Error::new(Reason::TooManyCalls, message)
        })
    }

    /// Wakes the sandbox, if it is paused.
    pub(super) async fn wake(&self) -> Result<()> {
        if self.is_paused()? {
            self.shared.sandboxes.resume(&self.login.caller, &self.sandbox()).await?;
        }
        Ok(())
    }

    /// Returns true when the sandbox is paused, whatever its rule.
    pub(super) fn is_at_rest(&self) -> Result<bool> {
        let view = self.shared.sandboxes.get(self.team(), &self.sandbox())?;
        Ok(view.phase() == Phase::Paused)
    }

    /// Returns true when the sandbox is paused and its rule lets connections wake it.
    fn is_paused(&self) -> Result<bool> {
        let id = self.sandbox();
        let view = self.shared.sandboxes.get(self.team(), &id)?;
        if view.phase() != Phase::Paused {
            return Ok(false);
        }
        if !view.wake_on.unwrap_or_default().ssh {
            let message = format!(
                "{id} is paused, and an SSH connection does not wake it; \
                 `sandboxctl resume {id}` does, or `sandboxctl wake-on {id} --ssh on` lets connections do it"
            );
            return Err(Error::new(Reason::SandboxPaused, message));
        }
        Ok(true)
    }
}
