//! Files of a sandbox: written, read, listed, removed, and packed as archives. Readers pull the
//! data, so that a slow end slows the other; nothing is buffered here.

use std::{future::ready, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use proto::{
    Reason,
    agent::v1::{files_request::Message as Ask, files_response::Message as Said},
    exec::{PIECE_BYTES_MAX, check_chunk, check_owner, check_path, check_user},
    id::Invalid,
    name::Team,
    sandbox::v1::{
        DownloadArchiveRequest, FileContent, FileInfo, ListDirRequest, ListDirResponse,
        ReadFileRequest, RemoveFileRequest, StatFileRequest, UploadArchiveRequest,
        WriteFilesRequest, upload_archive_request,
    },
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    Error, REST, RETRY, Result, Sandboxes,
    exec::{Target, owner},
};
use crate::node::{self, Node};

/// Longest silence of a node.
const SILENCE: Duration = Duration::from_secs(18);
/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Longest time without data in the middle of an upload.
const IDLE: Duration = Duration::from_secs(60);
/// Limits of one `write_files`: number of files, and bytes of all of them.
const FILES_MAX: usize = 1000;
const FILES_BYTES_MAX: usize = 1536 * 1024;
const MODE_MAX: u32 = 0o7777;

/// One piece of a file.
#[derive(Debug)]
pub enum Piece {
    /// Metadata: always the first piece.
    File(FileInfo),
    /// Next bytes.
    Data(Bytes),
}

impl Sandboxes {
    /// Writes files, each atomically; returns how many.
    ///
    /// # Errors
    /// When a path is not valid, or the sandbox refuses it. The files before the one that is refused are
    /// written, and the error has their number and its path.
    pub async fn write_files(&self, team: &Team, mut request: WriteFilesRequest) -> Result<u32> {
        check_user(&request.user)?;
        check_files(&request.files)?;
        self.may_change()?;
        let place = self.holding(team, &mut request.id)?;
        let paths: Vec<_> = request.files.iter().map(|file| file.path.clone()).collect();
        let answer = self.one(&place, Ask::Write(request)).await.map_err(|mut error| {
            if let Some(partial) = &mut error.partial {
                let failed = usize::try_from(partial.files_written).ok();
                partial.failed_path = failed.and_then(|index| paths.get(index).cloned());
            }
            error
        })?;
        let Said::Write(answer) = answer else {
            return Err(self.nonsense(&place.0));
        };
        Ok(answer.written)
    }

    /// Reads a file: its metadata, then its bytes.
    ///
    /// # Errors
    /// When there is none, or it cannot be read. Later errors end the stream.
    pub async fn read_file(
        self: &Arc<Self>,
        team: &Team,
        mut request: ReadFileRequest,
    ) -> Result<impl Stream<Item = Result<Piece>> + Send + use<>> {
        check_user(&request.user)?;
        check_path("path", &request.path)?;
        let place = self.holding(team, &mut request.id)?;
        self.many(place, Ask::Read(request)).await
    }

    /// Returns the metadata of a path.
    ///
    /// # Errors
    /// When there is nothing.
    pub async fn stat_file(&self, team: &Team, mut request: StatFileRequest) -> Result<FileInfo> {
        check_user(&request.user)?;
        check_path("path", &request.path)?;
        let place = self.holding(team, &mut request.id)?;
        let Said::File(file) = self.one(&place, Ask::Stat(request)).await? else {
            return Err(self.nonsense(&place.0));
        };
        Ok(file)
    }

    /// Lists a directory.
    ///
    /// # Errors
    /// When there is none.
    pub async fn list_dir(
        &self,
        team: &Team,
        mut request: ListDirRequest,
    ) -> Result<ListDirResponse> {
        check_user(&request.user)?;
        check_path("path", &request.path)?;
        let place = self.holding(team, &mut request.id)?;
        let Said::List(list) = self.one(&place, Ask::List(request)).await? else {
            return Err(self.nonsense(&place.0));
        };
        Ok(list)
    }

    /// Removes a path; returns whether it existed.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove_file(&self, team: &Team, mut request: RemoveFileRequest) -> Result<bool> {
        check_user(&request.user)?;
        check_path("path", &request.path)?;
        if request.path.split('/').all(|part| part.is_empty() || part == ".") {
            return Err(Invalid::new("path", "must not be the root").into());
        }
        self.may_change()?;
        let place = self.holding(team, &mut request.id)?;
        let Said::Remove(answer) = self.one(&place, Ask::Remove(request)).await? else {
            return Err(self.nonsense(&place.0));
        };
        Ok(answer.existed)
    }

    /// Unpacks the archive in `input`; returns the number of entries.
    ///
    /// # Errors
    /// When it breaks the protocol, or the sandbox refuses it. Part of it may be unpacked.
    pub async fn upload_archive<S>(&self, team: &Team, mut input: S) -> Result<u64>
    where
        S: Stream<Item = Result<UploadArchiveRequest>> + Send + Unpin + 'static,
    {
        let first = match timeout(FIRST, input.next()).await {
            Ok(Some(first)) => first?.message,
            Ok(None) | Err(_) => None,
        };
        let Some(upload_archive_request::Message::Start(mut start)) = first else {
            return Err(Invalid::new("start", "must be the first message").into());
        };
        check_user(&start.user)?;
        check_path("start.path", &start.path)?;
        check_owner("start.owner", &start.owner)?;
        self.may_change()?;
        let (node, owner) = self.holding(team, &mut start.id)?;

        let (progress, mut seen) = watch::channel(Progress::Since(Instant::now()));
        let upload = stream::once(ready(Ask::Upload(start))).chain(data(input, progress));
        let mut call = std::pin::pin!(async {
            let mut said = std::pin::pin!(node.client.files(&owner, upload).await?);
            said.next().await.transpose()
        });
        loop {
            // The caller may be silent for longer than the node, which has all that it needs.
            let (limit, what) = match &*seen.borrow_and_update() {
                Progress::Since(when) => (*when + IDLE, "nothing of it moved for 60 s"),
                Progress::Whole(when) => (*when + SILENCE, "the node did not say that it is done"),
                Progress::Wrong(error) => return Err(error.clone()),
            };
            tokio::select! {
                answer = &mut call => {
                    return match answer.map_err(|error| self.node_error(&node, error))? {
                        Some(Said::Upload(answer)) => Ok(answer.entries),
                        Some(_) => Err(self.nonsense(&node)),
                        None => Err(self.unsaid(&node)),
                    };
                }
                // `progress` lives as long as the stream, and at most until its end.
                Ok(()) = seen.changed() => {}
                () = self.stop.cancelled() => return Err(stopping()),
                () = sleep_until(limit) => {
                    let what = format!("the archive may be unpacked in part: {what}");
                    return Err(Error::new(Reason::OutcomeUnknown, what));
                }
            }
        }
    }

    /// Packs a file or a directory.
    ///
    /// # Errors
    /// When there is none. Later errors end the stream.
    pub async fn download_archive(
        self: &Arc<Self>,
        team: &Team,
        mut request: DownloadArchiveRequest,
    ) -> Result<impl Stream<Item = Result<Piece>> + Send + use<>> {
        check_user(&request.user)?;
        check_path("path", &request.path)?;
        let place = self.holding(team, &mut request.id)?;
        self.many(place, Ask::Download(request)).await
    }

    /// Returns the sandbox's node, and replaces the caller's form of the id by the sandbox id.
    fn holding(&self, team: &Team, id: &mut String) -> Result<Target> {
        let (entry, node) = self.on_node(team, id)?;
        *id = entry.id.to_string();
        Ok((node, owner(&entry)))
    }

    /// Sends a request that has one answer.
    async fn one(&self, (node, owner): &Target, ask: Ask) -> Result<Said> {
        let asked = async {
            let mut said =
                std::pin::pin!(node.client.files(owner, stream::once(ready(ask))).await?);
            said.next().await.transpose()
        };
        match timeout(SILENCE, asked).await {
            Ok(Ok(Some(said))) => Ok(said),
            Ok(Ok(None)) => Err(self.unsaid(node)),
            Ok(Err(error)) => Err(self.node_error(node, error)),
            Err(_) => Err(self.node_error(node, node::Error::Unknown(silent()))),
        }
    }

    /// Sends a request with many answers. Waits for the first: a refusal is the call's error.
    async fn many(
        self: &Arc<Self>,
        (node, owner): Target,
        ask: Ask,
    ) -> Result<impl Stream<Item = Result<Piece>> + Send + use<>> {
        let deadline = Instant::now() + SILENCE;
        let late = || self.unreachable(&node.name, &silent());
        let asked = node.client.files(&owner, stream::once(ready(ask)));
        let said = timeout_at(deadline, asked).await.map_err(|_| late())?;
        let said = said.map_err(|error| self.node_error(&node, error))?;
        let mut said = Box::pin(said.peekable());
        timeout_at(deadline, said.as_mut().peek()).await.map_err(|_| late())?;
        if let Some(Err(error)) = said.as_mut().peek().await {
            return Err(self.node_error(&node, error.clone()));
        }
        let state = Some((self.clone(), node, said));
        Ok(stream::unfold(state, |state| async {
            let (this, node, mut said) = state?;
            let next = tokio::select! {
                next = timeout(SILENCE, said.next()) => next,
                () = this.stop.cancelled() => return Some((Err(stopping()), None)),
            };
            let piece = match next {
                Ok(Some(Ok(Said::File(file)))) => Ok(Piece::File(file)),
                Ok(Some(Ok(Said::Data(bytes)))) => Ok(Piece::Data(bytes)),
                Ok(Some(Ok(_))) => Err(this.nonsense(&node)),
                Ok(Some(Err(error))) => Err(this.node_error(&node, error)),
                Ok(None) => return None,
                Err(_) => Err(this.unreachable(&node.name, &silent())),
            };
            let state = piece.is_ok().then_some((this, node, said));
            Some((piece, state))
        }))
    }

    fn nonsense(&self, node: &Node) -> Error {
        self.node_error(node, node::Error::Nonsense("it answered another question".into()))
    }

    fn unsaid(&self, node: &Node) -> Error {
        self.node_error(node, node::Error::Nonsense("it said nothing".into()))
    }
}

/// Checks the files of one call.
pub(super) fn check_files(files: &[FileContent]) -> Result<(), Invalid> {
    if files.is_empty() || files.len() > FILES_MAX {
        return Err(Invalid::new("files", "must be 1 to 1000"));
    }
    let mut bytes = 0;
    for (index, file) in files.iter().enumerate() {
        let here = |invalid: Invalid| invalid.under(format_args!("files[{index}]"));
        check_path("path", &file.path).map_err(here)?;
        if file.path.ends_with('/') {
            return Err(here(Invalid::new("path", "must not end with a slash")));
        }
        if file.mode > MODE_MAX {
            return Err(here(Invalid::new("mode", "must be 0 to 07777")));
        }
        bytes += file.content.len();
    }
    if bytes > FILES_BYTES_MAX {
        let why = "must have at most 1.5 MiB in all; UploadArchive takes more";
        return Err(Invalid::new("files", why));
    }
    Ok(())
}

/// Progress of an upload.
enum Progress {
    /// Time of the last data.
    Since(Instant),
    /// Time at which the caller's data ended.
    Whole(Instant),
    /// Invalid input of the caller.
    Wrong(Error),
}

/// Returns the bytes of an archive, in pieces for an agent. An error goes to `progress` and the stream stays open: its
/// end would say that the archive is complete.
fn data<S>(input: S, progress: watch::Sender<Progress>) -> impl Stream<Item = Ask> + Send + 'static
where
    S: Stream<Item = Result<UploadArchiveRequest>> + Send + Unpin + 'static,
{
    stream::unfold((input, progress, Bytes::new()), |(mut input, progress, mut rest)| async move {
        let error = loop {
            if !rest.is_empty() {
                let piece = rest.split_to(rest.len().min(PIECE_BYTES_MAX));
                progress.send_replace(Progress::Since(Instant::now()));
                return Some((Ask::Data(piece), (input, progress, rest)));
            }
            match input.next().await {
                Some(Ok(message)) => match message.message {
                    Some(upload_archive_request::Message::Data(bytes)) if !bytes.is_empty() => {
                        if let Err(invalid) = check_chunk("data", &bytes) {
                            break Error::from(invalid);
                        }
                        rest = bytes;
                    }
                    Some(upload_archive_request::Message::Start(_)) => {
                        break Invalid::new("start", "must be the first message only").into();
                    }
                    // No progress.
                    Some(upload_archive_request::Message::Data(_)) | None => sleep(REST).await,
                },
                Some(Err(error)) => break error,
                None => {
                    progress.send_replace(Progress::Whole(Instant::now()));
                    return None;
                }
            }
        };
        progress.send_replace(Progress::Wrong(error));
        std::future::pending().await
    })
}

fn stopping() -> Error {
    Error::new(Reason::ShuttingDown, "the controller is stopping").retry(RETRY)
}

fn silent() -> String {
    format!("its agent said nothing for {} s", SILENCE.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn archive_goes_on_in_small_pieces_and_a_message_of_nothing_is_no_progress() {
        let message = |bytes: usize| {
            let data = upload_archive_request::Message::Data(vec![7; bytes].into());
            Ok(UploadArchiveRequest { message: Some(data) })
        };
        let nothing = (0..10).map(|_| message(0)).collect::<Vec<_>>();
        let input = stream::iter(nothing).chain(stream::iter([message(200_000)]));
        let (progress, seen) = watch::channel(Progress::Since(Instant::now()));
        let mut data = Box::pin(data(input, progress));
        timeout(9 * REST, data.next()).await.map(drop).expect_err("nothing was sent");
        assert!(!seen.has_changed().expect("it goes on"));
        let mut sizes = Vec::new();
        while let Some(message) = data.next().await {
            let Ask::Data(piece) = message else { panic!("{message:?}") };
            sizes.push(piece.len());
            assert!(matches!(*seen.borrow(), Progress::Since(_)));
        }
        assert_eq!(sizes, [PIECE_BYTES_MAX, PIECE_BYTES_MAX, PIECE_BYTES_MAX, 3392]);
        assert!(matches!(*seen.borrow(), Progress::Whole(_)));
    }
}
