//! `port-forward`: brings a port of a sandbox to this machine, or one of this machine into the sandbox.

mod notes;
mod reverse;
mod spec;
mod stream;

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use daemon::sync::Mutex;
use proto::{Reason, forward::ACCEPTED_WAITING_MAX, sandbox::v1::forward_open::Target};
use rustix::net::sockopt::set_socket_linger;
use serde_json::json;
use tokio::{
    fs::File,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};

use self::{
    notes::Notes,
    spec::{Remote, Spec, Word},
};
use super::targets::One;
use crate::{
    client::{Controller, fetch},
    failure::Failure,
    output::Output,
    signals::Stops,
};

/// Most connections at the same time, of all forwards: as many as a sandbox has streams.
const CONNECTIONS_MAX: usize = 128;
/// Pause after a connection that could not be accepted: this machine is out of descriptors.
const PAUSE: Duration = Duration::from_millis(200);
/// Size of a read of stdin, in bytes.
const CHUNK: usize = 64 * 1024;

/// Arguments of `port-forward`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl port-forward ID 8080               127.0.0.1:8080 here is 8080
                                                there
  sandboxctl port-forward ID 9000:80 :5432      two of them; the second on a
                                                free port
  sandboxctl port-forward ID 9000:/run/app.sock a unix socket in the sandbox
  sandboxctl port-forward ID 8080:80 --reverse  127.0.0.1:80 there is 8080 here
  sandboxctl port-forward ID - 22               stdin and stdout are the
                                                connection

The port need not be open to HTTP, and its server may listen on 127.0.0.1.
`sandboxctl port ls ID` shows what listens. Ends with Ctrl-C.")]
pub(crate) struct PortForward {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Port here and port in the sandbox; `-` first for stdin and stdout
    #[arg(required = true, value_name = "[LOCAL:]PORT", value_parser = spec::parse)]
    ports: Vec<Word>,
    /// Address of this machine to listen on, or with --reverse to connect to
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
    /// Listen in the sandbox, and connect to this machine
    #[arg(long)]
    reverse: bool,
}

/// State that all forwards share.
#[derive(Debug, Clone)]
struct Shared {
    controller: Controller,
    id: String,
    output: Output,
    places: Arc<Semaphore>,
    /// Places of connections from the sandbox that wait for one of `places`.
    waiting: Arc<Semaphore>,
    notes: Arc<Mutex<Notes>>,
    /// Failure that ends all of them.
    fatal: mpsc::Sender<Failure>,
}

pub(super) async fn run(
    controller: Controller,
    args: PortForward,
    output: Output,
) -> Result<u8, Failure> {
    let PortForward { sandbox: One { id }, ports, address, reverse } = args;
    if let [Word::Stdio, Word::Forward(Spec { remote, .. })] = ports.as_slice() {
        if reverse {
            let next = "leave one of the two out";
            return Err(Failure::usage("`-` cannot be forwarded in reverse", next));
        }
        return stdio(&controller, &id, remote.target()).await;
    }
    let specs: Option<Vec<Spec>> = ports.into_iter().map(Word::forward).collect();
    let specs = specs.ok_or_else(|| {
        let next = "write `sandboxctl port-forward ID - PORT`";
        Failure::usage("`-` must come first, with one port after it", next)
    })?;
    let mut stops = Stops::listen()?;
    // So that a wrong id is told now, and not at the first connection.
    fetch(&controller, id.clone()).await?;
    let (fatal, mut failed) = mpsc::channel(1);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let waiting = Arc::new(Semaphore::new(ACCEPTED_WAITING_MAX));
    let shared = Shared { controller, id, output, places, waiting, notes: Arc::default(), fatal };
    for spec in specs {
        if reverse {
            reverse::begin(&shared, spec, address).await?;
        } else {
            begin(&shared, spec, address).await?;
        }
    }
    tokio::select! {
        stop = stops.next() => Ok(stop.exit()),
        Some(failure) = failed.recv() => Err(failure),
    }
}

/// Carries one connection over stdin and stdout.
async fn stdio(controller: &Controller, id: &str, target: Target) -> Result<u8, Failure> {
    let connection = stream::open(controller, id, target).await?;
    let (sender, bytes) = mpsc::channel(1);
    // A thread of its own, which ends with us: a read of stdin cannot be cancelled.
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = match stdin.read(&mut chunk) {
                Ok(0) => return,
                Ok(length) => Ok(Bytes::copy_from_slice(&chunk[..length])),
                Err(error) => Err(error),
            };
            let broken = read.is_err();
            if sender.blocking_send(read).is_err() || broken {
                return;
            }
        }
    });
    // A file of tokio: a slow reader of ours must not delay the connection's pings.
    let stdout = std::io::stdout().as_fd().try_clone_to_owned()?;
    connection.carry(bytes, File::from_std(stdout.into())).await?;
    Ok(0)
}

/// Begins to listen on this machine.
async fn begin(shared: &Shared, spec: Spec, address: IpAddr) -> Result<(), Failure> {
    let listener = TcpListener::bind((address, spec.local)).await;
    let told = |error: std::io::Error| {
        let what = SocketAddr::new(address, spec.local);
        Failure::local(format!("cannot listen on {what}: {error}"))
            .hint("choose another local port, as in `9000:80`; `:80` takes a free one")
    };
    let listener = listener.map_err(told)?;
    let local = listener.local_addr().map_err(told)?;
    shared.tell(&local.to_string(), &format!("{}:{}", shared.id, spec.remote))?;
    let shared = shared.clone();
    tokio::spawn(async move {
        loop {
            let Ok(place) = Arc::clone(&shared.places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let (shared, remote) = (shared.clone(), spec.remote.clone());
                    tokio::spawn(async move { shared.serve(stream, from, &remote, place).await });
                }
                Err(error) => {
                    shared.output.note(format!("cannot accept a connection: {error}"));
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
    Ok(())
}

impl Shared {
    /// Prints a forward that is ready.
    fn tell(&self, from: &str, to: &str) -> Result<(), Failure> {
        if self.output.json {
            return self.output.value(&json!({ "from": from, "to": to }));
        }
        self.output.line(format!("Forwarding {from} -> {to}"))
    }

    async fn serve(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        remote: &Remote,
        place: OwnedSemaphorePermit,
    ) {
        let ended = match stream::open(&self.controller, &self.id, remote.target()).await {
            Ok(connection) => self.carry(connection, stream).await,
            Err(failure) => {
                abort(&stream);
                Err(failure)
            }
        };
        drop(place);
        if let Err(failure) = ended {
            self.complain(&format!("{from} -> {}:{remote}", self.id), failure);
        }
    }

    async fn carry(
        &self,
        connection: stream::Connection,
        stream: TcpStream,
    ) -> Result<(), Failure> {
        stream.set_nodelay(true).ok();
        let (read, write) = stream.into_split();
        let mut write = write;
        let carried = connection.carry(stream::pump(read), &mut write).await;
        if carried.is_err() {
            abort(write.as_ref());
            // Dropping it would tell an end first.
            write.forget();
        }
        carried
    }

    /// Prints one line about a connection that failed, unless there were many of them just before. A failure of the
    /// whole sandbox or of the token ends the program.
    fn complain(&self, what: &str, failure: Failure) {
        let whole = [
            Reason::SandboxNotFound,
            Reason::SandboxDeleted,
            Reason::TokenInvalid,
            Reason::ScopeMissing,
        ];
        if failure.known().is_some_and(|reason| whole.contains(&reason)) {
            // One failure is enough.
            self.fatal.try_send(failure).ok();
            return;
        }
        let Some(omitted) = self.notes.lock().admit(Instant::now()) else { return };
        if self.output.json {
            let value = json!({
                "connection": what,
                "reason": failure.reason,
                "message": failure.message,
                "omitted": omitted,
            });
            // A closed stdout ends nothing: the forwards go on.
            self.output.value(&value).ok();
            return;
        }
        self.output.note(format!("{what}: {}", failure.message));
        if omitted > 0 {
            self.output.note(format!("{omitted} more connections failed and were not shown"));
        }
    }
}

/// Lets the other end see a reset and not an end, which would look like success.
fn abort(stream: &TcpStream) {
    set_socket_linger(stream, Some(Duration::ZERO)).ok();
}
