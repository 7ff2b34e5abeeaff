//! `systemctl`, for commands that set a machine up. A daemon never calls it.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
};

/// Directory that is there when systemd runs this machine.
const RUNNING: &str = "/run/systemd/system";
/// Path of the program.
const PROGRAM: &str = "/usr/bin/systemctl";

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
