//! The controllers: one after another, or an old one that lives on beside the new one; over the
//! same store, over an older copy of it, or over an empty one.

use std::{sync::Arc, time::Duration};

use controller::{Controller, store::AccessStore as _};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    chance::Chance,
    cluster::{Cluster, Host},
    net::Dialler,
};

/// Largest number of controllers that live on beside the last one.
const OLD_MAX: usize = 2;
/// Age after which a controller no longer raises its epoch above a node's: `node::epoch`.
const SETTLED_IN: Duration = Duration::from_secs(16);

/// A controller and its state in the simulation.
pub(crate) struct Life {
    pub(crate) number: u64,
    controller: Controller,
    dial: tokio::sync::mpsc::Sender<std::io::Result<tokio::io::DuplexStream>>,
    begun: Instant,
    /// Whether every node knows a later epoch: this controller must not change anything any more.
    pub(crate) replaced: bool,
}

impl Life {
    /// Opens a connection to the controller's API.
    pub(crate) fn channel(&self) -> tonic::transport::Channel {
        let dial = self.dial.clone();
        daemon::channel::over(daemon::flow::Leg::Api, move || {
            let dial = dial.clone();
            async move {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let refused = |_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
                dial.send(Ok(far)).await.map_err(refused)?;
                Ok(near)
            }
        })
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.controller.sandboxes().nodes().epoch.get()
    }

    fn is_fenced(&self) -> bool {
        self.controller.sandboxes().nodes().epoch.fenced()
    }
}

/// Knowledge of the next controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Knows {
    /// Everything that the one before knew.
    All,
    /// The content of the last backup.
    Backup,
    Nothing,
}

impl Cluster {
    /// Returns the controller that was started last.
    pub(crate) fn controller(&self) -> &Life {
        self.lives.last().expect("there is always one")
    }

    /// Chooses the controller to call: the last one, or sometimes an old one that is not aware of
    /// it.
    pub(crate) fn called(&self, chance: &Chance) -> &Life {
        if chance.percent(25) {
            return chance.pick(&self.lives).expect("there is always one");
        }
        self.controller()
    }

    /// Drops the controllers abruptly and starts another one over the same store.
    pub(crate) async fn restart_controller(&mut self) {
        self.lives.clear();
        self.start_controller(Knows::All).await;
    }

    /// Starts another controller. The one before is not told; it is gone or lives on.
    pub(crate) async fn import(&mut self, knows: Knows, lives_on: bool) {
        if !lives_on {
            self.lives.clear();
        }
        if let Some(before) = self.lives.last().filter(|_| knows != Knows::All) {
            sleep_until(before.begun + SETTLED_IN).await;
        }
        self.start_controller(knows).await;
        let over = self.lives.len().saturating_sub(OLD_MAX + 1);
        self.lives.drain(..over);
    }

    /// Keeps a copy of the store.
    pub(crate) fn back_up(&mut self) {
        self.backup = Some(self.store.copy());
    }

    pub(crate) async fn start_controller(&mut self, knows: Knows) {
        self.begun += 1;
        self.forgot |= knows != Knows::All;
        self.store = match (knows, &self.backup) {
            (Knows::All, _) => self.store.beside(),
            (Knows::Backup, Some(backup)) => backup.copy(),
            (Knows::Backup, None) | (Knows::Nothing, _) => self.store.like(),
        };
        for token in &self.tokens_kept {
            self.store.add_token(token.clone()).await.expect("stored");
        }
        let controller = Controller::start(controller::Parts {
            store: Arc::new(self.store.beside()),
            audit: controller::audit::Audit::off(),
            connector: Arc::new(Dialler { net: self.net.clone(), by: self.begun }),
            clock: Arc::new(self.clock.clone()),
            random: Arc::new(Chance::new(self.seed, 1000 + self.begun)),
            nodes: controller::node::Options {
                seeds: self.hosts.iter().map(|host| (host.name.clone(), String::new())).collect(),
                discover: false,
                agent_port: 7445,
                limits: controller::placement::Limits::default(),
            },
            // In every other story, nodes are asked for a reservation before the choice.
            creates: controller::sandbox::Options {
                candidate_probes: if self.seed.is_multiple_of(2) { 3 } else { 1 },
                ..controller::sandbox::Options::default()
            },
            events: controller::events::Options::default(),
            limits: controller::config::ApiLimits::default(),
            urls: controller::url::UrlTemplate::new("http://port-{port}-vm-{vmid}.test")
                .expect("a template")
                .into(),
        })
        .await
        .expect("a controller");
        let (dial, dialled) = tokio::sync::mpsc::channel(64);
        let stopped = controller.stopping().cancelled_owned();
        let api = controller.api();
        tokio::spawn(async move { api.serve(ReceiverStream::new(dialled), stopped).await });
        // A controller over an old copy is called only after it has heard of all sandboxes on the
        // nodes, including slow nodes: its promises hold from then on (docs/guarantees.md). Over an
        // empty store the controller itself waits for that.
        let patience = if knows == Knows::Backup { 300 } else { 8 };
        controller.settled(Duration::from_secs(patience)).await;
        let begun = Instant::now();
        self.lives.push(Life { number: self.begun, controller, dial, begun, replaced: false });
        self.note_replaced();
    }

    /// Marks the earlier controllers as replaced once every node knows the epoch of the last one.
    pub(crate) fn note_replaced(&mut self) {
        let Some((last, before)) = self.lives.split_last_mut() else { return };
        let epoch = last.epoch();
        let heard = |host: &Host| host.agent().is_some_and(|a| a.sandboxes().epoch() >= epoch);
        if last.is_fenced() || !self.hosts.iter().all(heard) {
            return;
        }
        for life in before {
            life.replaced |= life.epoch() < epoch;
        }
    }

    /// Returns whether every agent runs and can be reached and every journal can be written, so
    /// that a controller that knows less than the nodes can learn all of it.
    pub(crate) fn is_whole(&self) -> bool {
        self.hosts.iter().all(|host| {
            host.agent().is_some() && self.net.is_clear(&host.name) && !host.journal.is_failing()
        })
    }
}
