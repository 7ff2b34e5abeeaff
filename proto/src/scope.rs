//! Scopes: what a token allows, and what a call needs.

use std::{fmt, str::FromStr};

use crate::id::Invalid;

pub use crate::sandbox::v1::Scope;

/// Scope of tokens of earlier versions: all that can be done with the sandboxes of a team.
const SANDBOX: &str = "sandbox";
/// Scope of operators' tokens of earlier versions.
const OPERATOR: &str = "operator";

/// Words for one or several scopes, as people write them.
pub const WORDS: [&str; 6] = ["read", "exec", "manage", "admin", SANDBOX, OPERATOR];

impl Scope {
    /// Every scope, in the order in which lists show them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Exec, Self::Manage, Self::Admin];

    /// Returns the name for people and for the store; empty for one of a later version.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "",
            Self::Read => "read",
            Self::Exec => "exec",
            Self::Manage => "manage",
            Self::Admin => "admin",
        }
    }

    const fn bit(self) -> u8 {
        match self {
            Self::Unspecified => 0,
            Self::Read => 1,
            Self::Exec => 2,
            Self::Manage => 4,
            Self::Admin => 8,
        }
    }
}

/// Set of scopes. One that has any scope has READ.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// No scope: such a token allows nothing.
    pub const NONE: Self = Self(0);
    /// READ, EXEC and MANAGE: all that can be done with the sandboxes of a team.
    pub const SANDBOX: Self = Self::NONE.with(Scope::Exec).with(Scope::Manage);
    /// Every scope.
    pub const ALL: Self = Self::SANDBOX.with(Scope::Admin);

    /// Adds a scope, and what it includes.
    #[must_use]
    pub const fn with(self, scope: Scope) -> Self {
        match scope.bit() {
            0 => self,
            bit => Self(self.0 | bit | Scope::Read.bit()),
        }
    }

    /// Adds the scopes that a word stands for; `None` for a word of a later version.
    fn with_word(self, word: &str) -> Option<Self> {
        match word {
            SANDBOX => Some(Self(self.0 | Self::SANDBOX.0)),
            OPERATOR => Some(self.with(Scope::Admin)),
            name => {
                let scope = Scope::ALL.into_iter().find(|scope| scope.name() == name)?;
                Some(self.with(scope))
            }
        }
    }

    /// Parses a stored text: words between spaces. A word of a later version adds nothing.
    pub fn stored(text: &str) -> Self {
        let add = |scopes: Self, word| scopes.with_word(word).unwrap_or(scopes);
        text.split(' ').fold(Self::NONE, add)
    }

    /// Returns true when these scopes allow a call that needs one.
    pub const fn allow(self, needed: Scope) -> bool {
        self.0 & needed.bit() != 0
    }

    /// Returns the scopes in the order of `Scope::ALL`.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.allow(*scope))
    }

    /// Returns true when there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        scopes.into_iter().fold(Self::NONE, Self::with)
    }
}

impl FromStr for Scopes {
    type Err = Invalid;

    /// Parses words between spaces or commas, and refuses one that is not known.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let mut words = text.split([' ', ',']).filter(|word| !word.is_empty());
        let known = |scopes: Self, word| {
            let wrong = || Invalid::new("scopes", "must be of read, exec, manage, admin");
            scopes.with_word(word).ok_or_else(wrong)
        };
        words.try_fold(Self::NONE, known)
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(Scope::name).collect();
        f.write_str(&names.join(" "))
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scopes({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scope_includes_read_and_no_other() {
        for scope in Scope::ALL {
            let scopes = Scopes::NONE.with(scope);
            for needed in Scope::ALL {
                let allowed = needed == scope || needed == Scope::Read;
                assert_eq!(scopes.allow(needed), allowed, "{scope:?} {needed:?}");
            }
            assert!(!scopes.allow(Scope::Unspecified));
        }
        assert!(Scope::ALL.iter().all(|scope| !Scopes::NONE.allow(*scope)));
    }

    #[test]
    fn scopes_of_earlier_versions_are_read() {
        assert_eq!(Scopes::stored("sandbox"), Scopes::SANDBOX);
        assert_eq!(Scopes::stored("sandbox operator"), Scopes::ALL);
        assert_eq!(Scopes::stored("operator").to_string(), "read admin");
        assert_eq!(Scopes::stored(""), Scopes::NONE);
    }

    #[test]
    fn scopes_round_trip_through_their_text() {
        for bits in 0..16_u8 {
            let of = |scope: &Scope| bits & scope.bit() != 0;
            let scopes: Scopes = Scope::ALL.into_iter().filter(of).collect();
            assert_eq!(Scopes::stored(&scopes.to_string()), scopes);
            assert_eq!(scopes.to_string().parse(), Ok(scopes));
        }
        assert_eq!("exec,manage".parse(), Ok(Scopes::SANDBOX));
        assert_eq!(Scopes::stored("exec later"), "exec".parse().expect("known"));
        assert!("exec later".parse::<Scopes>().is_err());
    }
}
