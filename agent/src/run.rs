//! The only place that starts processes.
//!
//! What holds for every child: an absolute path, arguments that never pass through a shell, no
//! environment but PATH and LC_ALL=C, its own session, no inherited descriptors.
//! What an exit status means is the caller's to say.
//!
//! `Runner::run` is for commands that do a job and end: stdin is empty; output goes to files, never
//! to a pipe of ours (a broken pipe makes `pct` abort a clone half-way); there is a deadline. The
//! command is awaited on a task of its own: a caller that goes away stops nothing. Nothing is ever
//! killed with SIGKILL: `pct` would leave its locks and mounts behind.
//!
//! `spawn_piped` is for processes that somebody talks with.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::sys::{self, pidfd, proc};

/// What a child finds programs by. PVE's own tools set the same.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes of each output that are read back: its end, where the tools say what went wrong.
const OUTPUT_BYTES_MAX: u64 = 64 * 1024;

/// How long a worker that was told to stop gets for its rollback before its parent is told too,
/// and how long the parent gets then.
const STOP_WAIT: Duration = Duration::from_secs(15);

/// A command that runs for longer than this mostly waits: `pct` itself takes one to three seconds. It
/// gives its turn to the next.
const TURN_MAX: Duration = Duration::from_secs(10);

/// Commands that mostly wait, at a time.
const WAITING_MAX: usize = 4;

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Absolute path.
    pub path: PathBuf,
    /// Arguments, verbatim.
    pub arguments: Vec<OsString>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        // A status that is no exit and no signal is not reported by wait without WUNTRACED.
        status.code().map_or_else(|| Self::Signal(status.signal().unwrap_or(0)), Self::Code)
    }
}

/// A command that ended by itself.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How.
    pub exit: Exit,
    /// The end of its stdout.
    pub stdout: String,
    /// The end of its stderr.
    pub stderr: String,
}

/// A command that did no job, or none that is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("{path} could not be started")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its turn did not come in time; nothing was started.
    #[error("its turn did not come in time")]
    NoTurn,
    /// It did not end in time and was told to stop. What it did must be looked at.
    #[error("it did not end in time{}", if *ended { ", and was stopped" } else { " and does not stop" })]
    Deadline {
        /// It has ended since.
        ended: bool,
        /// What it had said by then.
        said: String,
    },
    /// The task that waited for it has gone: the agent is shutting down.
    #[error("the agent is shutting down")]
    Gone,
}

/// Runs commands that do a job and end. Clones share it.
#[derive(Debug, Clone)]
pub struct Runner(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    output_dir: PathBuf,
    proc: PathBuf,
    turns: Semaphore,
    /// Turns of those that mostly wait.
    waits: Semaphore,
    serial: AtomicU64,
    tracker: TaskTracker,
}

impl Runner {
    /// Output goes to files in `output_dir`; at most `parallel` commands run at a time (`pct` is
    /// bound by CPU: more than the cores only makes each slower); workers are found in `proc`.
    pub fn new(output_dir: PathBuf, proc: PathBuf, parallel: usize) -> io::Result<Self> {
        std::fs::create_dir_all(&output_dir)?;
        // A life of the agent that was cut short left its files; a command of it that still runs
        // keeps writing to the open file, whatever its name.
        for entry in std::fs::read_dir(&output_dir)?.flatten() {
            if entry.path().extension().is_some_and(|e| e == "stdout" || e == "stderr") {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self(Arc::new(Shared {
            output_dir,
            proc,
            turns: Semaphore::new(parallel.max(1)),
            waits: Semaphore::new(WAITING_MAX),
            serial: AtomicU64::new(0),
            tracker: TaskTracker::new(),
        })))
    }

    /// The tasks that wait for commands. Closed and awaited at shutdown.
    pub fn tracker(&self) -> &TaskTracker {
        &self.0.tracker
    }

    /// Runs a command to its end, or tells it to stop at the deadline. Waiting for its turn counts.
    pub async fn run(&self, program: Program, deadline: Instant) -> Result<Finished, Error> {
        self.start(program, Kind::Works, deadline).await
    }

    /// The same for a command that mostly waits, such as one that sleeps until nobody else can have a
    /// file system mounted: it keeps nobody else's command waiting for a turn.
    pub async fn run_waiting(
        &self,
        program: Program,
        deadline: Instant,
    ) -> Result<Finished, Error> {
        self.start(program, Kind::Waits, deadline).await
    }

    async fn start(
        &self,
        program: Program,
        kind: Kind,
        deadline: Instant,
    ) -> Result<Finished, Error> {
        let shared = Arc::clone(&self.0);
        let task = self.0.tracker.spawn(async move { shared.run(&program, kind, deadline).await });
        task.await.unwrap_or(Err(Error::Gone))
    }
}

/// The resource that a command takes for most of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A core.
    Works,
    /// None: it sleeps.
    Waits,
}

impl Shared {
    async fn run(
        &self,
        program: &Program,
        kind: Kind,
        deadline: Instant,
    ) -> Result<Finished, Error> {
        let turns = if kind == Kind::Works { &self.turns } else { &self.waits };
        let turn = timeout_at(deadline, turns.acquire()).await;
        let mut turn = turn.map_err(|_| Error::NoTurn)?.map_err(|_| Error::Gone)?;
        let start = |source| Error::Start { path: program.path.clone(), source };
        let mut output =
            Output::create(&self.output_dir, self.serial.fetch_add(1, Ordering::Relaxed))
                .map_err(start)?;
        let mut command = command(program);
        sys::child::own_session(&mut command, Vec::new()).map_err(start)?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output.stdout.try_clone().map_err(start)?)
            .stderr(output.stderr.try_clone().map_err(start)?)
            .spawn()
            .map_err(start)?;
        let mut status = None;
        if kind == Kind::Works {
            let until = deadline.min(Instant::now() + TURN_MAX);
            status = timeout_at(until, child.wait()).await.ok();
            if status.is_none()
                && let Ok(wait) = self.waits.try_acquire()
            {
                turn = wait;
            }
        }
        let ended = match status {
            Some(status) => Ok(status),
            None => timeout_at(deadline, child.wait()).await,
        };
        drop(turn);
        let Ok(status) = ended else {
            let ended = self.stop(&mut child).await;
            let (stdout, stderr) = output.read();
            return Err(Error::Deadline { ended, said: stdout + &stderr });
        };
        let exit = status.map_err(start)?.into();
        let (stdout, stderr) = output.read();
        Ok(Finished { exit, stdout, stderr })
    }

    /// TERM to the workers first, because they hold the locks and roll back; then to the command.
    async fn stop(&self, child: &mut Child) -> bool {
        let Some(parent) = child.id() else { return true };
        let proc = self.proc.clone();
        let workers = tokio::task::spawn_blocking(move || {
            let workers = workers(&proc, parent);
            // By pidfd: a number that has become somebody else's by now gets no signal.
            for worker in &workers {
                let same = || proc::kin(&proc, worker.pid).is_some_and(|k| k.start == worker.start);
                if let Err(error) = pidfd::signal(worker.pid, Signal::SIGTERM as i32, same) {
                    tracing::warn!(pid = worker.pid, %error, "a signal was not sent");
                }
            }
            workers
        });
        let workers = workers.await.unwrap_or_default();
        if !workers.is_empty() && ends(child).await {
            return true;
        }
        send(parent, Signal::SIGTERM);
        ends(child).await
    }
}

async fn ends(child: &mut Child) -> bool {
    timeout_at(Instant::now() + STOP_WAIT, child.wait()).await.is_ok()
}

/// The workers of a `pct` that runs: its descendants that are PVE tasks. PVE writes the task's
/// UPID over a worker's argv, and each is the leader of a session of its own.
fn workers(proc: &Path, parent: u32) -> Vec<proc::Process> {
    let processes = proc::host_processes(proc);
    let mut family = vec![parent];
    // Forks nest a few deep at most; each round finds one generation.
    for _ in 0..8 {
        let born = |p: &&proc::Process| family.contains(&p.parent) && !family.contains(&p.pid);
        let children: Vec<u32> = processes.iter().filter(born).map(|p| p.pid).collect();
        if children.is_empty() {
            break;
        }
        family.extend(children);
    }
    let is_task = |p: &&proc::Process| p.argv.first().is_some_and(|a| a.starts_with("task UPID:"));
    let family = processes.iter().filter(|p| p.pid != parent && family.contains(&p.pid));
    family.filter(is_task).cloned().collect()
}

fn send(pid: u32, signal: Signal) {
    if let Err(error) = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), signal)) {
        tracing::warn!(pid, %error, "a signal was not sent");
    }
}

/// The files that a command writes to; removed when dropped.
#[derive(Debug)]
struct Output {
    stdout: File,
    stderr: File,
    paths: [PathBuf; 2],
}

impl Output {
    fn create(dir: &Path, serial: u64) -> io::Result<Self> {
        let paths = ["stdout", "stderr"].map(|kind| dir.join(format!("{serial}.{kind}")));
        let create =
            |path: &Path| File::options().read(true).append(true).create_new(true).open(path);
        Ok(Self { stdout: create(&paths[0])?, stderr: create(&paths[1])?, paths })
    }

    fn read(&mut self) -> (String, String) {
        (tail(&mut self.stdout), tail(&mut self.stderr))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "an output file was not removed");
            }
        }
    }
}

fn tail(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = file.metadata().and_then(|metadata| {
        file.seek(SeekFrom::Start(metadata.len().saturating_sub(OUTPUT_BYTES_MAX)))?;
        file.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(its output could not be read: {error})"),
    }
}

fn command(program: &Program) -> Command {
    assert!(program.path.is_absolute(), "programs are named by absolute path");
    #[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
    let mut command = Command::new(&program.path);
    command
        .args(&program.arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .current_dir("/");
    command
}

/// A process that somebody talks with. When dropped it runs on; it is reaped all the same.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: u32,
}

impl Running {
    /// Its pid, which is also its process group and its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Can be called again: the answer stays.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        self.child.wait().await.map(Exit::from)
    }

    /// Sends a signal to its process group, unless it has been waited for: then the number may be
    /// somebody else's.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.child.id().map(i32::try_from) {
            Some(Ok(group)) => Ok(killpg(Pid::from_raw(group), signal)?),
            Some(Err(_)) | None => Ok(()),
        }
    }
}

/// A process with three pipes.
#[derive(Debug)]
pub struct Piped {
    /// Its stdin; dropping it is end of file.
    pub stdin: ChildStdin,
    /// Its stdout.
    pub stdout: ChildStdout,
    /// Its stderr.
    pub stderr: ChildStderr,
    /// The process.
    pub process: Running,
}

/// Starts `argv` (an absolute path and its arguments) with three pipes, in a session of its own.
/// `fds` are its descriptors from 3 on.
pub fn spawn_piped(argv: &[OsString], fds: Vec<OwnedFd>) -> io::Result<Piped> {
    let mut command = command(&program(argv)?);
    sys::child::own_session(&mut command, fds)?;
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = running(pipes.spawn()?)?;
    let gone = || io::Error::other("a pipe was not made");
    Ok(Piped {
        stdin: process.child.stdin.take().ok_or_else(gone)?,
        stdout: process.child.stdout.take().ok_or_else(gone)?,
        stderr: process.child.stderr.take().ok_or_else(gone)?,
        process,
    })
}

/// Starts `argv` in a session of its own, to outlive this process. It says what it has to say on
/// our stderr. `fds` are its descriptors from 3 on.
pub fn spawn_detached(argv: &[OsString], fds: Vec<OwnedFd>) -> io::Result<()> {
    let mut command = command(&program(argv)?);
    sys::child::own_session(&mut command, fds)?;
    // Whoever drops it lets it run on; it is reaped all the same.
    drop(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
    Ok(())
}

fn program(argv: &[OsString]) -> io::Result<Program> {
    let (path, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Program { path: path.into(), arguments: arguments.to_vec() })
}

fn running(child: Child) -> io::Result<Running> {
    let pid = child.id().ok_or_else(|| io::Error::other("the process has no pid"))?;
    Ok(Running { child, pid })
}

#[cfg(test)]
mod tests;
