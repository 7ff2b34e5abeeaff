//! `lifetime`: sets the rules for a sandbox's lifetime.

use std::time::Duration;

use clap::{Args, ValueEnum};
use proto::{
    sandbox::v1::{self as wire, Sandbox},
    update,
};

use super::targets::One;
use crate::{
    client::{Controller, answer, fetch, promised},
    failure::Failure,
    output::{Output, json, time},
    values::{Span, span},
};

/// Arguments of `lifetime`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl lifetime ID                        show when it expires
  sandboxctl lifetime ID --ttl 2h               two hours from now on
  sandboxctl lifetime ID --ttl never --idle 30m --idle-action pause
  sandboxctl lifetime ID --idle 30m --idle-cpu 20
                        a fifth of a core, without traffic, is no idleness

What is not named stays as it is. A node keeps to these rules whether or not the
controller is there. What was paused or stopped by its ttl gets as much time
again when it is resumed or started.")]
pub(crate) struct SetLifetime {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// The rules.
    #[command(flatten)]
    lifetime: Lifetime,
}

/// The rules.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Args)]
pub(crate) struct Lifetime {
    /// Time to live, such as 90s, 30m, 12h or 7d; `never` for one that does not expire
    #[arg(long, value_name = "TIME", value_parser = span)]
    ttl: Option<Span>,
    /// Action when it has expired
    #[arg(long, value_name = "ACTION")]
    ttl_action: Option<Then>,
    /// Idle after so long without a request, a command or traffic; `never`, or at least 10s
    #[arg(long, value_name = "TIME", value_parser = span)]
    idle: Option<Span>,
    /// Action when it is idle
    #[arg(long, value_name = "ACTION")]
    idle_action: Option<Then>,
    /// Not idle while it uses more than so many percent of one core; 0 does not look at it
    #[arg(long, value_name = "PERCENT")]
    idle_cpu: Option<u32>,
}

impl Lifetime {
    /// Returns the rules as the API takes them; none when nothing was said.
    pub(super) fn wire(self) -> Option<wire::Lifetime> {
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
            idle_cpu: self.idle_cpu,
        })
    }
}

/// Action on a sandbox that has expired or is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Then {
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

pub(super) async fn run(
    controller: Controller,
    args: SetLifetime,
    output: Output,
) -> Result<u8, Failure> {
    let sandbox = match args.lifetime.wire() {
        None => fetch(&controller, args.sandbox.id).await?,
        lifetime => {
            let asked = [
                ("lifetime.ttl", args.lifetime.ttl.is_some()),
                ("lifetime.ttl_action", args.lifetime.ttl_action.is_some()),
                ("lifetime.idle", args.lifetime.idle.is_some()),
                ("lifetime.idle_action", args.lifetime.idle_action.is_some()),
                ("lifetime.idle_cpu", args.lifetime.idle_cpu.is_some()),
            ];
            let fields = asked.iter().filter(|(_, asked)| *asked).map(|(field, _)| *field);
            let change = Sandbox { id: args.sandbox.id, lifetime, ..Sandbox::default() };
            let request = update::request(change, &fields.collect::<Vec<_>>());
            promised(answer(controller.sandboxes.clone().update_sandbox(request)).await?.sandbox)?
        }
    };
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} {}", sandbox.id, words(&sandbox)))?;
    }
    Ok(0)
}

/// Text such as `expires 2026-01-01T00:00:00Z (pause); idle after 30m below 20 % of a core (stop)`.
pub(super) fn words(sandbox: &Sandbox) -> String {
    let rules = sandbox.lifetime.unwrap_or_default();
    let expires = match time::rfc3339(sandbox.expires_at) {
        Some(at) => format!("expires {at} ({})", json::expiry_action(rules.ttl_action())),
        None => "does not expire".into(),
    };
    match time_of(rules.idle) {
        Some(idle) => {
            let after = time::seconds(idle.as_secs());
            let cpu = match rules.idle_cpu() {
                0 => String::new(),
                percent => format!(" below {percent} % of a core"),
            };
            let action = json::expiry_action(rules.idle_action());
            format!("{expires}; idle after {after}{cpu} ({action})")
        }
        None => expires,
    }
}

fn time_of(duration: Option<prost_types::Duration>) -> Option<Duration> {
    proto::duration::read(duration?).filter(|time| !time.is_zero())
}
