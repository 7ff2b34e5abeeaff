//! Infrastructure of every daemon: configuration, logs, TLS, listening, stopping, and the form of
//! errors on the wire. No domain.

pub mod chain;
pub mod channel;
pub mod config;
pub mod flow;
pub mod listen;
pub mod logs;
pub mod peer;
pub mod shares;
pub mod status;
pub mod stop;
pub mod tls;
