//! `exec`: runs a command, carries its bytes both ways and ends with its exit code.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    os::fd::AsFd,
    time::Duration,
};

use bytes::Bytes;
use proto::sandbox::v1::{
    Argv, ExecExit, ExecRequest, ExecStart, exec_request, exec_response, exec_start,
};
use serde_json::json;
use tokio::{
    fs::File,
    io::AsyncWriteExt,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    args::{Exec, Pair},
    client::{Controller, answer},
    failure::{Failure, exit},
    output::Output,
    terminal,
};

/// Messages on their way to the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;
const CHUNK: usize = 64 * 1024;
/// What the API takes when no timeout is asked for.
const TIMEOUT: Duration = Duration::from_secs(300);
/// How long after the command's own time its end may still come.
const GRACE: Duration = Duration::from_secs(60);
/// Output that `--json` holds in memory.
const JSON_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The user means us, not the command, when it does not heed the signal.
const INTERRUPTS_MAX: u32 = 3;

type Message = exec_request::Message;

pub(super) async fn run(controller: Controller, exec: Exec, output: Output) -> Result<u8, Failure> {
    let (tty, interactive, id) = (exec.tty, exec.interactive, exec.id.clone());
    let deadline = Instant::now() + exec.timeout.unwrap_or(TIMEOUT) + GRACE;
    let (sender, receiver) = mpsc::channel(QUEUE);
    // Before the command can be seen to run: a signal that comes then is the command's already.
    let signals = Signals::listen()
        .map_err(|error| Failure::local(format!("cannot listen for signals: {error}")))?;
    queue(&sender, Message::Start(start(exec)?)).await;
    if !interactive {
        queue(&sender, Message::StdinEof(true)).await;
    }
    let mut client = controller.sandboxes.clone();
    let mut sink = Sink::new(output.json)?;
    let session = async {
        let messages = answer(client.exec(ReceiverStream::new(receiver))).await?;
        // From here on the terminal's keys are the command's; the guard gives them back.
        let raw = (tty && interactive && terminal::is_terminal()).then(terminal::Raw::enter);
        let _raw = raw
            .transpose()
            .map_err(|error| Failure::local(format!("cannot use the terminal: {error}")))?;
        if interactive {
            let sender = sender.clone();
            // A thread of its own: nobody can call back a read of stdin, and it dies with the process.
            std::thread::spawn(move || pump_stdin(&sender));
        }
        receive(messages, &mut sink).await
    };
    let ended = tokio::select! {
        ended = timeout_at(deadline, session) => ended
            .map_err(|_| Failure::local("the command's end did not come, long after its time was over"))??,
        code = signals.forward(&sender, tty) => return Ok(code),
    };
    if output.json {
        output.value(&json!({
            "id": id,
            "code": ended.code,
            "signal": ended.signal,
            "timed_out": ended.timed_out,
            "stdout": String::from_utf8_lossy(&sink.stdout),
            "stderr": String::from_utf8_lossy(&sink.stderr),
        }))?;
    }
    if ended.timed_out {
        output.note("the command was killed: its time was over (--timeout)");
    }
    Ok(u8::try_from(ended.code).unwrap_or(u8::MAX))
}

fn start(exec: Exec) -> Result<ExecStart, Failure> {
    let command = match exec.shell {
        Some(line) => exec_start::Command::Shell(line),
        None => {
            let utf8 = |arg: std::ffi::OsString| {
                arg.into_string().map_err(|arg| {
                    Failure::usage(
                        format!("the argument {arg:?} is not UTF-8"),
                        "pass such bytes on stdin with -i",
                    )
                })
            };
            let args = exec.command.into_iter().map(utf8).collect::<Result<_, _>>()?;
            exec_start::Command::Argv(Argv { args })
        }
    };
    let mut env: BTreeMap<_, _> =
        exec.env.into_iter().map(|Pair { key, value }| (key, value)).collect();
    #[expect(
        clippy::disallowed_methods,
        reason = "what kind of terminal it is, only the environment says"
    )]
    if exec.tty
        && let Ok(term) = std::env::var("TERM")
    {
        env.entry("TERM".into()).or_insert(term);
    }
    let timeout = exec.timeout.map(|timeout| prost_types::Duration {
        seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(timeout.subsec_nanos()).unwrap_or_default(),
    });
    Ok(ExecStart {
        id: exec.id,
        command: Some(command),
        cwd: exec.cwd.unwrap_or_default(),
        env,
        user: exec.user.unwrap_or_default(),
        timeout,
        tty: exec.tty,
        window: if exec.tty { terminal::size() } else { None },
        exec_id: String::new(),
    })
}

/// Sends a message; when nobody listens any more, the stream's end says why.
async fn queue(sender: &mpsc::Sender<ExecRequest>, message: Message) {
    sender.send(ExecRequest { message: Some(message) }).await.ok();
}

fn pump_stdin(sender: &mpsc::Sender<ExecRequest>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    loop {
        let message = match stdin.read(&mut buffer) {
            Ok(0) | Err(_) => Message::StdinEof(true),
            Ok(length) => Message::Stdin(Bytes::copy_from_slice(&buffer[..length])),
        };
        let last = matches!(message, Message::StdinEof(_));
        if sender.blocking_send(ExecRequest { message: Some(message) }).is_err() || last {
            return;
        }
    }
}

/// The signals that are the command's and not ours.
struct Signals {
    int: Signal,
    term: Signal,
    hup: Signal,
    window: Signal,
}

impl Signals {
    /// Takes the signals from now on; what comes before [`Signals::forward`] waits for it.
    fn listen() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// Passes signals and the terminal's size on; returns when the user insists.
    async fn forward(mut self, sender: &mpsc::Sender<ExecRequest>, tty: bool) -> u8 {
        let mut interrupts = 0;
        loop {
            let message = tokio::select! {
                _ = self.int.recv() => {
                    interrupts += 1;
                    if interrupts >= INTERRUPTS_MAX {
                        return exit::INTERRUPTED;
                    }
                    Message::Signal(2)
                }
                _ = self.term.recv() => Message::Signal(15),
                _ = self.hup.recv() => Message::Signal(1),
                _ = self.window.recv() => match terminal::size() {
                    Some(size) if tty => Message::Resize(size),
                    _ => continue,
                },
            };
            queue(sender, message).await;
        }
    }
}

/// Where output goes: on at once, or into memory for `--json`.
struct Sink {
    json: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    // Files of tokio: a reader of ours that is slow must not keep the connection from its pings.
    to_stdout: File,
    to_stderr: File,
}

impl Sink {
    fn new(json: bool) -> io::Result<Self> {
        let to_stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let to_stderr = io::stderr().as_fd().try_clone_to_owned()?;
        Ok(Self {
            json,
            stdout: Vec::new(),
            stderr: Vec::new(),
            to_stdout: File::from_std(to_stdout.into()),
            to_stderr: File::from_std(to_stderr.into()),
        })
    }

    async fn take(&mut self, bytes: &[u8], is_stderr: bool) -> Result<(), Failure> {
        if !self.json {
            return match is_stderr {
                true => write(&mut self.to_stderr, bytes).await,
                false => write(&mut self.to_stdout, bytes).await,
            };
        }
        if self.stdout.len() + self.stderr.len() + bytes.len() > JSON_BYTES_MAX {
            return Err(Failure::local(
                "the command wrote more than 16 MiB, which is more than --json holds",
            )
            .hint("leave --json out: the output then goes through as it comes"));
        }
        let kept = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        kept.extend_from_slice(bytes);
        Ok(())
    }
}

async fn write(to: &mut File, bytes: &[u8]) -> Result<(), Failure> {
    to.write_all(bytes).await?;
    Ok(to.flush().await?)
}

async fn receive(
    mut messages: Streaming<proto::sandbox::v1::ExecResponse>,
    sink: &mut Sink,
) -> Result<ExecExit, Failure> {
    while let Some(response) = messages.message().await? {
        match response.message {
            Some(exec_response::Message::Stdout(bytes)) => sink.take(&bytes, false).await?,
            Some(exec_response::Message::Stderr(bytes)) => sink.take(&bytes, true).await?,
            Some(exec_response::Message::Exit(ended)) => return Ok(ended),
            Some(exec_response::Message::Started(_)) | None => {}
        }
    }
    Err(Failure::local("the connection ended before the command's exit code came")
        .hint("the command may still run; `sandboxctl get ID` shows whether the sandbox does"))
}
