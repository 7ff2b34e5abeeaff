//! The shipped program against a controller that runs in this process: what it prints, and the
//! exit codes that scripts rely on.
#![expect(clippy::disallowed_methods, reason = "the program under test is a process")]

mod cp;
mod events;
mod exec;
mod fake;
mod files;
mod help;
mod session;
mod verbs;
