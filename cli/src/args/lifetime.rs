//! Arguments for the lifetime of a sandbox.

use std::time::Duration;

use clap::{Args as Group, ValueEnum};
use proto::sandbox::v1 as wire;

use super::values::{Span, span};

/// What is done with a sandbox that has expired or is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Then {
    /// Freeze it; its memory is kept
    Pause,
    /// Stop it; its disk is kept
    Stop,
    /// Delete it, for good
    Delete,
}

impl From<Then> for wire::ExpiryAction {
    fn from(then: Then) -> Self {
        match then {
            Then::Pause => Self::Pause,
            Then::Stop => Self::Stop,
            Then::Delete => Self::Delete,
        }
    }
}

/// The rules.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Group)]
pub struct Lifetime {
    /// Time to live, such as 90s, 30m, 12h or 7d; `never` for one that does not expire
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub ttl: Option<Span>,
    /// What is done then
    #[arg(long, value_name = "ACTION")]
    pub ttl_action: Option<Then>,
    /// Idle after so long without a request, a command or a connection; `never`, or at least 10s
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub idle: Option<Span>,
    /// What is done then
    #[arg(long, value_name = "ACTION")]
    pub idle_action: Option<Then>,
}

impl Lifetime {
    /// As the API takes it; `None` when nothing was said.
    pub fn wire(self) -> Option<wire::Lifetime> {
        let duration = |span: Option<Span>| {
            let time = match span? {
                Span::Never => Duration::ZERO,
                Span::Time(time) => time,
            };
            prost_types::Duration::try_from(time).ok()
        };
        let action = |then: Option<Then>| {
            then.map_or(wire::ExpiryAction::Unspecified, wire::ExpiryAction::from).into()
        };
        (self != Self::default()).then(|| wire::Lifetime {
            ttl: duration(self.ttl),
            ttl_action: action(self.ttl_action),
            idle: duration(self.idle),
            idle_action: action(self.idle_action),
        })
    }
}
