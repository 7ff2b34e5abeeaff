//! The table of next steps, one for each reason of the API.

use proto::Reason;

use crate::exit;

/// Exit code and next step for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// Exit code.
    pub exit: u8,
    /// Next step for the user.
    pub next: &'static str,
}

/// Hint for a reason.
pub fn of(reason: Reason) -> Hint {
    let (exit, next) = match reason {
        Reason::FieldInvalid => {
            (exit::USAGE, "correct the value that the message names and run it again")
        }
        Reason::TokenInvalid => (
            exit::USAGE,
            "set SANDBOXCTL_TOKEN or SANDBOXCTL_TOKEN_FILE to a token that the controller knows; an operator makes one with `pve-sandbox-controller token`",
        ),
        Reason::ScopeMissing => (
            exit::REFUSED,
            "use a token with the scope that this needs (nodes and fsck need the operator's)",
        ),
        Reason::SandboxNotFound => (
            exit::NOT_FOUND,
            "`sandboxctl ls -a` lists the sandboxes of your team; another team's are not found",
        ),
        Reason::SnapshotNotFound => (
            exit::NOT_FOUND,
            "`sandboxctl snapshot ls` lists the snapshots and the nodes that hold them",
        ),
        Reason::ServiceNotFound => {
            (exit::NOT_FOUND, "`sandboxctl url ID` lists the open ports of the sandbox")
        }
        Reason::NodeNotFound => (exit::NOT_FOUND, "`sandboxctl nodes` lists the nodes"),
        Reason::ExecNotFound => {
            (exit::NOT_FOUND, "`sandboxctl ps ID` lists the commands that the sandbox runs and ran")
        }
        Reason::FileNotFound => {
            (exit::NOT_FOUND, "look around with `sandboxctl exec ID -- ls -l DIRECTORY`")
        }
        Reason::RequestIdReused => (
            exit::REFUSED,
            "this --request-id made another sandbox: take a new one, or repeat the first call unchanged",
        ),
        Reason::SandboxKnown => (
            exit::REFUSED,
            "`sandboxctl get` shows the one that is known; there is nothing to recover",
        ),
        Reason::ServiceExists => (
            exit::REFUSED,
            "take another --name, or close the port that has it with `sandboxctl hide ID NAME`",
        ),
        Reason::ExecIdReused => (
            exit::REFUSED,
            "this --exec-id ran another command: take a new one, or repeat the first call unchanged",
        ),
        Reason::SandboxPaused => (
            exit::REFUSED,
            "thaw it with `sandboxctl resume ID`, or let this wake it with `sandboxctl wake-on ID`",
        ),
        Reason::FreezeFailed => (
            exit::REFUSED,
            "unmount what is mounted by FUSE in it, or use `sandboxctl pause --or-stop ID`",
        ),
        Reason::FileRefused => {
            (exit::REFUSED, "check the path, and as whom it is touched (--user)")
        }
        Reason::SandboxNotRunning => (
            exit::REFUSED,
            "`sandboxctl get ID` shows its state; boot a stopped one with `sandboxctl start ID`",
        ),
        Reason::SandboxDeleted => {
            (exit::NOT_FOUND, "it is gone for good; make another with `sandboxctl create`")
        }
        Reason::SandboxBusy => (
            exit::NOT_NOW,
            "wait for the operation under way to end (`sandboxctl watch ID`) and run it again",
        ),
        Reason::CreateCancelled => {
            (exit::REFUSED, "make another with `sandboxctl create` and a new --request-id")
        }
        Reason::NotOurs => (
            exit::REFUSED,
            "containers that this system did not make are never touched; use PVE's own tools for them",
        ),
        Reason::ContainerUnfit => (
            exit::REFUSED,
            "only an unprivileged container without protection, and no template, can be a sandbox",
        ),
        Reason::AddressConflict => (
            exit::REFUSED,
            "set the container's net0 to what the message says (`pct set VMID --net0 ...`), then `sandboxctl fsck`",
        ),
        Reason::DhcpRefused => (
            exit::REFUSED,
            "leave the address to the node (no --dhcp), or allow DHCP with `network.dhcp` in its agent's configuration",
        ),
        Reason::NotAdopted => (exit::REFUSED, "delete it with `sandboxctl rm ID`"),
        Reason::NotMovable => (
            exit::REFUSED,
            "stop it first; only what is on storage that both nodes see can be moved",
        ),
        Reason::ContainerGone => (
            exit::REFUSED,
            "`sandboxctl get ID` says where it is; recover it there, or delete the sandbox",
        ),
        Reason::NodeInUse => (
            exit::REFUSED,
            "only a node that does not answer is forgotten; `sandboxctl nodes` shows them all",
        ),
        Reason::NoCapacity => (
            exit::NOT_NOW,
            "`sandboxctl explain --dry-run` says why for each node; delete what is not needed, or try later",
        ),
        Reason::NodeCordoned => (
            exit::NOT_NOW,
            "leave the node to the controller, or let it take work with `sandboxctl uncordon NODE`",
        ),
        Reason::NodeNumberChanged => (
            exit::NOT_NOW,
            "leave the node to the controller, or on it, with the agent stopped, run `pve-sandbox-agent confirm-node-number`",
        ),
        Reason::MemoryFull => (
            exit::NOT_NOW,
            "delete or stop sandboxes there, ask for less memory, or leave the node to the controller",
        ),
        Reason::StorageFull => (
            exit::NOT_NOW,
            "delete sandboxes that are not needed, or give the node's storage more room (`sandboxctl nodes`)",
        ),
        Reason::QueueFull => (exit::NOT_NOW, "try again in a few seconds"),
        Reason::VmidsExhausted => (
            exit::NOT_NOW,
            "delete sandboxes on that node, or widen `[vmids]` in its agent's configuration",
        ),
        Reason::AddressesExhausted => (
            exit::NOT_NOW,
            "delete sandboxes on that node, or widen `network.pool` in its agent's configuration",
        ),
        Reason::TooManyCalls => {
            (exit::NOT_NOW, "make fewer calls at once, or try again in a few seconds")
        }
        Reason::TooLarge => (
            exit::REFUSED,
            "send less at once; large output and input go through `sandboxctl exec` as a stream",
        ),
        Reason::EventsGone => (
            exit::REFUSED,
            "`sandboxctl ls -a` shows what is now; leave --since out for the events that are kept",
        ),
        Reason::StaleEpoch => (
            exit::NOT_NOW,
            "another controller is in charge: point SANDBOXCTL_ENDPOINT at it, or restart this one if it should be",
        ),
        Reason::RevisionConflict => (
            exit::NOT_NOW,
            "look at the sandbox again with `sandboxctl get ID` and repeat the call",
        ),
        Reason::ExecLost => (
            exit::REFUSED,
            "it may have run in part: look at what it did before you run it again under a new --exec-id",
        ),
        Reason::NodeUnreachable => (
            exit::NOT_NOW,
            "`sandboxctl nodes` shows which; on it, see `systemctl status pve-sandbox-agent`",
        ),
        Reason::NoQuorum => (
            exit::NOT_NOW,
            "the cluster refuses changes until most of its nodes are back: see `pvecm status` on a node",
        ),
        Reason::ContainerLocked => (
            exit::NOT_NOW,
            "PVE works on the container (a backup, perhaps): try again when its task has ended",
        ),
        Reason::ShuttingDown => (exit::NOT_NOW, "try again in a few seconds"),
        Reason::OutcomeUnknown => (
            exit::NOT_NOW,
            "it may be done by now: `sandboxctl ls` shows; to repeat it, give `create` the same --request-id and `exec` the same --exec-id, so that it is not done twice",
        ),
        Reason::ProbeTimeout => (
            exit::REFUSED,
            "the sandbox booted but did not answer its probe: check the probe and the service of its template",
        ),
        Reason::PctFailed => (
            exit::REFUSED,
            "the message has pct's last line; the whole task log is on the node under /var/log/pve/tasks",
        ),
        Reason::ExecFailed => (
            exit::REFUSED,
            "it was not run: read the message, and try again; `sandboxctl get ID` shows whether the sandbox still runs",
        ),
        Reason::StoreFailed => (
            exit::REFUSED,
            "the journal or the store cannot be written: check the disk that the daemon's state is on, and its log",
        ),
        Reason::Invariant | Reason::Unspecified => (
            exit::REFUSED,
            "this is a defect: run `sandboxctl fsck` and report its output with the daemon's log",
        ),
    };
    Hint { exit, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_next_step() {
        for reason in Reason::all() {
            let hint = of(reason);
            assert!(hint.exit != 0 && hint.next.len() > 10, "{reason}");
            assert!(!hint.next.ends_with('.'), "{reason}: one style of sentences");
        }
    }
}
