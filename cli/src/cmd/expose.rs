//! `expose`: opens a port and prints its address.

use proto::sandbox::v1::ExposeHttpServiceRequest;
use serde_json::json;

use crate::{
    args::Expose,
    client::{Controller, patient, promised},
    failure::Failure,
    output::Output,
};

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
        }))?;
    } else {
        output.line(&service.url)?;
    }
    Ok(0)
}
