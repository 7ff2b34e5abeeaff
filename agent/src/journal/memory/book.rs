//! Content of the journal in memory: what SQL does on the disk, with the deliberate defects.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use proto::{
    Cause, Progress,
    id::{SandboxId, Vmid},
    spec::Network,
};

use super::Mutation;
use crate::journal::{Error, Intent, Node, Phase, Pools, Record, Result, ring, scheduling};

/// Content of the file.
#[derive(Debug, Clone, Default)]
pub(super) struct Book {
    pub(super) mutation: Option<Mutation>,
    pub(super) records: BTreeMap<SandboxId, Arc<Record>>,
    resting: BTreeMap<Ipv4Addr, u64>,
    pub(super) cancelled: BTreeMap<SandboxId, (u32, u64)>,
    pub(super) revision: u64,
    pub(super) horizon: u64,
    pub(super) epoch: u64,
    pub(super) scheduling: scheduling::Scheduling,
    pub(super) node: Option<Node>,
    vmid_cursor: Option<u32>,
    address_cursor: Option<u32>,
}

impl Book {
    pub(super) fn begin(&mut self, pools: &Pools, intent: &Intent, now_ms: u64) -> Result<Record> {
        let mut record = intent.record.clone();
        if let Some(before) = self.records.get(&record.id)
            && (!before.phase.ended() || before.attempt >= record.attempt)
        {
            return Err(Error::Conflict { id: record.id, expected: 0, found: before.revision });
        }
        let none = BTreeSet::new();
        let strangers =
            if self.mutation == Some(Mutation::Strangers) { &none } else { &intent.taken_ips };
        record.vmid = self.lease_vmid(pools, &intent.taken)?;
        if self.mutation == Some(Mutation::Vmids) {
            record.vmid = self.living().next().map_or(record.vmid, |other| other.vmid);
        }
        if intent.lease_address {
            record.ip = Some(self.lease_address(pools, strangers, now_ms)?);
        }
        self.put(record)
    }

    pub(super) fn adopt(&mut self, record: &Record) -> Result<Record> {
        if let Some(known) = self.records.get(&record.id) {
            return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
        }
        self.write_found(record)
    }

    pub(super) fn import(
        &mut self,
        pools: &Pools,
        record: &Record,
        taken_ips: &BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record> {
        if let Some(known) =
            self.records.get(&record.id).filter(|known| !known.gives_way_to(record))
        {
            return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
        }
        let mut record = record.clone();
        if record.network == Network::Static {
            record.ip = Some(self.lease_address(pools, taken_ips, now_ms)?);
        }
        self.write_found(&record)
    }

    /// Writes the record of a container that existed before it.
    fn write_found(&mut self, record: &Record) -> Result<Record> {
        let clashes = |other: &Record| {
            other.vmid == record.vmid
                || (other.lease().is_some() && other.lease() == record.lease())
                || (&other.team, &other.request_id) == (&record.team, &record.request_id)
        };
        let other = self.living().find(|other| clashes(other));
        if let Some(other) = other {
            return Err(Error::Conflict { id: record.id, expected: 0, found: other.revision });
        }
        self.put(record.clone())
    }

    pub(super) fn next_vmid(
        &mut self,
        pools: &Pools,
        record: &Record,
        taken: &BTreeSet<Vmid>,
    ) -> Result<Record> {
        self.at_revision(record)?;
        let mut taken = taken.clone();
        taken.insert(record.vmid);
        let mut record = record.clone();
        record.vmid = self.lease_vmid(pools, &taken)?;
        self.put(record)
    }

    pub(super) fn update(&mut self, pools: &Pools, record: &Record) -> Result<Record> {
        let before = self.at_revision(record)?;
        if let (false, true, Some(ip)) =
            (before.phase.ended(), record.phase.ended(), before.lease())
        {
            let until = record.ended_ms.saturating_add(pools.address_quarantine_ms);
            self.resting.insert(ip, until);
        }
        let mut record = record.clone();
        let taken = |ip: &Ipv4Addr| {
            self.living().any(|other| other.id != record.id && other.lease() == Some(*ip))
        };
        let lease = record.lease().filter(|_| !record.phase.ended());
        if let Some(ip) = lease.filter(|ip| before.lease() != Some(*ip)).filter(taken) {
            return Err(Error::AddressTaken { ip });
        }
        if self.mutation == Some(Mutation::Extensions) && record.phase == before.phase {
            record.lifetime = before.lifetime.clone();
        }
        if self.mutation == Some(Mutation::Exports) && record.progress == Progress::Export {
            (record.phase, record.cause) = (Phase::Deleted, Cause::Moved);
            record.ended_ms = record.since.wall_ms.max(1);
        }
        self.put(record)
    }

    pub(super) fn forget(&mut self, before_ms: u64) -> usize {
        self.cancelled.retain(|_, &mut (_, at_ms)| at_ms >= before_ms);
        self.resting.retain(|_, &mut until_ms| until_ms >= before_ms);
        let before = self.records.len();
        let mut horizon = self.horizon;
        self.records.retain(|_, record| {
            let old = record.phase.ended() && record.ended_ms < before_ms;
            if old {
                horizon = horizon.max(record.revision);
            }
            !old
        });
        self.horizon = horizon;
        before - self.records.len()
    }

    fn lease_vmid(&mut self, pools: &Pools, taken: &BTreeSet<Vmid>) -> Result<Vmid> {
        let range = (pools.vmids.0.get(), pools.vmids.1.get());
        let leased = |live_only: bool| -> BTreeSet<u32> {
            let records = self.records.values().filter(|r| !live_only || !r.phase.ended());
            records.map(|record| record.vmid.get()).chain(taken.iter().map(|v| v.get())).collect()
        };
        for busy in [leased(false), leased(true)] {
            let found = ring::next(range, self.vmid_cursor, |n| Ok::<_, Error>(!busy.contains(&n)));
            if let Some(vmid) = found?.and_then(|number| Vmid::try_from(number).ok()) {
                self.vmid_cursor = Some(vmid.get());
                return Ok(vmid);
            }
        }
        Err(Error::VmidsExhausted { first: pools.vmids.0, last: pools.vmids.1 })
    }

    fn lease_address(
        &mut self,
        pools: &Pools,
        taken: &BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Ipv4Addr> {
        if let (Some(Mutation::Addresses), Some(ip)) =
            (self.mutation, self.living().find_map(|other| other.ip))
        {
            return Ok(ip);
        }
        let range = (u32::from(pools.addresses.0), u32::from(pools.addresses.1));
        let busy = self.busy_addresses(now_ms);
        let free = |number: u32| {
            let address = Ipv4Addr::from(number);
            Ok::<_, Error>(!busy.contains(&address) && !taken.contains(&address))
        };
        let found = ring::next(range, self.address_cursor, free)?;
        let number = found.ok_or(Error::AddressesExhausted)?;
        self.address_cursor = Some(number);
        Ok(number.into())
    }

    fn living(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.records.values().filter(|record| !record.phase.ended())
    }

    fn busy_addresses(&self, now_ms: u64) -> BTreeSet<Ipv4Addr> {
        let live = self.records.values().filter(|record| !record.phase.ended());
        let resting = self.resting.iter().filter(|&(_, &until_ms)| until_ms > now_ms);
        live.filter_map(|record| record.lease()).chain(resting.map(|(&ip, _)| ip)).collect()
    }

    fn at_revision(&self, record: &Record) -> Result<Arc<Record>> {
        match self.records.get(&record.id) {
            Some(found) if found.revision == record.revision => Ok(Arc::clone(found)),
            other => Err(Error::Conflict {
                id: record.id,
                expected: record.revision,
                found: other.map_or(0, |found| found.revision),
            }),
        }
    }

    fn put(&mut self, mut record: Record) -> Result<Record> {
        let rival = self.records.values().find(|other| {
            other.id != record.id
                && !other.phase.ended()
                && !record.phase.ended()
                && (&other.team, &other.request_id) == (&record.team, &record.request_id)
        });
        if let Some(rival) = rival {
            return Err(Error::Storage(format!("{} has this request_id", rival.id)));
        }
        self.revision += 1;
        record.revision = self.revision;
        record.drop_secrets();
        if self.mutation == Some(Mutation::Tombstones) && record.phase.ended() {
            self.records.remove(&record.id);
        } else {
            self.records.insert(record.id, Arc::new(record.clone()));
        }
        Ok(record)
    }

    pub(super) fn room(&self, pools: &Pools, now_ms: u64) -> (u32, u32) {
        let vmids = pools.vmids.0..=pools.vmids.1;
        let addresses = pools.addresses.0..=pools.addresses.1;
        let leased = self
            .records
            .values()
            .filter(|record| !record.phase.ended() || self.mutation == Some(Mutation::Room))
            .filter(|record| vmids.contains(&record.vmid))
            .count();
        let busy = self.busy_addresses(now_ms);
        let busy = busy.iter().filter(|&ip| addresses.contains(ip)).count();
        let free = |first: u32, last: u32, used: usize| {
            let used = u32::try_from(used).unwrap_or(u32::MAX);
            (last - first).saturating_add(1).saturating_sub(used)
        };
        (
            free(pools.vmids.0.get(), pools.vmids.1.get(), leased),
            free(pools.addresses.0.into(), pools.addresses.1.into(), busy),
        )
    }
}
