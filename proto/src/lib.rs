//! Protocol of all parts: the generated messages and services, and the validated values that both
//! ends of a call use.
//!
//! Code map: `id` has the identities, `name` the other names, `spec` the checked creation, `egress` what a
//! sandbox reaches, `host` the host names of sandboxes,
//! `lifetime` its lifetime rules, `limits` those of a team, `exec` the checks of a command, `phase` and `cause` questions
//! about a phase, a cause and a step, `reason` the constants of `ErrorInfo.reason`, `reattach` the
//! positions in a command's streams, `scope` and `token` what a caller's token allows and looks like, `secret`
//! what is never shown, `visibility` who reaches a port.
//! Depends on no other crate of the workspace.

pub mod cause;
pub mod duration;
pub mod egress;
mod enums;
pub mod exec;
pub mod forward;
pub mod host;
pub mod id;
pub mod lifetime;
pub mod limits;
pub mod name;
mod phase;
pub mod reason;
pub mod reattach;
mod redact;
pub mod scope;
pub mod secret;
pub mod spec;
pub mod time;
pub mod token;
pub mod update;
pub mod visibility;

pub use cause::{Cause, Progress};
pub use reason::Reason;
pub use sandbox::v1::Invariant;

/// Package `sandbox.v1`: the public API of the controller.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod sandbox {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandbox.v1");
    }
}

/// Package `agent.v1`: the API between the controller and an agent.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod agent {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("agent.v1");
    }
}

/// Package `shim.v1`: the protocol between an agent and the shim of a sandbox.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated")]
pub mod shim {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("shim.v1");
    }
}

/// Descriptor set of all packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest message that either end accepts, in bytes. Output and files travel in smaller chunks.
pub const MESSAGE_BYTES_MAX: usize = 2 * 1024 * 1024;
