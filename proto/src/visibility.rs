//! Who reaches an open port of a sandbox. Pure.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{id::Invalid, name::Port, sandbox::v1 as wire};

/// Ports that are never public by default, with what serves them. They give a shell, a screen or root's
/// commands to everybody who reaches them. Source: the service ports of cmux's PVE templates.
pub const SENSITIVE_PORTS: &[(u16, &str)] = &[
    (39_375, "exec daemon"),
    (39_376, "worker, newer templates"),
    (39_377, "worker"),
    (39_380, "VNC"),
    (39_383, "xterm"),
];

/// Visibility of an open port: who reaches it over HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum Visibility {
    /// Everybody who has the URL.
    Public,
    /// Browsers with a session, which a link begins.
    Team,
    /// Requests with a token.
    Token,
    /// Nobody.
    Private,
}

impl Visibility {
    /// Every value, from the widest to the narrowest.
    pub const ALL: [Self; 4] = [Self::Public, Self::Team, Self::Token, Self::Private];

    /// Reads the value of a request; `None` where it says nothing.
    ///
    /// # Errors
    /// When the number is no visibility. The error names `field`.
    pub fn read(number: i32, field: &str) -> Result<Option<Self>, Invalid> {
        let wire = wire::Visibility::try_from(number).map_err(|_| {
            Invalid::new(field.to_owned(), "must be PUBLIC, TEAM, TOKEN or PRIVATE")
        })?;
        Ok(match wire {
            wire::Visibility::Unspecified => None,
            wire::Visibility::Public => Some(Self::Public),
            wire::Visibility::Team => Some(Self::Team),
            wire::Visibility::Token => Some(Self::Token),
            wire::Visibility::Private => Some(Self::Private),
        })
    }

    /// Returns the visibility of `port` where nobody says one: this default, or TEAM for a sensitive port
    /// that would be public.
    #[must_use]
    pub fn or_guarded(self, port: Port) -> Self {
        let is_sensitive = SENSITIVE_PORTS.iter().any(|(known, _)| *known == port.get());
        if is_sensitive && self == Self::Public { Self::Team } else { self }
    }

    /// Returns the word for people, scripts and records.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Team => "team",
            Self::Token => "token",
            Self::Private => "private",
        }
    }
}

impl fmt::Display for Visibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Visibility {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new("visibility", "must be public, team, token or private");
        Self::ALL.into_iter().find(|known| known.word() == text).ok_or_else(wrong)
    }
}

impl TryFrom<String> for Visibility {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Visibility> for &'static str {
    fn from(visibility: Visibility) -> Self {
        visibility.word()
    }
}

impl From<Visibility> for wire::Visibility {
    fn from(visibility: Visibility) -> Self {
        match visibility {
            Visibility::Public => Self::Public,
            Visibility::Team => Self::Team,
            Visibility::Token => Self::Token,
            Visibility::Private => Self::Private,
        }
    }
}

impl wire::Visibility {
    /// Returns the word for people and scripts. A node that says nothing has only public ports.
    pub fn word(self) -> &'static str {
        let known = Visibility::read(self.into(), "visibility");
        known.ok().flatten().unwrap_or(Visibility::Public).word()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visibility_round_trips_through_its_word_and_its_number() {
        for visibility in Visibility::ALL {
            assert_eq!(visibility.word().parse(), Ok(visibility));
            let wire = wire::Visibility::from(visibility);
            assert_eq!(Visibility::read(wire.into(), "x"), Ok(Some(visibility)));
            assert_eq!(wire.word(), visibility.word());
        }
        assert_eq!(Visibility::read(0, "x"), Ok(None));
        assert_eq!(Visibility::read(9, "x").expect_err("none").what, "x");
        assert!("open".parse::<Visibility>().is_err());
    }

    #[test]
    fn sensitive_port_is_public_by_an_explicit_word_alone() {
        let port = |number: u32| Port::try_from(number).expect("a port");
        for (number, _) in SENSITIVE_PORTS {
            let port = port(u32::from(*number));
            assert_eq!(Visibility::Public.or_guarded(port), Visibility::Team);
            assert_eq!(Visibility::Private.or_guarded(port), Visibility::Private);
        }
        assert_eq!(Visibility::Public.or_guarded(port(8000)), Visibility::Public);
        assert_eq!(Visibility::Team.or_guarded(port(8000)), Visibility::Team);
    }
}
