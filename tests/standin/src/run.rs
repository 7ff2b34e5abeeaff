//! Runs other programs, always with a deadline and interruptible by a signal.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::signals::{Woken, wait};

/// Search path of the real `pct`, whatever its caller sets.
pub(crate) const PATH: &str = "/sbin:/bin:/usr/sbin:/usr/bin";

/// Formats a command line for a message.
fn spoken(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a program to its end and returns its output. The caller judges the exit code.
pub(crate) fn output(ctx: &Ctx, command: &mut Command, limit: Duration) -> Result<Output> {
    let told = spoken(command);
    let fail = |error: io::Error| Failure::new(format!("command '{told}' failed: {error}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(fail)?;
    let out = drain(child.stdout.take());
    let err = drain(child.stderr.take());
    let waited = wait_child(ctx, &mut child, limit);
    if waited.is_err() {
        // The readers end with the last holder of the pipe, which may be a grandchild.
        return Err(waited_failure(waited, &told));
    }
    let status = child.wait().map_err(fail)?;
    let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
        reader.and_then(|r| r.join().ok()).unwrap_or_default()
    };
    Ok(Output { status, stdout: text(out), stderr: text(err) })
}

/// Runs a program; any failure is reported in PVE's words, with the last lines of its output.
pub(crate) fn run(ctx: &Ctx, command: &mut Command, limit: Duration) -> Result<String> {
    let told = spoken(command);
    let output = output(ctx, command, limit)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).map(str::trim);
    let why = match (last, output.status.code()) {
        (Some(line), _) => line.to_owned(),
        (None, Some(code)) => format!("exit code {code}"),
        (None, None) => "got signal".to_owned(),
    };
    Err(Failure::new(format!("command '{told}' failed: {why}")))
}

/// Returns the failure of a command that a signal interrupted, in PVE's words.
pub(crate) fn interrupted(told: &str) -> Failure {
    Failure::interrupt(format!("command '{told}' failed: interrupted by signal"))
}

fn waited_failure(waited: std::result::Result<(), Woken>, told: &str) -> Failure {
    match waited {
        Err(Woken::Signal) => interrupted(told),
        Ok(()) | Err(Woken::Timeout | Woken::Ready(_)) => {
            Failure::new(format!("command '{told}' failed: got timeout"))
        }
    }
}

/// Waits for a child, and kills it if the wait is interrupted.
pub(crate) fn wait_child(
    ctx: &Ctx,
    child: &mut Child,
    limit: Duration,
) -> std::result::Result<(), Woken> {
    let deadline = Instant::now() + limit;
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    match wait(ctx.signals(), &[pidfd.as_fd()], Some(deadline)) {
        Woken::Ready(_) => Ok(()),
        cut @ (Woken::Signal | Woken::Timeout) => {
            ignore(child.kill());
            ignore(child.wait());
            Err(cut)
        }
    }
}

fn drain<R>(pipe: Option<R>) -> Option<std::thread::JoinHandle<Vec<u8>>>
where
    R: std::io::Read + Send + 'static,
{
    let pipe = pipe?;
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // The output of these programs is short; the bound is for a runaway one.
        ignore(pipe.take(1 << 20).read_to_end(&mut bytes));
        bytes
    }))
}

/// Opens `/dev/null` for reading and writing.
pub(crate) fn null() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/null")
}
