//! Starts processes; no other module does.
//!
//! Every child has an absolute path, arguments that never pass through a shell, no environment
//! except PATH and LC_ALL=C, its own session, and no inherited descriptors. The caller interprets
//! the exit status.
//!
//! `Runner::run` is for commands that do a job and end. Stdin is empty; output goes to files, never
//! to a pipe of ours (a broken pipe makes `pct` abort a clone half-way); there is a deadline. The
//! command is awaited on a task of its own, so a caller that goes away stops nothing. Nothing is
//! ever killed with SIGKILL: `pct` would leave its locks and mounts behind.
//!
//! `spawn_piped` is for processes to communicate with.

use std::{
    ffi::OsString,
    fmt,
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

/// PATH of every child. PVE's own tools set the same.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most bytes read back of each output: its end, where the tools report errors.
const OUTPUT_BYTES_MAX: u64 = 64 * 1024;

/// Time that a worker gets for its rollback after SIGTERM, before its parent gets SIGTERM too; the
/// parent then gets as much.
const STOP_WAIT: Duration = Duration::from_secs(15);

/// Time after which a command is taken to be mostly waiting: `pct` itself takes one to three
/// seconds. It then gives its turn to the next command.
const TURN_MAX: Duration = Duration::from_secs(10);

/// Most concurrent commands that mostly wait.
const WAITING_MAX: usize = 4;

/// Command line: a program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Absolute path.
    pub path: PathBuf,
    /// Arguments, verbatim.
    pub arguments: Vec<OsString>,
}

/// End of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Exited with this code.
    Code(i32),
    /// Ended by this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        // Without WUNTRACED, wait reports no status other than an exit or a signal.
        status.code().map_or_else(|| Self::Signal(status.signal().unwrap_or(0)), Self::Code)
    }
}

/// Command that has ended by itself.
#[derive(Debug, Clone)]
pub struct Finished {
    /// End of its process.
    pub exit: Exit,
    /// End of its stdout.
    pub stdout: String,
    /// End of its stderr.
    pub stderr: String,
}

/// Result of a run.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Reason why a command did not do its job, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("{path} could not be started")]
    Start { path: PathBuf, source: io::Error },
    /// The command's turn did not come in time; nothing was started.
    #[error("the process waited too long for a free slot")]
    NoTurn,
    /// The command did not end in time and was sent SIGTERM. Its effects must be checked.
    #[error("it did not end in time{}", if *ended { ", and was stopped" } else { " and does not stop" })]
    Deadline {
        /// True when it has ended since.
        ended: bool,
        /// Its output until then.
        said: String,
    },
    /// The task that waited for the command has gone: the agent is shutting down.
    #[error("the agent is shutting down")]
    Gone,
}

/// Tells the processes to which a command has given its work.
pub type IsWorker = fn(&proc::Process) -> bool;

/// Runner of commands that do a job and end. Clones share the state.
#[derive(Debug, Clone)]
pub struct Runner(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    output_dir: PathBuf,
    proc: PathBuf,
    is_worker: IsWorker,
    turns: Semaphore,
    /// Turns of commands that mostly wait.
    waits: Semaphore,
    serial: AtomicU64,
    tracker: TaskTracker,
}

impl Runner {
    /// Creates a runner. Output goes to files in `output_dir`; at most `parallel` commands run at a
    /// time (`pct` is bound by CPU: more commands than cores only slow each other down); workers
    /// are found in `proc` by `is_worker`.
    ///
    /// # Errors
    /// When `output_dir` cannot be made, or files in it that an earlier agent left cannot be removed.
    pub fn new(
        output_dir: PathBuf,
        proc: PathBuf,
        is_worker: IsWorker,
        parallel: usize,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(&output_dir)?;
        // An agent that crashed has left its files. A command of that agent which still runs keeps
        // writing to its open file, whatever the name.
        for entry in std::fs::read_dir(&output_dir)?.flatten() {
            if entry.path().extension().is_some_and(|e| e == "stdout" || e == "stderr") {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self(Arc::new(Shared {
            output_dir,
            proc,
            is_worker,
            turns: Semaphore::new(parallel.max(1)),
            waits: Semaphore::new(WAITING_MAX),
            serial: AtomicU64::new(0),
            tracker: TaskTracker::new(),
        })))
    }

    /// Returns the tracker of the tasks that wait for commands. Closed and awaited at shutdown.
    pub fn tracker(&self) -> &TaskTracker {
        &self.0.tracker
    }

    /// Runs a command to its end, or sends it SIGTERM at the deadline. The wait for its turn
    /// counts.
    pub async fn run(&self, program: Program, deadline: Instant) -> Result<Finished> {
        self.start(program, Kind::Works, deadline).await
    }

    /// Runs a command that mostly waits, such as one that sleeps until no other process can have a
    /// file system mounted: it takes no turn from other commands.
    pub async fn run_waiting(&self, program: Program, deadline: Instant) -> Result<Finished> {
        self.start(program, Kind::Waits, deadline).await
    }

    async fn start(&self, program: Program, kind: Kind, deadline: Instant) -> Result<Finished> {
        let shared = Arc::clone(&self.0);
        let task = self.0.tracker.spawn(async move { shared.run(&program, kind, deadline).await });
        task.await.unwrap_or(Err(Error::Gone))
    }
}

/// Resource that a command occupies for most of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// CPU core.
    Works,
    /// None: the command sleeps.
    Waits,
}

impl Shared {
    async fn run(&self, program: &Program, kind: Kind, deadline: Instant) -> Result<Finished> {
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

    /// Sends SIGTERM to the workers first, because they hold the locks and roll back; then to the
    /// command.
    async fn stop(&self, child: &mut Child) -> bool {
        let Some(parent) = child.id() else { return true };
        let (proc, is_worker) = (self.proc.clone(), self.is_worker);
        let workers = tokio::task::spawn_blocking(move || {
            let workers = workers(&proc, parent, is_worker);
            // By pidfd: a pid that was reused meanwhile gets no signal.
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

/// Finds the workers of a running command among its descendants; each leads a session of its own.
fn workers(proc: &Path, parent: u32, is_worker: IsWorker) -> Vec<proc::Process> {
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
    let family = processes.iter().filter(|p| p.pid != parent && family.contains(&p.pid));
    family.filter(|p| is_worker(p)).cloned().collect()
}

fn send(pid: u32, signal: Signal) {
    if let Err(error) = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), signal)) {
        tracing::warn!(pid, %error, "a signal was not sent");
    }
}

/// Files for the output of a command; removed on drop.
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
                tracing::warn!(path = %path.display(), %error, "an output file could not be removed");
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

/// Process to communicate with. When dropped it continues to run, and is still reaped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: u32,
}

impl Running {
    /// Returns its pid, which is also its process group and its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Can be called again: the result stays.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        self.child.wait().await.map(Exit::from)
    }

    /// Sends a signal to its process group, unless it has been waited for: then the pid may have
    /// been reused.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.child.id().map(i32::try_from) {
            Some(Ok(group)) => Ok(killpg(Pid::from_raw(group), signal)?),
            Some(Err(_)) | None => Ok(()),
        }
    }
}

/// Process with three pipes.
#[derive(Debug)]
pub struct Piped {
    /// Stdin of the process; dropping it is end of file.
    pub stdin: ChildStdin,
    /// Stdout of the process.
    pub stdout: ChildStdout,
    /// Stderr of the process.
    pub stderr: ChildStderr,
    /// The process itself.
    pub process: Running,
}

/// Starts `argv` (an absolute path and its arguments) with three pipes, in its own session. `fds`
/// become its descriptors from 3 on.
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

/// Starts `argv` in its own session, to outlive this process. It writes to our stderr. `fds` become
/// its descriptors from 3 on.
pub fn spawn_detached(argv: &[OsString], fds: Vec<OwnedFd>) -> io::Result<()> {
    let mut command = command(&program(argv)?);
    sys::child::own_session(&mut command, fds)?;
    // Dropping the child lets it run on; it is still reaped.
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
