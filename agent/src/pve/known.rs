//! Owners of the running containers, as of the last read of /etc/pve. pmxcfs is away for some
//! seconds at each restart of pve-cluster; a container is still the same as long as its init is the
//! same process, so commands and pauses need not wait for pmxcfs.

use std::collections::HashMap;

use daemon::sync::Mutex;
use proto::id::Vmid;

use super::{ContainerConfig, Mark, ownership};

/// Identity of the init process of a running container, unique until the host reboots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Pid in the host's pid namespace.
    pub pid: u32,
    /// Start time, ticks since the host's boot: the pid alone may be reused.
    pub start: u64,
}

/// Containers that ran with a mark of ours when last seen, by vmid.
#[derive(Debug, Default)]
pub struct Known(Mutex<HashMap<Vmid, (Mark, Init)>>);

impl Known {
    /// Records a config that was read. `init` must have been looked up before the read: then it ran
    /// under this config or under an earlier one, never under a later one.
    pub fn note(&self, vmid: Vmid, config: Option<&ContainerConfig>, init: Option<Init>) {
        let ours = config.filter(|config| ownership::marked(config, vmid).is_ok());
        match ours.and_then(ContainerConfig::mark).zip(init) {
            Some(known) => drop(self.0.lock().insert(vmid, known)),
            None => drop(self.0.lock().remove(&vmid)),
        }
    }

    /// Removes the containers for which `there` is false.
    pub fn retain(&self, there: impl Fn(&Vmid) -> bool) {
        self.0.lock().retain(|vmid, _| there(vmid));
    }

    /// Mark of the container with this vmid, if its init is still the recorded process.
    pub fn mark(&self, vmid: Vmid, init: Option<Init>) -> Option<Mark> {
        let known = self.0.lock();
        known.get(&vmid).filter(|(_, seen)| Some(*seen) == init).map(|(mark, _)| mark.clone())
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
    fn only_the_observed_init_is_known() {
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
    fn foreign_or_stopped_container_is_forgotten() {
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
