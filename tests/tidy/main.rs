//! The rules of the architecture and of the repository that no compiler checks.

mod circles;
mod docs;
mod documented;
mod language;
mod layers;
mod packaging;
mod reads;
mod source;
mod text;
mod units;
