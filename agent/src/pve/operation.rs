//! Names of what the agent does with a host, for errors and for judging what `pct` says.

use std::fmt;

/// Operation on a host or on one of its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads the configs of all containers.
    List,
    /// Lists the volumes of all containers.
    ListVolumes,
    /// Reads one config.
    Read,
    /// Measures the storage of a template.
    MeasureStorage,
    /// Finds the volumes of one vmid.
    FindVolumes,
    /// Makes a linked clone of a template.
    Clone,
    /// Writes the settings of a new container.
    Set,
    /// Writes the cores and the memory of a container.
    SetLimits,
    /// Limits the cgroup of a running container.
    Limit,
    /// Grows the root volume.
    Resize,
    /// Moves a config to another node.
    MoveConfig,
    /// Boots.
    Start,
    /// Asks the init to shut down.
    Halt,
    /// Stops at once.
    Stop,
    /// Destroys a container and its volumes.
    Destroy,
    /// Removes PVE's lock.
    Unlock,
    /// Writes our mark.
    Mark,
    /// Removes our mark.
    Unmark,
    /// Acquires the lock of a pause.
    PauseLock,
    /// Releases the lock of a pause.
    PauseUnlock,
    /// Freezes all processes.
    Freeze,
    /// Thaws all processes.
    Thaw,
}

impl Operation {
    /// Finds the operation that a sub-command of `pct` does; `None` for one that no operation uses.
    pub fn of_pct(command: &str) -> Option<Self> {
        Some(match command {
            "clone" => Self::Clone,
            "set" => Self::Set,
            "resize" => Self::Resize,
            "start" => Self::Start,
            "stop" => Self::Stop,
            "destroy" => Self::Destroy,
            "unlock" => Self::Unlock,
            _ => return None,
        })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::List => "list the containers",
            Self::ListVolumes => "list the volumes",
            Self::Read => "read",
            Self::MeasureStorage => "measure the storage of",
            Self::FindVolumes => "find volumes of",
            Self::Clone => "clone",
            Self::Set => "set",
            Self::SetLimits => "set limits",
            Self::Limit => "limit",
            Self::Resize => "resize",
            Self::MoveConfig => "move",
            Self::Start => "start",
            Self::Halt => "halt",
            Self::Stop => "stop",
            Self::Destroy => "destroy",
            Self::Unlock => "unlock",
            Self::Mark => "mark",
            Self::Unmark => "unmark",
            Self::PauseLock => "pause lock",
            Self::PauseUnlock => "pause unlock",
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
        })
    }
}

#[cfg(test)]
mod tests {
    use proto::id::Vmid;

    use super::*;
    use crate::pve::{Error, ErrorKind};

    #[test]
    fn error_names_a_container_only_where_there_is_one() {
        let said = |op, vmid| {
            let kind = ErrorKind::NoQuorum("pmxcfs is down".to_owned());
            Error { op, vmid, kind }.to_string()
        };
        let start = said(Operation::Start, Some(Vmid::MIN));
        assert_eq!(start, "start 100 failed: no quorum: pmxcfs is down");
        let list = said(Operation::List, None);
        assert_eq!(list, "could not list the containers: no quorum: pmxcfs is down");
    }
}
