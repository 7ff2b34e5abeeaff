//! Names of tasks: `UPID:node:PID8:PSTART8:TIME8:type:id:user:`.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

/// Name of a task, which tells whether its worker still lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upid {
    pub node: String,
    /// Process id of the worker.
    pub pid: u32,
    /// Start of the worker, in clock ticks since boot.
    pub pstart: u64,
    /// Start of the task, in seconds since the epoch.
    pub time: u64,
    /// Kind of task, such as `vzclone`.
    pub kind: String,
    /// Container of the task.
    pub id: String,
}

impl Upid {
    /// Creates the name of a task whose worker is this process.
    pub(crate) fn of_this_process(node: &str, kind: &str, id: &str) -> Self {
        let pid = std::process::id();
        Self {
            node: node.to_owned(),
            pid,
            pstart: start_of(pid).unwrap_or(0),
            time: now(),
            kind: kind.to_owned(),
            id: id.to_owned(),
        }
    }

    /// Parses a name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.strip_prefix("UPID:")?.split(':').collect();
        let [node, pid, pstart, time, kind, id, _user, _end] = parts.as_slice() else {
            return None;
        };
        Some(Self {
            node: (*node).to_owned(),
            pid: u32::from_str_radix(pid, 16).ok()?,
            pstart: u64::from_str_radix(pstart, 16).ok()?,
            time: u64::from_str_radix(time, 16).ok()?,
            kind: (*kind).to_owned(),
            id: (*id).to_owned(),
        })
    }

    /// Returns whether the process with that pid still is the worker.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_of(self.pid) == Some(self.pstart)
    }
}

impl std::fmt::Display for Upid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { node, pid, pstart, time, kind, id } = self;
        write!(f, "UPID:{node}:{pid:08X}:{pstart:08X}:{time:08X}:{kind}:{id}:root@pam:")
    }
}

/// Returns the seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Returns the 22nd field of `/proc/PID/stat`; none for a zombie.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upid_round_trips() {
        let text = "UPID:pve1:00001476:0005B7B3:6B0456DF:vzclone:900:root@pam:";
        let upid = Upid::parse(text).unwrap();
        assert_eq!((upid.pid, upid.id.as_str()), (0x1476, "900"));
        assert_eq!(upid.to_string(), text);
        assert_eq!(Upid::parse("UPID:x"), None);
    }

    #[test]
    fn task_is_alive_only_with_its_own_start_time() {
        let mut upid = Upid::of_this_process("n", "vzclone", "900");
        assert!(upid.is_alive());
        upid.pstart += 1;
        assert!(!upid.is_alive());
    }
}
