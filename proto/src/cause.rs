//! Why a sandbox is in its phase, where nobody asked its node for it: `Sandbox.cause`. Empty otherwise.

/// Its time to live was over.
pub const TTL: &str = "ttl";
/// Nobody used it.
pub const IDLE: &str = "idle";
/// It had been paused or stopped for too long.
pub const KEPT_TOO_LONG: &str = "kept_too_long";
/// It was found down.
pub const FOUND_DOWN: &str = "found_down";
/// It was found running.
pub const FOUND_UP: &str = "found_up";
/// Its node was rebooted while it ran.
pub const NODE_REBOOTED: &str = "node_rebooted";
/// Its container was let go, and is left as it is.
pub const RELEASED: &str = "released";
/// Its node was given up.
pub const NODE_LOST: &str = "node_lost";
/// Its container went to another node, and the sandbox with it: it goes on there.
pub const MOVED: &str = "moved";
