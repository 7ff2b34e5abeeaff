//! Servers in the sandboxes of the fake agent, by port: 7 echoes, 9 takes nothing, 19 never stops writing, and 22
//! breaks the connection off after the first bytes. Nothing listens on other ports. Programs inside that connect to
//! a listener are played by tests, with `dial`.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use proto::{
    Reason,
    agent::v1::{ForwardListenRequest, ForwardRequest},
    forward::{Host, Target},
    sandbox::v1::{
        self as api, forward_listen_response::Message as Heard, forward_request::Message as In,
        forward_response::Message as Out,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{FakeAgent, answers::refuse};

/// Bytes of one message of a server that never stops.
const CHUNK: usize = 16 * 1024;

/// Most connections to a listener that were not told yet.
const BACKLOG: usize = 128;

type Messages = mpsc::Receiver<Result<Out, Status>>;
type ToListener = mpsc::Sender<Result<Heard, Status>>;

/// Listeners in the sandboxes, and connections to them that nobody has taken.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    count: u64,
    /// Connections that their callers have broken off.
    broken_off: usize,
    /// By sandbox and port: its name, and where its connections are told.
    open: BTreeMap<(String, u32), (String, ToListener)>,
    waiting: BTreeMap<(String, u64), DuplexStream>,
}

impl FakeAgent {
    /// Connects to a server.
    pub(super) async fn forward(
        self: &Arc<Self>,
        mut input: Streaming<ForwardRequest>,
    ) -> Result<Messages, Status> {
        let first = input.message().await?.unwrap_or_default();
        let (stream_id, first) = (first.stream_id, first.message.and_then(|m| m.message));
        let Some(In::Open(open)) = first else { return refuse(Reason::FieldInvalid, "open first") };
        let sandbox = self.get(&open.id)?;
        if sandbox.phase() != api::Phase::Running {
            return refuse(Reason::SandboxNotRunning, "not running");
        }
        let target = Target::read(open.target).map_err(daemon::status::Refusal::from)?;
        let mut program = None;
        let port = match target {
            Target::Tcp(Host::Any | Host::Address(_), port) => port.get(),
            Target::Unix(_) => 7,
            Target::Accepted(listener, connection) => {
                program = self.world.lock().listeners.waiting.remove(&(listener, connection));
                0
            }
        };
        let opened = api::ForwardOpened { node: self.name.to_string(), boot: sandbox.boot };
        let (out, messages) = mpsc::channel(1);
        let hung_up = CancellationToken::new();
        self.world.lock().streams.insert(stream_id, hung_up.clone());
        if program.is_none() && !matches!(port, 7 | 9 | 19 | 22) {
            return refuse(Reason::NotListening, "nothing listens");
        }
        let this = self.clone();
        let served = async move {
            if out.send(Ok(Out::Opened(opened))).await.is_err() {
                return;
            }
            let is_broken_off = match program {
                Some(program) => pass(program, input, &out).await,
                None => serve(port, input, &out).await,
            };
            this.world.lock().listeners.broken_off += usize::from(is_broken_off);
        };
        let this = self.clone();
        tokio::spawn(async move {
            // To hang up breaks the connection off, too: a busy machine does it before the caller's word arrives.
            if hung_up.run_until_cancelled_owned(served).await.is_none() {
                this.world.lock().listeners.broken_off += 1;
            }
        });
        Ok(messages)
    }

    /// Listens for programs inside.
    pub(super) fn forward_listen(
        &self,
        request: &ForwardListenRequest,
    ) -> Result<mpsc::Receiver<Result<Heard, Status>>, Status> {
        let sandbox = self.get(&request.id)?;
        if sandbox.phase() != api::Phase::Running {
            return refuse(Reason::SandboxNotRunning, "not running");
        }
        let mut world = self.world.lock();
        let key = (sandbox.id, request.port);
        if world.listeners.open.get(&key).is_some_and(|(_, to)| !to.is_closed()) {
            return refuse(Reason::ForwardRefused, "another program listens on the port");
        }
        world.listeners.count += 1;
        let listener = format!("{:032x}", world.listeners.count);
        let (to, heard) = mpsc::channel(BACKLOG);
        let node = self.name.to_string();
        let listening = api::ForwardListening { listener: listener.clone(), node };
        to.try_send(Ok(Heard::Listening(listening))).expect("room");
        world.listeners.open.insert(key, (listener, to));
        Ok(heard)
    }

    /// Connects as a program inside, to a port that somebody listens on for it. `None`: nobody does.
    pub fn dial(&self, id: &str, port: u32) -> Option<DuplexStream> {
        let mut world = self.world.lock();
        let (listener, to) = world.listeners.open.get(&(id.to_owned(), port))?.clone();
        if to.is_closed() {
            return None;
        }
        world.listeners.count += 1;
        let connection = world.listeners.count;
        let (near, far) = tokio::io::duplex(CHUNK);
        world.listeners.waiting.insert((listener.clone(), connection), far);
        let accepted = api::ForwardAccepted { listener, connection };
        to.try_send(Ok(Heard::Accepted(accepted))).expect("room");
        Some(near)
    }

    /// Returns the ports that somebody listens on in a sandbox.
    pub fn listened(&self, id: &str) -> Vec<u32> {
        let world = self.world.lock();
        let open = world.listeners.open.iter().filter(|(_, (_, to))| !to.is_closed());
        open.filter(|((sandbox, _), _)| sandbox == id).map(|((_, port), _)| *port).collect()
    }

    /// Returns the number of connections that their callers have broken off.
    pub fn broken_off(&self) -> usize {
        self.world.lock().listeners.broken_off
    }

    /// Ends all listeners, as a restart of the agent does.
    pub fn lose_listeners(&self) {
        self.end_listeners(Reason::ForwardLost);
    }

    /// Ends all listeners, as a revocation of the access to their ports does.
    pub fn revoke_listeners(&self) {
        self.end_listeners(Reason::ForwardRefused);
    }

    fn end_listeners(&self, reason: Reason) {
        let mut world = self.world.lock();
        for (_, to) in std::mem::take(&mut world.listeners.open).values() {
            to.try_send(refuse(reason, "ended")).expect("room");
        }
    }
}

/// Passes bytes between a program inside and a caller, until both halves have ended. Returns true when the caller
/// has broken it off.
async fn pass(
    program: DuplexStream,
    mut input: Streaming<ForwardRequest>,
    out: &mpsc::Sender<Result<Out, Status>>,
) -> bool {
    let (mut read, mut write) = tokio::io::split(program);
    let up = async {
        while let Ok(message) = input.message().await {
            match message.and_then(|message| message.message).and_then(|message| message.message) {
                Some(In::Data(data)) => write.write_all(&data).await.map_err(|_| false)?,
                Some(In::Eof(true)) | None => return write.shutdown().await.map_err(|_| false),
                Some(In::Eof(false)) => {}
                Some(In::Open(_)) => return Err(true),
            }
        }
        Err(false)
    };
    let down = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(length @ 1..) = read.read(&mut chunk).await {
            let data = Bytes::copy_from_slice(&chunk[..length]);
            out.send(Ok(Out::Data(data))).await.map_err(|_| false)?;
        }
        out.send(Ok(Out::Eof(true))).await.map_err(|_| false)
    };
    tokio::try_join!(up, down).err().unwrap_or_default()
}

/// Serves a connection. Returns true when its caller has broken it off.
async fn serve(
    port: u16,
    mut input: Streaming<ForwardRequest>,
    out: &mpsc::Sender<Result<Out, Status>>,
) -> bool {
    match port {
        9 => out.closed().await,
        19 => while out.send(Ok(Out::Data(Bytes::from_static(&[b'y'; CHUNK])))).await.is_ok() {},
        _ => {}
    }
    while let Ok(message) = input.message().await {
        match message.and_then(|message| message.message).and_then(|message| message.message) {
            Some(In::Data(_)) if port == 22 => {
                drop(out.send(refuse(Reason::ForwardLost, "reset")).await);
                return false;
            }
            Some(In::Data(data)) => {
                if out.send(Ok(Out::Data(data))).await.is_err() {
                    return false;
                }
            }
            Some(In::Eof(true)) | None => {
                drop(out.send(Ok(Out::Eof(true))).await);
                return false;
            }
            Some(In::Eof(false)) => {}
            Some(In::Open(_)) => return true,
        }
    }
    false
}
