//! Judges the kernel's bounds that all sandboxes of a node share, since their ids on the host are the same. Pure.

use daemon::doctor::Check;

use super::facts::Kernel;

const NAME: &str = "kernel";
/// File for settings of the operator's own. That of the package is replaced by an upgrade.
const FILE: &str = "/etc/sysctl.d/90-pve-sandbox.conf";
/// Memory of the host for a sandbox of 128 MiB, when twice of what there is may be handed out.
const MEMORY: u64 = 64 << 20;

/// Bound of the kernel.
#[derive(Debug)]
pub(super) struct Bound {
    /// Name for `sysctl`.
    pub(super) name: &'static str,
    /// Amount that a sandbox with ordinary programs uses.
    each: u64,
    /// Amount for the host.
    host: u64,
    /// Effect when it is used up.
    effect: &'static str,
}

const WATCHERS: &str =
    "file watchers in sandboxes, and services of this host that start, will fail";

/// Bounds that are looked at.
pub(super) const BOUNDS: [Bound; 4] = [
    Bound {
        name: "kernel.keys.maxkeys",
        each: 2,
        host: 0,
        effect: "programs in sandboxes that keep keys in the kernel will fail",
    },
    Bound { name: "fs.inotify.max_user_instances", each: 32, host: 128, effect: WATCHERS },
    Bound { name: "fs.inotify.max_user_watches", each: 1024, host: 8192, effect: WATCHERS },
    // The host's own are kernel.pty.reserve.
    Bound {
        name: "kernel.pty.max",
        each: 4,
        host: 1024,
        effect: "terminals in sandboxes will fail",
    },
];

/// Compares the bounds with what sandboxes use; `most` of them have addresses and numbers here.
pub(super) fn check(kernel: &Kernel, most: u64) -> Vec<Check> {
    let sandboxes = kernel.memory.map_or(most, |memory| most.min(memory / MEMORY));
    let low = |bound: &Bound| {
        let (name, now) = (bound.name, *kernel.bounds.get(bound.name)?);
        let needed = bound.each.saturating_mul(sandboxes).saturating_add(bound.host);
        let found = format!(
            "{now} for all together, and the {sandboxes} sandboxes that this node has room for use {needed}: {}",
            bound.effect
        );
        let remedy = format!(
            "sysctl -w {name}={needed}; and for later boots the line {name}={needed} in {FILE}"
        );
        (now < needed).then(|| Check::warning(NAME, name, found, remedy))
    };
    let found: Vec<_> = BOUNDS.iter().filter_map(low).collect();
    if !found.is_empty() || kernel.bounds.is_empty() {
        return found;
    }
    vec![Check::ok(NAME, "", format!("its bounds are enough for {sandboxes} sandboxes"))]
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    const PVE: [(&str, u64); 4] = [
        ("kernel.keys.maxkeys", 200),
        ("fs.inotify.max_user_instances", 65_536),
        ("fs.inotify.max_user_watches", 4_194_304),
        ("kernel.pty.max", 4096),
    ];

    fn subjects(checks: &[Check]) -> Vec<&str> {
        checks.iter().map(|check| check.subject.as_str()).collect()
    }

    /// Does what the remedy says.
    fn mend(kernel: &mut Kernel, check: &Check) {
        let remedy = check.remedy.as_deref().expect("a remedy");
        let set = remedy.strip_prefix("sysctl -w ").and_then(|rest| rest.split(';').next());
        let (name, value) = set.and_then(|set| set.split_once('=')).expect("NAME=VALUE");
        let bound = BOUNDS.iter().find(|bound| bound.name == name).expect("a bound");
        kernel.bounds.insert(bound.name, value.parse().expect("a number"));
    }

    #[test]
    fn each_bound_that_is_too_low_is_found_and_its_remedy_mends_it() {
        let pve = Kernel { memory: None, bounds: PVE.into() };
        assert_eq!(check(&pve, 100)[0].state, State::Ok);
        for bound in &BOUNDS {
            let mut kernel = pve.clone();
            kernel.bounds.insert(bound.name, 64);
            let found = check(&kernel, 100);
            assert_eq!(subjects(&found), [bound.name]);
            assert_eq!(found[0].state, State::Warning, "nothing fails yet");
            assert!(found[0].remedy.as_deref().is_some_and(|remedy| remedy.contains(FILE)));
            mend(&mut kernel, &found[0]);
            assert_eq!(check(&kernel, 100)[0].state, State::Ok, "{}", bound.name);
        }
    }

    #[test]
    fn number_of_keys_is_too_low_for_a_full_pool_unless_memory_ends_first() {
        let kernel = |memory| Kernel { memory, bounds: PVE.into() };
        assert_eq!(subjects(&check(&kernel(None), 253)), ["kernel.keys.maxkeys"]);
        assert_eq!(check(&kernel(Some(6 << 30)), 253)[0].state, State::Ok);
        // What cannot be read is not judged.
        assert_eq!(check(&Kernel::default(), 253), []);
    }

    #[test]
    fn settings_of_the_package_are_enough_for_a_pool_of_its_default_size() {
        let text = include_str!("../../../packaging/pve-sandbox-agent.sysctl");
        let mut kernel = Kernel { memory: None, bounds: PVE.into() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.split_once('=').expect("NAME = VALUE");
            let bound = BOUNDS.iter().find(|bound| bound.name == name.trim()).expect("a bound");
            kernel.bounds.insert(bound.name, value.trim().parse().expect("a number"));
        }
        assert_eq!(check(&kernel, 253)[0].state, State::Ok);
    }
}
