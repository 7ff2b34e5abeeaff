//! Byte streams between the shim and a server in the sandbox, each in a process of its own: it connects
//! inside the sandbox's network, and passes bytes until both directions have ended. Also listens for
//! programs inside that connect outwards.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{self, UnixListener, UnixStream},
    },
    time::Duration,
};

use helper::{ForwardTask, Refusal};
use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::dup2_stdout,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
        socket_with,
        sockopt::{set_socket_linger, socket_peercred},
    },
};

use crate::{
    buffer::{Buffer, Done},
    sys,
};

/// Longest wait for one address to accept a connection.
const CONNECT: Duration = Duration::from_millis(CONNECT_MS);
const CONNECT_MS: u64 = 3000;
/// Pause before a unix socket whose queue is full is tried again.
const PAUSE: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// Bytes that each direction buffers.
const CHUNK: usize = 64 * 1024;
/// Most connections to a listener that nobody has taken yet.
const PENDING_MAX: usize = 64;
/// Time after which a connection that nobody takes is closed, in milliseconds.
const PENDING_MS: u64 = 30_000;
/// Interval between looks for such connections.
const LOOK: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
/// Longest wait for the other end when a connection changes its process.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// Signs of a socket that is closed in both directions.
const CLOSED: PollFlags = PollFlags::ERR.union(PollFlags::HUP);
/// Exit code of a forward that a server has broken off.
const RESET: u8 = 1;

/// Open end of a forward inside the sandbox.
#[derive(Debug)]
pub(crate) enum Opened {
    /// Connection with a server.
    Stream(OwnedFd),
    /// Listener, and the socket where its connections are taken.
    Listener(TcpListener, UnixListener),
}

/// Connects or listens.
pub(crate) fn open(task: &ForwardTask) -> Result<Opened, Refusal> {
    match task {
        ForwardTask::Tcp(addresses) => connect_tcp(addresses).map(Opened::Stream),
        ForwardTask::Unix(path) => connect_unix(path).map(Opened::Stream),
        ForwardTask::Listen { port, name } => listen(*port, name),
        ForwardTask::Accepted { name, connection } => {
            collect(name, *connection).map(Opened::Stream).ok_or(Refusal::NoConnection)
        }
    }
}

/// Serves it until its end. Returns the exit code.
pub(crate) fn run(opened: Opened) -> u8 {
    // A peer that reads no more is an error of the write, and not the end of this process.
    let mut pipes = SigSet::empty();
    pipes.add(Signal::SIGPIPE);
    if sigprocmask(SigmaskHow::SIG_BLOCK, Some(&pipes), None).is_err() {
        return RESET;
    }
    let served = match opened {
        Opened::Stream(socket) => pass(&socket),
        Opened::Listener(listener, takers) => accept(&listener, &takers),
    };
    served.unwrap_or(RESET)
}

/// Connects to the first address that accepts.
fn connect_tcp(addresses: &[SocketAddr]) -> Result<OwnedFd, Refusal> {
    let found = addresses.iter().find_map(|to| TcpStream::connect_timeout(to, CONNECT).ok());
    let stream = found.ok_or(Refusal::NotListening)?;
    // Keystrokes must not wait for each other.
    drop(stream.set_nodelay(true));
    Ok(stream.into())
}

fn connect_unix(path: &str) -> Result<OwnedFd, Refusal> {
    let address = SocketAddrUnix::new(path).map_err(|_| Refusal::NotConnected)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|_| Refusal::NoProcess)?;
    let until = helper::up_ms() + CONNECT_MS;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The queue of its listener is full.
            Err(Errno::AGAIN | Errno::INTR) if helper::up_ms() < until => {
                // A pause that a signal cuts short is long enough.
                poll(&mut [], Some(&PAUSE)).ok();
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNREFUSED | Errno::NOENT) => {
                return Err(Refusal::NotListening);
            }
            Err(_) => return Err(Refusal::NotConnected),
        }
    }
}

fn listen(port: u16, name: &str) -> Result<Opened, Refusal> {
    let refused = |error: io::Error| {
        let taken = error.kind() == io::ErrorKind::AddrInUse;
        if taken { Refusal::PortTaken } else { Refusal::NotConnected }
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(refused)?;
    let takers = takers(name).and_then(|address| UnixListener::bind_addr(&address));
    let takers = takers.map_err(refused)?;
    let ready = listener.set_nonblocking(true).and_then(|()| takers.set_nonblocking(true));
    ready.map_err(refused)?;
    Ok(Opened::Listener(listener, takers))
}

/// Address where the connections of a listener are taken: a name in the sandbox's network namespace.
fn takers(name: &str) -> io::Result<net::SocketAddr> {
    net::SocketAddr::from_abstract_name(format!("pve-sandbox-forward-{name}"))
}

/// Takes a connection from the process that listens.
fn collect(name: &str, connection: u64) -> Option<OwnedFd> {
    let mut from = takers(name).and_then(|address| UnixStream::connect_addr(&address)).ok()?;
    from.set_read_timeout(Some(HANDSHAKE)).ok()?;
    from.write_all(&connection.to_le_bytes()).ok()?;
    sys::receive_fd(&from.into())
}

/// Connections that nobody has taken yet, in the order in which they came.
#[derive(Debug, Default)]
struct Pending {
    last: u64,
    /// Number of each, and when it came, in milliseconds of `helper::up_ms`.
    waiting: VecDeque<(u64, TcpStream, u64)>,
}

impl Pending {
    fn add(&mut self, stream: TcpStream) -> u64 {
        self.last += 1;
        self.waiting.push_back((self.last, stream, helper::up_ms()));
        self.last
    }

    fn take(&mut self, connection: u64) -> Option<TcpStream> {
        let place = self.waiting.iter().position(|(number, ..)| *number == connection)?;
        self.waiting.remove(place).map(|(_, stream, _)| stream)
    }

    fn drop_old(&mut self) {
        while self.waiting.front().is_some_and(|(.., since)| since + PENDING_MS <= helper::up_ms())
        {
            self.waiting.pop_front();
        }
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= PENDING_MAX
    }
}

/// Accepts connections, writes the number of each to stdout, and hands them over to the processes that
/// ask for them, until the shim no longer reads.
fn accept(listener: &TcpListener, takers: &UnixListener) -> io::Result<u8> {
    let (stdout, stderr) = (io::stdout(), io::stderr());
    rustix::io::ioctl_fionbio(&stdout, true)?;
    let mut pending = Pending::default();
    loop {
        pending.drop_old();
        let wants = if pending.is_full() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = [
            PollFd::new(&stderr, PollFlags::empty()),
            PollFd::new(takers, PollFlags::IN),
            PollFd::new(listener, wants),
        ];
        let look = (!pending.waiting.is_empty()).then_some(&LOOK);
        match poll(&mut fds, look) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [gone, taken, came] = fds.map(|fd| !fd.revents().is_empty());
        if gone {
            return Ok(0);
        }
        if taken && let Ok((taker, _)) = takers.accept() {
            give_to(taker, &mut pending);
        }
        if came && let Ok((stream, _)) = listener.accept() {
            let number = pending.add(stream);
            // So few bytes are written as a whole or not at all. Without a reader nobody takes it.
            if rustix::io::write(&stdout, &number.to_le_bytes()).is_err() {
                drop(pending.take(number));
            }
        }
    }
}

/// Hands a connection over to a process of the same user that names it.
fn give_to(mut taker: UnixStream, pending: &mut Pending) {
    let own = socket_peercred(&taker).is_ok_and(|peer| peer.uid == rustix::process::getuid());
    let mut number = [0; 8];
    let asked = own
        && taker.set_nonblocking(false).is_ok()
        && taker.set_read_timeout(Some(HANDSHAKE)).is_ok()
        && taker.read_exact(&mut number).is_ok();
    if asked && let Some(stream) = pending.take(u64::from_le_bytes(number)) {
        // Whoever has gone does not get it, and nobody else does.
        sys::send_fd(&taker.into(), stream.as_fd()).ok();
    }
}

/// One direction of a stream.
#[derive(Debug)]
struct Flow {
    buffer: Buffer,
    /// False once the source has ended.
    reads: bool,
    /// True once its end was passed on.
    over: bool,
}

impl Flow {
    fn new() -> Self {
        Self { buffer: Buffer::new(CHUNK), reads: true, over: false }
    }

    fn wants_input(&self) -> bool {
        self.reads && !self.over && self.buffer.is_empty()
    }

    /// True when all was passed on, and the end was not.
    fn is_to_be_closed(&self) -> bool {
        !self.reads && !self.over && self.buffer.is_empty()
    }
}

/// Descriptor that is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Stdin,
    Socket,
    Stdout,
    Stderr,
}

/// Ends of a stream: the socket, and the pipes from and to the shim.
#[derive(Debug)]
struct Ends<'a> {
    socket: &'a OwnedFd,
    stdin: OwnedFd,
    /// `None` once the server's direction has ended.
    stdout: Option<OwnedFd>,
    /// Never written to: that the shim has closed it says that the shim has gone.
    stderr: OwnedFd,
}

/// Passes bytes between stdin, stdout and a socket until both directions have ended, or the shim has
/// gone. Returns the exit code.
fn pass(socket: &OwnedFd) -> io::Result<u8> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let ends = Ends {
        socket,
        stdin: stdin.as_fd().try_clone_to_owned()?,
        stdout: Some(stdout.as_fd().try_clone_to_owned()?),
        stderr: stderr.as_fd().try_clone_to_owned()?,
    };
    // So that dropping the copy closes the pipe.
    dup2_stdout(&ends.stderr)?;
    for fd in [socket, &ends.stdin].into_iter().chain(&ends.stdout) {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    relay(ends)
}

fn relay(mut ends: Ends<'_>) -> io::Result<u8> {
    let (mut up, mut down, mut code) = (Flow::new(), Flow::new(), 0);
    while !(up.over && down.over) {
        for (what, seen) in wait(&ends, &up, &down)? {
            match what {
                // The shim has gone.
                Look::Stderr => {
                    abandon(ends.socket, &up);
                    return Ok(code);
                }
                Look::Stdin => up.reads = !matches!(up.buffer.fill(&ends.stdin), Done::End),
                Look::Stdout => {
                    let gone = ends.stdout.as_ref().map(|out| down.buffer.drain(out));
                    if matches!(gone, Some(Done::End)) {
                        abandon(ends.socket, &up);
                        return Ok(code);
                    }
                }
                // The server has closed both directions; bytes that it did not take are a break.
                Look::Socket if down.over && seen.intersects(CLOSED) => {
                    let broken = seen.contains(PollFlags::ERR) || !up.buffer.is_empty();
                    return Ok(if broken { RESET } else { code });
                }
                Look::Socket => {
                    if !up.buffer.is_empty() && matches!(up.buffer.drain(ends.socket), Done::End) {
                        // The server reads no more; what it has written is still passed on.
                        (up.over, code) = (true, RESET);
                    }
                    if down.wants_input() {
                        down.reads = match down.buffer.fill_or_fail(ends.socket) {
                            Ok(done) => !matches!(done, Done::End),
                            Err(_) => return Ok(RESET),
                        };
                    }
                }
            }
        }
        if up.is_to_be_closed() {
            // Fails where the server has closed already.
            shutdown(ends.socket, Shutdown::Write).ok();
            up.over = true;
        }
        if down.is_to_be_closed() {
            ends.stdout = None;
            down.over = true;
        }
    }
    Ok(code)
}

/// Lets the server see a reset and not an end, which would look like the whole of the caller's half, unless that
/// has ended. A unix socket knows no reset.
fn abandon(socket: &OwnedFd, up: &Flow) {
    if !up.over {
        set_socket_linger(socket, Some(Duration::ZERO)).ok();
    }
}

/// Waits for descriptors with room or work: an end of file is reported again and again.
fn wait(ends: &Ends<'_>, up: &Flow, down: &Flow) -> io::Result<Vec<(Look, PollFlags)>> {
    let mut looks: Vec<(Look, PollFd<'_>)> = Vec::with_capacity(4);
    let mut look = |what, fd, flags| looks.push((what, PollFd::new(fd, flags)));
    look(Look::Stderr, &ends.stderr, PollFlags::empty());
    if up.wants_input() {
        look(Look::Stdin, &ends.stdin, PollFlags::IN);
    }
    let mut of_socket = PollFlags::empty();
    of_socket.set(PollFlags::IN, down.wants_input());
    of_socket.set(PollFlags::OUT, !up.over && !up.buffer.is_empty());
    // What is always told ends the stream then, and so is not told again and again.
    if !of_socket.is_empty() || down.over {
        look(Look::Socket, ends.socket, of_socket);
    }
    if let Some(stdout) = ends.stdout.as_ref().filter(|_| !down.buffer.is_empty()) {
        look(Look::Stdout, stdout, PollFlags::OUT);
    }
    let (what, mut fds): (Vec<_>, Vec<_>) = looks.into_iter().unzip();
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let seen = what.into_iter().zip(fds.iter().map(PollFd::revents));
    Ok(seen.filter(|(_, seen)| !seen.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_taken_once_and_not_kept_for_ever() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let stream = || TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
        let mut pending = Pending::default();
        let numbers = [pending.add(stream()), pending.add(stream())];
        assert_eq!(numbers, [1, 2]);
        assert!(
            pending.take(2).is_some() && pending.take(2).is_none() && pending.take(3).is_none()
        );
        pending.drop_old();
        assert_eq!(pending.waiting.len(), 1, "it may still be taken");
        pending.waiting[0].2 -= PENDING_MS;
        pending.drop_old();
        assert!(pending.take(1).is_none());
    }

    #[test]
    fn refusals_tell_a_missing_server_from_one_that_cannot_be_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
        let refused = |path: &str| connect_unix(path).map(drop).expect_err("no server");
        assert_eq!(refused(&path("none")), Refusal::NotListening);
        std::fs::write(path("file"), "").expect("written");
        assert_eq!(refused(&path("file")), Refusal::NotListening);
        let datagrams = net::UnixDatagram::bind(path("datagrams")).expect("bound");
        assert_eq!(refused(&path("datagrams")), Refusal::NotConnected);
        drop(datagrams);
        let listener = UnixListener::bind(path("server")).expect("bound");
        connect_unix(&path("server")).expect("connected");
        drop(listener);
        assert_eq!(refused(&path("server")), Refusal::NotListening);
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let address = taken.local_addr().expect("bound");
        assert_eq!(listen(address.port(), "a").map(drop), Err(Refusal::PortTaken));
        let nobody = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port()));
        connect_tcp(&[nobody, address]).expect("the second address answers");
        assert_eq!(connect_tcp(&[nobody]).map(drop), Err(Refusal::NotListening));
    }

    #[test]
    fn both_halves_of_a_stream_end_apart() {
        let pair = || UnixStream::pair().expect("a pair");
        let pipe = || {
            let (read, write) = nix::unistd::pipe().expect("a pipe");
            (std::fs::File::from(read), std::fs::File::from(write))
        };
        let (socket, mut server) = pair();
        let ((stdin, mut feed), (mut out, stdout), (_err, stderr)) = (pipe(), pipe(), pipe());
        let served = std::thread::spawn(move || {
            let socket = OwnedFd::from(socket);
            let ends = [OwnedFd::from(stdin), stdout.into(), stderr.into()];
            let [stdin, stdout, stderr] = ends;
            for fd in [&socket, &stdin, &stdout] {
                rustix::io::ioctl_fionbio(fd, true).expect("set");
            }
            relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr })
        });
        let text: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = text.clone();
        let echo = std::thread::spawn(move || {
            let mut all = Vec::new();
            server.read_to_end(&mut all).expect("read");
            // The caller's half has ended; ours goes on.
            server.write_all(&all).expect("written");
        });
        feed.write_all(&text).expect("fed");
        drop(feed);
        let mut back = Vec::new();
        out.read_to_end(&mut back).expect("read");
        assert!(back == expected, "all of it, in order");
        echo.join().expect("no panic");
        assert_eq!(served.join().expect("no panic").expect("no error"), 0);
    }

    #[test]
    fn relay_ends_with_a_server_that_has_closed_both_directions() {
        let pipe = || nix::unistd::pipe().expect("a pipe");
        let (socket, server) = UnixStream::pair().expect("a pair");
        let ((stdin, _feed), (_out, stdout), (_err, stderr)) = (pipe(), pipe(), pipe());
        let socket = OwnedFd::from(socket);
        rustix::io::ioctl_fionbio(&socket, true).expect("set");
        drop(server);
        let ended = relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr });
        assert_eq!(ended.expect("no error"), 0, "the caller's half was still open");

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
        drop(listener.accept().expect("accepted"));
        let ((stdin, feed), (out, stdout), (_err, stderr)) = (pipe(), pipe(), pipe());
        let socket = OwnedFd::from(client);
        rustix::io::ioctl_fionbio(&socket, true).expect("set");
        let late = std::thread::spawn(move || {
            let mut none = Vec::new();
            std::fs::File::from(out).read_to_end(&mut none).expect("an end");
            // The server has gone: the answer to these bytes is a reset.
            rustix::io::write(&feed, b"x").expect("fed");
            feed
        });
        let ended = relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr });
        assert_eq!(ended.expect("no error"), RESET);
        drop(late.join().expect("no panic"));
    }

    #[test]
    fn server_sees_a_reset_when_the_caller_goes_before_the_end_of_its_half() {
        let pipe = || nix::unistd::pipe().expect("a pipe");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let last = |ended: bool| {
            let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
            let (mut server, _) = listener.accept().expect("accepted");
            let ((stdin, feed), (_out, stdout), (err, stderr)) = (pipe(), pipe(), pipe());
            let socket = OwnedFd::from(client);
            rustix::io::ioctl_fionbio(&socket, true).expect("set");
            let relayed = std::thread::spawn(move || {
                relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr })
            });
            rustix::io::write(&feed, b"x").expect("fed");
            server.read_exact(&mut [0]).expect("it came");
            let mut feed = Some(feed);
            if ended {
                feed = None;
                assert_eq!(server.read(&mut [0]).expect("an end"), 0);
            }
            drop(err);
            relayed.join().expect("no panic").expect("no error");
            drop(feed);
            server.read(&mut [0])
        };
        assert_eq!(last(true).expect("an end"), 0);
        last(false).expect_err("a reset");
    }

    #[test]
    fn relay_ends_with_the_shim_and_tells_a_reset() {
        let pipe = || nix::unistd::pipe().expect("a pipe");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let run = |shim_goes: bool| {
            let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
            let (server, _) = listener.accept().expect("accepted");
            let ((stdin, feed), (out, stdout), (err, stderr)) = (pipe(), pipe(), pipe());
            let socket = OwnedFd::from(client);
            rustix::io::ioctl_fionbio(&socket, true).expect("set");
            if shim_goes {
                drop(err);
            } else {
                // A close with unread bytes is a reset.
                rustix::io::write(&feed, b"x").expect("fed");
                let waited = std::thread::spawn(move || {
                    server.peek(&mut [0]).expect("it came");
                    drop(server);
                });
                let code = relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr });
                waited.join().expect("no panic");
                drop((out, err));
                return code.expect("no error");
            }
            relay(Ends { socket: &socket, stdin, stdout: Some(stdout), stderr }).expect("no error")
        };
        assert_eq!((run(true), run(false)), (0, RESET));
    }
}
