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
            "give a token that the controller knows (`sandboxctl login`, SANDBOXCTL_TOKEN or SANDBOXCTL_TOKEN_FILE); an operator makes one with `sandboxctl token create`",
        ),
        Reason::ScopeMissing => (
            exit::REFUSED,
            "use a token with the scope that the message names; nodes, fsck and tokens need `admin`",
        ),
        Reason::SandboxNotFound => (
            exit::NOT_FOUND,
            "`sandboxctl ls -a` lists the sandboxes of your team; those of another team are not found",
        ),
        Reason::SnapshotNotFound => (
            exit::NOT_FOUND,
            "`sandboxctl snapshot ls` lists the snapshots and the nodes that hold them",
        ),
        Reason::ServiceNotFound => {
            (exit::NOT_FOUND, "`sandboxctl url ID` lists the open ports of the sandbox")
        }
        Reason::NodeNotFound => (exit::NOT_FOUND, "`sandboxctl node ls` lists the nodes"),
        Reason::ExecNotFound => {
            (exit::NOT_FOUND, "`sandboxctl ps ID` lists the commands that the sandbox runs and ran")
        }
        Reason::TokenNotFound => (
            exit::NOT_FOUND,
            "`sandboxctl token ls -a` lists the tokens of all teams; a name needs the --team that it is in",
        ),
        Reason::FileNotFound => {
            (exit::NOT_FOUND, "`sandboxctl exec ID -- ls -l DIRECTORY` lists a directory")
        }
        Reason::RequestIdReused => (
            exit::REFUSED,
            "this --request-id belongs to another sandbox: use a new one, or repeat the first call unchanged",
        ),
        Reason::SandboxKnown => (
            exit::REFUSED,
            "`sandboxctl get` shows the sandbox that is known; there is nothing to recover",
        ),
        Reason::NeverFits => (
            exit::REFUSED,
            "ask for less memory, disk or cores, or for other labels; `sandboxctl node ls` shows what there is",
        ),
        Reason::IsolationFailed => (
            exit::NOT_NOW,
            "an operator looks why nft fails there: `sandboxctl admin fsck`, and the log of the node's agent",
        ),
        Reason::EgressRefused => (
            exit::REFUSED,
            "`sandboxctl team get` shows what your team may; leave --egress out for that; an operator raises it with `sandboxctl team set TEAM --egress`",
        ),
        Reason::PortDenied => (
            exit::REFUSED,
            "let the program listen on another port; or an operator removes this one from [ingress] denied_ports",
        ),
        Reason::AccessKind => (
            exit::REFUSED,
            "`sandboxctl get ID` shows who reaches the port; `sandboxctl expose ID PORT --visibility team` lets links in, `token` lets tokens in",
        ),
        Reason::VisibilityUnsupported => (
            exit::REFUSED,
            "upgrade the agent of the sandbox's node, or open the port with --public",
        ),
        Reason::LimitsFailed => (
            exit::NOT_NOW,
            "an operator looks why the node cannot write the sandbox's cgroup: the log of its agent",
        ),
        Reason::MemoryInUse => (
            exit::REFUSED,
            "`sandboxctl top ID` shows what it uses; give it more, or end something in it first",
        ),
        Reason::NotListening => (
            exit::REFUSED,
            "`sandboxctl port ls ID` shows what listens; start the server first, and repeat it",
        ),
        Reason::ForwardRefused => (
            exit::REFUSED,
            "the message says what is wrong; `sandboxctl port ls ID` shows which ports are taken",
        ),
        Reason::ForwardLost => {
            (exit::NOT_NOW, "connect again; `sandboxctl get ID` shows whether the sandbox runs")
        }
        Reason::EnvLost => (
            exit::REFUSED,
            "create another; if it runs, copy its files out first, with `sandboxctl cp`; an operator who has the secret.key puts it back",
        ),
        Reason::NameTaken => (
            exit::REFUSED,
            "use another name, or `sandboxctl rename ID NEW` for the sandbox that has it",
        ),
        Reason::ServiceExists => (
            exit::REFUSED,
            "use another --name, or close the port that has it with `sandboxctl hide ID NAME`",
        ),
        Reason::ExecIdReused => (
            exit::REFUSED,
            "this --exec-id belongs to another command: use a new one, or repeat the first call unchanged",
        ),
        Reason::SandboxPaused => (
            exit::REFUSED,
            "resume it with `sandboxctl resume ID`; `sandboxctl wake-on ID` shows and changes what wakes it",
        ),
        Reason::FreezeFailed => (
            exit::REFUSED,
            "unmount the FUSE file systems in it, or use `sandboxctl pause --or-stop ID`",
        ),
        Reason::FileRefused => {
            (exit::REFUSED, "check the path, and the user that opens it (--user)")
        }
        Reason::SandboxNotRunning => (
            exit::REFUSED,
            "`sandboxctl get ID` shows its state; boot a stopped one with `sandboxctl start ID`",
        ),
        Reason::SandboxDeleted => {
            (exit::NOT_FOUND, "it cannot come back; create another with `sandboxctl create`")
        }
        Reason::SandboxBusy => (
            exit::NOT_NOW,
            "wait for the operation under way to end (`sandboxctl watch ID`) and run it again",
        ),
        Reason::CreateCancelled => {
            (exit::REFUSED, "create another with `sandboxctl create` and a new --request-id")
        }
        Reason::NotOurs => (
            exit::REFUSED,
            "sandboxctl never changes containers that it did not create; use PVE's own tools for them",
        ),
        Reason::ContainerUnfit => (
            exit::REFUSED,
            "a sandbox must be an unprivileged container, without protection, and not a template",
        ),
        Reason::AddressConflict => (
            exit::REFUSED,
            "set the container's net0 to what the message says (`pct set VMID --net0 ...`), then `sandboxctl admin fsck`",
        ),
        Reason::DhcpRefused => (
            exit::REFUSED,
            "leave the address to the node (no --dhcp), or allow DHCP with `network.dhcp` in its agent's configuration",
        ),
        Reason::NotAdopted => (exit::REFUSED, "delete it with `sandboxctl rm ID`"),
        Reason::NotMovable => {
            (exit::REFUSED, "stop it first; its disk must be on storage that both nodes see")
        }
        Reason::ContainerGone => (
            exit::REFUSED,
            "`sandboxctl get ID` says where it is; recover it there, or delete the sandbox",
        ),
        Reason::NodeInUse => (
            exit::REFUSED,
            "only a node that does not answer can be forgotten; `sandboxctl node ls` shows the state of all",
        ),
        Reason::NoCapacity => (
            exit::NOT_NOW,
            "`sandboxctl explain --dry-run` says why for each node; delete sandboxes that are not needed, or try later",
        ),
        Reason::NodeCordoned => (
            exit::NOT_NOW,
            "leave out --node, or give the node new sandboxes again with `sandboxctl node uncordon NODE`",
        ),
        Reason::NodeNumberChanged => (
            exit::NOT_NOW,
            "leave out --node; or on the node, with the agent stopped, run `pve-sandbox-agent confirm-node-number`",
        ),
        Reason::MemoryFull => (
            exit::NOT_NOW,
            "delete or stop sandboxes there, ask for less memory, or leave out --node",
        ),
        Reason::StorageFull => (
            exit::NOT_NOW,
            "delete sandboxes that are not needed, or give the node's storage more room (`sandboxctl node ls`)",
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
        Reason::QuotaExceeded => (
            exit::REFUSED,
            "`sandboxctl team get` shows the limits and what is used; `sandboxctl rm` what is not needed",
        ),
        Reason::RateExceeded => (
            exit::NOT_NOW,
            "wait as the message says; `sandboxctl team get` shows the rate of your team",
        ),
        Reason::TooLarge => (
            exit::REFUSED,
            "send less at once; large output and input go through `sandboxctl exec` as a stream",
        ),
        Reason::EventsGone => (
            exit::REFUSED,
            "`sandboxctl ls -a` shows the present state; leave out --since to get the events that are kept",
        ),
        Reason::StaleEpoch => (
            exit::NOT_NOW,
            "another controller is in charge: point SANDBOXCTL_ENDPOINT at it, or restart this one if it should be",
        ),
        Reason::RevisionConflict => {
            (exit::NOT_NOW, "read the sandbox again with `sandboxctl get ID` and repeat the call")
        }
        Reason::ExecLost => (
            exit::REFUSED,
            "a part of it may have run: check what it did before you run it again under a new --exec-id",
        ),
        Reason::NodeRevoked => (
            exit::REFUSED,
            "an operator runs `sandboxctl node token NODE`, and on the node the line that it prints; or gives up its sandboxes with `sandboxctl node forget NODE --lost`",
        ),
        Reason::NodeUnreachable => (
            exit::NOT_NOW,
            "`sandboxctl node ls` shows which node; on it, run `systemctl status pve-sandbox-agent`",
        ),
        Reason::NoQuorum => (
            exit::NOT_NOW,
            "the cluster refuses changes until most of its nodes are back: see `pvecm status` on a node",
        ),
        Reason::ContainerLocked => (
            exit::NOT_NOW,
            "PVE works on the container (perhaps a backup): try again when its task has ended",
        ),
        Reason::ShuttingDown => (exit::NOT_NOW, "try again in a few seconds"),
        Reason::OutcomeUnknown => (
            exit::NOT_NOW,
            "it may be done by now: check with `sandboxctl ls`; to repeat it, give `create` the same --request-id and `exec` the same --exec-id, so that it is not done twice",
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
            "this is a defect: run `sandboxctl admin fsck` and report its output with the daemon's log",
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
