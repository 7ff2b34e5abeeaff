//! Version of Caddy, and what depends on it. Pure.

use std::{fmt, str::FromStr};

/// Version of a Caddy, such as 2.6.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16, u16, u16);

impl Version {
    /// First version that was tried and is free of the fault by which a connection for route questions
    /// may lead to a sandbox.
    pub const FIXED: Self = Self(2, 11, 7);

    /// First version that replaces `{file.PATH}` in its configuration by what the file holds.
    pub const READS_FILES: Self = Self(2, 8, 0);

    /// Returns the form of the configuration for it.
    pub fn generation(self) -> Generation {
        if self >= Self::FIXED { Generation::Fixed } else { Generation::Before }
    }
}

impl FromStr for Version {
    type Err = String;

    /// Reads the output of `caddy version`: `2.6.2`, or `v2.11.7 h1:...`.
    fn from_str(text: &str) -> Result<Self, String> {
        let word = text.split_whitespace().next().unwrap_or_default();
        let mut parts = word.strip_prefix('v').unwrap_or(word).splitn(3, '.');
        let mut number = || {
            let part = parts.next()?;
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        };
        let version = (|| Some(Self(number()?, number()?, number()?)))();
        version.ok_or_else(|| format!("{word:.40?} is no version of Caddy"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Form of the configuration, by what a Caddy understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// Every version from 2.6.2; later ones accept it, too.
    Before,
    /// [`Version::FIXED`] and later.
    Fixed,
}

impl Generation {
    /// Every form.
    pub const ALL: [Self; 2] = [Self::Before, Self::Fixed];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_in_the_forms_that_builds_print() {
        let told = |text: &str| text.parse::<Version>().map(|version| version.to_string());
        assert_eq!(told("2.6.2\n").as_deref(), Ok("2.6.2"));
        assert_eq!(told("v2.11.7 h1:yj0Y4fYZGPkSvibBJ1sTWE33xC0=\n").as_deref(), Ok("2.11.7"));
        assert_eq!(told("v2.12.0-beta.1 h1:x").as_deref(), Ok("2.12.0"));
        assert_eq!(told("2.6.2-12+deb13u1").as_deref(), Ok("2.6.2"));
        for text in ["", "unknown", "(devel)", "v2", "2.6", "2.99999.1", "2..1"] {
            assert!(told(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn only_fixed_versions_get_the_later_form() {
        let form = |text: &str| text.parse::<Version>().expect("a version").generation();
        for text in ["2.6.2", "2.11.2", "2.11.6"] {
            assert_eq!(form(text), Generation::Before, "{text}");
        }
        for text in ["2.11.7", "2.12.0", "3.0.0"] {
            assert_eq!(form(text), Generation::Fixed, "{text}");
        }
    }
}
