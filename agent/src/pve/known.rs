//! Owners of the running containers, as of the last read of /etc/pve. pmxcfs is away for some
//! seconds at each restart of pve-cluster; a container is still the same as long as its init is the
//! same process, so commands and pauses need not wait for pmxcfs.

use std::{collections::HashMap, path::Path, sync::Arc};

use daemon::sync::Mutex;
use proto::id::Vmid;

use super::{ContainerConfig, Mark, ownership};
use crate::sys::proc::kin;

/// Identity of the init process of a running container, unique until the host reboots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Pid in the host's pid namespace.
    pub pid: u32,
    /// Start time, ticks since the host's boot: the pid alone may be reused.
    pub start: u64,
}

impl Init {
    /// True while this very process runs: one small read, whatever the container holds.
    pub fn runs(&self, proc: &Path) -> bool {
        kin(proc, self.pid).is_some_and(|now| now.start == self.start)
    }
}

/// Containers that ran with a mark of ours when last seen, by vmid. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Known(Arc<Mutex<HashMap<Vmid, (Mark, Init)>>>);

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

    /// Init that the container had when last seen, if that still runs: the container is still in that boot.
    pub fn init(&self, proc: &Path, vmid: Vmid) -> Option<Init> {
        let init = self.0.lock().get(&vmid)?.1;
        init.runs(proc).then_some(init)
    }

    /// Inits of all these containers that still run.
    pub fn inits(&self, proc: &Path) -> Vec<(Vmid, Init)> {
        let seen = self.0.lock().iter().map(|(vmid, (_, init))| (*vmid, *init)).collect::<Vec<_>>();
        seen.into_iter().filter(|(_, init)| init.runs(proc)).collect()
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
    fn init_is_remembered_while_it_runs() {
        let proc = tempfile::tempdir().expect("tempdir");
        let put = |start: u32| {
            let text = format!("7 (init) S 1 {}", format!("{start} ").repeat(48));
            std::fs::create_dir_all(proc.path().join("7")).expect("mkdir");
            std::fs::write(proc.path().join("7/stat"), text).expect("written");
        };
        let (known, init) = (Known::default(), Init { pid: 7, start: 100 });
        known.note(vmid(100), Some(&config(&mark(100))), Some(init));
        assert_eq!(known.init(proc.path(), vmid(100)), None, "it has ended");
        put(100);
        assert_eq!(known.init(proc.path(), vmid(100)), Some(init));
        assert_eq!(known.inits(proc.path()), [(vmid(100), init)]);
        assert_eq!(known.init(proc.path(), vmid(101)), None);
        put(200);
        assert_eq!(known.init(proc.path(), vmid(100)), None, "its number is used again");
        assert_eq!(known.inits(proc.path()), []);
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
