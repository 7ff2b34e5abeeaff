//! lxcfs: files of /proc that show a sandbox its own memory and processors, as on PVE. One process
//! serves all nodes, because it must see the processes of all sandboxes. Debian's package has the
//! hook that puts the files into a container.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::daemons::LXCFS;
use crate::lab::Lab;
use crate::layout::Layout;
use crate::mounts;
use crate::process::wait_until;

/// Path where a node has the files.
pub const IN_NODE: &str = "/var/lib/lxcfs";
/// Part of LXC's configuration that every container includes.
const LXC_CONFIG: &str = "/usr/share/lxc/config/common.conf.d/00-lxcfs.conf";
/// Text of that part. Debian's has a second hook, which delays each stop by half a second.
const HOOK: &str = "lxc.hook.mount = /usr/share/lxcfs/lxc.mount.hook\n";
const START_WITHIN: Duration = Duration::from_secs(10);

/// Returns the command line of the service.
pub fn argv(layout: &Layout) -> Vec<String> {
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let pid_file = shown(&layout.run().join("lxcfs.pid"));
    let words = ["/usr/bin/lxcfs", "-f", "-p", &pid_file, &shown(&layout.lxcfs())];
    words.map(str::to_owned).to_vec()
}

/// Starts the service and waits until its files are there.
pub fn start(lab: &Lab) -> Result<()> {
    let at = lab.layout().lxcfs();
    fs::create_dir_all(&at)?;
    lab.services().start(LXCFS, START_WITHIN)?;
    let mounted = || mounts::here().is_ok_and(|mounts| mounts.iter().any(|mount| mount.at == at));
    wait_until(START_WITHIN, mounted)
        .with_context(|| format!("see {}", lab.layout().logs().join("lxcfs.log").display()))
}

/// Tells LXC in this node to use the files, or not to where the node has none.
pub fn configure_node() -> Result<()> {
    let hook = if Path::new(IN_NODE).join("proc").is_dir() { HOOK } else { "" };
    let file = Path::new(LXC_CONFIG);
    fs::create_dir_all(file.parent().unwrap_or(file))?;
    fs::write(file, hook).context("cannot configure LXC")
}
