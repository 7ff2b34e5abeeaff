//! Process between a command's terminal and the pipes to the shim. Root in the sandbox can share
//! our end of its terminals and change how it behaves, and any call on a terminal may block on what
//! root does there. So only this process touches a terminal: what blocks it blocks its own terminal
//! only, and neither the helper nor anything on the host.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::{
    buffer::{Buffer, Done},
    sys,
};

/// Buffer size, in bytes.
const CHUNK: usize = 16 * 1024;

/// Relay's ends of the pipes to the shim.
#[derive(Debug)]
pub(crate) struct Ends {
    /// Keyboard input for the terminal.
    pub(crate) stdin: OwnedFd,
    /// Output of the programs on the terminal.
    pub(crate) stdout: OwnedFd,
    /// New terminal sizes, `WINDOW_BYTES` each.
    pub(crate) sizes: OwnedFd,
}

/// Opens a terminal, sends its other end over `to`, and serves it until all programs have closed it
/// or the shim no longer reads. Failures are not reported: the process that waits for the other end
/// sees that `to` is closed.
pub(crate) fn run(window: (u16, u16), ends: &Ends, to: OwnedFd) {
    let Ok((ours, theirs)) = open_terminal(window) else { return };
    if sys::send_fd(&to, theirs.as_fd()).is_err() {
        return;
    }
    drop((theirs, to));
    for end in [&ours, &ends.stdin, &ends.stdout, &ends.sizes] {
        if rustix::io::ioctl_fionbio(end, true).is_err() {
            return;
        }
    }
    // The shim sees the end of the pipe, whatever the error was.
    serve(&ours, ends).ok();
}

/// Opens a terminal of the sandbox's own devpts, so that nothing typed into it can reach a terminal
/// of the host.
fn open_terminal(window: (u16, u16)) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    resize(&ours, window)?;
    Ok((ours, theirs))
}

fn resize(terminal: &OwnedFd, (rows, columns): (u16, u16)) -> rustix::io::Result<()> {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
}

fn serve(terminal: &OwnedFd, ends: &Ends) -> rustix::io::Result<()> {
    let (mut typed, mut said) = (Buffer::new(CHUNK), Buffer::new(CHUNK));
    // False once the pipe can deliver nothing more.
    let (mut stdin, mut sizes) = (true, true);
    loop {
        // Poll only descriptors with room or work: an end of file is reported again and again.
        let mut looks: Vec<(Look, PollFd<'_>)> = Vec::with_capacity(4);
        let mut look = |what, fd, flags| looks.push((what, PollFd::new(fd, flags)));
        if stdin && typed.is_empty() {
            look(Look::Stdin, &ends.stdin, PollFlags::IN);
        }
        if sizes {
            look(Look::Sizes, &ends.sizes, PollFlags::IN);
        }
        let reads = if said.is_empty() { PollFlags::IN } else { PollFlags::empty() };
        let writes = if typed.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        if !(reads | writes).is_empty() {
            look(Look::Terminal, terminal, reads | writes);
        }
        let wants = if said.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        look(Look::Stdout, &ends.stdout, wants);
        let (what, mut fds): (Vec<_>, Vec<_>) = looks.into_iter().unzip();
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        }
        for (what, fd) in what.into_iter().zip(fds) {
            let seen = fd.revents();
            if seen.is_empty() {
                continue;
            }
            match what {
                Look::Stdin => stdin = !matches!(typed.fill(&ends.stdin), Done::End),
                Look::Sizes => sizes = take_size(&ends.sizes, terminal),
                Look::Terminal => {
                    if !typed.is_empty() && matches!(typed.drain(terminal), Done::End) {
                        typed = Buffer::new(CHUNK);
                    }
                    if said.is_empty() && matches!(said.fill(terminal), Done::End) {
                        return Ok(());
                    }
                }
                // The shim has closed its end: closing ours hangs up the terminal.
                Look::Stdout if seen.contains(PollFlags::ERR) => return Ok(()),
                Look::Stdout => {
                    if matches!(said.drain(&ends.stdout), Done::End) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

enum Look {
    Stdin,
    Sizes,
    Terminal,
    Stdout,
}

/// Reads a new size and applies it. False when no more can come.
fn take_size(from: &OwnedFd, terminal: &OwnedFd) -> bool {
    let mut bytes = [0; helper::WINDOW_BYTES];
    match rustix::io::read(from, &mut bytes) {
        Ok(helper::WINDOW_BYTES) => {
            // A terminal that keeps its old size is still usable.
            resize(terminal, helper::window(bytes)).ok();
            true
        }
        Err(Errno::AGAIN | Errno::INTR) => true,
        Ok(_) | Err(_) => false,
    }
}
