//! Files of a sandbox. The sandbox's own helper does the work inside, as the requested user;
//! nothing on the host ever opens a path of a tenant. Its answers are hostile input: bounded and
//! checked.

use std::{collections::BTreeMap, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use helper::{FileEntry, FileErrorKind, FileHead, FileTask, Task};
use proto::{Reason, id::SandboxRef};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Error,
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
/// Longest line that describes a file, bytes.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Longest answer that is not a file, bytes: a listing, or why it failed.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest message of stdin, bytes.
const CHUNK: usize = 256 * 1024;
/// Most messages that are buffered per channel.
const MESSAGES: usize = 4;
/// Most entries of a listing.
pub const ENTRIES_MAX: u32 = 5000;

/// File to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileContent {
    /// Absolute path.
    pub path: String,
    /// Whole content.
    pub content: Bytes,
    /// Permission bits.
    pub mode: u32,
}

/// Stream of a file or an archive, up to its end or an error.
pub type Flow = mpsc::Receiver<Result<Bytes, Error>>;

/// File operation that runs inside.
struct Running {
    input: mpsc::Sender<Input>,
    outputs: Outputs,
    stderr: BytesMut,
}

impl Execs {
    /// Writes files, each replaced in one step. Returns how many were written.
    ///
    /// # Errors
    /// When one cannot be written; the files before it are.
    pub async fn write_files(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        files: Vec<FileContent>,
    ) -> Result<u32, Error> {
        let mut input = BytesMut::new();
        for FileContent { path, content, mode } in files {
            let head = FileHead { path, mode, size: content.len() as u64 };
            input.extend_from_slice(&line(&head)?);
            input.extend_from_slice(&content);
        }
        let answer = self.answer(sandbox, user, FileTask::Write, input.freeze());
        parse(&answer.await?)
    }

    /// Describes a path.
    ///
    /// # Errors
    /// FILE_NOT_FOUND, FILE_REFUSED, or as for any command.
    pub async fn stat_file(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
    ) -> Result<FileEntry, Error> {
        parse(&self.answer(sandbox, user, FileTask::Stat { path }, Bytes::new()).await?)
    }

    /// Lists a directory, ordered by name; the flag is true when there are more entries.
    ///
    /// # Errors
    /// As `stat_file`.
    pub async fn list_dir(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
    ) -> Result<(Vec<FileEntry>, bool), Error> {
        let task = FileTask::List { path, limit: ENTRIES_MAX };
        let answer = self.answer(sandbox, user, task, Bytes::new()).await?;
        let (mut entries, mut more) = (Vec::new(), false);
        for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            if line == b"{\"more\":true}" {
                more = true;
            } else if entries.len() < usize::try_from(ENTRIES_MAX).unwrap_or(usize::MAX) {
                entries.push(parse(line)?);
            }
        }
        Ok((entries, more))
    }

    /// Removes a path; returns false when there was nothing.
    ///
    /// # Errors
    /// As `stat_file`.
    pub async fn remove_file(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
        recursive: bool,
    ) -> Result<bool, Error> {
        let task = FileTask::Remove { path, recursive };
        parse(&self.answer(sandbox, user, task, Bytes::new()).await?)
    }

    /// Reads a regular file: returns its description, and its bytes as they are consumed.
    ///
    /// # Errors
    /// As `stat_file`; later errors end the stream.
    pub async fn read_file(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
        (offset, length): (u64, u64),
    ) -> Result<(FileEntry, Flow), Error> {
        let task = FileTask::Read { path, offset, length };
        let begun = async {
            let mut running = self.files(sandbox, user, task, FLOW).await?;
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
    pub async fn download(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
    ) -> Result<Flow, Error> {
        let begun = async {
            let mut running = self.files(sandbox, user, FileTask::Pack { path }, FLOW).await?;
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
    /// FIELD_INVALID when the archive leads out of the directory; or as `stat_file`.
    pub async fn upload(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        path: String,
        mut archive: mpsc::Receiver<Result<Bytes, Error>>,
    ) -> Result<u64, Error> {
        let running = in_time(self.files(sandbox, user, FileTask::Unpack { path }, FLOW)).await?;
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
        let mut answer = std::pin::pin!(running.rest());
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

    /// Sends an operation all of its input and returns its whole answer, in time.
    async fn answer(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        task: FileTask,
        input: Bytes,
    ) -> Result<Bytes, Error> {
        in_time(async { self.files(sandbox, user, task, CALL).await?.answer(input).await }).await
    }

    async fn files(
        &self,
        sandbox: &SandboxRef,
        user: &User,
        task: FileTask,
        time: Duration,
    ) -> Result<Running, Error> {
        let limits = self.limits();
        let record = self.awake(sandbox).await?;
        // The working directory does not matter: paths are absolute.
        let cwd = Some("/".to_owned());
        let mut start = exec::of_task(Task::Files(task), user, cwd, BTreeMap::new())?;
        start.timeout_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        start.title = "(files)".to_owned();
        let (input, inputs) = mpsc::channel(MESSAGES);
        let (_, outputs) = self.begin(record, start, limits, inputs).await?;
        Ok(Running { input, outputs, stderr: BytesMut::new() })
    }

    /// Forwards the output on its own task.
    fn flow(&self, mut running: Running, first: Bytes) -> Flow {
        let (sender, flow) = mpsc::channel(MESSAGES);
        self.spawn(async move {
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
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
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
    async fn answer(self, mut input: Bytes) -> Result<Bytes, Error> {
        let sender = self.input.clone();
        let feed = async move {
            while !input.is_empty() {
                let chunk = input.split_to(input.len().min(CHUNK));
                if sender.send(Input::Stdin(chunk)).await.is_err() {
                    break;
                }
            }
            drop(sender.send(Input::Eof).await);
        };
        let (answer, ()) = tokio::join!(self.rest(), feed);
        answer
    }

    async fn rest(mut self) -> Result<Bytes, Error> {
        let mut answer = BytesMut::new();
        while let Some(bytes) = self.next().await? {
            if answer.len() + bytes.len() > ANSWER_BYTES_MAX {
                return Err(nonsense());
            }
            answer.extend_from_slice(&bytes);
        }
        Ok(answer.freeze())
    }
}

/// Bounds `work` by `ANSWER`. Late work is cancelled: dropping it ends the helper's work inside.
async fn in_time<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(ANSWER, work).await.unwrap_or_else(|_| Err(late()))
}

fn line(value: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| Error::new(Reason::FieldInvalid, format!("path: {error}")))?;
    line.push(b'\n');
    Ok(line)
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
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
    Error::new(reason, message)
}
