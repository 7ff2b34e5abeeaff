//! Finds processes that are changing a container: PVE's workers, and `pct`s that have no worker
//! yet. Reads the processes' argv, which outlives a killed agent. Pure.
//!
//! A worker's argv is `task UPID:node:pid:pstart:time:type:id:user:`. The id of a clone is the
//! template's, so the new container is known from the worker's parent, `pct clone TEMPLATE NEW`.

use proto::id::Vmid;

use crate::sys::proc::Process;

/// Types of tasks that change a container but do not start with `vz`.
const CHANGES: &[&str] = &["resize", "move_volume", "push_file", "pull_file"];

/// Action of a process on a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskKind {
    /// Worker: whether its task type is `vzclone`, and its id.
    Task { clones: bool, id: Vmid },
    /// Process of `pct clone`.
    Clone { template: Vmid, new: Vmid },
    /// Process of another `pct` command on a container.
    Other(Vmid),
}

/// Pids of the processes that may still change this container.
pub fn busy_with(processes: &[Process], vmid: Vmid) -> Vec<u32> {
    let concerns = |process: &&Process| match deed(&process.argv) {
        Some(TaskKind::Clone { new, .. }) => new == vmid,
        Some(TaskKind::Other(id)) => id == vmid,
        Some(TaskKind::Task { clones: false, id }) => id == vmid,
        Some(TaskKind::Task { clones: true, id }) => {
            id == vmid || makes(processes, process).is_none_or(|new| new == vmid)
        }
        None => false,
    };
    processes.iter().filter(concerns).map(|process| process.pid).collect()
}

/// Pids of the processes that clone this template, and so may hold its lock.
pub fn cloning(processes: &[Process], template: Vmid) -> Vec<u32> {
    let clones = |process: &&Process| match deed(&process.argv) {
        Some(TaskKind::Task { clones, id }) => clones && id == template,
        Some(TaskKind::Clone { template: source, .. }) => source == template,
        Some(TaskKind::Other(_)) | None => false,
    };
    processes.iter().filter(clones).map(|process| process.pid).collect()
}

/// Container that a clone's worker creates, from its parent; `None` when the parent is dead,
/// because then it is unknown. `Vmid::MIN` stands for a container of another program: our vmids are
/// not near it.
fn makes(processes: &[Process], worker: &Process) -> Option<Vmid> {
    let parent = processes.iter().find(|process| process.pid == worker.parent)?;
    match deed(&parent.argv) {
        Some(TaskKind::Clone { new, .. }) => Some(new),
        // Orphans become children of init; any other parent is PVE's own daemon.
        _ if parent.pid == 1 => None,
        _ => Some(Vmid::MIN),
    }
}

/// True for a worker of PVE.
pub fn is_task(process: &Process) -> bool {
    upid(&process.argv).is_some()
}

/// Fields of the UPID that PVE has written over a worker's argv.
fn upid(argv: &[String]) -> Option<&str> {
    argv.first()?.strip_prefix("task UPID:")
}

fn deed(argv: &[String]) -> Option<TaskKind> {
    if let Some(upid) = upid(argv) {
        let mut fields = upid.split(':').skip(4);
        let kind = fields.next()?;
        // A console is a task too, for as long as it is open.
        let changes = kind.starts_with("vz") || CHANGES.contains(&kind);
        let task = TaskKind::Task { clones: kind == "vzclone", id: fields.next()?.parse().ok()? };
        return changes.then_some(task);
    }
    // `/usr/bin/perl -T /usr/sbin/pct clone ...`, or `pct` itself.
    let perl = argv.first()?.rsplit('/').next() == Some("perl");
    let is_pct = |word: &String| word.rsplit('/').next() == Some("pct");
    let pct = argv.iter().take(if perl { 3 } else { 1 }).position(is_pct)?;
    let mut words = argv[pct + 1..].iter();
    let op = words.next()?;
    let id: Vmid = words.next()?.parse().ok()?;
    match op.as_str() {
        "clone" => Some(TaskKind::Clone { template: id, new: words.next()?.parse().ok()? }),
        // These change nothing, and an operator's `pct enter` may run for days.
        "exec" | "enter" | "console" | "config" | "status" | "pending" | "listsnapshot" | "df" => {
            None
        }
        _ => Some(TaskKind::Other(id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, argv: &str) -> Process {
        let split = if argv.starts_with("task ") { '\0' } else { ' ' };
        Process { pid, parent, start: 0, argv: argv.split(split).map(str::to_owned).collect() }
    }

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    #[test]
    fn processes_working_on_a_container_are_found() {
        let processes = [
            process(1, 0, "/sbin/init"),
            process(10, 1, "/usr/bin/perl -T /usr/sbin/pct clone 900 501 --hostname h501"),
            process(12, 10, "task UPID:pve1:0000000C:0005B7B3:6B0456DF:vzclone:900:root@pam:"),
            process(20, 1, "/usr/sbin/pct start 502"),
            process(22, 20, "task UPID:pve1:00000016:0005B7B3:6B0456DF:vzstart:502:root@pam:"),
            process(30, 1, "pvedaemon worker"),
            process(32, 30, "task UPID:pve1:00000020:0005B7B3:6B0456DF:vzclone:910:root@pam:"),
            process(40, 1, "/usr/sbin/pct exec 501 -- true"),
            process(41, 1, "vi pct start 501"),
            process(50, 1, "task UPID:pve1:00000032:0005B7B3:6B0456DF:vncproxy:501:root@pam:"),
        ];
        assert_eq!(busy_with(&processes, vmid(501)), [10, 12]);
        assert_eq!(busy_with(&processes, vmid(502)), [20, 22]);
        assert_eq!(busy_with(&processes, vmid(503)), [0; 0]);
        assert_eq!(cloning(&processes, vmid(900)), [10, 12]);
        assert_eq!(cloning(&processes, vmid(910)), [32]);
        assert_eq!(cloning(&processes, vmid(502)), [0; 0]);
    }

    #[test]
    fn orphaned_clone_worker_counts_for_every_vmid() {
        let processes = [
            process(1, 0, "/sbin/init"),
            process(12, 1, "task UPID:pve1:0000000C:0005B7B3:6B0456DF:vzclone:900:root@pam:"),
        ];
        assert_eq!(busy_with(&processes, vmid(501)), [12]);
        assert_eq!(busy_with(&processes[1..], vmid(501)), [12]);
    }
}
