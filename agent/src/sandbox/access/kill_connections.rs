//! Cuts open connections, so that a port is closed at once and for all.
//!
//! Caddy cannot end one connection of many. The kernel can: `ss -K` destroys the sockets of this
//! node that are connected to an address and port. A request that got its route just before may
//! still connect just after, so `hide` cuts again a little later.

use std::{ffi::OsString, io, net::SocketAddr, time::Duration};

use tokio::time::timeout;

use crate::{run, sys::read};

/// Time limit of `ss`, which takes milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// Most bytes of output that are read; `ss` prints a line for each socket.
const OUTPUT_BYTES_MAX: u64 = 1024 * 1024;

/// Delay from the first cut to the second: the time that Caddy may take to connect to a route.
pub const AGAIN: Duration = Duration::from_secs(6);

/// Destroys this node's TCP connections to an address and port, and returns how many there were.
///
/// # Errors
/// When `ss` is missing, or the kernel lacks CONFIG_INET_DIAG_DESTROY: then open connections stay
/// open until one end closes them.
pub async fn connections(to: SocketAddr) -> io::Result<usize> {
    // Numbers only, so `ss` cannot take an argument for anything else.
    let (ip, port) = (to.ip().to_string(), format!(":{}", to.port()));
    let argv = ["/usr/bin/ss", "-K", "-H", "-n", "-t", "dst", &ip, "dport", "=", &port];
    let mut ss = run::spawn_piped(&argv.map(OsString::from), Vec::new())?;
    drop(ss.stdin);
    let (stdout, stderr) = (ss.stdout, ss.stderr);
    let ended = timeout(DEADLINE, async {
        let (stdout, stderr) = tokio::try_join!(
            read::stream(stdout, OUTPUT_BYTES_MAX),
            read::stream(stderr, OUTPUT_BYTES_MAX)
        )?;
        Ok((ss.process.wait().await?, stdout, String::from_utf8_lossy(&stderr).into_owned()))
    });
    match ended.await {
        Ok(Ok((run::Exit::Code(0), stdout, stderr))) if stderr.is_empty() => {
            Ok(stdout.iter().filter(|&&byte| byte == b'\n').count())
        }
        Ok(Ok((_, _, stderr))) => Err(io::Error::other(format!("ss: {}", stderr.trim()))),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            ss.process.signal(nix::sys::signal::Signal::SIGKILL)?;
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}
