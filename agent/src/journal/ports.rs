//! Open ports of a sandbox, in its record, and who reaches them.
//!
//! Ports that everybody reaches stand in `services`, as they always did; all others in `access`. To the
//! version before, which does not know of `access`, these are closed. In records of that version every open
//! port is public, as it was.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    name::{Port, ServiceName},
    secret::Secret,
    visibility::Visibility,
};
use serde::{Deserialize, Serialize};

use super::{ListenRule, Record};

/// Key of one sandbox, under which its agent signs the credentials for its ports.
pub type AccessKey = Secret<[u8; 32]>;

/// Ports of a sandbox that are open, but not to everybody, and what else decides who reaches its ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Access {
    /// The ports.
    pub ports: BTreeMap<Port, GuardedPort>,
    /// Last generation of credentials that a port got. It only grows, so that a port that is opened again
    /// has another generation than before.
    pub generation: u64,
    /// Key of all credentials; made with the first one. The journal's file has it sealed; a tombstone has none.
    pub key: Option<AccessKey>,
    /// Rule by which ports are opened as soon as something listens on them; `None`: none are.
    pub listen: Option<ListenRule>,
    /// Ports whose open connections are still to be cut, each with the number of its last closing. Written with the
    /// closing and removed after the cut, so that the next agent cuts what a crash in between has left. The version
    /// before ignores them.
    pub pending_cuts: BTreeMap<Port, u64>,
}

/// Open port that not everybody reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardedPort {
    /// Visibility: never PUBLIC.
    #[serde(with = "super::words::visibility")]
    pub visibility: Visibility,
    /// Generation of its credentials: those of others are void.
    pub generation: u64,
    /// Names of the port.
    pub names: BTreeSet<ServiceName>,
}

/// Name of an open port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenPort {
    /// Name of the service.
    pub name: ServiceName,
    /// Its port.
    pub port: Port,
    /// Visibility of the port.
    pub visibility: Visibility,
}

impl Record {
    /// Lists the open ports under all of their names, ordered by name.
    pub fn open_ports(&self) -> Vec<OpenPort> {
        let public = self.services.iter().filter(|(_, port)| !self.access.ports.contains_key(port));
        let public = public.map(|(name, port)| (name, *port, Visibility::Public));
        let guarded = self.access.ports.iter().flat_map(|(port, guarded)| {
            guarded.names.iter().map(|name| (name, *port, guarded.visibility))
        });
        let mut open: Vec<_> = public
            .chain(guarded)
            .map(|(name, port, visibility)| OpenPort { name: name.clone(), port, visibility })
            .collect();
        open.sort();
        open
    }

    /// Returns who reaches a port; `None` for one that is closed.
    pub fn visibility(&self, port: Port) -> Option<Visibility> {
        let public = || self.services.values().any(|open| *open == port);
        let guarded = self.access.ports.get(&port).map(|guarded| guarded.visibility);
        guarded.or_else(|| public().then_some(Visibility::Public))
    }

    /// Finds the open port with this name. After a downgrade and back, a guarded port and a public one can have the
    /// same name: then the guarded one.
    pub fn port_named(&self, name: &ServiceName) -> Option<Port> {
        let guarded = self.access.ports.iter().find(|(_, port)| port.names.contains(name));
        guarded.map(|(port, _)| *port).or_else(|| self.services.get(name).copied())
    }

    /// Finds the open port with this name, or with this number.
    pub fn port_of(&self, service: &str) -> Option<Port> {
        let named = service.parse().ok().and_then(|name| self.port_named(&name));
        named.or_else(|| service.parse().ok().filter(|port| self.visibility(*port).is_some()))
    }

    /// Opens a port under one more name. All its names share its visibility: `wanted`, or what it has, or
    /// `default`. With another one than before, its credentials are void, and its connections are to be cut unless
    /// everybody may be there.
    pub fn open(
        &mut self,
        (name, port): (ServiceName, Port),
        wanted: Option<Visibility>,
        default: Visibility,
    ) {
        let before = self.visibility(port);
        let visibility = wanted.or(before).unwrap_or(default);
        let generation = self.access.ports.get(&port).map(|guarded| guarded.generation);
        let mut names: BTreeSet<_> = self.close(port).into_keys().collect();
        names.insert(name);
        if visibility == Visibility::Public {
            // Whoever connects from now on may be there.
            self.access.pending_cuts.remove(&port);
            self.services.extend(names.into_iter().map(|name| (name, port)));
            return;
        }
        let kept = generation.filter(|_| before == Some(visibility));
        let generation = kept.unwrap_or_else(|| self.next_generation());
        // Those who came in under the old rule have no place under the new one.
        if before.is_some_and(|before| before != visibility) {
            self.access.pending_cuts.insert(port, generation);
        }
        self.access.ports.insert(port, GuardedPort { visibility, generation, names });
    }

    /// Closes a port, and returns the names that it had.
    pub fn close(&mut self, port: Port) -> BTreeMap<ServiceName, Port> {
        let mut closed: BTreeMap<_, _> =
            self.services.extract_if(.., |_, known| *known == port).collect();
        if let Some(guarded) = self.access.ports.remove(&port) {
            closed.extend(guarded.names.into_iter().map(|name| (name, port)));
        }
        closed
    }

    /// Closes every port with this name, under all of its names, because a caller wants it. Their connections are to
    /// be cut. Returns the names with their ports.
    pub fn close_named(&mut self, name: &ServiceName) -> Vec<(ServiceName, Port)> {
        let guarded = self.access.ports.iter().filter(|(_, port)| port.names.contains(name));
        let guarded = guarded.map(|(port, _)| *port);
        let ports: BTreeSet<_> = guarded.chain(self.services.get(name).copied()).collect();
        for port in &ports {
            self.note_hidden(*port);
            let closing = self.next_generation();
            self.access.pending_cuts.insert(*port, closing);
        }
        ports.into_iter().flat_map(|port| self.close(port)).collect()
    }

    /// Makes all credentials of a port void. A public one has none. Its connections are to be cut.
    pub fn revoke(&mut self, port: Port) {
        let generation = self.next_generation();
        self.access.pending_cuts.insert(port, generation);
        if let Some(guarded) = self.access.ports.get_mut(&port) {
            guarded.generation = generation;
        }
    }

    /// Notes that the connections of a port were cut after this closing. A later closing stays pending.
    pub fn note_cut(&mut self, port: Port, closing: u64) {
        if self.access.pending_cuts.get(&port) == Some(&closing) {
            self.access.pending_cuts.remove(&port);
        }
    }

    fn next_generation(&mut self) -> u64 {
        self.access.generation += 1;
        self.access.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::conformance;

    #[test]
    fn name_of_a_guarded_and_a_public_port_closes_both() {
        let name = |text: &str| text.parse::<ServiceName>().expect("a name");
        let port = |number: u32| Port::try_from(number).expect("a port");
        // The version before has opened 81 by a name that it did not see at 80.
        let services = [("web", 81), ("www", 81), ("api", 82)];
        let services = services.map(|(text, number)| (name(text), port(number)));
        let mut record = Record { services: services.into(), ..conformance::record(1) };
        record.access.ports.insert(
            port(80),
            GuardedPort {
                visibility: Visibility::Team,
                generation: 1,
                names: [name("web")].into(),
            },
        );
        let closed = record.close_named(&name("web"));
        let expected = [("web", 80), ("web", 81), ("www", 81)];
        assert_eq!(closed, expected.map(|(text, number)| (name(text), port(number))));
        assert_eq!((record.visibility(port(80)), record.visibility(port(81))), (None, None));
        assert_eq!(record.visibility(port(82)), Some(Visibility::Public));
        assert!(record.close_named(&name("web")).is_empty());
        let pending: Vec<_> = record.access.pending_cuts.into_keys().collect();
        assert_eq!(pending, [port(80), port(81)]);
    }

    #[test]
    fn every_closing_leaves_a_cut_pending_until_that_closing_is_cut() {
        use Visibility::{Private, Public, Team};
        let port = Port::try_from(80).expect("a port");
        let name = || "web".parse::<ServiceName>().expect("a name");
        let mut record = Record { services: BTreeMap::new(), ..conformance::record(1) };
        let expose = |record: &mut Record, wanted| {
            record.open((name(), port), Some(wanted), Public);
            record.access.pending_cuts.remove(&port)
        };
        assert_eq!(expose(&mut record, Team), None, "nobody was there");
        assert_eq!(expose(&mut record, Team), None, "nothing has changed");
        assert_eq!(expose(&mut record, Public), None, "everybody may be there");
        let guarded = expose(&mut record, Team).expect("fewer may be there");
        let changed = expose(&mut record, Private).expect("others may be there");
        record.revoke(port);
        let revoked = record.access.pending_cuts[&port];
        record.close_named(&name());
        let hidden = record.access.pending_cuts[&port];
        assert!(guarded < changed && changed < revoked && revoked < hidden);
        record.note_cut(port, revoked);
        assert_eq!(record.access.pending_cuts.get(&port), Some(&hidden), "a later closing");
        record.note_cut(port, hidden);
        assert!(record.access.pending_cuts.is_empty());
        record.open((name(), port), Some(Team), Public);
        record.close_named(&name());
        record.open((name(), port), Some(Public), Public);
        assert!(record.access.pending_cuts.is_empty(), "everybody may be there again");
    }
}
