//! Installs the workspace's programs in the lab's own directory and in each node's root.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::daemons::{LXC_ATTACH, PROGRAMS};
use crate::layout::Layout;

/// Copies the lab's own binary and the programs of the machine. Returns the services whose program
/// changed.
pub fn on_the_machine(layout: &Layout, built: &Path) -> Result<Vec<&'static str>> {
    copy(&built.join("lab"), &layout.binary())?;
    let bin = layout.dir().join("bin");
    let mut changed = Vec::new();
    for program in PROGRAMS {
        let from = built.join(program.name);
        if from.exists() && copy(&from, &bin.join(program.name))? {
            changed.extend(program.service.filter(|_| program.in_node.is_none()));
        }
    }
    Ok(changed)
}

/// Copies the programs of a node into its root. Returns the services whose program changed.
pub fn in_node(root: &Path, built: &Path) -> Result<Vec<&'static str>> {
    let mut changed = Vec::new();
    // From the machine's own root, where the stand-in has not replaced it.
    copy(Path::new(LXC_ATTACH), &root.join(standin::REAL_LXC_ATTACH.trim_start_matches('/')))?;
    for program in PROGRAMS {
        let (from, Some(at)) = (built.join(program.name), program.in_node) else { continue };
        if from.exists() && copy(&from, &root.join(at.trim_start_matches('/')))? {
            changed.extend(program.service);
        }
    }
    Ok(changed)
}

/// Returns the programs that are not built.
pub fn missing(built: &Path) -> Vec<&'static str> {
    let names = PROGRAMS.iter().map(|program| program.name);
    names.filter(|name| !built.join(name).exists()).collect()
}

/// Copies a program unless an identical file is there; returns whether it was copied. A rename puts
/// it in place, so that a running process keeps its own file.
fn copy(from: &Path, at: &Path) -> Result<bool> {
    let bytes = fs::read(from)
        .with_context(|| format!("cannot read {}: was everything built?", from.display()))?;
    if fs::read(at).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    if let Some(dir) = at.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = PathBuf::from(format!("{}.new", at.display()));
    fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(&new, at).with_context(|| format!("cannot write {}", at.display()))?;
    Ok(true)
}
