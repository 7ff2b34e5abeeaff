//! `--file LOCAL:PATH`: files that are in a new sandbox from the start.

use std::{fs::File, io::Read as _, os::unix::fs::PermissionsExt, path::PathBuf, str::FromStr};

use proto::sandbox::v1::FileContent;

use crate::failure::Failure;

/// Most bytes of all files together, as the API takes them.
const BYTES_MAX: u64 = 1536 * 1024;

/// `LOCAL:PATH`: a file here, and its absolute path in the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FirstFile {
    local: PathBuf,
    path: String,
}

impl FromStr for FirstFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = "must be LOCAL:PATH with an absolute path in the sandbox, such as ./run.sh:/root/run.sh";
        let (local, path) = text.split_once(":/").ok_or(wrong)?;
        if local.is_empty() || path.is_empty() || path.ends_with('/') {
            return Err(wrong.into());
        }
        Ok(Self { local: local.into(), path: format!("/{path}") })
    }
}

/// Reads the files, with their permissions.
pub(super) fn read(files: &[FirstFile]) -> Result<Vec<FileContent>, Failure> {
    let mut left = BYTES_MAX;
    files.iter().map(|file| read_one(file, &mut left)).collect()
}

fn read_one(FirstFile { local, path }: &FirstFile, left: &mut u64) -> Result<FileContent, Failure> {
    let failed = |error: std::io::Error| Failure::local(format!("{}: {error}", local.display()));
    let file = File::open(local).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Failure::local(format!("{}: not a regular file", local.display()))
            .hint("`sandboxctl cp` copies directories once the sandbox runs"));
    }
    let mut content = Vec::new();
    // One more than is allowed, to see that there is more.
    file.take(*left + 1).read_to_end(&mut content).map_err(failed)?;
    *left = left.checked_sub(content.len() as u64).ok_or_else(|| {
        Failure::local("the files of --file have more than 1.5 MiB together")
            .hint("`sandboxctl cp` copies larger files once the sandbox runs")
    })?;
    let mode = metadata.permissions().mode() & 0o7777;
    Ok(FileContent { path: path.clone(), content: content.into(), mode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_here_and_path_there_are_parsed() {
        let parsed: FirstFile = "a/b:c:/root/x".parse().expect("valid");
        assert_eq!(parsed, FirstFile { local: "a/b:c".into(), path: "/root/x".into() });
        for wrong in ["", "a", "a:", "a:b", ":/b", "a:/", "a:/b/"] {
            wrong.parse::<FirstFile>().expect_err(wrong);
        }
    }

    #[test]
    fn files_are_read_with_their_permissions_up_to_the_limit() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = |name: &str, bytes: usize| {
            let local = dir.path().join(name);
            std::fs::write(&local, vec![b'x'; bytes]).expect("written");
            FirstFile { local, path: format!("/{name}") }
        };
        let (script, half) = (file("run", 3), file("half", 1 << 20));
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&script.local, executable).expect("chmod");
        let read_them =
            |files: &[&FirstFile]| read(&files.iter().copied().cloned().collect::<Vec<_>>());
        let files = read_them(&[&script, &half]).expect("read");
        assert_eq!((files[0].path.as_str(), files[0].mode), ("/run", 0o755));
        assert_eq!((&files[0].content[..], files[1].content.len()), (&b"xxx"[..], 1 << 20));
        read_them(&[&half, &half]).expect_err("2 MiB");
        let missing = FirstFile { local: dir.path().join("none"), path: "/x".into() };
        read_them(&[&missing]).expect_err("not there");
        let directory = FirstFile { local: dir.path().into(), path: "/x".into() };
        read_them(&[&directory]).expect_err("a directory");
    }
}
