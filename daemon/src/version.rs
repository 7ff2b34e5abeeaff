//! Version of the program that runs. The program sets it, so that a build with another version compiles the last
//! crate alone.

use std::sync::OnceLock;

static VERSION: OnceLock<&str> = OnceLock::new();

/// Sets the version, once, before anything asks for it.
pub fn set(version: &'static str) {
    VERSION.get_or_init(|| version);
}

/// Returns the version: that of the packages, unless the program has set another one.
pub fn get() -> &'static str {
    VERSION.get().copied().unwrap_or(env!("CARGO_PKG_VERSION"))
}
