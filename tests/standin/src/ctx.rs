//! Context of a command: paths, signals, fault points, output.

use std::cell::Cell;
use std::io::{self, Write};

use rustix::process::Pid;

use crate::cost::{self, Part};
use crate::failure::{Failure, Result};
use crate::faults::When;
use crate::faults::act;
use crate::roots::Roots;
use crate::signals::Signals;

/// The command and its containers; fault rules are matched against them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Subject {
    pub(crate) command: String,
    pub(crate) vmid: Option<u32>,
    pub(crate) template: Option<u32>,
}

/// Context of one call.
#[derive(Debug)]
pub(crate) struct Ctx {
    pub(crate) roots: Roots,
    pub(crate) node: String,
    pub(crate) subject: Subject,
    /// Caught signals: present in a worker, and in a parent that waits for one.
    pub(crate) signals: Option<Signals>,
    /// Process that started this worker.
    pub(crate) parent: Option<Pid>,
    /// Set by a fault: the locks in the configurations stay.
    pub(crate) leave_lock: Cell<bool>,
    /// Set during an undo, which ignores signals and runs to its end.
    deaf: Cell<bool>,
}

impl Ctx {
    /// Creates the context of a parent, before anything has begun.
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

    /// Returns the signals that can interrupt a wait now.
    pub(crate) fn signals(&self) -> Option<&Signals> {
        self.signals.as_ref().filter(|_| !self.deaf.get())
    }

    /// Runs an undo, which neither a signal nor a closed stdout interrupts.
    pub(crate) fn undo<T>(&self, run: impl FnOnce() -> T) -> T {
        let before = self.deaf.replace(true);
        let done = run();
        self.deaf.set(before);
        done
    }

    /// Runs a step between its two fault points.
    pub(crate) fn step<T>(&self, name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        act::point(self, name, When::Before)?;
        let done = run()?;
        act::point(self, name, When::After)?;
        Ok(done)
    }

    /// Passes a single fault point.
    pub(crate) fn point(&self, name: &str) -> Result {
        act::point(self, name, When::Before)
    }

    /// Prints a line on stdout. A closed reader ends the command; a full disk does not.
    pub(crate) fn say(&self, line: &str) -> Result {
        self.heard(write_line(&mut io::stdout(), line))
    }

    /// Prints a line on stderr, which is stdout in a worker.
    pub(crate) fn warn(&self, line: &str) -> Result {
        self.heard(write_line(&mut io::stderr(), line))
    }

    fn heard(&self, written: Result) -> Result {
        if self.deaf.get() { Ok(()) } else { written }
    }

    /// Waits like a tool that opens an unmounted raw volume: prints its name, then sleeps, unless a
    /// signal comes. Does nothing where volumes are subvolumes.
    pub(crate) fn wait_for_mmp(&self, tool: &str) -> Result {
        match cost::mmp(&self.roots.control_dir) {
            Some(wait) => {
                self.say(tool)?;
                act::sleep(self, wait)
            }
            None => Ok(()),
        }
    }

    /// Burns the CPU of a part of the real `pct`.
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
