//! Running a command in a sandbox, and attaching to one that runs.
//!
//! The sandbox's shim (`crate::shim`) runs the command and keeps its output and its exit. This
//! module does the agent's part: it finds or starts the shim, and passes bytes between it and a
//! caller. So a command outlives the agent. A command ends by itself, at its timeout, or when its
//! caller hangs up, unless that caller gave the run a name (`exec_id`). At a timeout everything
//! that it started is ended too, and at a hang-up, unless the caller asked to spare its background.
//! After an end by itself, its background processes keep running.
//!
//! A stream of output always ends with an exit or with an error.

mod attached;
mod environment;
pub mod forward;
pub mod order;
pub mod outputs;
pub mod shims;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use daemon::{
    keyed_lock::KeyedLock,
    shares::{Part, Places},
};
use data_encoding::HEXLOWER;
use proto::{
    Invariant, Reason, duration,
    id::{SandboxId, SandboxRef},
    name::Team,
    sandbox::v1::{ExecInfo, WindowSize},
    shim::v1::{self as wire, request, response},
};
use sha2::{Digest, Sha256};
use tokio::{
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, timeout_at},
};

use super::{Error, Known, Sandboxes, Wake, drift::fsck::Finding};
pub use crate::shim::FORWARD_PIECE;
use crate::{
    journal::Record,
    shim::client::{self, Attachment, Refused},
};
use environment::{MARK, environment};
use order::{Attach, Command, Control, Input, Order, Output, Started};
use outputs::AllCommands;
use shims::Shims;

/// Most callers that are attached at the same time, on the node: somewhat more than a controller opens streams. Each
/// holds up to 720 KiB in this process, see docs/connections.md.
const ATTACHED_MAX: usize = 768;
/// Most messages of output that are buffered. What is behind them waits in the shim.
const OUTPUT_MESSAGES: usize = 1;
/// Most bytes of files that are written, and of answers about files, that are held as a whole, for all sandboxes. A
/// team gets at most half of them, and less while other teams use them: see `Places`.
const WHOLE_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Most characters of a command line that are shown.
const TITLE_MAX: usize = 200;

/// Longest time from the request to the start of a command, including waking its sandbox. A start
/// takes milliseconds, unless the node is under heavy load. The order carries this as its deadline.
const START: Duration = Duration::from_secs(12);
/// Time after that in which the shim's answer may come. Controllers wait for 16 s.
const WORD: Duration = Duration::from_secs(2);
/// Time limit for attaching to a command, including waking its sandbox. Controllers wait for 16 s.
const ATTACH: Duration = Duration::from_secs(14);
/// Time limit for answering a control request, including waking the sandbox; its shim alone waits
/// for 5 s for a command that does not read. Controllers wait for 10 s.
const CONTROL: Duration = Duration::from_millis(8500);
/// Time limit for listing the commands. Controllers wait for 5 s.
const LIST: Duration = Duration::from_secs(4);

/// Longest time that a shim may run after its sandbox has ended.
const LINGER: Duration = Duration::from_secs(60);

/// Runs commands in sandboxes. Clones share the state.
#[derive(Debug, Clone)]
pub struct Execs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sandboxes: Arc<Sandboxes>,
    shims: Arc<dyn Shims>,
    places: Arc<Semaphore>,
    /// Bytes of files and answers that are held as a whole.
    wholes: Places<Team>,
    /// Shims of one sandbox start one after another.
    locks: KeyedLock<SandboxId>,
    /// Commands of all sandboxes at the last check; `None` before the first.
    commands: watch::Sender<Option<AllCommands>>,
}

/// Output of a command, up to its exit or an error.
pub type Outputs = mpsc::Receiver<Result<Output, Error>>;

impl Execs {
    /// Creates the service for these sandboxes.
    pub fn new(sandboxes: Arc<Sandboxes>, shims: Arc<dyn Shims>) -> Self {
        let places = Arc::new(Semaphore::new(ATTACHED_MAX));
        let wholes = Places::new(WHOLE_BYTES_MAX);
        let (locks, commands) = (KeyedLock::default(), watch::Sender::new(None));
        Self(Arc::new(Shared { sandboxes, shims, places, wholes, locks, commands }))
    }

    /// Records the commands of all sandboxes.
    pub(crate) fn tell(&self, commands: AllCommands) {
        self.0.commands.send_replace(Some(commands));
    }

    /// Returns the commands of all sandboxes, and each later report of them.
    pub fn commands(&self) -> watch::Receiver<Option<AllCommands>> {
        self.0.commands.subscribe()
    }

    /// Checks I1: finds shims, and their cgroups, that have outlived their sandboxes for longer
    /// than a shim takes to notice.
    pub async fn check(&self) -> Vec<Finding> {
        let sandboxes = &self.0.sandboxes;
        let running = self.0.shims.running().await;
        let in_use = self.0.shims.sweep_cgroups().await;
        let (live, ended) = (sandboxes.live(), sandboxes.ended());
        let bound = daemon::clock::millis(LINGER);
        let lately = |ended_ms: u64| sandboxes.now_ms().saturating_sub(ended_ms) <= bound;
        let lately = ended.iter().filter(|one| lately(one.ended_ms));
        let (mut ids, mut vmids): (BTreeSet<_>, BTreeSet<_>) =
            lately.map(|one| (one.id, one.vmid)).unzip();
        ids.extend(live.iter().map(|record| record.id));
        vmids.extend(live.iter().map(|record| record.vmid));
        let shims = running.into_iter().filter(|id| !ids.contains(id));
        let shims = shims.map(|id| {
            Finding::new(Invariant::I1, id, "the sandbox has ended, but its shim still runs")
        });
        let cgroups = in_use.into_iter().filter(|vmid| !vmids.contains(vmid));
        let cgroups = cgroups.map(|vmid| {
            Finding::new(
                Invariant::I1,
                vmid,
                "the sandbox has ended, but processes still run in its shim's cgroup",
            )
        });
        shims.chain(cgroups).collect()
    }

    /// Starts a command and returns once it runs. If one with its `exec_id` was started before,
    /// attaches to that, from the beginning of its kept output. Dropping the receiver hangs up.
    ///
    /// # Errors
    /// When there is no such sandbox, it does not run, there is no such user or directory in it,
    /// too many commands run, it cannot be entered, or the `exec_id` is used up. OUTCOME_UNKNOWN
    /// when the command may run all the same, EXEC_LOST when it may have run; after every other
    /// error nothing has run, and nothing will.
    pub async fn start(
        &self,
        mut order: Order,
        input: mpsc::Receiver<Input>,
    ) -> Result<(Started, Outputs), Error> {
        let timeout = order::timeout(order.timeout, self.0.sandboxes.options.limits.exec);
        order.timeout = timeout.map_err(|why| Error::new(Reason::FieldInvalid, why.to_string()))?;
        self.check_env(&order.sandbox)?;
        let limits = self.limits();
        let record = in_time(limits.answer_by, self.awake(&order.sandbox)).await?;
        let start = start(&record, &order, self.0.sandboxes.now_ms())?;
        self.begin(record, start, limits, input).await
    }

    /// Refuses to start a command in a sandbox whose environment cannot be read: without its variables
    /// it would be another command. Comes before a paused sandbox is woken for it.
    fn check_env(&self, sandbox: &SandboxRef) -> Result<(), Error> {
        match self.0.sandboxes.known(sandbox) {
            Some(Known::Live(record)) if record.env_lost => {
                let message = format!(
                    "the environment of {} cannot be read, because its node has lost the key that \
                     sealed it: no command starts in it",
                    record.id
                );
                Err(Error::new(Reason::EnvLost, message))
            }
            Some(Known::Live(_) | Known::Ended(_)) | None => Ok(()),
        }
    }

    /// Attaches to a command.
    ///
    /// # Errors
    /// EXEC_NOT_FOUND or EXEC_LOST, or as `start`.
    pub async fn attach(
        &self,
        attach: Attach,
        input: mpsc::Receiver<Input>,
    ) -> Result<(Started, Outputs), Error> {
        let deadline = Instant::now() + ATTACH;
        let record = in_time(deadline, self.awake(&attach.sandbox)).await?;
        let message = request::Message::Attach(wire::Attach {
            exec_id: attach.exec_id.clone(),
            stdout_offset: attach.stdout_offset,
            stderr_offset: attach.stderr_offset,
        });
        self.talk(record, attach.exec_id, message, deadline, input).await
    }

    /// Computes the deadlines of a command that is requested now.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            start_by_ms: self.0.sandboxes.moment().after(START).up_ms,
            answer_by: Instant::now() + START + WORD,
        }
    }

    /// Sends a prepared start to the sandbox's shim, and attaches to what it starts.
    pub(super) async fn begin(
        &self,
        record: Arc<Record>,
        mut start: wire::Start,
        limits: Limits,
        input: mpsc::Receiver<Input>,
    ) -> Result<(Started, Outputs), Error> {
        let exec_id = start.exec_id.clone();
        start.start_by_ms = limits.start_by_ms;
        self.talk(record, exec_id, request::Message::Start(start), limits.answer_by, input).await
    }

    async fn talk(
        &self,
        record: Arc<Record>,
        exec_id: String,
        message: request::Message,
        deadline: Instant,
        input: mpsc::Receiver<Input>,
    ) -> Result<(Started, Outputs), Error> {
        let place = self.place()?;
        let (sender, outputs) = mpsc::channel(OUTPUT_MESSAGES);
        let shared = Arc::clone(&self.0);
        // On its own task: a caller that stops waiting leaves no command that nobody ends.
        let begun = self.0.sandboxes.tasks().run(async move {
            let Attachment { started, output, input: to } = {
                let starts = matches!(message, request::Message::Start(_));
                let stream = in_time(deadline, shared.connect(&record)).await?;
                let attached = client::attach(stream, message, deadline).await;
                attached.map_err(|refused| shared.explain(&record, refused, starts))?
            };
            let taken = watch::Sender::new(started.stdin_offset);
            let told = Started {
                boot: record.boot,
                exec_id,
                stdin_offset: started.stdin_offset,
                stdout_offset: started.stdout_offset,
                stderr_offset: started.stderr_offset,
                taken: taken.subscribe(),
            };
            let attached =
                attached::Attached { sandboxes: Arc::clone(&shared.sandboxes), record, taken };
            shared.sandboxes.tasks().spawn(async move {
                attached.run(output, to, input, sender).await;
                drop(place);
            });
            Ok(told)
        });
        // The agent stops and waits no longer, so the task was dropped where it was.
        let dropped = || {
            let message = "the agent stopped while the command was being started";
            Error::new(Reason::OutcomeUnknown, message)
        };
        let started = begun.await.unwrap_or_else(|| Err(dropped()))?;
        Ok((started, outputs))
    }

    /// Creates the part of a sandbox's team in the bytes that are held as a whole. None is needed for a sandbox that
    /// is not there, in which nothing runs.
    pub(in crate::sandbox) fn whole(&self, sandbox: &SandboxRef) -> Option<Part<Team>> {
        match self.0.sandboxes.known(sandbox)? {
            Known::Live(record) => Some(self.0.wholes.part(record.team.clone())),
            Known::Ended(_) => None,
        }
    }

    /// Takes a place of an attached caller.
    fn place(&self) -> Result<OwnedSemaphorePermit, Error> {
        Arc::clone(&self.0.places).try_acquire_owned().map_err(|_| {
            let message = format!("{ATTACHED_MAX} commands are attached to on this node already");
            Error::new(Reason::TooManyCalls, message).retry_after(Duration::from_secs(1))
        })
    }

    /// Acts on a command that runs. Returns how many bytes of stdin it has taken.
    ///
    /// # Errors
    /// As `attach`.
    pub async fn control(
        &self,
        sandbox: &SandboxRef,
        exec_id: String,
        control: Control,
    ) -> Result<u64, Error> {
        let deadline = Instant::now() + CONTROL;
        let record = in_time(deadline, self.awake(sandbox)).await?;
        let message = match control {
            Control::Stdin { offset, data, eof } => {
                request::Message::Stdin(wire::Stdin { exec_id, offset, data, eof })
            }
            Control::Resize(window) => {
                request::Message::Resize(wire::Resize { exec_id, window: Some(size(window)) })
            }
            Control::Signal(number) => {
                let number = u32::try_from(number).unwrap_or_default();
                request::Message::Signal(wire::Signal { exec_id, number })
            }
        };
        let stream = in_time(deadline, self.0.connect(&record)).await?;
        match client::control(stream, message, deadline).await {
            Ok(response::Message::Done(done)) => Ok(done.stdin_offset),
            Ok(_) => Err(failed("its shim answered out of turn".to_owned())),
            Err(refused) => Err(self.0.explain(&record, refused, true)),
        }
    }

    /// Lists the commands of the sandbox: those that run, and the last that have ended. Does not
    /// list the agent's own access to files.
    ///
    /// # Errors
    /// When there is no such sandbox, or it is not up.
    pub async fn list(&self, sandbox: &SandboxRef) -> Result<Vec<ExecInfo>, Error> {
        let mut execs = self.all(sandbox).await?;
        execs.retain(|exec| exec.started_at.is_some_and(|at| at.seconds > 0));
        Ok(execs)
    }

    /// Returns how long ago a command, or an access to files, was last active; `None` when nothing
    /// runs. A command from a shim that does not know counts as active.
    ///
    /// # Errors
    /// As `list`.
    pub async fn inactive(&self, sandbox: &SandboxRef) -> Result<Option<Duration>, Error> {
        let execs = self.all(sandbox).await?;
        let running = execs.iter().filter(|exec| exec.exit.is_none() && exec.lost.is_empty());
        let known = |exec: &ExecInfo| exec.inactive.and_then(duration::read);
        Ok(running.map(|exec| known(exec).unwrap_or_default()).min())
    }

    async fn all(&self, sandbox: &SandboxRef) -> Result<Vec<ExecInfo>, Error> {
        let deadline = Instant::now() + LIST;
        let record = self.0.sandboxes.up(sandbox)?;
        // Without a shim nothing has run in this boot, or not for a long time.
        let Some(stream) = self.0.shims.find(&record).await else { return Ok(Vec::new()) };
        match client::control(stream, request::Message::List(wire::List {}), deadline).await {
            Ok(response::Message::Execs(list)) => Ok(list.execs),
            Ok(_) => Err(failed("its shim answered out of turn".to_owned())),
            Err(refused) => Err(self.0.explain(&record, refused, false)),
        }
    }

    /// Runs a task that ends with the agent.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.sandboxes.tasks().spawn(work);
    }

    /// Returns the sandbox, which runs; wakes a paused one where allowed.
    pub(super) async fn awake(&self, sandbox: &SandboxRef) -> Result<Arc<Record>, Error> {
        let record = self.0.sandboxes.wake(sandbox, Wake::Exec).await?;
        // A process that is started in a frozen container hangs until it is thawed.
        if self.0.sandboxes.pve().frozen(record.vmid).await {
            return Err(Error::new(
                Reason::SandboxNotRunning,
                format!("{} is frozen, not running", record.id),
            ));
        }
        Ok(record)
    }
}

impl Shared {
    /// Connects to the sandbox's shim; starts it if there is none.
    async fn connect(&self, record: &Record) -> Result<UnixStream, Error> {
        let _lock = self.locks.lock(record.id).await;
        if let Some(stream) = self.shims.find(record).await {
            return Ok(stream);
        }
        // An operator may have made another container under the vmid.
        self.sandboxes.check_ours(record).await?;
        self.sandboxes.limit_in_cgroup(record).await?;
        let started = self.shims.start(record).await;
        started.map_err(|error| failed(format!("its shim was not started: {error}")))
    }

    /// Converts a shim's refusal to an error for the caller; a sandbox that does not run comes
    /// first. `acts`: the request changes something, so without an answer its outcome is unknown.
    fn explain(&self, record: &Record, refused: Refused, acts: bool) -> Error {
        let now = self.sandboxes.up(&SandboxRef::Id(record.id));
        match (now, refused) {
            // The request may have been carried out before the sandbox ended.
            (Err(error), refused) if acts && may_be_done(&refused) => Error::new(
                Reason::ExecLost,
                format!("the sandbox ended meanwhile, and what was asked for with it: {error}"),
            ),
            (Err(error), _) => error,
            (Ok(_), Refused::No(reason, message)) => said(reason, message),
            (Ok(_), Refused::Lost(error)) if acts => Error::new(
                Reason::OutcomeUnknown,
                format!("the sandbox's shim was lost, and may have done it: {error}"),
            ),
            (Ok(_), Refused::Lost(error)) => failed(format!("its shim was lost: {error}")),
        }
    }
}

/// Converts the refusal of a shim, which may be newer or older than this agent.
fn said(reason: Reason, message: String) -> Error {
    let known = (reason != Reason::Unspecified).then_some(reason);
    let error = Error::new(known.unwrap_or(Reason::ExecFailed), message);
    if error.reason == Reason::TooManyCalls {
        return error.retry_after(Duration::from_secs(1));
    }
    error
}

/// True when the request may have been carried out.
fn may_be_done(refused: &Refused) -> bool {
    match refused {
        Refused::No(reason, _) => matches!(reason, Reason::OutcomeUnknown | Reason::ExecLost),
        Refused::Lost(_) => true,
    }
}

/// Deadlines of a start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Deadline for starting the command, milliseconds on the clock of `helper::up_ms`.
    start_by_ms: u64,
    /// Deadline for the caller's answer.
    answer_by: Instant,
}

/// Bounds the work that comes before anything is asked of the shim.
async fn in_time<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    timeout_at(deadline, work).await.unwrap_or_else(|_| Err(not_reached()))
}

/// Error for a shim that was not reached: nothing was asked of it.
fn not_reached() -> Error {
    failed("the sandbox's shim could not be reached in time; nothing was done".to_owned())
}

fn failed(message: String) -> Error {
    Error::new(Reason::ExecFailed, message)
}

/// True while the sandbox is still in the boot of `record`.
fn same_boot(sandboxes: &Sandboxes, record: &Record) -> bool {
    let now = sandboxes.up(&SandboxRef::Id(record.id));
    now.is_ok_and(|now| now.boot == record.boot && now.vmid == record.vmid)
}

fn size(window: order::Window) -> WindowSize {
    WindowSize { rows: window.rows.into(), cols: window.columns.into() }
}

/// Builds the shim's start message for a command.
fn start(record: &Record, order: &Order, now_ms: u64) -> Result<wire::Start, Error> {
    let (task, title) = match &order.command {
        Command::Argv(argv) => (helper::Task::Program(argv.clone()), argv.join(" ")),
        Command::Shell(line) => {
            let argv = vec!["bash".to_owned(), "-c".to_owned(), line.clone()];
            (helper::Task::Program(argv), line.clone())
        }
        Command::Sftp => (helper::Task::Sftp, "(sftp)".to_owned()),
    };
    let title = order.title.as_ref().map_or(title, |title| title.0.clone());
    let env = environment(&record.env, &order.env, order.tty.is_some());
    let start = of_task(task, &order.user, order.cwd.clone(), env)?;
    Ok(wire::Start {
        exec_id: order.exec_id.clone().unwrap_or(start.exec_id),
        keep: order.exec_id.is_some(),
        detached: order.detached,
        spare_background: order.spare_background,
        // The largest value means none.
        timeout_ms: order.timeout.map_or(u64::MAX, daemon::clock::millis),
        window: order.tty.map(size),
        title: title.chars().filter(|c| !c.is_control()).take(TITLE_MAX).collect(),
        started_ms: now_ms,
        ..start
    })
}

/// Builds the start message for any task, with a generated `exec_id`.
pub(super) fn of_task(
    task: helper::Task,
    user: &order::User,
    cwd: Option<String>,
    env: BTreeMap<String, String>,
) -> Result<wire::Start, Error> {
    let user = match user {
        order::User::Name(name) => helper::User::Name(name.clone()),
        order::User::Id(uid) => helper::User::Id(*uid),
    };
    let mut order = helper::Order { task, user, cwd, env: env.into_iter().collect() };
    let bytes = |order: &helper::Order| {
        serde_json::to_vec(order).map_err(|error| failed(format!("it cannot be sent: {error}")))
    };
    // The digest covers the caller's order; the mark is another each time.
    let digest = HEXLOWER.encode(&Sha256::digest(bytes(&order)?));
    let mark = HEXLOWER.encode(&random::<16>()?);
    order.env.push((MARK.to_owned(), mark.clone()));
    Ok(wire::Start {
        exec_id: format!("x-{mark}"),
        digest,
        order: bytes(&order)?.into(),
        mark: format!("{MARK}={mark}"),
        ..wire::Start::default()
    })
}

/// Generates bytes that nobody can guess.
fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut random = [0u8; N];
    getrandom::fill(&mut random).map_err(|error| failed(format!("no randomness: {error}")))?;
    Ok(random)
}

#[cfg(test)]
mod tests;
