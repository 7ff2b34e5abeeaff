//! Parser of /proc/self/mountinfo. Pure except for `here`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// One line of mountinfo, reduced to the fields that are used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Directory of the file system that is mounted.
    pub root: PathBuf,
    /// Mount point.
    pub at: PathBuf,
    /// Type of the file system, such as `ext4` or `cgroup2`.
    pub fs_type: String,
    /// Options of the file system; for cgroup v1 they name the controllers.
    pub super_options: Vec<String>,
}

/// Returns the mounts of this process's mount namespace.
pub fn here() -> Result<Vec<Mount>> {
    let text =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc: mount it")?;
    Ok(parse(&text))
}

/// Returns the mounts at and below a directory, innermost and latest first: the unmount order.
pub fn below(mounts: &[Mount], dir: &Path) -> Vec<PathBuf> {
    mounts.iter().rev().filter(|m| m.at.starts_with(dir)).map(|m| m.at.clone()).collect()
}

/// Parses mountinfo; malformed lines are skipped.
pub fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let mut right = right.split(' ');
    Some(Mount {
        root: unescape(left.next()?),
        at: unescape(left.next()?),
        fs_type: right.next()?.to_owned(),
        super_options: right.nth(1)?.split(',').map(str::to_owned).collect(),
    })
}

/// Decodes a path, in which blanks and backslashes are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = text
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:1 master:2 - cgroup2 cgroup2 rw
50 27 0:50 /sub /tmp/a\040b\134c rw - btrfs /dev/loop0 rw
51 50 0:51 / /tmp/a\040b\134c/d rw - tmpfs none rw
not a mount";

    #[test]
    fn lines_with_and_without_optional_fields_are_parsed() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 5);
        assert_eq!(mounts[1].super_options, ["rw", "cpu", "cpuacct"]);
        assert_eq!(mounts[2].fs_type, "cgroup2");
        assert_eq!(mounts[3].root, Path::new("/sub"));
        assert_eq!(mounts[3].at, Path::new(r"/tmp/a b\c"));
    }

    #[test]
    fn below_lists_the_innermost_mount_first() {
        let mounts = parse(TEXT);
        let dir = Path::new(r"/tmp/a b\c");
        assert_eq!(below(&mounts, dir), [dir.join("d"), dir.to_owned()]);
        assert_eq!(below(&mounts, Path::new("/tmp/a")), Vec::<PathBuf>::new());
    }
}
