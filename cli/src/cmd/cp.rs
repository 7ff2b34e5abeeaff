//! `cp`: copies files and directories as tar archives, packed and unpacked in the stream.
//!
//! Archives from a sandbox are not trusted: no entry is written outside of the destination.

use std::{
    ffi::OsStr,
    fs,
    io::{self, IsTerminal, Read, Write},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::Either, pin_mut, stream};
use proto::{
    Reason,
    sandbox::v1::{
        ArchiveStart, DownloadArchiveRequest, FileKind, StatFileRequest, UploadArchiveRequest,
        upload_archive_request,
    },
};
use serde_json::json;
use tar::{Archive, EntryType};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    args::{Cp, Place},
    client::{Controller, answer},
    failure::Failure,
    output::Output,
    progress::Bar,
};

/// Bytes of one message.
const CHUNK: usize = 128 * 1024;
/// Chunks queued between the archive and the connection.
const QUEUE: usize = 8;
/// Silence after which the controller ends a transfer.
const SILENCE: Duration = Duration::from_secs(45);

pub(super) async fn run(controller: Controller, cp: Cp, output: Output) -> Result<u8, Failure> {
    let user = cp.user.unwrap_or_default();
    let (id, bytes) = match (cp.source, cp.destination) {
        (Place::Sandbox { id, path }, to @ (Place::Here(_) | Place::Stream)) => {
            let bar = Bar::new(output.json, format!("copying {path}"), None);
            let request = DownloadArchiveRequest { id: id.clone(), path, user };
            (id, download(&controller, request, to, bar).await?)
        }
        (from @ (Place::Here(_) | Place::Stream), Place::Sandbox { id, path }) => {
            let start = ArchiveStart { id: id.clone(), path, user };
            (id, upload(&controller, from, start, output).await?)
        }
        _ => {
            return Err(Failure::usage(
                "exactly one of the two must be in a sandbox",
                "name it ID:/path; `sandboxctl cp --help` has examples",
            ));
        }
    };
    if output.json {
        output.value(&json!({ "id": id, "archive_bytes": bytes }))?;
    }
    Ok(0)
}

// ---- up -------------------------------------------------------------------------------------

/// Place of the local files in the archive.
#[derive(Debug, PartialEq, Eq)]
struct Packing {
    /// Directory in the sandbox that the archive is unpacked into.
    into: String,
    /// Name of the root entry; empty to put our directory's content right into `into`.
    name: String,
}

/// Kind of the object at a path of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Nothing,
    Directory,
    Other,
}

async fn upload(
    controller: &Controller,
    from: Place,
    mut start: ArchiveStart,
    output: Output,
) -> Result<u64, Failure> {
    let (sender, pieces) = mpsc::channel(QUEUE);
    let (what, size, packed) = match from {
        Place::Here(path) => {
            let about = fs::symlink_metadata(&path).map_err(|error| local(&path, &error))?;
            let there = look(controller, &start).await?;
            let packing = packing(&path, about.is_dir(), &start.path, there)?;
            start.path = packing.into;
            let size = about.is_file().then_some(about.len());
            let what = format!("copying {}", path.display());
            (what, size, spawn_blocking(move || pack(&path, &packing.name, Pipe::new(sender))))
        }
        Place::Stream | Place::Sandbox { .. } => {
            let copied = move || {
                let mut pipe = Pipe::new(sender);
                io::copy(&mut io::stdin().lock(), &mut pipe)
                    .and_then(|_| pipe.flush())
                    .map_err(|error| Failure::local(format!("cannot read stdin: {error}")))
            };
            ("copying stdin".into(), None, spawn_blocking(copied))
        }
    };
    let bar = Bar::new(output.json, what, size);
    let counter = bar.clone();
    let (whole, is_whole) = oneshot::channel::<()>();
    // A failed packing must not look like a complete archive: the stream then never ends.
    let end = stream::once(is_whole).filter_map(async |whole: Result<(), _>| match whole {
        Ok(()) => None::<UploadArchiveRequest>,
        Err(_) => std::future::pending().await,
    });
    let first = upload_archive_request::Message::Start(start);
    let data = ReceiverStream::new(pieces).map(move |bytes: Bytes| {
        counter.add(bytes.len() as u64);
        UploadArchiveRequest { message: Some(upload_archive_request::Message::Data(bytes)) }
    });
    let first = UploadArchiveRequest { message: Some(first) };
    let messages = stream::once(std::future::ready(first)).chain(data).chain(end);
    let mut client = controller.sandboxes.clone();
    let sent = async { client.upload_archive(messages).await };
    let packed = async {
        joined(packed).await?;
        whole.send(()).ok();
        Ok::<(), Failure>(())
    };
    pin_mut!(sent);
    pin_mut!(packed);
    let answer = match futures_util::future::select(sent, packed).await {
        // The upload was refused, most likely; the packing ends when its output is no longer read.
        Either::Left((answer, _)) => answer,
        Either::Right((packed, sent)) => {
            packed?;
            match timeout(SILENCE * 4, sent).await {
                Ok(answer) => answer,
                Err(_) => {
                    return Err(Failure::deadline("the archive was not unpacked", SILENCE * 4));
                }
            }
        }
    };
    answer?;
    Ok(bar.done())
}

/// Reads the kind of the destination; a link to a directory is a directory.
async fn look(controller: &Controller, start: &ArchiveStart) -> Result<There, Failure> {
    let stat = async |path: String| {
        let request = StatFileRequest { id: start.id.clone(), path, user: start.user.clone() };
        match answer(controller.sandboxes.clone().stat_file(request)).await {
            Ok(answer) => Ok(answer.file.map(|file| file.kind())),
            Err(failure) if failure.known() == Some(Reason::FileNotFound) => Ok(None),
            Err(failure) => Err(failure),
        }
    };
    let trimmed = start.path.trim_end_matches('/');
    Ok(match stat(if trimmed.is_empty() { "/".into() } else { trimmed.to_owned() }).await? {
        None => There::Nothing,
        Some(FileKind::Directory) => There::Directory,
        Some(FileKind::Symlink) => match stat(format!("{trimmed}/.")).await {
            Ok(Some(FileKind::Directory)) => There::Directory,
            _ => There::Other,
        },
        Some(FileKind::File | FileKind::Special | FileKind::Unspecified) => There::Other,
    })
}

/// Copies into an existing directory under the source's name, otherwise to the named path.
fn packing(from: &Path, is_dir: bool, to: &str, there: There) -> Result<Packing, Failure> {
    let contents = from.as_os_str().as_encoded_bytes().ends_with(b"/.");
    let trimmed = to.trim_end_matches('/');
    let into = if trimmed.is_empty() { "/" } else { trimmed }.to_owned();
    match there {
        There::Directory if is_dir && contents => Ok(Packing { into, name: String::new() }),
        There::Directory => {
            // `..` and `.` have no name of their own.
            let named = from.canonicalize().ok();
            let name = from.file_name().or_else(|| named.as_deref().and_then(Path::file_name));
            let name = name.and_then(OsStr::to_str).ok_or_else(|| {
                let what = format!("{} has no name that is text", from.display());
                Failure::usage(what, "name the destination with its last part")
            })?;
            Ok(Packing { into, name: name.to_owned() })
        }
        There::Other if is_dir => Err(Failure::usage(
            format!("{to} is not a directory, and {} is one", from.display()),
            "choose another destination",
        )),
        There::Nothing if is_dir => Ok(Packing { into, name: String::new() }),
        There::Nothing if to.ends_with('/') => Err(Failure::usage(
            format!("there is no directory {to} in the sandbox"),
            "leave the last slash out, or make it: `sandboxctl exec ID -- mkdir -p DIRECTORY`",
        )),
        There::Nothing | There::Other => {
            let (parent, name) = into.rsplit_once('/').unwrap_or(("", &into));
            let parent = if parent.is_empty() { "/" } else { parent };
            Ok(Packing { into: parent.to_owned(), name: name.to_owned() })
        }
    }
}

fn pack(from: &Path, name: &str, pipe: Pipe) -> Result<(), Failure> {
    let mut archive = tar::Builder::new(pipe);
    archive.follow_symlinks(false);
    let packed = match fs::symlink_metadata(from) {
        Ok(about) if about.is_dir() => archive.append_dir_all(name, from),
        Ok(_) => archive.append_path_with_name(from, name),
        Err(error) => Err(error),
    };
    packed
        .and_then(|()| archive.into_inner())
        .and_then(|mut pipe| pipe.flush())
        .map_err(|error| local(from, &error))
}

/// Writer into the connection, one chunk at a time.
struct Pipe {
    sender: mpsc::Sender<Bytes>,
    chunk: Vec<u8>,
}

impl Pipe {
    fn new(sender: mpsc::Sender<Bytes>) -> Self {
        Self { sender, chunk: Vec::with_capacity(CHUNK) }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..part]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.chunk.is_empty() {
            let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
            let gone = |_| io::Error::other("the connection ended first");
            self.sender.blocking_send(chunk.into()).map_err(gone)?;
        }
        Ok(())
    }
}

// ---- down -----------------------------------------------------------------------------------

async fn download(
    controller: &Controller,
    request: DownloadArchiveRequest,
    to: Place,
    bar: Bar,
) -> Result<u64, Failure> {
    let mut client = controller.sandboxes.clone();
    let mut pieces = answer(client.download_archive(request)).await?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let source = Source { receiver, rest: Bytes::new() };
    let unpacked = match to {
        Place::Here(path) => spawn_blocking(move || unpack(source, &path)),
        Place::Stream | Place::Sandbox { .. } => spawn_blocking(move || print(source)),
    };
    let mut broken = None;
    loop {
        let piece = match timeout(SILENCE, pieces.message()).await {
            Ok(Ok(Some(piece))) => piece,
            Ok(Ok(None)) => break,
            Ok(Err(status)) => {
                broken = Some(status.into());
                break;
            }
            Err(_) => {
                broken = Some(Failure::deadline("nothing more of the archive came", SILENCE));
                break;
            }
        };
        bar.add(piece.data.len() as u64);
        if !piece.data.is_empty() && sender.send(Ok(piece.data)).await.is_err() {
            // The unpacking has stopped; its own result gives the reason.
            break;
        }
    }
    if broken.is_some() {
        // An error, because this is not the end of the archive.
        sender.send(Err(io::Error::other("the connection broke"))).await.ok();
    }
    drop(sender);
    let unpacked = joined(unpacked).await;
    broken.map_or(Ok(()), Err)?;
    unpacked?;
    Ok(bar.done())
}

fn print(mut source: Source) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    if stdout.is_terminal() {
        return Err(Failure::usage(
            "an archive is not for a terminal",
            "send it on: `sandboxctl cp ID:/path - | tar t`",
        ));
    }
    io::copy(&mut source, &mut stdout)?;
    Ok(stdout.flush()?)
}

struct Source {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    rest: Bytes,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.receiver.blocking_recv().transpose()?.unwrap_or_default();
        }
        let part = self.rest.split_to(self.rest.len().min(buffer.len()));
        buffer[..part.len()].copy_from_slice(&part);
        Ok(part.len())
    }
}

/// Unpacks into an existing directory under the archive's name, otherwise as `to`.
fn unpack(source: impl Read, to: &Path) -> Result<(), Failure> {
    if to.is_dir() {
        return entries(source, to).map(drop);
    }
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Created beside the destination, to be renamed in one step.
    let own = format!(".sandboxctl-{}", super::create::random_key()?);
    let temporary = parent.join(own);
    fs::create_dir(&temporary).map_err(|error| local(parent, &error))?;
    let placed = entries(source, &temporary).and_then(|name| {
        let from = temporary.join(name);
        let is_dir = fs::symlink_metadata(&from).is_ok_and(|about| about.is_dir());
        if !is_dir && to.as_os_str().as_encoded_bytes().ends_with(b"/") {
            let what = format!("there is no directory {}", to.display());
            return Err(Failure::usage(what, "make it, or leave the last slash out"));
        }
        fs::rename(from, to).map_err(|error| local(to, &error))
    });
    fs::remove_dir_all(&temporary).ok();
    placed
}

/// Unpacks every entry below `to`; returns the first component that all paths share.
fn entries(source: impl Read, to: &Path) -> Result<PathBuf, Failure> {
    let broken = |error: io::Error| Failure::local(format!("cannot unpack the archive: {error}"));
    let hostile = |path: &Path, why: &str| {
        Failure::local(format!("the archive was not unpacked further: {} {why}", path.display()))
            .hint("the sandbox made it; `sandboxctl cp ID:/path - | tar tv` shows what is in it")
    };
    let mut archive = Archive::new(source);
    let mut name: Option<PathBuf> = None;
    let mut directories = Vec::new();
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let first = match path.components().find(|part| *part != Component::CurDir) {
            Some(Component::Normal(first)) => PathBuf::from(first),
            Some(_) => return Err(hostile(&path, "leads out of the destination")),
            None => continue,
        };
        if path.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
            return Err(hostile(&path, "leads out of the destination"));
        }
        if name.get_or_insert_with(|| first.clone()) != &first {
            return Err(hostile(&path, "is not of what was asked for"));
        }
        let kind = entry.header().entry_type();
        if kind == EntryType::Directory {
            // Directories come last, so that a read-only one does not block its content.
            directories.push(entry);
            continue;
        }
        let copied = matches!(
            kind,
            EntryType::Regular
                | EntryType::Continuous
                | EntryType::GNUSparse
                | EntryType::Symlink
                | EntryType::Link
        );
        if !copied {
            return Err(hostile(&path, "is a device or something else that is not copied"));
        }
        // Also refuses paths that leave the destination by an earlier link.
        if !entry.unpack_in(to).map_err(|error| local(&to.join(&path), &error))? {
            return Err(hostile(&path, "leads out of the destination"));
        }
    }
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut directory in directories {
        directory.unpack_in(to).map_err(|error| local(to, &error))?;
    }
    name.ok_or_else(|| Failure::local("the archive is empty"))
}

// ---- both -----------------------------------------------------------------------------------

fn local(path: &Path, error: &io::Error) -> Failure {
    let mut message = format!("{}: {error}", path.display());
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    Failure::local(message)
}

async fn joined(task: JoinHandle<Result<(), Failure>>) -> Result<(), Failure> {
    task.await.map_err(|error| Failure::local(format!("the copying failed: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_ustar();
            // The library refuses such names, so they are written directly.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(if *kind == EntryType::Directory { 0o755 } else { 0o644 });
            let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
            if is_link {
                header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
            }
            let content = if is_link { "" } else { content };
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content.as_bytes()).expect("in memory");
        }
        archive.into_inner().expect("in memory")
    }

    #[test]
    fn a_hostile_archive_writes_nothing_outside() {
        let (file, link) = (EntryType::Regular, EntryType::Symlink);
        let dir = tempfile::tempdir().expect("tempdir");
        let to = dir.path().join("to");
        fs::create_dir(&to).expect("made");
        let outside = dir.path().to_str().expect("text");
        let absolute = format!("{outside}/abs");
        for (n, bad) in [
            vec![("../evil", file, "x")],
            vec![("a/../../evil", file, "x")],
            vec![(absolute.as_str(), file, "x")],
            vec![("a", link, outside), ("a/evil", file, "x")],
            vec![("b", link, ".."), ("b/evil", file, "x")],
            vec![("c", EntryType::Link, "/etc/hostname")],
            vec![("d", EntryType::Link, "../secret")],
            vec![("e", EntryType::Char, "")],
            vec![("f", file, "x"), ("other", file, "x")],
        ]
        .into_iter()
        .enumerate()
        {
            fs::write(dir.path().join("secret"), "s").expect("written");
            let refused = unpack(archive(&bad).as_slice(), &to);
            assert!(refused.is_err(), "{n}: {bad:?}");
            let left = fs::read_dir(dir.path()).expect("listed").count();
            assert_eq!(left, 2, "{n}: only `to` and `secret` are there");
        }
        assert!(unpack(&[0; 1024][..], &to).is_err(), "an empty one is no success");
    }

    #[test]
    fn into_a_directory_or_as_what_is_named() {
        let (file, folder) = (EntryType::Regular, EntryType::Directory);
        let dir = tempfile::tempdir().expect("tempdir");
        let tree = archive(&[("src/", folder, ""), ("src/a", file, "1"), ("src/b/", folder, "")]);
        unpack(tree.as_slice(), dir.path()).expect("into it");
        unpack(tree.as_slice(), dir.path()).expect("over it");
        unpack(tree.as_slice(), &dir.path().join("new")).expect("as it");
        for name in ["src", "new"] {
            assert_eq!(fs::read(dir.path().join(name).join("a")).expect(name), b"1");
            assert!(dir.path().join(name).join("b").is_dir());
        }
        let one = archive(&[("one", file, "2")]);
        let target = dir.path().join("new/a");
        unpack(one.as_slice(), &target).expect("over a file");
        assert_eq!(fs::read(&target).expect("there"), b"2");
        assert!(unpack(one.as_slice(), &dir.path().join("none/")).is_err());
        assert!(unpack(tree.as_slice(), &target).is_err(), "a directory over a file");
        assert!(unpack(&tree[..600], &dir.path().join("half")).is_err());
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 2, "nothing is left over");
    }

    #[test]
    fn what_goes_up_is_named_as_docker_does() {
        let packing = |from: &str, is_dir, to: &str, there| {
            let packing = packing(Path::new(from), is_dir, to, there).ok()?;
            Some((packing.into, packing.name))
        };
        let some = |into: &str, name: &str| Some((into.to_owned(), name.to_owned()));
        assert_eq!(packing("a/f", false, "/srv", There::Directory), some("/srv", "f"));
        assert_eq!(packing("a/f", false, "/", There::Directory), some("/", "f"));
        assert_eq!(packing("a/f", false, "/srv/g", There::Nothing), some("/srv", "g"));
        assert_eq!(packing("a/f", false, "/g", There::Other), some("/", "g"));
        assert_eq!(packing("a/f", false, "/srv/g/", There::Nothing), None);
        assert_eq!(packing("a/d", true, "/srv/", There::Directory), some("/srv", "d"));
        assert_eq!(packing("a/d/.", true, "/srv", There::Directory), some("/srv", ""));
        assert_eq!(packing("a/d", true, "/srv/e", There::Nothing), some("/srv/e", ""));
        assert_eq!(packing("a/d", true, "/srv/g", There::Other), None);
    }
}
