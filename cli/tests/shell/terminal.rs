//! The program on a terminal of its own: what is typed, and what is shown.

use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::pty::{OpenptyResult, Winsize, openpty};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

use crate::fake::Fake;

/// Longest wait for something to be shown, and for the end.
const WAIT: Duration = Duration::from_secs(20);
pub(crate) const CTRL_C: &str = "\x03";

/// Program that runs on a terminal, which is also the one that Ctrl-C comes from.
pub(crate) struct Terminal {
    child: Child,
    ours: tokio::fs::File,
    bytes: Vec<u8>,
    /// Text that was shown so far.
    pub(crate) seen: String,
    /// Part of it that was waited for.
    passed: usize,
}

impl Terminal {
    /// Starts the program in a window of so many columns.
    pub(crate) fn start(fake: &Fake, args: &[&str], columns: u16) -> Self {
        Self::run(fake.command(args), columns)
    }

    /// Starts a command in a window of so many columns.
    pub(crate) fn run(command: Command, columns: u16) -> Self {
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("pty");
        let end = || Stdio::from(slave.try_clone().expect("fd"));
        let command = command.as_std();
        // Makes the terminal the session's own.
        let mut session = Command::new("/usr/bin/setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args()).env_clear();
        for (key, value) in command.get_envs() {
            if let Some(value) = value {
                session.env(key, value);
            }
        }
        if let Some(dir) = command.get_current_dir() {
            session.current_dir(dir);
        }
        session.env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end()).kill_on_drop(true);
        let child = session.spawn().expect("spawn");
        let ours = tokio::fs::File::from_std(std::fs::File::from(master));
        Self { child, ours, bytes: Vec::new(), seen: String::new(), passed: 0 }
    }

    /// Reads more of what is shown; false when the terminal is gone with the program.
    async fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.ours.read(&mut bytes).await {
            Ok(length) if length > 0 => {
                self.bytes.extend_from_slice(&bytes[..length]);
                // As a whole: a character may come in two parts.
                self.seen = String::from_utf8_lossy(&self.bytes).into_owned();
                true
            }
            _ => false,
        }
    }

    /// Waits until `text` is shown, behind what was waited for before.
    pub(crate) async fn until(&mut self, text: &str) -> &mut Self {
        let wait = async {
            loop {
                if let Some(at) = self.seen[self.passed..].find(text) {
                    self.passed += at + text.len();
                    return true;
                }
                if !self.read().await {
                    return false;
                }
            }
        };
        let shown = timeout(WAIT, wait).await.unwrap_or(false);
        assert!(shown, "{text:?} is not shown:\n{}", screen(&self.seen, 80));
        self
    }

    /// Presses these keys.
    pub(crate) async fn press(&mut self, keys: &str) -> &mut Self {
        self.ours.write_all(keys.as_bytes()).await.expect("typed");
        self.ours.flush().await.expect("typed");
        self
    }

    /// Waits for the end. Returns the exit code and what was shown.
    pub(crate) async fn end(mut self) -> (i32, String) {
        let told = timeout(WAIT, async { while self.read().await {} }).await;
        assert!(told.is_ok(), "it does not end:\n{}", screen(&self.seen, 80));
        let ended = timeout(WAIT, self.child.wait()).await.expect("in time");
        (code(ended.expect("it ran")), self.seen)
    }
}

/// Exit code as a shell shows it.
fn code(ended: ExitStatus) -> i32 {
    ended.code().or(ended.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// Text that a terminal of so many columns shows after this output, with all that has scrolled away.
pub(crate) fn screen(output: &str, columns: usize) -> String {
    let mut lines: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column) = (0_usize, 0_usize);
    let mut chars = output.chars();
    while let Some(c) = chars.next() {
        match c {
            '\n' => row += 1,
            '\r' => column = 0,
            '\x07' => {}
            '\x08' => column = column.saturating_sub(1),
            '\x1b' => {
                let mut sequence = String::new();
                while !sequence.ends_with(|c: char| c.is_ascii_alphabetic())
                    && let Some(c) = chars.next()
                {
                    sequence.push(c);
                }
                match sequence.chars().last() {
                    Some('K') => {
                        let from = if sequence == "[2K" { 0 } else { column };
                        lines[row].truncate(from);
                    }
                    Some('J') => {
                        lines[row].truncate(column);
                        lines.truncate(row + 1);
                    }
                    Some('H') => (row, column) = (0, 0),
                    Some('A') => row = row.saturating_sub(1),
                    _ => {}
                }
            }
            c => {
                if column == columns {
                    (row, column) = (row + 1, 0);
                    lines.resize(lines.len().max(row + 1), Vec::new());
                }
                let line = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = c;
                column += 1;
            }
        }
        lines.resize(lines.len().max(row + 1), Vec::new());
    }
    let text = |line: &Vec<char>| line.iter().collect::<String>().trim_end().to_owned();
    lines.iter().map(text).collect::<Vec<_>>().join("\n")
}
