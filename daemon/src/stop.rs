//! Readiness and shutdown as systemd expects them.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Returns a token that SIGTERM or SIGINT cancels.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn signal_token() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("daemon is stopping");
        token.cancel();
    });
    Ok(stop)
}

/// Tells systemd that the daemon is ready; does nothing when systemd did not start it.
pub fn ready(status: &str) {
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(status)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!(%error, "could not report readiness to systemd");
    }
}
