//! What the journal keeps of one sandbox: the truth about it.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, Vmid},
    lifetime::{Action, Wish},
    name::{Port, RequestId, ServiceName, SnapshotId, Team},
    spec::{Network, Size},
};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Moment,
    pve::{Mark, OwnVolumes},
};

/// Where a sandbox is in its life. What is wanted follows from it: CREATING wants to run or to be
/// undone, DELETING wants to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Intent recorded; being cloned, configured, booted. After a crash: undone or finished.
    Creating,
    /// The creation failed or was called off; what it made is being removed.
    Undoing,
    /// Up, and it answered.
    Running,
    /// To be frozen: its memory is kept, nothing in it runs. It is frozen when the operation that
    /// wrote this has ended well; after a crash the reconciler makes it so.
    Paused,
    /// Booting again.
    Starting,
    /// Being stopped.
    Stopping,
    /// Down, disk kept.
    Stopped,
    /// Being removed.
    Deleting,
    /// Gone. A tombstone.
    Deleted,
    /// Undone. A tombstone with its failure.
    Failed,
}

impl Phase {
    /// A tombstone: nothing of it is on the host.
    pub const fn ended(self) -> bool {
        matches!(self, Self::Deleted | Self::Failed)
    }
}

/// What wakes a sandbox when it is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeOn {
    /// A request for one of its open ports.
    pub http: bool,
    /// A connection to its SSH port.
    pub ssh: bool,
    /// A command, or access to its files.
    pub exec: bool,
}

impl Default for WakeOn {
    /// What a sandbox is used by; nothing asks for `ssh` yet.
    fn default() -> Self {
        Self { http: true, ssh: false, exec: true }
    }
}

/// How long a sandbox lives, complete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifetime {
    /// Time to live, milliseconds; 0: for ever. What was paused or stopped by it gets as much again.
    pub ttl_ms: u64,
    /// What is done then.
    pub ttl_action: Action,
    /// When it expires, or did.
    pub expires: Option<Moment>,
    /// Time without use that counts as idle, milliseconds; 0: never.
    pub idle_ms: u64,
    /// What is done then.
    pub idle_action: Action,
}

impl Lifetime {
    /// With what `wish` changes, from `now` on.
    #[must_use]
    pub fn with(mut self, wish: &Wish, now: &Moment) -> Self {
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

    /// It runs again: an expiry that has been seen to begins anew.
    pub fn renew(&mut self, now: &Moment) {
        if self.expires.as_ref().is_some_and(|expiry| expiry.reached(now)) {
            self.expires = Some(now.after(Duration::from_millis(self.ttl_ms)));
        }
    }
}

/// Why the last operation failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What a caller branches on.
    #[serde(with = "proto::reason::by_name")]
    pub reason: Reason,
    /// A sentence, with `pct`'s own last line where it spoke.
    pub message: String,
    /// What the rollback did and how it ended; empty when there was nothing to undo.
    pub rollback: String,
}

/// One sandbox. Fields are added, never changed: the version before must read what this one wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Identity.
    pub id: SandboxId,
    /// Container; leased in the same transaction that wrote the intent. A tombstone keeps its last.
    pub vmid: Vmid,
    /// Template that it was cloned from.
    pub template: Vmid,
    /// Owner.
    pub team: Team,
    /// The owner's idempotency key.
    pub request_id: RequestId,
    /// SHA-256 of the request's body, hex.
    pub body_digest: String,
    /// The controller's try.
    pub attempt: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// How far its operation is.
    #[serde(rename = "step", with = "super::words::progress")]
    pub progress: Progress,
    /// What it was created from.
    pub snapshot: SnapshotId,
    /// Compute, complete.
    pub size: Size,
    /// How it gets its address.
    pub network: Network,
    /// Its address: the lease, or what DHCP gave. Use `lease`, which knows whether it counts.
    pub ip: Option<Ipv4Addr>,
    /// A DHCP reply that was seen on the host gave it `ip`. Without meaning for static addresses.
    /// Older versions believed what stood inside of the container: what they wrote does not count.
    #[serde(default)]
    pub ip_granted: bool,
    /// Open ports.
    pub services: BTreeMap<ServiceName, Port>,
    /// The caller's pairs.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every command.
    pub env: BTreeMap<String, String>,
    /// +1 at every start.
    pub boot: u32,
    /// When the intent was recorded, milliseconds since 1970.
    pub created_ms: u64,
    /// When it last came up; 0 if never.
    pub started_ms: u64,
    /// When it ended; 0 while it lives.
    pub ended_ms: u64,
    /// What wakes it when it is paused. Records of before there was such a thing have none.
    #[serde(default)]
    pub wake_on: WakeOn,
    /// How long it lives.
    #[serde(default)]
    pub lifetime: Lifetime,
    /// When its phase last changed; unknown in records of before there was such a thing.
    #[serde(default)]
    pub since: Moment,
    /// Why it did.
    #[serde(default, with = "super::words::cause")]
    pub cause: Cause,
    /// It was somebody's container before it was a sandbox, and can be given back.
    #[serde(default)]
    pub adopted: bool,
    /// Volumes that are its own beside those that its config names. Empty in records of before there
    /// was such a thing, and for containers that were not cloned here.
    #[serde(default)]
    pub volumes: OwnVolumes,
    /// The node that has taken it over, once this one has left it.
    #[serde(default)]
    pub moved_to: Option<proto::name::NodeName>,
    /// Why the last operation failed.
    pub failure: Option<Failure>,
    /// The journal's revision of this version of the record; set by the journal.
    pub revision: u64,
}

impl Record {
    /// It is the tombstone of one that may come from another node, as this record.
    pub fn gives_way_to(&self, record: &Self) -> bool {
        self.was_let_go() || self.phase.ended() && self.attempt < record.attempt
    }

    /// It ended without its container, which may live on elsewhere.
    pub fn was_let_go(&self) -> bool {
        self.phase.ended() && matches!(self.cause, Cause::Released | Cause::Moved)
    }

    /// The address that is this sandbox's and nobody else's: the only one that requests, probes and
    /// cuts go to. A stopped one has none by DHCP, whose server may give it to others.
    pub fn lease(&self) -> Option<Ipv4Addr> {
        match self.network {
            Network::Static => self.ip,
            Network::Dhcp => self.ip.filter(|_| self.ip_granted && self.phase != Phase::Stopped),
        }
    }

    /// The mark that the container must carry.
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
