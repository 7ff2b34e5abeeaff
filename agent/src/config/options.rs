//! Converts the configuration for the domain and the journal.

use std::time::Duration;

use proto::spec::Size;

use super::Config;
use crate::{
    journal::Pools,
    pve::{IoMax, Link, forbidden::Allowed},
    sandbox,
};

impl Config {
    /// Returns the options of the domain.
    pub fn options(&self) -> sandbox::Options {
        let templates = self.templates.iter().map(|template| sandbox::Template {
            snapshot: template.snapshot.clone(),
            vmid: template.vmid,
            size: Size { cpu_cores: template.cores, memory_mib: template.memory_mib, disk_gib: 0 },
            bridge: template.bridge.clone(),
            allowed: Allowed {
                privileged: template.privileged,
                unsafe_lines: template.allow_unsafe,
                caches: template.read_only_caches.clone(),
            },
            link: Link { tag: template.tag, rate: template.rate, firewall: template.firewall },
            probe: template.probe.clone(),
            ports: sandbox::DefaultPorts {
                services: template.services.clone(),
                on_listen: template.expose_on_listen,
            },
        });
        let network = &self.network;
        let limits = &self.limits;
        let bounded = |limit: u64| (limit > 0).then_some(limit);
        sandbox::Options {
            templates: templates.collect(),
            network: sandbox::Bridge {
                name: network.bridge.clone(),
                prefix: network.prefix,
                gateway: network.gateway,
                own: network.own.clone(),
                dhcp: network.dhcp,
            },
            limits: sandbox::Limits {
                clone_queue_max: limits.clone_queue_max,
                memory_overcommit: limits.memory_overcommit,
                memory_used_max: limits.memory_used_max,
                starts_max: limits.starts_max,
                processes: limits.pids,
                io: IoMax {
                    read_bytes: bounded(limits.io_read_mibps.saturating_mul(1 << 20)),
                    write_bytes: bounded(limits.io_write_mibps.saturating_mul(1 << 20)),
                    reads: bounded(limits.io_read_iops),
                    writes: bounded(limits.io_write_iops),
                },
                storage_reserve_bytes: limits.storage_reserve_mib << 20,
                create: Duration::from_secs(limits.create_s),
                clone: Duration::from_secs(limits.clone_s),
                start: Duration::from_secs(limits.start_s),
                answer: Duration::from_secs(limits.answer_s),
                grace: Duration::from_secs(limits.grace_s),
                stop: Duration::from_secs(limits.stop_s),
                // A property of the kernel, not of the node: freezing takes a millisecond.
                freeze: sandbox::Limits::default().freeze,
                destroy: Duration::from_secs(limits.destroy_s),
                turn: Duration::from_secs(limits.turn_s),
                exec: (limits.exec_s > 0).then(|| Duration::from_secs(limits.exec_s)),
            },
            lifetimes: self.lifetimes.clone(),
            on_reboot: self.on_reboot,
            labels: self.labels.clone(),
            number: self.number,
        }
    }

    /// Returns the pools that the journal leases from.
    pub fn pools(&self) -> Pools {
        Pools {
            vmids: self.vmids.value,
            addresses: (self.network.pool.first, self.network.pool.last),
            address_quarantine_ms: daemon::clock::millis(self.quarantine),
        }
    }
}
