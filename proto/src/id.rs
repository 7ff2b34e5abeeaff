//! Identities. A `SandboxId` is chosen by the controller and never used again; a `Vmid` is PVE's
//! and is used again.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Error: a value does not have its required form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {why}")]
pub struct Invalid {
    /// Name of the value, such as `vmid` or `files[3].path`; also the field of a BadRequest.
    pub what: Cow<'static, str>,
    /// Rule that the value breaks.
    pub why: String,
}

impl Invalid {
    /// Creates an error about the value `what`, which breaks the rule `why`.
    pub fn new(what: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into() }
    }

    /// Names the value from the message that holds it: `path` under `files[3]` is `files[3].path`.
    #[must_use]
    pub fn under(self, message: impl fmt::Display) -> Self {
        Self { what: format!("{message}.{}", self.what).into(), ..self }
    }

    /// Names the value `what`, whatever it was called.
    #[must_use]
    pub fn named(self, what: impl Into<Cow<'static, str>>) -> Self {
        Self { what: what.into(), ..self }
    }
}

const PREFIX: &str = "pvelxc-";
/// Alphabet of RFC 4648 §7 in lower case: unlike the plain alphabet it keeps the order of the
/// bytes, so ids sort by the time of their creation.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
/// Number of digits of an id: 128 bits in groups of five.
const DIGITS: usize = 26;

/// Id of a sandbox: `pvelxc-` and a UUIDv7 in base32, 33 characters, one DNS label. Also the
/// hostname of the container.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId(Uuid);

impl SandboxId {
    /// Creates an id from a time in milliseconds since 1970 and 10 random bytes. The caller gives
    /// both, so that a simulation can be repeated.
    pub fn new(unix_ms: u64, random: &[u8; 10]) -> Self {
        Self(uuid::Builder::from_unix_timestamp_millis(unix_ms, random).into_uuid())
    }

    /// Returns the time of the creation in milliseconds since 1970: the first 48 bits.
    pub fn created_ms(&self) -> u64 {
        u64::try_from(self.0.as_u128() >> 80).unwrap_or_default()
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        // 26 digits are 130 bits: the first digit holds the top three bits alone.
        let value = self.0.as_u128();
        for digit in (0..DIGITS).rev() {
            let index = ((value >> (digit * 5)) & 31) as usize;
            fmt::Write::write_char(f, char::from(ALPHABET[index]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SandboxId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let bad =
            || Invalid::new("sandbox_id", "must be `pvelxc-` and 26 characters of 0-9 and a-v");
        let digits = text.strip_prefix(PREFIX).ok_or_else(bad)?;
        if digits.len() != DIGITS {
            return Err(bad());
        }
        let mut value: u128 = 0;
        for (place, byte) in digits.bytes().enumerate() {
            let digit = ALPHABET.iter().position(|&a| a == byte).ok_or_else(bad)?;
            if place == 0 && digit > 7 {
                return Err(bad());
            }
            value = (value << 5) | digit as u128;
        }
        Ok(Self(Uuid::from_u128(value)))
    }
}

impl Serialize for SandboxId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SandboxId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// PVE's number of a container, 100 to 999999999. Unique in the cluster; used again after a
/// deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vmid(u32);

impl Vmid {
    /// Lowest vmid that PVE accepts.
    pub const MIN: Self = Self(100);

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vmid {
    type Error = Invalid;

    fn try_from(number: u32) -> Result<Self, Invalid> {
        if (100..=999_999_999).contains(&number) {
            Ok(Self(number))
        } else {
            Err(Invalid::new("vmid", "must be 100 to 999999999"))
        }
    }
}

impl From<Vmid> for u32 {
    fn from(vmid: Vmid) -> u32 {
        vmid.0
    }
}

impl FromStr for Vmid {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        // `parse` alone would accept "+100" and "0100".
        let canonical = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
        let number = text.parse::<u32>().ok().filter(|_| canonical).unwrap_or(0);
        Self::try_from(number)
    }
}

impl fmt::Display for Vmid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Name by which a caller refers to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxRef {
    /// Id of the sandbox.
    Id(SandboxId),
    /// Vmid of its present container: plain, `pve_lxc_{vmid}` or `cmux-{vmid}`.
    Vmid(Vmid),
}

impl FromStr for SandboxRef {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        let digits =
            text.strip_prefix("pve_lxc_").or_else(|| text.strip_prefix("cmux-")).unwrap_or(text);
        digits.parse().map(Self::Vmid).map_err(|_| {
            Invalid::new(
                "id",
                "must be a sandbox id (`pvelxc-...`), a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`",
            )
        })
    }
}

impl fmt::Display for SandboxRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => fmt::Display::fmt(id, f),
            Self::Vmid(vmid) => fmt::Display::fmt(vmid, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sandbox_id_round_trips_through_text(ms in 0u64..1 << 48, random: [u8; 10]) {
            let id = SandboxId::new(ms, &random);
            let text = id.to_string();
            prop_assert_eq!(text.len(), 33);
            prop_assert_eq!(text.parse::<SandboxId>(), Ok(id));
            prop_assert_eq!(text.parse::<SandboxRef>(), Ok(SandboxRef::Id(id)));
        }

        #[test]
        fn sandbox_ids_sort_by_time(a in 0u64..1 << 48, b in 0u64..1 << 48, random: [u8; 10]) {
            prop_assume!(a < b);
            let (older, newer) = (SandboxId::new(a, &random), SandboxId::new(b, &random));
            prop_assert!(older < newer);
            prop_assert!(older.to_string() < newer.to_string());
        }

        #[test]
        fn only_known_forms_parse_as_a_reference(text in "\\PC{0,40}") {
            if let Ok(reference) = text.parse::<SandboxRef>() {
                let canonical = reference.to_string();
                let known = [canonical.clone(), format!("pve_lxc_{canonical}"), format!("cmux-{canonical}")];
                prop_assert!(known.contains(&text));
            }
        }
    }

    #[test]
    fn old_forms_of_a_vmid_are_parsed() {
        let vmid = Vmid::try_from(100_001).expect("in range");
        for text in ["100001", "pve_lxc_100001", "cmux-100001"] {
            assert_eq!(text.parse(), Ok(SandboxRef::Vmid(vmid)), "{text}");
        }
        for text in ["", "99", "+100", "0100", "1000000000", "pve_lxc_", "cmux-1 00", "100\n"] {
            assert!(text.parse::<SandboxRef>().is_err(), "{text:?}");
        }
    }
}
