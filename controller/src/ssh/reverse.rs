//! Forwards in reverse (`ssh -R`): the sandbox listens on a port of its loopback, and each connection of a program
//! inside becomes a channel that the client opens.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::StreamExt;
use proto::{
    Reason,
    forward::{ACCEPTED_WAIT, ACCEPTED_WAITING_MAX},
    id::Invalid,
    name::Port,
    sandbox::v1::{
        ForwardAccepted, ForwardListenRequest, forward_listen_response, forward_open::Target,
    },
};
use russh::server::Handle;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{forward, record::Action, session::Session};
use crate::{
    rpc::Permit,
    sandbox::{Accepted, Error, Result},
};

/// Most listeners of a connection.
const LISTENERS_MAX: usize = 16;
/// Longest address to listen on, bytes: clients name it, and are told it with each connection.
const ADDRESS_MAX: usize = 255;
/// Longest time until the sandbox listens. At first the client's connection stands still meanwhile: SSH answers
/// requests in their order.
const LISTEN: Duration = Duration::from_secs(10);
/// First port that is given to a client that leaves the choice to us: those of IANA for private use.
const PORTS_FROM: u16 = 49_152;
/// Ports that are tried then, as programs inside have some of them.
const TRIES: usize = 8;
/// Longest absence of the node's agent: one that is upgraded is back within seconds.
const AWAY: Duration = Duration::from_secs(30);
/// Pause before the sandbox is asked again to listen.
const AGAIN: Duration = Duration::from_secs(1);
/// Time in which a node learns that a listener has ended.
const FREED: Duration = Duration::from_secs(2);
/// Pause before a port is tried again that the client has just given up.
const FREED_AGAIN: Duration = Duration::from_millis(100);
/// Longest wait for the client to open a channel: it may have to connect to another host first.
const OPEN: Duration = Duration::from_secs(60);

/// Listeners of a connection.
#[derive(Default)]
pub(super) struct Listeners {
    by_port: BTreeMap<u16, Listener>,
    /// Ports of listeners that the client has just ended: the node may have them for a moment more.
    freed: BTreeMap<u16, Instant>,
}

/// Listener in the sandbox.
struct Listener {
    /// Address as the client has named it. It is always 127.0.0.1 in truth.
    address: String,
    /// Dropped when it has ended.
    lives: Weak<()>,
    _end: DropGuard,
}

/// Port that the sandbox listens on, and its connections.
struct Listening {
    port: Port,
    accepted: Accepted,
}

impl Listeners {
    /// Listens in the sandbox. Returns the port; `None` when it is refused.
    pub(super) async fn add(
        &mut self,
        session: &Arc<Session>,
        handle: Handle,
        (address, port): (&str, u32),
    ) -> Option<u16> {
        self.by_port.retain(|_, listener| listener.lives.strong_count() > 0);
        self.freed.retain(|_, freed| freed.elapsed() < FREED);
        let permit = match self.admit(session, address) {
            Ok(permit) => permit,
            Err(error) => {
                session.refuse(Action::Listen, &error);
                return None;
            }
        };
        let entry = session.begin(Action::Listen);
        let freed = u16::try_from(port).ok().and_then(|port| self.freed.get(&port).copied());
        let listening = tokio::select! {
            listening = in_time(listen(session, port, freed)) => Some(listening),
            () = session.ended() => None,
        };
        let listening = match listening {
            Some(Ok(listening)) => listening,
            Some(Err(error)) => {
                tracing::debug!(%error, "remote forward refused");
                entry.end(session.shared(), Some(Err(&error)));
                return None;
            }
            None => {
                entry.end(session.shared(), None);
                return None;
            }
        };
        let port = listening.port.get();
        let (end, life) = (CancellationToken::new(), Arc::new(()));
        let listener = Listener {
            address: address.to_owned(),
            lives: Arc::downgrade(&life),
            _end: end.clone().drop_guard(),
        };
        self.by_port.insert(port, listener);
        let (session, address) = (session.clone(), Arc::from(address));
        tokio::spawn(async move {
            let kept = Box::pin(keep(&session, &handle, address, listening));
            let failed = session.until_closed(end.run_until_cancelled(kept)).await.flatten();
            let how = failed.as_ref().map(Err);
            entry.end(session.shared(), how.or_else(|| end.is_cancelled().then_some(Ok(()))));
            drop((permit, life));
        });
        Some(port)
    }

    /// Ends a listener; its connections go on. Returns false when there is none.
    pub(super) fn remove(&mut self, address: &str, port: u32) -> bool {
        let port = u16::try_from(port).unwrap_or_default();
        let listener = self.by_port.get(&port).filter(|listener| listener.address == address);
        let Some(lives) = listener.map(|listener| listener.lives.strong_count() > 0) else {
            return false;
        };
        self.by_port.remove(&port);
        self.freed.retain(|_, freed| freed.elapsed() < FREED);
        self.freed.insert(port, Instant::now());
        lives
    }

    fn admit(&self, session: &Session, address: &str) -> Result<Permit> {
        if address.len() > ADDRESS_MAX {
            return Err(Invalid::new("address", "must be at most 255 bytes").into());
        }
        if self.by_port.len() >= LISTENERS_MAX {
            let message = "the SSH connection has too many remote forwards";
            return Err(Error::new(Reason::TooManyCalls, message));
        }
        session.enter()
    }
}

/// Waits until the sandbox listens, for as long as that may take.
async fn in_time(listening: impl Future<Output = Result<Listening>>) -> Result<Listening> {
    let late = || Error::new(Reason::OutcomeUnknown, "the sandbox did not listen in time");
    timeout(LISTEN, listening).await.unwrap_or_else(|_| Err(late()))
}

/// Begins to listen on a port; 0 leaves the choice to us. `freed`: when the client has ended a listener there.
async fn listen(session: &Session, port: u32, freed: Option<Instant>) -> Result<Listening> {
    session.wake().await?;
    if port != 0 {
        let port = Port::try_from(port)?;
        loop {
            let listening = listen_on(session, port).await;
            let refused =
                listening.as_ref().is_err_and(|error| error.reason == Reason::ForwardRefused);
            if !refused || freed.is_none_or(|freed| freed.elapsed() >= FREED) {
                return listening;
            }
            sleep(FREED_AGAIN).await;
        }
    }
    let mut tries = 1;
    loop {
        match listen_on(session, any_port()?).await {
            Err(error) if error.reason == Reason::ForwardRefused && tries < TRIES => tries += 1,
            other => return other,
        }
    }
}

async fn listen_on(session: &Session, port: Port) -> Result<Listening> {
    let request = ForwardListenRequest { id: session.sandbox(), port: port.into() };
    let mut accepted = session.shared().sandboxes.forward_listen(session.team(), &request).await?;
    // Before this message nothing is known to listen.
    while let Some(message) = accepted.next().await {
        if let Some(forward_listen_response::Message::Listening(_)) = message?.message {
            return Ok(Listening { port, accepted });
        }
    }
    Err(Error::new(Reason::ForwardLost, "the sandbox stopped listening"))
}

fn any_port() -> Result<Port, Invalid> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    let port = PORTS_FROM | u16::from_le_bytes(bytes);
    Port::try_from(u32::from(port))
}

/// Takes connections, and listens again after a restart of the node's agent. Returns the failure that ends it.
async fn keep(
    session: &Arc<Session>,
    handle: &Handle,
    address: Arc<str>,
    Listening { port, mut accepted }: Listening,
) -> Error {
    let waiting = Arc::new(Semaphore::new(ACCEPTED_WAITING_MAX));
    loop {
        let at = (&address, port);
        let mut error = accept(session, handle, at, &mut accepted, &waiting).await;
        // Nothing else ends a listener so: the access to its port was revoked or hidden.
        if error.reason == Reason::ForwardRefused {
            return error;
        }
        let mut lost = Instant::now();
        accepted = loop {
            // The outcome is not known, or the port is taken, when the node has not noticed the end of a listener of
            // ours. To ask again does no harm: a port has one listener.
            let passes = matches!(
                error.reason,
                Reason::ForwardLost
                    | Reason::NodeUnreachable
                    | Reason::ShuttingDown
                    | Reason::OutcomeUnknown
                    | Reason::ForwardRefused
            );
            if !passes || lost.elapsed() >= AWAY {
                return error;
            }
            sleep(AGAIN).await;
            match session.is_at_rest() {
                // Nothing in it connects. It is not woken for that.
                Ok(true) => lost = Instant::now(),
                Ok(false) => match in_time(listen_on(session, port)).await {
                    Ok(again) => break again.accepted,
                    Err(again) => error = again,
                },
                Err(gone) => return gone,
            }
        };
    }
}

async fn accept(
    session: &Arc<Session>,
    handle: &Handle,
    (address, port): (&Arc<str>, Port),
    accepted: &mut Accepted,
    waiting: &Arc<Semaphore>,
) -> Error {
    while let Some(message) = accepted.next().await {
        match message.map(|message| message.message) {
            Ok(Some(forward_listen_response::Message::Accepted(accepted))) => {
                // The sandbox closes one that nobody takes.
                let Ok(waits) = waiting.clone().try_acquire_owned() else { continue };
                let (session, handle, address) = (session.clone(), handle.clone(), address.clone());
                tokio::spawn(async move {
                    Box::pin(serve(&session, handle, (address, port), accepted, waits)).await;
                });
            }
            Ok(_) => {}
            Err(error) => return error,
        }
    }
    Error::new(Reason::ForwardLost, "the sandbox stopped listening")
}

/// Carries one connection of a program inside. One that is not taken is closed by the sandbox after a while.
async fn serve(
    session: &Arc<Session>,
    handle: Handle,
    (address, port): (Arc<str>, Port),
    accepted: ForwardAccepted,
    waits: OwnedSemaphorePermit,
) {
    let place = session.until_closed(timeout(ACCEPTED_WAIT, session.channels.wait())).await;
    let Some(Ok(Some(place))) = place else { return };
    drop(waits);
    let permit = match session.enter() {
        Ok(permit) => permit,
        Err(error) => return session.refuse(Action::Forward, &error),
    };
    let entry = session.begin(Action::Forward);
    let connected = forward::connect(session, Target::Accepted(accepted));
    let connection = match session.until_closed(connected).await {
        Some(Ok(connection)) => connection,
        failed => {
            let error = failed.and_then(Result::err);
            return entry.end(session.shared(), error.as_ref().map(Err));
        }
    };
    session.channels.ask(place);
    // Who has connected inside has no address that would tell anything.
    let open = handle.channel_open_forwarded_tcpip(&*address, port.into(), "127.0.0.1", 0);
    // To be polled until there is an answer: russh ends the connection over one that nobody takes.
    let mut open = std::pin::pin!(open);
    let opened = match session.until_closed(timeout(OPEN, open.as_mut())).await {
        Some(Ok(opened)) => opened,
        Some(Err(_)) => {
            // The program inside waits no longer; the place stays taken.
            let error = Error::new(Reason::NotListening, "the client did not answer in time");
            entry.end(session.shared(), Some(Err(&error)));
            drop((connection, permit));
            return abandon(session, open).await;
        }
        None => return entry.end(session.shared(), None),
    };
    let Ok(channel) = opened else {
        session.channels.refused();
        let error = Error::new(Reason::NotListening, "the client has refused the connection");
        return entry.end(session.shared(), Some(Err(&error)));
    };
    let id = channel.id();
    // Its receiving half is not used: what arrives comes to `data` of the connection.
    let (_, out) = channel.split();
    let Some(confirmed) = session.until_closed(session.channels.claim(id)).await else {
        return entry.end(session.shared(), None);
    };
    let gone = confirmed.inputs.gone();
    let carried = forward::carry(connection, &out, confirmed.inputs);
    let carried = session.until_closed(carried).await;
    entry.end(session.shared(), carried.as_ref().and_then(forward::Carried::audit));
    drop(permit);
    forward::close(session, &out, gone, carried).await;
    drop(confirmed.place);
}

/// Closes a channel that the client opens too late.
async fn abandon(
    session: &Session,
    open: impl Future<Output = Result<russh::Channel<russh::server::Msg>, russh::Error>>,
) {
    match session.until_closed(open).await {
        Some(Ok(channel)) => {
            let id = channel.id();
            let (_, out) = channel.split();
            let closed = async {
                let confirmed = session.channels.claim(id).await;
                drop(out.close().await);
                drop(confirmed);
            };
            session.until_closed(closed).await;
        }
        Some(Err(_)) => session.channels.refused(),
        None => {}
    }
}
