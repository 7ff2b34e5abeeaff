//! A server, and clients that keep it busy. Both do as little as they can, and run on threads of their own,
//! so that they take the same from whatever stands between them.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Body of each answer.
const BODY: &str = "{\"state\":\"it works\",\"port\":8000}\n";
/// Beginning of each answer, whatever stands between.
const OK: &[u8] = b"HTTP/1.1 200";
/// Longest head.
const HEAD_MAX: usize = 16 * 1024;
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(30);

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("a runtime")
}

/// A server that gives every request the same answer; it ends when dropped.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    _stop: DropGuard,
}

impl Server {
    pub(super) fn start(address: SocketAddr) -> Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let runtime = runtime()?;
        std::thread::Builder::new().spawn(move || {
            runtime.block_on(async move {
                // Of this runtime.
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                while let Some(Ok((stream, _))) =
                    stopped.run_until_cancelled(listener.accept()).await
                {
                    tokio::spawn(serve(stream));
                }
            });
        })?;
        Ok(Self { address, _stop: stop.drop_guard() })
    }
}

async fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let mut read = Vec::with_capacity(HEAD_MAX);
    loop {
        read.clear();
        // Requests have no body.
        while !read.ends_with(b"\r\n\r\n") {
            let got = stream.read_buf(&mut read).await?;
            if got == 0 || read.len() >= HEAD_MAX {
                return Ok(());
            }
        }
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Durations of the answers in one round.
#[derive(Debug)]
pub(super) struct Round {
    /// Sorted durations, in milliseconds.
    times: Vec<f64>,
    elapsed: Duration,
}

impl Round {
    /// Requests a second.
    pub(super) fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        let count = self.times.len() as f64;
        count / self.elapsed.as_secs_f64()
    }

    /// Time within which so many hundredths of the answers were there, ms.
    pub(super) fn within(&self, hundredths: usize) -> f64 {
        let at = (self.times.len() * hundredths / 100).min(self.times.len() - 1);
        self.times[at]
    }
}

/// Asks for a page again and again, over this many connections at a time. Every answer must be the server's.
pub(super) async fn ask(
    address: SocketAddr,
    host: &str,
    connections: usize,
    length: Duration,
) -> Result<Round> {
    let request = format!("GET /state?x=1 HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n\r\n");
    let round = move || {
        runtime()?.block_on(async move {
            let begun = Instant::now();
            let mut clients = JoinSet::new();
            for _ in 0..connections {
                clients.spawn(client(address, request.clone(), begun + length));
            }
            let mut times = Vec::new();
            for client in clients.join_all().await {
                times.extend(client?);
            }
            let elapsed = begun.elapsed();
            ensure!(!times.is_empty(), "no request was answered");
            times.sort_by(f64::total_cmp);
            Ok(Round { times, elapsed })
        })
    };
    tokio::task::spawn_blocking(round).await?
}

async fn client(address: SocketAddr, request: String, end: Instant) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut times, mut read) = (Vec::new(), Vec::with_capacity(HEAD_MAX));
    while Instant::now() < end {
        let begun = Instant::now();
        read.clear();
        stream.write_all(request.as_bytes()).await?;
        let answered = async {
            // Whatever stands between has the body's length from the server.
            while !read.ends_with(BODY.as_bytes()) {
                let got = stream.read_buf(&mut read).await?;
                let is_served = read.len() < OK.len() || read.starts_with(OK);
                ensure!(
                    got > 0 && read.len() < HEAD_MAX && is_served,
                    "another answer: {:.300}",
                    String::from_utf8_lossy(&read)
                );
            }
            Ok(())
        };
        tokio::time::timeout(ANSWER, answered).await.context("no answer in time")??;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}
