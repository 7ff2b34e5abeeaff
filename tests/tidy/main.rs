//! The rules of the architecture and of the repository that no compiler checks.

mod docs;
mod layers;
mod source;
mod text;
mod units;
