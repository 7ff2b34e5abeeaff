//! Names by which Cloudflare knows things. They become parts of paths and of files, so each is checked.

use std::{fmt, str::FromStr};

use proto::id::Invalid;
use serde::{Deserialize, Serialize};

/// Identifier of a tunnel: a UUID in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelId(String);

impl TunnelId {
    /// Returns the name that a DNS record of the tunnel points to.
    pub fn target(&self) -> String {
        format!("{}.{TARGETS}", self.0)
    }
}

/// Domain below which Cloudflare has a name for each tunnel.
pub const TARGETS: &str = "cfargotunnel.com";

impl FromStr for TunnelId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let text = text.to_ascii_lowercase();
        let lengths = text.split('-').map(str::len);
        let hex = text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        if hex && lengths.eq([8, 4, 4, 4, 12]) {
            Ok(Self(text))
        } else {
            Err(Invalid::new("tunnel id", "must be a UUID"))
        }
    }
}

/// Identifier of a zone or of an account: 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CloudId(String);

impl FromStr for CloudId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(Invalid::new("id of a zone or an account", "must be 32 hexadecimal digits"))
        }
    }
}

/// Gives both identifiers the same conversions.
macro_rules! as_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

as_text!(TunnelId);
as_text!(CloudId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_identifiers_of_cloudflare_are_accepted() {
        let id: TunnelId = "F70FF985-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("a UUID");
        assert_eq!(id.target(), "f70ff985-a4ef-4643-bbbc-4a0ed4fc8415.cfargotunnel.com");
        for bad in [
            "",
            "f70ff985",
            "f70ff985-a4ef-4643-bbbc-4a0ed4fc841g",
            "../etc",
            "f70ff985a4ef-4643-bbbc-4a0e-d4fc8415",
        ] {
            bad.parse::<TunnelId>().expect_err(bad);
        }
        "023e105f4ecef8ad9ca31a8372d0c353".parse::<CloudId>().expect("an id");
        for bad in [
            "",
            "023e105f",
            "023e105f4ecef8ad9ca31a8372d0c35/",
            "023e105f4ecef8ad9ca31a8372d0c3533",
        ] {
            bad.parse::<CloudId>().expect_err(bad);
        }
    }
}
