//! Receives an archive from a sandbox and unpacks it, or prints it. Archives from a sandbox are not
//! trusted: no entry is written outside of the destination.

use std::{
    fs,
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use archive::{Report, Rules};
use bytes::Bytes;
use proto::sandbox::v1::DownloadArchiveRequest;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};

use super::{
    super::create::random_key, Copied, Place, QUEUE, SILENCE, failed, joined, local, placing,
};
use crate::{
    client::{Controller, answer},
    failure::Failure,
    progress::Bar,
    signals::Stops,
};

/// Copy out of a sandbox.
#[derive(Debug)]
pub(super) struct Download {
    pub(super) request: DownloadArchiveRequest,
    /// Path as it was asked for: it names the copy.
    pub(super) from: String,
    pub(super) to: Place,
    pub(super) rules: Rules,
}

/// Copies out of the sandbox. A signal ends the copy, and what is unpacked in part is removed.
pub(super) async fn run(
    controller: &Controller,
    Download { request, from, to, rules }: Download,
    stops: &mut Stops,
    bar: Bar,
) -> Result<Copied, Failure> {
    let mut client = controller.sandboxes.clone();
    let mut pieces = tokio::select! {
        biased;
        stop = stops.next() => {
            return Err(Failure::local("the copy was interrupted").exit(stop.exit()));
        }
        pieces = answer(client.download_archive(request)) => pieces?,
    };
    let (sender, receiver) = mpsc::channel(QUEUE);
    let source = Source { receiver, rest: Bytes::new() };
    let unpacked = match to {
        Place::Here(path) => spawn_blocking(move || unpack(source, &from, &path, &rules)),
        Place::Stream | Place::Sandbox { .. } => spawn_blocking(move || print(source)),
    };
    let mut broken = None;
    loop {
        let piece = tokio::select! {
            biased;
            stop = stops.next() => {
                broken = Some(Failure::local("the copy was interrupted").exit(stop.exit()));
                break;
            }
            piece = timeout(SILENCE, pieces.message()) => piece,
        };
        let piece = match piece {
            Ok(Ok(Some(piece))) => piece,
            Ok(Ok(None)) => break,
            Ok(Err(status)) => {
                broken = Some(status.into());
                break;
            }
            Err(_) => {
                broken = Some(Failure::deadline("the rest of the archive did not arrive", SILENCE));
                break;
            }
        };
        bar.add(piece.data.len() as u64);
        if piece.data.is_empty() {
            continue;
        }
        let sent = tokio::select! {
            biased;
            stop = stops.next() => {
                broken = Some(Failure::local("the copy was interrupted").exit(stop.exit()));
                break;
            }
            sent = sender.send(Ok(piece.data)) => sent,
        };
        if sent.is_err() {
            // The unpacking has stopped; its own result gives the reason.
            break;
        }
    }
    let end = async {
        if broken.is_some() {
            // An error, because this is not the end of the archive.
            sender.send(Err(io::Error::other("the connection broke"))).await.ok();
        }
        drop(sender);
        joined(unpacked).await
    };
    // A second signal does not wait for a disk that hangs.
    let unpacked = tokio::select! {
        unpacked = end => unpacked?,
        stop = stops.next() => return Err(Failure::local("the copy was interrupted").exit(stop.exit())),
    };
    broken.map_or(Ok(()), Err)?;
    Ok(Copied { left_out: unpacked?, bytes: bar.done() })
}

fn print(mut source: Source) -> Result<Vec<String>, Failure> {
    let mut stdout = io::stdout().lock();
    if stdout.is_terminal() {
        return Err(Failure::usage(
            "an archive cannot be written to a terminal",
            "pipe it to another program: `sandboxctl cp ID:/path - | tar t`",
        ));
    }
    io::copy(&mut source, &mut stdout)?;
    stdout.flush()?;
    Ok(Vec::new())
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

/// Directory that is made for a copy, and removed unless the copy is whole.
struct New(Option<(PathBuf, PathBuf)>);

impl New {
    /// Gives the directory its name.
    fn place(mut self) -> Result<(), Failure> {
        let Some((temporary, to)) = &self.0 else { return Ok(()) };
        fs::rename(temporary, to).map_err(|error| local(to, &error))?;
        self.0 = None;
        Ok(())
    }
}

impl Drop for New {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.0 {
            fs::remove_dir_all(temporary).ok();
        }
    }
}

/// Unpacks to where the rules of a copy from `from` to `to` say. A new directory gets its name when it
/// is whole; elsewhere, each file does.
fn unpack(source: impl Read, from: &str, to: &Path, rules: &Rules) -> Result<Vec<String>, Failure> {
    // Created beside the destination, to be renamed in one step.
    let temporary = format!(".sandboxctl-{}", random_key()?);
    let mut new = New(None);
    let unpacked = archive::unpack(source, rules, |first| {
        let placing::Download { destination, new: made } =
            placing::download(from, to, first, &temporary)?;
        if let Some((temporary, _)) = &made {
            // Nobody else looks into it before it has its own permissions.
            let made = fs::DirBuilder::new().mode(0o700).create(temporary);
            made.map_err(|error| local(temporary, &error))?;
        }
        new = New(made);
        Ok::<_, Unpacking>(destination)
    });
    let Report { entries, left_out } = unpacked.map_err(|Unpacking(failure)| failure)?;
    if entries == 0 {
        return Err(Failure::local("the archive is empty"));
    }
    new.place()?;
    Ok(left_out)
}

/// Failure of unpacking.
struct Unpacking(Failure);

impl From<Failure> for Unpacking {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl From<archive::Error> for Unpacking {
    fn from(error: archive::Error) -> Self {
        let is_invalid = matches!(error, archive::Error::Invalid(_));
        let failure = failed(error);
        if !is_invalid {
            return Self(failure);
        }
        let hint =
            "the sandbox made this archive; `sandboxctl cp ID:/path - | tar tv` lists its content";
        Self(failure.hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use tar::EntryType;

    use super::{super::KEPT, *};

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
    fn hostile_archive_writes_nothing_outside_the_destination() {
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
            let refused = unpack(archive(&bad).as_slice(), "/a", &to, &KEPT);
            assert!(refused.is_err(), "{n}: {bad:?}");
            let left = fs::read_dir(dir.path()).expect("listed").count();
            assert_eq!(left, 2, "{n}: only `to` and `secret` are there");
        }
        assert!(unpack(&[0; 1024][..], "/a", &to, &KEPT).is_err(), "an empty one is no success");
    }

    #[test]
    fn unpacks_into_an_existing_directory_or_as_the_new_name() {
        let (file, folder) = (EntryType::Regular, EntryType::Directory);
        let dir = tempfile::tempdir().expect("tempdir");
        let tree = archive(&[("src/", folder, ""), ("src/a", file, "1"), ("src/b/", folder, "")]);
        unpack(tree.as_slice(), "/src", dir.path(), &KEPT).expect("into it");
        unpack(tree.as_slice(), "/src", dir.path(), &KEPT).expect("over it");
        unpack(tree.as_slice(), "/src", &dir.path().join("new"), &KEPT).expect("as it");
        for name in ["src", "new"] {
            assert_eq!(fs::read(dir.path().join(name).join("a")).expect(name), b"1");
            assert!(dir.path().join(name).join("b").is_dir());
        }
        let one = archive(&[("one", file, "2")]);
        let target = dir.path().join("new/a");
        unpack(one.as_slice(), "/one", &target, &KEPT).expect("over a file");
        assert_eq!(fs::read(&target).expect("there"), b"2");
        assert!(unpack(one.as_slice(), "/one", &dir.path().join("none/"), &KEPT).is_err());
        assert!(
            unpack(tree.as_slice(), "/src", &target, &KEPT).is_err(),
            "a directory over a file"
        );
        assert!(unpack(&tree[..600], "/src", &dir.path().join("half"), &KEPT).is_err());
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 2, "nothing is left over");
    }
}
