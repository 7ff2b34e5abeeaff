//! Values that no log and no error shows.

use std::{
    collections::BTreeMap,
    fmt,
    ops::{Deref, DerefMut},
};

use serde::{Deserialize, Serialize};

/// Text that stands for a secret where a value is shown.
pub const HIDDEN: &str = "[hidden]";

/// Value that `Debug` does not show, also as a part of a larger one. It is used as what it holds, and
/// stored as that: storage seals it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret<T>(T);

/// Environment variables: their values are secrets often, and their names sometimes.
pub type Env = Secret<BTreeMap<String, String>>;

impl<T> Secret<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// Returns the value.
    pub fn reveal(self) -> T {
        self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl<T> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Secret<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> From<T> for Secret<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<const N: usize> From<[(String, String); N]> for Env {
    fn from(pairs: [(String, String); N]) -> Self {
        Self(pairs.into())
    }
}

impl From<&str> for Secret<String> {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_is_not_shown_and_used_as_its_value() {
        let env = Env::from([("KEY".to_owned(), "canary".to_owned())]);
        assert_eq!(format!("{env:?} {:#?}", Some(&env)), "[hidden] Some(\n    [hidden],\n)");
        assert_eq!(env.get("KEY").map(String::as_str), Some("canary"));
    }
}
