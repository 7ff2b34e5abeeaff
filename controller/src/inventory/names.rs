//! Names of the sandboxes that have open ports, for host names.

use std::collections::BTreeMap;

use proto::{host::FullName, id::SandboxId};

use super::Cache;

impl Cache {
    /// Returns a number that is another one after each change of a sandbox with a name.
    pub fn names_version(&self) -> u64 {
        self.inner.lock().names_version
    }

    /// Returns the living sandboxes that have an open port and a name that makes a host name, at most `limit`. A name
    /// that several sandboxes of a team have is not among them.
    pub fn open_by_name(&self, limit: usize) -> BTreeMap<FullName, SandboxId> {
        let inner = self.inner.lock();
        let open = inner.by_name.iter().filter_map(|((team, name), ids)| {
            let [id] = ids[..] else { return None };
            inner.by_id.get(&id).filter(|known| known.open)?;
            Some((FullName::new(inner.teams.name(*team), &name.parse().ok()?)?, id))
        });
        open.take(limit).collect()
    }
}

#[cfg(test)]
mod tests {
    use proto::sandbox::v1::{HttpService, Phase, Sandbox};

    use super::*;

    fn id(number: u8) -> SandboxId {
        SandboxId::new(1, &[number; 10])
    }

    fn put(cache: &Cache, number: u8, name: &str, port: u32, phase: Phase) {
        let open = HttpService { name: "web".into(), port, ..HttpService::default() };
        let mut sandbox = Sandbox {
            id: id(number).to_string(),
            name: name.into(),
            services: if port == 0 { Vec::new() } else { vec![open] },
            ..Sandbox::default()
        };
        sandbox.set_phase(phase);
        cache.restore(id(number), "red".parse().expect("a team"), sandbox, 0);
    }

    fn names(cache: &Cache) -> Vec<String> {
        cache.open_by_name(10).iter().map(|(name, id)| format!("{name} {id}")).collect()
    }

    #[test]
    fn only_the_one_living_sandbox_with_open_ports_has_a_host_name() {
        let cache = Cache::default();
        put(&cache, 1, "box", 80, Phase::Running);
        put(&cache, 2, "closed", 0, Phase::Running);
        put(&cache, 3, "", 80, Phase::Running);
        put(&cache, 4, "ended", 80, Phase::Deleted);
        assert_eq!(names(&cache), [format!("box--red {}", id(1))]);
        assert!(cache.open_by_name(0).is_empty());
        put(&cache, 5, "box", 0, Phase::Running);
        assert!(names(&cache).is_empty(), "two have it");
        put(&cache, 1, "shed", 80, Phase::Running);
        put(&cache, 5, "box", 81, Phase::Stopped);
        assert_eq!(names(&cache), [format!("box--red {}", id(5)), format!("shed--red {}", id(1))]);
    }

    #[test]
    fn version_changes_with_each_change_of_a_named_sandbox() {
        let cache = Cache::default();
        let mut last = cache.names_version();
        let mut is_new = || std::mem::replace(&mut last, cache.names_version()) != last;
        put(&cache, 1, "", 80, Phase::Running);
        assert!(!is_new());
        for (name, port, phase) in [
            ("box", 80, Phase::Running),
            ("box", 0, Phase::Running),
            ("shed", 80, Phase::Running),
            ("", 80, Phase::Running),
            ("shed", 80, Phase::Running),
            ("shed", 80, Phase::Deleted),
        ] {
            put(&cache, 1, name, port, phase);
            assert!(is_new(), "{name} {port} {phase:?}");
        }
    }
}
