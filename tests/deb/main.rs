//! Installs, starts and removes each Debian package once in its own Debian 12 root.
//!
//! Opt-in: PVE_SANDBOX_DEB_TESTS=1, as root, with the packages of `make deb` in target/debian.
#![expect(clippy::disallowed_methods, reason = "dpkg and the daemons are processes")]

mod daemons;
mod root;
mod sandboxctl;

/// Returns whether these tests were requested, and prints a message if not.
fn wanted() -> bool {
    let wanted = std::env::var("PVE_SANDBOX_DEB_TESTS").is_ok_and(|value| value == "1");
    if !wanted {
        eprintln!(
            "skipped: set PVE_SANDBOX_DEB_TESTS=1 to install the packages in a Debian 12 root"
        );
    }
    wanted
}
