//! `pve-sandbox-helper`: runs inside a sandbox, started from a sealed memory file, and starts
//! commands for its shim. One thread, one loop, no files of its own. When its shim ends, it kills
//! what it has started and exits: without the shim nobody could receive the results.

mod buffer;
mod files;
mod forward;
mod relay;
mod spawn;
mod sys;
mod users;

use std::{
    collections::BTreeMap,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    process::ExitCode,
};

use helper::{FromHelper, MESSAGE_BYTES_MAX, Refusal, ToHelper};
use nix::{
    sys::{
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, UCred, recvmsg, sendmsg,
    },
};

use spawn::{Child, Start, Verdict};

/// Most descriptors in a message: an order and three pipe ends.
const FDS_MAX: usize = 4;
/// Pause before a call is repeated for which the kernel had no memory.
const PAUSE: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // There is nobody to report to: the shim sees the end of the socket.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    let channel = sys::take_channel()?;
    // Only the sandbox's own root may inspect this process.
    nix::sys::prctl::set_dumpable(false)?;
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&ended), None)?;
    let signals = SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut helper = Helper { channel, children: BTreeMap::new() };
    helper.say(&FromHelper::Ready, None)?;
    let result = helper.serve(&signals);
    helper.end_all();
    result
}

struct Helper {
    channel: OwnedFd,
    children: BTreeMap<u64, (Child, bool)>,
}

impl Helper {
    fn serve(&mut self, signals: &SignalFd) -> io::Result<()> {
        loop {
            // The order matters: undecided children first, then ended ones, then new requests.
            let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(2 + self.children.len());
            let undecided = self.children.values().filter(|(_, decided)| !decided);
            fds.extend(undecided.map(|(child, _)| PollFd::new(&child.status, PollFlags::IN)));
            fds.push(PollFd::new(signals, PollFlags::IN));
            fds.push(PollFd::new(&self.channel, PollFlags::IN));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let asked = fds.last().is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            while let Ok(Some(_)) = signals.read_signal() {}
            self.decide()?;
            self.reap()?;
            if asked && !self.heed()? {
                return Ok(());
            }
        }
    }

    /// Reports which children run a program now and which were refused.
    fn decide(&mut self) -> io::Result<()> {
        let is_open = |child: &Child| {
            let mut fd = [PollFd::new(&child.status, PollFlags::IN)];
            let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            matches!(poll(&mut fd, Some(&now)), Ok(0))
        };
        let waiting = self.children.iter().filter(|(_, (_, decided))| !decided);
        let ready: Vec<u64> =
            waiting.filter(|(_, (child, _))| !is_open(child)).map(|(token, _)| *token).collect();
        ready.into_iter().try_for_each(|token| self.decided(token))
    }

    fn decided(&mut self, token: u64) -> io::Result<()> {
        let Some((child, decided)) = self.children.get_mut(&token) else { return Ok(()) };
        if std::mem::replace(decided, true) {
            return Ok(());
        }
        match spawn::verdict(&child.status) {
            Verdict::Refused(why) => {
                // The child ends by itself; nobody needs its exit.
                self.children.remove(&token);
                self.say(&FromHelper::Refused { token, why }, None)
            }
            Verdict::Runs { never_ran } => {
                let pid = child.pid;
                self.say(&FromHelper::Spawned { token, never_ran }, Some(pid))
            }
        }
    }

    /// Reports the children that have ended. Each is reported while it is a zombie: until it is
    /// reaped its pid is not reused, and the kernel translates it for the shim.
    fn reap(&mut self) -> io::Result<()> {
        while let Some(ended) = sys::ended_child() {
            let found = self.children.iter().find(|(_, (child, _))| child.pid == ended.pid);
            let token = found.map(|(token, _)| *token);
            // A child that has ended either ran its program or reported why not.
            token.map_or(Ok(()), |token| self.decided(token))?;
            if !sys::reap(ended.pid) {
                return Ok(());
            }
            // Children that were refused, and orphans that a pid 1 inherits, are reaped without a
            // report.
            let Some(token) = token else { continue };
            if self.children.remove(&token).is_some() {
                let sys::Ended { code, signal, .. } = ended;
                self.say(&FromHelper::Exited { token, code, signal }, None)?;
            }
        }
        Ok(())
    }

    /// Receives one message. False when the shim has gone.
    fn heed(&mut self) -> io::Result<bool> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        // Another process in the sandbox may have taken the message that was there.
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = match recvmsg(&self.channel, &mut slices, &mut ancillary, flags) {
            Ok(received) => received.bytes,
            Err(error) if passes(error) => {
                pause();
                return Ok(true);
            }
            Err(error) => return Err(error.into()),
        };
        if received == 0 {
            return Ok(false);
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let (token, tty, start_by_ms) = match serde_json::from_slice(&bytes[..received]) {
            Ok(ToHelper::Spawn { token, tty, start_by_ms }) => (token, tty, start_by_ms),
            Ok(ToHelper::Ping { serial }) => {
                self.say(&FromHelper::Pong { serial }, None)?;
                return Ok(true);
            }
            // A message that cannot be parsed names no command to report on.
            Err(_) => return Ok(true),
        };
        // Without a free descriptor the kernel drops those that came with the message.
        let started = match fds.is_empty() {
            true => Err(Refusal::NoProcess),
            false => spawn::start(Start { order: fds.remove(0), ends: fds, tty, start_by_ms }),
        };
        match started {
            Ok(child) => drop(self.children.insert(token, (child, false))),
            Err(why) => self.say(&FromHelper::Refused { token, why }, None)?,
        }
        Ok(true)
    }

    /// Sends a message. The kernel translates `about`, a pid, for the receiver's pid namespace; a
    /// pid that it refuses to pass on is omitted. Waits while the shim does not read.
    ///
    /// # Errors
    /// When the socket is broken. A problem with a single message is not an error: it would end
    /// every command of the sandbox.
    fn say(&self, message: &FromHelper, mut about: Option<Pid>) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        loop {
            match send(&self.channel, &bytes, about) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => {
                    let mut room = [PollFd::new(&self.channel, PollFlags::OUT)];
                    // An interrupted wait is repeated like a completed one.
                    poll(&mut room, None).ok();
                }
                Err(error) if passes(error) => pause(),
                Err(error) if is_broken(error) => return Err(error.into()),
                Err(_) if about.is_some() => about = None,
                Err(_) => return Ok(()),
            }
        }
    }

    fn end_all(&mut self) {
        for (child, _) in self.children.values() {
            // From inside, the child's whole session cannot be found; its process group is most of
            // it.
            kill(Pid::from_raw(-child.pid.as_raw()), Signal::SIGKILL).ok();
        }
    }
}

fn send(channel: &OwnedFd, bytes: &[u8], about: Option<Pid>) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(pid) = about.and_then(|pid| rustix::process::Pid::from_raw(pid.as_raw())) {
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        ancillary.push(SendAncillaryMessage::ScmCredentials(UCred { pid, uid, gid }));
    }
    sendmsg(channel, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// True for an error that says nothing about the message or the socket: the call is repeated.
fn passes(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM)
}

/// True when nothing can be sent any more: the shim has gone.
fn is_broken(error: Errno) -> bool {
    matches!(error, Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::BADF | Errno::NOTSOCK)
}

fn pause() {
    // A pause that a signal cuts short is long enough.
    poll(&mut [], Some(&PAUSE)).ok();
}
