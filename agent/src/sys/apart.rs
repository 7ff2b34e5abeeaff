//! What children do not share with the agent: its memory limit, and its score for when the host runs out
//! of memory.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt as _, path::Path, sync::OnceLock};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::write,
};

use super::read;

/// Score of a process for the OOM killer, from -1000 to 1000; inherited.
const SCORE: &str = "/proc/self/oom_score_adj";
const SCORE_C: &std::ffi::CStr = c"/proc/self/oom_score_adj";

/// Files of the cgroups that children move to, one for each hierarchy.
static CGROUPS: OnceLock<Vec<CString>> = OnceLock::new();

/// Lets all children from now on move to the cgroups whose `cgroup.procs` these are. Only the first
/// call counts.
///
/// # Errors
/// When a path has a NUL.
pub fn move_children(procs: &[impl AsRef<Path>]) -> io::Result<()> {
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
    let procs: io::Result<Vec<_>> = procs.iter().map(|procs| path(procs.as_ref())).collect();
    drop(CGROUPS.set(procs?));
    Ok(())
}

/// Steps of a child before it becomes another program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Apart {
    cgroups: &'static [CString],
    /// Whether this process has a score of its own, which the child shall not have.
    resets_score: bool,
}

impl Apart {
    /// Reads what the agent has that a child shall not have.
    pub(super) fn of_agent() -> Self {
        let score = read::text(Path::new(SCORE), read::SMALL).trim().parse::<i32>();
        Self {
            cgroups: CGROUPS.get().map_or(&[], Vec::as_slice),
            resets_score: score.is_ok_and(|score| score != 0),
        }
    }

    /// Leaves the agent's cgroups and its score behind. Runs in the forked child: calls nothing but
    /// open(2), write(2) and close(2).
    ///
    /// # Errors
    /// When the score cannot be reset: a tenant's command must not be spared. A cgroup that cannot be
    /// joined is let be: the child then counts as the agent.
    pub(super) fn leave(&self) -> io::Result<()> {
        for procs in self.cgroups {
            let _stays = put(procs, b"0");
        }
        if self.resets_score { Ok(put(SCORE_C, b"0")?) } else { Ok(()) }
    }
}

fn put(path: &std::ffi::CStr, text: &[u8]) -> Result<(), Errno> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, text).map(|_| ())
}
