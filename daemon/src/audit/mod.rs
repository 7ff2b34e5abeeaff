//! Audit log as it is stored and exported: lines of JSON, each with the hash of the line before it.
//! Pure: the controller writes with it, and both the controller and `sandboxctl` verify with it.

mod record;
mod verify;

use data_encoding::HEXLOWER;

pub use record::{
    Chain, GAP_IO, GAP_QUEUE, GAP_RESTART, Kind, LINE_MAX, Line, Record, bounded, code_name,
    code_number,
};
pub use verify::{Broken, Fault, Head, Report, Verifier, read_line, verify};

/// SHA-256 of a line without its line break.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash([u8; 32]);

impl Hash {
    /// Hash before the first line of a log.
    pub const ZERO: Self = Self([0; 32]);

    /// Hashes a line without its line break.
    pub fn of(line: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(line).into())
    }
}

impl std::fmt::Display for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&HEXLOWER.encode_display(&self.0), f)
    }
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl std::str::FromStr for Hash {
    type Err = proto::id::Invalid;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || proto::id::Invalid::new("hash", "must be 64 hex digits in lower case");
        let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| wrong())?;
        Ok(Self(bytes.try_into().map_err(|_| wrong())?))
    }
}

impl serde::Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
        text.parse().map_err(|_| serde::de::Error::custom("no hash"))
    }
}
