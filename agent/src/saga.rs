//! Steps with undos, in straight-line code. An undo is registered before its step runs, because a
//! failed step may have had its effect. So every undo is idempotent, is correct when nothing
//! happened, and touches only what is provably ours. A crash leaves no list of undos; the
//! reconciler then does the same work by the same code.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;

/// Time of a fault: before the effect of a step, or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// Faults that tests and the simulation inject; none by default.
#[derive(Clone, Default)]
pub struct Faults {
    /// Makes the step with this number fail, counted from 0.
    pub fail: Option<(usize, When)>,
    /// Runs every action and every undo twice.
    pub twice: bool,
    /// Called around each step; a simulated crash never returns from it.
    pub hook: Option<Hook>,
    /// Undos report success and do nothing.
    pub skip_undos: bool,
    /// A cancelled creation is reported as cancelled, and lives on.
    pub ignore_cancels: bool,
}

/// Callback with the number and the name of the step.
pub type Hook = Arc<dyn Fn(usize, &'static str, When) -> BoxFuture<'static, ()> + Send + Sync>;

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("fail", &self.fail).finish_non_exhaustive()
    }
}

/// Error of a step that `Faults` made fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("step {0} was made to fail")]
pub struct Injected(pub &'static str);

type Undo<'a, E> = Box<dyn Fn() -> BoxFuture<'a, Result<(), E>> + Send + Sync + 'a>;

/// Operation in progress, with the undos of its steps.
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
    /// Begins an operation without steps.
    pub fn new(faults: &'a Faults) -> Self {
        Self { faults, steps: 0, undos: Vec::new() }
    }

    /// Registers `undo`, then runs `action`, which must be idempotent.
    pub async fn step<T, F: Future<Output = Result<T, E>>>(
        &mut self,
        name: &'static str,
        undo: impl Fn() -> BoxFuture<'a, Result<(), E>> + Send + Sync + 'a,
        action: impl Fn() -> F,
    ) -> Result<T, E> {
        self.undos.push((name, Box::new(undo)));
        self.step_without_undo(name, action).await
    }

    /// Runs `action`, whose effect an already registered undo reverts too.
    pub async fn step_without_undo<T, F: Future<Output = Result<T, E>>>(
        &mut self,
        name: &'static str,
        action: impl Fn() -> F,
    ) -> Result<T, E> {
        let number = self.steps;
        self.steps += 1;
        self.inject(number, name, When::Before).await?;
        let mut done = action().await?;
        if self.faults.twice {
            done = action().await?;
        }
        self.inject(number, name, When::After).await?;
        Ok(done)
    }

    async fn inject(&self, number: usize, name: &'static str, when: When) -> Result<(), E> {
        if let Some(hook) = &self.faults.hook {
            hook(number, name, when).await;
        }
        if self.faults.fail == Some((number, when)) { Err(Injected(name).into()) } else { Ok(()) }
    }

    /// Runs the undos in reverse order, and returns how many succeeded. A failure does not stop the
    /// others: it is logged, and the first one is returned for the record.
    pub async fn unwind(self) -> Result<usize, E> {
        let (mut done, mut failed) = (0, None);
        for (step, undo) in self.undos.into_iter().rev() {
            let mut result = if self.faults.skip_undos { Ok(()) } else { undo().await };
            if self.faults.twice && result.is_ok() {
                result = undo().await;
            }
            match result {
                Ok(()) => done += 1,
                Err(error) => {
                    tracing::error!(step, %error, "an undo failed");
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(done), Err)
    }
}
