//! Tasks of the agent: those that must continue when their caller hangs up, and those that run for
//! ever.

use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Spawns, stops and awaits tasks. Clones share them.
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

    /// Runs `work` on a task of its own and waits for it; a caller that stops waiting does not stop
    /// it. `None` when the agent was stopped meanwhile.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let (sender, result) = oneshot::channel();
        self.spawn(async move {
            // The caller may not wait any more.
            drop(sender.send(work.await));
        });
        result.await.ok()
    }

    /// Returns a token that is cancelled when the agent is to stop: no new work, and current work
    /// is completed.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Asks permanent tasks to end, and waits until all tasks have ended.
    pub async fn finish(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Returns a token that `kill` cancels.
    pub fn killed(&self) -> &CancellationToken {
        &self.kill
    }

    /// Drops every task where it stands, as SIGKILL would: for the simulation.
    pub async fn kill(&self) {
        self.kill.cancel();
        self.finish().await;
    }
}
