//! Reports progress: a spinner with a clock on a terminal, plain lines elsewhere.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// Shortest step whose time is printed: for shorter ones the number says nothing.
const WORTH_TIMING: Duration = Duration::from_millis(100);

/// A running step, which can report its progress.
#[derive(Debug)]
pub struct Step {
    bar: Option<ProgressBar>,
    what: String,
}

impl Step {
    /// Reports the progress of the step; only on a terminal, so that logs stay short.
    pub fn note(&self, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {note}", self.what));
        }
    }
}

/// Runs a step and reports it with the time that it took. An error carries the step's name.
pub fn step<T>(what: &str, work: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = stderr().is_terminal().then(|| spinner(what));
    if bar.is_none() {
        say(&format!("  {what} ..."));
    }
    let step = Step { bar, what: what.to_owned() };
    let result = work(&step);
    if let Some(bar) = &step.bar {
        bar.finish_and_clear();
    }
    let took = started.elapsed();
    match &result {
        Ok(_) if took >= WORTH_TIMING => say(&format!("  {what}: {:.1} s", took.as_secs_f64())),
        Ok(_) if step.bar.is_some() => say(&format!("  {what}")),
        Ok(_) | Err(_) => {}
    }
    result.with_context(|| format!("{what}: failed"))
}

/// Prints a line for the user.
pub fn say(line: &str) {
    // A closed terminal must not end the work.
    let _unheard = writeln!(stderr(), "{line}");
}

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
