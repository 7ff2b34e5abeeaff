//! Exposes and hides ports.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use daemon::sync::Mutex;
use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
    name::{Port, ServiceName},
    sandbox::v1::{EventKind, ExposeHttpServiceRequest, HttpService, Sandbox},
    spec,
    visibility::Visibility,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Change;
use crate::{
    events,
    node::{self, Exposed, Origin, SandboxCalls},
    sandbox::{
        Caller, Error, RETRY, Result, Sandboxes,
        exposure::{Openness, can_guard, is_too_open, openness},
    },
};

const EXPOSE: Change = Change { asked: None, effects: &[EventKind::Exposed], is_bounded: true };
const HIDE: Change = Change { asked: None, effects: &[EventKind::Hidden], is_bounded: false };

/// Time for which a report is waited for that shows what has become of a lost answer.
const LOST_MAX: Duration = Duration::from_mins(5);

/// Watches of ports whose exposure got no answer. The next exposure of its port ends one: whoever asks again may want
/// it open to everybody.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct LostExposures(Mutex<BTreeMap<(SandboxId, Port), CancellationToken>>);

impl LostExposures {
    /// Begins a watch; the token is cancelled when it is to end.
    fn begin(&self, id: SandboxId, port: Port) -> CancellationToken {
        let over = CancellationToken::new();
        if let Some(former) = self.0.lock().insert((id, port), over.clone()) {
            former.cancel();
        }
        over
    }

    /// Ends the watch of a port, if there is one.
    fn end(&self, id: SandboxId, port: Port) {
        if let Some(over) = self.0.lock().remove(&(id, port)) {
            over.cancel();
        }
    }
}

impl Sandboxes {
    /// Exposes a port; returns the sandbox and the name of the service. May be repeated: the same name and port
    /// have the same outcome, also after an answer that was lost.
    ///
    /// # Errors
    /// When name, port or visibility are malformed, taken or not allowed, or the sandbox's node does not do it.
    pub async fn expose(
        self: &Arc<Self>,
        caller: &Caller,
        request: &ExposeHttpServiceRequest,
    ) -> Result<(Sandbox, ServiceName)> {
        let (name, port) = spec::service(&request.name, request.port)?;
        let wanted = Visibility::read(request.visibility, "visibility")?;
        let rules = &self.options.exposure;
        rules.check(port)?;
        let default = rules.default_of(port);
        let is_guarded = wanted.unwrap_or(default) != Visibility::Public;
        if is_guarded {
            self.check_guards(caller, &request.id)?;
        }
        let service = Exposed { name: name.clone(), port, wanted, default };
        let expose = move |calls: SandboxCalls, epoch: u64, id: SandboxId| async move {
            let sandbox = calls.expose(epoch, &id, &service).await?;
            if is_guarded && is_too_open(&sandbox, port, wanted) {
                return Err(close_again(&calls, epoch, &id, &service).await);
            }
            Ok(sandbox)
        };
        // A task of its own: what follows a lost answer is also for a caller who hung up before.
        let (this, caller, id) = (Arc::clone(self), caller.clone(), request.id.clone());
        let exposed = self.to_its_end(caller.permit.clone(), async move {
            let before = this.find(&caller.team, &id)?;
            this.lost_exposures.end(before.id, port);
            let exposed = this.change(&caller, &id, EXPOSE, expose).await;
            let is_lost =
                exposed.as_ref().is_err_and(|error| error.reason == Reason::OutcomeUnknown);
            if is_lost && is_guarded && openness(&before.sandbox, port) == Openness::Closed {
                this.close_if_everybody_reaches(before.id, port, name.clone());
            }
            Ok((exposed?, name))
        });
        exposed.await
    }

    /// Closes a port that was closed before its exposure got no answer, if the next report shows it open to
    /// everybody. Its caller may never ask again.
    fn close_if_everybody_reaches(self: &Arc<Self>, id: SandboxId, port: Port, name: ServiceName) {
        let this = self.clone();
        let over = self.lost_exposures.begin(id, port);
        self.tasks.spawn(async move {
            let mut changes = this.nodes.cache.watch(id);
            let shown = async {
                loop {
                    changes.mark_unchanged();
                    let entry = this.nodes.cache.get(&SandboxRef::Id(id))?;
                    match openness(&entry.sandbox, port) {
                        Openness::Closed => changes.changed().await.ok()?,
                        Openness::Guarded => return None,
                        Openness::Everybody => {
                            return Some((this.nodes.get(entry.node.as_ref()?)?, entry.team));
                        }
                    }
                }
            };
            let shown = async { timeout(LOST_MAX, shown).await.ok().flatten() };
            let shown = over.run_until_cancelled(this.stop.run_until_cancelled(shown)).await;
            if over.is_cancelled() {
                return;
            }
            let Some(Some(Some((node, team)))) = shown else {
                return this.lost_exposures.end(id, port);
            };
            let calls = loop {
                match node.client.calls(Origin::Controller, &team) {
                    Ok(calls) => break Ok(calls),
                    // The team's places come free again: what has them ends by itself.
                    Err(full) => {
                        let again = this.stop.run_until_cancelled(sleep(RETRY));
                        let again = over.run_until_cancelled(again).await;
                        if over.is_cancelled() {
                            return;
                        }
                        if again.flatten().is_none() {
                            break Err(full);
                        }
                    }
                }
            };
            this.lost_exposures.end(id, port);
            // The event of the node says who has closed it.
            this.log().ask(id, HIDE.effects, events::CONTROLLER);
            let hidden = match calls {
                Ok(calls) => calls.hide(this.nodes.epoch.get(), &id, &name).await,
                Err(full) => Err(full),
            };
            match hidden {
                Ok((sandbox, _)) => {
                    this.nodes.apply(&node.name, sandbox);
                    tracing::warn!(sandbox = %id, %port, "a port that an older agent has opened to everybody is closed");
                }
                Err(error) => {
                    this.log().unask(&id, HIDE.effects);
                    tracing::error!(sandbox = %id, %port, %error, "a port that is open to everybody was not closed");
                }
            }
        });
    }

    /// Checks that the sandbox can be changed, and that its node knows of visibility.
    pub(super) fn check_guards(&self, caller: &Caller, id: &str) -> Result<()> {
        self.may_change()?;
        let (_, node) = self.on_node(&caller.team, id)?;
        can_guard(&node)
    }

    /// Closes a port, at once and under all names. Returns the sandbox and the closed services.
    ///
    /// # Errors
    /// When there is no such service, or the sandbox's node does not do it.
    pub async fn hide(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        name: &str,
    ) -> Result<(Sandbox, Vec<HttpService>)> {
        let name: ServiceName = name.parse()?;
        let service = name.clone();
        let hide = move |calls: SandboxCalls, epoch, id| async move {
            calls.hide(epoch, &id, &service).await
        };
        let hidden = self.change_with(caller, id, HIDE, hide).await;
        hidden.map_err(|error| match (error.reason, self.find(&caller.team, id)) {
            (Reason::ServiceNotFound, Ok(entry)) => {
                Error::new(error.reason, format!("{} has no service {name}", entry.id))
            }
            (_, _) => error,
        })
    }
}

/// Closes a port that its node has opened to everybody, though fewer were asked for: its agent was replaced by an
/// older one, and this was not noticed before. Returns the error of the call.
async fn close_again(
    calls: &SandboxCalls,
    epoch: u64,
    id: &SandboxId,
    service: &Exposed,
) -> node::Error {
    let Exposed { name, port, .. } = service;
    let now = match calls.hide(epoch, id, name).await {
        Ok(_) => format!("port {port} is closed again"),
        Err(error) => {
            tracing::error!(sandbox = %id, %port, %error, "a port that is open to everybody was not closed");
            format!("port {port} may be open to everybody; hide {name} ({error})")
        }
    };
    node::Error::Refused {
        reason: Reason::VisibilityUnsupported,
        message: format!(
            "the agent is too old: every open port there is public; {now}. Upgrade the agent, or expose the \
             port as public"
        ),
        retry_after: None,
        files_written: None,
    }
}
