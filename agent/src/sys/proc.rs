//! Reading procfs, whose root is a parameter. A process may end at any moment, so a value that
//! cannot be read is absent, not an error.
//!
//! A process's owner controls what the process can write: a tenant's command line can have 80 MiB
//! for which the tenant pays nothing, or lie in memory that never answers. So the kernel is first
//! asked for the owner; of tenants' processes nothing of this is read, of others a few KiB.

use std::{fs, path::Path, time::Duration};

use super::read;

/// Bytes read of a command line at most.
const CMDLINE_BYTES_MAX: u64 = read::SMALL;
/// Bytes read of an environment at most.
const ENVIRONMENT_BYTES_MAX: u64 = 256 * 1024;

/// Unit of CPU times in procfs, in milliseconds: the kernel shows 100 ticks a second to programs on
/// each architecture that PVE runs on (USER_HZ, proc(5)).
const TICK_MS: u64 = 10;

/// A process of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Pid of the process.
    pub pid: u32,
    /// Pid of its parent.
    pub parent: u32,
    /// Start time, in ticks since the boot: identifies the process together with the pid.
    pub start: u64,
    /// Arguments, the first 4 KiB of them. A program that wrote over its own argv has one, its
    /// title.
    pub argv: Vec<String>,
}

/// Processes of the host that have a command line (kernel threads and zombies have none). Excludes
/// the processes of containers.
pub fn host_processes(proc: &Path) -> Vec<Process> {
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| is_of_the_host(proc, pid)).filter_map(|pid| process(proc, pid)).collect()
}

/// True for a process of our own pid namespace. Reads a link of the kernel, whose size nobody else
/// controls.
pub fn is_of_the_host(proc: &Path, pid: u32) -> bool {
    let namespace = |whose: &str| fs::read_link(proc.join(whose).join("ns/pid")).ok();
    namespace("self").is_some_and(|ours| namespace(&pid.to_string()) == Some(ours))
}

fn process(proc: &Path, pid: u32) -> Option<Process> {
    let ProcStat { parent, start, .. } = kin(proc, pid)?;
    let cmdline =
        read::head(&proc.join(pid.to_string()).join("cmdline"), CMDLINE_BYTES_MAX).ok()?;
    let argv = argv(&cmdline);
    (!argv.is_empty()).then_some(Process { pid, parent, start, argv })
}

/// Relations of a process to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcStat {
    /// Pid of the process.
    pub pid: u32,
    /// Pid of its parent.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Start time, in ticks since the boot: identifies the process together with the pid.
    pub start: u64,
}

/// Relations of a process that has not ended; `None` for a zombie.
pub fn kin(proc: &Path, pid: u32) -> Option<ProcStat> {
    let stat = read::text(&proc.join(pid.to_string()).join("stat"), read::SMALL);
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let mut number = || fields.next()?.parse().ok();
    let (parent, group, session) = (number()?, number()?, number()?);
    // tty_nr is the seventh field, starttime the twenty-second.
    let start = fields.nth(15)?.parse().ok()?;
    Some(ProcStat { pid, parent, group, session, start })
}

/// Pids of the children of a process's first thread, as far as the first 4 KiB tell; none from a kernel without
/// CONFIG_PROC_CHILDREN.
pub fn children(proc: &Path, pid: u32) -> Vec<u32> {
    let pid = pid.to_string();
    let list = proc.join(&pid).join("task").join(&pid).join("children");
    let text = read::text(&list, read::SMALL);
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// CPU time that a process has used, with its children that have ended; zero once it has ended.
pub fn cpu(proc: &Path, pid: u32) -> Duration {
    let stat = read::text(&proc.join(pid.to_string()).join("stat"), read::SMALL);
    let Some((_, fields)) = stat.rsplit_once(") ") else { return Duration::ZERO };
    // utime, stime, cutime and cstime are the fields 14 to 17; the state is the third.
    let ticks = fields.split(' ').skip(11).take(4).filter_map(|field| field.parse::<u64>().ok());
    Duration::from_millis(ticks.fold(0, u64::saturating_add).saturating_mul(TICK_MS))
}

/// True for a process that is traced or stopped by a signal: it does nothing until it is continued.
pub fn stopped(proc: &Path, pid: u32) -> bool {
    let stat = read::text(&proc.join(pid.to_string()).join("stat"), read::SMALL);
    stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with(['T', 't']))
}

/// True when a process was started with this entry (`NAME=value`) in its environment, and has not
/// written over it. The environment lies in the process's memory, whose owner can make a read hang:
/// never wait for the result without a deadline.
pub fn has_environment(proc: &Path, pid: u32, entry: &str) -> bool {
    let path = proc.join(pid.to_string()).join("environ");
    let environment = read::head(&path, ENVIRONMENT_BYTES_MAX).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|one| one == entry.as_bytes())
}

/// Pids of a process, from the outermost namespace that this procfs shows to its own. Empty when
/// the process has so many groups that the pids are not in the first 4 KiB of its status.
pub fn namespace_pids(proc: &Path, pid: u32) -> Vec<u32> {
    let status = read::text(&proc.join(pid.to_string()).join("status"), read::SMALL);
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.unwrap_or("").split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// Signals of a process as masks: bit n - 1 is signal n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SignalMasks {
    /// Signals that it blocks, for a signalfd for example.
    pub blocked: u64,
    /// Signals that it has a handler for.
    pub caught: u64,
    /// Signals that it ignores.
    pub ignored: u64,
}

impl SignalMasks {
    /// Returns true when the process ignores this signal, 1 to 64.
    pub fn ignores(&self, number: i32) -> bool {
        let bit = u32::try_from(number).ok().and_then(|number| number.checked_sub(1));
        bit.and_then(|bit| self.ignored.checked_shr(bit)).is_some_and(|mask| mask & 1 == 1)
    }
}

/// Signals of a process; none when that is unknown, which a process with very many groups can
/// arrange.
pub fn signal_masks(proc: &Path, pid: u32) -> SignalMasks {
    let status = read::text(&proc.join(pid.to_string()).join("status"), read::SMALL);
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok()).unwrap_or_default()
    };
    SignalMasks { blocked: mask("SigBlk:"), caught: mask("SigCgt:"), ignored: mask("SigIgn:") }
}

fn argv(cmdline: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(cmdline);
    let text = text.trim_end_matches(['\0', ' ']);
    if text.is_empty() { Vec::new() } else { text.split('\0').map(str::to_owned).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "S 7 42 42 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 2703360 332";

    /// Creates a process in a fake procfs, in this pid namespace.
    fn put(proc: &Path, pid: &str, namespace: u32) -> std::path::PathBuf {
        let dir = proc.join(pid);
        fs::create_dir_all(dir.join("ns")).expect("mkdir");
        let link = format!("pid:[{namespace}]");
        std::os::unix::fs::symlink(link, dir.join("ns/pid")).expect("linked");
        fs::write(dir.join("stat"), format!("{pid} (a) b) c) {STAT}")).expect("write");
        dir
    }

    #[test]
    fn only_processes_of_the_host_are_read() {
        let proc = tempfile::tempdir().expect("tempdir");
        let proc = proc.path();
        put(proc, "self", 1);
        let dir = put(proc, "42", 1);
        fs::write(dir.join("cmdline"), b"/usr/bin/perl\0-T\0/usr/sbin/pct\0list\0").expect("write");
        fs::write(dir.join("status"), "Name:\tx\nNSpid:\t42\t1\n").expect("write");
        // Adds a kernel thread, a process that has just ended, and one of a container.
        fs::write(put(proc, "43", 1).join("cmdline"), "").expect("write");
        fs::create_dir(proc.join("44")).expect("mkdir");
        fs::write(put(proc, "45", 2).join("cmdline"), b"/usr/sbin/pct\0list\0").expect("write");
        let argv = ["/usr/bin/perl", "-T", "/usr/sbin/pct", "list"].map(str::to_owned).to_vec();
        let expected = Process { pid: 42, parent: 7, start: 178_357, argv };
        assert_eq!(host_processes(proc), [expected]);
        assert_eq!(namespace_pids(proc, 42), [42, 1]);
        assert!(namespace_pids(proc, 43).is_empty());
    }

    /// Creates a pipe without a writer: a read hangs.
    fn hangs(path: &Path) {
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(path, mode).expect("made");
    }

    #[test]
    fn tenant_files_are_not_read_and_reads_of_others_are_bounded() {
        let proc = tempfile::tempdir().expect("tempdir");
        let proc = proc.path();
        put(proc, "self", 1);
        // Sparse file of 1 TiB, which does not fit if read whole.
        let large = |path: &Path| {
            fs::File::create(path).and_then(|file| file.set_len(1 << 40)).expect("made");
        };
        for pid in 100..200 {
            let tenant = put(proc, &pid.to_string(), 2);
            for name in ["cmdline", "environ", "maps"] {
                if pid % 2 == 0 { hangs(&tenant.join(name)) } else { large(&tenant.join(name)) }
            }
        }
        assert_eq!(host_processes(proc), []);
        let dir = put(proc, "42", 1);
        let mut title =
            b"task UPID:pve1:0000000C:0005B7B3:6B0456DF:vzclone:900:root@pam:\0".to_vec();
        fs::write(dir.join("cmdline"), &title).expect("write");
        fs::OpenOptions::new()
            .append(true)
            .open(dir.join("cmdline"))
            .and_then(|file| file.set_len(1 << 40))
            .expect("grown");
        let [found] = &host_processes(proc)[..] else { panic!("one") };
        title.pop();
        assert_eq!(found.argv[0].as_bytes(), title);
        let all: usize = found.argv.iter().map(|word| word.len() + 1).sum();
        assert!(all as u64 <= CMDLINE_BYTES_MAX + 1, "{all}");
        large(&dir.join("environ"));
        assert!(!has_environment(proc, 42, "A=1"));
        // Fills the status with as many groups as the kernel allows, before the pids.
        let groups = "100000 ".repeat(65_536);
        let status = format!("Name:\tx\nGroups:\t{groups}\nNSpid:\t42\t1\n");
        fs::write(dir.join("status"), status).expect("write");
        assert!(namespace_pids(proc, 42).is_empty());
        large(&dir.join("stat"));
        assert_eq!(kin(proc, 42), None);
    }

    /// Largest command line that plain exec allows, in the real procfs.
    #[test]
    fn huge_command_line_is_read_only_up_to_the_limit() {
        let one = "x".repeat(100_000);
        #[expect(clippy::disallowed_methods, reason = "a process to look at")]
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "echo; read line"])
            .args(std::iter::repeat_n(&one, 15))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("started");
        // Until it runs, the kernel may have no command line of it yet.
        let mut said = [0];
        let out = child.stdout.as_mut().expect("a pipe");
        std::io::Read::read_exact(out, &mut said).expect("it runs");
        let found = host_processes(Path::new("/proc"));
        let found = found.iter().find(|process| process.pid == child.id());
        let words = found.map(|process| process.argv.iter().map(String::len).sum::<usize>());
        drop(child.stdin.take());
        child.wait().expect("ended");
        let bytes = words.expect("it is one of the host's") as u64;
        assert!(bytes > 0 && bytes <= CMDLINE_BYTES_MAX, "{bytes}");
    }

    #[test]
    fn process_stat_and_environment_are_parsed() {
        let proc = tempfile::tempdir().expect("tempdir");
        let put = |pid: u32, stat: &str| {
            let dir = proc.path().join(pid.to_string());
            fs::create_dir(&dir).expect("mkdir");
            fs::write(dir.join("stat"), stat).expect("write");
            fs::write(dir.join("environ"), b"A=1\0MARK=x\0").expect("write");
        };
        put(42, "42 (a) R (b) S 7 8 9 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 2703360 332");
        put(43, "43 (z) Z 7 8 9 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 0 0");
        put(45, "45 (t) T 7 8 9 0 -1 4194304 54 0 0 0 0 0 0 0 20 0 1 0 178357 0 0");
        assert!(stopped(proc.path(), 45));
        assert!(
            !stopped(proc.path(), 42) && !stopped(proc.path(), 43) && !stopped(proc.path(), 44)
        );
        let expected = ProcStat { pid: 42, parent: 7, group: 8, session: 9, start: 178_357 };
        assert_eq!(kin(proc.path(), 42), Some(expected));
        assert_eq!((kin(proc.path(), 43), kin(proc.path(), 44)), (None, None));
        assert!(has_environment(proc.path(), 42, "MARK=x"));
        assert!(
            !has_environment(proc.path(), 42, "MARK=") && !has_environment(proc.path(), 44, "A=1")
        );
        let own = kin(Path::new("/proc"), std::process::id()).expect("this process");
        assert!(own.start > 0 && own.parent > 0);
    }

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let proc = tempfile::tempdir().expect("tempdir");
        let dir = proc.path().join("42");
        fs::create_dir(&dir).expect("mkdir");
        let masks =
            "SigBlk:\t0000000000000000\nSigIgn:\t8000000000001001\nSigCgt:\t0000000000000002\n";
        fs::write(dir.join("status"), format!("Name:\tx\n{masks}")).expect("write");
        let found = signal_masks(proc.path(), 42);
        let ignored: Vec<i32> = (-1..=65).filter(|number| found.ignores(*number)).collect();
        assert_eq!(ignored, [1, 13, 64]);
        assert!(!signal_masks(proc.path(), 43).ignores(1), "nothing is known of it");
    }
}
