//! Shim's side of its connections to agents, and all of its commands.

mod attached;
mod forward;
mod refusals;

use std::{collections::BTreeMap, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::Bytes;
use daemon::sync::Mutex;
use futures_util::StreamExt;
use prost::Message as _;
use proto::{
    Reason,
    sandbox::v1::ListExecsResponse,
    shim::v1::{self as wire, request, response},
};
use tokio::{
    net::UnixListener,
    sync::{Notify, Semaphore, oneshot, watch},
    time::{Instant, interval, sleep, timeout, timeout_at},
};

use attached::{attached, say, window};
use forward::Forwards;
use refusals::{NotStarted, Refused, lost, other, refused, unknown, why};

use super::{
    Host, Parts,
    frames::{Frames, frames},
    helper::{Failure, Helper},
    ids::Ids,
    keep::{Commands, EndedOutput},
    life,
    ring::Budget,
    session::{Session, Shared, Title, admit},
    tree::Tree,
};

/// Most connections at the same time.
const CONVERSATIONS_MAX: usize = 1024;
/// Time budget of a start for which the agent has set no deadline, in milliseconds.
const START_MS: u64 = 12_000;
/// Longest wait for the helper's answer after the deadline of a start.
const WORD: Duration = Duration::from_secs(1);
/// Longest wait for the first message of a connection.
const FIRST: Duration = Duration::from_secs(10);
/// Time without work after which a shim exits; the next command starts another.
const IDLE: Duration = Duration::from_secs(600);
/// Interval between checks for output and commands to drop, and pause after a failed accept.
const TIDY: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Shim {
    host: Arc<dyn Host>,
    image: OwnedFd,
    shared: Arc<Shared>,
    helper: tokio::sync::Mutex<Option<Arc<Helper>>>,
    sessions: Mutex<Sessions>,
    forwards: Arc<Forwards>,
    /// Change counter, increased when a start has succeeded or failed.
    settled: watch::Sender<u64>,
}

#[derive(Debug)]
struct Sessions {
    commands: Commands,
    /// Exec_ids of starts under way, and whether they access files.
    starting: BTreeMap<String, bool>,
    ids: Ids,
}

/// Result of reserving an exec_id for a start.
enum Reserved {
    /// The exec_id was started before.
    Known(Arc<Session>),
    /// The caller may start it.
    Ours,
    /// Another caller is starting it right now.
    Others,
}

/// Serves agents until the sandbox has gone, or until the shim has been idle for [`IDLE`].
///
/// # Errors
/// When the exec_ids of earlier runs cannot be read.
pub async fn serve(listener: UnixListener, parts: Parts) -> io::Result<()> {
    let Parts { host, image, dir, ids, socket, output_bytes_max } = parts;
    let ids = Ids::open(&ids)?;
    let sessions = Sessions { commands: Commands::default(), starting: BTreeMap::new(), ids };
    let (budget, left_behind) = (Budget::new(output_bytes_max), Notify::new());
    let shim = Arc::new(Shim {
        host,
        image,
        shared: Arc::new(Shared { dir, budget, left_behind }),
        helper: tokio::sync::Mutex::default(),
        sessions: Mutex::new(sessions),
        forwards: Arc::default(),
        settled: watch::Sender::new(0),
    });
    let slots = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
    let mut looks = interval(TIDY);
    let (mut busy, mut leaving) = (Instant::now(), false);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    // Most likely out of descriptors: its commands are worth more than a caller.
                    sleep(TIDY).await;
                    continue;
                };
                // Queries alone do not keep the shim busy: the agent polls what outputs occupy. A
                // connection beyond the limit is closed; its agent tries again.
                if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                    let shim = Arc::clone(&shim);
                    tokio::spawn(async move {
                        if let Err(error) = shim.converse(frames(stream)).await {
                            tracing::debug!(%error, "a connection to an agent failed");
                        }
                        drop(slot);
                    });
                }
            }
            () = shim.shared.budget.over() => shim.make_room(),
            () = shim.shared.left_behind.notified() => shim.sessions.lock().commands.tidy(),
            _ = looks.tick() => {
                let left = shim.tidy();
                if left > 0 || slots.available_permits() < CONVERSATIONS_MAX {
                    busy = Instant::now();
                } else if leaving {
                    return Ok(());
                }
                if !shim.host.runs() {
                    drop(std::fs::remove_file(&socket));
                    return Ok(());
                }
                // No agent finds this shim any more; one that has just connected is still served.
                if busy.elapsed() > IDLE && !leaving {
                    leaving = true;
                    drop(std::fs::remove_file(&socket));
                }
            }
        }
    }
}

impl Shim {
    /// Drops what has expired. Returns how many commands are left.
    fn tidy(&self) -> usize {
        let mut sessions = self.sessions.lock();
        sessions.commands.tidy();
        sessions.commands.count()
    }

    fn make_room(&self) {
        self.sessions.lock().commands.make_room(&self.shared.budget, self.shared.ahead());
    }

    async fn converse(self: &Arc<Self>, mut frames: Frames) -> io::Result<()> {
        let Ok(Some(first)) = timeout(FIRST, frames.next()).await else { return Ok(()) };
        let first = wire::Request::decode(first?.freeze()).map_err(io::Error::other)?;
        let Some(message) = first.message else { return Ok(()) };
        match message {
            request::Message::Start(start) => match self.start(start).await {
                Ok(session) => attached(&session, [0, 0], frames).await,
                Err(refused) => say(&mut frames, response::Message::Refused(refused)).await,
            },
            request::Message::Attach(attach) => match self.find(&attach.exec_id) {
                Ok(session) => {
                    attached(&session, [attach.stdout_offset, attach.stderr_offset], frames).await
                }
                Err(refused) => say(&mut frames, response::Message::Refused(refused)).await,
            },
            request::Message::Forward(forward) => self.forward(forward, frames).await,
            message @ (request::Message::Stdin(_)
            | request::Message::Taken(_)
            | request::Message::Resize(_)
            | request::Message::Signal(_)
            | request::Message::HangUp(_)
            | request::Message::List(_)
            | request::Message::Outputs(_)) => {
                let answer = self.control(message).await.unwrap_or_else(response::Message::Refused);
                say(&mut frames, answer).await
            }
        }
    }

    /// Handles a request that has a single answer.
    async fn control(&self, message: request::Message) -> Result<response::Message, Refused> {
        let done = |stdin_offset| response::Message::Done(wire::Done { stdin_offset });
        match message {
            request::Message::Stdin(stdin) => {
                let session = self.find(&stdin.exec_id)?;
                let gap = || refused(Reason::FieldInvalid, "offset: bytes before it are missing");
                // If the command does not read, answer soon, with the offset reached.
                let taken = session.stdin(stdin.offset, stdin.data, stdin.eof);
                match timeout(Duration::from_secs(5), taken).await {
                    Ok(taken) => taken.map(done).ok_or_else(gap),
                    Err(_) => {
                        let nothing = session.stdin(0, Bytes::new(), false);
                        let so_far = timeout(Duration::ZERO, nothing).await;
                        Ok(done(so_far.ok().flatten().unwrap_or(stdin.offset)))
                    }
                }
            }
            request::Message::Resize(resize) => {
                let session = self.find(&resize.exec_id)?;
                resize.window.and_then(window).into_iter().for_each(|size| session.resize(size));
                Ok(done(0))
            }
            request::Message::Signal(signal) => {
                let session = self.find(&signal.exec_id)?;
                session.signal(i32::try_from(signal.number).unwrap_or_default());
                Ok(done(0))
            }
            request::Message::List(wire::List {}) => {
                let sessions = self.sessions.lock();
                let commands = sessions.commands.named.values();
                let mut execs: Vec<_> = commands.map(|session| session.info()).collect();
                execs.extend(self.forwards.infos());
                execs.sort_by_key(|exec| exec.started_at.map(|at| (at.seconds, at.nanos)));
                Ok(response::Message::Execs(ListExecsResponse { execs, ..Default::default() }))
            }
            request::Message::Outputs(wire::Outputs { limit_bytes, free_bytes }) => {
                if limit_bytes > 0 {
                    self.shared.budget.set_limit(limit_bytes);
                }
                let sessions = self.sessions.lock();
                sessions.commands.free(free_bytes);
                sessions.commands.make_room(&self.shared.budget, self.shared.ahead());
                let ended = sessions.commands.ended_outputs();
                Ok(response::Message::Outputs(wire::OutputsHeld {
                    bytes: self.shared.budget.used(),
                    ended: ended.into_iter().map(ended_output).collect(),
                    running: sessions.commands.running_names(),
                }))
            }
            request::Message::Start(_)
            | request::Message::Attach(_)
            | request::Message::Forward(_)
            | request::Message::Taken(_)
            | request::Message::HangUp(_) => {
                Err(refused(Reason::FieldInvalid, "message: must be the first, or follow one"))
            }
        }
    }

    fn find(&self, exec_id: &str) -> Result<Arc<Session>, Refused> {
        let sessions = self.sessions.lock();
        match sessions.commands.named.get(exec_id) {
            Some(session) => Ok(Arc::clone(session)),
            None if sessions.ids.digest(exec_id).is_some() => Err(lost(exec_id)),
            None => Err(refused(
                Reason::ExecNotFound,
                format!("nothing runs here, or ran lately, as {exec_id}"),
            )),
        }
    }

    /// Starts a command. Answers at the latest [`WORD`] after the deadline of the start; what
    /// becomes of the command after that is handled all the same.
    async fn start(self: &Arc<Self>, mut start: wire::Start) -> Result<Arc<Session>, Refused> {
        if start.start_by_ms == 0 {
            // From an agent that does not know deadlines yet.
            start.start_by_ms = helper::up_ms() + START_MS;
        }
        let late = left(start.start_by_ms) + WORD;
        let mut settled = self.settled.subscribe();
        let ours = async {
            loop {
                settled.mark_unchanged();
                match self.reserve(&start)? {
                    Reserved::Known(session) => return Ok(Some(session)),
                    Reserved::Ours => return Ok(None),
                    // Cannot fail: the sender is in `self`.
                    Reserved::Others => drop(settled.changed().await),
                }
            }
        };
        let deadline = Instant::now() + late;
        if let Some(known) = timeout_at(deadline, ours).await.unwrap_or_else(|_| Err(unknown()))? {
            return Ok(known);
        }
        let (tell, told) = oneshot::channel();
        let shim = Arc::clone(self);
        tokio::spawn(async move {
            let started = shim.spawn(&start).await;
            let settled = shim.settle(&start, started);
            if let Err(Ok(session)) = tell.send(settled) {
                // The caller was told that the command may run. One that nobody can find again must
                // not.
                session.give_up();
            }
        });
        match timeout_at(deadline, told).await {
            Ok(Ok(settled)) => settled,
            Ok(Err(_)) | Err(_) => Err(unknown()),
        }
    }

    /// Records the result of a start. Frees the exec_id when it is certain that nothing was run.
    fn settle(
        &self,
        start: &wire::Start,
        started: Result<Arc<Session>, NotStarted>,
    ) -> Result<Arc<Session>, Refused> {
        let mut sessions = self.sessions.lock();
        sessions.starting.remove(&start.exec_id);
        let never_ran = match &started {
            Ok(session) => session.title.never_ran,
            Err(not_started) => not_started.certain,
        };
        if start.keep
            && never_ran
            && let Err(error) = sessions.ids.release(&start.exec_id)
        {
            tracing::warn!(%error, "an exec_id could not be freed, though nothing was run");
        }
        if let Ok(session) = &started {
            let before = sessions.commands.named.insert(start.exec_id.clone(), Arc::clone(session));
            before.into_iter().for_each(|before| sessions.commands.forget(before));
        }
        drop(sessions);
        self.settled.send_modify(|count| *count += 1);
        started.map_err(|not_started| not_started.refused)
    }

    /// Reserves an exec_id. One that a caller chose is on the disk before anything is started under
    /// it.
    fn reserve(&self, start: &wire::Start) -> Result<Reserved, Refused> {
        let mut sessions = self.sessions.lock();
        let exec_id = &start.exec_id;
        // A start that never ran a program is repeated.
        let known = sessions.commands.named.get(exec_id);
        let known = known.filter(|session| session.runs() || !session.title.never_ran);
        let digest = known.map(|session| session.title.digest.as_str());
        if let Some(digest) = digest.or_else(|| sessions.ids.digest(exec_id))
            && digest != start.digest
        {
            return Err(other(exec_id));
        }
        if let Some(session) = known {
            return Ok(Reserved::Known(Arc::clone(session)));
        }
        if sessions.starting.contains_key(exec_id) {
            return Ok(Reserved::Others);
        }
        if sessions.ids.digest(exec_id).is_some() {
            return Err(lost(exec_id));
        }
        let running = sessions.commands.named.values().filter(|session| session.runs());
        let kinds = running.map(|session| session.title.files);
        let kinds = kinds.chain(sessions.starting.values().copied());
        let running = kinds.filter(|files| *files == start.files).count();
        admit(running, start.files, Duration::from_millis(start.timeout_ms))
            .map_err(|message| refused(Reason::TooManyCalls, message))?;
        if start.keep {
            if sessions.ids.full() {
                let message = "this sandbox has used up its exec_ids; leave exec_id empty";
                return Err(refused(Reason::TooManyCalls, message));
            }
            if let Err(error) = sessions.ids.take(exec_id, &start.digest) {
                return Err(match sessions.ids.digest(exec_id) {
                    // Another shim of this sandbox has taken it meanwhile, and may have run it.
                    Some(digest) if digest != start.digest => other(exec_id),
                    Some(_) => lost(exec_id),
                    None => refused(
                        Reason::StoreFailed,
                        format!("exec_id could not be recorded, nothing was started: {error}"),
                    ),
                });
            }
        }
        sessions.starting.insert(exec_id.clone(), start.files);
        Ok(Reserved::Ours)
    }

    async fn spawn(self: &Arc<Self>, start: &wire::Start) -> Result<Arc<Session>, NotStarted> {
        let window = start.window.and_then(window);
        let helper = self.helper_by(start.start_by_ms).await?;
        let spawned = helper.spawn(&start.order, window, start.start_by_ms).await;
        let (host, time) = (Arc::clone(&self.host), Duration::from_millis(start.timeout_ms));
        if matches!(spawned, Err(Failure::Lost)) {
            // Whatever has become of it, the command must not continue unsupervised.
            Tree { host: Arc::clone(&host), leader: None, mark: start.mark.clone() }.end().await;
        }
        let spawned = spawned.map_err(why)?;
        let title = Title {
            exec_id: start.exec_id.clone(),
            keep: start.keep,
            detached: start.detached,
            files: start.files,
            spare_background: start.spare_background,
            never_ran: spawned.never_ran,
            digest: start.digest.clone(),
            title: start.title.clone(),
            started_ms: start.started_ms,
            tty: window.is_some(),
        };
        Ok(life::begin(title, spawned, host, start.mark.clone(), time, Arc::clone(&self.shared)))
    }

    /// Returns the helper, if it is there by this time of `helper::up_ms`.
    async fn helper_by(self: &Arc<Self>, by_ms: u64) -> Result<Arc<Helper>, NotStarted> {
        // A helper that is too late for this command is there for the next.
        let shim = Arc::clone(self);
        let helper = tokio::spawn(async move { shim.helper().await });
        let stuck = || Err(why(Failure::Stuck));
        match timeout(left(by_ms), helper).await {
            Ok(helper) => helper.unwrap_or_else(|_| stuck()),
            Err(_) => stuck(),
        }
    }

    /// Returns the running helper, or starts a new one.
    async fn helper(&self) -> Result<Arc<Helper>, NotStarted> {
        let mut helper = self.helper.lock().await;
        if let Some(there) = helper.as_ref().filter(|helper| !helper.gone().is_cancelled()) {
            return Ok(Arc::clone(there));
        }
        // The VMID may belong to another container by now: do not enter that one.
        if !self.host.runs() {
            let message = "the container does not run any more";
            let refused = refused(Reason::SandboxNotRunning, message);
            return Err(NotStarted { refused, certain: true });
        }
        let fresh = Helper::attach(&self.host, &self.image).await.map_err(why)?;
        Ok(Arc::clone(helper.insert(fresh)))
    }
}

fn left(by_ms: u64) -> Duration {
    Duration::from_millis(by_ms.saturating_sub(helper::up_ms()))
}

fn ended_output(output: EndedOutput) -> wire::EndedOutput {
    let age_ms = daemon::clock::millis(output.age);
    wire::EndedOutput { age_ms, bytes: output.bytes }
}
