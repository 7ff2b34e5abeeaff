//! The order in which the reports of several nodes arrive does not matter.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::*;

const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

/// Reports of one node, in the order of its journal.
#[derive(Debug, Default, Clone)]
struct Stream {
    reports: Vec<Sandbox>,
    /// Number of the first reports that calls may also have answered with. An answer may arrive
    /// after any later report, but no call is under way on a sandbox that is moved.
    answered: usize,
}

/// Outcome of an attempt that the controller has left behind.
#[derive(Debug, Clone, Copy)]
enum Abandoned {
    Failed,
    Cancelled,
    /// Alive until its node is told to cancel it.
    Alive,
}

/// Life of one sandbox, as agents can report it: at most one of its attempts goes on, and only that
/// one is moved. It is moved once at most: the controller moves a sandbox from the node that it
/// knows it on, so it has heard the end of one move before it begins another. What is released is
/// neither moved nor retried: an operator may take up a released container with any attempt, so
/// whatever is alive then counts.
#[derive(Debug, Clone)]
struct Story {
    abandoned: Vec<Abandoned>,
    /// Phases that the last attempt goes through.
    phases: Vec<Phase>,
    /// Whether it moves, whether its node notices first that the container is gone, and the phases
    /// that follow.
    moves: Option<(bool, Vec<Phase>)>,
    end: Option<Cause>,
}

impl Story {
    /// Returns the reports by node. Attempts are on nodes of their own, as is a moved sandbox.
    fn streams(&self) -> Vec<(NodeName, Stream)> {
        let mut streams: Vec<_> = NODES.map(|name| (node(name), Stream::default())).into();
        for (at, outcome) in self.abandoned.iter().enumerate() {
            let (name, stream) = &mut streams[at];
            let phases: &[Phase] = match outcome {
                Abandoned::Failed => &[Phase::Creating, Phase::Failed],
                Abandoned::Cancelled => &[Phase::Creating, Phase::Deleted],
                Abandoned::Alive => &[Phase::Creating, Phase::Running],
            };
            stream.reports = self.reports(at + 1, name, phases);
            stream.answered = stream.reports.len();
        }
        let (first, second) = (self.abandoned.len(), self.abandoned.len() + 1);
        let mut phases = self.phases.clone();
        phases.extend(self.end.filter(|_| self.moves.is_none()).map(|_| Phase::Deleted));
        let mut reports = self.reports(second, &streams[first].0, &phases);
        let answered = if self.moves.is_some() { 0 } else { reports.len() };
        if let Some((gone, then)) = &self.moves {
            let there = streams[second].0.clone();
            let mut then = then.clone();
            then.extend(self.end.map(|_| Phase::Deleted));
            reports.extend(self.departure(&streams[first].0, &there, *gone, reports.len()));
            streams[second].1.reports = self.reports(second, &there, &then);
        }
        streams[first].1 = Stream { reports, answered };
        streams
    }

    /// Returns the last reports of a node that the sandbox leaves, after `last` others.
    fn departure(&self, from: &NodeName, to: &NodeName, gone: bool, last: usize) -> Vec<Sandbox> {
        let attempt = self.abandoned.len() + 1;
        let stopped = self.report(attempt, from.as_str(), Phase::Stopped);
        let failure = Failure { reason: Reason::ContainerGone.into(), ..Failure::default() };
        let noticed = Sandbox { failure: Some(failure), ..stopped.clone() };
        let mut left = self.report(attempt, to.as_str(), Phase::Deleted);
        left.set_cause(Cause::Moved);
        let reports = [Some(stopped), gone.then_some(noticed), Some(left)];
        let revisions = last as u64 + 1..;
        reports
            .into_iter()
            .flatten()
            .zip(revisions)
            .map(|(report, revision)| Sandbox { revision, ..report })
            .collect()
    }

    fn reports(&self, attempt: usize, node: &NodeName, phases: &[Phase]) -> Vec<Sandbox> {
        let reports = phases.iter().zip(1..).map(|(phase, revision)| Sandbox {
            revision,
            ..self.report(attempt, node.as_str(), *phase)
        });
        reports.collect()
    }

    fn report(&self, attempt: usize, node: &str, phase: Phase) -> Sandbox {
        let attempt = u32::try_from(attempt).expect("few");
        let last = attempt as usize > self.abandoned.len() && phase == Phase::Deleted;
        let cause = self.end.filter(|_| last).unwrap_or(Cause::ASKED);
        Sandbox { attempt, node: node.into(), cause: cause.into(), ..sandbox(1, phase, 0) }
    }
}

fn lives() -> impl Strategy<Value = Vec<Phase>> {
    vec(
        prop::sample::select(vec![Phase::Running, Phase::Paused, Phase::Stopping, Phase::Stopped]),
        1..4,
    )
}

fn story() -> impl Strategy<Value = Story> {
    use Abandoned::{Alive, Cancelled, Failed};
    let abandoned = vec(prop::sample::select(vec![Failed, Cancelled, Alive]), 0..3);
    let end = prop::sample::select(vec![None, Some(Cause::ASKED), Some(Cause::Ttl)]);
    let moves = prop::option::of((any::<bool>(), lives()));
    let any_end = (abandoned, lives(), moves, end)
        .prop_map(|(abandoned, phases, moves, end)| Story { abandoned, phases, moves, end });
    let released = lives().prop_map(|phases| Story {
        abandoned: Vec::new(),
        phases,
        moves: None,
        end: Some(Cause::Released),
    });
    prop_oneof![4 => any_end, 1 => released]
}

/// Merges the streams: each choice takes the next report of one of them, or repeats an answer.
fn interleave(story: &Story, choices: &[Index]) -> Vec<(NodeName, Sandbox)> {
    let streams = story.streams();
    let mut taken = vec![0; streams.len()];
    let mut merged = Vec::new();
    let mut choices = choices.iter().cycle();
    while let Some(choice) = choices.next() {
        let open: Vec<usize> =
            (0..streams.len()).filter(|at| taken[*at] < streams[*at].1.reports.len()).collect();
        if open.is_empty() {
            break;
        }
        let at = open[choice.index(open.len())];
        let (name, stream) = &streams[at];
        merged.push((name.clone(), stream.reports[taken[at]].clone()));
        taken[at] += 1;
        let answers = taken[at].min(stream.answered);
        if let Some(again) = choices.next().filter(|_| answers > 0) {
            merged.push((name.clone(), stream.reports[again.index(answers)].clone()));
        }
    }
    merged
}

/// Returns the inventory after these reports. A record of another node means nothing any more once
/// the sandbox has ended.
fn inventory_after(reports: &[(NodeName, Sandbox)]) -> Vec<Entry> {
    let cache = Cache::default();
    for (from, report) in reports {
        apply(&cache, from, report.clone());
    }
    let mut all = cache.all();
    for entry in all.iter_mut().filter(|entry| entry.ended()) {
        entry.elsewhere = None;
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn reports_in_any_order_lead_to_the_same_inventory(
        story in story(),
        first in vec(any::<Index>(), 1..40),
        second in vec(any::<Index>(), 1..40),
    ) {
        let (first, second) = (interleave(&story, &first), interleave(&story, &second));
        prop_assert_eq!(inventory_after(&first), inventory_after(&second), "{:#?}", (first, second));
    }
}
