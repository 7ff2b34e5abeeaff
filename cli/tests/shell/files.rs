//! Files of the fake: a directory of this machine that plays the root of a sandbox, worked on as the
//! helper in a sandbox does it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use archive::{Destination, Owner, Root, Rules};
use proto::{
    Reason,
    sandbox::v1::{ArchiveStart, FileInfo, FileKind},
};
use tonic::Status;

use crate::fake::refuse;

#[derive(Debug)]
pub(crate) struct Files(tempfile::TempDir);

impl Default for Files {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("tempdir"))
    }
}

impl Files {
    /// Path on this machine of a path in the sandbox. Its end stays as it is: a slash has a meaning.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("{}{path}", self.0.path().display()))
    }

    /// Contents of all regular files.
    pub(crate) fn all(&self) -> BTreeMap<String, Vec<u8>> {
        let (mut found, mut left) = (BTreeMap::new(), vec![self.0.path().to_owned()]);
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(dir).expect("listed").flatten() {
                let kind = entry.file_type().expect("a kind");
                if kind.is_dir() {
                    left.push(entry.path());
                } else if kind.is_file() {
                    let path = entry.path();
                    let name = path.strip_prefix(self.0.path()).expect("below").display();
                    found.insert(format!("/{name}"), fs::read(&path).expect("read"));
                }
            }
        }
        found
    }

    pub(crate) fn put(&self, path: &str, content: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, content).expect("written");
    }

    pub(crate) fn stat(&self, path: &str) -> Result<FileInfo, Status> {
        let path = self.at(path);
        let about = fs::symlink_metadata(&path).map_err(|_| refuse(Reason::FileNotFound))?;
        let kind = match about.file_type() {
            kind if kind.is_file() => FileKind::File,
            kind if kind.is_dir() => FileKind::Directory,
            kind if kind.is_symlink() => FileKind::Symlink,
            _ => FileKind::Special,
        };
        let target = fs::read_link(&path).unwrap_or_default().display().to_string();
        let (size, mode) = (about.size(), about.mode() & 0o7777);
        Ok(FileInfo { kind: kind.into(), size, mode, target, ..FileInfo::default() })
    }

    pub(crate) fn unpack(&self, start: &ArchiveStart, archive: &[u8]) -> Result<u64, Status> {
        let number = |text: &str| text.parse().expect("a number");
        let owner = match start.owner.split_once(':') {
            Some((uid, gid)) => Owner::Given(number(uid), number(gid)),
            None if start.keep_existing => Owner::Kept,
            None => Owner::Archive,
        };
        let dir = self.at(&start.path);
        fs::create_dir_all(&dir).expect("made");
        let rules = Rules { owner, keep_mode: start.keep_existing, follow: true };
        let to = Destination { dir, root: Root::Kept, is_new: false };
        match archive::unpack(archive, &rules, |_| Ok::<_, archive::Error>(to)) {
            Ok(report) => Ok(report.entries),
            Err(_) => Err(refuse(Reason::FileRefused)),
        }
    }

    pub(crate) fn pack(&self, path: &str) -> Result<Vec<u8>, Status> {
        let name = Path::new(path).file_name().unwrap_or(".".as_ref());
        let mut bytes = Vec::new();
        match archive::pack(&self.at(path), Path::new(name), &mut bytes) {
            Ok(_) => Ok(bytes),
            Err(archive::Error::File { error, .. })
                if error.kind() == std::io::ErrorKind::NotFound =>
            {
                Err(refuse(Reason::FileNotFound))
            }
            Err(_) => Err(refuse(Reason::FileRefused)),
        }
    }
}
