//! What to do next, for each reason that the API gives. The one table of it.

use proto::reason;

use crate::exit;

/// What an error of a reason means to whoever sits at the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// Exit code.
    pub exit: u8,
    /// What to do next.
    pub next: &'static str,
}

/// The hint for a reason of `proto::reason`; `None` for one that is newer than this program.
pub fn of(reason: &str) -> Option<Hint> {
    let (exit, next) = match reason {
        reason::FIELD_INVALID => {
            (exit::USAGE, "correct the value that the message names and run it again")
        }
        reason::TOKEN_INVALID => (
            exit::USAGE,
            "set SANDBOXCTL_TOKEN or SANDBOXCTL_TOKEN_FILE to a token that the controller knows; an operator makes one with `pve-sandbox-controller token`",
        ),
        reason::SCOPE_MISSING => (
            exit::REFUSED,
            "use a token with the scope that this needs (nodes and fsck need the operator's)",
        ),
        reason::SANDBOX_NOT_FOUND => (
            exit::NOT_FOUND,
            "`sandboxctl ls -a` lists the sandboxes of your team; another team's are not found",
        ),
        reason::SNAPSHOT_NOT_FOUND => (
            exit::NOT_FOUND,
            "`sandboxctl snapshot ls` lists the snapshots and the nodes that hold them",
        ),
        reason::SERVICE_NOT_FOUND => {
            (exit::NOT_FOUND, "`sandboxctl url ID` lists the open ports of the sandbox")
        }
        reason::NODE_NOT_FOUND => (exit::NOT_FOUND, "`sandboxctl nodes` lists the nodes"),
        reason::EXEC_NOT_FOUND => {
            (exit::NOT_FOUND, "`sandboxctl ps ID` lists the commands that the sandbox runs and ran")
        }
        reason::FILE_NOT_FOUND => {
            (exit::NOT_FOUND, "look around with `sandboxctl exec ID -- ls -l DIRECTORY`")
        }
        reason::REQUEST_ID_REUSED => (
            exit::REFUSED,
            "this --request-id made another sandbox: take a new one, or repeat the first call unchanged",
        ),
        reason::SANDBOX_KNOWN => (
            exit::REFUSED,
            "`sandboxctl get` shows the one that is known; there is nothing to recover",
        ),
        reason::SERVICE_EXISTS => (
            exit::REFUSED,
            "take another --name, or close the port that has it with `sandboxctl hide ID NAME`",
        ),
        reason::EXEC_ID_REUSED => (
            exit::REFUSED,
            "this --exec-id ran another command: take a new one, or repeat the first call unchanged",
        ),
        reason::SANDBOX_PAUSED => (
            exit::REFUSED,
            "thaw it with `sandboxctl resume ID`, or let this wake it with `sandboxctl wake-on ID`",
        ),
        reason::FREEZE_FAILED => (
            exit::REFUSED,
            "unmount what is mounted by FUSE in it, or use `sandboxctl pause --or-stop ID`",
        ),
        reason::FILE_REFUSED => {
            (exit::REFUSED, "check the path, and as whom it is touched (--user)")
        }
        reason::SANDBOX_NOT_RUNNING => (
            exit::REFUSED,
            "`sandboxctl get ID` shows its state; boot a stopped one with `sandboxctl start ID`",
        ),
        reason::SANDBOX_DELETED => {
            (exit::NOT_FOUND, "it is gone for good; make another with `sandboxctl create`")
        }
        reason::SANDBOX_BUSY => (
            exit::NOT_NOW,
            "wait for the operation under way to end (`sandboxctl watch ID`) and run it again",
        ),
        reason::CREATE_CANCELLED => {
            (exit::REFUSED, "make another with `sandboxctl create` and a new --request-id")
        }
        reason::NOT_OURS => (
            exit::REFUSED,
            "containers that this system did not make are never touched; use PVE's own tools for them",
        ),
        reason::CONTAINER_UNFIT => (
            exit::REFUSED,
            "only an unprivileged container without protection, and no template, can be a sandbox",
        ),
        reason::ADDRESS_CONFLICT => (
            exit::REFUSED,
            "set the container's net0 to what the message says (`pct set VMID --net0 ...`), then `sandboxctl fsck`",
        ),
        reason::DHCP_REFUSED => (
            exit::REFUSED,
            "leave the address to the node (no --dhcp), or allow DHCP with `network.dhcp` in its agent's configuration",
        ),
        reason::NOT_ADOPTED => (exit::REFUSED, "delete it with `sandboxctl rm ID`"),
        reason::NOT_MOVABLE => (
            exit::REFUSED,
            "stop it first; only what is on storage that both nodes see can be moved",
        ),
        reason::CONTAINER_GONE => (
            exit::REFUSED,
            "`sandboxctl get ID` says where it is; recover it there, or delete the sandbox",
        ),
        reason::NODE_IN_USE => (
            exit::REFUSED,
            "only a node that does not answer is forgotten; `sandboxctl nodes` shows them all",
        ),
        reason::NO_CAPACITY => (
            exit::NOT_NOW,
            "`sandboxctl explain --dry-run` says why for each node; delete what is not needed, or try later",
        ),
        reason::NODE_CORDONED => (
            exit::NOT_NOW,
            "leave the node to the controller, or let it take work with `sandboxctl uncordon NODE`",
        ),
        reason::NODE_NUMBER_CHANGED => (
            exit::NOT_NOW,
            "leave the node to the controller, or on it, with the agent stopped, run `pve-sandbox-agent confirm-node-number`",
        ),
        reason::MEMORY_FULL => (
            exit::NOT_NOW,
            "delete or stop sandboxes there, ask for less memory, or leave the node to the controller",
        ),
        reason::STORAGE_FULL => (
            exit::NOT_NOW,
            "delete sandboxes that are not needed, or give the node's storage more room (`sandboxctl nodes`)",
        ),
        reason::QUEUE_FULL => (exit::NOT_NOW, "try again in a few seconds"),
        reason::VMIDS_EXHAUSTED => (
            exit::NOT_NOW,
            "delete sandboxes on that node, or widen `[vmids]` in its agent's configuration",
        ),
        reason::ADDRESSES_EXHAUSTED => (
            exit::NOT_NOW,
            "delete sandboxes on that node, or widen `network.pool` in its agent's configuration",
        ),
        reason::TOO_MANY_CALLS => {
            (exit::NOT_NOW, "make fewer calls at once, or try again in a few seconds")
        }
        reason::TOO_LARGE => (
            exit::REFUSED,
            "send less at once; large output and input go through `sandboxctl exec` as a stream",
        ),
        reason::EVENTS_GONE => (
            exit::REFUSED,
            "`sandboxctl ls -a` shows what is now; leave --since out for the events that are kept",
        ),
        reason::STALE_EPOCH => (
            exit::NOT_NOW,
            "another controller is in charge: point SANDBOXCTL_ENDPOINT at it, or restart this one if it should be",
        ),
        reason::REVISION_CONFLICT => (
            exit::NOT_NOW,
            "look at the sandbox again with `sandboxctl get ID` and repeat the call",
        ),
        reason::EXEC_LOST => (
            exit::REFUSED,
            "it may have run in part: look at what it did before you run it again under a new --exec-id",
        ),
        reason::NODE_UNREACHABLE => (
            exit::NOT_NOW,
            "`sandboxctl nodes` shows which; on it, see `systemctl status pve-sandbox-agent`",
        ),
        reason::NO_QUORUM => (
            exit::NOT_NOW,
            "the cluster refuses changes until most of its nodes are back: see `pvecm status` on a node",
        ),
        reason::CONTAINER_LOCKED => (
            exit::NOT_NOW,
            "PVE works on the container (a backup, perhaps): try again when its task has ended",
        ),
        reason::SHUTTING_DOWN => (exit::NOT_NOW, "try again in a few seconds"),
        reason::OUTCOME_UNKNOWN => (
            exit::NOT_NOW,
            "it may be done by now: `sandboxctl ls` shows; to repeat it, give `create` the same --request-id and `exec` the same --exec-id, so that it is not done twice",
        ),
        reason::PROBE_TIMEOUT => (
            exit::REFUSED,
            "the sandbox booted but did not answer its probe: check the probe and the service of its template",
        ),
        reason::PCT_FAILED => (
            exit::REFUSED,
            "the message has pct's last line; the whole task log is on the node under /var/log/pve/tasks",
        ),
        reason::EXEC_FAILED => (
            exit::REFUSED,
            "it was not run: read the message, and try again; `sandboxctl get ID` shows whether the sandbox still runs",
        ),
        reason::STORE_FAILED => (
            exit::REFUSED,
            "the journal or the store cannot be written: check the disk that the daemon's state is on, and its log",
        ),
        reason::INVARIANT => (
            exit::REFUSED,
            "this is a defect: run `sandboxctl fsck` and report its output with the daemon's log",
        ),
        _ => return None,
    };
    Some(Hint { exit, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_next_step() {
        for reason in reason::ALL {
            let hint = of(reason).unwrap_or_else(|| panic!("no hint for {reason}"));
            assert!(hint.exit != 0 && hint.next.len() > 10, "{reason}");
            assert!(!hint.next.ends_with('.'), "{reason}: one style of sentences");
        }
        assert_eq!(of("NEWER_THAN_US"), None);
    }
}
