//! Commands of the fake: they live without a caller, and callers attach by offset.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use daemon::status::Refusal;
use proto::{
    Reason,
    sandbox::v1::{
        ExecExit, ExecInfo, ExecRequest, ExecResponse, ExecStart, ExecStarted, exec_request,
        exec_response::Message, exec_start,
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tonic::{Status, Streaming};

use crate::fake::refuse;

/// Bytes that a command may be ahead of its reader.
const AHEAD: usize = 256 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<BTreeMap<String, Arc<Session>>>);

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) start: ExecStart,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    stdin: Vec<u8>,
    taken: u64,
    eof: bool,
    output: [Vec<u8>; 2],
    read: usize,
    signals: Vec<u32>,
    exit: Option<ExecExit>,
    failed: bool,
    vanished: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sessions {
    pub(crate) fn start(&self, start: ExecStart) -> Arc<Session> {
        assert!(!start.exec_id.is_empty(), "every run has a name");
        let mut sessions = locked(&self.0);
        if let Some(session) = sessions.get(&start.exec_id) {
            return session.clone();
        }
        let exec_id = start.exec_id.clone();
        let (state, changed) = (Mutex::default(), watch::channel(0).0);
        let session = Arc::new(Session { start, state, changed });
        sessions.insert(exec_id, session.clone());
        let playing = session.clone();
        tokio::spawn(async move { crate::exec::play(&playing).await });
        session
    }

    pub(crate) fn get(&self, exec_id: &str) -> Result<Arc<Session>, Status> {
        locked(&self.0).get(exec_id).cloned().ok_or_else(|| refuse(Reason::ExecNotFound))
    }

    pub(crate) fn list(&self) -> Vec<ExecInfo> {
        let info = |(exec_id, session): (&String, &Arc<Session>)| {
            let state = session.state();
            ExecInfo {
                exec_id: exec_id.clone(),
                command: match &session.start.command {
                    Some(exec_start::Command::Argv(argv)) => argv.args.join(" "),
                    Some(exec_start::Command::Shell(line)) => line.clone(),
                    Some(exec_start::Command::Sftp(_)) | None => String::new(),
                },
                exit: state.exit,
                stdout_bytes: state.output[0].len() as u64,
                tty: session.start.tty,
                stderr_bytes: state.output[1].len() as u64,
                ..ExecInfo::default()
            }
        };
        locked(&self.0).iter().map(info).collect()
    }

    /// Waits until a command of this name runs.
    pub(crate) async fn until_started(&self, exec_id: &str) {
        let wait = async {
            while self.get(exec_id).is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(30), wait).await.expect("it starts");
    }

    /// Waits until the only command has received `count` signals.
    pub(crate) async fn until_signals(&self, count: usize) {
        let session = locked(&self.0).values().next().cloned().expect("one runs");
        session.until(|state| (state.signals.len() >= count).then_some(())).await;
    }
}

impl Session {
    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.send_modify(|n| *n += 1);
    }

    async fn until<T>(&self, mut reached: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        let wait = async {
            loop {
                if let Some(value) = reached(&mut self.state()) {
                    return value;
                }
                changes.changed().await.expect("the sender is ours");
            }
        };
        timeout(Duration::from_secs(30), wait).await.expect("within the time of a test")
    }

    pub(crate) async fn say(&self, output: usize, bytes: &[u8]) {
        self.until(|state| (state.output[0].len() < state.read + AHEAD).then_some(())).await;
        self.change(|state| state.output[output].extend_from_slice(bytes));
    }

    pub(crate) async fn stdin(&self) -> Option<Vec<u8>> {
        let some = |state: &mut State| {
            let some = !state.stdin.is_empty() || state.eof;
            some.then(|| std::mem::take(&mut state.stdin))
        };
        Some(self.until(some).await).filter(|bytes| !bytes.is_empty())
    }

    pub(crate) async fn signalled(&self, ignored: &[u32]) -> u32 {
        let heeded = |state: &mut State| {
            state.signals.iter().find(|signal| !ignored.contains(signal)).copied()
        };
        self.until(heeded).await
    }

    pub(crate) fn signal(&self, signal: u32) {
        self.change(|state| {
            state.signals.push(signal);
            if signal == 9 && state.exit.is_none() {
                state.exit = Some(ExecExit { code: 137, signal, timed_out: false });
            }
        });
    }

    pub(crate) fn end(&self, exit: ExecExit) {
        self.change(|state| state.exit = state.exit.or(Some(exit)));
    }

    pub(crate) fn fail(&self) {
        self.change(|state| state.failed = true);
    }

    pub(crate) fn vanish(&self) {
        self.change(|state| state.vanished = true);
    }

    pub(crate) fn input(&self, message: exec_request::Message) {
        self.change(|state| match message {
            exec_request::Message::Stdin(bytes) => {
                state.taken += bytes.len() as u64;
                state.stdin.extend_from_slice(&bytes);
            }
            exec_request::Message::StdinEof(eof) => state.eof |= eof,
            exec_request::Message::Start(_)
            | exec_request::Message::Attach(_)
            | exec_request::Message::Resize(_)
            | exec_request::Message::Signal(_) => {}
        });
    }
}

/// Passes the caller's messages to the command, until the caller has gone.
pub(crate) async fn feed(session: Arc<Session>, mut messages: Streaming<ExecRequest>) {
    while let Ok(Some(request)) = messages.message().await {
        request.message.into_iter().for_each(|message| session.input(message));
    }
}

/// Sends the command's output, until one of the two has gone or the stream is to break.
pub(crate) async fn relay(
    session: Arc<Session>,
    mut from: [u64; 2],
    to: mpsc::Sender<Result<ExecResponse, Status>>,
    cut: Option<usize>,
) {
    let mut left = cut.unwrap_or(usize::MAX);
    let started = ExecStarted {
        node: "node2".into(),
        boot: 1,
        exec_id: session.start.exec_id.clone(),
        stdin_offset: session.state().taken,
        stdout_offset: from[0],
        stderr_offset: from[1],
    };
    let mut message = Ok(Message::Started(started));
    loop {
        if left == 0 {
            to.send(Err(Status::unavailable("the connection broke"))).await.ok();
            return;
        }
        left -= 1;
        let over =
            !matches!(message, Ok(Message::Started(_) | Message::Stdout(_) | Message::Stderr(_)));
        let response = message.map(|message| ExecResponse { message: Some(message) });
        if to.send(response).await.is_err() || over {
            return;
        }
        let next = session.until(|state| {
            for n in [0, 1] {
                let at = usize::try_from(from[n]).expect("small");
                if let Some(part) = state.output[n].get(at..).filter(|part| !part.is_empty()) {
                    let part = &part[..part.len().min(65536)];
                    from[n] += part.len() as u64;
                    state.read = state.read.max(at + part.len());
                    let bytes = part.to_vec().into();
                    let message =
                        if n == 0 { Message::Stdout(bytes) } else { Message::Stderr(bytes) };
                    return Some(Some(Ok(message)));
                }
            }
            let refused = || Refusal::new(Reason::ExecFailed, "no such program").into();
            match state.exit {
                Some(exit) => Some(Some(Ok(Message::Exit(exit)))),
                None if state.failed => Some(Some(Err(refused()))),
                None => state.vanished.then_some(None),
            }
        });
        let Some(next) = next.await else { return };
        session.changed.send_modify(|n| *n += 1);
        message = next;
    }
}
