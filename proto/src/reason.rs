//! Constants of `google.rpc.ErrorInfo.reason`: what a caller can branch on. docs/errors.md lists
//! each with its gRPC code and what to do.

/// `ErrorInfo.domain` of every error of ours.
pub const DOMAIN: &str = "pve-sandbox";

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])* pub const $name: &str = stringify!($name);)*
        /// Every reason, for the test that compares them with the documentation.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

reasons! {
    /// INVALID_ARGUMENT: a field is wrong; BadRequest names it.
    FIELD_INVALID;
    /// UNAUTHENTICATED: no token, or one that is not known.
    TOKEN_INVALID;
    /// PERMISSION_DENIED: the token or certificate may not do this.
    SCOPE_MISSING;
    /// NOT_FOUND: no such sandbox in this team.
    SANDBOX_NOT_FOUND;
    /// NOT_FOUND: no node knows this snapshot.
    SNAPSHOT_NOT_FOUND;
    /// NOT_FOUND: no service of this name.
    SERVICE_NOT_FOUND;
    /// NOT_FOUND: no node of this name.
    NODE_NOT_FOUND;
    /// NOT_FOUND: no command of this exec_id.
    EXEC_NOT_FOUND;
    /// NOT_FOUND: no such file in the sandbox.
    FILE_NOT_FOUND;
    /// ALREADY_EXISTS: the request_id was used with another body.
    REQUEST_ID_REUSED;
    /// ALREADY_EXISTS: the container to recover, or what it would take, is a sandbox already.
    SANDBOX_KNOWN;
    /// ALREADY_EXISTS: the name is taken by another port.
    SERVICE_EXISTS;
    /// ALREADY_EXISTS: the exec_id was used with another command.
    EXEC_ID_REUSED;
    /// FAILED_PRECONDITION: the sandbox is not running.
    SANDBOX_NOT_RUNNING;
    /// FAILED_PRECONDITION: the sandbox is being deleted or is deleted.
    SANDBOX_DELETED;
    /// FAILED_PRECONDITION: another operation on this sandbox is under way.
    SANDBOX_BUSY;
    /// FAILED_PRECONDITION: the creation was called off.
    CREATE_CANCELLED;
    /// FAILED_PRECONDITION: the container is not ours, or not as our journal says.
    NOT_OURS;
    /// FAILED_PRECONDITION: the container cannot be a sandbox: it is privileged or protected. Of a creation:
    /// the snapshot's template cannot be cloned, or its clones would share an address.
    CONTAINER_UNFIT;
    /// FAILED_PRECONDITION: the container's address, bridge or MAC is not the one of its record, or
    /// another container has its address.
    ADDRESS_CONFLICT;
    /// FAILED_PRECONDITION: the node's operator does not allow DHCP, or its replies cannot be seen
    /// on the host.
    DHCP_REFUSED;
    /// FAILED_PRECONDITION: the sandbox was no container of somebody's before; delete it.
    NOT_ADOPTED;
    /// FAILED_PRECONDITION: the sandbox cannot go to that node: it is not stopped, or its volumes are not
    /// seen there.
    NOT_MOVABLE;
    /// FAILED_PRECONDITION: the node is in use and cannot be given up.
    NODE_IN_USE;
    /// FAILED_PRECONDITION: the sandbox's container is gone, or on another node.
    CONTAINER_GONE;
    /// FAILED_PRECONDITION: the sandbox is paused, and this does not wake it.
    SANDBOX_PAUSED;
    /// FAILED_PRECONDITION: something in the sandbox does not freeze; it runs on.
    FREEZE_FAILED;
    /// FAILED_PRECONDITION: the file is not what the call needs, or the sandbox does not let it be
    /// touched.
    FILE_REFUSED;
    /// RESOURCE_EXHAUSTED: no node has room now; NodeVerdicts say why.
    NO_CAPACITY;
    /// RESOURCE_EXHAUSTED: the node is cordoned or being drained.
    NODE_CORDONED;
    /// RESOURCE_EXHAUSTED: the node's number in the cluster has changed, and nobody has confirmed it.
    NODE_NUMBER_CHANGED;
    /// RESOURCE_EXHAUSTED: the storage is full.
    STORAGE_FULL;
    /// RESOURCE_EXHAUSTED: the node has no memory for one more.
    MEMORY_FULL;
    /// RESOURCE_EXHAUSTED: too many creations wait on this node.
    QUEUE_FULL;
    /// RESOURCE_EXHAUSTED: the node has no vmid left in its range.
    VMIDS_EXHAUSTED;
    /// RESOURCE_EXHAUSTED: the node has no address left in its pool.
    ADDRESSES_EXHAUSTED;
    /// RESOURCE_EXHAUSTED: too many calls at once.
    TOO_MANY_CALLS;
    /// RESOURCE_EXHAUSTED: a message or an output was larger than is taken.
    TOO_LARGE;
    /// OUT_OF_RANGE: events after this revision are not kept any more.
    EVENTS_GONE;
    /// ABORTED: a controller with a higher epoch is in charge.
    STALE_EPOCH;
    /// ABORTED: the sandbox was changed in between.
    REVISION_CONFLICT;
    /// ABORTED: the command was lost with its boot or its supervisor: it may have run in part, and is
    /// not run again.
    EXEC_LOST;
    /// UNAVAILABLE: the node or its agent does not answer.
    NODE_UNREACHABLE;
    /// UNAVAILABLE: the cluster has no quorum on that node.
    NO_QUORUM;
    /// UNAVAILABLE: PVE holds a lock on the container.
    CONTAINER_LOCKED;
    /// UNAVAILABLE: the daemon is stopping.
    SHUTTING_DOWN;
    /// DEADLINE_EXCEEDED: the outcome is not known yet: it may be done, or a command may run or have
    /// run; ask again with the same request_id or exec_id.
    OUTCOME_UNKNOWN;
    /// DEADLINE_EXCEEDED: the sandbox did not answer its probe in time.
    PROBE_TIMEOUT;
    /// INTERNAL: pct failed; the message has its last line.
    PCT_FAILED;
    /// INTERNAL: the command was not run, and will not be; or work on files failed.
    EXEC_FAILED;
    /// INTERNAL: the journal or the store failed.
    STORE_FAILED;
    /// INTERNAL: something that must hold did not.
    INVARIANT;
}

/// Reasons by which a node refuses a creation: nothing was made, and another node may do it, or this
/// one later. Every other one is a failure of the creation.
pub const NOT_HERE_NOT_NOW: &[&str] = &[
    NO_CAPACITY,
    NODE_CORDONED,
    NODE_NUMBER_CHANGED,
    STORAGE_FULL,
    MEMORY_FULL,
    QUEUE_FULL,
    VMIDS_EXHAUSTED,
    ADDRESSES_EXHAUSTED,
    DHCP_REFUSED,
    TOO_MANY_CALLS,
    SANDBOX_BUSY,
    NO_QUORUM,
    NODE_UNREACHABLE,
    NODE_NOT_FOUND,
    SHUTTING_DOWN,
    SNAPSHOT_NOT_FOUND,
];
