//! The shipped program against a controller that runs in this process: what it prints, and the
//! exit codes that scripts rely on.
#![expect(clippy::disallowed_methods, reason = "the program under test is a process")]

mod attach;
mod audit;
mod care;
mod contexts;
mod copying;
mod cp;
mod doctor;
mod events;
mod exec;
mod fake;
mod files;
mod first_use;
mod forward;
mod help;
mod session;
mod short;
mod ssh;
mod terminal;
mod verbs;
mod whole;
