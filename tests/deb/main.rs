//! Installs, starts and removes each Debian package in a Debian root of its own; and all of them together
//! on a node of Debian 12 and one of Debian 13, from the first command to the last, and as the documents say it; and
//! on a cluster of two nodes.
//!
//! Opt-in: PVE_SANDBOX_DEB_TESTS=1, as root, with the packages of `make deb` in target/debian.
//! PROFILE is the cargo profile that the packages were built with (`dist` by default): it must be the same here.
//! PVE_SANDBOX_NEXT_AGENT is an agent's program of the next version, to which the tests of upgrades replace this one.
#![expect(clippy::disallowed_methods, reason = "dpkg and the daemons are processes")]

mod booted;
mod built;
mod capabilities;
mod cluster;
mod ctl;
mod daemons;
mod documents;
mod https;
mod node;
mod packages;
#[path = "../docs/procedures.rs"]
mod procedures;
mod removal;
mod repository;
mod root;
mod sandboxctl;
mod steps;
mod streams;
mod tunnel;
mod web;

/// Returns whether these tests were requested, and prints a message if not.
fn wanted() -> bool {
    let wanted = std::env::var("PVE_SANDBOX_DEB_TESTS").is_ok_and(|value| value == "1");
    if !wanted {
        eprintln!("skipped: set PVE_SANDBOX_DEB_TESTS=1 to install the packages in Debian roots");
    }
    wanted
}
