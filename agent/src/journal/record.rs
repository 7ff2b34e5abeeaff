//! The journal's record of one sandbox: the truth about it.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, time::Duration};

use daemon::clock::millis;
use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, Vmid},
    lifetime::{Action, LifetimePatch},
    name::{Port, RequestId, SandboxName, ServiceName, SnapshotId, Team},
    sandbox::v1::StopResult,
    secret::Env,
    spec::{Egress, Network, Size},
};
use serde::{Deserialize, Serialize};

use super::ports::Access;
use crate::{
    clock::Moment,
    pve::{Mark, OwnVolumes},
};

/// Phase of a sandbox's life. The goal follows from it: CREATING is to run or to be undone,
/// DELETING is to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Intent recorded; being cloned, configured or booted. After a crash: undone or finished.
    Creating,
    /// The creation failed or was cancelled; what it made is being removed.
    Undoing,
    /// Up; its probe succeeded.
    Running,
    /// Frozen, or about to be: its memory is kept, nothing in it runs. Frozen once the operation
    /// that wrote this phase has succeeded; after a crash the reconciler freezes it.
    Paused,
    /// Booting again.
    Starting,
    /// Being stopped.
    Stopping,
    /// Down, disk kept.
    Stopped,
    /// Being deleted.
    Deleting,
    /// Deleted: a tombstone.
    Deleted,
    /// Undone: a tombstone with its failure.
    Failed,
}

impl Phase {
    // Each predicate names all phases, so that a new one is decided on here and nowhere else.

    /// True for a tombstone: nothing of the sandbox is on the host.
    pub const fn ended(self) -> bool {
        match self {
            Self::Deleted | Self::Failed => true,
            Self::Creating
            | Self::Undoing
            | Self::Running
            | Self::Paused
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Deleting => false,
        }
    }

    /// True when the container's init runs, frozen or not.
    pub const fn is_up(self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Creating
            | Self::Undoing
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Deleting
            | Self::Deleted
            | Self::Failed => false,
        }
    }

    /// True while the creation is neither complete nor rolled back.
    pub const fn is_creation(self) -> bool {
        match self {
            Self::Creating | Self::Undoing => true,
            Self::Running
            | Self::Paused
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Deleting
            | Self::Deleted
            | Self::Failed => false,
        }
    }

    /// True when the sandbox has ended or is certain to end: it accepts no more changes.
    pub const fn is_ending(self) -> bool {
        match self {
            Self::Undoing | Self::Deleting | Self::Deleted | Self::Failed => true,
            Self::Creating
            | Self::Running
            | Self::Paused
            | Self::Starting
            | Self::Stopping
            | Self::Stopped => false,
        }
    }
}

/// Word for a sentence: "it is ...".
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "being created",
            Self::Undoing => "being undone",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
            Self::Deleted => "deleted",
            Self::Failed => "failed",
        })
    }
}

/// Events that wake a paused sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeOn {
    /// Wake on a request for one of its open ports.
    pub http: bool,
    /// Wake on a connection to its SSH port.
    pub ssh: bool,
    /// Wake on a command or an access to its files.
    pub exec: bool,
}

impl Default for WakeOn {
    /// All uses but `ssh`, which nothing asks for yet.
    fn default() -> Self {
        Self { http: true, ssh: false, exec: true }
    }
}

/// Rules for the lifetime of a sandbox, complete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifetime {
    /// Time to live, milliseconds; 0: for ever. Starts anew when an expired sandbox resumes.
    pub ttl_ms: u64,
    /// Action at expiry.
    pub ttl_action: Action,
    /// Time of the expiry, past or future.
    pub expires: Option<Moment>,
    /// Time without use that counts as idle, milliseconds; 0: never.
    pub idle_ms: u64,
    /// Action when idle.
    pub idle_action: Action,
    /// CPU use beyond which it is not idle, percent of one core; 0: not looked at.
    pub idle_cpu: u32,
}

impl Lifetime {
    /// Applies the changes of `patch`, from `now` on.
    #[must_use]
    pub fn with(mut self, patch: &LifetimePatch, now: &Moment) -> Self {
        if let Some(ttl) = patch.ttl {
            self.ttl_ms = millis(ttl);
            self.expires = (!ttl.is_zero()).then(|| now.after(ttl));
        }
        self.ttl_action = patch.ttl_action.unwrap_or(self.ttl_action);
        self.idle_ms = patch.idle.map_or(self.idle_ms, millis);
        self.idle_action = patch.idle_action.unwrap_or(self.idle_action);
        self.idle_cpu = patch.idle_cpu.unwrap_or(self.idle_cpu);
        self
    }

    /// Restarts the time to live of a sandbox that runs again after it expired.
    pub fn renew(&mut self, now: &Moment) {
        if self.expires.as_ref().is_some_and(|expiry| expiry.reached(now)) {
            self.expires = Some(now.after(Duration::from_millis(self.ttl_ms)));
        }
    }
}

/// Reason of the last operation's failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Reason that callers branch on.
    #[serde(with = "proto::reason::by_name")]
    pub reason: Reason,
    /// One sentence, with `pct`'s own last line if it printed one.
    pub message: String,
    /// Actions and result of the rollback; empty when there was nothing to undo.
    pub rollback: String,
}

/// Most addresses of a sandbox that are told.
const ADDRESSES_MAX: usize = 16;

/// One sandbox. Fields are added, never changed: the previous version must read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Vmid of its container, leased together with the intent. A tombstone keeps its last.
    pub vmid: Vmid,
    /// Template that it was cloned from.
    pub template: Vmid,
    /// Owner.
    pub team: Team,
    /// The owner's idempotency key.
    pub request_id: RequestId,
    /// SHA-256 of the request's body, hex.
    pub body_digest: String,
    /// Attempt of the controller.
    pub attempt: u32,
    /// Phase of its life.
    pub phase: Phase,
    /// Step, for people: queued, clone, configure, resize_offline, start, resize, probe.
    #[serde(rename = "step", with = "super::words::progress")]
    pub progress: Progress,
    /// Snapshot that it was created from.
    pub snapshot: SnapshotId,
    /// Compute, complete.
    pub size: Size,
    /// Size that its container is being given.
    #[serde(default)]
    pub resizing: Option<Size>,
    /// Whether a growth of its disk was cut short, so that its file system may be smaller than the
    /// volume. The next growth finishes it.
    #[serde(default)]
    pub disk_unfinished: bool,
    /// Source of its address.
    pub network: Network,
    /// Address: the lease, or the one that DHCP gave. Use `lease`, which checks whether it counts.
    pub ip: Option<Ipv4Addr>,
    /// Whether a DHCP reply seen on the host gave it `ip`. Unused with static addresses. Older
    /// versions believed the container itself: their addresses do not count.
    #[serde(default)]
    pub ip_granted: bool,
    /// Static addresses of its container's interfaces beside `net0`, in their order, as of its adoption or its last
    /// start. Only a container that is not isolated has any. Unlike the lease they are told, and not used.
    #[serde(default)]
    pub further_ips: Vec<Ipv4Addr>,
    /// Reach of a sandbox outside of itself. Absent in older records, which are open.
    #[serde(default, with = "super::words::egress")]
    pub egress: Egress,
    /// Ports that are open to everybody.
    pub services: BTreeMap<ServiceName, Port>,
    /// Ports that are open to some. Absent in older records, whose open ports are all public.
    #[serde(default)]
    pub access: Access,
    /// Name that the caller gave it.
    #[serde(default)]
    pub name: Option<SandboxName>,
    /// Metadata of the caller.
    pub metadata: BTreeMap<String, String>,
    /// Environment variables of every command. The journal's file has them sealed; a tombstone has none.
    pub env: Env,
    /// Whether its environment cannot be read, because the key that sealed it is lost.
    #[serde(default)]
    pub env_lost: bool,
    /// Number of starts: +1 at each.
    pub boot: u32,
    /// Start time of its container's init in this boot, in ticks since the boot of the host that
    /// `since` names; `None` while it is unknown.
    #[serde(default)]
    pub init: Option<u64>,
    /// Time of the intent, milliseconds since 1970.
    pub created_ms: u64,
    /// Time when it last came up; 0 if never.
    pub started_ms: u64,
    /// Time when it ended; 0 before that.
    pub ended_ms: u64,
    /// Events that wake it while it is paused. Absent in older records.
    #[serde(default)]
    pub wake_on: WakeOn,
    /// Rules for its lifetime.
    #[serde(default)]
    pub lifetime: Lifetime,
    /// Time of the last change of its phase; unknown in older records.
    #[serde(default)]
    pub since: Moment,
    /// Cause of that change, if no caller asked for it: a value of `Sandbox.cause`.
    #[serde(default, with = "super::words::cause")]
    pub cause: Cause,
    /// Whether it was adopted: its container existed before, and can be released.
    #[serde(default)]
    pub adopted: bool,
    /// While it is being stopped: time until which its container may shut down by itself; `None`: it
    /// is killed at once.
    #[serde(default)]
    pub halt_by: Option<Moment>,
    /// How it was stopped.
    #[serde(default, with = "super::words::stop_result")]
    pub stop_result: StopResult,
    /// Volumes of its own beside those that its config names. Empty in older records, and for
    /// containers that were not cloned here.
    #[serde(default)]
    pub volumes: OwnVolumes,
    /// Node that imported it, once this node has dropped it.
    #[serde(default)]
    pub moved_to: Option<proto::name::NodeName>,
    /// Failure of the last operation.
    pub failure: Option<Failure>,
    /// Revision of this version of the record; set by the journal.
    pub revision: u64,
}

impl Record {
    /// Drops what a tombstone does not keep: the secrets of a sandbox end with it.
    pub(super) fn drop_secrets(&mut self) {
        if self.phase.ended() {
            (self.env, self.env_lost) = (Env::default(), false);
            self.access.key = None;
        }
    }

    /// True for a tombstone that may be replaced by `record`, which comes from another node.
    pub fn gives_way_to(&self, record: &Self) -> bool {
        self.was_released() || self.phase.ended() && self.attempt < record.attempt
    }

    /// True when the sandbox ended without its container, which may still exist elsewhere.
    pub fn was_released(&self) -> bool {
        self.phase.ended() && matches!(self.cause, Cause::Released | Cause::Moved)
    }

    /// Address that belongs to this sandbox alone: the only target of requests, probes and
    /// connection kills. A stopped sandbox with DHCP has none, whose server may give it to others.
    pub fn lease(&self) -> Option<Ipv4Addr> {
        match self.network {
            Network::Static => self.ip,
            Network::Dhcp => self.ip.filter(|_| self.ip_granted && self.phase != Phase::Stopped),
        }
    }

    /// All of its addresses that are known, in the order of its interfaces.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.lease().into_iter().chain(self.further_ips.iter().copied()).take(ADDRESSES_MAX)
    }

    /// Memory that counts as given to it, bytes: the larger one while its size changes.
    pub fn memory_bytes(&self) -> u64 {
        let next = self.resizing.map_or(0, Size::memory_bytes);
        self.size.memory_bytes().max(next)
    }

    /// Mark that the container must carry.
    pub fn mark(&self) -> Mark {
        Mark {
            sandbox_id: self.id,
            vmid: self.vmid,
            attempt: self.attempt,
            team: self.team.clone(),
            request_id: self.request_id.clone(),
        }
    }
}
