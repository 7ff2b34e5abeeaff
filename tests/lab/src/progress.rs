//! Says what goes on: a spinner with a clock on a terminal, plain lines elsewhere.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// Steps shorter than this are not timed: the number would say nothing.
const WORTH_TIMING: Duration = Duration::from_millis(100);

/// A step under way, for a word on how far it is.
#[derive(Debug)]
pub struct Step {
    bar: Option<ProgressBar>,
    what: String,
}

impl Step {
    /// Says how far the step is; on a terminal only, so that logs stay short.
    pub fn note(&self, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {note}", self.what));
        }
    }
}

/// Does a step and says that it did, with the time that it took. A failure carries the step's name.
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

/// Prints a line for the person who watches.
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
