//! Values of `Sandbox.cause`: why a phase changed when nobody asked the node to. Empty otherwise.

/// The time to live ended.
pub const TTL: &str = "ttl";
/// The sandbox was idle.
pub const IDLE: &str = "idle";
/// The sandbox was paused or stopped for too long.
pub const KEPT_TOO_LONG: &str = "kept_too_long";
/// The container was found stopped.
pub const FOUND_DOWN: &str = "found_down";
/// The container was found running.
pub const FOUND_UP: &str = "found_up";
/// The node was rebooted while the sandbox ran.
pub const NODE_REBOOTED: &str = "node_rebooted";
/// The container was released and stays as it is.
pub const RELEASED: &str = "released";
/// An operator gave up the node.
pub const NODE_LOST: &str = "node_lost";
/// The container moved to another node, and the sandbox continues there.
pub const MOVED: &str = "moved";
