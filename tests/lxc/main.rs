//! End-to-end tests on the lab: real LXC, the shipped daemons, `sandboxctl` as a user runs it. They
//! need a running lab (`make test-lab` starts one) and leave it as it was; every test ends with a
//! check that the foreign container is unchanged.
//!
//! Without a lab these tests fail. `PVE_SANDBOX_SKIP_LAB_TESTS=1` skips them, with a message.

#![expect(
    clippy::disallowed_methods,
    reason = "the bans are for the daemons; tests start programs and wait for the real clock"
)]

mod address;
mod allow_list;
mod audit;
mod bad_input;
mod crash;
mod create_failure;
mod egress;
mod events;
mod foreign;
mod forward;
mod history;
mod http;
mod ingress;
mod inside;
mod isolation;
mod kills;
mod lifetime;
mod limits;
mod local;
mod login;
mod names;
mod nodes;
mod operations;
mod operator;
mod parallel;
mod pause;
#[expect(dead_code, reason = "tests/deb follows the other pages")]
#[path = "../docs/procedures.rs"]
mod procedures;
mod recover;
mod resize;
mod secrets;
mod shims;
mod ssh;
mod stalls;
mod stop;
mod stuck;
mod template;
mod tools;
mod verbs;
mod world;
