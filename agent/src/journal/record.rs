//! The journal's record of one sandbox: the truth about it.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, Vmid},
    lifetime::{Action, LifetimePatch},
    name::{Port, RequestId, ServiceName, SnapshotId, Team},
    spec::{Network, Size},
};
use serde::{Deserialize, Serialize};

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
    /// True for a tombstone: nothing of the sandbox is on the host.
    pub const fn ended(self) -> bool {
        matches!(self, Self::Deleted | Self::Failed)
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
}

impl Lifetime {
    /// Applies the changes of `wish`, from `now` on.
    #[must_use]
    pub fn with(mut self, wish: &LifetimePatch, now: &Moment) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if let Some(ttl) = wish.ttl {
            self.ttl_ms = ms(ttl);
            self.expires = (!ttl.is_zero()).then(|| now.after(ttl));
        }
        self.ttl_action = wish.ttl_action.unwrap_or(self.ttl_action);
        self.idle_ms = wish.idle.map_or(self.idle_ms, ms);
        self.idle_action = wish.idle_action.unwrap_or(self.idle_action);
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
    /// Source of its address.
    pub network: Network,
    /// Address: the lease, or the one that DHCP gave. Use `lease`, which checks whether it counts.
    pub ip: Option<Ipv4Addr>,
    /// Whether a DHCP reply seen on the host gave it `ip`. Unused with static addresses. Older
    /// versions believed the container itself: their addresses do not count.
    #[serde(default)]
    pub ip_granted: bool,
    /// Open ports.
    pub services: BTreeMap<ServiceName, Port>,
    /// Metadata of the caller.
    pub metadata: BTreeMap<String, String>,
    /// Environment variables of every command.
    pub env: BTreeMap<String, String>,
    /// Number of starts: +1 at each.
    pub boot: u32,
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
    /// True for a tombstone that may be replaced by `record`, which comes from another node.
    pub fn gives_way_to(&self, record: &Self) -> bool {
        self.was_let_go() || self.phase.ended() && self.attempt < record.attempt
    }

    /// True when the sandbox ended without its container, which may still exist elsewhere.
    pub fn was_let_go(&self) -> bool {
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
