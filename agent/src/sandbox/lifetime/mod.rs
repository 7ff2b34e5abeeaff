//! How long a sandbox lives: the rules, the last use, signs of use, what is due, and the loop that ends it.

pub(super) mod activity;
mod expire;
pub(super) mod expiry;
pub mod expiry_loop;
mod meter;
