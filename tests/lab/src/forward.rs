//! Forwards ports on the machine's loopback into the lab's network. A listener keeps the network
//! namespace that it was created in, so this process listens first and then moves into the lab's.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::net::netns_file;

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const CONNECTIONS_MAX: usize = 1024;
const BUFFER_BYTES: usize = 64 * 1024;

/// A port on the loopback and its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Address on the machine.
    pub from: SocketAddr,
    /// Address in the lab's network.
    pub to: SocketAddr,
}

impl std::fmt::Display for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.from, self.to)
    }
}

impl std::str::FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Forward, String> {
        let wrong = || format!("{text} is not LOOPBACK:PORT=ADDRESS:PORT");
        let (from, to) = text.split_once('=').ok_or_else(wrong)?;
        let from: SocketAddr = from.parse().map_err(|_| wrong())?;
        let to = to.parse().map_err(|_| wrong())?;
        if !from.ip().is_loopback() {
            return Err(format!(
                "{from} is not on the loopback: the lab is for this machine alone"
            ));
        }
        Ok(Forward { from, to })
    }
}

/// Forwards connections and never returns without an error. Calls `ready` when all ports listen.
pub fn forward(forwards: &[Forward], ready: impl FnOnce()) -> Result<()> {
    if forwards.is_empty() {
        bail!("there is nothing to forward");
    }
    let mut listeners = Vec::new();
    for forward in forwards {
        let listener = TcpListener::bind(forward.from)
            .with_context(|| format!("cannot listen on {}", forward.from))?;
        listeners.push((listener, forward.to));
    }
    let netns = File::open(netns_file()).context("the lab's network is not there")?;
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the lab's network")?;
    let open = Arc::new(AtomicUsize::new(0));
    ready();
    std::thread::scope(|scope| {
        for (listener, to) in &listeners {
            let open = Arc::clone(&open);
            scope.spawn(move || accept(listener, *to, &open));
        }
    });
    Ok(())
}

fn accept(listener: &TcpListener, to: SocketAddr, open: &Arc<AtomicUsize>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("forward: cannot accept: {error}");
                // Most likely out of descriptors; some are returned soon.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            eprintln!("forward: more than {CONNECTIONS_MAX} connections; one was refused");
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let open = Arc::clone(open);
        std::thread::spawn(move || {
            // A broken connection concerns only its two ends.
            drop(join(&stream, to));
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn join(from: &TcpStream, to: SocketAddr) -> Result<()> {
    let to = TcpStream::connect_timeout(&to, CONNECT_WITHIN)?;
    from.set_nodelay(true)?;
    to.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(|| copy(from, &to));
        copy(&to, from);
    });
    Ok(())
}

/// Copies one direction until its end, then closes it on the other side.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    while let Ok(len) = from.read(&mut buffer) {
        if len == 0 || to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // Either side may be gone already.
    drop(to.shutdown(Shutdown::Write));
    drop(from.shutdown(Shutdown::Read));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_loopback_is_forwarded() {
        let forward: Forward = "127.0.0.1:7443=10.99.0.254:7443".parse().expect("it is one");
        assert_eq!(forward.to_string(), "127.0.0.1:7443=10.99.0.254:7443");
        assert!("0.0.0.0:80=10.99.0.1:80".parse::<Forward>().is_err());
        assert!("127.0.0.1:80".parse::<Forward>().is_err());
    }
}
