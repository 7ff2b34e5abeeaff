//! Cloudflare Tunnel in front of the nodes' Caddys: one tunnel, a connector (cloudflared) on each node, and a
//! wildcard DNS record that leads to it.
//!
//! `setup`, `teardown` and `probe` are commands of an operator (`command`) with a token for Cloudflare's API (`api`). `look` sees
//! the tunnel. Pure are `judge`, which judges what was seen, `record`, which decides what becomes of DNS records,
//! and `render`, which says what cloudflared reads. `node` holds this node's files and its unit. The agent runs
//! `keep`: cloudflared's configuration follows the agent's settings, and a change by hand is put back. No token is
//! kept: the agent never calls Cloudflare.

pub mod api;
pub mod args;
pub mod command;
pub mod credentials;
pub mod ids;
pub mod judge;
pub mod keep;
pub mod look;
pub mod node;
pub mod probe;
pub mod record;
pub mod render;
pub mod settings;
pub mod setup;
pub mod teardown;
pub mod teller;

/// Unit of the connector.
pub const UNIT: &str = "pve-sandbox-tunnel";
/// First part of the names of our tunnels, and of the comments of our DNS records.
pub const MARK: &str = "pve-sandbox";
/// Exit code of the commands when this node has no cloudflared.
pub const NO_CLOUDFLARED: u8 = 3;
