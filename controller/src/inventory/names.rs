//! Names of the sandboxes that have open ports, for host names.

use std::collections::BTreeMap;

use proto::{host::FullName, id::SandboxId, name::Team};

use super::Cache;

impl Cache {
    /// Returns a number that is another one after each change of what `open_by_name` returns.
    pub fn names_version(&self) -> u64 {
        self.inner.lock().names_version
    }

    /// Returns the living sandboxes that have an open port and a name that makes a host name: the first `limit` by
    /// team and name. A name that several sandboxes of a team have is not among them. Takes long with many names.
    pub fn open_by_name(&self, limit: usize) -> BTreeMap<FullName, SandboxId> {
        let names = self.named_and_open();
        let parse = |(team, name, id): (Team, Box<str>, SandboxId)| {
            Some((FullName::new(&team, &name.parse().ok()?)?, id))
        };
        let mut open: BTreeMap<_, _> = names.into_iter().filter_map(parse).collect();
        let first_beyond = open.keys().nth(limit).cloned();
        if let Some(first) = first_beyond {
            drop(open.split_off(&first));
        }
        open
    }

    /// Copies what `open_by_name` reads, so that nobody waits for the lock while names are parsed and sorted.
    fn named_and_open(&self) -> Vec<(Team, Box<str>, SandboxId)> {
        let inner = self.inner.lock();
        let open = inner.by_name.iter().filter_map(|((team, name), ids)| {
            let [id] = ids[..] else { return None };
            inner.by_id.get(&id).filter(|known| known.open)?;
            Some((inner.teams.name(*team).clone(), name.clone(), id))
        });
        open.collect()
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
        put_of(cache, "red", number, name, port, phase);
    }

    fn put_of(cache: &Cache, team: &str, number: u8, name: &str, port: u32, phase: Phase) {
        let open = HttpService { name: "web".into(), port, ..HttpService::default() };
        let mut sandbox = Sandbox {
            id: id(number).to_string(),
            name: name.into(),
            services: if port == 0 { Vec::new() } else { vec![open] },
            ..Sandbox::default()
        };
        sandbox.set_phase(phase);
        cache.restore(id(number), team.parse().expect("a team"), sandbox, 0);
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
    fn of_too_many_the_first_by_team_and_name_stay() {
        let cache = Cache::default();
        // The teams are numbered in this order, which must not count.
        for (number, (team, name)) in
            [("red", "a"), ("blue", "z"), ("blue", "b")].into_iter().enumerate()
        {
            put_of(&cache, team, u8::try_from(number).expect("few"), name, 80, Phase::Running);
        }
        let first = |limit| {
            let open = cache.open_by_name(limit);
            open.keys().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(first(1), ["b--blue"]);
        assert_eq!(first(2), ["b--blue", "z--blue"]);
        assert_eq!(first(3), ["b--blue", "z--blue", "a--red"]);
    }

    #[test]
    fn version_changes_with_host_names_alone() {
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
            // A change that no host name depends on.
            put(&cache, 1, name, if port == 0 { 0 } else { 81 }, phase);
            assert!(!is_new(), "{name} {port} {phase:?}");
        }
        for phase in [Phase::Running, Phase::Paused, Phase::Stopped] {
            put(&cache, 2, "box", 80, phase);
            assert_eq!(is_new(), phase == Phase::Running, "{phase:?}");
        }
        cache.inner.lock().remove(&id(2));
        assert!(is_new(), "it is forgotten");
    }
}
