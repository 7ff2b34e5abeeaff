//! The agent's own tasks: what must go on although its caller hangs up, and what runs for ever.

use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Spawns, stops and awaits. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
}

impl Tasks {
    /// Runs `work` on a task of its own.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let kill = self.kill.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = kill.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Runs `work` on a task of its own and waits for it; whoever stops waiting stops nothing.
    /// `None` when the agent was stopped meanwhile.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let (sender, result) = oneshot::channel();
        self.spawn(async move {
            // Nobody may be waiting any more.
            drop(sender.send(work.await));
        });
        result.await.ok()
    }

    /// Cancelled when the agent is to stop: no new work, what runs is finished.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Asks what runs for ever to end, and waits until all has ended.
    pub async fn finish(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Cancelled by `kill`.
    pub fn killed(&self) -> &CancellationToken {
        &self.kill
    }

    /// Drops every task where it stands, as SIGKILL would: for the simulation.
    pub async fn kill(&self) {
        self.kill.cancel();
        self.finish().await;
    }
}
