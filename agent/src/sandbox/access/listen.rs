//! Exposes ports because something in the sandbox listens on them, where the sandbox has that rule. The host reads the
//! table of sockets of the container's network namespace; nothing enters the sandbox.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use proto::{id::SandboxId, name::Port};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{
    journal::{Phase, Record},
    sandbox::{Result, Sandboxes},
};

/// Interval between two looks at the sandboxes that have the rule.
const TICK: Duration = Duration::from_secs(3);
/// Longest wait for one table.
const LOOK: Duration = Duration::from_secs(5);

impl Sandboxes {
    /// Exposes what begins to listen, until the agent stops.
    pub async fn follow_listeners(self: Arc<Self>) {
        let stop = self.tasks.stopping().clone();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = self.expose_listening() => {}
            }
        }
    }

    /// Looks once at every running sandbox that has the rule. Returns the ports that were exposed.
    pub async fn expose_listening(self: &Arc<Self>) -> Vec<(SandboxId, Port)> {
        let mut exposed = Vec::new();
        for record in self.live() {
            let rule = record.access.listen.as_ref();
            if record.phase != Phase::Running || rule.is_none_or(|rule| rule.is_full()) {
                continue;
            }
            let listeners = timeout(LOOK, self.pve.listeners(record.vmid)).await;
            let ports = new_ports(&record, &listeners.unwrap_or_default());
            if ports.is_empty() {
                continue;
            }
            match self.open_listening(&record.id, ports.clone()).await {
                Ok(after) => {
                    let is_open = |port: &Port| after.visibility(*port).is_some();
                    for port in ports.into_iter().filter(is_open) {
                        tracing::info!(sandbox_id = %record.id, %port, "port is exposed: something listens on it");
                        exposed.push((record.id, port));
                    }
                }
                // The next look tries again.
                Err(error) => {
                    tracing::warn!(sandbox_id = %record.id, %error, "a listening port was not exposed");
                }
            }
        }
        exposed
    }

    async fn open_listening(
        self: &Arc<Self>,
        id: &SandboxId,
        ports: BTreeSet<Port>,
    ) -> Result<Arc<Record>> {
        self.amend_living(id, move |record| {
            // It may have stopped, or a caller may have hidden a port since the look.
            if record.phase == Phase::Running {
                for port in &ports {
                    record.open_listening(*port);
                }
            }
            Ok(())
        })
        .await
    }
}

/// Returns the ports that other hosts can reach and that the rule of the sandbox would open. Pure.
fn new_ports(record: &Record, listeners: &[SocketAddr]) -> BTreeSet<Port> {
    let reachable = listeners.iter().filter(|at| !at.ip().to_canonical().is_loopback());
    let ports: BTreeSet<Port> =
        reachable.filter_map(|at| Port::try_from(u32::from(at.port())).ok()).collect();
    // In a copy, so that a look at a sandbox with nothing new takes no lock and writes nothing.
    let mut after = record.clone();
    ports.into_iter().filter(|port| after.open_listening(*port)).collect()
}
