//! Domain of the sandboxes' host names. What stands in front of it is parsed in `proto::host`: the regular expression
//! in Caddy's configuration is a coarse filter, and nothing that it captures is used for routing.

use std::{fmt, str::FromStr};

use proto::{host::Label, id::Invalid, name::Port};

/// Domain of the sandboxes' host names: labels in lower case, without a dot at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    /// Returns the domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Parses a Host header, in any case and with or without a port; `None` when it is no sandbox's below this domain.
    pub fn label_of(&self, host: &str) -> Option<Label> {
        // A DNS name and a port are shorter; do not copy anything else.
        if host.len() > 253 + 6 {
            return None;
        }
        let host = host.to_ascii_lowercase();
        let name = match host.split_once(':') {
            Some((name, port)) => port.parse::<Port>().ok().map(|_| name)?,
            None => &host,
        };
        Label::parse(name.strip_suffix(&self.0)?.strip_suffix('.')?)
    }
}

impl FromStr for Domain {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(plain)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // 253 is the longest DNS name; the label of a sandbox and its dot come in front.
        if text.len() <= 253 - 64 && text.split('.').all(label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Invalid::new(
                "ingress.domain",
                "must be a domain name in lower case, such as `sandbox.example.com`",
            ))
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
