//! End to end on the lab: real LXC, the shipped daemons, `sandboxctl` as a user runs it. Needs a
//! lab that is up (`make test-lab` sees to that) and leaves it as it was; every test ends with a
//! check that the foreign container is the one it was before.
//!
//! Without a lab these tests fail. `PVE_SANDBOX_SKIP_LAB_TESTS=1` skips them, and says so.

#![expect(
    clippy::disallowed_methods,
    reason = "the bans are for the daemons; tests start programs and wait for the real clock"
)]

mod address;
mod bad_input;
mod crash;
mod create_failure;
mod events;
mod foreign;
mod history;
mod http;
mod ingress;
mod inside;
mod kills;
mod lifetime;
mod nodes;
mod operator;
mod parallel;
mod pause;
mod recover;
mod shims;
mod stalls;
mod stuck;
mod verbs;
mod world;
