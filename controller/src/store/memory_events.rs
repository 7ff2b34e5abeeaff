//! Log of events of the store in memory.

use std::collections::{BTreeMap, BTreeSet};

use proto::{name::Team, sandbox::v1::EventKind};

use super::{Event, EventPage, Filter, HOUR_MS, memory::Tables};

impl Tables {
    /// Appends events that are not there yet; returns the last revision.
    pub(super) fn append(&mut self, events: Vec<Event>) -> u64 {
        for event in events {
            let new = event.once.as_ref().is_none_or(|once| self.once.insert(once.clone()));
            if new {
                self.revision += 1;
                self.events.insert(self.revision, event);
            }
        }
        self.revision
    }

    fn remove_events(&mut self, revisions: &[u64]) {
        for revision in revisions {
            let event = self.events.remove(revision);
            if let Some(once) = event.and_then(|event| event.once) {
                self.once.remove(&once);
            }
        }
    }

    /// Returns the last revision at which a matching event may be no longer kept; 0: all are kept.
    fn gone(&self, filter: &Filter) -> u64 {
        let (mut team, mut before) = (filter.team.clone(), u64::MAX);
        if let Some(sandbox) = &filter.sandbox {
            let first = self.events.iter().find(|(_, event)| event.sandbox == filter.sandbox);
            before = match first {
                Some((_, event)) if event.kind == EventKind::CreateAsked => return 0,
                Some((revision, _)) => revision - 1,
                None => u64::MAX,
            };
            let owner = || self.rows.get(sandbox).map(|row| row.team.clone());
            team = team.or_else(owner).or_else(|| first?.1.team.clone());
        }
        let of = self.gone_of.iter();
        let of = of.filter(|(share, _)| team.is_none() || team == **share);
        of.map(|(_, revision)| *revision).max().unwrap_or_default().min(before)
    }

    /// Returns the matching events after a revision.
    pub(super) fn page(&self, after: u64, filter: &Filter, limit: u32) -> EventPage {
        let gone = self.gone(filter);
        let following = self.events.range(after.saturating_add(1)..);
        let events: Vec<_> = following
            .filter(|(_, event)| filter.admits(event))
            .take(limit as usize)
            .map(|(revision, event)| (*revision, event.clone()))
            .collect();
        let whole = events.len() < limit as usize;
        let seen = match events.last() {
            Some((revision, _)) if !whole => *revision,
            Some(_) | None => self.revision.max(after),
        };
        EventPage { events, gone, seen, whole }
    }

    /// Returns the revision after which so many matching events follow.
    pub(super) fn before_last(&self, filter: &Filter, count: u32) -> u64 {
        let newest = self.events.iter().rev().filter(|(_, event)| filter.admits(event));
        let first = newest.take(count as usize).last();
        first.map_or(self.revision, |(revision, _)| revision - 1)
    }

    /// Returns the hours of the newest events, the latest first.
    pub(super) fn event_hours(&self, newest: u32) -> Vec<u64> {
        let events = self.events.values().rev().take(newest as usize);
        let hours: BTreeSet<u64> = events.map(|event| event.at_ms / HOUR_MS).collect();
        hours.into_iter().rev().collect()
    }

    /// Removes old events; returns their number.
    pub(super) fn prune(&mut self, before_ms: u64, limit: u32) -> u64 {
        let young = self.events.iter().find(|(_, event)| event.at_ms >= before_ms);
        let upto = young.map_or(self.revision, |(revision, _)| revision - 1);
        let old = self.events.range(..=upto).map(|(revision, _)| *revision);
        let removed: Vec<_> = old.take(limit as usize).collect();
        for revision in &removed {
            let share = self.events.get(revision).and_then(|event| event.team.clone());
            self.gone_of.insert(share, *revision);
        }
        self.remove_events(&removed);
        removed.len() as u64
    }

    /// Removes the oldest events of a team, or of no team.
    pub(super) fn drop_oldest(&mut self, share: Option<Team>, count: u32) {
        let of_share = self.events.iter().filter(|(_, event)| event.team == share);
        let removed: Vec<_> =
            of_share.map(|(revision, _)| *revision).take(count as usize).collect();
        if let Some(last) = removed.last() {
            self.gone_of.insert(share, *last);
        }
        self.remove_events(&removed);
    }

    /// Counts the events of each team. Those of no team come last, as from SQL.
    pub(super) fn counts(&self) -> Vec<(Option<Team>, u64)> {
        let mut counts = BTreeMap::<_, u64>::new();
        for event in self.events.values() {
            *counts.entry(event.team.clone()).or_default() += 1;
        }
        let of_nodes = counts.remove(&None).map(|count| (None, count));
        counts.into_iter().chain(of_nodes).collect()
    }
}
