//! Limits a sandbox in each boot as soon as its container has a cgroup, whoever boots it: what runs in it
//! runs from then on. What is missed here is limited by the other ways of `cgroup_limits`.

use std::{collections::BTreeMap, future::poll_fn, io, sync::Arc, task::Poll, time::Duration};

use futures_util::{StreamExt, future::BoxFuture};
use proto::id::{SandboxRef, Vmid};
use tokio::time::{Instant, sleep};

use crate::{journal::Record, pve::Mark, sandbox::Sandboxes};

/// Time for which the limits of a boot are tried again: its disks are known once its init is there, a
/// moment after its cgroup.
const FOLLOW: Duration = Duration::from_secs(5);
/// Pause between two tries.
const AGAIN: Duration = Duration::from_millis(20);
/// Pause until boots are watched again after that has failed.
const RETRY: Duration = Duration::from_secs(60);

impl Sandboxes {
    /// Limits every boot of a sandbox until the agent stops.
    pub async fn limit_boots(self: Arc<Self>) {
        let stop = self.tasks.stopping().clone();
        let mut told = false;
        loop {
            let ended = stop.run_until_cancelled(self.limit_boots_while_watched()).await;
            match ended {
                None => return,
                Some(Ok(())) => told = false,
                Some(Err(error)) if !told => {
                    told = true;
                    tracing::warn!(%error, "boots cannot be watched: limits are in force by a later look only");
                }
                Some(Err(_)) => {}
            }
            if stop.run_until_cancelled(sleep(RETRY)).await.is_none() {
                return;
            }
        }
    }

    /// Limits every boot of a sandbox until boots can no longer be watched.
    async fn limit_boots_while_watched(&self) -> io::Result<()> {
        let mut boots = self.pve.boots()?;
        // Of each container the boot that was noticed last: the one before has ended.
        let mut limiting = BTreeMap::<Vmid, BoxFuture<'_, ()>>::new();
        loop {
            let limit = poll_fn(|context| {
                limiting.retain(|_, boot| boot.as_mut().poll(context).is_pending());
                Poll::<()>::Pending
            });
            let mark = tokio::select! {
                biased;
                mark = boots.next() => mark,
                () = limit => continue,
            };
            let Some(mark) = mark else { return Ok(()) };
            if let Some(record) = self.record_with(&mark) {
                limiting.insert(record.vmid, Box::pin(self.limit_boot(record)));
            }
        }
    }

    /// Finds the sandbox whose container carries this mark by the journal: any other is not ours.
    fn record_with(&self, mark: &Mark) -> Option<Arc<Record>> {
        let record = self.living(&SandboxRef::Vmid(mark.vmid)).ok()?;
        (record.mark() == *mark).then_some(record)
    }

    /// Limits a container that boots. Its files may not all be there yet.
    async fn limit_boot(&self, record: Arc<Record>) {
        let until = Instant::now() + FOLLOW;
        while self.write_limits(&record).await.is_err() && Instant::now() < until {
            sleep(AGAIN).await;
        }
    }
}
