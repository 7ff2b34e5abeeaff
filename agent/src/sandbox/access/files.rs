//! Files of a sandbox. The sandbox's own helper does the work inside, as the requested user;
//! nothing on the host ever opens a path of a tenant. Its answers are hostile input: bounded and
//! checked.

use std::{collections::BTreeMap, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use daemon::shares::Part;
use helper::{FileEntry, FileErrorKind, FileHead, FileTask, More, Task};
use proto::{
    Reason,
    exec::{PIECE_BYTES_MAX, pieces},
    id::SandboxRef,
    name::Team,
};
use tokio::{sync::mpsc, time::timeout};

use crate::sandbox::{
    Error, Result,
    exec::{
        self, Execs, Outputs,
        order::{Exit, Input, Output, User},
    },
};

/// Time limit of a file operation inside; archives and file contents have `FLOW`.
const CALL: Duration = Duration::from_secs(14);
/// Time limit for answering a call about files, whatever happens to the sandbox, its helper or its
/// shim: with the whole answer, or with the beginning of a stream. Controllers wait for 18 s.
const ANSWER: Duration = Duration::from_secs(16);
/// Time limit of the stream of an archive or a file.
const FLOW: Duration = Duration::from_secs(60 * 60);
/// Error when there are more entries than a helper from before pages can tell.
const OLD_HELPER: &str = "the directory has more entries than the sandbox's helper can list, which is of an \
    older version: stop and start the sandbox";
/// Longest line that describes a file, bytes, and longest answer of one line.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Longest listing, bytes.
const LISTING_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Pause before an operation may be tried that found no room for its bytes.
const NO_ROOM_RETRY: Duration = Duration::from_secs(1);
/// Permission bits of a new file.
const MODE: u32 = 0o644;
/// Most messages that are buffered per channel.
const MESSAGES: usize = 1;

/// File to write.
#[derive(Clone, PartialEq, Eq)]
pub struct FileContent {
    /// Absolute path.
    pub path: String,
    /// Whole content.
    pub content: Bytes,
    /// Permission bits; `None` leaves those of a file that is written over, and is 0644 for a new one.
    pub mode: Option<u32>,
}

/// The content is not shown: it may be a secret.
impl std::fmt::Debug for FileContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, content, mode } = self;
        write!(f, "FileContent({path:?}, {} bytes, mode {mode:?})", content.len())
    }
}

/// Rules for what an archive is unpacked as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnpackRules {
    /// Owner of everything: `USER` or `USER:GROUP`. Empty: as `keep_existing` says.
    pub owner: String,
    /// Keeps the owner and the permission bits of what is written over. False: as in the archive.
    pub keep_existing: bool,
}

/// Stream of a file or an archive, up to its end or an error.
pub type Flow = mpsc::Receiver<Result<Bytes>>;

/// Bytes that an operation holds as a whole. Those of a small one do not count.
struct Whole {
    /// Part of the team; `None` for a sandbox that is not there.
    part: Option<Part<Team>>,
    bytes: usize,
}

impl Whole {
    /// Adds bytes.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when those of the team's other operations leave no room.
    fn add(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes;
        let counted = self.bytes.saturating_sub(PIECE_BYTES_MAX);
        if self.part.as_mut().is_none_or(|part| part.grow_to(counted)) {
            return Ok(());
        }
        let why = "this team's other calls that write files and list directories on the node hold as much \
                   memory as they may: try again when some have ended";
        Err(Error::new(Reason::TooManyCalls, why).retry_after(NO_ROOM_RETRY))
    }
}

/// File operation that runs inside.
struct Running {
    input: mpsc::Sender<Input>,
    outputs: Outputs,
    stderr: BytesMut,
}

/// Files of a sandbox as one of its users sees them.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    execs: &'a Execs,
    sandbox: &'a SandboxRef,
    user: &'a User,
}

impl Execs {
    /// Returns the files of a sandbox, as this user sees them.
    pub const fn files<'a>(&'a self, sandbox: &'a SandboxRef, user: &'a User) -> Files<'a> {
        Files { execs: self, sandbox, user }
    }
}

impl Files<'_> {
    /// Writes files, each replaced in one step. Returns how many were written.
    ///
    /// # Errors
    /// When one cannot be written; the files before it are, and the error has their number.
    pub async fn write(self, files: Vec<FileContent>) -> Result<u32> {
        // With room for the line of each, so that it need not grow.
        let sizes = files.iter().map(|file| file.content.len() + file.path.len() + 128);
        let mut input = BytesMut::with_capacity(sizes.sum());
        let mut paths = Vec::with_capacity(files.len());
        for FileContent { path, content, mode } in files {
            paths.push(path.clone());
            let size = content.len() as u64;
            let (mode, keep_mode) = (mode.unwrap_or(MODE), mode.is_none());
            input.extend_from_slice(&line(&FileHead { path, mode, keep_mode, size })?);
            input.extend_from_slice(&content);
        }
        let answer = self.answer(FileTask::Write, input.freeze(), LINE_BYTES_MAX).await;
        parse(&answer.map_err(|error| tell_written(error, &paths))?)
    }

    /// Describes a path.
    ///
    /// # Errors
    /// FILE_NOT_FOUND, FILE_REFUSED, or as for any command.
    pub async fn stat(self, path: String) -> Result<FileEntry> {
        parse(&self.answer(FileTask::Stat { path }, Bytes::new(), LINE_BYTES_MAX).await?)
    }

    /// Lists at most `limit` entries of a directory, ordered by name, that come after `after`. Returns
    /// the `after` of the next list too, which is empty when there are no more.
    ///
    /// # Errors
    /// As `stat`.
    pub async fn list(
        self,
        path: String,
        (limit, after): (u32, String),
    ) -> Result<(Vec<FileEntry>, String)> {
        let task = FileTask::List { path, limit, after };
        let answer = self.answer(task, Bytes::new(), LISTING_BYTES_MAX).await?;
        let (mut entries, mut next) = (Vec::new(), String::new());
        for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            if let Ok(More { after, .. }) = serde_json::from_slice(line) {
                if after.is_empty() {
                    return Err(Error::new(Reason::ExecFailed, OLD_HELPER));
                }
                next = after;
            } else if entries.len() < usize::try_from(limit).unwrap_or(usize::MAX) {
                entries.push(parse(line)?);
            }
        }
        Ok((entries, next))
    }

    /// Removes a path; returns false when there was nothing.
    ///
    /// # Errors
    /// As `stat`.
    pub async fn remove(self, path: String, recursive: bool) -> Result<bool> {
        let task = FileTask::Remove { path, recursive };
        parse(&self.answer(task, Bytes::new(), LINE_BYTES_MAX).await?)
    }

    /// Reads a regular file: returns its description, and its bytes as they are consumed.
    ///
    /// # Errors
    /// As `stat`; later errors end the stream.
    pub async fn read(
        self,
        path: String,
        (offset, length): (u64, u64),
    ) -> Result<(FileEntry, Flow)> {
        let task = FileTask::Read { path, offset, length };
        let begun = async {
            let mut running = self.begin(task, FLOW).await?;
            running.close().await;
            let mut seen = BytesMut::new();
            loop {
                if let Some(end) = seen.iter().position(|byte| *byte == b'\n') {
                    let head = parse(&seen[..end])?;
                    seen.advance(end + 1);
                    return Ok((running, head, seen.freeze()));
                }
                if seen.len() > LINE_BYTES_MAX {
                    return Err(nonsense());
                }
                match running.next().await? {
                    Some(bytes) => seen.extend_from_slice(&bytes),
                    None => return Err(nonsense()),
                }
            }
        };
        let (running, head, rest) = in_time(begun).await?;
        Ok((head, self.flow(running, rest)))
    }

    /// Packs a path into a tar archive.
    ///
    /// # Errors
    /// When it cannot begin; later errors end the stream.
    pub async fn download(self, path: String) -> Result<Flow> {
        let begun = async {
            let mut running = self.begin(FileTask::Pack { path }, FLOW).await?;
            running.close().await;
            let first = running.next().await?;
            Ok((running, first.unwrap_or_default()))
        };
        let (running, first) = in_time(begun).await?;
        Ok(self.flow(running, first))
    }

    /// Unpacks a tar archive that comes over `archive`. The end of the channel is the end of the
    /// archive; dropping this call before that cancels it. Returns the number of entries.
    ///
    /// # Errors
    /// FIELD_INVALID when the archive leads out of the directory; or as `stat`.
    pub async fn upload(
        self,
        path: String,
        UnpackRules { owner, keep_existing }: UnpackRules,
        mut archive: mpsc::Receiver<Result<Bytes>>,
    ) -> Result<u64> {
        let task = FileTask::Unpack { path, owner, keep_existing };
        let running = in_time(self.begin(task, FLOW)).await?;
        let input = running.input.clone();
        let feed = async move {
            while let Some(bytes) = archive.recv().await {
                // A helper that reads no more has said why.
                if input.send(Input::Stdin(bytes?)).await.is_err() {
                    break;
                }
            }
            drop(input.send(Input::Eof).await);
            Ok::<(), Error>(())
        };
        let whole = self.whole();
        let mut answer = std::pin::pin!(running.rest(whole, LINE_BYTES_MAX));
        let answer = tokio::select! {
            biased;
            answer = &mut answer => answer?,
            // The helper has all of its input by now.
            fed = feed => {
                fed?;
                in_time(answer).await?
            }
        };
        parse(&answer)
    }

    /// Sends an operation all of its input and returns its whole answer, of at most `max` bytes, in time.
    async fn answer(self, task: FileTask, input: Bytes, max: usize) -> Result<Bytes> {
        let mut whole = self.whole();
        whole.add(input.len())?;
        in_time(async { self.begin(task, CALL).await?.answer(input, whole, max).await }).await
    }

    fn whole(self) -> Whole {
        Whole { part: self.execs.whole(self.sandbox), bytes: 0 }
    }

    async fn begin(self, task: FileTask, time: Duration) -> Result<Running> {
        let limits = self.execs.limits();
        let record = self.execs.awake(self.sandbox).await?;
        // The working directory does not matter: paths are absolute.
        let cwd = Some("/".to_owned());
        let mut start = exec::of_task(Task::Files(task), self.user, cwd, BTreeMap::new())?;
        start.timeout_ms = daemon::clock::millis(time);
        start.title = "(files)".to_owned();
        start.files = true;
        let (input, inputs) = mpsc::channel(MESSAGES);
        let (_, outputs) = self.execs.begin(record, start, limits, inputs).await?;
        Ok(Running { input, outputs, stderr: BytesMut::new() })
    }

    /// Forwards the output on its own task.
    fn flow(self, mut running: Running, first: Bytes) -> Flow {
        let (sender, flow) = mpsc::channel(MESSAGES);
        self.execs.spawn(async move {
            let mut next = Ok(Some(first).filter(|first| !first.is_empty()));
            if matches!(next, Ok(None)) {
                next = running.next().await;
            }
            loop {
                let (message, last) = match next {
                    Ok(Some(bytes)) => (Ok(bytes), false),
                    Ok(None) => return,
                    Err(error) => (Err(error), true),
                };
                // A receiver that goes away drops the operation with it.
                if sender.send(message).await.is_err() || last {
                    return;
                }
                next = tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    next = running.next() => next,
                };
            }
        });
        flow
    }
}

impl Running {
    async fn close(&mut self) {
        // A helper that has ended needs no input.
        drop(self.input.send(Input::Eof).await);
    }

    /// Returns bytes of stdout; `None` after a successful end.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            match self.outputs.recv().await {
                Some(Ok(Output::Stdout(bytes))) => return Ok(Some(bytes)),
                Some(Ok(Output::Stderr(bytes))) => {
                    let room = LINE_BYTES_MAX.saturating_sub(self.stderr.len());
                    self.stderr.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Some(Ok(Output::Exit(Exit { code: 0, .. }))) => return Ok(None),
                Some(Ok(Output::Exit(Exit { timed_out: true, .. }))) => return Err(late()),
                Some(Ok(Output::Exit(_))) => return Err(why(&self.stderr)),
                Some(Err(error)) => return Err(error),
                None => return Err(nonsense()),
            }
        }
    }

    /// Sends all of the input and returns the whole answer.
    async fn answer(self, input: Bytes, whole: Whole, max: usize) -> Result<Bytes> {
        let sender = self.input.clone();
        let feed = async move {
            for piece in pieces(input) {
                if sender.send(Input::Stdin(piece)).await.is_err() {
                    break;
                }
            }
            drop(sender.send(Input::Eof).await);
        };
        let (answer, ()) = tokio::join!(self.rest(whole, max), feed);
        answer
    }

    /// Returns the rest of the answer, of at most `max` bytes: it is what a process of the sandbox says.
    async fn rest(mut self, mut whole: Whole, max: usize) -> Result<Bytes> {
        let mut answer = BytesMut::new();
        while let Some(bytes) = self.next().await? {
            if answer.len() + bytes.len() > max {
                return Err(nonsense());
            }
            whole.add(bytes.len())?;
            answer.extend_from_slice(&bytes);
        }
        Ok(answer.freeze())
    }
}

/// Adds to an error which of the files were written.
fn tell_written(mut error: Error, paths: &[String]) -> Error {
    let all = paths.len();
    // The number is the helper's word. One file fails at least.
    error.files_written =
        error.files_written.filter(|written| usize::try_from(*written).is_ok_and(|n| n < all));
    let Some(written) = error.files_written else { return error };
    let last = usize::try_from(written).ok().and_then(|n| paths.get(n.checked_sub(1)?));
    let message = &error.message;
    error.message = match last {
        Some(last) => format!("{message}; {written} of {all} files are written, up to {last}"),
        None => format!("{message}; none of the {all} files is written"),
    };
    error
}

/// Bounds `work` by `ANSWER`. Late work is cancelled: dropping it ends the helper's work inside.
async fn in_time<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(ANSWER, work).await.unwrap_or_else(|_| Err(late()))
}

fn line(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| Error::new(Reason::FieldInvalid, format!("path: {error}")))?;
    line.push(b'\n');
    Ok(line)
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|_| nonsense())
}

fn nonsense() -> Error {
    Error::new(Reason::ExecFailed, "the file helper in the sandbox sent an invalid answer")
}

fn late() -> Error {
    Error::new(Reason::OutcomeUnknown, "the sandbox's file system did not answer in time")
}

/// Error that the helper wrote to stderr before it failed.
fn why(stderr: &[u8]) -> Error {
    let Ok(error) = serde_json::from_slice::<helper::FileError>(stderr) else { return nonsense() };
    let reason = match error.kind {
        FileErrorKind::NotFound => Reason::FileNotFound,
        FileErrorKind::Refused => Reason::FileRefused,
        FileErrorKind::Invalid => Reason::FieldInvalid,
        FileErrorKind::Full => Reason::StorageFull,
        FileErrorKind::Failed => Reason::ExecFailed,
    };
    let message: String = error.message.chars().filter(|c| !c.is_control()).take(600).collect();
    Error { files_written: error.written, ..Error::new(reason, message) }
}
