//! Whether a container is ours. Pure, and the one place that says so.

use proto::id::{SandboxId, Vmid};

use super::{ContainerConfig, ErrorKind};

/// `Ok` when a container with this number and config may be destroyed as `owner`'s.
pub fn check(config: &ContainerConfig, vmid: Vmid, owner: &SandboxId) -> Result<(), ErrorKind> {
    if is_destroyed(config) {
        return Ok(());
    }
    marked(config, vmid)?;
    let not_ours = |why: String| Err(ErrorKind::NotOurs(why));
    match config.mark() {
        Some(mark) if mark.sandbox_id == *owner => {}
        Some(mark) => return not_ours(format!("CT {vmid} is {}, not {owner}", mark.sandbox_id)),
        None => return not_ours(format!("CT {vmid} carries no mark")),
    }
    if config.is_protected() {
        let text = format!("can't remove CT {vmid} - protection mode enabled");
        return Err(ErrorKind::WrongState(text));
    }
    Ok(())
}

/// `Ok` when a container with this number and config is some sandbox of ours: it carries a mark
/// for this very number, and it is no template.
pub fn marked(config: &ContainerConfig, vmid: Vmid) -> Result<(), ErrorKind> {
    let not_ours = |why: String| Err(ErrorKind::NotOurs(why));
    if config.is_template() {
        return not_ours(format!("CT {vmid} is a template"));
    }
    match config.mark() {
        None => not_ours(format!("CT {vmid} carries no mark")),
        // A mark is copied with the description: somebody cloned a sandbox of ours.
        Some(mark) if mark.vmid != vmid => {
            not_ours(format!("CT {vmid} is a copy of CT {}", mark.vmid))
        }
        Some(_) => Ok(()),
    }
}

/// What PVE leaves of a config between removing the volumes and removing the config: a lock, and
/// no word of whose it was. There is nothing in it that anybody could lose.
pub fn is_destroyed(config: &ContainerConfig) -> bool {
    config.to_bytes().trim_ascii() == b"lock: destroyed"
}
