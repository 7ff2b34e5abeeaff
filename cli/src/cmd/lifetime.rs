//! `lifetime`: sets the rules for a sandbox's lifetime.

use std::time::Duration;

use proto::sandbox::v1::{Sandbox, SetLifetimeRequest};

use crate::{
    args::SetLifetime,
    client::{Controller, answer, fetch, promised},
    failure::Failure,
    output::{Output, json, time},
};

pub(super) async fn run(
    controller: Controller,
    wish: SetLifetime,
    output: Output,
) -> Result<u8, Failure> {
    let sandbox = match wish.lifetime.wire() {
        None => fetch(&controller, wish.id).await?,
        lifetime => {
            let request = SetLifetimeRequest { id: wish.id, lifetime };
            promised(answer(controller.sandboxes.clone().set_lifetime(request)).await?.sandbox)?
        }
    };
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} {}", sandbox.id, words(&sandbox)))?;
    }
    Ok(0)
}

/// Text such as `expires 2026-01-01T00:00:00Z (pause); idle after 30m (stop)`.
pub(super) fn words(sandbox: &Sandbox) -> String {
    let rules = sandbox.lifetime.unwrap_or_default();
    let expires = match time::rfc3339(sandbox.expires_at) {
        Some(at) => format!("expires {at} ({})", json::expiry_action(rules.ttl_action())),
        None => "does not expire".into(),
    };
    match time_of(rules.idle) {
        Some(idle) => {
            let after = time::seconds(idle.as_secs());
            format!("{expires}; idle after {after} ({})", json::expiry_action(rules.idle_action()))
        }
        None => expires,
    }
}

fn time_of(duration: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(duration?).ok().filter(|time| !time.is_zero())
}
