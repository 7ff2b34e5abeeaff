//! Steps with undos, in straight-line code. An undo is registered before its step runs: a step that
//! fails may have had its effect. So every undo is idempotent, is true when nothing happened, and
//! touches only what is provably ours. A crash leaves no list of undos; the reconciler then does
//! what they do, by the same code.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;

/// Where a fault strikes: before the effect of a step, or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before.
    Before,
    /// After.
    After,
}

/// What the tests and the simulation let go wrong; nothing by default.
#[derive(Clone, Default)]
pub struct Faults {
    /// Fails the step of this number, counted from 0.
    pub fail: Option<(usize, When)>,
    /// Runs every action and every undo twice.
    pub twice: bool,
    /// Called around each step; a simulated crash never returns from it.
    pub hook: Option<Hook>,
    /// What the agent leaves out.
    pub lapse: Option<Lapse>,
}

/// Something that must not be left out. The simulation leaves it out to show that it would notice;
/// no configuration can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lapse {
    /// Undos say that they undid, and do nothing.
    Undo,
    /// A controller of a lower epoch may change things.
    Fence,
    /// Nobody looks whose container it is before it is entered.
    Entry,
    /// What is called off is said to be off, and lives on.
    CallOff,
    /// A sandbox that goes to another node is left before that one has it.
    Leave,
    /// A clone is made under a number where volumes stand.
    Site,
}

impl Faults {
    /// True when this is to be left out.
    pub fn lapses(&self, lapse: Lapse) -> bool {
        self.lapse == Some(lapse)
    }
}

/// Gets the number and the name of the step.
pub type Hook = Arc<dyn Fn(usize, &'static str, When) -> BoxFuture<'static, ()> + Send + Sync>;

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("fail", &self.fail).finish_non_exhaustive()
    }
}

/// The step was made to fail by `Faults`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("step {0} was made to fail")]
pub struct Injected(pub &'static str);

type Undo<'a, E> = Box<dyn Fn() -> BoxFuture<'a, Result<(), E>> + Send + Sync + 'a>;

/// An operation under way.
pub struct Saga<'a, E> {
    faults: &'a Faults,
    steps: usize,
    undos: Vec<(&'static str, Undo<'a, E>)>,
}

impl<E> fmt::Debug for Saga<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saga").field("steps", &self.steps).finish_non_exhaustive()
    }
}

impl<'a, E: fmt::Display + From<Injected>> Saga<'a, E> {
    /// With nothing done yet.
    pub fn new(faults: &'a Faults) -> Self {
        Self { faults, steps: 0, undos: Vec::new() }
    }

    /// Registers `undo`, then does `action`, which must be true when it is repeated.
    pub async fn step<T, F: Future<Output = Result<T, E>>>(
        &mut self,
        name: &'static str,
        undo: impl Fn() -> BoxFuture<'a, Result<(), E>> + Send + Sync + 'a,
        action: impl Fn() -> F,
    ) -> Result<T, E> {
        self.undos.push((name, Box::new(undo)));
        self.step_without_undo(name, action).await
    }

    /// Does `action`, which an undo that stands already takes back too.
    pub async fn step_without_undo<T, F: Future<Output = Result<T, E>>>(
        &mut self,
        name: &'static str,
        action: impl Fn() -> F,
    ) -> Result<T, E> {
        let number = self.steps;
        self.steps += 1;
        self.strike(number, name, When::Before).await?;
        let mut done = action().await?;
        if self.faults.twice {
            done = action().await?;
        }
        self.strike(number, name, When::After).await?;
        Ok(done)
    }

    async fn strike(&self, number: usize, name: &'static str, when: When) -> Result<(), E> {
        if let Some(hook) = &self.faults.hook {
            hook(number, name, when).await;
        }
        if self.faults.fail == Some((number, when)) { Err(Injected(name).into()) } else { Ok(()) }
    }

    /// Undoes in reverse order, and says how much. A failure stops nothing: it is logged, and the
    /// first is returned for the record.
    pub async fn unwind(self) -> Result<usize, E> {
        let (mut done, mut failed) = (0, None);
        for (step, undo) in self.undos.into_iter().rev() {
            let mut result = if self.faults.lapses(Lapse::Undo) { Ok(()) } else { undo().await };
            if self.faults.twice && result.is_ok() {
                result = undo().await;
            }
            match result {
                Ok(()) => done += 1,
                Err(error) => {
                    tracing::error!(step, %error, "undo failed");
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(done), Err)
    }
}
