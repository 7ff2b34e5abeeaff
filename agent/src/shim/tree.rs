//! Finds and ends the processes of a command: all of them, or those that a terminal ends when it
//! closes.
//!
//! Killing a command does not kill what it has started, so its processes are searched in the
//! container's cgroup: the command itself, its session and process group, processes with its mark
//! in their environment, and the descendants of all these. A process that hides from all of that
//! continues to run in its own sandbox, as a service started there does.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use daemon::{seldom::Seldom, sync::Mutex};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};

use super::Host;
use crate::sys::{pidfd, proc, proc::ProcStat};

/// Time that processes get to end after each signal.
const GRACE: Duration = Duration::from_secs(2);
/// Time after which ending the processes is given up.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two searches.
const PAUSE: Duration = Duration::from_millis(20);

/// Time budget of a search for marks.
const MARK_LOOK: Duration = Duration::from_secs(1);
/// Most concurrent searches for marks, hanging ones included. The shim has as many threads for them alone.
pub(super) const MARK_LOOKS_MAX: usize = 4;
static MARK_LOOKS: Semaphore = Semaphore::const_new(MARK_LOOKS_MAX);

/// Lines about processes that do not end, and about signals that are not sent. A tenant decides how many
/// processes there are, and how often a command is to end.
static UNENDED: Seldom = Seldom::new();
static UNSENT: Seldom = Seldom::new();

const PROC: &str = "/proc";
const SIGKILL: i32 = nix::libc::SIGKILL;
const SIGTERM: i32 = nix::libc::SIGTERM;
const SIGCONT: i32 = nix::libc::SIGCONT;
const SIGHUP: i32 = nix::libc::SIGHUP;

/// Part of a command's processes.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// All that the command has started.
    All,
    /// Processes of its session, except those that ignore SIGHUP.
    Session(u32),
}

#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) host: Arc<dyn Host>,
    /// Pid of the command itself, which is also its session and its process group. Reported by the
    /// helper: at worst it is another process of the same sandbox.
    pub(super) leader: Option<u32>,
    /// Mark: `NAME=value` in the environment of each process.
    pub(super) mark: String,
}

impl Tree {
    /// Returns the CPU time that the command has used. Leaves out processes that only its mark
    /// connects to it: their environment is slow to read.
    pub(super) async fn cpu(&self) -> Duration {
        let (host, leader) = (Arc::clone(&self.host), self.leader);
        let used = tokio::task::spawn_blocking(move || {
            let family = family(&processes(&*host), leader, |_| false);
            family.iter().map(|kin| proc::cpu(Path::new(PROC), kin.pid)).sum()
        });
        used.await.unwrap_or_default()
    }

    /// Finds the processes that run now.
    async fn find(&self) -> Vec<ProcStat> {
        let host = Arc::clone(&self.host);
        let all = tokio::task::spawn_blocking(move || processes(&*host));
        let all = all.await.unwrap_or_default();
        let marked = marked(Path::new(PROC), &all, &self.mark).await;
        family(&all, self.leader, |kin| marked.contains(&kin.pid))
    }

    /// Sends a signal to all processes, once.
    pub(super) async fn signal(&self, number: i32) {
        for kin in self.find().await {
            send(&kin, number);
        }
    }

    /// Ends all processes: SIGTERM, then SIGKILL, until none is left. False when some are left at
    /// the deadline.
    pub(super) async fn end(&self) -> bool {
        self.end_part(Part::All, &[SIGTERM, SIGKILL]).await
    }

    /// Hangs up, as a terminal that closes: ends the processes of the command's session, except
    /// those that ignore SIGHUP. Other sessions, such as that of a daemon or of tmux, go on. False
    /// when some are left at the deadline.
    pub(super) async fn hang_up(&self) -> bool {
        let session = match self.leader {
            Some(leader) => Some(leader),
            // Asked once: later the oldest may be one that left the session.
            None => first_session(&self.find().await),
        };
        let Some(session) = session else { return true };
        self.end_part(Part::Session(session), &[SIGHUP, SIGTERM, SIGKILL]).await
    }

    /// Returns true when the command itself ignores SIGHUP, or nobody knows which process it is.
    pub(super) async fn ignores_hang_up(&self) -> bool {
        let Some(leader) = self.leader else { return true };
        let look = move || proc::signal_masks(Path::new(PROC), leader).ignores(SIGHUP);
        tokio::task::spawn_blocking(look).await.unwrap_or(true)
    }

    /// Sends these processes the signals, one after each [`GRACE`] and the last until the deadline.
    async fn end_part(&self, part: Part, signals: &[i32]) -> bool {
        let begun = Instant::now();
        let mut told = BTreeSet::new();
        loop {
            let left = match part {
                Part::All => self.find().await,
                Part::Session(session) => self.find_in(session).await,
            };
            if left.is_empty() {
                return true;
            }
            let elapsed = begun.elapsed();
            if elapsed >= DEADLINE {
                if let Some(left_out) = UNENDED.admit() {
                    let left = left.len();
                    tracing::warn!(left, left_out, "processes of a command did not end");
                }
                return false;
            }
            let number = due(signals, elapsed);
            for kin in left {
                if number == SIGKILL {
                    send(&kin, SIGKILL);
                } else if told.insert((kin, number)) {
                    send(&kin, number);
                    // A stopped process would not handle the signal.
                    send(&kin, SIGCONT);
                }
            }
            sleep(PAUSE).await;
        }
    }

    /// Finds the processes of a session that do not ignore SIGHUP; also one of which that cannot
    /// be read.
    async fn find_in(&self, session: u32) -> Vec<ProcStat> {
        let host = Arc::clone(&self.host);
        let found = tokio::task::spawn_blocking(move || {
            let ignores = |pid: u32| proc::signal_masks(Path::new(PROC), pid).ignores(SIGHUP);
            let mut found = processes(&*host);
            found.retain(|kin| kin.session == session && !ignores(kin.pid));
            found
        });
        found.await.unwrap_or_default()
    }
}

/// Chooses the signal that is due after this time. Pure.
fn due(signals: &[i32], elapsed: Duration) -> i32 {
    let stage = usize::try_from(elapsed.as_millis() / GRACE.as_millis()).unwrap_or(usize::MAX);
    signals.get(stage).or(signals.last()).copied().unwrap_or(SIGKILL)
}

/// Finds the session that a command was started in: that of the oldest of its processes. Pure.
fn first_session(family: &[ProcStat]) -> Option<u32> {
    family.iter().min_by_key(|kin| (kin.start, kin.pid)).map(|kin| kin.session)
}

/// Lists the processes of the container.
fn processes(host: &dyn Host) -> Vec<ProcStat> {
    let pids = host.processes().into_iter();
    pids.filter_map(|pid| proc::kin(Path::new(PROC), pid)).collect()
}

/// Finds the pids that have the mark in their environment. The environment is in the tenant's
/// memory, which can be arranged so that a read never ends: a process that is not read in time
/// counts as unmarked, and hanging reads occupy only a few threads.
async fn marked(proc: &Path, all: &[ProcStat], mark: &str) -> BTreeSet<u32> {
    let Ok(slot) = MARK_LOOKS.try_acquire() else { return BTreeSet::new() };
    let (proc, mark) = (proc.to_owned(), mark.to_owned());
    let pids: Vec<u32> = all.iter().map(|kin| kin.pid).collect();
    let found = Arc::new(Mutex::new(BTreeSet::new()));
    let finds = Arc::clone(&found);
    let looked = tokio::task::spawn_blocking(move || {
        // Held by the thread, not by the caller that gives up on it.
        let _slot = slot;
        let until = Instant::now() + MARK_LOOK;
        for pid in pids {
            if proc::has_environment(&proc, pid, &mark) {
                finds.lock().insert(pid);
            }
            if Instant::now() >= until {
                return;
            }
        }
    });
    drop(timeout(MARK_LOOK, looked).await);
    found.lock().clone()
}

fn send(kin: &ProcStat, number: i32) {
    let same = || proc::kin(Path::new(PROC), kin.pid).is_some_and(|now| now.start == kin.start);
    if let Err(error) = pidfd::signal(kin.pid, number, same)
        && let Some(left_out) = UNSENT.admit()
    {
        tracing::warn!(pid = kin.pid, number, %error, left_out, "a signal could not be sent");
    }
}

/// Selects the processes of the command that `leader` is from all processes of a container. Pure.
fn family(
    all: &[ProcStat],
    leader: Option<u32>,
    marked: impl Fn(&ProcStat) -> bool,
) -> Vec<ProcStat> {
    let root = |kin: &ProcStat| {
        let own = [kin.pid, kin.session, kin.group];
        leader.is_some_and(|leader| own.contains(&leader)) || marked(kin)
    };
    let (mut family, mut others): (Vec<ProcStat>, Vec<ProcStat>) =
        all.iter().copied().partition(root);
    // Sessions led by a member belong to the command: on a terminal the command leads one.
    let mut known: BTreeSet<u32> = family.iter().map(|kin| kin.pid).collect();
    loop {
        let (more, rest): (Vec<ProcStat>, Vec<ProcStat>) = others
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

    fn kin(pid: u32, parent: u32, group: u32, session: u32) -> ProcStat {
        ProcStat { pid, parent, group, session, start: u64::from(pid) }
    }

    /// Sandbox that consists of this process.
    #[derive(Debug)]
    struct Alone;

    impl Host for Alone {
        fn processes(&self) -> Vec<u32> {
            vec![std::process::id()]
        }

        fn frozen(&self) -> bool {
            false
        }

        fn runs(&self) -> bool {
            true
        }

        fn enter(&self) -> Vec<std::ffi::OsString> {
            Vec::new()
        }
    }

    #[test]
    fn hanging_environment_read_blocks_no_kill() {
        let runtime = crate::shim::process::runtime().expect("built");
        runtime.block_on(hang_all_searches_and_find());
    }

    async fn hang_all_searches_and_find() {
        const SOON: Duration = Duration::from_secs(60);
        let dir = tempfile::tempdir().expect("a directory");
        let put = |pid: &str| {
            std::fs::create_dir(dir.path().join(pid)).expect("made");
            dir.path().join(pid).join("environ")
        };
        std::fs::write(put("20"), b"A=1\0MARK=x\0").expect("written");
        // A FIFO without a writer: a read of it never ends.
        let hangs = put("30");
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&hangs, mode).expect("made");
        let all = [kin(20, 1, 20, 20), kin(30, 1, 30, 30)];
        // More rounds than the semaphore has permits for hanging reads.
        for round in 0..2 * MARK_LOOKS_MAX {
            let look = marked(dir.path(), &all, "MARK=x");
            let found = timeout(SOON, look).await.expect("given up on");
            let expected = if round < MARK_LOOKS_MAX { [20].into() } else { BTreeSet::new() };
            assert_eq!(found, expected, "{round}");
        }
        // All that signals and ends commands goes on, by what needs no environment.
        let own = std::process::id();
        let tree = Tree { host: Arc::new(Alone), leader: Some(own), mark: "MARK=x".to_owned() };
        let found = timeout(SOON, tree.find()).await.expect("it does not hang");
        let [found] = found[..] else { panic!("it is there alone: {found:?}") };
        assert_eq!(found.pid, own);
        let of_session = tree.find_in(found.session);
        let of_session = timeout(SOON, of_session).await.expect("it does not hang");
        let ignores = timeout(SOON, tree.ignores_hang_up()).await.expect("it does not hang");
        assert_eq!(of_session.is_empty(), ignores, "its session without those that ignore SIGHUP");
        timeout(SOON, tree.cpu()).await.expect("it does not hang");
        // Let the threads end, so that the test can.
        drop(std::fs::File::options().write(true).open(&hangs).expect("opened"));
    }

    #[test]
    fn family_is_exactly_the_processes_of_one_command() {
        let all = [
            // Systemd in the container, a service, and the helper.
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
        // The pid of this command is unknown: its mark leads to it.
        assert_eq!(pids(None, 20), [20, 21, 22, 23]);
        assert_eq!(pids(Some(30), 0), [30, 31]);
        assert_eq!(pids(Some(40), 0), Vec::<u32>::new());
        assert_eq!(pids(None, 0), Vec::<u32>::new());
    }

    #[test]
    fn session_of_a_command_is_that_of_its_oldest_process() {
        let all =
            [kin(31, 30, 31, 31), kin(24, 10, 24, 24), kin(23, 10, 23, 20), kin(20, 12, 20, 20)];
        assert_eq!(first_session(&all), Some(20));
        assert_eq!(first_session(&all[..2]), Some(24));
        assert_eq!(first_session(&[]), None);
    }

    #[test]
    fn hang_up_is_followed_by_stronger_signals() {
        let hang_up = [SIGHUP, SIGTERM, SIGKILL];
        let at = |graces: f64| due(&hang_up, GRACE.mul_f64(graces));
        assert_eq!([at(0.0), at(0.9)], [SIGHUP; 2]);
        assert_eq!([at(1.0), at(1.9)], [SIGTERM; 2]);
        assert_eq!([at(2.0), at(9.0)], [SIGKILL; 2]);
    }
}
