//! The ingress: the real Caddy with the rendered configuration, the agent's real route server over
//! a table in memory, and sandboxes that may be hostile. Everything is on addresses of loopback that
//! no other run has.
//!
//! Needs Debian's `caddy`; `PVE_SANDBOX_CADDY` names another binary.
//! `PVE_SANDBOX_SKIP_INGRESS_TESTS=1` skips, and says so.

mod bodies;
mod dead;
mod hide;
mod hosts;
mod http;
mod isolation;
mod node;
mod peers;
mod render;
mod restart;
mod sandbox;
mod spoof;
mod wake;
mod websocket;
