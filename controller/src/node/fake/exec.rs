//! Commands of the fake agent: sessions that live without a caller, are attached to by offset, and
//! whose streams break where a test says.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use daemon::sync::Mutex;
use proto::{
    Reason,
    agent::v1::{self as wire, ControlExecRequest, ExecRequest, control_exec_request::Action},
    sandbox::v1::{
        self as api, ExecExit, ExecStart, exec_request::Message as In,
        exec_response::Message as Out,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::{FakeAgent, answers::refuse};

/// Bytes that a command may be ahead of its readers, and its stdin of it.
const AHEAD: usize = 64 * 1024;
/// Bytes of one message of output.
const CHUNK: usize = 16 * 1024;

/// Program that a test runs in place of a made-up one.
#[expect(missing_debug_implementations, reason = "streams of a test")]
pub struct Program {
    /// Stdin; dropped at its end.
    pub stdin: Box<dyn AsyncWrite + Send + Unpin>,
    /// Stdout.
    pub stdout: Box<dyn AsyncRead + Send + Unpin>,
    /// Stderr.
    pub stderr: Box<dyn AsyncRead + Send + Unpin>,
    /// End of the program.
    pub exit: Pin<Box<dyn Future<Output = ExecExit> + Send>>,
}

/// Starts programs of a test; `None` for a command that is made up as usual.
pub type Runner = fn(&ExecStart) -> Option<Program>;

/// All commands of an agent.
#[derive(Debug, Default)]
pub(super) struct Execs {
    sessions: BTreeMap<(String, String), Arc<Session>>,
    /// Number of commands that were started.
    pub(super) started: u32,
    /// Sizes of the messages with stdin that came on streams.
    stdin_sizes: Vec<usize>,
    runner: Option<Runner>,
}

#[derive(Debug)]
pub(super) struct Session {
    start: ExecStart,
    exec_id: String,
    /// Place in the order of starts.
    number: u32,
    boot: u32,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    stdin: Vec<u8>,
    taken: u64,
    eof: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Bytes of stdout that were sent to a reader.
    read: usize,
    signal: Option<u32>,
    window: Option<api::WindowSize>,
    exit: Option<ExecExit>,
    vanished: bool,
    attached: u32,
}

impl Session {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state.lock());
        self.changed.send_modify(|n| *n += 1);
        changed
    }

    async fn until<T>(&self, mut reached: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            if let Some(value) = reached(&mut self.state.lock()) {
                return value;
            }
            // The sender belongs to this session.
            drop(changes.changed().await);
        }
    }

    async fn print(&self, bytes: &[u8]) {
        self.until(|state| (state.stdout.len() < state.read + AHEAD).then_some(())).await;
        self.change(|state| state.stdout.extend_from_slice(bytes));
    }

    /// Runs the command: `cat` returns its stdin, `drink` takes it and says nothing, `sleep` waits for a signal, `yes`
    /// never stops, `drip` writes a byte when the one before was sent, `count` writes as many bytes as its second word
    /// says; any other ends with its second word as exit code.
    async fn run(self: Arc<Self>, runner: Option<Runner>) {
        if let Some(program) = runner.and_then(|runner| runner(&self.start)) {
            return self.run_program(program).await;
        }
        let words = match &self.start.command {
            Some(api::exec_start::Command::Argv(argv)) => argv.args.clone(),
            Some(api::exec_start::Command::Shell(line)) => {
                line.split(' ').map(ToString::to_string).collect()
            }
            Some(api::exec_start::Command::Sftp(_)) | None => Vec::new(),
        };
        let number = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        let mut exit = ExecExit { code: number, ..ExecExit::default() };
        match words.first().map(String::as_str) {
            Some("cat") => loop {
                let bytes = self
                    .until(|state| {
                        let some = !state.stdin.is_empty() || state.eof;
                        some.then(|| std::mem::take(&mut state.stdin))
                    })
                    .await;
                if bytes.is_empty() {
                    break;
                }
                self.print(&bytes).await;
            },
            Some("drink") => loop {
                let some = |state: &mut State| !state.stdin.is_empty() || state.eof;
                let bytes =
                    self.until(|state| some(state).then(|| std::mem::take(&mut state.stdin))).await;
                // What waits for room in stdin sees it.
                self.changed.send_modify(|n| *n += 1);
                if bytes.is_empty() {
                    break;
                }
            },
            Some("sleep") => {
                let signal = self.until(|state| state.signal).await;
                exit = ExecExit { code: 128 + signal, signal, timed_out: false };
            }
            Some("yes") => loop {
                self.print(&[b'y'; 32 * 1024]).await;
            },
            Some("drip") => loop {
                let read = |state: &mut State| (state.read == state.stdout.len()).then_some(());
                self.until(read).await;
                self.print(b"d").await;
            },
            Some("count") => {
                let bytes = counted(number as usize);
                for (n, part) in bytes.chunks(7001).enumerate() {
                    self.print(part).await;
                    if n % 3 == 0 {
                        self.change(|state| state.stderr.extend_from_slice(part));
                    }
                }
                exit.code = 5;
            }
            Some("vanish") => return self.change(|state| state.vanished = true),
            _ => {}
        }
        self.change(|state| state.exit = Some(exit));
    }

    /// Runs a program of the test, until it has ended and all of its output is read.
    async fn run_program(self: Arc<Self>, program: Program) {
        let Program { mut stdin, mut stdout, mut stderr, exit } = program;
        let this = self.clone();
        let feed = tokio::spawn(async move {
            loop {
                let some = |state: &mut State| !state.stdin.is_empty() || state.eof;
                let bytes =
                    this.until(|state| some(state).then(|| std::mem::take(&mut state.stdin))).await;
                // What waits for room in stdin sees it.
                this.changed.send_modify(|n| *n += 1);
                if bytes.is_empty() || stdin.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        let out = async {
            let mut bytes = vec![0; CHUNK];
            while let Ok(count @ 1..) = stdout.read(&mut bytes).await {
                self.print(&bytes[..count]).await;
            }
        };
        let err = async {
            let mut bytes = vec![0; CHUNK];
            while let Ok(count @ 1..) = stderr.read(&mut bytes).await {
                self.change(|state| state.stderr.extend_from_slice(&bytes[..count]));
            }
        };
        let signalled = self.until(|state| state.signal);
        let exit = async {
            tokio::select! {
                exit = exit => exit,
                signal = signalled => ExecExit { code: 128 + signal, signal, timed_out: false },
            }
        };
        let ended = async { tokio::join!(exit, out, err).0 };
        let exit = ended.await;
        feed.abort();
        self.change(|state| state.exit = Some(exit));
    }

    /// Takes the bytes of stdin at `offset` that fit.
    fn feed(&self, offset: u64, data: &[u8], eof: bool) -> Result<u64, Status> {
        self.change(|state| {
            let Some(skip) = state.taken.checked_sub(offset) else {
                return refuse(Reason::FieldInvalid, "there is a gap");
            };
            let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(data.len());
            let new = &data[skip..];
            let fit = new.len().min(AHEAD.saturating_sub(state.stdin.len()));
            state.stdin.extend_from_slice(&new[..fit]);
            state.taken += fit as u64;
            state.eof |= eof && fit == new.len();
            Ok(state.taken)
        })
    }

    async fn receive(self: Arc<Self>, mut input: Streaming<ExecRequest>, line: Arc<Line>) {
        while let Ok(message) = input.message().await {
            if line.broken() {
                return;
            }
            let Some(message) = message else {
                // A caller that knows the exec_id may come back.
                if self.start.exec_id.is_empty() {
                    self.change(|state| state.eof = true);
                }
                return;
            };
            match message.message.and_then(|message| message.message) {
                Some(In::Stdin(bytes)) => {
                    line.agent.world.lock().execs.stdin_sizes.push(bytes.len());
                    let room = |state: &mut State| (state.stdin.len() < AHEAD).then_some(());
                    self.until(room).await;
                    if line.is_broken() {
                        return;
                    }
                    self.change(|state| {
                        state.stdin.extend_from_slice(&bytes);
                        state.taken += bytes.len() as u64;
                    });
                }
                Some(In::StdinEof(eof)) => self.change(|state| state.eof |= eof),
                Some(In::Resize(window)) => self.change(|state| state.window = Some(window)),
                Some(In::Signal(signal)) => self.change(|state| state.signal = Some(signal)),
                Some(In::Start(_) | In::Attach(_)) | None => {}
            }
        }
    }

    async fn send(
        self: Arc<Self>,
        started: api::ExecStarted,
        out: mpsc::Sender<(Out, u64)>,
        line: Arc<Line>,
        hung_up: CancellationToken,
    ) {
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let (mut stdout, mut stderr) = (at(started.stdout_offset), at(started.stderr_offset));
        self.change(|state| state.attached += 1);
        let mut message = Some(Out::Started(started));
        while let Some(next) = message {
            let over = matches!(next, Out::Exit(_));
            let taken = self.state.lock().taken;
            let sent = hung_up.run_until_cancelled(out.send((next, taken)));
            if line.broken() || !matches!(sent.await, Some(Ok(()))) || over {
                break;
            }
            let news = self.until(|state| {
                let part = |all: &Vec<u8>, from: usize| {
                    Bytes::copy_from_slice(&all[from..all.len().min(from + CHUNK)])
                };
                if state.stdout.len() > stdout {
                    let bytes = part(&state.stdout, stdout);
                    stdout += bytes.len();
                    state.read = state.read.max(stdout);
                    return Some(Some(Out::Stdout(bytes)));
                }
                if state.stderr.len() > stderr {
                    let bytes = part(&state.stderr, stderr);
                    stderr += bytes.len();
                    return Some(Some(Out::Stderr(bytes)));
                }
                match state.exit {
                    Some(exit) => Some(Some(Out::Exit(exit))),
                    None => state.vanished.then_some(None),
                }
            });
            message = tokio::select! {
                news = news => news,
                () = out.closed() => break,
                () = hung_up.cancelled() => break,
            };
            self.changed.send_modify(|n| *n += 1);
        }
        self.change(|state| state.attached -= 1);
    }
}

/// Returns the output of `count`.
pub fn counted(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n % 251) as u8 ^ (n / 251 % 253) as u8).collect()
}

/// One stream, which breaks after a number of messages of either side.
#[derive(Debug)]
struct Line {
    agent: Arc<FakeAgent>,
    left: Option<AtomicU32>,
    broken: AtomicBool,
}

impl Line {
    /// Counts a message; true when it is lost with the connection.
    fn broken(&self) -> bool {
        let Some(left) = &self.left else { return false };
        let spend = |left: u32| left.checked_sub(1);
        if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_err() {
            if !self.broken.swap(true, Ordering::SeqCst) {
                self.agent.net.cut(&self.agent.name);
            }
            return true;
        }
        self.is_broken()
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
}

impl FakeAgent {
    /// Runs programs of a test from now on.
    pub fn run_with(&self, runner: Runner) {
        self.world.lock().execs.runner = Some(runner);
    }

    /// Returns how the last command was started, and the last size of its terminal.
    pub fn last_command(&self) -> Option<(ExecStart, Option<api::WindowSize>)> {
        let world = self.world.lock();
        let last = world.execs.sessions.values().max_by_key(|session| session.number)?;
        let window = last.state.lock().window;
        Some((last.start.clone(), window))
    }

    /// Returns the number of commands that were started, whatever became of them.
    pub fn commands(&self) -> u32 {
        self.world.lock().execs.started
    }

    /// Returns the sizes of the messages with stdin that came on streams.
    pub fn stdin_sizes(&self) -> Vec<usize> {
        self.world.lock().execs.stdin_sizes.clone()
    }

    /// Breaks streams of commands: the next one after the first number of messages, and so on.
    pub fn break_streams(&self, after: impl IntoIterator<Item = u32>) {
        self.world.lock().breaks = after.into_iter().collect::<VecDeque<_>>();
    }

    fn session(&self, id: &str, exec_id: &str) -> Result<Arc<Session>, Status> {
        let boot = self.get(id)?.boot;
        let key = (id.to_owned(), exec_id.to_owned());
        match self.world.lock().execs.sessions.get(&key) {
            Some(session) if session.boot == boot => Ok(session.clone()),
            Some(_) => refuse(Reason::ExecLost, "lost with its boot"),
            None => refuse(Reason::ExecNotFound, "no such command"),
        }
    }

    fn launch(&self, start: ExecStart, boot: u32) -> Result<Arc<Session>, Status> {
        if !start.exec_id.is_empty() {
            match self.session(&start.id, &start.exec_id) {
                Ok(session) if session.start == start => return Ok(session),
                Ok(_) => return refuse(Reason::ExecIdReused, "another"),
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status),
            }
        }
        let execs = &mut self.world.lock().execs;
        execs.started += 1;
        let exec_id = match start.exec_id.as_str() {
            "" => format!("made-up-{}", execs.started),
            given => given.to_owned(),
        };
        let session = Arc::new(Session {
            exec_id: exec_id.clone(),
            number: execs.started,
            boot,
            state: Mutex::default(),
            changed: watch::channel(0).0,
            start: start.clone(),
        });
        execs.sessions.insert((start.id, exec_id), session.clone());
        tokio::spawn(session.clone().run(execs.runner));
        Ok(session)
    }

    /// Starts a command, or attaches to one. Each message comes with the stdin that the command has taken by then.
    pub(super) async fn exec(
        self: &Arc<Self>,
        mut input: Streaming<ExecRequest>,
    ) -> Result<mpsc::Receiver<(Out, u64)>, Status> {
        let first = input.message().await?.unwrap_or_default();
        let (stream_id, first) = (first.stream_id, first.message.and_then(|m| m.message));
        let (id, start, offsets) = match first {
            Some(In::Start(start)) => (start.id.clone(), Ok(start), (0, 0)),
            Some(In::Attach(attach)) => {
                let offsets = (attach.stdout_offset, attach.stderr_offset);
                (attach.id, Err(attach.exec_id), offsets)
            }
            _ => return refuse(Reason::FieldInvalid, "start first"),
        };
        let sandbox = self.get(&id)?;
        if sandbox.phase() != api::Phase::Running {
            return refuse(Reason::SandboxNotRunning, "not running");
        }
        let session = match start {
            Ok(start) => self.launch(start, sandbox.boot)?,
            Err(exec_id) => self.session(&id, &exec_id)?,
        };
        if self.world.lock().faults.mute_execs {
            std::future::pending::<()>().await;
        }
        let (stdin_offset, stdout, stderr) = {
            let state = session.state.lock();
            (state.taken, state.stdout.len() as u64, state.stderr.len() as u64)
        };
        let forgets = self.world.lock().faults.forgets_output;
        let kept = |from: u64, end: u64| if forgets { end } else { from.min(end) };
        let started = api::ExecStarted {
            node: self.name.to_string(),
            boot: sandbox.boot,
            exec_id: session.exec_id.clone(),
            stdin_offset,
            stdout_offset: kept(offsets.0, stdout),
            stderr_offset: kept(offsets.1, stderr),
        };
        let left = self.world.lock().breaks.pop_front().map(AtomicU32::new);
        let line = Arc::new(Line { agent: self.clone(), left, broken: AtomicBool::new(false) });
        let (out, messages) = mpsc::channel(1);
        let hung_up = CancellationToken::new();
        self.world.lock().streams.insert(stream_id, hung_up.clone());
        let receive = session.clone().receive(input, line.clone());
        tokio::spawn(hung_up.clone().run_until_cancelled_owned(receive));
        tokio::spawn(session.send(started, out, line, hung_up));
        Ok(messages)
    }

    pub(super) fn control(&self, request: ControlExecRequest) -> Result<u64, Status> {
        let session = match &request.action {
            Some(Action::WriteStdin(write)) => self.session(&write.id, &write.exec_id)?,
            Some(Action::Resize(resize)) => self.session(&resize.id, &resize.exec_id)?,
            Some(Action::Signal(signal)) => self.session(&signal.id, &signal.exec_id)?,
            Some(Action::HangUp(stream)) => {
                if let Some(stream) = self.world.lock().streams.remove(&stream.stream_id) {
                    stream.cancel();
                }
                return Ok(0);
            }
            None => return refuse(Reason::FieldInvalid, "no action"),
        };
        match request.action {
            Some(Action::WriteStdin(write)) => {
                return session.feed(write.offset, &write.data, write.eof);
            }
            Some(Action::Resize(resize)) => session.change(|state| state.window = resize.window),
            Some(Action::Signal(signal)) => {
                session.change(|state| state.signal = Some(signal.signal));
            }
            Some(Action::HangUp(_)) | None => {}
        }
        let taken = session.state.lock().taken;
        Ok(taken)
    }

    /// Reports the commands of all sandboxes, in two parts.
    pub(super) fn told_commands(&self) -> Vec<wire::WatchExecs> {
        let world = self.world.lock();
        if world.faults.tells_no_commands {
            return Vec::new();
        }
        let mut told = BTreeMap::<String, wire::SandboxExecs>::new();
        let living = world.sandboxes.values().filter(|sandbox| !sandbox.phase().has_ended());
        for sandbox in living {
            let kept_bytes = world.kept.get(&sandbox.id).copied().unwrap_or_default();
            let of_it = told.entry(sandbox.id.clone()).or_default();
            (of_it.id, of_it.kept_bytes) = (sandbox.id.clone(), kept_bytes);
            let boots = world.execs.sessions.iter().filter(|((id, _), session)| {
                let state = session.state.lock();
                *id == sandbox.id
                    && session.boot == sandbox.boot
                    && sandbox.phase() == api::Phase::Running
                    && !session.start.exec_id.is_empty()
                    && state.exit.is_none()
                    && !state.vanished
            });
            of_it.running = boots.map(|((_, exec_id), _)| exec_id.clone()).collect();
        }
        told.retain(|_, of_it| of_it.kept_bytes > 0 || !of_it.running.is_empty());
        let mut first: Vec<_> = told.into_values().collect();
        let second = first.split_off(first.len() / 2);
        vec![
            wire::WatchExecs { sandboxes: first, more: true },
            wire::WatchExecs { sandboxes: second, more: false },
        ]
    }

    pub(super) fn execs(&self, id: &str) -> Result<Vec<api::ExecInfo>, Status> {
        self.get(id)?;
        let world = self.world.lock();
        let of_it = world.execs.sessions.iter().filter(|((of, _), _)| of == id);
        let info = of_it.map(|((_, exec_id), session)| {
            let state = session.state.lock();
            api::ExecInfo {
                exec_id: exec_id.clone(),
                command: format!("{:?}", session.start.command),
                exit: state.exit,
                stdout_bytes: state.stdout.len() as u64,
                stderr_bytes: state.stderr.len() as u64,
                attached: state.attached,
                tty: session.start.tty,
                ..api::ExecInfo::default()
            }
        });
        Ok(info.collect())
    }
}
