//! `link`: prints a link to an open port for a browser, or a token for a program.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{AccessKind, CreateAccessLinkRequest};
use serde_json::json;

use super::targets::One;
use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::{Output, time},
    values::duration,
};

/// Arguments of `link`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl link ID 8080                       a link, or the URL with a token
  sandboxctl link ID web --ttl 1h               good for an hour
  sandboxctl link ID 8080 --bare                for the header X-Sbx-Token

A port with visibility team takes links, one with visibility token takes tokens.
A link is good for 5 minutes, and at most for an hour; its session lasts 12
hours. A token is good for 24 hours, and at most for 30 days. Whoever has one
gets in: treat it as a password. `sandboxctl revoke` makes all of a port void.")]
pub(crate) struct Link {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Port or name of the service
    #[arg(value_name = "PORT|NAME")]
    service: String,
    /// How long it is good [default: 5m for a link, 24h for a token]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ttl: Option<Duration>,
    /// Print the token or link text alone, without the URL: for the header X-Sbx-Token
    #[arg(long)]
    bare: bool,
}

pub(super) async fn run(controller: Controller, link: Link, output: Output) -> Result<u8, Failure> {
    let Link { sandbox: One { id }, service, ttl, bare } = link;
    let ttl = ttl.and_then(|ttl| prost_types::Duration::try_from(ttl).ok());
    let request = CreateAccessLinkRequest {
        id: id.clone(),
        service,
        kind: AccessKind::Unspecified.into(),
        ttl,
    };
    let made = answer(controller.sandboxes.clone().create_access_link(request)).await?;
    if output.json {
        let kind = match made.kind() {
            AccessKind::Token => "token",
            AccessKind::Unspecified | AccessKind::Link => "link",
        };
        output.value(&json!({
            "id": id, "port": made.port, "kind": kind, "url": made.url,
            "credential": made.credential, "expires_at": time::rfc3339(made.expires_at),
        }))?;
    } else if bare || made.url.is_empty() {
        output.line(&made.credential)?;
        if !bare {
            output.note(
                "note: there is no domain, so this is the credential alone; never send it to the \
                 URL of the container, which would hand it to the sandbox (docs/local.md)",
            );
        }
    } else {
        output.line(&made.url)?;
    }
    Ok(0)
}
