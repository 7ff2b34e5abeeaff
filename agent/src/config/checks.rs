//! Checks of what the configuration file says.

use std::collections::BTreeSet;

use proto::{lifetime::GRACE_MAX, name::Label, visibility::Visibility};

use super::{Limits, Shim, Sources, Template, network};
use crate::{
    detect::Roots,
    sandbox::{DefaultService, Probe},
};

const LABELS_MAX: usize = 16;
/// Limits on processes: systemd needs some dozen, and Linux knows no higher number.
const PIDS: std::ops::RangeInclusive<u32> = 64..=4_194_304;
/// Limit on MiB a second beyond which it means nothing.
const MIBPS_MAX: u64 = 1 << 20;
/// Limits on requests to a disk: with fewer a container does not stop in time, and v1 takes 32 bits.
const IOPS: std::ops::RangeInclusive<u64> = 16..=4_294_967_294;
/// VLAN tags that PVE accepts.
const TAGS: std::ops::RangeInclusive<u16> = 1..=4094;

pub(super) fn templates(from: &mut Sources<'_>, templates: &[Template], roots: Roots<'_>) {
    for template in templates {
        let Template { snapshot, vmid, cores, memory_mib, .. } = template;
        let mut wrong = |why: &str| from.mistake("template", format!("{snapshot} ({vmid}): {why}"));
        if snapshot.is_reserved() {
            wrong(
                "no template may have this name, which marks sandboxes without one: choose another",
            );
        }
        if *cores == 0 || *cores > proto::spec::limit::CORES_MAX {
            wrong("cores must be 1 to 64");
        }
        if !proto::spec::limit::MEMORY_MIB.contains(memory_mib) {
            wrong("memory_mib must be 64 to 524288");
        }
        match &template.probe {
            Probe::Http { path, .. } if !path.starts_with('/') => {
                wrong("probe.http.path must start with a slash");
            }
            Probe::Command(argv) if argv.is_empty() => wrong("probe.command must not be empty"),
            Probe::None | Probe::Http { .. } | Probe::Command(_) => {}
        }
        if let Some(bridge) = &template.bridge
            && !network::is_bridge(bridge, roots)
        {
            wrong(&format!("there is no interface {bridge:?}"));
        }
        if template.tag.is_some_and(|tag| !TAGS.contains(&tag)) {
            wrong("tag must be 1 to 4094");
        }
        if template.read_only_caches.iter().any(|cache| !cache.is_absolute()) {
            wrong("read_only_caches must be absolute paths");
        }
        if templates.iter().filter(|other| other.vmid == *vmid).count() > 1 {
            wrong("the vmid stands there twice");
        }
    }
}

/// Checks the services of the templates that the file names. Those that are found by their marks have the same.
pub(super) fn services(from: &mut Sources<'_>, templates: &[Template]) {
    for template in templates {
        let Template { snapshot, vmid, .. } = template;
        let mut wrong = |why: &str| from.mistake("template", format!("{snapshot} ({vmid}): {why}"));
        let differs = |other: &&Template| {
            let ports = |of: &Template| (of.services.clone(), of.expose_on_listen);
            other.snapshot == *snapshot && ports(other) != ports(template)
        };
        if templates.iter().any(|other| differs(&other)) {
            wrong("services and expose_on_listen must be the same for all templates of a snapshot");
        }
        services_of_one(&template.services, wrong);
    }
}

fn services_of_one(services: &[DefaultService], mut wrong: impl FnMut(&str)) {
    if services.len() > proto::spec::limit::SERVICES_MAX {
        wrong("services must be at most 32");
    }
    let (mut names, mut ports) = (BTreeSet::new(), BTreeSet::new());
    for DefaultService { name, port, visibility } in services {
        if !names.insert(name) {
            wrong(&format!("services: the name {name} stands there twice"));
        }
        if !ports.insert(port) {
            wrong(&format!("services: the port {port} stands there twice"));
        }
        // Public by default is what these ports never are, whoever's default it is.
        if *visibility == Some(Visibility::Public)
            && Visibility::Public.or_guarded(*port) != Visibility::Public
        {
            wrong(&format!(
                "services: {name} may not be public, because port {port} gives a shell, a screen or root's commands \
                 to everybody who reaches it; a caller can expose it with --public"
            ));
        }
    }
}

pub(super) fn labels(from: &mut Sources<'_>, labels: &[Label]) {
    from.must(labels.len() <= LABELS_MAX, "labels", "must be at most 16");
}

pub(super) fn limits(from: &mut Sources<'_>, limits: &Limits) {
    let bounded = limits.memory_overcommit >= 0.1;
    from.must(bounded, "limits.memory_overcommit", "must be 0.1 or more");
    from.must(limits.grace_s <= GRACE_MAX.as_secs(), "limits.grace_s", "must be 0 to 600");
    from.must(PIDS.contains(&limits.pids), "limits.pids", "must be 64 to 4194304");
    for (name, value) in [
        ("limits.io_read_mibps", limits.io_read_mibps),
        ("limits.io_write_mibps", limits.io_write_mibps),
    ] {
        from.must(value <= MIBPS_MAX, name, "must be 0 to 1048576");
    }
    for (name, value) in [
        ("limits.io_read_iops", limits.io_read_iops),
        ("limits.io_write_iops", limits.io_write_iops),
    ] {
        from.must(value == 0 || IOPS.contains(&value), name, "must be 0, or 16 to 4294967294");
    }
    let counted = limits.connections >= 64;
    from.must(counted, "limits.connections", "must be 64 or more");
    let share = (0.0..=1.0).contains(&limits.memory_used_max);
    from.must(share, "limits.memory_used_max", "must be 0 to 1");
}

pub(super) fn shim(from: &mut Sources<'_>, shim: &Shim) {
    let cores = (0.05..=1024.0).contains(&shim.cpu_cores);
    from.must(cores, "shim.cpu_cores", "must be 0.05 to 1024");
    from.must(shim.memory_mib >= 64, "shim.memory_mib", "must be 64 or more");
    from.must(shim.output_mib >= 8, "shim.output_mib", "must be 8 or more");
    let whole = shim.output_node_mib >= shim.output_mib;
    from.must(whole, "shim.output_node_mib", "must not be less than shim.output_mib");
}
