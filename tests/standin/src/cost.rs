//! What a call of the real one costs: CPU, burnt in user space, not slept.
//!
//! The figures are medians of the recorded timings (load of Perl, work of the task, hooks).
//! Off unless the file `cost` in the control directory or `PCT_COST` says `real`.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Which part of a call is paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// Loading the program, for a sub-command.
    Load(&'a str),
    /// What the task of a sub-command burns on top.
    Work(&'a str),
    /// The hooks that `lxc-start` runs while a container starts: pre-start, autodev, net up.
    StartHooks,
    /// The hook behind a stop.
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

/// Whether calls cost what the real ones do.
#[must_use]
pub fn is_on(control_dir: &Path) -> bool {
    let named = std::env::var("PCT_COST").ok();
    let written = || fs::read_to_string(control_dir.join("cost")).ok();
    named.or_else(written).is_some_and(|text| text.trim() == "real")
}

/// Lets the volumes of every call that uses this control directory count as raw ones with multi-mount
/// protection: whoever opens one that is not mounted waits so long first. Twice 11 s were recorded of
/// `pct resize`. `None` takes it back.
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

/// How long that is; `None` where volumes are subvolumes.
pub(crate) fn mmp(control_dir: &Path) -> Option<Duration> {
    let text = fs::read_to_string(control_dir.join("mmp")).ok()?;
    text.trim().parse().ok().map(Duration::from_millis)
}

/// Pays for a part, where the switch is on.
pub(crate) fn pay(control_dir: &Path, part: Part<'_>) {
    if is_on(control_dir) {
        burn(Duration::from_millis(part.milliseconds()));
    }
}

/// Keeps the CPU busy until this thread has used that much of it. Wall time does not count: on a
/// busy machine the real one takes longer too.
pub fn burn(amount: Duration) {
    let used = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), 0) + Duration::from_nanos(nanos)
    };
    let end = used() + amount;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while used() < end {
        // In user space for the most part, as an interpreter is.
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
    fn the_switch_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_on(dir.path()));
        switch(dir.path(), true).unwrap();
        assert!(is_on(dir.path()));
        switch(dir.path(), false).unwrap();
        assert!(!is_on(dir.path()));
    }
}
