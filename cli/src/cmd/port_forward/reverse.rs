//! Forwards in reverse: the sandbox listens, and this machine is connected to.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proto::{
    Reason,
    forward::ACCEPTED_WAIT,
    name::Port,
    sandbox::v1::{
        ForwardAccepted, ForwardListenRequest, ForwardListenResponse, forward_listen_response,
        forward_open::Target,
    },
};
use tokio::{
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout},
};
use tonic::Streaming;

use super::{
    Shared,
    spec::{Remote, Spec},
    stream,
};
use crate::{client::answer, failure::Failure};

/// Silence that counts as a broken connection: the controller sends a heartbeat every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// Longest absence of the node's agent: one that is upgraded is back within seconds.
const AWAY: Duration = Duration::from_secs(30);
/// Pause before the sandbox is asked again to listen.
const AGAIN: Duration = Duration::from_secs(1);

/// Begins to listen in the sandbox.
pub(super) async fn begin(shared: &Shared, spec: Spec, address: IpAddr) -> Result<(), Failure> {
    let Remote::Port(port) = spec.remote else {
        let next = "name a port of the sandbox, as in `8080:80`";
        return Err(Failure::usage("only ports can be forwarded in reverse", next));
    };
    if spec.local == 0 {
        let next = "write `LOCAL:PORT`, such as `8080:80`";
        return Err(Failure::usage("a forward in reverse needs a local port", next));
    }
    let local = SocketAddr::new(address, spec.local);
    let listening = listen(shared, port).await?;
    shared.tell(&format!("{}:{port}", shared.id), &local.to_string())?;
    let shared = shared.clone();
    tokio::spawn(async move {
        let failure = keep(&shared, listening, port, local).await;
        // One failure is enough.
        shared.fatal.try_send(failure).ok();
    });
    Ok(())
}

async fn listen(shared: &Shared, port: Port) -> Result<Streaming<ForwardListenResponse>, Failure> {
    let mut client = shared.controller.sandboxes.clone();
    let request = ForwardListenRequest { id: shared.id.clone(), port: port.into() };
    answer(client.forward_listen(request)).await
}

/// Takes connections, and listens again after a restart of the node's agent. Returns the failure that ends
/// it.
async fn keep(
    shared: &Shared,
    mut listening: Streaming<ForwardListenResponse>,
    port: Port,
    local: SocketAddr,
) -> Failure {
    loop {
        let mut failure = accept(shared, &mut listening, local).await;
        let lost = Instant::now();
        if passes(&failure) {
            let what = format!("{}:{port}", shared.id);
            shared.output.note(format!("{what}: {}; listening again ...", failure.message));
        }
        listening = loop {
            if !passes(&failure) || lost.elapsed() >= AWAY {
                return failure;
            }
            sleep(AGAIN).await;
            match listen(shared, port).await {
                Ok(again) => break again,
                Err(again) => failure = again,
            }
        };
    }
}

/// Returns true for what a restart of the node's agent looks like. A listener whose access is revoked ends otherwise.
fn passes(failure: &Failure) -> bool {
    failure.transient || failure.is_of_a_restart() || failure.known() == Some(Reason::ForwardLost)
}

async fn accept(
    shared: &Shared,
    listening: &mut Streaming<ForwardListenResponse>,
    local: SocketAddr,
) -> Failure {
    loop {
        let message = match timeout(SILENCE, listening.message()).await {
            Ok(Ok(Some(message))) => message.message,
            Ok(Ok(None)) => {
                let failure = Failure::local("the sandbox stopped listening");
                return Failure { transient: true, ..failure };
            }
            Ok(Err(status)) => return status.into(),
            Err(_) => return Failure::deadline("the controller sent nothing", SILENCE),
        };
        if let Some(forward_listen_response::Message::Accepted(accepted)) = message {
            // Root inside can tell of any number. The sandbox closes those that nobody takes.
            let Some(turn) = Turn::take(shared) else { continue };
            let shared = shared.clone();
            tokio::spawn(async move {
                let what = format!("{}: connection {}", shared.id, accepted.connection);
                if let Err(failure) = serve(&shared, accepted, local, turn).await {
                    shared.complain(&format!("{what} -> {local}"), failure);
                }
            });
        }
    }
}

/// Place of a connection, or one among those that wait for a place.
enum Turn {
    Now(OwnedSemaphorePermit),
    Waits(OwnedSemaphorePermit),
}

impl Turn {
    /// `None`: so many wait already.
    fn take(shared: &Shared) -> Option<Self> {
        let now = Arc::clone(&shared.places).try_acquire_owned().map(Self::Now);
        now.or_else(|_| Arc::clone(&shared.waiting).try_acquire_owned().map(Self::Waits)).ok()
    }

    /// Waits for the place. `None`: it took so long that the sandbox has closed the connection.
    async fn place(self, shared: &Shared) -> Option<OwnedSemaphorePermit> {
        let _waits = match self {
            Self::Now(place) => return Some(place),
            Self::Waits(waits) => waits,
        };
        timeout(ACCEPTED_WAIT, Arc::clone(&shared.places).acquire_owned()).await.ok()?.ok()
    }
}

async fn serve(
    shared: &Shared,
    accepted: ForwardAccepted,
    local: SocketAddr,
    turn: Turn,
) -> Result<(), Failure> {
    let Some(place) = turn.place(shared).await else { return Ok(()) };
    let target = Target::Accepted(accepted);
    let connection = stream::open(&shared.controller, &shared.id, target).await?;
    let stream = TcpStream::connect(local)
        .await
        .map_err(|error| Failure::local(format!("nothing here accepts connections: {error}")))?;
    let carried = shared.carry(connection, stream).await;
    drop(place);
    carried
}
