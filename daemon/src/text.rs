//! Reads small text files whole: configurations, keys, certificates.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

/// Largest file, bytes. A larger one is an error: what is read in part and written back is lost.
const BYTES_MAX: u64 = 1 << 20;

/// Reads a file.
///
/// # Errors
/// When it cannot be read, is larger than 1 MiB, or is no UTF-8.
pub fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > BYTES_MAX {
        let why = format!("{} is larger than 1 MiB", path.display());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(text)
}

/// Reads a file; `None` when it does not exist.
///
/// # Errors
/// As [`read`], but for one that does not exist.
pub fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        done => done.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        assert_eq!(read_if_there(&path).expect("looked"), None);
        assert_eq!(read(&path).expect_err("none").kind(), io::ErrorKind::NotFound);
        let most = "x".repeat(1 << 20);
        std::fs::write(&path, &most).expect("written");
        assert_eq!(read(&path).expect("read"), most);
        std::fs::write(&path, format!("{most}x")).expect("written");
        assert_eq!(read(&path).expect_err("too large").kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(&path, b"\xff").expect("written");
        read_if_there(&path).expect_err("no text");
    }
}
