//! Files of the fake agent: bytes under absolute paths; directories follow from the paths.

use std::{collections::BTreeMap, sync::Arc};

use daemon::status::{FILES_WRITTEN, Refusal};
use proto::{
    Reason,
    agent::v1::{FilesRequest, files_request::Message as Ask, files_response::Message as Said},
    sandbox::v1::{self as api, FileInfo, FileKind},
};
use tonic::{Status, Streaming};

use super::{FakeAgent, answers::refuse};

/// End of the paths that cannot be written.
const UNWRITABLE: &str = "/unwritable";
/// Bytes of one message.
const CHUNK: usize = 64 * 1024;

/// Content and mode, by sandbox and path.
pub(super) type Files = BTreeMap<(String, String), (Vec<u8>, u32)>;

fn info(path: &str, (content, mode): &(Vec<u8>, u32)) -> FileInfo {
    FileInfo {
        name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        kind: FileKind::File.into(),
        size: content.len() as u64,
        mode: if *mode == 0 { 0o644 } else { *mode },
        ..FileInfo::default()
    }
}

fn chunks(bytes: &[u8]) -> impl Iterator<Item = Said> {
    bytes.chunks(CHUNK).map(|chunk| Said::Data(chunk.to_vec().into()))
}

impl FakeAgent {
    /// Runs one operation. An archive is kept as the bytes that arrived.
    pub(super) async fn files(
        self: &Arc<Self>,
        mut input: Streaming<FilesRequest>,
    ) -> Result<Vec<Said>, Status> {
        let first = input.message().await?.and_then(|message| message.message);
        let said = match first {
            Some(Ask::Write(write)) => {
                self.get(&write.id)?;
                if let Some(reason) = self.world.lock().faults.refuse_files {
                    return refuse(reason, "no");
                }
                let written = u32::try_from(write.files.len()).unwrap_or(u32::MAX);
                let files = &mut self.world.lock().files;
                for (before, file) in write.files.into_iter().enumerate() {
                    if file.path.ends_with(UNWRITABLE) {
                        let refusal = Refusal::new(Reason::FileRefused, "no");
                        return Err(refusal.with(FILES_WRITTEN, before.to_string()).into());
                    }
                    let key = (write.id.clone(), file.path);
                    files.insert(key, (file.content.to_vec(), file.mode));
                }
                vec![Said::Write(api::WriteFilesResponse { written })]
            }
            Some(Ask::Read(read)) => {
                let file = self.file(&read.id, &read.path)?;
                let from = usize::try_from(read.offset).unwrap_or(usize::MAX).min(file.0.len());
                let length = match read.length {
                    0 => usize::MAX,
                    length => usize::try_from(length).unwrap_or(usize::MAX),
                };
                let part = &file.0[from..file.0.len().min(from.saturating_add(length))];
                let mut said = vec![Said::File(info(&read.path, &file))];
                said.extend(chunks(part));
                said
            }
            Some(Ask::Stat(stat)) => {
                vec![Said::File(info(&stat.path, &self.file(&stat.id, &stat.path)?))]
            }
            Some(Ask::List(list)) => {
                self.get(&list.id)?;
                let below = format!("{}/", list.path.trim_end_matches('/'));
                let world = self.world.lock();
                let entries = world
                    .files
                    .iter()
                    .filter(|((id, path), _)| *id == list.id && path.starts_with(&below));
                let entries = entries.map(|((_, path), file)| info(path, file)).collect();
                vec![Said::List(api::ListDirResponse { entries, ..Default::default() })]
            }
            Some(Ask::Remove(remove)) => {
                self.get(&remove.id)?;
                let existed = self.world.lock().files.remove(&(remove.id, remove.path)).is_some();
                vec![Said::Remove(api::RemoveFileResponse { existed })]
            }
            Some(Ask::Upload(start)) => {
                self.get(&start.id)?;
                let mut archive = Vec::new();
                loop {
                    self.until_thawed(&start.id).await;
                    let Some(message) = input.message().await? else { break };
                    let Some(Ask::Data(bytes)) = message.message else {
                        return refuse(Reason::FieldInvalid, "data only");
                    };
                    archive.extend_from_slice(&bytes);
                }
                self.world.lock().files.insert((start.id, start.path), (archive, 0));
                vec![Said::Upload(api::UploadArchiveResponse { entries: 1 })]
            }
            Some(Ask::Download(download)) => {
                chunks(&self.file(&download.id, &download.path)?.0).collect()
            }
            Some(Ask::Data(_)) | None => {
                return refuse(Reason::FieldInvalid, "no operation");
            }
        };
        Ok(said)
    }

    /// Waits while the sandbox is paused: unpacking stalls meanwhile.
    async fn until_thawed(&self, id: &str) {
        let mut changes = self.changes.subscribe();
        while self.get(id).is_ok_and(|sandbox| sandbox.phase() == api::Phase::Paused) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn file(&self, id: &str, path: &str) -> Result<(Vec<u8>, u32), Status> {
        self.get(id)?;
        match self.world.lock().files.get(&(id.to_owned(), path.to_owned())) {
            Some(file) => Ok(file.clone()),
            None => refuse(Reason::FileNotFound, "no such file"),
        }
    }
}
