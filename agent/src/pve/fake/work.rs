//! PVE's operations over time, and their failures.

use std::{
    sync::{Arc, MutexGuard},
    time::Duration,
};

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::Size,
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Mutation, Op, Shared, Trouble,
    world::{Remains, World, locked, missing},
};
use crate::pve::{CloneOrder, ErrorKind, Mark, OwnVolumes, Result, Settings};

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
        self.shared.world.lock().busy.remove(&self.vmid);
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
    ) -> Result<Self> {
        loop {
            let changed = shared.changed.notified();
            if shared.world.lock().busy.insert(vmid) {
                break;
            }
            if timeout_at(deadline, changed).await.is_err() {
                let file = format!("/run/lock/lxc/pve-config-{vmid}.lock");
                return Err(ErrorKind::Locked(format!("can't lock file '{file}' - got timeout")));
            }
        }
        let life = shared.world.lock().nodes.get(&node).map_or(0, |node| node.life);
        let trouble = shared.take_fault(op, &node, vmid);
        let mut work = Self { shared, node, op, vmid, life, deadline, trouble };
        work.fail_early().await?;
        Ok(work)
    }

    async fn fail_early(&mut self) -> Result<()> {
        match self.trouble.take() {
            Some(Trouble::Before(kind)) => Err(kind),
            Some(Trouble::Hangs) => {
                let released = self.shared.released.notified();
                let stopped =
                    || ErrorKind::Deadline(format!("{} did not end", self.op.operation()));
                timeout_at(self.deadline, released).await.map_err(|_| stopped())
            }
            other => {
                self.trouble = other;
                Ok(())
            }
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock()
    }

    /// Waits; fails when the node dies meanwhile or the deadline passes.
    async fn pass(&self, duration: Duration) -> Result<()> {
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

    /// Fails when a planned kill is due.
    fn survives(&self) -> Result<()> {
        if self.trouble == Some(Trouble::Killed) { Err(cut_off()) } else { Ok(()) }
    }

    /// Works for this time, then makes the change unless it was killed meanwhile.
    async fn act(
        mut self,
        time: Duration,
        change: impl FnOnce(&mut World, &NodeName, Vmid) -> Result<()>,
    ) -> Result<()> {
        self.pass(time).await?;
        self.survives()?;
        change(&mut self.world(), &self.node, self.vmid)?;
        self.end()
    }

    fn end(&mut self) -> Result<()> {
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

    pub(super) async fn clone_template(mut self, order: CloneOrder) -> Result<()> {
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
        self.survives()?;
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

    pub(super) async fn configure(self, settings: Settings) -> Result<()> {
        self.world().check_quorum(&self.node)?;
        let time = self.shared.pace().set;
        self.act(time, |world, node, vmid| world.configure(node, vmid, &settings)).await
    }

    pub(super) async fn resize(mut self, gib: u32) -> Result<()> {
        self.world().check_quorum(&self.node)?;
        let runs = self.world().container(&self.node, self.vmid).is_some_and(|g| g.pid.is_some());
        let pace = self.shared.pace();
        let time = if runs { pace.resize } else { pace.resize_stopped };
        self.pass(time).await?;
        // As PVE does it: the volume and the config first, the file system last.
        self.world().resize(&self.node, self.vmid, gib)?;
        self.survives()?;
        self.end()
    }

    pub(super) async fn set_limits(mut self, owner: SandboxId, size: Size) -> Result<()> {
        self.world().check_quorum(&self.node)?;
        self.pass(self.shared.pace().set).await?;
        // As PVE does it: the running container first, its config last.
        self.world().give_limits(&self.node, self.vmid, &owner, size)?;
        self.survives()?;
        self.world().set_limits(&self.node, self.vmid, &owner, size)?;
        self.end()
    }

    pub(super) async fn move_config_to(self, owner: SandboxId, target: NodeName) -> Result<()> {
        self.world().check_quorum(&self.node)?;
        let time = self.shared.pace().write;
        self.act(time, |world, node, vmid| world.move_config_to(node, vmid, &owner, &target)).await
    }

    pub(super) async fn start(mut self) -> Result<()> {
        self.world().check_quorum(&self.node)?;
        self.world().end_pause(&self.node, self.vmid)?;
        if self.world().may_start(&self.node, self.vmid)? {
            return Ok(());
        }
        self.pass(self.shared.pace().start).await?;
        self.survives()?;
        let up_at = Instant::now() + self.shared.vary(self.shared.pace().boot);
        self.world().start(&self.node, self.vmid, up_at)?;
        self.shared.booted(self.vmid);
        self.end()
    }

    /// Signals the init, which shuts down a moment later unless it ignores that.
    pub(super) async fn halt(self, owner: SandboxId) -> Result<()> {
        let time = self.shared.pace().write;
        self.act(time, |world, node, vmid| world.halt(node, vmid, &owner)).await
    }

    pub(super) async fn stop(self) -> Result<()> {
        self.world().end_pause(&self.node, self.vmid)?;
        if self.world().is_stopped(&self.node, self.vmid)? {
            return Ok(());
        }
        let time = self.shared.pace().stop;
        self.act(time, |world, node, vmid| world.stop(node, vmid)).await
    }

    pub(super) async fn mark(self, mark: Mark) -> Result<()> {
        let time = self.shared.pace().write;
        self.act(time, |world, node, _| world.mark(node, &mark)).await
    }

    pub(super) async fn unmark(self, owner: SandboxId) -> Result<()> {
        let time = self.shared.pace().write;
        self.act(time, |world, node, vmid| world.unmark(node, vmid, &owner)).await
    }

    pub(super) async fn acquire_pause_lock(self, owner: SandboxId) -> Result<()> {
        let time = self.shared.pace().write;
        self.act(time, |world, node, vmid| world.acquire_pause_lock(node, vmid, &owner)).await
    }

    pub(super) async fn release_pause_lock(self, owner: SandboxId) -> Result<()> {
        let time = self.shared.pace().write;
        self.act(time, |world, node, vmid| world.release_pause_lock(node, vmid, &owner)).await
    }

    /// Freezes. When cut off, leaves the container frozen.
    pub(super) async fn freeze(mut self, owner: SandboxId) -> Result<()> {
        self.pass(self.shared.pace().freeze).await?;
        self.world().freeze(&self.node, self.vmid, &owner, true)?;
        self.survives()?;
        self.pass(self.shared.pace().freeze).await?;
        let done = self.end();
        if done.is_err() {
            self.world().freeze(&self.node, self.vmid, &owner, false)?;
        }
        done
    }

    pub(super) async fn thaw(self, owner: SandboxId) -> Result<()> {
        let time = self.shared.pace().freeze;
        self.act(time, |world, node, vmid| world.freeze(node, vmid, &owner, false)).await
    }

    pub(super) async fn destroy(mut self, owner: SandboxId, own: OwnVolumes) -> Result<()> {
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
            self.world().end_pause(&self.node, self.vmid)?;
        }
        self.pass(self.shared.pace().destroy).await?;
        // PVE does not check the quorum here: it removes the volumes and fails at the config.
        if let Err(kind) = quorum {
            self.world().free_volumes(&self.node, self.vmid, |_| true);
            return Err(kind);
        }
        self.world().half_destroy(&self.node, self.vmid, &own);
        self.survives()?;
        self.world().guests.remove(&self.vmid);
        self.end()
    }

    pub(super) async fn unlock_template(mut self) -> Result<()> {
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
