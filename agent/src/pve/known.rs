//! Whose the running containers are, as of the last look at /etc/pve. pmxcfs is away for some
//! seconds at each restart of pve-cluster; what runs is the same container as long as its init is the
//! same process, so commands and pauses need not wait for it.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::id::Vmid;

use super::{ContainerConfig, Mark, ownership};

/// The init of a running container: which process it is, for as long as the host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Pid in the host's pid namespace.
    pub pid: u32,
    /// When it started, ticks since the host's boot: a pid alone is used again.
    pub start: u64,
}

/// The containers that were seen to run with a mark of ours, by their numbers.
#[derive(Debug, Default)]
pub struct Known(Mutex<HashMap<Vmid, (Mark, Init)>>);

impl Known {
    /// Takes note of a config that was read. `init` must have been looked up before the read: one
    /// that ran by then ran under this config or under the one before, never under a later one.
    pub fn note(&self, vmid: Vmid, config: Option<&ContainerConfig>, init: Option<Init>) {
        let ours = config.filter(|config| ownership::marked(config, vmid).is_ok());
        match ours.and_then(ContainerConfig::mark).zip(init) {
            Some(known) => drop(self.lock().insert(vmid, known)),
            None => drop(self.lock().remove(&vmid)),
        }
    }

    /// Forgets those that a look at all containers has not seen.
    pub fn retain(&self, there: impl Fn(&Vmid) -> bool) {
        self.lock().retain(|vmid, _| there(vmid));
    }

    /// The mark of the container under this number, if its init is still the one that was seen.
    pub fn mark(&self, vmid: Vmid, init: Option<Init>) -> Option<Mark> {
        let known = self.lock();
        known.get(&vmid).filter(|(_, seen)| Some(*seen) == init).map(|(mark, _)| mark.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vmid, (Mark, Init)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proto::id::SandboxId;

    use super::*;

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    fn mark(of: u32) -> Mark {
        Mark {
            sandbox_id: SandboxId::new(1, &[1; 10]),
            vmid: vmid(of),
            attempt: 1,
            team: "acme".parse().expect("valid"),
            request_id: "r-1".parse().expect("valid"),
        }
    }

    fn config(mark: &Mark) -> ContainerConfig {
        let mut config = ContainerConfig::parse(b"arch: amd64\n");
        config.set_description(&mark.to_string()).expect("short");
        config
    }

    #[test]
    fn only_the_init_that_was_seen_is_known() {
        let known = Known::default();
        let init = Some(Init { pid: 7, start: 100 });
        known.note(vmid(100), Some(&config(&mark(100))), init);
        assert_eq!(known.mark(vmid(100), init), Some(mark(100)));
        assert_eq!(known.mark(vmid(100), Some(Init { pid: 7, start: 200 })), None, "used again");
        assert_eq!(known.mark(vmid(100), Some(Init { pid: 8, start: 100 })), None);
        assert_eq!(known.mark(vmid(100), None), None, "it does not run");
        assert_eq!(known.mark(vmid(101), init), None);
    }

    #[test]
    fn what_is_not_ours_or_does_not_run_is_forgotten() {
        let init = Some(Init { pid: 7, start: 100 });
        let mut template = config(&mark(100));
        template.set("template", "1").expect("fits");
        let unmarked = ContainerConfig::parse(b"arch: amd64\n");
        let ours = config(&mark(100));
        let cases: [(Option<&ContainerConfig>, Option<Init>); 5] = [
            (None, init),
            (Some(&unmarked), init),
            (Some(&template), init),
            (Some(&config(&mark(101))), init),
            (Some(&ours), None),
        ];
        for (config, seen) in cases {
            let known = Known::default();
            known.note(vmid(100), Some(&ours), init);
            known.note(vmid(100), config, seen);
            assert_eq!(known.mark(vmid(100), init), None, "{config:?}");
        }
        let known = Known::default();
        known.note(vmid(100), Some(&ours), init);
        known.retain(|vmid| vmid.get() != 100);
        assert_eq!(known.mark(vmid(100), init), None);
    }
}
