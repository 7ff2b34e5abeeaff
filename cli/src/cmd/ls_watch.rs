//! `ls --watch`: the list as it changes: drawn again on a terminal, elsewhere a line for each change.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{IsTerminal, stdout},
    time::Duration,
};

use proto::sandbox::v1::{Phase, Sandbox, WatchSandboxesRequest, WatchSandboxesResponse};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::{
    filter,
    ls::{Ls, line, table},
};
use crate::{
    client::{Controller, fetch, read},
    exit,
    failure::Failure,
    output::Output,
};

/// Shortest time between two drawings.
const DRAW: Duration = Duration::from_millis(200);
/// Longest time between them: ages grow without a change.
const DRAW_AGAIN: Duration = Duration::from_secs(2);
/// Pause before a broken watch is opened again.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest absence of the controller while watching.
const PATIENCE: Duration = Duration::from_secs(60);
/// Silence that counts as a broken connection: the controller sends a heartbeat every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

/// Shows the list until Ctrl-C.
pub(super) async fn run(controller: Controller, ls: Ls, output: Output) -> Result<u8, Failure> {
    let output = ls.form(output);
    let mut view = View {
        live: stdout().is_terminal() && !output.json && !output.names,
        drawn: None,
        list: List::default(),
        ls: &ls,
        output,
    };
    // Time at which the connection broke; none before the first message.
    let (mut heard, mut broken) = (false, None);
    loop {
        let failure = match view.follow(&controller, &mut heard, &mut broken).await {
            Err(failure) => failure,
            Ok(()) => Failure {
                transient: true,
                exit: exit::NOT_NOW,
                ..Failure::local("the controller ended the watch of the sandboxes")
            },
        };
        if !failure.transient || !heard {
            return Err(failure);
        }
        let since = *broken.get_or_insert_with(|| {
            output.note("connection lost, trying again");
            Instant::now()
        });
        if since.elapsed() > PATIENCE {
            return Err(failure);
        }
        sleep(AGAIN).await;
    }
}

/// List on a terminal or in a pipe.
struct View<'a> {
    live: bool,
    /// Time of the last drawing; none while something changed since.
    drawn: Option<Instant>,
    list: List,
    ls: &'a Ls,
    output: Output,
}

impl View<'_> {
    async fn follow(
        &mut self,
        controller: &Controller,
        heard: &mut bool,
        broken: &mut Option<Instant>,
    ) -> Result<(), Failure> {
        let request = WatchSandboxesRequest { filter: Some(self.ls.watched()) };
        let call = || {
            let (mut client, request) = (controller.sandboxes.clone(), request.clone());
            async move { client.watch_sandboxes(request).await }
        };
        let mut messages = read(call).await?;
        self.list.begin();
        let mut ticks = interval(DRAW);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                message = messages.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    last = Instant::now();
                    (*heard, *broken) = (true, None);
                    self.take(message)?;
                    self.tell_missing(controller).await?;
                }
                _ = ticks.tick() => {
                    if last.elapsed() > SILENCE {
                        return Err(Failure::deadline("the controller sent nothing", SILENCE));
                    }
                    self.draw()?;
                }
            }
        }
    }

    fn take(&mut self, message: WatchSandboxesResponse) -> Result<(), Failure> {
        let synced = message.synced;
        let wanted =
            message.sandbox.as_ref().is_none_or(|one| filter::matches(&self.ls.filter, one));
        let changed = if wanted { self.list.take(message) } else { self.list.leave(message) };
        if !changed.is_empty() || synced {
            self.drawn = None;
        }
        if self.live {
            return Ok(());
        }
        changed.iter().try_for_each(|sandbox| line(sandbox, self.ls, self.output))
    }

    /// Tells what became of those that a new watch did not name: they ended, or are not wanted any more.
    async fn tell_missing(&mut self, controller: &Controller) -> Result<(), Failure> {
        for mut sandbox in std::mem::take(&mut self.list.missing) {
            if self.live {
                continue;
            }
            match fetch(controller, sandbox.id.clone()).await {
                Ok(now) => sandbox = now,
                Err(failure) if failure.exit == exit::NOT_FOUND => {
                    sandbox.phase = Phase::Deleted.into();
                }
                Err(failure) => return Err(failure),
            }
            line(&sandbox, self.ls, self.output)?;
        }
        Ok(())
    }

    fn draw(&mut self) -> Result<(), Failure> {
        let due = self.drawn.is_none_or(|at| at.elapsed() >= DRAW_AGAIN);
        if !self.live || !self.list.synced || !due {
            return Ok(());
        }
        self.drawn = Some(Instant::now());
        let sandboxes: Vec<_> = self.list.known.values().cloned().collect();
        self.ls.listing.draw(self.output, table(&sandboxes))
    }
}

/// Sandboxes that are listed now.
#[derive(Default)]
struct List {
    known: BTreeMap<String, Sandbox>,
    /// Those that a new watch has not named yet.
    unseen: BTreeSet<String>,
    /// Those that it has not named at all, as they were.
    missing: Vec<Sandbox>,
    /// Whether the watch has named all.
    synced: bool,
}

impl List {
    /// Begins a watch, which names all sandboxes first.
    fn begin(&mut self) {
        self.unseen = self.known.keys().cloned().collect();
    }

    /// Takes a message; returns the sandboxes that are not as they were.
    fn take(&mut self, message: WatchSandboxesResponse) -> Vec<Sandbox> {
        let mut changed = Vec::new();
        if let Some(sandbox) = message.sandbox {
            self.unseen.remove(&sandbox.id);
            let before = match message.gone {
                true => self.known.remove(&sandbox.id),
                false => self.known.insert(sandbox.id.clone(), sandbox.clone()),
            };
            let state = |one: &Sandbox| (one.revision, one.phase, one.progress);
            if message.gone || before.as_ref().map(state) != Some(state(&sandbox)) {
                changed.push(sandbox);
            }
        }
        if message.synced {
            self.synced = true;
            // They left the list while there was no connection.
            let gone = std::mem::take(&mut self.unseen);
            self.missing.extend(gone.iter().filter_map(|id| self.known.remove(id)));
        }
        changed
    }

    /// Takes a message about a sandbox that only we do not want: it leaves the list, if it was there.
    fn leave(&mut self, message: WatchSandboxesResponse) -> Vec<Sandbox> {
        let listed = message.sandbox.as_ref().is_some_and(|one| self.known.contains_key(&one.id));
        match listed {
            true => self.take(WatchSandboxesResponse { gone: true, ..message }),
            false => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(list: &mut List, id: &str, revision: u64, gone: bool) -> usize {
        let sandbox = Some(Sandbox { id: id.into(), revision, ..Sandbox::default() });
        list.take(WatchSandboxesResponse { sandbox, gone, synced: false }).len()
    }

    /// Ids of those that the watch has not named.
    fn synced(list: &mut List) -> Vec<String> {
        let changed = list.take(WatchSandboxesResponse { synced: true, ..Default::default() });
        assert!(changed.is_empty());
        std::mem::take(&mut list.missing).into_iter().map(|one| one.id).collect()
    }

    #[test]
    fn watch_reports_what_changed_and_what_went() {
        let mut list = List::default();
        list.begin();
        assert_eq!(told(&mut list, "a", 1, false), 1);
        assert_eq!(told(&mut list, "b", 1, false), 1);
        assert!(synced(&mut list).is_empty());
        assert_eq!(told(&mut list, "a", 1, false), 0, "as it was");
        assert_eq!(told(&mut list, "a", 2, false), 1);
        assert_eq!(told(&mut list, "c", 1, false), 1);
        assert_eq!(told(&mut list, "c", 2, true), 1);
        // The connection broke; the next watch names what is there.
        list.begin();
        assert_eq!(told(&mut list, "b", 1, false), 0);
        assert_eq!(synced(&mut list), ["a"]);
        assert_eq!(list.known.len(), 1);
    }
}
