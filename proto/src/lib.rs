//! The wire: generated messages and services, and the validated values that both sides of it use.
//!
//! Code map: `id` holds the identities, `name` the other names, `spec` what a caller may ask for,
//! `reason` the constants of `ErrorInfo.reason`. Knows no other crate of the workspace.

pub mod cause;
pub mod exec;
pub mod id;
pub mod lifetime;
pub mod name;
pub mod reason;
pub mod reattach;
pub mod spec;

pub use cause::{Cause, Progress};
pub use reason::Reason;

/// `sandbox.v1`: the public API.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod sandbox {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandbox.v1");
    }
}

/// `agent.v1`: controller to agent.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod agent {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("agent.v1");
    }
}

/// `shim.v1`: agent to the shim of a sandbox.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod shim {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("shim.v1");
    }
}

/// Descriptor set of all packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest message that either side takes, bytes. Exec and files travel in smaller chunks.
pub const MESSAGE_BYTES_MAX: usize = 2 * 1024 * 1024;
