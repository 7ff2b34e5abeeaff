//! Reading procfs, whose root is a parameter. A process may end at any moment, so what cannot be
//! read is absent, not an error.

use std::{fs, io::Read, path::Path};

/// More of an environment is not looked at.
const ENVIRONMENT_BYTES_MAX: u64 = 1024 * 1024;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// Its arguments. A program that wrote over its own argv has one, with its title.
    pub argv: Vec<String>,
}

/// Every process that has a command line (kernel threads and zombies have none).
pub fn processes(proc: &Path) -> Vec<Process> {
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| process(proc, pid))
        .collect()
}

/// One process; `None` when it has ended.
pub fn process(proc: &Path, pid: u32) -> Option<Process> {
    let dir = proc.join(pid.to_string());
    let argv = argv(&fs::read(dir.join("cmdline")).ok()?);
    if argv.is_empty() {
        return None;
    }
    let parent = parent(&fs::read_to_string(dir.join("stat")).ok()?)?;
    Some(Process { pid, parent, argv })
}

/// A process among others: what ties it to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kin {
    /// Its pid.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// Its process group.
    pub group: u32,
    /// Its session.
    pub session: u32,
    /// When it started, in ticks since the boot: with the pid, who it is.
    pub start: u64,
}

/// A process that has not ended; a zombie has.
pub fn kin(proc: &Path, pid: u32) -> Option<Kin> {
    let stat = fs::read(proc.join(pid.to_string()).join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let mut number = || fields.next()?.parse().ok();
    let (parent, group, session) = (number()?, number()?, number()?);
    // tty_nr is the seventh field, starttime the twenty-second.
    let start = fields.nth(15)?.parse().ok()?;
    Some(Kin { pid, parent, group, session, start })
}

/// True when a process was started with this entry (`NAME=value`) in its environment, and has not
/// written over it.
pub fn has_environment(proc: &Path, pid: u32, entry: &str) -> bool {
    let mut environment = Vec::new();
    let path = proc.join(pid.to_string()).join("environ");
    let read = fs::File::open(path)
        .and_then(|file| file.take(ENVIRONMENT_BYTES_MAX).read_to_end(&mut environment));
    read.is_ok() && environment.split(|&byte| byte == 0).any(|one| one == entry.as_bytes())
}

/// Pids of a process from the outermost namespace that this procfs shows to its own.
pub fn namespace_pids(proc: &Path, pid: u32) -> Vec<u32> {
    let status = fs::read_to_string(proc.join(pid.to_string()).join("status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.unwrap_or("").split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn argv(cmdline: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(cmdline);
    let text = text.trim_end_matches(['\0', ' ']);
    if text.is_empty() { Vec::new() } else { text.split('\0').map(str::to_owned).collect() }
}

fn parent(stat: &str) -> Option<u32> {
    // The name in brackets may hold anything, so the fields are counted from the last bracket.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_tree() {
        let proc = tempfile::tempdir().expect("tempdir");
        let dir = proc.path().join("42");
        fs::create_dir(&dir).expect("mkdir");
        fs::write(dir.join("cmdline"), b"/usr/bin/perl\0-T\0/usr/sbin/pct\0list\0").expect("write");
        fs::write(dir.join("stat"), "42 (a) b) c) S 7 42 42 0").expect("write");
        fs::write(dir.join("status"), "Name:\tx\nNSpid:\t42\t1\n").expect("write");
        fs::create_dir(proc.path().join("43")).expect("mkdir");
        let argv = ["/usr/bin/perl", "-T", "/usr/sbin/pct", "list"].map(str::to_owned).to_vec();
        assert_eq!(processes(proc.path()), [Process { pid: 42, parent: 7, argv }]);
        assert_eq!(namespace_pids(proc.path(), 42), [42, 1]);
        assert!(namespace_pids(proc.path(), 43).is_empty());
    }

    #[test]
    fn kin_are_told_by_their_stat() {
        let proc = tempfile::tempdir().expect("tempdir");
        let put = |pid: u32, stat: &str| {
            let dir = proc.path().join(pid.to_string());
            fs::create_dir(&dir).expect("mkdir");
            fs::write(dir.join("stat"), stat).expect("write");
            fs::write(dir.join("environ"), b"A=1\0MARK=x\0").expect("write");
        };
        put(42, "42 (a) R (b) S 7 8 9 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 2703360 332");
        put(43, "43 (z) Z 7 8 9 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 0 0");
        let expected = Kin { pid: 42, parent: 7, group: 8, session: 9, start: 178_357 };
        assert_eq!(kin(proc.path(), 42), Some(expected));
        assert_eq!((kin(proc.path(), 43), kin(proc.path(), 44)), (None, None));
        assert!(has_environment(proc.path(), 42, "MARK=x"));
        assert!(
            !has_environment(proc.path(), 42, "MARK=") && !has_environment(proc.path(), 44, "A=1")
        );
        let own = kin(Path::new("/proc"), std::process::id()).expect("this process");
        assert!(own.start > 0 && own.parent > 0);
    }
}
