//! Host names of sandboxes. They are parsed here and nowhere else: the regular expression in Caddy's
//! configuration is a coarse filter, and nothing that it captures is used for routing.

use std::{fmt, str::FromStr};

use proto::{
    id::{Invalid, SandboxRef},
    name::Port,
};

/// Domain of the sandboxes' host names: labels in lower case, without a dot at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    pub fn as_str(&self) -> &str {
        &self.0
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

/// Parsed host name: `{port}-vm-{vmid}.{domain}` or `{port}-{sandbox_id}.{domain}`, each with or without `port-`
/// in front. The form that is printed is the controller's `url_template`; all are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// TCP port inside the sandbox.
    pub port: Port,
    pub sandbox: SandboxRef,
}

impl Name {
    /// Parses a Host header, in any case and with or without a port; `None` when it has any other
    /// form.
    pub fn parse(host: &str, domain: &Domain) -> Option<Self> {
        // A DNS name and a port are shorter; do not copy anything else.
        if host.len() > 253 + 6 {
            return None;
        }
        let host = host.to_ascii_lowercase();
        let name = match host.split_once(':') {
            Some((name, port)) => port.parse::<Port>().ok().map(|_| name)?,
            None => &host,
        };
        let label = name.strip_suffix(domain.as_str())?.strip_suffix('.')?;
        // Without it, the first label is as in E2B's SDKs.
        let (port, sandbox) = label.strip_prefix("port-").unwrap_or(label).split_once('-')?;
        let sandbox = match sandbox.strip_prefix("vm-") {
            Some(vmid) => SandboxRef::Vmid(vmid.parse().ok()?),
            None => SandboxRef::Id(sandbox.parse().ok()?),
        };
        Some(Self { port: port.parse().ok()?, sandbox })
    }
}
