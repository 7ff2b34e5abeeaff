//! Packs local files, or takes an archive from stdin, and sends it into a sandbox.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::Either, pin_mut, stream};
use proto::sandbox::v1::{ArchiveStart, UploadArchiveRequest, upload_archive_request};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{Copied, Place, QUEUE, SILENCE, failed, joined, local, placing};
use crate::{client::Controller, failure::Failure, output::Output, progress::Bar};

/// Bytes of one message.
const CHUNK: usize = 128 * 1024;

/// Copies into the sandbox. With `follow` the target of a link is copied instead of the link.
pub(super) async fn run(
    controller: &Controller,
    from: Place,
    mut start: ArchiveStart,
    follow: bool,
    output: Output,
) -> Result<Copied, Failure> {
    let (sender, pieces) = mpsc::channel(QUEUE);
    let Packing { what, size, packed } =
        begin(controller, from, &mut start, follow, sender).await?;
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
        let packed = joined(packed).await?;
        if packed.is_ok() {
            whole.send(()).ok();
        }
        Ok::<_, Failure>(packed)
    };
    pin_mut!(sent);
    pin_mut!(packed);
    let left_out = match futures_util::future::select(sent, packed).await {
        // A refusal, most likely; the packing ends when its output is no longer read.
        Either::Left((answer, _)) => {
            answer?;
            Vec::new()
        }
        Either::Right((packed, sent)) => {
            let packed = match packed? {
                Err(Ended::Failed(failure)) => return Err(failure),
                packed => packed.unwrap_or_default(),
            };
            // Whoever took no more of the archive says why.
            match timeout(SILENCE * 4, sent).await {
                Ok(answer) => answer?,
                Err(_) => {
                    return Err(Failure::deadline(
                        "the sandbox did not finish unpacking the archive",
                        SILENCE * 4,
                    ));
                }
            };
            packed
        }
    };
    Ok(Copied { bytes: bar.done(), left_out })
}

/// Source that is being packed.
struct Packing {
    /// Text for a person who waits.
    what: String,
    /// Bytes, if they are known.
    size: Option<u64>,
    /// Packing on a thread of its own; returns what was left out.
    packed: JoinHandle<Result<Vec<String>, Ended>>,
}

/// Starts to pack the source into `sender`. Sets the directory in `start` that the archive is for.
async fn begin(
    controller: &Controller,
    from: Place,
    start: &mut ArchiveStart,
    follow: bool,
    sender: mpsc::Sender<Bytes>,
) -> Result<Packing, Failure> {
    Ok(match from {
        Place::Here(path) => {
            let source = source(path, follow)?;
            let there = placing::look(controller, start).await?;
            let placing::Upload { into, name } = placing::upload(&source, &start.path, there)?;
            start.path = into;
            let placing::Source { path, size, .. } = source;
            let what = format!("copying {}", path.display());
            let packed = move || {
                let packed = archive::pack(&path, name.as_ref(), Pipe::new(sender));
                packed.map_err(|error| Ended::of(error, &path))
            };
            Packing { what, size, packed: spawn_blocking(packed) }
        }
        Place::Stream | Place::Sandbox { .. } => {
            let copied = move || {
                let mut pipe = Pipe::new(sender);
                io::copy(&mut io::stdin().lock(), &mut pipe)
                    .and_then(|_| pipe.flush())
                    .map(|()| Vec::new())
                    .map_err(Ended::of_stdin)
            };
            let what = "copying stdin".to_owned();
            Packing { what, size: None, packed: spawn_blocking(copied) }
        }
    })
}

/// Looks at what is to be copied.
fn source(path: PathBuf, follow: bool) -> Result<placing::Source, Failure> {
    let about = if follow { path.metadata() } else { path.symlink_metadata() };
    let about = about.map_err(|error| local(&path, &error))?;
    let is_contents = placing::is_contents(path.as_os_str());
    // `..` and `.` have no name of their own.
    let named = path.canonicalize().ok();
    let name = path.file_name().or_else(|| named.as_deref()?.file_name()).map(ToOwned::to_owned);
    let path = if follow { named.unwrap_or(path) } else { path };
    let size = about.is_file().then_some(about.len());
    Ok(placing::Source { path, name, size, is_dir: about.is_dir(), is_contents })
}

/// Reason why no more was packed.
#[derive(Debug)]
enum Ended {
    Failed(Failure),
    /// Nobody takes any more: the answer says why.
    Unread,
}

impl Ended {
    fn of(error: archive::Error, path: &std::path::Path) -> Self {
        match error {
            archive::Error::Stream(_) => Self::Unread,
            error @ (archive::Error::File { .. } | archive::Error::Invalid(_)) => {
                let what = format!("{} is not copied", path.display());
                Self::Failed(failed(error).hint(what))
            }
        }
    }

    fn of_stdin(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::Unread;
        }
        Self::Failed(Failure::local(format!("cannot read stdin: {error}")))
    }
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
            let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
            self.sender.blocking_send(chunk.into()).map_err(gone)?;
        }
        Ok(())
    }
}
