//! Logs to stderr, where systemd and the lab collect them.

use tracing_subscriber::{EnvFilter, fmt, prelude::*};

/// Starts logging. `RUST_LOG` overrides `default_filter`; `json` writes one object a line. A second
/// call changes nothing, so that tests may call it freely.
pub fn init(default_filter: &str, json: bool) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let registry = tracing_subscriber::registry().with(filter);
    let started = if json {
        registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_ansi(false).with_writer(std::io::stderr)).try_init()
    };
    if started.is_err() {
        tracing::debug!("logging is already started");
    }
}
