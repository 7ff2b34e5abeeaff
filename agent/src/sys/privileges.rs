//! Capabilities of the agent and its children: the list of its unit, also when no unit started it.
//! Root keeps much of the host with these; the list excludes what is not needed here: loading
//! modules, rebooting, setting the clock, reading the kernel's log.

use caps::{CapSet, Capability, errors::CapsError};

/// Capabilities to keep. Equal to `CapabilityBoundingSet=` of the unit, which a test checks.
const KEPT: &[Capability] = &[
    Capability::CAP_AUDIT_WRITE,
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_IPC_OWNER,
    Capability::CAP_KILL,
    Capability::CAP_LINUX_IMMUTABLE,
    Capability::CAP_MKNOD,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_NET_RAW,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SYS_RESOURCE,
];

/// Drops all other capabilities permanently. Must be called before any thread starts.
///
/// # Errors
/// When the kernel refuses, which it does not do to root.
pub fn confine() -> Result<(), CapsError> {
    let bounding = caps::read(None, CapSet::Bounding)?;
    for capability in bounding.into_iter().filter(|capability| !KEPT.contains(capability)) {
        caps::drop(None, CapSet::Bounding, capability)?;
    }
    Ok(())
}
