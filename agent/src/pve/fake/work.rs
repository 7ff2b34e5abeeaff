//! PVE's operations over time, and their failures.

use std::{
    sync::{Arc, MutexGuard},
    time::Duration,
};

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Mutation, Op, Shared, Trouble,
    world::{Remains, World, locked, missing},
};
use crate::pve::{CloneOrder, ErrorKind, Mark, OwnVolumes, Settings};

/// Operation under way. Its container is busy until it is dropped.
#[derive(Debug)]
pub(super) struct Work {
    shared: Arc<Shared>,
    node: NodeName,
    op: Op,
    vmid: Vmid,
    life: u64,
    deadline: Instant,
    trouble: Option<Trouble>,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.shared.world().busy.remove(&self.vmid);
        self.shared.changed.notify_waiters();
    }
}

/// Error that the caller of a killed `pct` gets.
fn cut_off() -> ErrorKind {
    ErrorKind::Failed("unexpected status".to_owned())
}

impl Work {
    /// Takes the container's lock, as PVE does around every change.
    pub(super) async fn begin(
        shared: Arc<Shared>,
        node: NodeName,
        op: Op,
        vmid: Vmid,
        deadline: Instant,
    ) -> Result<Self, ErrorKind> {
        loop {
            let changed = shared.changed.notified();
            if shared.world().busy.insert(vmid) {
                break;
            }
            if timeout_at(deadline, changed).await.is_err() {
                let file = format!("/run/lock/lxc/pve-config-{vmid}.lock");
                return Err(ErrorKind::Locked(format!("can't lock file '{file}' - got timeout")));
            }
        }
        let life = shared.world().nodes.get(&node).map_or(0, |node| node.life);
        let trouble = shared.take_fault(op, &node, vmid);
        let mut work = Self { shared, node, op, vmid, life, deadline, trouble };
        work.fail_early().await?;
        Ok(work)
    }

    async fn fail_early(&mut self) -> Result<(), ErrorKind> {
        match self.trouble.take() {
            Some(Trouble::Before(kind)) => Err(kind),
            Some(Trouble::Hangs) => {
                let released = self.shared.released.notified();
                let stopped = || ErrorKind::Deadline(format!("{} did not end", self.op.name()));
                timeout_at(self.deadline, released).await.map_err(|_| stopped())
            }
            other => {
                self.trouble = other;
                Ok(())
            }
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world()
    }

    /// Waits; fails when the node dies meanwhile or the deadline passes.
    async fn pass(&self, duration: Duration) -> Result<(), ErrorKind> {
        let slow = self.world().nodes.get(&self.node).map_or(1, |node| node.slow);
        let end = Instant::now() + self.shared.vary(duration) * slow;
        let in_time = timeout_at(self.deadline, sleep_until(end)).await.is_ok();
        if !self.alive() {
            return Err(cut_off());
        }
        if in_time { Ok(()) } else { Err(ErrorKind::Deadline("it was stopped".to_owned())) }
    }

    fn alive(&self) -> bool {
        self.world().nodes.get(&self.node).is_some_and(|node| node.life == self.life)
    }

    /// True when a planned kill is due.
    fn killed(&self) -> bool {
        self.trouble == Some(Trouble::Killed)
    }

    fn end(&mut self) -> Result<(), ErrorKind> {
        match self.trouble.take() {
            Some(Trouble::After(kind)) => Err(kind),
            Some(
                Trouble::Before(_)
                | Trouble::Killed
                | Trouble::KilledAtOnce
                | Trouble::RolledBack
                | Trouble::Hangs,
            )
            | None => Ok(()),
        }
    }

    pub(super) async fn clone_template(mut self, order: CloneOrder) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        self.world().begin_clone(&self.node, &order)?;
        if self.trouble == Some(Trouble::KilledAtOnce) {
            self.world().roll_back_clone(&self.node, &order);
            self.world().claim(&self.node, self.vmid);
            return Err(cut_off());
        }
        let half = self.shared.pace().clone / 2;
        let made = match self.pass(half).await {
            Ok(()) => self.world().make_volume(&self.node, self.vmid),
            Err(kind) => Err(kind),
        };
        if self.killed() {
            return Err(cut_off());
        }
        let done = match made {
            Ok(_) if self.trouble == Some(Trouble::RolledBack) => Err(cut_off()),
            Ok(volume) => self.pass(half).await.map(|()| volume),
            Err(kind) => Err(kind),
        };
        match done {
            Ok(volume) => {
                self.world().finish_clone(&self.node, &order, &volume);
                self.end()
            }
            Err(kind) => {
                // A dead node leaves everything unchanged; a failure and a TERM are rolled back.
                if self.alive() {
                    self.world().roll_back_clone(&self.node, &order);
                }
                Err(kind)
            }
        }
    }

    pub(super) async fn configure(mut self, settings: Settings) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        self.pass(self.shared.pace().set).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().configure(&self.node, self.vmid, &settings)?;
        self.end()
    }

    pub(super) async fn resize(mut self, gib: u32) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        let runs = self.world().container(&self.node, self.vmid).is_some_and(|g| g.pid.is_some());
        let pace = self.shared.pace();
        self.pass(if runs { pace.resize } else { pace.resize_stopped }).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().resize(&self.node, self.vmid, gib)?;
        self.end()
    }

    pub(super) async fn hand_to(
        mut self,
        owner: SandboxId,
        target: NodeName,
    ) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        self.pass(self.shared.pace().write).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().hand_to(&self.node, self.vmid, &owner, &target)?;
        self.end()
    }

    pub(super) async fn start(mut self) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        self.world().let_go(&self.node, self.vmid)?;
        if self.world().may_start(&self.node, self.vmid)? {
            return Ok(());
        }
        self.pass(self.shared.pace().start).await?;
        if self.killed() {
            return Err(cut_off());
        }
        let up_at = Instant::now() + self.shared.vary(self.shared.pace().boot);
        self.world().start(&self.node, self.vmid, up_at)?;
        self.end()
    }

    pub(super) async fn stop(mut self) -> Result<(), ErrorKind> {
        self.world().let_go(&self.node, self.vmid)?;
        if self.world().is_stopped(&self.node, self.vmid)? {
            return Ok(());
        }
        self.pass(self.shared.pace().stop).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().stop(&self.node, self.vmid)?;
        self.end()
    }

    pub(super) async fn mark(mut self, mark: Mark) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().write).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().mark(&self.node, &mark)?;
        self.end()
    }

    pub(super) async fn unmark(mut self, owner: SandboxId) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().write).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().unmark(&self.node, self.vmid, &owner)?;
        self.end()
    }

    pub(super) async fn hold(mut self, owner: SandboxId) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().write).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().hold(&self.node, self.vmid, &owner)?;
        self.end()
    }

    pub(super) async fn release(mut self, owner: SandboxId) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().write).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().release(&self.node, self.vmid, &owner)?;
        self.end()
    }

    /// Freezes. When cut off, leaves the container frozen.
    pub(super) async fn freeze(mut self, owner: SandboxId) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().freeze).await?;
        self.world().freeze(&self.node, self.vmid, &owner, true)?;
        if self.killed() {
            return Err(cut_off());
        }
        self.pass(self.shared.pace().freeze).await?;
        let done = self.end();
        if done.is_err() {
            self.world().freeze(&self.node, self.vmid, &owner, false)?;
        }
        done
    }

    pub(super) async fn thaw(mut self, owner: SandboxId) -> Result<(), ErrorKind> {
        self.pass(self.shared.pace().freeze).await?;
        if self.killed() {
            return Err(cut_off());
        }
        self.world().freeze(&self.node, self.vmid, &owner, false)?;
        self.end()
    }

    pub(super) async fn destroy(
        mut self,
        owner: SandboxId,
        own: OwnVolumes,
    ) -> Result<(), ErrorKind> {
        self.world().believes_in_quorum(&self.node)?;
        let quorum = self.world().check_quorum(&self.node);
        if self.world().has(Mutation::Destroy) {
            return Ok(());
        }
        let remains = self.world().remains(&self.node, self.vmid, &owner, &own)?;
        if remains == Remains::Nothing {
            return Ok(());
        }
        if remains == Remains::Container {
            self.world().let_go(&self.node, self.vmid)?;
        }
        self.pass(self.shared.pace().destroy).await?;
        // PVE does not check the quorum here: it removes the volumes and fails at the config.
        if let Err(kind) = quorum {
            self.world().free_volumes(&self.node, self.vmid, |_| true);
            return Err(kind);
        }
        self.world().half_destroy(&self.node, self.vmid, &own);
        if self.killed() {
            return Err(cut_off());
        }
        self.world().guests.remove(&self.vmid);
        self.end()
    }

    pub(super) async fn unlock_template(mut self) -> Result<(), ErrorKind> {
        self.world().check_quorum(&self.node)?;
        self.pass(self.shared.pace().set).await?;
        if self.world().has(Mutation::Unlock) {
            return Ok(());
        }
        {
            let mut world = self.world();
            let template = world.container(&self.node, self.vmid);
            let template = template.ok_or_else(|| missing(&self.node, self.vmid))?;
            match template.config.lock() {
                None => return Ok(()),
                Some("disk") if template.config.is_template() => {}
                Some(lock) => return Err(locked(lock)),
            }
            // A container that waits for its volume has a worker, which holds the lock.
            let cloning = |vmid: &Vmid| {
                *vmid != self.vmid
                    && world.guests.get(vmid).is_some_and(|g| g.config.lock() == Some("create"))
            };
            if world.busy.iter().any(cloning) {
                return Err(locked("disk"));
            }
            world.edit(&self.node, self.vmid, |config| config.remove("lock"));
        }
        self.end()
    }
}

async fn sleep_until(end: Instant) {
    sleep(end.saturating_duration_since(Instant::now())).await;
}
