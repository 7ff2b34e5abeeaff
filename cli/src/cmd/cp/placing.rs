//! Places of copies: what is copied where, and under which name. The rules are those of `docker cp`;
//! docs/copying.md has them as a table.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use archive::{Destination, First, Root};
use proto::{
    Reason,
    sandbox::v1::{ArchiveStart, FileInfo, FileKind, StatFileRequest},
};

use super::local;
use crate::{
    client::{Controller, answer},
    failure::Failure,
};

/// Most links that lead to a path, as in the kernel.
const LINKS_MAX: usize = 40;

/// Source of a copy into a sandbox.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// Own name, which it gets in a directory.
    pub(super) name: Option<OsString>,
    /// Bytes, if it is a file.
    pub(super) size: Option<u64>,
    pub(super) is_dir: bool,
    /// True for `SRC/.`: what is in the directory is copied, and not the directory.
    pub(super) is_contents: bool,
}

/// Place of a copy in a sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Upload {
    /// Directory that the archive is unpacked into; it exists.
    pub(super) into: String,
    /// Name of the root entry; `.` puts the content of our directory right into `into`.
    pub(super) name: String,
}

/// Object at the destination in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct There {
    /// Path with the links at its end followed.
    pub(super) path: String,
    pub(super) kind: Kind,
    /// Whether the directory that it is in exists.
    pub(super) has_parent: bool,
}

/// Kind of the object at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nothing,
    Directory,
    Other,
}

/// True for `.` and for a path with `/.` at its end: the content of a directory.
pub(super) fn is_contents(path: &OsStr) -> bool {
    let bytes = path.as_encoded_bytes();
    bytes == b"." || bytes.ends_with(b"/.")
}

/// Looks at the destination in a sandbox.
pub(super) async fn look(controller: &Controller, start: &ArchiveStart) -> Result<There, Failure> {
    let stat = async |path: &str| stat(controller, (&start.id, &start.user), path).await;
    let (path, found) = resolve(controller, (&start.id, &start.user), &start.path).await?;
    let kind = match found.map(|file| file.kind()) {
        None => Kind::Nothing,
        Some(FileKind::Directory) => Kind::Directory,
        Some(FileKind::Symlink | FileKind::File | FileKind::Special | FileKind::Unspecified) => {
            Kind::Other
        }
    };
    let has_parent = match kind {
        Kind::Directory | Kind::Other => true,
        Kind::Nothing => {
            let parent = format!("{}/.", split(&path).0.trim_end_matches('/'));
            stat(&parent).await?.is_some_and(|file| file.kind() == FileKind::Directory)
        }
    };
    Ok(There { path, kind, has_parent })
}

/// Follows the links at the end of a path in a sandbox. Returns where they lead, and what is there.
pub(super) async fn resolve(
    controller: &Controller,
    (id, user): (&str, &str),
    path: &str,
) -> Result<(String, Option<FileInfo>), Failure> {
    let trimmed = path.trim_end_matches('/');
    let mut path = if trimmed.is_empty() { "/".to_owned() } else { trimmed.to_owned() };
    for _ in 0..LINKS_MAX {
        let found = stat(controller, (id, user), &path).await?;
        match found {
            Some(file) if file.kind() == FileKind::Symlink => path = beside(&path, &file.target),
            found => return Ok((path, found)),
        }
    }
    Err(Failure::local(format!("too many symbolic links lead on from {path}")))
}

async fn stat(
    controller: &Controller,
    (id, user): (&str, &str),
    path: &str,
) -> Result<Option<FileInfo>, Failure> {
    let request =
        StatFileRequest { id: id.to_owned(), path: path.to_owned(), user: user.to_owned() };
    match answer(controller.sandboxes.clone().stat_file(request)).await {
        Ok(answer) => Ok(answer.file),
        Err(failure) if failure.known() == Some(Reason::FileNotFound) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Target of a link as an absolute path.
fn beside(link: &str, target: &str) -> String {
    if target.starts_with('/') {
        return target.to_owned();
    }
    format!("{}/{target}", split(link).0.trim_end_matches('/'))
}

/// Splits a path into its directory and the name in it.
fn split(path: &str) -> (&str, &str) {
    match path.trim_end_matches('/').rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((dir, name)) => (dir, name),
        None => ("/", ""),
    }
}

/// Chooses the place of a copy in a sandbox.
pub(super) fn upload(source: &Source, to: &str, there: There) -> Result<Upload, Failure> {
    let wants_directory = to.ends_with('/') || is_contents(OsStr::new(to));
    match there.kind {
        Kind::Directory if source.is_dir && source.is_contents => {
            Ok(Upload { into: there.path, name: ".".to_owned() })
        }
        Kind::Directory => {
            let name = source.name.as_deref().and_then(OsStr::to_str).ok_or_else(|| {
                let what = format!("the name of {} is not UTF-8", source.path.display());
                let hint = "give the whole path of the destination, with the name at its end";
                Failure::usage(what, hint)
            })?;
            Ok(Upload { into: there.path, name: name.to_owned() })
        }
        Kind::Other if source.is_dir => Err(onto_file(&source.path, to)),
        Kind::Other if wants_directory => Err(Failure::usage(
            format!("{to} is not a directory"),
            "leave out the last slash to replace it",
        )),
        Kind::Nothing if !source.is_dir && wants_directory => Err(missing(to)),
        Kind::Nothing if !there.has_parent => Err(missing(split(&there.path).0)),
        Kind::Nothing | Kind::Other => {
            let (into, name) = split(&there.path);
            Ok(Upload { into: into.to_owned(), name: name.to_owned() })
        }
    }
}

fn onto_file(from: &Path, to: &str) -> Failure {
    Failure::usage(
        format!("{} is a directory, and {to} is not", from.display()),
        "choose another destination",
    )
}

fn missing(dir: &str) -> Failure {
    Failure::usage(
        format!("there is no directory {dir} in the sandbox"),
        "create it: `sandboxctl exec ID -- mkdir -p DIRECTORY`",
    )
}

/// Place of a copy on this machine, and what is to be done when the copy is whole.
#[derive(Debug)]
pub(super) struct Download {
    pub(super) destination: Destination,
    /// Directory that is made for the copy, and the name that it gets when the copy is whole.
    pub(super) new: Option<(PathBuf, PathBuf)>,
}

/// Chooses the place of a copy from `from` in a sandbox to this machine. `temporary` is a name for a
/// directory beside the destination.
pub(super) fn download(
    from: &str,
    to: &Path,
    first: &First,
    temporary: &str,
) -> Result<Download, Failure> {
    let bytes = to.as_os_str().as_encoded_bytes();
    let wants_directory = bytes.ends_with(b"/") || is_contents(to.as_os_str());
    let existing = |dir: &Path, root| Download {
        destination: Destination { dir: dir.to_owned(), root, is_new: false },
        new: None,
    };
    if to.is_dir() {
        // Named as it was asked for, whatever the archive says; `/` and `..` have no name.
        let name = Path::new(from).file_name().filter(|_| !is_contents(OsStr::new(from)));
        return Ok(match name {
            Some(name) => existing(to, Root::Named(name.to_owned())),
            None if first.is_dir => existing(to, Root::Dropped),
            None => {
                return Err(Failure::usage(format!("{from} has no name"), "name a destination"));
            }
        });
    }
    let to = followed(to)?;
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = to.file_name().unwrap_or_default().to_owned();
    if !parent.is_dir() {
        let what = format!("there is no directory {}", parent.display());
        return Err(Failure::usage(what, "create it first"));
    }
    let is_there = to.symlink_metadata().is_ok();
    match first.is_dir {
        true if is_there => {
            let what = format!("{from} is a directory, and {} is not", to.display());
            Err(Failure::usage(what, "choose another destination"))
        }
        true => {
            let new = parent.join(temporary);
            let destination = Destination { dir: new.clone(), root: Root::Dropped, is_new: true };
            Ok(Download { destination, new: Some((new, to)) })
        }
        false if wants_directory => {
            let what = format!("there is no directory {}", to.display());
            Err(Failure::usage(what, "create it, or leave out the last slash"))
        }
        false => Ok(existing(parent, Root::Named(name))),
    }
}

/// Follows the links at the end of a path on this machine.
fn followed(path: &Path) -> Result<PathBuf, Failure> {
    let mut path: PathBuf = path.components().collect();
    for _ in 0..LINKS_MAX {
        match path.read_link() {
            // Joined with an absolute target, the path is the target.
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(local(&path, &nix::errno::Errno::ELOOP.into()))
}
