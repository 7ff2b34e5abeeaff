//! Protocol between the lab's processes: one line of JSON each way over a unix socket.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest wait for an answer to a request that itself waits for nothing.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const LINE_BYTES_MAX: u64 = 1024 * 1024;
/// Longest path of a unix socket in bytes, without the closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Listens on a socket, and replaces one that a dead process left.
pub fn listen(socket: &Path) -> Result<UnixListener> {
    check_length(socket)?;
    if fs::symlink_metadata(socket).is_ok() {
        fs::remove_file(socket)
            .with_context(|| format!("cannot remove the old {}", socket.display()))?;
    }
    UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))
}

pub fn send<T: Serialize>(mut stream: &UnixStream, message: &T) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).context("cannot send")
}

/// Receives a line; the other side has one second to write it.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> Result<T> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    read_line(stream)
}

/// Sends a request and waits for the answer.
pub fn call<Q: Serialize, A: DeserializeOwned>(
    socket: &Path,
    request: &Q,
    within: Duration,
) -> Result<A> {
    check_length(socket)?;
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("nothing answers on {}", socket.display()))?;
    send(&stream, request)?;
    stream.set_read_timeout(Some(within))?;
    read_line(&stream).with_context(|| format!("no answer on {}", socket.display()))
}

fn read_line<T: DeserializeOwned>(stream: &UnixStream) -> Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    if line.is_empty() {
        bail!("the other side hung up");
    }
    serde_json::from_str(&line).with_context(|| format!("not understood: {}", line.trim_end()))
}

fn check_length(socket: &Path) -> Result<()> {
    let len = socket.as_os_str().len();
    if len > SOCKET_PATH_BYTES_MAX {
        bail!(
            "{} is too long for a socket ({len} bytes, {SOCKET_PATH_BYTES_MAX} allowed): \
             choose a shorter LAB_DIR",
            socket.display()
        );
    }
    Ok(())
}
