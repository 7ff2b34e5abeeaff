//! `Files` on the wire: one operation per call.

use std::{pin::Pin, time::Duration};

use daemon::status::Refusal;
use data_encoding::HEXLOWER;
use helper::{FileEntry, FileKind};
use proto::{
    agent::v1::{self as agent, files_request, files_response},
    exec::{CHUNK_BYTES_MAX, check_owner, pieces},
    id::Invalid,
    sandbox::v1 as wire,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Response, Status, Streaming};

use super::status::refusal;
use crate::sandbox::{
    Error,
    access::files::{FileContent, Flow, UnpackRules},
    exec::{Execs, order},
};

/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Longest name of an entry in a directory, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Most entries of a directory on a page.
const ENTRIES_MAX: u32 = 5000;
/// Longest path, in bytes.
const PATH_BYTES_MAX: usize = 4095;
/// Most files of one call, and most bytes of them.
const FILES_MAX: usize = 1000;
const FILES_BYTES_MAX: usize = 1536 * 1024;
/// Most messages in transit. What is behind them waits in the window of its stream.
const MESSAGES: usize = 1;

pub(super) type Responses =
    Pin<Box<dyn Stream<Item = Result<agent::FilesResponse, Status>> + Send>>;

type Answer = files_response::Message;

pub(super) async fn files(
    execs: Execs,
    mut requests: Streaming<agent::FilesRequest>,
) -> Result<Response<Responses>, Status> {
    let first = timeout(FIRST, requests.message()).await;
    let first = first.map_err(|_| invalid("message", "must come within 10 s"))??;
    let Some(message) = first.and_then(|request| request.message) else {
        return Err(invalid("message", "must be an operation"));
    };
    let one = |answer: Answer| -> Responses { Box::pin(tokio_stream::once(Ok(wrap(answer)))) };
    Ok(Response::new(match message {
        files_request::Message::Write(ask) => {
            let (id, user) = who(&ask.id, &ask.user)?;
            let files = contents(ask.files).map_err(Refusal::from)?;
            let written = execs.files(&id, &user).write(files).await.map_err(refusal)?;
            one(Answer::Write(wire::WriteFilesResponse { written }))
        }
        files_request::Message::Stat(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            let entry = execs.files(&id, &user).stat(path).await.map_err(refusal)?;
            one(Answer::File(info(entry)))
        }
        files_request::Message::List(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            let page = page(ask.page_size, ask.page_token).map_err(Refusal::from)?;
            let listed = execs.files(&id, &user).list(path, page).await;
            let (entries, next) = listed.map_err(refusal)?;
            let entries = entries.into_iter().map(info).collect();
            one(Answer::List(wire::ListDirResponse { entries, next_page_token: next }))
        }
        files_request::Message::Remove(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            if path.trim_matches('/').is_empty() {
                return Err(invalid("path", "must not be the root"));
            }
            let removed = execs.files(&id, &user).remove(path, ask.recursive).await;
            let existed = removed.map_err(refusal)?;
            one(Answer::Remove(wire::RemoveFileResponse { existed }))
        }
        files_request::Message::Read(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            let range = (ask.offset, ask.length);
            let (entry, flow) = execs.files(&id, &user).read(path, range).await.map_err(refusal)?;
            let head = tokio_stream::once(Ok(wrap(Answer::File(info(entry)))));
            Box::pin(head.chain(data(flow)))
        }
        files_request::Message::Download(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            Box::pin(data(execs.files(&id, &user).download(path).await.map_err(refusal)?))
        }
        files_request::Message::Upload(ask) => {
            let ((id, user), path) = (who(&ask.id, &ask.user)?, path(ask.path)?);
            check_owner("owner", &ask.owner).map_err(Refusal::from)?;
            let rules = UnpackRules { owner: ask.owner, keep_existing: ask.keep_existing };
            let (sender, archive) = mpsc::channel(MESSAGES);
            let pass = pass(requests, sender);
            let upload = execs.files(&id, &user).upload(path, rules, archive);
            let (entries, ()) = tokio::join!(upload, pass);
            let entries = entries.map_err(refusal)?;
            one(Answer::Upload(wire::UploadArchiveResponse { entries }))
        }
        files_request::Message::Data(_) => {
            return Err(invalid("data", "must follow an upload"));
        }
    }))
}

fn invalid(what: &'static str, why: &str) -> Status {
    Refusal::from(Invalid::new(what, why)).into()
}

fn wrap(message: Answer) -> agent::FilesResponse {
    agent::FilesResponse { message: Some(message) }
}

fn data(flow: Flow) -> impl Stream<Item = Result<agent::FilesResponse, Status>> + Send {
    ReceiverStream::new(flow).map(|bytes| match bytes {
        Ok(bytes) => Ok(wrap(Answer::Data(bytes))),
        Err(error) => Err(refusal(error).into()),
    })
}

/// Forwards an archive to its end; an invalid message ends it.
async fn pass(
    mut requests: Streaming<agent::FilesRequest>,
    to: mpsc::Sender<Result<bytes::Bytes, Error>>,
) {
    // A message is read when there is room for it.
    while let Ok(room) = to.reserve().await {
        let message = tokio::select! {
            biased;
            () = to.closed() => return,
            message = requests.message() => message,
        };
        let error = match message {
            Ok(Some(agent::FilesRequest { message: Some(files_request::Message::Data(data)) }))
                if data.len() <= CHUNK_BYTES_MAX =>
            {
                let mut pieces = pieces(data);
                if let Some(first) = pieces.next() {
                    room.send(Ok(first));
                }
                for piece in pieces {
                    if to.send(Ok(piece)).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            Ok(Some(_)) => Error::new(
                proto::Reason::FieldInvalid,
                "data: must be at most 256 KiB, and nothing else may follow",
            ),
            Ok(None) => return,
            Err(status) => Error::new(
                proto::Reason::ExecFailed,
                format!("the archive broke off: {}", status.message()),
            ),
        };
        room.send(Err(error));
        return;
    }
}

fn who(id: &str, user: &str) -> Result<(proto::id::SandboxRef, order::User), Status> {
    let id = id.parse().map_err(Refusal::from)?;
    Ok((id, user.parse().map_err(Refusal::from)?))
}

fn path(text: String) -> Result<String, Status> {
    check(&text).map_err(Refusal::from)?;
    Ok(text)
}

/// Checks a page of a directory: its size, and the token of the previous one.
fn page(size: u32, token: String) -> Result<(u32, String), Invalid> {
    let size = if size == 0 { ENTRIES_MAX } else { size };
    if size > ENTRIES_MAX {
        return Err(Invalid::new("page_size", "must be 1 to 5000, or 0 for 5000"));
    }
    // The name of an entry, in hex.
    if token.len() > 2 * NAME_BYTES_MAX || HEXLOWER.decode(token.as_bytes()).is_err() {
        return Err(Invalid::new("page_token", "must be the token of the page before"));
    }
    Ok((size, token))
}

fn check(path: &str) -> Result<(), Invalid> {
    if path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0') {
        return Ok(());
    }
    Err(Invalid::new("path", "must be an absolute path of at most 4095 bytes without a NUL"))
}

fn contents(files: Vec<wire::FileContent>) -> Result<Vec<FileContent>, Invalid> {
    let bytes: usize = files.iter().map(|file| file.content.len()).sum();
    if files.is_empty() || files.len() > FILES_MAX || bytes > FILES_BYTES_MAX {
        return Err(Invalid::new("files", "must be 1 to 1000, of at most 1.5 MiB in all"));
    }
    let content = |(index, file): (usize, wire::FileContent)| {
        let here = |invalid: Invalid| invalid.under(format_args!("files[{index}]"));
        check(&file.path).map_err(here)?;
        if file.mode > 0o7777 {
            return Err(here(Invalid::new("mode", "must be 0 to 07777")));
        }
        let mode = (file.mode != 0).then_some(file.mode);
        Ok(FileContent { path: file.path, content: file.content, mode })
    };
    files.into_iter().enumerate().map(content).collect()
}

fn info(entry: FileEntry) -> wire::FileInfo {
    wire::FileInfo {
        name: entry.name,
        kind: match entry.kind {
            FileKind::File => wire::FileKind::File,
            FileKind::Directory => wire::FileKind::Directory,
            FileKind::Symlink => wire::FileKind::Symlink,
            FileKind::Special => wire::FileKind::Special,
        }
        .into(),
        size: entry.size,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        modified_at: Some(prost_types::Timestamp {
            seconds: entry.modified_ms.div_euclid(1000),
            nanos: i32::try_from(entry.modified_ms.rem_euclid(1000) * 1_000_000)
                .unwrap_or_default(),
        }),
        target: entry.target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_token_of_a_directory_is_the_name_of_an_entry_in_hex() {
        assert_eq!(page(0, String::new()), Ok((ENTRIES_MAX, String::new())));
        assert_eq!(page(7, "612e62".to_owned()), Ok((7, "612e62".to_owned())));
        for bad in ["6", "6g", "2F", &"61".repeat(NAME_BYTES_MAX + 1)] {
            let refused = page(7, bad.to_owned()).expect_err(bad);
            assert_eq!(refused.what, "page_token");
        }
    }

    #[test]
    fn invalid_paths_and_contents_are_refused() {
        assert_eq!(check("/a b"), Ok(()));
        for bad in ["", "a", "./a", "/a\0b", &format!("/{}", "x".repeat(4095))] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        let file = |path: &str, bytes: usize, mode| wire::FileContent {
            path: path.into(),
            content: vec![0; bytes].into(),
            mode,
        };
        let good = contents(vec![file("/a", 1, 0), file("/b", 0, 0o4755)]).expect("valid");
        assert_eq!((good[0].mode, good[1].mode), (None, Some(0o4755)));
        let second = contents(vec![file("/a", 1, 0), file("b", 1, 0)]).expect_err("no path");
        assert_eq!(second.what, "files[1].path");
        for bad in [
            vec![],
            vec![file("a", 1, 0)],
            vec![file("/a", 1, 0o10000)],
            vec![file("/a", FILES_BYTES_MAX, 0), file("/b", 1, 0)],
            vec![file("/a", 0, 0); FILES_MAX + 1],
        ] {
            assert!(contents(bad).is_err());
        }
    }
}
