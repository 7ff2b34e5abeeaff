//! Parts of the configuration that are known also where the rest cannot be completed, as on a node without its bridge.

use std::path::{Path, PathBuf};

use proto::name::NodeName;

use super::{Error, File, Flags, STATE_DIR, Sources, node};
use crate::{detect::Roots, journal::SqliteJournal};

/// The file as it is written, and what tells which node this is and where its data are.
#[derive(Debug)]
pub struct Basics {
    /// PVE's name of this node.
    pub node: NodeName,
    /// Directory for the journal and other state that must survive a reboot.
    pub state_dir: PathBuf,
    /// Content of the file.
    pub file: File,
}

impl Basics {
    /// Reads the file at `path`, which must exist.
    ///
    /// # Errors
    /// When it cannot be read, or the name of the node is not known.
    pub fn load(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        Self::complete(daemon::config::load(path).map_err(Error::File)?, env)
    }

    /// Completes a configuration file as far as this.
    ///
    /// # Errors
    /// When the name of the node is not known.
    pub fn complete(file: File, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let flags = Flags::default();
        let mut from = Sources { flags: &flags, env, mistakes: Vec::new(), settings: Vec::new() };
        let (root, proc) = (file.pve.root.clone(), file.pve.proc.clone());
        let roots = Roots { pve: &root, proc: &proc, net: Path::new("/sys/class/net") };
        // A journal that cannot be read knows no name; that is no reason to keep it.
        let known = SqliteJournal::node_of(&file.journal()).ok().flatten();
        let (node, _number) = node(&mut from, file.node.clone(), known, roots);
        let state_dir = file.state_dir.clone().unwrap_or_else(|| STATE_DIR.into());
        match (node, from.mistakes) {
            (Some(node), mistakes) if mistakes.is_empty() => {
                Ok(Self { node: node.value, state_dir, file })
            }
            (_, mistakes) => Err(Error::Mistakes(mistakes)),
        }
    }
}
