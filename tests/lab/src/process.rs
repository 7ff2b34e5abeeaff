//! A process recorded in a file: its pid with its start time, so that a pid that was reused since,
//! or before a reboot, is never mistaken for it.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process and its start time, in clock ticks since the machine's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proc {
    /// Pid as this process sees it.
    pub pid: i32,
    /// Start time, field 22 of the stat file.
    pub start_ticks: u64,
}

impl Proc {
    /// Returns the process with that pid, if it lives.
    pub fn of(pid: i32) -> Option<Proc> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Proc { pid, start_ticks })
    }

    /// Returns the process that `file` names, if it still lives.
    pub fn from_file(file: &Path) -> Option<Proc> {
        let text = fs::read_to_string(file).ok()?;
        let (boot, rest) = text.trim_end().split_once(' ')?;
        let (pid, start) = rest.split_once(' ')?;
        let proc = Proc { pid: pid.parse().ok()?, start_ticks: start.parse().ok()? };
        (boot == machine_boot() && proc.is_alive()).then_some(proc)
    }

    /// Records the process in a file, with the machine's boot id.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        let new = file.with_extension("new");
        fs::write(&new, format!("{} {} {}\n", machine_boot(), self.pid, self.start_ticks))?;
        fs::rename(new, file)
    }

    /// Returns true while this very process runs; a zombie counts as ended.
    pub fn is_alive(&self) -> bool {
        Proc::of(self.pid) == Some(*self)
    }

    /// Sends a signal, if the pid still belongs to this process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.is_alive() {
            kill(Pid::from_raw(self.pid), signal)
                .with_context(|| format!("cannot send {signal} to process {}", self.pid))?;
        }
        Ok(())
    }

    /// Waits until the process has ended.
    pub fn wait_gone(&self, within: Duration) -> Result<()> {
        wait_until(within, || !self.is_alive())
            .with_context(|| format!("process {} does not end", self.pid))
    }
}

/// Checks every 5 ms whether a condition is true.
pub fn wait_until(within: Duration, done: impl FnMut() -> bool) -> Result<()> {
    poll_until(within, Duration::from_millis(5), done)
}

/// Like [`wait_until`], but checks once in `every`: for checks that are expensive.
pub fn poll_until(within: Duration, every: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + within;
    while !done() {
        if Instant::now() >= deadline {
            bail!("waited {} s for it", within.as_secs());
        }
        std::thread::sleep(every);
    }
    Ok(())
}

fn machine_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "-".to_owned(), |id| id.trim().to_owned())
}

/// Parses the state letter and the start time from a stat file. The name in parentheses may hold
/// anything, so the fields begin behind the last parenthesis.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let rest = stat.get(stat.rfind(')')? + 1..)?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name_is_parsed() {
        let stat = "7 (a) Z 1 2) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2 3";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (a"), None);
    }

    #[test]
    fn process_is_identified_by_pid_and_start_time() {
        let me = Proc::of(std::process::id().cast_signed()).expect("it runs");
        assert!(me.is_alive());
        assert!(!Proc { start_ticks: me.start_ticks + 1, ..me }.is_alive());
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("pid");
        me.write(&file).expect("written");
        assert_eq!(Proc::from_file(&file), Some(me));
    }
}
