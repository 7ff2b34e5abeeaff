//! The ingress: the real Caddy with the rendered configuration, the agent's real route server over
//! an in-memory table, and sandboxes that may be hostile. All addresses are on the loopback and
//! differ between runs.
//!
//! Needs Debian's `caddy`; `PVE_SANDBOX_CADDY` names another binary.
//! `PVE_SANDBOX_SKIP_INGRESS_TESTS=1` skips the tests, with a message.

mod access;
mod access_log;
mod acme;
mod answers;
mod blue_green;
mod bodies;
mod browser;
mod corpora;
mod dead;
mod doctor;
mod hide;
mod hosts;
mod http;
mod http2;
mod idle;
mod isolation;
mod metrics;
mod node;
mod own_certificate;
mod pages;
mod peers;
mod program;
mod render;
mod restart;
mod reuse;
mod sandbox;
mod spoof;
mod streams;
mod wake;
mod websocket;
