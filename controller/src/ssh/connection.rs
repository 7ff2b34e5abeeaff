//! One connection: its login, and the channels that its client opens. Answers russh; everything that takes
//! time is on tasks of its own, so that one channel does not wait for another.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use proto::{
    id::Invalid,
    sandbox::v1::{WindowSize, forward_open::Target},
};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, Disconnect, Pty, Sig,
    server::{self, Auth, ChannelOpenHandle, Handle, Msg, PublicKeyOffer, VerifiedPublicKey},
};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Shared,
    channels::{Channels, Place, WORN},
    command::{self, Ends, Program, Requested, signal_number},
    forward,
    inputs::{Input, InputSender, Inputs, inputs},
    login::{self, Login},
    protocol::{SMALL_WINDOW, WINDOW},
    record,
    reverse::Listeners,
    session::{LAST_WORDS, Session},
    transport::Gate,
};
use crate::sandbox::Result;

/// Most variables of a command.
const ENV_MAX: usize = 32;
/// Longest value of a variable, bytes. So many of them fit into what a command may have (32 KiB).
const VALUE_MAX: usize = 512;

/// Channel that a client has opened.
struct Open {
    to: InputSender,
    /// Dropped when nothing uses the channel any more.
    place: Weak<Place>,
    /// Parts of a session that nothing runs in yet.
    idle: Option<Idle>,
}

struct Idle {
    out: ChannelWriteHalf<Msg>,
    inputs: Inputs,
    requested: Requested,
    place: Arc<Place>,
}

/// One connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    gate: Arc<Gate>,
    /// Cancelled at the login.
    known: CancellationToken,
    closed: CancellationToken,
    /// Login that russh is told to accept.
    accepted: Option<Login>,
    session: Option<Arc<Session>>,
    channels: HashMap<ChannelId, Open>,
    /// Ends the tasks of the connection with it.
    _end: DropGuard,
    listeners: Listeners,
}

impl Connection {
    pub(super) fn new(
        shared: Arc<Shared>,
        peer: SocketAddr,
        (gate, known): (Arc<Gate>, CancellationToken),
    ) -> Self {
        let closed = CancellationToken::new();
        Self {
            shared,
            peer,
            gate,
            known,
            _end: closed.clone().drop_guard(),
            closed,
            accepted: None,
            session: None,
            channels: HashMap::new(),
            listeners: Listeners::default(),
        }
    }

    /// Takes a place for a channel, and makes its queue.
    fn admit(&mut self) -> Option<(Arc<Place>, InputSender, Inputs)> {
        // russh tells neither of a refused channel nor of one that we were the first to close.
        self.channels.retain(|_, open| open.place.strong_count() > 0);
        let place = self.session.as_ref()?.channels.take()?;
        let (to, inputs) = inputs(&self.gate);
        Some((Arc::new(place), to, inputs))
    }

    /// Ends the connection, also that of a client that does not read why.
    fn disconnect(
        &self,
        session: &mut server::Session,
        reason: Disconnect,
        why: &str,
    ) -> Result<(), russh::Error> {
        let (closed, gate) = (self.closed.clone(), self.gate.clone());
        tokio::spawn(async move {
            closed.run_until_cancelled(sleep(LAST_WORDS)).await;
            gate.shut();
        });
        session.disconnect(reason, why, "")
    }

    fn send(&self, channel: ChannelId, input: Input) {
        if let Some(open) = self.channels.get(&channel) {
            open.to.send(input);
        }
    }

    /// Starts a program in a session that runs nothing yet.
    fn run(
        &mut self,
        channel: ChannelId,
        program: Program,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let idle = self.channels.get_mut(&channel).and_then(|open| open.idle.take());
        let (Some(idle), Some(own)) = (idle, self.session.clone()) else {
            return session.channel_failure(channel);
        };
        let Idle { out, inputs, requested, place } = idle;
        let ends = Ends { out, handle: session.handle(), inputs };
        session.channel_success(channel)?;
        tokio::spawn(async move {
            Box::pin(command::run(own, program, requested, ends)).await;
            drop(place);
        });
        Ok(())
    }

    async fn forward(
        &mut self,
        channel: Channel<Msg>,
        target: impl FnOnce(&Session) -> Result<Target, Invalid>,
        reply: ChannelOpenHandle,
    ) {
        let (Some((place, to, inputs)), Some(own)) = (self.admit(), self.session.clone()) else {
            return reply.reject(ChannelOpenFailure::ResourceShortage).await;
        };
        let id = channel.id();
        // Its receiving half is not used: what arrives comes to `data`.
        let (_, out) = channel.split();
        self.channels.insert(id, Open { to, place: Arc::downgrade(&place), idle: None });
        let target = target(&own);
        tokio::spawn(async move {
            Box::pin(forward::run(own, target, (out, inputs), reply)).await;
            drop(place);
        });
    }

    /// Ends the connection when the key of its client ends, the controller stops, or it takes no other channels and
    /// none is open.
    fn watch(own: Arc<Session>, handle: Handle) {
        tokio::spawn(async move {
            let ends = async {
                tokio::select! {
                    () = own.ended() => match own.shared.stop.is_cancelled() {
                        true => "the controller is stopping; connect again",
                        false => "this SSH key was removed or has expired",
                    },
                    () = own.channels.worn_out() => WORN,
                }
            };
            let Some(why) = own.until_closed(ends).await else { return };
            own.part(&handle, Disconnect::ByApplication, why).await;
        });
    }
}

impl server::Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        _: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        // The name is judged after the signature: whoever has only the public key learns nothing about it.
        if login::is_known(&self.shared, offer.public_key).await {
            return Ok(Auth::Accept);
        }
        self.shared.audit.count_refused();
        Ok(Auth::reject())
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, Self::Error> {
        self.accepted = login::look_up(&self.shared, user, key.public_key).await;
        if self.accepted.is_some() {
            return Ok(Auth::Accept);
        }
        self.shared.audit.count_refused();
        Ok(Auth::reject())
    }

    async fn auth_succeeded(&mut self, session: &mut server::Session) -> Result<(), Self::Error> {
        let Some(login) = self.accepted.take() else { return Err(russh::Error::Inconsistent) };
        let Some(counted) = self.shared.capacity.take(&login.caller.team) else {
            let why = "too many SSH connections are open; try again when some have ended";
            self.shared.audit.count_refused();
            // Until its end it counts as one that is not logged in.
            return self.disconnect(session, Disconnect::TooManyConnections, why);
        };
        self.known.cancel();
        self.shared.access.note_use(&login.token);
        record::login(&self.shared, &login, self.peer);
        let open = self.shared.access.begin_call(&login.token);
        let own = Arc::new(Session {
            shared: self.shared.clone(),
            login,
            peer: self.peer,
            closed: self.closed.clone(),
            gate: self.gate.clone(),
            channels: Channels::default(),
            _counted: counted,
            open,
        });
        Self::watch(own.clone(), session.handle());
        self.session = Some(own);
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        let (Some((place, to, inputs)), Some(own)) = (self.admit(), self.session.clone()) else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let id = channel.id();
        // Its receiving half is not used: what arrives comes to `data`.
        let (_, out) = channel.split();
        let weak = Arc::downgrade(&place);
        let idle = Some(Idle { out, inputs, requested: Requested::default(), place });
        self.channels.insert(id, Open { to, place: weak, idle });
        own.channels.keep();
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.forward(channel, |own| forward::tcp(own, host, port), reply).await;
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.forward(channel, |_| forward::unix(path), reply).await;
        Ok(())
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        _: u32,
        _: u32,
        _: &[(Pty, u32)],
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        let idle = self.channels.get_mut(&channel).and_then(|open| open.idle.as_mut());
        let Some(Idle { requested, .. }) = idle else { return session.channel_failure(channel) };
        requested.window = Some(window(columns, rows));
        if is_value(term) && !term.is_empty() {
            requested.env.insert("TERM".to_owned(), term.to_owned());
        }
        session.channel_success(channel)
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        let idle = self.channels.get_mut(&channel).and_then(|open| open.idle.as_mut());
        match idle {
            Some(Idle { requested, .. })
                if is_passed_on(name) && is_value(value) && requested.env.len() < ENV_MAX =>
            {
                requested.env.insert(name.to_owned(), value.to_owned());
                session.channel_success(channel)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.run(channel, Program::Shell, session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        line: &[u8],
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.run(channel, Program::Line(line.to_owned()), session)
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        match name {
            "sftp" => self.run(channel, Program::Sftp, session),
            _ => session.channel_failure(channel),
        }
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(channel)
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        columns: u32,
        rows: u32,
        _: u32,
        _: u32,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.send(channel, Input::Resize(window(columns, rows)));
        Ok(())
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        // One from before the command is for nobody: it would end the command at its start.
        let runs = self.channels.get(&channel).is_some_and(|open| open.idle.is_none());
        if let Some(number) = signal_number(&signal).filter(|_| runs) {
            self.send(channel, Input::Signal(number));
        }
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        bytes: &[u8],
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        if !bytes.is_empty() {
            self.send(channel, Input::Data(Bytes::copy_from_slice(bytes)));
        }
        Ok(())
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.send(channel, Input::Eof);
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.channels.remove(&channel);
        if let Some(own) = &self.session {
            own.channels.forget();
        }
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        session: &mut server::Session,
    ) -> Result<bool, Self::Error> {
        let Some(own) = &self.session else { return Ok(false) };
        let listens = self.listeners.add(own, session.handle(), (address, *port)).await;
        *port = listens.map_or(0, u32::from);
        Ok(listens.is_some())
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _: &mut server::Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.listeners.remove(address, port))
    }

    async fn channel_open_confirmation(
        &mut self,
        channel: ChannelId,
        _: u32,
        _: u32,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        let (to, inputs) = inputs(&self.gate);
        let own = self.session.as_ref().filter(|_| !self.channels.contains_key(&channel));
        let place = own.and_then(|own| own.channels.confirm(channel, inputs));
        // The client answers what it was not asked.
        let Some(place) = place else { return Err(russh::Error::Inconsistent) };
        self.channels.insert(channel, Open { to, place, idle: None });
        Ok(())
    }

    fn adjust_window(&mut self, _: ChannelId, _: u32) -> u32 {
        if self.gate.is_crowded() { SMALL_WINDOW } else { WINDOW }
    }
}

/// Returns the size of a terminal within what a command may have.
fn window(columns: u32, rows: u32) -> WindowSize {
    // A client without a size says 0.
    let size = |asked: u32, default: u32| if asked == 0 { default } else { asked.min(1000) };
    WindowSize { rows: size(rows, 24), cols: size(columns, 80) }
}

/// Returns true for variables that a client may set.
fn is_passed_on(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_uppercase() || byte == b'_';
    matches!(name, "LANG" | "TERM" | "COLORTERM")
        || (name.starts_with("LC_") && name.len() <= 32 && name.bytes().all(plain))
}

fn is_value(value: &str) -> bool {
    value.len() <= VALUE_MAX && !value.contains('\0')
}
