//! Records which lab uses the machine. All labs use the same names of cgroups, network and ports,
//! so only one can be up at a time.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::layout::Layout;
use crate::process::Proc;

const DIR: &str = "/run/pve-lab";

/// Returns the directory of another lab that is up.
pub fn other(layout: &Layout) -> Option<PathBuf> {
    let dir = fs::read_link(Path::new(DIR).join("dir")).ok()?;
    (dir != layout.dir() && Proc::from_file(&Layout::new(&dir).host_pid()).is_some()).then_some(dir)
}

/// Records that this lab uses the machine.
pub fn take(layout: &Layout) -> Result<()> {
    fs::create_dir_all(DIR).with_context(|| format!("cannot make {DIR}"))?;
    let link = Path::new(DIR).join("dir");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link)?;
    }
    std::os::unix::fs::symlink(layout.dir(), &link).context("cannot write down whose lab this is")
}
