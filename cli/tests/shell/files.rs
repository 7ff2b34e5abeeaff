//! Files of the fake: paths and bytes; a path with files below is a directory.

use std::{
    collections::BTreeMap,
    io::Read,
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::{
    Reason,
    sandbox::v1::{FileInfo, FileKind},
};
use tonic::Status;

use crate::fake::refuse;

#[derive(Debug, Default)]
pub(crate) struct Files(Mutex<BTreeMap<String, Vec<u8>>>);

impl Files {
    pub(crate) fn all(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn put(&self, path: &str, content: &str) {
        self.all().insert(path.to_owned(), content.as_bytes().to_vec());
    }

    pub(crate) fn stat(&self, path: &str) -> Result<FileInfo, Status> {
        let below = format!("{}/", path.trim_end_matches('/'));
        let kind = if self.all().contains_key(path) {
            FileKind::File
        } else if path == "/" || self.all().keys().any(|path| path.starts_with(&below)) {
            FileKind::Directory
        } else {
            return Err(refuse(Reason::FileNotFound));
        };
        Ok(FileInfo { kind: kind.into(), ..FileInfo::default() })
    }

    pub(crate) fn unpack(&self, into: &str, archive: &[u8]) -> u64 {
        let mut archive = tar::Archive::new(archive);
        let mut count = 0;
        for entry in archive.entries().expect("an archive") {
            let mut entry = entry.expect("an entry");
            count += 1;
            if entry.header().entry_type().is_file() {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).expect("whole");
                let path = entry.path().expect("a path").display().to_string();
                self.all().insert(format!("{}/{path}", into.trim_end_matches('/')), content);
            }
        }
        count
    }

    pub(crate) fn pack(&self, path: &str) -> Result<Vec<u8>, Status> {
        self.stat(path)?;
        let name = path.rsplit('/').next().expect("a part");
        let mut archive = tar::Builder::new(Vec::new());
        for (file, content) in self.all().iter() {
            let Some(rest) = file.strip_prefix(path) else { continue };
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o640);
            let name = format!("{name}{rest}");
            archive.append_data(&mut header, name, content.as_slice()).expect("in memory");
        }
        Ok(archive.into_inner().expect("in memory"))
    }
}
