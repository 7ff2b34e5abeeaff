//! Signals as an event to wait for, so that every wait can be interrupted and undone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Signals that mean "end, but undo first".
const CAUGHT: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP];

/// Blocked signals behind a file descriptor. `std` gives children an empty mask.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

/// Reason why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A signal to end.
    Signal,
    /// The descriptor at this index is ready.
    Ready(usize),
    /// The deadline passed.
    Timeout,
}

impl Signals {
    /// Blocks the signals for this thread and all threads and processes that it starts.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in CAUGHT {
            set.add(signal);
            default_action(signal)?;
        }
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    fn take(&self) -> bool {
        matches!(self.0.read_signal(), Ok(Some(_)))
    }
}

/// Restores the default action. A shell starts background jobs with SIGINT ignored, and an ignored
/// signal is never pending.
#[expect(unsafe_code, reason = "sigaction has no safe form")]
fn default_action(signal: Signal) -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, so no code of ours runs in a signal's context.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Waits until a signal comes, a descriptor is ready or the deadline passes, whichever is first.
/// Without `Signals` the default action of a signal applies: the process ends.
pub(crate) fn wait(
    signals: Option<&Signals>,
    fds: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> Woken {
    wait_or_hangup(signals, fds, None, deadline)
}

/// Does the same, and also wakes when the reader of a pipe is gone; the pipe's index is the last.
pub(crate) fn wait_or_hangup(
    signals: Option<&Signals>,
    fds: &[BorrowedFd<'_>],
    pipe: Option<BorrowedFd<'_>>,
    deadline: Option<Instant>,
) -> Woken {
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return if signals.is_some_and(Signals::take) { Woken::Signal } else { Woken::Timeout };
        }
        let mut polled: Vec<PollFd<'_>> =
            fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        if let Some(pipe) = pipe {
            // Errors are reported without being requested.
            polled.push(PollFd::from_borrowed_fd(pipe, PollFlags::empty()));
        }
        if let Some(signals) = signals {
            polled.push(PollFd::from_borrowed_fd(signals.0.as_fd(), PollFlags::IN));
        }
        let timeout = left.and_then(|l| Timespec::try_from(l).ok());
        let count = poll(&mut polled, timeout.as_ref());
        let ready: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
        if count.is_err() {
            continue; // EINTR: check the clock again.
        }
        if signals.is_some() && ready.last() == Some(&true) && signals.is_some_and(Signals::take) {
            return Woken::Signal;
        }
        if let Some(index) =
            ready.iter().take(fds.len() + usize::from(pipe.is_some())).position(|r| *r)
        {
            return Woken::Ready(index);
        }
    }
}
