//! `expose`: opens a port and prints its address.

use clap::Args;
use proto::sandbox::v1::ExposeHttpServiceRequest;
use serde_json::json;

use super::url::note_bypass;
use crate::{
    client::{Controller, patient, promised},
    failure::Failure,
    output::Output,
};

/// Arguments of `expose`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl expose ID 8080                     prints the address
  sandboxctl expose ID 3000 --name web          under a name, for `url` and `hide`

What serves it must listen on 0.0.0.0: nothing from outside reaches 127.0.0.1.")]
pub(crate) struct Expose {
    /// Sandbox
    pub(super) id: String,
    /// TCP port inside it
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65535))]
    port: u32,
    /// Name of the service [default: port-PORT]
    #[arg(long)]
    name: Option<String>,
}

pub(super) async fn run(
    controller: Controller,
    expose: Expose,
    output: Output,
) -> Result<u8, Failure> {
    let Expose { id, port, name } = expose;
    let request = ExposeHttpServiceRequest { id: id.clone(), name: name.unwrap_or_default(), port };
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.expose_http_service(request).await }
    };
    let service = promised(patient(call).await?.service)?;
    if output.json {
        output.value(&json!({
            "id": id, "name": service.name, "port": service.port, "url": service.url,
            "bypasses_access": service.bypasses_access,
        }))?;
    } else {
        output.line(&service.url)?;
        note_bypass(std::slice::from_ref(&service), output);
    }
    Ok(0)
}
