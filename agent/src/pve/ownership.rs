//! Decides whether a container is ours. Pure, and the only place that decides it.

use proto::id::{SandboxId, Vmid};

use super::{
    ContainerConfig, ErrorKind, Mark, Result, config_file::DESCRIPTION_CHARS_MAX, interface, tags,
};

/// `Ok` when a container with this vmid and config may be destroyed as `owner`'s.
pub fn check(config: &ContainerConfig, vmid: Vmid, owner: &SandboxId) -> Result<()> {
    if is_bare(config) {
        return Ok(());
    }
    owned(config, vmid, owner)?;
    if config.is_protected() {
        let text = format!("can't remove CT {vmid} - protection mode enabled");
        return Err(ErrorKind::WrongState(text));
    }
    Ok(())
}

/// `Ok` when a container with this vmid and config is `owner`'s.
pub fn owned(config: &ContainerConfig, vmid: Vmid, owner: &SandboxId) -> Result<()> {
    marked(config, vmid)?;
    let not_ours = |why: String| Err(ErrorKind::NotOurs(why));
    match config.mark() {
        Some(mark) if mark.sandbox_id == *owner => Ok(()),
        Some(mark) => not_ours(format!("CT {vmid} is {}, not {owner}", mark.sandbox_id)),
        None => not_ours(format!("CT {vmid} carries no mark")),
    }
}

/// `Ok` when a container with this vmid and config is a sandbox of ours: it carries a mark for this
/// very vmid and is no template.
pub fn marked(config: &ContainerConfig, vmid: Vmid) -> Result<()> {
    let not_ours = |why: String| Err(ErrorKind::NotOurs(why));
    if config.is_template() {
        return not_ours(format!("CT {vmid} is a template"));
    }
    match config.mark() {
        None => not_ours(format!("CT {vmid} carries no mark")),
        // A clone copies the mark with the description: somebody cloned a sandbox of ours.
        Some(mark) if mark.vmid != vmid => {
            not_ours(format!("CT {vmid} is a copy of CT {}", mark.vmid))
        }
        Some(_) => Ok(()),
    }
}

/// `Ok` when sandboxes can be cloned from the container with this vmid and config.
pub fn clonable(config: &ContainerConfig, vmid: Vmid) -> Result<()> {
    if !config.is_template() {
        let text = format!("CT {vmid} is no template: a clone would copy it whole");
        return Err(ErrorKind::WrongState(text));
    }
    match interface::shared_address(config) {
        Some(why) => Err(ErrorKind::WrongState(format!("template {vmid}: {why}"))),
        None => Ok(()),
    }
}

/// Writes a mark, and the tag that goes with it, into a config that has none; keeps every other
/// byte.
pub fn mark(config: &mut ContainerConfig, mark: &Mark) -> Result<()> {
    if config.mark().as_ref() == Some(mark) {
        return Ok(());
    }
    let vmid = mark.vmid;
    let not_ours = |why: String| Err(ErrorKind::NotOurs(why));
    if config.is_template() {
        return not_ours(format!("CT {vmid} is a template"));
    }
    let description = config.description().unwrap_or_default();
    if description.lines().any(Mark::resembles) {
        return not_ours(format!("CT {vmid} carries a mark already"));
    }
    if let Some(lock) = config.lock() {
        return Err(ErrorKind::Locked(format!("CT is locked ({lock})")));
    }
    let line = mark.to_string();
    if description.chars().count() + line.len() >= DESCRIPTION_CHARS_MAX {
        let text = format!("the description of CT {vmid} has no room for one line more");
        return Err(ErrorKind::Failed(text));
    }
    config.add_note(&line);
    tags::add(config);
    Ok(())
}

/// Removes a sandbox's mark and tag. A container that does not carry the mark stays unchanged.
pub fn unmark(config: &mut ContainerConfig, owner: &SandboxId) {
    if let Some(mark) = config.mark().filter(|mark| mark.sandbox_id == *owner) {
        config.remove_note(&mark.to_string());
        tags::take_off(config);
    }
}

/// True for a config that holds nothing but the lock of a clone or a destroy. PVE writes such a
/// config before it writes the clone's own, and in place of the old one between removing the
/// volumes and removing the config. It names no owner and holds nothing that could be lost: when no
/// worker is alive, it belongs to the sandbox that the vmid is leased to.
pub fn is_bare(config: &ContainerConfig) -> bool {
    is_gutted(config) || config.to_bytes().trim_ascii() == b"lock: create"
}

/// True for the config that a destruction leaves when it is cut off before its last write.
pub fn is_gutted(config: &ContainerConfig) -> bool {
    config.to_bytes().trim_ascii() == b"lock: destroyed"
}
