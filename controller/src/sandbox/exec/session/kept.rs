//! Stdin that is kept until its command has accepted it, to be sent again over a new connection. All commands share the
//! memory for it, by team. A command that gets no more of it keeps the end of its stdin; if its connection breaks
//! while more than that is on the way, it cannot be continued.

use bytes::Bytes;
use daemon::shares::{Part, Places};
use proto::{name::Team, reattach::Sent};

/// Most bytes of memory for the stdin of one command: more than is on the way to it at a time.
const COMMAND_BYTES_MAX: usize = 1024 * 1024;
/// Most bytes of memory for that of all commands. A team gets at most half of them, and less while other teams use
/// them: see `Places`.
const ALL_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Memory for the stdin that is kept of all commands. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct StdinMemory(Places<Team>);

impl Default for StdinMemory {
    fn default() -> Self {
        Self(Places::new(ALL_BYTES_MAX))
    }
}

impl StdinMemory {
    /// Creates the part of a command of this team, which keeps nothing yet.
    pub(super) fn command(&self, team: &Team) -> KeptStdin {
        KeptStdin { memory: self.0.part(team.clone()), sent: Sent::default() }
    }

    /// Takes all that a team may have, as its other commands do.
    #[cfg(test)]
    pub(crate) fn take_all(&self, team: &Team) -> Part<Team> {
        let mut part = self.0.part(team.clone());
        part.grow_to(ALL_BYTES_MAX);
        part
    }

    /// Returns the bytes that a team uses.
    #[cfg(test)]
    pub(crate) fn used(&self, team: &Team) -> usize {
        self.0.held(team)
    }
}

/// Stdin that is kept of one command.
#[derive(Debug)]
pub(super) struct KeptStdin {
    memory: Part<Team>,
    sent: Sent,
}

impl KeptStdin {
    /// Starts at `offset`.
    pub(super) fn begin(&mut self, offset: u64) {
        self.sent.begin(offset);
        self.release_unused();
    }

    /// Keeps bytes that are sent next, and drops the oldest where the memory does not suffice.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.sent.keep(bytes);
        self.memory.grow_to(self.sent.memory().min(COMMAND_BYTES_MAX));
        self.sent.keep_at_most(self.memory.held());
        self.release_unused();
    }

    /// Drops bytes before `offset`, which is the amount that the command has accepted.
    pub(super) fn accepted(&mut self, offset: u64) {
        self.sent.accepted(offset);
        self.release_unused();
    }

    /// Returns all bytes from `offset` on, which is the amount that the command has accepted; `None` when some of them
    /// are not kept.
    pub(super) fn from(&mut self, offset: u64) -> Option<Vec<Bytes>> {
        let rest = self.sent.from(offset);
        self.release_unused();
        rest
    }

    /// Notes that stdin has ended.
    pub(super) fn end(&mut self) {
        self.sent.eof = true;
    }

    /// Returns true when stdin has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.sent.eof
    }

    fn release_unused(&mut self) {
        self.memory.shrink_to(self.sent.memory());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    #[test]
    fn stdin_of_many_commands_stays_within_the_memory_of_all_and_the_share_of_its_team() {
        let memory = StdinMemory::default();
        let [red, blue]: [Team; 2] = ["red", "blue"].map(|team| team.parse().expect("a team"));
        let mut commands: Vec<_> = (0..100).map(|_| memory.command(&red)).collect();
        for command in &mut commands {
            (0..16).for_each(|_| command.keep(&[7; 256 * 1024]));
        }
        let all: usize = commands.iter().map(|command| command.sent.memory()).sum();
        assert_eq!(all, memory.used(&red), "what is counted is what is used");
        assert!(all <= ALL_BYTES_MAX / 2 && all > ALL_BYTES_MAX / 2 - MIB, "{all}");
        assert!(commands.iter().all(|command| command.sent.memory() <= COMMAND_BYTES_MAX));

        // The first ones have kept what is on the way, the last ones nothing.
        let end = 16 * 256 * 1024;
        let [first, .., last] = &mut commands[..] else { unreachable!("a hundred") };
        let on_the_way = (COMMAND_BYTES_MAX / 2) as u64;
        assert_eq!(first.from(end - on_the_way).expect("kept").concat().len(), MIB / 2);
        assert!(last.from(end - on_the_way).is_none());
        assert_eq!(last.from(end), Some(Vec::new()), "all was accepted, so nothing is missing");

        let mut other = memory.command(&blue);
        other.keep(&[7; 256 * 1024]);
        assert!(other.from(0).is_some(), "another team has its own");
        drop(commands);
        assert_eq!(memory.used(&red), 0);
    }

    #[test]
    fn accepted_stdin_makes_room_for_other_commands() {
        let memory = StdinMemory::default();
        let red: Team = "red".parse().expect("a team");
        let mut commands: Vec<_> = (0..100).map(|_| memory.command(&red)).collect();
        for command in &mut commands {
            for step in 1..=16 {
                command.keep(&[7; 256 * 1024]);
                command.accepted(step * 256 * 1024);
            }
            assert_eq!(command.from(16 * 256 * 1024), Some(Vec::new()));
        }
        assert_eq!(memory.used(&red), 0);
        commands.iter_mut().for_each(|command| command.keep(b"some"));
        assert!(commands.iter_mut().all(|command| command.from(16 * 256 * 1024).is_some()));
    }
}
