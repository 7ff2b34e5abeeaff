//! Ports of a sandbox that no caller exposes: the controller's rules for them, and the ports that are open because
//! something in the sandbox listens on them.

use std::collections::BTreeSet;

use proto::{name::Port, spec::limit, visibility::Visibility};
use serde::{Deserialize, Serialize};

use super::Record;

/// Most ports of a sandbox that are open because something listens on them.
pub const OPENED_MAX: usize = 16;
/// Most ports that are kept closed after a caller has closed them. One more ends the rule of its sandbox.
pub const HIDDEN_MAX: usize = 64;
/// First port of those that programs get without asking for a certain one.
const EPHEMERAL: u16 = 32_768;
/// First port that belongs to no service of the system.
const UNPRIVILEGED: u16 = 1024;
/// Ports of web servers below that.
const WEB: [u16; 2] = [80, 443];

/// Rules of the controller for ports that no caller exposes, as it sent them with the creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRules {
    /// Visibility where the snapshot says none.
    #[serde(with = "super::words::visibility")]
    pub default: Visibility,
    /// Ports that may not be exposed.
    #[serde(default)]
    pub denied: BTreeSet<Port>,
}

impl PortRules {
    /// Returns the visibility of a port where nobody says one.
    pub fn visibility(&self, port: Port) -> Visibility {
        self.default.or_guarded(port)
    }
}

/// Rule by which a port is opened as soon as something listens on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenRule {
    /// Rules of the controller.
    pub rules: PortRules,
    /// Ports that are open because of this rule.
    #[serde(default)]
    pub opened: BTreeSet<Port>,
    /// Ports that a caller has closed: they stay closed until a caller opens them.
    #[serde(default)]
    pub hidden: BTreeSet<Port>,
}

impl ListenRule {
    /// Creates the rule of a new sandbox.
    pub fn new(rules: PortRules) -> Self {
        Self { rules, opened: BTreeSet::new(), hidden: BTreeSet::new() }
    }

    /// Returns true when no further port is opened until one is closed.
    pub fn is_full(&self) -> bool {
        self.opened.len() >= OPENED_MAX
    }

    fn takes(&self, port: Port) -> bool {
        let is_web = WEB.contains(&port.get());
        let in_range = is_web || (UNPRIVILEGED..EPHEMERAL).contains(&port.get());
        let is_refused = self.rules.denied.contains(&port) || self.hidden.contains(&port);
        in_range && !is_refused && !self.is_full()
    }
}

impl Record {
    /// Opens a closed port because something listens on it. Returns false when the sandbox has no such rule, or the
    /// port is not one that it opens.
    pub fn open_listening(&mut self, port: Port) -> bool {
        let rule = self.access.listen.as_ref().filter(|rule| rule.takes(port));
        let Some(visibility) = rule.map(|rule| rule.rules.visibility(port)) else { return false };
        let Ok(name) = format!("port-{port}").parse() else { return false };
        let is_free = self.visibility(port).is_none() && self.port_named(&name).is_none();
        if !is_free || self.open_ports().len() >= limit::SERVICES_MAX {
            return false;
        }
        self.open((name, port), Some(visibility), visibility);
        if let Some(rule) = &mut self.access.listen {
            rule.opened.insert(port);
        }
        true
    }

    /// Notes that a caller has opened a port: it is none of the rule's from then on.
    pub fn note_opened(&mut self, port: Port) {
        if let Some(rule) = &mut self.access.listen {
            rule.opened.remove(&port);
            rule.hidden.remove(&port);
        }
    }

    /// Notes that a caller has closed a port: the rule does not open it again.
    pub(super) fn note_hidden(&mut self, port: Port) {
        let Some(rule) = &mut self.access.listen else { return };
        rule.opened.remove(&port);
        rule.hidden.insert(port);
        // What would be forgotten would be opened again.
        if rule.hidden.len() > HIDDEN_MAX {
            self.access.listen = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::journal::conformance;

    fn port(number: u32) -> Port {
        Port::try_from(number).expect("a port")
    }

    fn ruled(default: Visibility, denied: &[u32]) -> Record {
        let denied = denied.iter().map(|number| port(*number)).collect();
        let mut record = conformance::record(1);
        record.services.clear();
        record.access.listen = Some(ListenRule::new(PortRules { default, denied }));
        record
    }

    #[test]
    fn only_ports_of_the_sandboxs_own_servers_are_opened() {
        let mut record = ruled(Visibility::Team, &[5432]);
        for (number, opens) in [
            (22, false),
            (80, true),
            (443, true),
            (1023, false),
            (1024, true),
            (5432, false),
            (32_767, true),
            (32_768, false),
            (39_375, false),
        ] {
            assert_eq!(record.open_listening(port(number)), opens, "{number}");
            assert_eq!(record.visibility(port(number)).is_some(), opens, "{number}");
        }
        assert!(!record.open_listening(port(80)), "it is open already");
        let mut without = conformance::record(1);
        assert!(!without.open_listening(port(8080)), "no rule");
    }

    #[test]
    fn port_gets_the_default_and_a_free_name_alone() {
        let mut record = ruled(Visibility::Public, &[]);
        record.open(
            ("port-81".parse().expect("a name"), port(82)),
            Some(Visibility::Token),
            Visibility::Team,
        );
        assert!(record.open_listening(port(80)));
        assert_eq!(record.visibility(port(80)), Some(Visibility::Public), "the operator's word");
        assert!(!record.open_listening(port(81)), "another port has its name");
        assert!(!record.open_listening(port(82)), "a caller has opened it");
        assert_eq!(record.visibility(port(82)), Some(Visibility::Token));
    }

    #[test]
    fn port_that_a_caller_hid_stays_hidden_until_a_caller_opens_it() {
        let mut record = ruled(Visibility::Team, &[]);
        let name = "port-8080".parse().expect("a name");
        assert!(record.open_listening(port(8080)));
        assert_eq!(record.close_named(&name).len(), 1);
        assert!(!record.open_listening(port(8080)), "hidden");
        record.note_opened(port(8080));
        assert!(record.open_listening(port(8080)), "opened by hand and closed since");
    }

    #[test]
    fn rule_opens_a_bounded_number_and_ends_after_many_hidden_ports() {
        let mut record = ruled(Visibility::Team, &[]);
        let opened = (8000..8100).filter(|number| record.open_listening(port(*number))).count();
        assert_eq!(opened, OPENED_MAX);
        let hide = |record: &mut Record, number: u32| {
            record.close_named(&format!("port-{number}").parse().expect("a name")).len()
        };
        assert_eq!(hide(&mut record, 8000), 1);
        assert!(record.open_listening(port(8050)), "one place is free");
        for number in 9000..9000 + u32::try_from(HIDDEN_MAX).expect("small") {
            let name = format!("port-{number}").parse().expect("a name");
            record.open((name, port(number)), None, Visibility::Team);
            assert_eq!(hide(&mut record, number), 1);
        }
        assert_eq!(record.access.listen, None, "nothing is opened any more");
        assert_eq!(record.visibility(port(8050)), Some(Visibility::Team), "what is open stays");
    }

    #[test]
    fn rule_of_a_later_version_reads_as_the_tightest() {
        let text = r#"{"rules":{"default":"friends","later":1},"later":2}"#;
        let rule: ListenRule = serde_json::from_str(text).expect("read");
        assert_eq!(
            rule,
            ListenRule::new(PortRules { default: Visibility::Private, denied: [].into() })
        );
    }

    proptest! {
        #[test]
        fn no_order_of_events_opens_too_much(
            events in proptest::collection::vec((0_u8..3, 8000_u32..8040), 0..200)
        ) {
            let mut record = ruled(Visibility::Team, &[8001]);
            let mut hidden = BTreeSet::new();
            for (event, number) in events {
                let name: proto::name::ServiceName =
                    format!("port-{number}").parse().expect("a name");
                match event {
                    0 => drop(record.open_listening(port(number))),
                    1 => {
                        let is_closed = !record.close_named(&name).is_empty();
                        hidden.extend(is_closed.then_some(number));
                    }
                    _ if record.open_ports().len() < limit::SERVICES_MAX && number != 8001 => {
                        record.open((name, port(number)), None, Visibility::Team);
                        record.note_opened(port(number));
                        hidden.remove(&number);
                    }
                    _ => {}
                }
                prop_assert!(record.open_ports().len() <= limit::SERVICES_MAX);
                prop_assert_eq!(record.visibility(port(8001)), None);
                for number in &hidden {
                    prop_assert_eq!(record.visibility(port(*number)), None);
                }
                if let Some(rule) = &record.access.listen {
                    prop_assert!(rule.opened.len() <= OPENED_MAX);
                    for opened in &rule.opened {
                        prop_assert!(record.visibility(*opened).is_some());
                    }
                }
            }
        }
    }
}
