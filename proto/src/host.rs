//! Host names of sandboxes: the first label in all its forms, and the names that it is made of. It is written and
//! parsed here and nowhere else; the filter of Caddy's configuration is a coarser form of it.

use std::{fmt, str::FromStr};

use crate::{
    id::{Invalid, SandboxId, SandboxRef},
    name::{Port, SandboxName, Team},
};

/// Forms of the label, as `url_template` has them.
pub const FORMS: [&str; 7] = [
    "port-{port}-vm-{vmid}",
    "port-{port}-{id}",
    "{port}-{id}",
    "{port}-vm-{vmid}",
    "port-{port}-{name}--{team}",
    "{port}-{name}--{team}",
    "{name}--{team}",
];

/// Regular expression (RE2) that every label matches, in any case: a coarse filter.
pub const PATTERN: &str = "(?:(?:port-)?[1-9][0-9]{0,4}-(?:vm-[1-9][0-9]{2,8}|pvelxc-[0-7][0-9a-v]{25})\
                           |(?:(?:port-)?[1-9][0-9]{0,4}-)?[a-z][a-z0-9-]{0,29}--[a-z0-9-]{1,60})";

/// Longest label of a DNS name.
const LABEL_MAX: usize = 63;
/// Text between the name and the team. No id, vmid or name of a sandbox holds it, so the first one is the separator.
const SEPARATOR: &str = "--";
/// Beginning of labels that stand for other alphabets: browsers decode them, and refuse what is none.
const ENCODED: &str = "xn--";

/// Name of the service whose port is the main one.
const MAIN: &str = "main";

/// Most names that a node keeps.
pub const NAMES_MAX: usize = 100_000;
/// Most names in one request about them.
pub const CHANGES_MAX: usize = 2000;

/// Name of a sandbox with its team, as host names have it: `{name}--{team}`. Only a team whose name is a DNS label in
/// lower case has such names: host names have no case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FullName {
    team: Team,
    name: SandboxName,
}

impl FullName {
    /// Combines both; `None` where they make no label.
    pub fn new(team: &Team, name: &SandboxName) -> Option<Self> {
        let text = team.as_str();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let is_label = text.bytes().all(plain) && !text.ends_with('-');
        let len = name.as_str().len() + SEPARATOR.len() + text.len();
        let full = Self { team: team.clone(), name: name.clone() };
        (is_label && len <= LABEL_MAX).then_some(full)
    }

    /// Returns the team.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Returns the name of the sandbox.
    pub fn name(&self) -> &SandboxName {
        &self.name
    }

    /// Returns the label that leads to the main port; `None` where a browser would take it for an encoded one.
    pub fn label(&self) -> Option<String> {
        Some(self.to_string()).filter(|label| !label.starts_with(ENCODED))
    }

    /// Returns the label that leads to a port, with or without `port-` in front; `None` where it is too long.
    pub fn label_of(&self, port: Port, prefix: &str) -> Option<String> {
        Some(format!("{prefix}{port}-{self}")).filter(|label| label.len() <= LABEL_MAX)
    }

    /// Returns the digest of an entry. All digests of a directory, combined by XOR, are the digest of the directory:
    /// it shows whether two of them are equal. FNV-1a with a last mixing step: it finds updates that were lost, and
    /// protects against nobody.
    pub fn digest(&self, id: &SandboxId) -> u64 {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in format!("{self} {id}").bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    }
}

impl fmt::Display for FullName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{SEPARATOR}{}", self.name, self.team)
    }
}

impl FromStr for FullName {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let why = "must be `{name}--{team}`, a DNS label in lower case";
        let invalid = || Invalid::new("name", why);
        let (name, team) = text.split_once(SEPARATOR).ok_or_else(invalid)?;
        Self::new(&team.parse()?, &name.parse()?).ok_or_else(invalid)
    }
}

/// Parsed first label of a host name. The form that is printed is the controller's `url_template`; all are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// A port of a sandbox, by its vmid or id.
    ById {
        /// TCP port inside the sandbox.
        port: Port,
        /// The sandbox.
        sandbox: SandboxRef,
    },
    /// A port of a sandbox, by its name.
    ByName {
        /// TCP port inside the sandbox; `None`: its main port.
        port: Option<Port>,
        /// The sandbox.
        sandbox: FullName,
    },
}

impl Label {
    /// Parses a label in lower case; `None` when it has no form of ours.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > LABEL_MAX || text.starts_with(ENCODED) {
            return None;
        }
        // Without it, the label is as in E2B's SDKs.
        let rest = text.strip_prefix("port-").unwrap_or(text);
        if !text.contains(SEPARATOR) {
            let (port, sandbox) = rest.split_once('-')?;
            let sandbox = match sandbox.strip_prefix("vm-") {
                Some(vmid) => SandboxRef::Vmid(vmid.parse().ok()?),
                None => SandboxRef::Id(sandbox.parse().ok()?),
            };
            return Some(Self::ById { port: port.parse().ok()?, sandbox });
        }
        // The name of a sandbox begins with a letter, and never with `port-` and a digit.
        if !rest.starts_with(|first: char| first.is_ascii_digit()) {
            return Some(Self::ByName { port: None, sandbox: text.parse().ok()? });
        }
        let (port, sandbox) = rest.split_once('-')?;
        Some(Self::ByName { port: Some(port.parse().ok()?), sandbox: sandbox.parse().ok()? })
    }
}

/// Returns the port that the name of a sandbox alone leads to: that of the service `main`, else its only open port.
pub fn main_port<'a, P: Copy + PartialEq>(
    services: impl Iterator<Item = (&'a str, P)> + Clone,
) -> Option<P> {
    if let Some((_, port)) = services.clone().find(|(name, _)| *name == MAIN) {
        return Some(port);
    }
    let mut ports = services.map(|(_, port)| port);
    let first = ports.next()?;
    ports.all(|port| port == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn port(number: u32) -> Port {
        Port::try_from(number).expect("a port")
    }

    fn full(name: &str, team: &str) -> FullName {
        let (team, name) = (team.parse().expect("a team"), name.parse().expect("a name"));
        FullName::new(&team, &name).expect("a label")
    }

    #[test]
    fn labels_by_name_are_parsed() {
        let by_name = |port, name, team| Some(Label::ByName { port, sandbox: full(name, team) });
        for (label, expected) in [
            ("box--red", by_name(None, "box", "red")),
            ("8000-box--red", by_name(Some(port(8000)), "box", "red")),
            ("port-8000-box--red", by_name(Some(port(8000)), "box", "red")),
            ("my-box-2--red-team", by_name(None, "my-box-2", "red-team")),
            // A team may hold the separator, a name never does: the first one separates.
            ("box--a--b", by_name(None, "box", "a--b")),
            ("80-box--8000-x", by_name(Some(port(80)), "box", "8000-x")),
            ("vm-100001--red", by_name(None, "vm-100001", "red")),
            ("80-vm--100001", by_name(Some(port(80)), "vm", "100001")),
            ("port--80-vm-100001", by_name(None, "port", "80-vm-100001")),
            ("80-xn--red", by_name(Some(port(80)), "xn", "red")),
        ] {
            assert_eq!(Label::parse(label), expected, "{label}");
        }
    }

    #[test]
    fn labels_that_are_no_name_are_refused() {
        let long = format!("80-{}--{}", "a".repeat(30), "b".repeat(30));
        for label in [
            "--",
            "box--",
            "--red",
            "-box--red",
            "box---red",
            "box--red-",
            "box--Red",
            "Box--red",
            "box--a.b",
            "box--a_b",
            "0-box--red",
            "080-box--red",
            "70000-box--red",
            "80--red",
            "port-80--red",
            "port-box--red",
            "port-port-80-box--red",
            "80-80-box--red",
            "8box--red",
            "80-port-80-box--red",
            "80-pvelxc-x--red",
            "cmux-1--red",
            "xn--red",
            "box--",
            &long,
        ] {
            assert_eq!(Label::parse(label), None, "{label}");
        }
    }

    #[test]
    fn team_that_is_no_label_has_no_names() {
        let name: SandboxName = "box".parse().expect("a name");
        for team in ["Red", "a.b", "a_b", "a-", &"a".repeat(59)] {
            assert_eq!(FullName::new(&team.parse().expect("a team"), &name), None, "{team}");
        }
        assert!(FullName::new(&"a".repeat(58).parse().expect("a team"), &name).is_some());
    }

    #[test]
    fn label_that_no_browser_takes_is_not_made() {
        assert_eq!(full("xn", "red").label(), None);
        assert_eq!(full("xn", "red").label_of(port(80), ""), Some("80-xn--red".to_owned()));
        let long = full(&"a".repeat(30), &"b".repeat(20));
        assert_eq!(long.label_of(port(65535), "port-").map(|label| label.len()), Some(63));
        let longer = full(&"a".repeat(30), &"b".repeat(21));
        assert_eq!(longer.label_of(port(65535), "port-"), None);
        assert!(longer.label_of(port(65535), "").is_some() && longer.label().is_some());
    }

    #[test]
    fn main_port_is_the_one_that_says_so_or_the_only_one() {
        for (services, expected) in [
            (vec![], None),
            (vec![("web", 80)], Some(80)),
            (vec![("web", 80), ("http", 80)], Some(80)),
            (vec![("web", 80), ("api", 81)], None),
            (vec![("web", 80), ("main", 81)], Some(81)),
        ] {
            assert_eq!(main_port(services.iter().copied()), expected, "{services:?}");
        }
    }

    #[test]
    fn digest_tells_entries_apart() {
        let id = |n: u8| SandboxId::new(1, &[n; 10]);
        let one = full("box", "red").digest(&id(1));
        for other in [
            full("box", "red").digest(&id(2)),
            full("bo", "xred").digest(&id(1)),
            full("red", "box").digest(&id(1)),
        ] {
            assert_ne!(one, other);
        }
    }

    proptest! {
        #[test]
        fn every_text_is_parsed_or_refused(text in any::<String>()) {
            drop(Label::parse(&text));
        }

        #[test]
        fn text_like_a_label_has_one_meaning(
            text in "(port-|xn-)?[0-9]{0,5}-?[a-z0-9-]{0,8}(--|vm-|pvelxc-)[a-z0-9-]{0,8}"
        ) {
            if let Some(Label::ByName { port, sandbox }) = Label::parse(&text) {
                let forms = match port {
                    None => vec![sandbox.label()],
                    Some(port) => {
                        vec![sandbox.label_of(port, ""), sandbox.label_of(port, "port-")]
                    }
                };
                prop_assert!(forms.contains(&Some(text)));
            }
        }

        #[test]
        fn label_that_is_made_leads_back(
            name in "[a-z]([a-z0-9]|-[a-z0-9]){0,14}",
            team in "[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?",
            number in 1..=65535u32,
        ) {
            let Ok(name) = name.parse::<SandboxName>() else { return Ok(()) };
            let Some(sandbox) = FullName::new(&team.parse().expect("a team"), &name) else { return Ok(()) };
            prop_assert_eq!(sandbox.to_string().parse(), Ok(sandbox.clone()));
            if let Some(label) = sandbox.label() {
                let expected = Label::ByName { port: None, sandbox: sandbox.clone() };
                prop_assert_eq!(Label::parse(&label), Some(expected));
            }
            for prefix in ["", "port-"] {
                let Some(label) = sandbox.label_of(port(number), prefix) else { continue };
                let expected = Label::ByName { port: Some(port(number)), sandbox: sandbox.clone() };
                prop_assert_eq!(Label::parse(&label), Some(expected), "{}", label);
            }
        }
    }
}
