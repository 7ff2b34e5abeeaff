//! CPU cost of a call of the real `pct`, burnt in user space, not slept.
//!
//! The figures are medians of the recorded timings (load of Perl, work of the task, hooks).
//! Off unless the file `cost` in the control directory or `PCT_COST` says `real`.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A part of a call that costs CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// Load of the program, for a sub-command.
    Load(&'a str),
    /// Work of a sub-command's task, on top of the load.
    Work(&'a str),
    /// Hooks that `lxc-start` runs while a container starts: pre-start, autodev, net up.
    StartHooks,
    /// Hook after a stop.
    StopHook,
}

impl Part<'_> {
    fn milliseconds(self) -> u64 {
        match self {
            Self::Load("exec") => 592,
            Self::Load("list" | "status") => 615,
            Self::Load("pvesm") => 500,
            Self::Load(_) => 613,
            Self::Work("clone") => 207,
            Self::Work("start") => 37,
            Self::Work("stop" | "shutdown" | "reboot") => 20,
            Self::Work("destroy") => 64,
            Self::Work("set") => 32,
            Self::Work(_) => 30,
            Self::StartHooks => 445 + 74 + 427,
            Self::StopHook => 431,
        }
    }
}

/// Switches the real cost on or off for every call that uses this control directory.
pub fn switch(control_dir: &Path, on: bool) -> io::Result<()> {
    fs::create_dir_all(control_dir)?;
    fs::write(control_dir.join("cost"), if on { "real\n" } else { "off\n" })
}

/// Returns whether calls cost as much as real ones.
#[must_use]
pub fn is_on(control_dir: &Path) -> bool {
    let named = std::env::var("PCT_COST").ok();
    let written = || fs::read_to_string(control_dir.join("cost")).ok();
    named.or_else(written).is_some_and(|text| text.trim() == "real")
}

/// Treats the volumes of every call that uses this control directory as raw ones with multi-mount
/// protection: a tool that opens an unmounted one first waits that long. Recorded with `pct
/// resize`: twice 11 s. `None` switches it off.
pub fn set_mmp(control_dir: &Path, wait: Option<Duration>) -> io::Result<()> {
    fs::create_dir_all(control_dir)?;
    let file = control_dir.join("mmp");
    match wait {
        Some(wait) => fs::write(file, format!("{}\n", wait.as_millis())),
        None => match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    }
}

/// Returns that wait; `None` where volumes are subvolumes.
pub(crate) fn mmp(control_dir: &Path) -> Option<Duration> {
    let text = fs::read_to_string(control_dir.join("mmp")).ok()?;
    text.trim().parse().ok().map(Duration::from_millis)
}

/// Burns the CPU of a part, if the cost is switched on.
pub(crate) fn pay(control_dir: &Path, part: Part<'_>) {
    if is_on(control_dir) {
        burn(Duration::from_millis(part.milliseconds()));
    }
}

/// Keeps the CPU busy until this thread has used that much CPU time. Wall time does not count: on a
/// busy machine the real `pct` takes longer, too.
pub fn burn(amount: Duration) {
    let used = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), 0) + Duration::from_nanos(nanos)
    };
    let end = used() + amount;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while used() < end {
        // Mostly in user space, like an interpreter.
        for _ in 0..20_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        std::hint::black_box(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burning_takes_cpu_time() {
        let before = clock_gettime(ClockId::ThreadCPUTime);
        burn(Duration::from_millis(30));
        let after = clock_gettime(ClockId::ThreadCPUTime);
        let ms =
            (after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1_000_000;
        assert!((30..200).contains(&ms), "{ms} ms");
    }

    #[test]
    fn cost_is_switched_by_a_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_on(dir.path()));
        switch(dir.path(), true).unwrap();
        assert!(is_on(dir.path()));
        switch(dir.path(), false).unwrap();
        assert!(!is_on(dir.path()));
    }
}
