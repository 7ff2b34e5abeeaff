//! `revoke`: makes all links, tokens and sessions of an open port void.

use clap::Args;
use proto::sandbox::v1::RevokeAccessRequest;

use super::targets::One;
use crate::{
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `revoke`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl revoke ID 8080  everybody needs a new link or token

The port stays open; its open connections and the forwards to it are cut.
`sandboxctl hide` closes it.")]
pub(crate) struct Revoke {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Port or name of the service
    #[arg(value_name = "PORT|NAME")]
    service: String,
}

pub(super) async fn run(
    controller: Controller,
    revoke: Revoke,
    output: Output,
) -> Result<u8, Failure> {
    let Revoke { sandbox: One { id }, service } = revoke;
    let request = RevokeAccessRequest { id, service };
    let revoked = answer(controller.sandboxes.clone().revoke_access(request)).await?;
    let (sandbox, port) = (promised(revoked.sandbox)?, revoked.port);
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output
            .line(format!("{} port {port}: all links, tokens and sessions are void", sandbox.id))?;
    }
    Ok(0)
}
