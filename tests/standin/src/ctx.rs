//! What every command has at hand.

use std::cell::Cell;
use std::io::{self, Write};

use rustix::process::Pid;

use crate::cost::{self, Part};
use crate::failure::{Failure, Result};
use crate::faults::When;
use crate::faults::act;
use crate::roots::Roots;
use crate::signals::Signals;

/// Which command this is and on what it works; fault rules are matched against it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Subject {
    pub(crate) command: String,
    pub(crate) vmid: Option<u32>,
    pub(crate) template: Option<u32>,
}

/// The surroundings of one call.
#[derive(Debug)]
pub(crate) struct Ctx {
    pub(crate) roots: Roots,
    pub(crate) node: String,
    pub(crate) subject: Subject,
    /// Present in a worker, and in a parent that waits for one.
    pub(crate) signals: Option<Signals>,
    /// In a worker: the process that started it.
    pub(crate) parent: Option<Pid>,
    /// A fault wants the locks in the configurations to stay.
    pub(crate) leave_lock: Cell<bool>,
    /// What is being undone is undone to the end, whoever asks to stop.
    deaf: Cell<bool>,
}

impl Ctx {
    /// The surroundings of a parent, before anything has begun.
    pub(crate) fn new(roots: Roots, node: String, subject: Subject) -> Self {
        Self {
            roots,
            node,
            subject,
            signals: None,
            parent: None,
            leave_lock: Cell::new(false),
            deaf: Cell::new(false),
        }
    }

    /// The signals that cut a wait short now.
    pub(crate) fn signals(&self) -> Option<&Signals> {
        self.signals.as_ref().filter(|_| !self.deaf.get())
    }

    /// Undoes something; no signal stops it, no reader's going does either.
    pub(crate) fn undo<T>(&self, run: impl FnOnce() -> T) -> T {
        let before = self.deaf.replace(true);
        let done = run();
        self.deaf.set(before);
        done
    }

    /// Runs a step with its two fault points around it.
    pub(crate) fn step<T>(&self, name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        act::point(self, name, When::Before)?;
        let done = run()?;
        act::point(self, name, When::After)?;
        Ok(done)
    }

    /// A single fault point.
    pub(crate) fn point(&self, name: &str) -> Result {
        act::point(self, name, When::Before)
    }

    /// Says a line on stdout. A reader that has gone ends the command; a full disk does not.
    pub(crate) fn say(&self, line: &str) -> Result {
        self.heard(write_line(&mut io::stdout(), line))
    }

    /// Says a line on stderr, which is stdout in a worker.
    pub(crate) fn warn(&self, line: &str) -> Result {
        self.heard(write_line(&mut io::stderr(), line))
    }

    fn heard(&self, written: Result) -> Result {
        if self.deaf.get() { Ok(()) } else { written }
    }

    /// Waits as a tool does that looks at an unmounted raw volume: says its name, then sleeps, unless a
    /// signal comes. Nothing where volumes are subvolumes.
    pub(crate) fn wait_for_mmp(&self, tool: &str) -> Result {
        match cost::mmp(&self.roots.control_dir) {
            Some(wait) => {
                self.say(tool)?;
                act::sleep(self, wait)
            }
            None => Ok(()),
        }
    }

    /// Pays for a part of the real one's cost.
    pub(crate) fn pay(&self, part: Part<'_>) {
        cost::pay(&self.roots.control_dir, part);
    }
}

fn write_line(out: &mut impl Write, line: &str) -> Result {
    let written = writeln!(out, "{line}").and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::broken_pipe()),
        Ok(()) | Err(_) => Ok(()),
    }
}
