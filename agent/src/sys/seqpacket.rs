//! A socket that preserves message boundaries, and carries descriptors and pids beside the bytes.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    sockopt::set_socket_passcred,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Descriptors in one message at most.
const FDS_MAX: usize = 4;

/// Our end of a connected pair.
#[derive(Debug)]
pub struct Seqpacket(AsyncFd<OwnedFd>);

/// Received message.
#[derive(Debug)]
pub struct Message {
    /// Content; empty at the end.
    pub bytes: Vec<u8>,
    /// Pid of the sender, or the one that it named, in our pid namespace, checked by the kernel.
    pub pid: Option<u32>,
}

/// Creates a connected pair: our end, and the one for the peer.
#[expect(unsafe_code, reason = "AsyncFd")]
pub fn pair() -> io::Result<(Seqpacket, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    set_socket_passcred(&ours, true)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    let both = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: an `OwnedFd` is open, is this very descriptor until it is dropped, and is moved in
    // here for good.
    let ours = unsafe { AsyncFd::register_with_interest(ours, both)? };
    Ok((Seqpacket(ours), theirs))
}

impl Seqpacket {
    /// Sends one message.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let send = |socket: &OwnedFd| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
            Ok(())
        };
        self.0.async_io(Interest::WRITABLE, send).await
    }

    /// Receives the next message, of at most `max` bytes; a longer one is cut. Never accepts
    /// descriptors: their sender could make us wait for the files behind them, even when closing
    /// them.
    pub async fn receive(&self, max: usize) -> io::Result<Message> {
        let receive = |socket: &OwnedFd| {
            let mut bytes = vec![0; max];
            // Has no space for descriptors, so the kernel drops them.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(socket.as_fd(), &mut slices, &mut ancillary, flags)?.bytes;
            bytes.truncate(received);
            let pid = ancillary.drain().find_map(|part| {
                let RecvAncillaryMessage::ScmCredentials(who) = part else { return None };
                u32::try_from(who.pid.as_raw_nonzero().get()).ok()
            });
            Ok(Message { bytes, pid })
        };
        self.0.async_io(Interest::READABLE, receive).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_keep_their_boundaries_and_carry_pids() {
        let (ours, theirs) = pair().expect("a pair");
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        ours.send(b"one", &[writer.as_fd()]).await.expect("sent");
        ours.send(b"two", &[]).await.expect("sent");
        rustix::net::send(&theirs, b"back", SendFlags::empty()).expect("sent");
        let back = ours.receive(2).await.expect("received");
        assert_eq!((back.bytes.as_slice(), back.pid), (&b"ba"[..], Some(std::process::id())));
        // Descriptors are neither received nor kept open.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let (mut end, brought) = std::io::pipe().expect("a pipe");
        let fds = [brought.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = sendmsg(&theirs, &[IoSlice::new(b"fd")], &mut ancillary, SendFlags::empty());
        assert_eq!(sent, Ok(2));
        let message = ours.receive(8).await.expect("received");
        assert_eq!((message.bytes.as_slice(), message.pid), (&b"fd"[..], Some(std::process::id())));
        drop(brought);
        assert_eq!(io::Read::read(&mut end, &mut [0]).expect("read"), 0, "its end: nobody has it");
        drop(reader);
        drop(theirs);
        assert!(ours.send(b"x", &[]).await.is_err());
        let end = ours.receive(2).await;
        assert!(end.map_or(true, |end| end.bytes.is_empty()));
    }
}
