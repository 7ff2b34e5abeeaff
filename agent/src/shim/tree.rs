//! All that a command has started, and its end.
//!
//! Killing a command does not kill what it has started, so the processes are looked for: in the
//! container's cgroup, and of those the command itself, what is in its session or process group,
//! what carries its mark in its environment, and whatever descends from any of them. What hides
//! from all of that runs on in its own sandbox, as a service started there does.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::Host;
use crate::sys::{pidfd, proc, proc::Kin};

/// How long they get to end by themselves after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
/// When it is given up.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

const PROC: &str = "/proc";
const SIGKILL: i32 = nix::libc::SIGKILL;
const SIGTERM: i32 = nix::libc::SIGTERM;
const SIGCONT: i32 = nix::libc::SIGCONT;

/// The processes of one command.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    /// The sandbox.
    pub(super) host: Arc<dyn Host>,
    /// Pid of the command itself, which is also its session and its process group. By the helper's
    /// word: at worst it is another process of the same sandbox.
    pub(super) leader: Option<u32>,
    /// `NAME=value` in the environment of each.
    pub(super) mark: String,
}

impl Tree {
    /// Those that run now.
    async fn find(&self) -> Vec<Kin> {
        let (host, leader, mark) = (Arc::clone(&self.host), self.leader, self.mark.clone());
        let found = tokio::task::spawn_blocking(move || {
            let proc = Path::new(PROC);
            let pids = host.processes().into_iter();
            let all: Vec<_> = pids.filter_map(|pid| proc::kin(proc, pid)).collect();
            family(&all, leader, |kin| proc::has_environment(proc, kin.pid, &mark))
        });
        found.await.unwrap_or_default()
    }

    /// Sends a signal to all of them, once.
    pub(super) async fn signal(&self, number: i32) {
        for kin in self.find().await {
            send(&kin, number);
        }
    }

    /// Ends them all: SIGTERM, then SIGKILL, until none is left. False when some are left at the
    /// deadline.
    pub(super) async fn end(&self) -> bool {
        let begun = Instant::now();
        let mut told = BTreeSet::new();
        loop {
            let left = self.find().await;
            if left.is_empty() {
                return true;
            }
            if begun.elapsed() >= DEADLINE {
                tracing::warn!(left = left.len(), "processes did not end");
                return false;
            }
            for kin in left {
                if begun.elapsed() >= GRACE {
                    send(&kin, SIGKILL);
                } else if told.insert(kin) {
                    send(&kin, SIGTERM);
                    // One that is stopped would never see it.
                    send(&kin, SIGCONT);
                }
            }
            sleep(PAUSE).await;
        }
    }
}

fn send(kin: &Kin, number: i32) {
    let same = || proc::kin(Path::new(PROC), kin.pid).is_some_and(|now| now.start == kin.start);
    if let Err(error) = pidfd::signal(kin.pid, number, same) {
        tracing::warn!(pid = kin.pid, number, %error, "a signal was not sent");
    }
}

/// Of all processes of a container, those of the command that `leader` is. Pure.
fn family(all: &[Kin], leader: Option<u32>, marked: impl Fn(&Kin) -> bool) -> Vec<Kin> {
    let root = |kin: &Kin| {
        let own = [kin.pid, kin.session, kin.group];
        leader.is_some_and(|leader| own.contains(&leader)) || marked(kin)
    };
    let (mut family, mut others): (Vec<Kin>, Vec<Kin>) = all.iter().copied().partition(root);
    // Sessions that the family leads are all its own: on a terminal the command leads one.
    let mut known: BTreeSet<u32> = family.iter().map(|kin| kin.pid).collect();
    loop {
        let (more, rest): (Vec<Kin>, Vec<Kin>) = others
            .into_iter()
            .partition(|kin| known.contains(&kin.parent) || known.contains(&kin.session));
        if more.is_empty() {
            return family;
        }
        known.extend(more.iter().map(|kin| kin.pid));
        family.extend(more);
        others = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kin(pid: u32, parent: u32, group: u32, session: u32) -> Kin {
        Kin { pid, parent, group, session, start: u64::from(pid) }
    }

    #[test]
    fn a_family_is_all_that_comes_of_one_attach_and_nothing_else() {
        let all = [
            // Systemd in there, and a service. The helper.
            kin(10, 1, 10, 10),
            kin(11, 10, 11, 11),
            kin(12, 1, 12, 12),
            // The command, its child in a group of its own, a grandchild in a session of its own.
            kin(20, 12, 20, 20),
            kin(21, 20, 21, 20),
            kin(22, 21, 22, 22),
            // A daemon that the container's init adopted: still of the session.
            kin(23, 10, 23, 20),
            // One that left the session and was adopted, but kept the environment.
            kin(24, 10, 24, 24),
            // Its child.
            kin(25, 24, 24, 24),
            // Another command.
            kin(30, 12, 30, 30),
            kin(31, 30, 30, 30),
        ];
        let pids = |leader, mark| {
            let found = family(&all, leader, |kin| kin.pid == mark);
            found.iter().map(|kin| kin.pid).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        assert_eq!(pids(Some(20), 24), [20, 21, 22, 23, 24, 25]);
        assert_eq!(pids(Some(20), 0), [20, 21, 22, 23]);
        // One that nobody told us the pid of: its mark leads to it.
        assert_eq!(pids(None, 20), [20, 21, 22, 23]);
        assert_eq!(pids(Some(30), 0), [30, 31]);
        assert_eq!(pids(Some(40), 0), Vec::<u32>::new());
        assert_eq!(pids(None, 0), Vec::<u32>::new());
    }
}
