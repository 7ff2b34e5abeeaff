//! Commands of all sandboxes: those that run, and the output that the nodes keep of them.
//!
//! ```text
//!  start of a command  -> begin ... end     exact while its caller is attached
//!  caller left         -> end(MayRun)       runs on, until its node reports that it does not
//!  report of a node    -> report            commands without a caller, also from before our start
//!  node without report -> beat              an older agent: only commands with a caller count
//!  node is down        -> away              after `AWAY` only commands with a caller count, until it is back
//! ```
//! What runs on a node that is away may run on; nobody can tell, end it or read its output. It would block its
//! team for as long as the node is dead, so it does not count meanwhile. It counts again when the node is back.
//! Sums of each team are kept as commands begin and end, and equal a recount.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use daemon::sync::Mutex;
use proto::{
    agent::v1::WatchExecs,
    id::SandboxId,
    name::{NodeName, Team},
};
use tokio::time::Instant;

/// Time for which a report may be behind: what began or ended later is not corrected by it.
const BEHIND: Duration = Duration::from_secs(10);
/// Time after which a connected node that has not reported never does.
const SILENT: Duration = Duration::from_secs(15);
/// Time for which a node is down before what it runs and keeps does not count any more: longer than a reboot
/// of the node or an upgrade of its agent.
pub const AWAY: Duration = Duration::from_mins(10);
/// Most names of ended commands that are remembered of a sandbox: as many as its shim keeps.
const ENDED_MAX: usize = 64;
/// Most sandboxes in one report of a node.
const REPORT_MAX: usize = 100_000;

/// Commands of a team.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommandUse {
    /// Commands that run.
    pub running: u64,
    /// Output that the nodes keep, bytes.
    pub kept_bytes: u64,
}

impl fmt::Display for CommandUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { running, kept_bytes } = self;
        write!(f, "{running} commands, {kept_bytes} bytes of output")
    }
}

/// Place of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Node of the sandbox.
    pub node: NodeName,
    /// Team of the sandbox.
    pub team: Team,
    /// Sandbox that it runs in.
    pub sandbox: SandboxId,
    /// Name that its caller chose; `None` for a command that ends with its caller.
    pub exec_id: Option<String>,
}

/// End of a caller's part in a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nothing has run, and nothing will under this call.
    NeverRan,
    /// The command has ended. `false`: its name may run again.
    Ended(bool),
    /// The command may run on.
    MayRun,
}

/// Named command that runs.
#[derive(Debug)]
struct Named {
    /// Callers that started it or repeated its start, and are attached.
    callers: u32,
    /// Time at which the last of them left, or at which a report named it first.
    left: Instant,
}

#[derive(Debug)]
struct OfSandbox {
    team: Team,
    kept_bytes: u64,
    named: BTreeMap<String, Named>,
    /// Commands without a name, each with its caller.
    nameless: u64,
    /// Names of the last commands that ended.
    ended: VecDeque<String>,
}

impl OfSandbox {
    fn new(team: Team) -> Self {
        Self { team, kept_bytes: 0, named: BTreeMap::new(), nameless: 0, ended: VecDeque::new() }
    }

    /// Returns what counts. `away`: the node has been down for long.
    fn used(&self, away: bool) -> CommandUse {
        if away {
            let attached = self.named.values().filter(|named| named.callers > 0).count();
            return CommandUse { running: attached as u64 + self.nameless, kept_bytes: 0 };
        }
        let running = self.named.len() as u64 + self.nameless;
        CommandUse { running, kept_bytes: self.kept_bytes }
    }

    /// Returns true when nothing is known of the sandbox.
    fn is_empty(&self) -> bool {
        self.used(false) == CommandUse::default() && self.ended.is_empty()
    }

    fn remember(&mut self, exec_id: String) {
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(exec_id);
    }
}

#[derive(Debug)]
struct OfNode {
    sandboxes: BTreeMap<SandboxId, OfSandbox>,
    /// Parts of a report that is not whole yet.
    parts: BTreeMap<SandboxId, (u64, Vec<String>)>,
    /// Whether the agent has reported since its last connection.
    reports: bool,
    /// Time of that connection.
    connected: Instant,
    /// Whether the node has been down for `AWAY`.
    away: bool,
}

impl OfNode {
    fn new() -> Self {
        Self {
            sandboxes: BTreeMap::new(),
            parts: BTreeMap::new(),
            reports: false,
            connected: Instant::now(),
            away: false,
        }
    }

    /// Returns true when the agent is of a version that does not report.
    fn is_silent(&self) -> bool {
        !self.reports && self.connected.elapsed() >= SILENT
    }
}

#[derive(Debug, Default)]
struct Index {
    nodes: BTreeMap<NodeName, OfNode>,
    teams: BTreeMap<Team, CommandUse>,
}

impl Index {
    /// Changes the commands of a sandbox, and the sums of its team with them. A sandbox of which
    /// nothing is known any more is removed.
    fn change<T>(
        &mut self,
        node: &NodeName,
        (sandbox, team): (SandboxId, &Team),
        change: impl FnOnce(&mut OfSandbox) -> T,
    ) -> T {
        let of_node = self.nodes.entry(node.clone()).or_insert_with(OfNode::new);
        let away = of_node.away;
        let entry = of_node.sandboxes.entry(sandbox);
        let of_it = entry.or_insert_with(|| OfSandbox::new(team.clone()));
        let before = of_it.used(away);
        let done = change(of_it);
        let (after, team) = (of_it.used(away), of_it.team.clone());
        if of_it.is_empty() {
            of_node.sandboxes.remove(&sandbox);
        }
        self.count(team, before, after);
        done
    }

    /// Changes the sums of a team by the change of a part of them.
    fn count(&mut self, team: Team, before: CommandUse, after: CommandUse) {
        let sum = self.teams.entry(team.clone()).or_default();
        sum.running = sum.running + after.running - before.running;
        sum.kept_bytes = sum.kept_bytes + after.kept_bytes - before.kept_bytes;
        if *sum == CommandUse::default() {
            self.teams.remove(&team);
        }
    }

    /// Notes whether a node has been down for long, and counts its commands so.
    fn set_away(&mut self, node: &NodeName, away: bool) {
        let Some(of_node) = self.nodes.get_mut(node).filter(|of_node| of_node.away != away) else {
            return;
        };
        of_node.away = away;
        let changed = |of_it: &OfSandbox| (of_it.team.clone(), of_it.used(!away), of_it.used(away));
        let changed: Vec<_> = of_node.sandboxes.values().map(changed).collect();
        for (team, before, after) in changed {
            self.count(team, before, after);
        }
    }

    fn of(&self, place: &Place) -> Option<&OfSandbox> {
        self.nodes.get(&place.node)?.sandboxes.get(&place.sandbox)
    }

    fn sandboxes_of(&self, node: &NodeName) -> Vec<(SandboxId, Team)> {
        let sandboxes = self.nodes.get(node).into_iter().flat_map(|of| &of.sandboxes);
        sandboxes.map(|(id, of_it)| (*id, of_it.team.clone())).collect()
    }
}

/// Commands of all sandboxes.
#[derive(Debug, Default)]
pub struct Commands {
    index: Mutex<Index>,
}

/// Part of one caller in a command, which counts until it is ended or dropped.
#[derive(Debug)]
pub struct Running {
    commands: Arc<Commands>,
    place: Place,
    end: End,
    part: Part,
}

/// Kind of a caller's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Began the command.
    Began,
    /// Repeats the start of one that runs.
    Joined,
    /// Repeats the start of one that has ended, which does not count.
    Replays,
}

impl Running {
    /// Ends the caller's part.
    pub fn end(mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let end = match (self.part, self.end) {
            (Part::Replays, _) => return,
            // What ran before it may still run.
            (Part::Joined, End::NeverRan) => End::MayRun,
            (Part::Joined | Part::Began, end) => end,
        };
        self.commands.leave(&self.place, end);
    }
}

impl Commands {
    /// Returns the commands of a team.
    pub fn of_team(&self, team: &Team) -> CommandUse {
        self.index.lock().teams.get(team).copied().unwrap_or_default()
    }

    /// Joins a command that is known to run, or to have ended, under its name. `None` when it is
    /// not known: then it is new.
    pub fn join(self: &Arc<Self>, place: &Place) -> Option<Running> {
        let exec_id = place.exec_id.as_ref()?;
        let mut index = self.index.lock();
        let of_it = index.of(place)?;
        let (runs, ended) = (of_it.named.contains_key(exec_id), of_it.ended.contains(exec_id));
        if runs {
            index.change(&place.node, (place.sandbox, &place.team), |of_it| {
                if let Some(named) = of_it.named.get_mut(exec_id) {
                    named.callers += 1;
                }
            });
        }
        drop(index);
        let part = if runs { Part::Joined } else { Part::Replays };
        (runs || ended).then(|| self.running(place.clone(), part))
    }

    /// Counts a command that a caller starts.
    pub fn begin(self: &Arc<Self>, place: Place) -> Running {
        let owner = (place.sandbox, &place.team);
        self.index.lock().change(&place.node, owner, |of_it| match &place.exec_id {
            Some(exec_id) => {
                let new = || Named { callers: 0, left: Instant::now() };
                of_it.named.entry(exec_id.clone()).or_insert_with(new).callers += 1;
            }
            None => of_it.nameless += 1,
        });
        self.running(place, Part::Began)
    }

    fn running(self: &Arc<Self>, place: Place, part: Part) -> Running {
        Running { commands: Arc::clone(self), place, end: End::MayRun, part }
    }

    fn leave(&self, place: &Place, end: End) {
        let mut index = self.index.lock();
        let of_node = index.nodes.get(&place.node);
        let silent = of_node.is_some_and(OfNode::is_silent);
        // The node may have been forgotten meanwhile.
        if index.of(place).is_none() {
            return;
        }
        index.change(&place.node, (place.sandbox, &place.team), |of_it| {
            let Some(exec_id) = &place.exec_id else {
                of_it.nameless = of_it.nameless.saturating_sub(1);
                return;
            };
            let Some(named) = of_it.named.get_mut(exec_id) else { return };
            named.callers = named.callers.saturating_sub(1);
            named.left = Instant::now();
            let alone = named.callers == 0;
            match end {
                End::Ended(for_good) => {
                    of_it.named.remove(exec_id);
                    if for_good {
                        of_it.remember(exec_id.clone());
                    }
                }
                // Another caller's start under the same name may have run.
                End::NeverRan if alone => drop(of_it.named.remove(exec_id)),
                End::MayRun if alone && silent => drop(of_it.named.remove(exec_id)),
                End::NeverRan | End::MayRun => {}
            }
        });
    }

    /// Applies a report of a node, or a part of one. `lives` returns the team of a sandbox that has
    /// not ended.
    pub fn report(
        &self,
        node: &NodeName,
        report: WatchExecs,
        lives: impl Fn(&SandboxId) -> Option<Team>,
    ) {
        let mut index = self.index.lock();
        let of_node = index.nodes.entry(node.clone()).or_insert_with(OfNode::new);
        of_node.reports = true;
        for told in report.sandboxes {
            if let Ok(id) = told.id.parse()
                && of_node.parts.len() < REPORT_MAX
            {
                of_node.parts.insert(id, (told.kept_bytes, told.running));
            }
        }
        if report.more {
            return;
        }
        let mut told = std::mem::take(&mut of_node.parts);
        for (id, team) in index.sandboxes_of(node) {
            if lives(&id).is_none() {
                told.remove(&id);
                index.change(node, (id, &team), |of_it| of_it.ended.clear());
            }
            told.entry(id).or_default();
        }
        let now = Instant::now();
        for (id, (kept_bytes, running)) in told {
            let team = lives(&id);
            let known = index.nodes.get(node).and_then(|of| of.sandboxes.get(&id));
            let Some(team) = known.map(|known| known.team.clone()).or(team) else { continue };
            index.change(node, (id, &team), |of_it| {
                of_it.kept_bytes = kept_bytes;
                of_it.named.retain(|exec_id, named| {
                    let fresh = now.saturating_duration_since(named.left) < BEHIND;
                    named.callers > 0 || fresh || running.contains(exec_id)
                });
                for exec_id in running {
                    // A name never runs again: the report is behind.
                    if !of_it.ended.contains(&exec_id) {
                        of_it.named.entry(exec_id).or_insert(Named { callers: 0, left: now });
                    }
                }
            });
        }
    }

    /// Records a new connection to a node, whose agent may be of another version now.
    pub fn connected(&self, node: &NodeName) {
        let mut index = self.index.lock();
        let of_node = index.nodes.entry(node.clone()).or_insert_with(OfNode::new);
        of_node.reports = false;
        of_node.connected = Instant::now();
        of_node.parts.clear();
        index.set_away(node, false);
    }

    /// Records that a node has been down for `AWAY`. Until it is connected again, only commands with a caller
    /// count of what it runs.
    pub fn away(&self, node: &NodeName) {
        self.index.lock().set_away(node, true);
    }

    /// Records a sign of life of a node. Of the commands of one that does not report only those with
    /// a caller count. `lives` returns the team of a sandbox that has not ended.
    pub fn beat(&self, node: &NodeName, lives: impl Fn(&SandboxId) -> Option<Team>) {
        let mut index = self.index.lock();
        if !index.nodes.get(node).is_some_and(OfNode::is_silent) {
            return;
        }
        for (id, team) in index.sandboxes_of(node) {
            index.change(node, (id, &team), |of_it| {
                of_it.kept_bytes = 0;
                of_it.named.retain(|_, named| named.callers > 0);
                if lives(&id).is_none() {
                    of_it.ended.clear();
                }
            });
        }
    }

    /// Drops what is known of a node that is forgotten.
    pub fn forget(&self, node: &NodeName) {
        let mut index = self.index.lock();
        for (id, team) in index.sandboxes_of(node) {
            index.change(node, (id, &team), |of_it| *of_it = OfSandbox::new(team.clone()));
        }
        index.nodes.remove(node);
    }

    /// Counts the commands of all teams again; returns the teams whose sums differ, with both.
    pub fn miscounted(&self) -> Vec<(Team, CommandUse, CommandUse)> {
        let index = self.index.lock();
        let mut recount: BTreeMap<Team, CommandUse> = BTreeMap::new();
        let all = index.nodes.values();
        let all = all.flat_map(|of| of.sandboxes.values().map(|of_it| (of_it, of.away)));
        for (of_it, away) in all {
            let (sum, one) = (recount.entry(of_it.team.clone()).or_default(), of_it.used(away));
            sum.running += one.running;
            sum.kept_bytes += one.kept_bytes;
        }
        recount.retain(|_, sum| *sum != CommandUse::default());
        let teams: std::collections::BTreeSet<_> =
            recount.keys().chain(index.teams.keys()).cloned().collect();
        let of = |sums: &BTreeMap<Team, CommandUse>, team: &Team| {
            sums.get(team).copied().unwrap_or_default()
        };
        let both = teams.into_iter().map(|team| {
            let (counted, again) = (of(&index.teams, &team), of(&recount, &team));
            (team, counted, again)
        });
        both.filter(|(_, counted, again)| counted != again).collect()
    }
}

#[cfg(test)]
mod tests;
