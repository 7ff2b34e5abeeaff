//! `systemctl`, for commands that set a machine up. A daemon never calls it.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt as _, time::timeout};

/// Directory that is there when systemd runs this machine.
const RUNNING: &str = "/run/systemd/system";
/// Path of the program.
const PROGRAM: &str = "/usr/bin/systemctl";

/// Longest output of a program that is asked, bytes.
const ANSWER_MAX: u64 = 256 * 1024;

/// End of a program that was asked.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Whether it ended with exit code 0.
    pub success: bool,
    /// Its output, the first 256 KiB.
    pub stdout: String,
}

/// PATH of a program that is asked. The rest of our environment, which may hold a token, is not for it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a program that only tells something, such as `nft list tables`. Ends it when the time is over.
///
/// # Errors
/// When it cannot be started, or does not end in time.
pub async fn ask(program: &Path, words: &[&str], limit: Duration) -> io::Result<Answer> {
    #[expect(clippy::disallowed_methods, reason = "only commands of an operator come here")]
    let mut child = tokio::process::Command::new(program)
        .args(words)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let pipe = child.stdout.take().ok_or_else(|| io::Error::other("a pipe was not made"))?;
    let work = async {
        let mut bytes = Vec::new();
        pipe.take(ANSWER_MAX).read_to_end(&mut bytes).await?;
        let status = child.wait().await?;
        let stdout = String::from_utf8_lossy(&bytes).into_owned();
        Ok(Answer { success: status.success(), stdout })
    };
    timeout(limit, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Returns true when systemd runs this machine.
pub fn is_there() -> bool {
    Path::new(RUNNING).is_dir() && Path::new(PROGRAM).exists()
}

/// Runs `systemctl` with these words and waits for its end.
///
/// # Errors
/// When it cannot be started, or fails. Its own words go to stderr.
pub fn run(words: &[&str]) -> io::Result<()> {
    run_program(Path::new(PROGRAM), words, &[])
}

/// Runs a program with these words and variables, whose output goes where ours goes, and waits for its
/// end. Secrets go into variables: everybody on the machine can read arguments.
///
/// # Errors
/// When it cannot be started, or fails.
pub fn run_program(program: &Path, words: &[&str], env: &[(&str, &str)]) -> io::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "only commands of an operator come here")]
    let status = Command::new(program)
        .args(words)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .status()?;
    if status.success() {
        return Ok(());
    }
    let words = words.join(" ");
    Err(io::Error::other(format!("`{} {words}` failed: {status}", program.display())))
}

/// Reads the word of `systemctl is-enabled`: `Some(false)` for a unit that a boot does not start; `None` where the unit
/// is unknown, or the word says neither.
#[must_use]
pub fn starts_at_boot(word: &str) -> Option<bool> {
    match word.trim() {
        "enabled" => Some(true),
        // What is enabled at run time is lost at the next boot.
        "disabled" | "linked" | "enabled-runtime" | "linked-runtime" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_of_systemctl_tells_what_a_boot_does_not_start() {
        assert_eq!(starts_at_boot("enabled\n"), Some(true));
        for word in ["disabled\n", "enabled-runtime\n"] {
            assert_eq!(starts_at_boot(word), Some(false), "{word}");
        }
        for unknown in ["", "not-found\n", "static\n"] {
            assert_eq!(starts_at_boot(unknown), None, "{unknown}");
        }
    }
}
