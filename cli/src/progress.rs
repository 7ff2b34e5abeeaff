//! A spinner or a progress bar on stderr, for a person who waits at a terminal.

use std::{
    io::{self, IsTerminal},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::printable::one_line;

/// Spinner, or nothing when stderr is no terminal.
#[derive(Debug)]
pub struct Spinner(Option<ProgressBar>);

impl Spinner {
    /// Starts the spinner.
    pub fn new(json: bool, message: impl Into<String>) -> Self {
        if json || !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(one_line(&message.into()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(Some(bar))
    }

    /// Whether the spinner is visible.
    pub fn shown(&self) -> bool {
        self.0.is_some()
    }

    /// Shows the present activity.
    pub fn say(&self, message: impl Into<String>) {
        if let Some(bar) = &self.0 {
            bar.set_message(one_line(&message.into()));
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Progress of a copy, drawn only on a terminal.
#[derive(Debug, Clone)]
pub struct Bar {
    bar: Option<ProgressBar>,
    bytes: Arc<AtomicU64>,
}

impl Bar {
    /// Starts the bar, with `total` if it is known.
    pub fn new(json: bool, message: impl Into<String>, total: Option<u64>) -> Self {
        let bytes = Arc::new(AtomicU64::new(0));
        if json || !io::stderr().is_terminal() {
            return Self { bar: None, bytes };
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let template = match total {
            Some(_) => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
            None => "{spinner} {msg} {bytes} {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(one_line(&message.into()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar: Some(bar), bytes }
    }

    /// Adds copied bytes.
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    /// Removes the bar and returns the number of bytes.
    pub fn done(self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
