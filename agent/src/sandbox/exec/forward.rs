//! Byte streams to servers in a sandbox, and listeners for programs inside. The sandbox's shim carries
//! them; this module passes bytes between it and a caller. A forward ends with its caller, with the
//! sandbox's boot, and with the agent.

use std::{io, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use data_encoding::HEXLOWER;
use helper::{ForwardTask, Task};
use proto::{
    Reason,
    forward::{LISTENER_BYTES, Target},
    id::SandboxRef,
    name::Port,
    shim::v1::{self as wire, request, response},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{Execs, Limits, Shared, failed, in_time, of_task, order::User, random, same_boot};
use crate::{
    journal::Record,
    sandbox::{Error, Sandboxes, core::forwards::OpenForward},
    shim::{
        FORWARD_WINDOW,
        client::{self, Attachment, Refused},
    },
};

/// Part of one direction of a stream.
#[derive(Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes, at most [`crate::shim::FORWARD_PIECE`] towards the sandbox.
    Data(Bytes),
    /// End of the direction; the other goes on.
    Eof,
    /// End of the stream. The last piece from the sandbox.
    End,
}

/// Bytes are not shown: they may be secrets.
impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Data(bytes) => write!(f, "Data({} bytes)", bytes.len()),
            Self::Eof => f.write_str("Eof"),
            Self::End => f.write_str("End"),
        }
    }
}

/// Pieces from a sandbox, up to an end or an error. Dropping them closes the stream.
#[derive(Debug)]
pub struct Pieces {
    from: mpsc::Receiver<Result<Piece, Error>>,
    taken: watch::Sender<u32>,
}

impl Pieces {
    /// Waits for the next piece; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<Piece, Error>> {
        let piece = self.from.recv().await?;
        if matches!(piece, Ok(Piece::Data(_))) {
            self.taken.send_modify(|taken| *taken = taken.wrapping_add(1));
        }
        Some(piece)
    }
}

/// Open stream.
#[derive(Debug)]
pub struct Forward {
    /// Boot of the sandbox that it belongs to.
    pub boot: u32,
    /// Bytes from the sandbox.
    pub pieces: Pieces,
}

impl Execs {
    /// Connects to a server in a sandbox, which is woken as by a command. `input` has the bytes for it;
    /// dropping the pieces closes the stream.
    ///
    /// # Errors
    /// NOT_LISTENING when nothing accepts the connection, FORWARD_REFUSED when it cannot be made, or as for a
    /// command.
    pub async fn forward(
        &self,
        sandbox: &SandboxRef,
        target: Target,
        input: mpsc::Receiver<Piece>,
    ) -> Result<Forward, Error> {
        let limits = self.limits();
        let record = in_time(limits.answer_by, self.awake(sandbox)).await?;
        let forwards = &self.0.sandboxes.forwards;
        let access = match &target {
            Target::Tcp(_, port) => Some(forwards.add(record.id, *port)),
            Target::Accepted(name, _) => {
                let accepted = forwards.add_accepted(record.id, name);
                Some(accepted.ok_or_else(|| {
                    Error::new(Reason::NotListening, "the listener of this connection has ended")
                })?)
            }
            // It belongs to no port.
            Target::Unix(_) => None,
        };
        let (task, what) = task(target, &record)?;
        let opened = self.open((record, access), task, limits, input).await;
        opened.map_err(|error| {
            let tells = error.reason == Reason::NotListening && !what.is_empty();
            if tells { Error::new(error.reason, what) } else { error }
        })
    }

    /// Listens on a port of 127.0.0.1 in a sandbox. Returns the name of the listener. The pieces have the numbers of
    /// the connections, 8 bytes each, little endian; `Target::Accepted` takes them. Ends with FORWARD_REFUSED when the
    /// port is hidden or its access revoked.
    ///
    /// # Errors
    /// FORWARD_REFUSED when the port is taken, or as for a command.
    pub async fn listen(
        &self,
        sandbox: &SandboxRef,
        port: Port,
    ) -> Result<(String, Forward), Error> {
        let limits = self.limits();
        let record = in_time(limits.answer_by, self.awake(sandbox)).await?;
        let name = HEXLOWER.encode(&random::<LISTENER_BYTES>()?);
        let access = self.0.sandboxes.forwards.add_listener(record.id, port, &name);
        let task = ForwardTask::Listen { port: port.get(), name: name.clone() };
        // Nothing is sent to a listener; the sender stays open with it.
        let (_nothing, input) = mpsc::channel(1);
        let opened = self.open((record, Some(access)), task, limits, input).await;
        Ok((name, opened?))
    }

    /// Returns the addresses that something in the sandbox listens on, by port. The host looks.
    ///
    /// # Errors
    /// When there is no such sandbox, or it is not up.
    pub async fn listeners(&self, sandbox: &SandboxRef) -> Result<Vec<SocketAddr>, Error> {
        let record = self.0.sandboxes.up(sandbox)?;
        Ok(self.0.sandboxes.pve().listeners(record.vmid).await)
    }

    async fn open(
        &self,
        (record, access): (Arc<Record>, Option<OpenForward>),
        task: ForwardTask,
        limits: Limits,
        input: mpsc::Receiver<Piece>,
    ) -> Result<Forward, Error> {
        let Limits { start_by_ms, answer_by: deadline } = limits;
        let place = self.place()?;
        let start =
            of_task(Task::Forward(task), &User::Id(0), Some("/".to_owned()), Default::default())?;
        let message = request::Message::Forward(wire::Forward {
            order: start.order,
            mark: start.mark,
            start_by_ms,
        });
        let stream = in_time(deadline, self.0.connect(&record)).await?;
        let attachment = match client::attach(stream, message, deadline).await {
            Ok(attachment) => attachment,
            Err(refused) => return Err(self.0.why_not_open(&record, refused).await),
        };
        // One piece more for each of the two ends.
        let (sender, from) = mpsc::channel(FORWARD_WINDOW + 2);
        let taken = watch::Sender::new(0);
        let carried = Carried {
            sandboxes: Arc::clone(&self.0.sandboxes),
            record: Arc::clone(&record),
            access,
            taken: taken.subscribe(),
        };
        self.spawn(async move {
            carried.run(attachment, input, sender).await;
            drop(place);
        });
        Ok(Forward { boot: record.boot, pieces: Pieces { from, taken } })
    }
}

impl Shared {
    /// Converts a shim's refusal of a forward to an error for the caller.
    async fn why_not_open(&self, record: &Record, refused: Refused) -> Error {
        let old = match &refused {
            Refused::Lost(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.answers(record).await
            }
            Refused::Lost(_) | Refused::No(..) => false,
        };
        if old {
            let message = "the shim of the sandbox is of an older version, which knows no \
                           forwards: stop and start the sandbox";
            return Error::new(Reason::ForwardRefused, message);
        }
        self.explain(record, refused, false)
    }

    /// Whether the shim answers what shims of all versions know.
    async fn answers(&self, record: &Record) -> bool {
        let Some(stream) = self.shims.find(record).await else { return false };
        let ask = request::Message::List(wire::List {});
        client::control(stream, ask, Instant::now() + super::LIST).await.is_ok()
    }
}

/// Builds the task of a target, and the sentence for when nothing listens there.
fn task(target: Target, record: &Record) -> Result<(ForwardTask, String), Error> {
    Ok(match target {
        Target::Tcp(host, port) => {
            let invalid =
                |why: proto::id::Invalid| Error::new(Reason::FieldInvalid, why.to_string());
            let hosts = host.addresses(record.lease()).map_err(invalid)?;
            let names: Vec<_> = hosts.iter().map(ToString::to_string).collect();
            let what = format!(
                "nothing in {} listens on port {port} of {}; `sandboxctl port ls` shows what does",
                record.id,
                names.join(", "),
            );
            let addresses = hosts.into_iter().map(|host| SocketAddr::new(host, port.get()));
            (ForwardTask::Tcp(addresses.collect()), what)
        }
        Target::Unix(path) => {
            let what = format!("nothing in {} listens on the socket {path}", record.id);
            (ForwardTask::Unix(path), what)
        }
        Target::Accepted(name, connection) => {
            (ForwardTask::Accepted { name, connection }, String::new())
        }
    })
}

/// Stream that is being carried.
struct Carried {
    sandboxes: Arc<Sandboxes>,
    record: Arc<Record>,
    /// Entry among the forwards of its port, where it belongs to one.
    access: Option<OpenForward>,
    /// Number of pieces of data that the caller has taken.
    taken: watch::Receiver<u32>,
}

impl Carried {
    /// Runs until the stream ends, the caller goes, the access to its port is revoked or hidden, or the agent stops.
    async fn run(
        mut self,
        attachment: Attachment,
        mut input: mpsc::Receiver<Piece>,
        output: mpsc::Sender<Result<Piece, Error>>,
    ) {
        let Attachment { output: mut from, input: mut to, .. } = attachment;
        let stopping = self.sandboxes.tasks().stopping().clone();
        let revoked = self.access.as_ref().map(OpenForward::revoked).unwrap_or_default();
        let (mut window, mut feeds, mut told) = (FORWARD_WINDOW, true, 0);
        let mut heard = true;
        let last = loop {
            let message = tokio::select! {
                biased;
                // The shim sees the end of its connection.
                () = output.closed() => return,
                () = revoked.cancelled() => break Err(self.cut()),
                () = stopping.cancelled() => break Err(Error::new(
                    Reason::ForwardLost,
                    "the node's agent restarts, and the connection with it; open it again",
                )),
                message = from.next() => {
                    let piece = match message {
                        Some(Ok(response::Message::Stdout(bytes))) => Piece::Data(bytes),
                        Some(Ok(response::Message::Eof(_))) => Piece::Eof,
                        Some(Ok(response::Message::Done(_))) => {
                            window = (window + 1).min(FORWARD_WINDOW);
                            continue;
                        }
                        other => break self.last(other).await,
                    };
                    // A shim keeps to its window, so there is room.
                    if output.try_send(Ok(piece)).is_err() && !output.is_closed() {
                        break Err(failed("its shim sent more than it may".to_owned()));
                    }
                    continue;
                }
                Ok(()) = self.taken.changed(), if heard => {
                    let taken = *self.taken.borrow_and_update();
                    let pieces = taken.wrapping_sub(std::mem::replace(&mut told, taken));
                    request::Message::Taken(wire::Taken { pieces })
                }
                piece = input.recv(), if heard && feeds && window > 0 => match piece {
                    Some(Piece::Data(data)) => stdin(data, false),
                    Some(Piece::Eof) => stdin(Bytes::new(), true),
                    // The caller sends no more, and has not ended its direction either.
                    Some(Piece::End) | None => {
                        feeds = false;
                        continue;
                    }
                },
            };
            if matches!(message, request::Message::Stdin(_)) {
                window -= 1;
            }
            // A shim that has ended the stream hears no more; its last message is still to be read.
            heard = to.send(message).await.is_ok();
        };
        // A caller that has gone does not get it.
        drop(output.send(last).await);
    }

    /// Error of a revocation. Callers listen again after FORWARD_LOST, which a listener must not.
    fn cut(&self) -> Error {
        let why =
            "this port was hidden or its access was revoked, and its open connections were cut";
        let is_listener = self.access.as_ref().is_some_and(OpenForward::is_listener);
        let reason = if is_listener { Reason::ForwardRefused } else { Reason::ForwardLost };
        Error::new(reason, why)
    }

    /// Converts the shim's last message.
    async fn last(&self, message: Option<io::Result<response::Message>>) -> Result<Piece, Error> {
        let lost = |why: &str| Err(Error::new(Reason::ForwardLost, why));
        if matches!(message, Some(Ok(response::Message::Exit(_)))) {
            return Ok(Piece::End);
        }
        let runs = same_boot(&self.sandboxes, &self.record)
            && self.sandboxes.pve().running(self.record.vmid).await;
        match message {
            _ if !runs => lost("the sandbox stopped while it was connected"),
            Some(Ok(response::Message::Refused(refused))) => {
                let reason = Reason::named(&refused.reason).unwrap_or(Reason::ForwardLost);
                Err(Error::new(reason, refused.message))
            }
            Some(Ok(_)) => lost("the sandbox's shim answered out of turn"),
            Some(Err(_)) | None => lost("what carried the connection on the node was killed"),
        }
    }
}

fn stdin(data: Bytes, eof: bool) -> request::Message {
    request::Message::Stdin(wire::Stdin { exec_id: String::new(), offset: 0, data, eof })
}
