//! Names that callers and operators choose. Each is a type of its own with a narrow alphabet, so
//! that no name can add a line to a PVE config or an option to a command line.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::id::Invalid;

/// Defines a validated string: its type, field name, largest length, rule as a sentence, and check.
macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $max:literal, $why:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                let ok: fn(&str) -> bool = $ok;
                if text.is_empty() || text.len() > $max || !ok(text) {
                    return Err(Invalid::new($what, $why));
                }
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Returns true for a text of letters, digits and bytes of `also` that starts with a letter or
/// digit.
fn word(text: &str, also: &[u8]) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || also.contains(&b))
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

/// Returns true for one DNS label in lower case. The caller checks the length.
fn label(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

name!(
    /// Label that an operator gives a node, and that creations select nodes by.
    Label,
    "label",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ = - and start with a letter or digit",
    |text| word(text, b"._=-")
);
/// Beginnings of ids and of host names of ours.
const RESERVED: [&str; 4] = ["pvelxc-", "pve-lxc-", "cmux-", "port-"];

name!(
    /// Name that a caller gives a sandbox. Never reads as an id, a vmid or a host name of ours.
    SandboxName,
    "name",
    30,
    "must be a DNS label of 1 to 30 characters that starts with a letter, without `--`, and not begin \
     with pvelxc-, pve-lxc-, cmux- or port-",
    |text| label(text)
        && text.starts_with(|first: char| first.is_ascii_lowercase())
        && !text.contains("--")
        && !RESERVED.iter().any(|start| text.starts_with(start))
);
name!(
    /// Name of a size in the controller's configuration.
    Preset,
    "size_preset",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ - and start with a letter or digit",
    |text| word(text, b"._-")
);
name!(
    /// Name of a team, which owns sandboxes and has tokens.
    Team,
    "team",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ - and start with a letter or digit",
    |text| word(text, b"._-")
);
name!(
    /// Name of a token, unique among the team's tokens that are neither revoked nor expired.
    TokenName,
    "name",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ - and start with a letter or digit",
    |text| word(text, b"._-")
);
name!(
    /// Label of the person or program that a token was made for. No account: nobody logs in with it.
    UserLabel,
    "user",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ - + @ and start with a letter or digit",
    |text| word(text, b"._-+@")
);
name!(
    /// Idempotency key of a caller, unique in its team.
    RequestId,
    "request_id",
    64,
    "must be 1 to 64 characters of A-Z a-z 0-9 . _ - and start with a letter or digit",
    |text| word(text, b"._-")
);
name!(
    /// Name of a snapshot, such as `pvelxc_4vcpu_6gb_32gb_v1`.
    SnapshotId,
    "snapshot_id",
    63,
    "must be 1 to 63 characters of A-Z a-z 0-9 . _ - and start with a letter or digit",
    |text| word(text, b"._-")
);

impl SnapshotId {
    /// Snapshot of adopted sandboxes, which were cloned from no template of ours.
    pub const ADOPTED: &str = "adopted";
    /// Snapshot of sandboxes whose record was lost.
    pub const RECOVERED: &str = "recovered";

    /// Returns true for a name that no template may have, because it stands for a sandbox without one.
    pub fn is_reserved(&self) -> bool {
        [Self::ADOPTED, Self::RECOVERED].contains(&self.as_str())
    }
}

name!(
    /// Name of a node in PVE: one DNS label.
    NodeName,
    "node",
    63,
    "must be a host name of one label: 1 to 63 characters of A-Z a-z 0-9 -",
    |text| word(text, b"-") && !text.ends_with('-')
);
name!(
    /// Name of an open port, unique in its sandbox.
    ServiceName,
    "name",
    40,
    "must be 1 to 40 characters of a-z 0-9 - and not start or end with a dash",
    label
);

/// TCP port, 1 to 65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Port(u16);

impl Port {
    /// Returns the number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for Port {
    type Error = Invalid;

    fn try_from(number: u32) -> Result<Self, Invalid> {
        u16::try_from(number)
            .ok()
            .filter(|&n| n != 0)
            .map(Self)
            .ok_or_else(|| Invalid::new("port", "must be 1 to 65535"))
    }
}

impl From<Port> for u32 {
    fn from(port: Port) -> u32 {
        port.0.into()
    }
}

impl FromStr for Port {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let canonical = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
        Self::try_from(text.parse::<u32>().ok().filter(|_| canonical).unwrap_or(0))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_contain_only_their_alphabet(text in any::<String>()) {
            let plain = |name: &str| !name.starts_with('-')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if let Ok(name) = text.parse::<Team>() { prop_assert!(plain(name.as_str())) }
            if let Ok(name) = text.parse::<RequestId>() { prop_assert!(plain(name.as_str())) }
            if let Ok(name) = text.parse::<SnapshotId>() { prop_assert!(plain(name.as_str())) }
            if let Ok(name) = text.parse::<NodeName>() { prop_assert!(plain(name.as_str())) }
            if let Ok(name) = text.parse::<ServiceName>() { prop_assert!(plain(name.as_str())) }
        }
    }

    #[test]
    fn only_canonical_ports_are_parsed() {
        assert_eq!("8000".parse::<Port>().map(Port::get), Ok(8000));
        for text in ["", "0", "080", "65536", "-1", "+1", " 1"] {
            assert!(text.parse::<Port>().is_err(), "{text:?}");
        }
    }
}
