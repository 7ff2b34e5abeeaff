//! Runs a system program and puts its output into the error when it fails.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

/// Number of lines of a failed program's output that go into the error.
const TAIL_LINES: usize = 15;

/// Runs a program to its end; another exit code than 0 is an error that carries its last lines.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    run_command(&mut command)
}

/// Runs a line whose words contain no blanks: `run_line("ip link set lo up")`.
pub fn run_line(line: &str) -> Result<String> {
    let mut words = line.split_ascii_whitespace();
    let program = words.next().context("an empty command line")?;
    run(program, words)
}

/// Runs a prepared command to its end, with closed stdin.
pub fn run_command(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {line}"))?;
    if !output.status.success() {
        bail!("`{line}` failed ({}): {}", output.status, last_words(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn last_words(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&both);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
