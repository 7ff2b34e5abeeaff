//! `Exec` on the wire: converts the messages of both directions. A caller that disconnects drops
//! the outputs, which hangs up; a caller that closes its half sends no more input.

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use daemon::{status::Refusal, sync::Mutex};
use proto::{
    Reason,
    agent::v1 as agent,
    exec,
    id::Invalid,
    sandbox::v1::{self as wire, exec_request, exec_response, exec_start},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, Streaming};

use super::{Answer, status::refusal};
use crate::sandbox::exec::{
    Execs, Outputs,
    order::{self, Command, Input, Order, Output, Title, Window},
};

/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Most messages in transit, for each direction. What is behind them waits in the window of its stream.
const MESSAGES: usize = 1;
/// Bytes of stdin that the command takes before the controller is told: a message for each key that somebody presses
/// would cost more than a few bytes that are kept.
const TOLD_BYTES: u64 = 32 * 1024;
/// Terminal size unless the caller sets one.
const WINDOW_DEFAULT: Window = Window { rows: 24, columns: 80 };

/// Longest stream id, in bytes.
const STREAM_ID_MAX: usize = 64;

pub(super) type Responses = ReceiverStream<Result<agent::ExecResponse, Status>>;

/// Open streams, by the ids that the controller gave them.
#[derive(Debug, Clone, Default)]
pub(super) struct Streams(Arc<Mutex<HashMap<String, CancellationToken>>>);

/// Open stream; removed from `streams` on drop.
pub(super) struct Stream {
    streams: Streams,
    id: String,
    /// Cancelled when its caller has gone.
    hung_up: CancellationToken,
}

impl Streams {
    /// Adds a stream. A stream without an id cannot be hung up.
    pub(super) fn add(&self, id: String) -> Stream {
        let hung_up = CancellationToken::new();
        if !id.is_empty() {
            self.0.lock().insert(id.clone(), hung_up.clone());
        }
        Stream { streams: self.clone(), id, hung_up }
    }

    /// Hangs up a stream. A stream that is over is not an error.
    fn hang_up(&self, id: &str) {
        if let Some(hung_up) = self.0.lock().get(id) {
            hung_up.cancel();
        }
    }
}

impl Stream {
    /// Returns the token that is cancelled when the caller has gone.
    pub(super) fn hung_up(&self) -> &CancellationToken {
        &self.hung_up
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.streams.0.lock().remove(&self.id);
    }
}

pub(super) async fn exec(
    execs: Execs,
    sandboxes: Arc<crate::sandbox::Sandboxes>,
    streams: &Streams,
    mut requests: Streaming<agent::ExecRequest>,
) -> Answer<Responses> {
    let first = timeout(FIRST, requests.message()).await;
    let first = first.map_err(|_| invalid("message", "must come within 10 s: start first"))??;
    let agent::ExecRequest { message, stream_id } = first.unwrap_or_default();
    if stream_id.len() > STREAM_ID_MAX {
        return Err(invalid("stream_id", "must be at most 64 bytes"));
    }
    let message = message.and_then(|message| message.message);
    let (input, inputs) = mpsc::channel(MESSAGES);
    let mut named = true;
    let (started, outputs) = match message {
        Some(exec_request::Message::Start(start)) => {
            let order = order(start).map_err(Refusal::from)?;
            named = order.exec_id.is_some();
            execs.start(order, inputs).await.map_err(refusal)?
        }
        Some(exec_request::Message::Attach(attach)) => {
            let attach = order::Attach {
                sandbox: attach.id.parse().map_err(Refusal::from)?,
                exec_id: order::exec_id(attach.exec_id).map_err(Refusal::from)?,
                stdout_offset: attach.stdout_offset,
                stderr_offset: attach.stderr_offset,
            };
            execs.attach(attach, inputs).await.map_err(refusal)?
        }
        Some(_) | None => return Err(invalid("start", "must be the first message")),
    };

    let taken = started.taken;
    let started = wire::ExecStarted {
        node: sandboxes.pve().node().to_string(),
        boot: started.boot,
        exec_id: started.exec_id,
        stdin_offset: started.stdin_offset,
        stdout_offset: started.stdout_offset,
        stderr_offset: started.stderr_offset,
    };
    let (responses, stream) = mpsc::channel(MESSAGES);
    let (wrong, what) = oneshot::channel();
    sandboxes.tasks().spawn(receive(requests, named, input, wrong));
    let open = streams.add(stream_id);
    sandboxes.tasks().spawn(async move {
        // Dropping the outputs hangs up, and also ends the other direction.
        let hung_up = open.hung_up.clone();
        hung_up.run_until_cancelled(send(started, taken, outputs, what, responses)).await;
        drop(open);
    });
    Ok(Response::new(ReceiverStream::new(stream)))
}

/// Returns the sandbox that a request names; `None` for requests about a stream of the agent.
pub(super) fn sandbox_of(request: &agent::ControlExecRequest) -> Option<&str> {
    use agent::control_exec_request::Action;
    match request.action.as_ref()? {
        Action::WriteStdin(ask) => Some(&ask.id),
        Action::Resize(ask) => Some(&ask.id),
        Action::Signal(ask) => Some(&ask.id),
        Action::HangUp(_) => None,
    }
}

pub(super) async fn control(
    execs: &Execs,
    streams: &Streams,
    request: agent::ControlExecRequest,
) -> Result<agent::ControlExecResponse, Refusal> {
    use agent::control_exec_request::Action;
    let action = request.action.ok_or_else(|| Invalid::new("action", "must be given"))?;
    let (id, exec_id, control) = match action {
        Action::WriteStdin(ask) => {
            exec::check_chunk("data", &ask.data)?;
            let (offset, data, eof) = (ask.offset, ask.data, ask.eof);
            (ask.id, ask.exec_id, order::Control::Stdin { offset, data, eof })
        }
        Action::Resize(ask) => {
            let size = ask.window.ok_or_else(|| Invalid::new("window", "must be given"))?;
            (ask.id, ask.exec_id, order::Control::Resize(window(size)?))
        }
        Action::Signal(ask) => (ask.id, ask.exec_id, order::Control::Signal(signal(ask.signal)?)),
        Action::HangUp(ask) => {
            streams.hang_up(&ask.stream_id);
            return Ok(agent::ControlExecResponse::default());
        }
    };
    let exec_id = order::exec_id(exec_id)?;
    let taken = execs.control(&id.parse()?, exec_id, control).await.map_err(refusal)?;
    Ok(agent::ControlExecResponse { stdin_offset: taken })
}

pub(super) async fn list(
    execs: &Execs,
    request: agent::ListExecsRequest,
) -> Result<agent::ListExecsResponse, Refusal> {
    let execs = execs.list(&request.id.parse()?).await.map_err(refusal)?;
    Ok(agent::ListExecsResponse { execs })
}

fn invalid(what: &'static str, why: &str) -> Status {
    Refusal::from(Invalid::new(what, why)).into()
}

/// Forwards the caller's messages, and reads one when there is room for it. An invalid message ends the command. The
/// end of the messages is the end of its stdin, unless it has a name: another attachment may continue that stdin.
async fn receive(
    mut requests: impl tokio_stream::Stream<Item = Result<agent::ExecRequest, Status>> + Unpin,
    named: bool,
    input: mpsc::Sender<Input>,
    wrong: oneshot::Sender<Status>,
) {
    // Until the command has ended.
    while let Ok(room) = input.reserve().await {
        let request = tokio::select! {
            biased;
            () = input.closed() => return,
            request = requests.next() => request.transpose(),
        };
        let message = match request {
            Ok(Some(request)) => input_of(request).map_err(|e| Status::from(Refusal::from(e))),
            Ok(None) if named => return,
            Ok(None) => {
                room.send(Input::Eof);
                return;
            }
            Err(status) => Err(status),
        };
        match message {
            // Older controllers send larger pieces.
            Ok(Input::Stdin(data)) => {
                let mut pieces = exec::pieces(data);
                if let Some(first) = pieces.next() {
                    room.send(Input::Stdin(first));
                }
                for piece in pieces {
                    if input.send(Input::Stdin(piece)).await.is_err() {
                        return;
                    }
                }
            }
            Ok(message) => room.send(message),
            Err(status) => {
                // If nobody receives it, the command has ended.
                drop(wrong.send(status));
                return;
            }
        }
    }
}

/// Forwards the command's messages, up to its exit or an error, and tells how much of its stdin it has `taken`. Each is
/// taken when there is room for it.
async fn send(
    started: wire::ExecStarted,
    mut taken: watch::Receiver<u64>,
    mut outputs: Outputs,
    wrong: oneshot::Receiver<Status>,
    responses: mpsc::Sender<Result<agent::ExecResponse, Status>>,
) {
    let respond = |message| {
        let message = Some(wire::ExecResponse { message: Some(message) });
        Ok(agent::ExecResponse { message, ..Default::default() })
    };
    let mut told = started.stdin_offset;
    let first = respond(exec_response::Message::Started(started));
    if responses.send(first).await.is_err() {
        return;
    }
    let mut wrong = pin!(async {
        match wrong.await {
            Ok(status) => status,
            // The caller's half has ended normally.
            Err(_) => std::future::pending().await,
        }
    });
    loop {
        let room = tokio::select! {
            biased;
            status = &mut wrong => {
                drop(responses.send(Err(status)).await);
                return;
            }
            room = responses.reserve() => room,
        };
        // The caller is gone.
        let Ok(room) = room else { return };
        let output = tokio::select! {
            biased;
            () = responses.closed() => return,
            status = &mut wrong => {
                room.send(Err(status));
                return;
            }
            Ok(()) = taken.changed() => {
                let stdin_offset = *taken.borrow_and_update();
                if stdin_offset.saturating_sub(told) >= TOLD_BYTES {
                    told = stdin_offset;
                    room.send(Ok(agent::ExecResponse { stdin_offset, ..Default::default() }));
                }
                continue;
            }
            output = outputs.recv() => output,
        };
        let (message, last) = match output {
            Some(Ok(Output::Stdout(bytes))) => {
                (respond(exec_response::Message::Stdout(bytes)), false)
            }
            Some(Ok(Output::Stderr(bytes))) => {
                (respond(exec_response::Message::Stderr(bytes)), false)
            }
            Some(Ok(Output::Exit(exit))) => (
                respond(exec_response::Message::Exit(wire::ExecExit {
                    code: exit.code.into(),
                    signal: exit.signal.into(),
                    timed_out: exit.timed_out,
                })),
                true,
            ),
            Some(Err(error)) => (Err(refusal(error).into()), true),
            None => {
                let lost = "the command was lost: its output was not read in time";
                (Err(Refusal::new(Reason::OutcomeUnknown, lost).into()), true)
            }
        };
        room.send(message);
        if last {
            return;
        }
    }
}

fn order(start: wire::ExecStart) -> Result<Order, Invalid> {
    let command = match start.command {
        Some(exec_start::Command::Argv(argv)) => Command::Argv(argv.args),
        Some(exec_start::Command::Shell(line)) => Command::Shell(line),
        Some(exec_start::Command::Sftp(_)) if start.tty => {
            return Err(Invalid::new("tty", "must not be set with `sftp`"));
        }
        Some(exec_start::Command::Sftp(_)) => Command::Sftp,
        None => return Err(Invalid::new("command", "must be argv, shell or sftp")),
    };
    let tty = match (start.tty, start.window) {
        (true, Some(size)) => Some(window(size)?),
        (true, None) => Some(WINDOW_DEFAULT),
        (false, _) => None,
    };
    if start.detached && start.exec_id.is_empty() {
        return Err(Invalid::new("exec_id", "must be set for a command that is detached"));
    }
    Ok(Order {
        sandbox: start.id.parse()?,
        command: command.check()?,
        cwd: order::cwd(start.cwd)?,
        env: order::env(start.env)?,
        user: start.user.parse()?,
        timeout: exec::timeout("timeout", start.timeout)?,
        tty,
        exec_id: match start.exec_id {
            text if text.is_empty() => None,
            text => Some(order::exec_id(text)?),
        },
        detached: start.detached,
        spare_background: start.spare_background,
        title: (!start.title.is_empty()).then_some(Title(start.title)),
    })
}

fn input_of(request: agent::ExecRequest) -> Result<Input, Invalid> {
    let message = request.message.and_then(|message| message.message);
    match message.ok_or_else(|| Invalid::new("message", "must not be empty"))? {
        exec_request::Message::Start(_) | exec_request::Message::Attach(_) => {
            Err(Invalid::new("start", "must be the first message, and only that"))
        }
        exec_request::Message::Stdin(bytes) => {
            exec::check_chunk("stdin", &bytes)?;
            Ok(Input::Stdin(bytes))
        }
        exec_request::Message::StdinEof(true) => Ok(Input::Eof),
        exec_request::Message::StdinEof(false) => Ok(Input::Stdin(bytes::Bytes::new())),
        exec_request::Message::Resize(size) => window(size).map(Input::Resize),
        exec_request::Message::Signal(number) => signal(number).map(Input::Signal),
    }
}

fn signal(number: u32) -> Result<i32, Invalid> {
    exec::check_signal(number)?;
    Ok(i32::try_from(number).unwrap_or_default())
}

fn window(size: wire::WindowSize) -> Result<Window, Invalid> {
    exec::check_window(&size)?;
    let side = |number: u32| u16::try_from(number).unwrap_or_default();
    Ok(Window { rows: side(size.rows), columns: side(size.cols) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> wire::ExecStart {
        wire::ExecStart {
            id: "100001".into(),
            command: Some(exec_start::Command::Shell("true".into())),
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused(field: &str, change: impl FnOnce(&mut wire::ExecStart)) {
        let mut start = start();
        change(&mut start);
        assert_eq!(order(start).expect_err(field).what, field);
    }

    #[test]
    fn exec_order_is_checked_field_by_field() {
        let plain = order(start()).expect("valid");
        assert_eq!((plain.tty, plain.timeout), (None, None));
        let seconds = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        refused("id", |s| s.id = "x".into());
        refused("command", |s| s.command = None);
        refused("argv", |s| s.command = Some(exec_start::Command::Argv(wire::Argv::default())));
        refused("shell", |s| s.command = Some(exec_start::Command::Shell("a\0".into())));
        refused("cwd", |s| s.cwd = "tmp".into());
        refused("env.key", |s| drop(s.env.insert("A=B".into(), String::new())));
        refused("user", |s| s.user = "--help".into());
        refused("exec_id", |s| s.detached = true);
        refused("timeout", |s| s.timeout = seconds(-1, 0));
        refused("timeout", |s| s.timeout = seconds(0, -1));
        let window = |rows, cols| Some(wire::WindowSize { rows, cols });
        refused("window", |s| (s.tty, s.window) = (true, window(0, 80)));
        refused("window", |s| (s.tty, s.window) = (true, window(24, 1001)));
        let sized = wire::ExecStart { tty: true, window: window(30, 90), ..start() };
        let size = Window { rows: 30, columns: 90 };
        assert_eq!(order(sized).expect("valid").tty, Some(size));
        assert!(!plain.spare_background && plain.title.is_none());
        let titled = wire::ExecStart { spare_background: true, title: "make".into(), ..start() };
        let titled = order(titled).expect("valid");
        assert!(titled.spare_background && titled.title == Some(Title("make".into())));
        assert!(!format!("{titled:?}").contains("make"), "it may be a command line");
    }

    #[tokio::test]
    async fn end_of_the_requests_is_the_end_of_stdin_unless_the_run_has_a_name() {
        for (named, wanted) in [(false, Some(Input::Eof)), (true, None)] {
            let (input, mut inputs) = mpsc::channel(4);
            let (wrong, what) = oneshot::channel();
            let data = exec_request::Message::Stdin("abc".into());
            let data = agent::ExecRequest {
                message: Some(wire::ExecRequest { message: Some(data) }),
                ..Default::default()
            };
            receive(tokio_stream::iter([Ok(data)]), named, input, wrong).await;
            assert_eq!(inputs.recv().await, Some(Input::Stdin("abc".into())));
            assert_eq!(inputs.recv().await, wanted, "{named}");
            what.await.expect_err("nothing was wrong");
        }
    }

    fn stdin(bytes: usize) -> agent::ExecRequest {
        let stdin = exec_request::Message::Stdin(vec![7; bytes].into());
        agent::ExecRequest {
            message: Some(wire::ExecRequest { message: Some(stdin) }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn message_is_read_when_there_is_room_and_one_of_nothing_takes_none() {
        let (input, mut inputs) = mpsc::channel(MESSAGES);
        let (wrong, _what) = oneshot::channel();
        let read = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&read);
        let sent = (0..100).map(|_| stdin(0)).chain([stdin(exec::CHUNK_BYTES_MAX), stdin(1)]);
        let sent = tokio_stream::iter(sent.map(Ok)).map(move |request| {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            request
        });
        let received = tokio::spawn(receive(sent, false, input, wrong));
        let mut sizes = Vec::new();
        loop {
            // The task stands still where it can go no further.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            let read = read.load(std::sync::atomic::Ordering::Relaxed);
            assert!(read <= 101 || sizes.len() >= 4, "{read} with {sizes:?}");
            match inputs.recv().await {
                Some(Input::Stdin(bytes)) => sizes.push(bytes.len()),
                other => break assert_eq!(other, Some(Input::Eof)),
            }
        }
        assert_eq!(sizes, [64 * 1024, 64 * 1024, 64 * 1024, 64 * 1024, 1]);
        received.await.expect("it ends with the input");
    }

    #[tokio::test]
    async fn controller_is_told_how_much_of_stdin_was_taken() {
        let (taken, takes) = watch::channel(10);
        let (output, outputs) = mpsc::channel(1);
        let (_wrong, what) = oneshot::channel();
        let (responses, mut told) = mpsc::channel(MESSAGES);
        let started = wire::ExecStarted { stdin_offset: 10, ..Default::default() };
        let sent = tokio::spawn(send(started, takes, outputs, what, responses));
        let mut next = async || told.recv().await.expect("goes on").expect("no error");
        assert!(next().await.message.is_some(), "it has started");
        for offset in [11, 10 + TOLD_BYTES, 11 + TOLD_BYTES, 10 + 2 * TOLD_BYTES] {
            taken.send_replace(offset);
            if (offset - 10) % TOLD_BYTES == 0 {
                let told = next().await;
                assert_eq!((told.stdin_offset, told.message), (offset, None));
            }
        }
        output.send(Ok(Output::Stdout("out".into()))).await.expect("taken");
        assert_eq!(next().await.stdin_offset, 0);
        drop((taken, output));
        told.recv().await.expect("an end").expect_err("without an exit");
        sent.await.expect("it has ended");
    }

    #[test]
    fn open_stream_can_be_hung_up_by_its_name() {
        let streams = Streams::default();
        let (one, nameless) = (streams.add("7-1".into()), streams.add(String::new()));
        let other = streams.add("7-2".into());
        streams.hang_up("7-1");
        streams.hang_up("");
        let hung_up = [&one, &nameless, &other].map(|stream| stream.hung_up.is_cancelled());
        assert_eq!(hung_up, [true, false, false]);
        drop((one, nameless, other));
        assert!(streams.0.lock().is_empty(), "what is over is forgotten");
        streams.hang_up("7-2");
    }

    #[test]
    fn invalid_inputs_are_refused() {
        let input = |message| {
            input_of(agent::ExecRequest {
                message: Some(wire::ExecRequest { message: Some(message) }),
                ..Default::default()
            })
        };
        assert_eq!(input(exec_request::Message::Signal(9)), Ok(Input::Signal(9)));
        assert_eq!(input(exec_request::Message::StdinEof(true)), Ok(Input::Eof));
        for bad in [
            exec_request::Message::Signal(0),
            exec_request::Message::Signal(32),
            exec_request::Message::Start(start()),
            exec_request::Message::Stdin(vec![0; exec::CHUNK_BYTES_MAX + 1].into()),
            exec_request::Message::Resize(wire::WindowSize { rows: 0, cols: 0 }),
        ] {
            assert!(input(bad).is_err());
        }
        assert!(input_of(agent::ExecRequest::default()).is_err());
    }
}
