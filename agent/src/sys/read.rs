//! Reading files whose size others control. The agent reads all files through these functions: a
//! file that a tenant makes large costs no more than the bound.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bound for a kernel file about one process, cgroup or setting, bytes. The kernel writes less.
pub const SMALL: u64 = 4 * 1024;
/// Bound for a table of the kernel or of PVE about the whole host, bytes.
pub const LARGE: u64 = 16 * 1024 * 1024;

/// Reads the first bytes of a file, at most `max`.
///
/// # Errors
/// When the file cannot be opened or read.
pub fn head(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads like `head`, as text with invalid UTF-8 replaced; empty when the file cannot be read.
pub fn text(path: &Path, max: u64) -> String {
    String::from_utf8_lossy(&head(path, max).unwrap_or_default()).into_owned()
}

/// Reads a whole file of at most `max` bytes: half of it would have another meaning.
///
/// # Errors
/// When the file cannot be opened or read, or is larger.
pub fn whole(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let bytes = head(path, max.saturating_add(1))?;
    if bytes.len() as u64 > max {
        let why = format!("{} has more than {max} bytes", path.display());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// Reads a pipe or a socket until its end, at most `max` bytes.
///
/// # Errors
/// When it cannot be read.
pub async fn stream(from: impl AsyncRead + Unpin, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(max).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// Reads like `whole`, as text.
///
/// # Errors
/// As `whole`, and when it is no UTF-8.
pub fn whole_text(path: &Path, max: u64) -> io::Result<String> {
    String::from_utf8(whole(path, max)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_never_exceed_their_bound() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("large");
        // Sparse: has this size without using the space.
        File::create(&path).and_then(|file| file.set_len(1 << 40)).expect("made");
        assert_eq!(head(&path, 5).expect("reads"), [0; 5]);
        assert_eq!(text(&path, 3), "\0\0\0");
        assert_eq!(whole(&path, 10).expect_err("larger").kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(&path, "0123456789").expect("written");
        assert_eq!(whole_text(&path, 10).expect("fits"), "0123456789");
        whole(&path, 9).expect_err("larger");
        std::fs::write(&path, [b'a', 0xff]).expect("written");
        assert_eq!(text(&path, 10), "a\u{fffd}");
        whole_text(&path, 10).expect_err("no UTF-8");
        assert_eq!(text(&dir.path().join("none"), 10), "");
    }
}
