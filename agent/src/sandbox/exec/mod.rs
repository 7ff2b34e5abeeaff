//! Running a command in a sandbox.
//!
//! `lxc-attach` enters, so the command has the container's cgroup, seccomp, AppArmor and
//! capabilities; a script in there (`inside`) looks up the user and becomes the command. Its bytes
//! pass through bounded buffers (`streams`). A command ends by itself, at its timeout, when its
//! caller hangs up, or when the agent stops; in all but the first case everything that it started
//! is ended too (`tree`). What it leaves in the background when it ends by itself runs on.
//!
//! A stream of output ends with an exit or with an error, and with nothing else.

mod attach;
mod inside;
pub mod order;
mod session;
mod streams;
mod tree;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::{
    id::{SandboxId, SandboxRef},
    reason,
};
use tokio::sync::mpsc;

use super::{Error, Sandboxes};
use crate::journal::Record;
use attach::{Attached, Ends, Failure};
use order::{Input, Order, Output, Started};
use session::Session;
use tree::Tree;

/// Commands at a time in one sandbox.
const PER_SANDBOX_MAX: usize = 64;
/// Commands at a time on the node.
const ALL_MAX: usize = 2048;
/// Messages of output on their way: half a MiB at most.
const OUTPUT_MESSAGES: usize = 16;

/// Runs commands. Clones share it.
#[derive(Debug, Clone)]
pub struct Execs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sandboxes: Arc<Sandboxes>,
    running: Mutex<HashMap<SandboxId, usize>>,
}

/// A command's place among those that may run. Given back when dropped.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    id: SandboxId,
}

/// What a command sends, to its exit or to an error.
pub type Outputs = mpsc::Receiver<Result<Output, Error>>;

impl Execs {
    /// In these sandboxes.
    pub fn new(sandboxes: Arc<Sandboxes>) -> Self {
        Self(Arc::new(Shared { sandboxes, running: Mutex::default() }))
    }

    /// Starts a command and returns once it runs. Dropping the receiver is hanging up.
    ///
    /// # Errors
    /// When there is no such sandbox, it does not run, there is no such user or directory in it,
    /// too many commands run, or it cannot be entered.
    pub async fn start(
        &self,
        order: Order,
        input: mpsc::Receiver<Input>,
    ) -> Result<(Started, Outputs), Error> {
        let record = self.0.sandboxes.running(&order.sandbox)?;
        let place = self.place(record.id)?;
        let (sender, outputs) = mpsc::channel(OUTPUT_MESSAGES);
        let shared = Arc::clone(&self.0);
        // On a task of its own: whoever stops waiting leaves nothing behind that nobody ends.
        let begun = self.0.sandboxes.tasks().run(async move {
            let started = Started { boot: record.boot };
            let session = begin(&shared.sandboxes, &record, order, place).await?;
            shared.sandboxes.tasks().spawn(session.run(input, sender));
            Ok(started)
        });
        let stopping = || Error::new(reason::SHUTTING_DOWN, "the agent is stopping");
        let started = begun.await.unwrap_or_else(|| Err(stopping()))?;
        Ok((started, outputs))
    }

    fn place(&self, id: SandboxId) -> Result<Place, Error> {
        let mut running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
        let own = running.get(&id).copied().unwrap_or(0);
        if own >= PER_SANDBOX_MAX || running.values().sum::<usize>() >= ALL_MAX {
            let (many, whose) = if own >= PER_SANDBOX_MAX {
                (PER_SANDBOX_MAX, "this sandbox")
            } else {
                (ALL_MAX, "this node")
            };
            return Err(Error::new(
                reason::TOO_MANY_CALLS,
                format!("{many} commands run in {whose} already"),
            )
            .retry_after(Duration::from_secs(1)));
        }
        running.insert(id, own + 1);
        Ok(Place { shared: Arc::clone(&self.0), id })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = running.get_mut(&self.id) {
            *own -= 1;
            if *own == 0 {
                running.remove(&self.id);
            }
        }
    }
}

fn failed(message: String) -> Error {
    Error::new(reason::EXEC_FAILED, message)
}

/// True while this is still the boot of the sandbox that was meant.
fn same_boot(sandboxes: &Sandboxes, record: &Record) -> bool {
    let now = sandboxes.running(&SandboxRef::Id(record.id));
    now.is_ok_and(|now| now.boot == record.boot && now.vmid == record.vmid)
}

/// Enters, and starts the command.
async fn begin(
    sandboxes: &Arc<Sandboxes>,
    record: &Arc<Record>,
    order: Order,
    place: Place,
) -> Result<Session, Error> {
    let pve = sandboxes.pve();
    let prefix = pve.enter(record.vmid).ok_or_else(|| failed("there is no way in".to_owned()))?;
    // Whatever is started in there would hang until it is thawed.
    if pve.frozen(record.vmid).await {
        return Err(Error::new(
            reason::SANDBOX_NOT_RUNNING,
            format!("{} is frozen, not running", record.id),
        ));
    }
    let mark = mark()?;
    let tty = order.tty.is_some();
    let environment = inside::environment(&record.env, &order.env, tty, &mark);
    let cwd = order.cwd.as_deref();
    let argv = inside::argv(&order.user, cwd, &order.command, &environment);
    let mut attached = match Attached::start(&prefix, &argv, order.tty) {
        Ok(attached) => attached,
        Err(error) => return Err(explain(sandboxes, record, Failure::Start(error)).await),
    };
    let tree = Tree {
        pve: Arc::clone(pve),
        vmid: record.vmid,
        attach: attached.process.pid(),
        mark: format!("{}={mark}", inside::MARK),
    };
    let failure = match enter(sandboxes, record, &mut attached, &environment).await {
        Ok(()) => {
            return Ok(Session {
                sandboxes: Arc::clone(sandboxes),
                record: Arc::clone(record),
                process: attached.process,
                ends: attached.ends,
                tree,
                timeout: order.timeout,
                _place: place,
            });
        }
        Err(failure) => failure,
    };
    // Whatever came to run in there meanwhile.
    tree.end().await;
    Attached::end(&mut attached.process).await;
    Err(explain(sandboxes, record, failure).await)
}

async fn enter(
    sandboxes: &Sandboxes,
    record: &Record,
    attached: &mut Attached,
    environment: &BTreeMap<String, String>,
) -> Result<(), Failure> {
    let lines = inside::lines(environment);
    // With pipes the script need not wait: a vmid does not change hands within seconds. On a
    // terminal there is something to be done before the command runs.
    if let Ends::Pipes { .. } = attached.ends {
        let went = attached.go(&lines).await;
        // A script that has ended by now takes nothing more, and has said why.
        attached.ready().await?;
        went?;
    } else {
        attached.ready().await?;
        attached.go(&lines).await?;
    }
    if same_boot(sandboxes, record) {
        Ok(())
    } else {
        Err(Failure::Ended("the sandbox was stopped meanwhile".to_owned()))
    }
}

/// A failure as the caller can use it: first of all, whether the sandbox runs.
async fn explain(sandboxes: &Sandboxes, record: &Record, failure: Failure) -> Error {
    match failure {
        Failure::NoUser => {
            Error::new(reason::FIELD_INVALID, "user: there is no such user in the sandbox")
        }
        Failure::NoCwd => {
            Error::new(reason::FIELD_INVALID, "cwd: there is no such directory in the sandbox")
        }
        Failure::NoSetpriv => {
            failed("the sandbox has no setpriv: commands run in it as root only".to_owned())
        }
        Failure::Start(_) | Failure::Stuck | Failure::Ended(_) => {
            if let Err(error) = sandboxes.running(&SandboxRef::Id(record.id)) {
                return error;
            }
            if !sandboxes.pve().running(record.vmid).await {
                return Error::new(
                    reason::SANDBOX_NOT_RUNNING,
                    format!("the container of {} does not run", record.id),
                );
            }
            match failure {
                Failure::Start(error) => failed(format!("lxc-attach was not started: {error}")),
                Failure::Ended(said) => failed(format!("nothing was started: {said}")),
                Failure::Stuck | Failure::NoUser | Failure::NoCwd | Failure::NoSetpriv => failed(
                    "nothing could be started in the sandbox in time; it is frozen or overloaded"
                        .to_owned(),
                ),
            }
        }
    }
}

/// Random, so that no other command has it.
fn mark() -> Result<String, Error> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|error| failed(format!("no randomness: {error}")))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests;
