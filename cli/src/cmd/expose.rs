//! `expose`: opens a port and prints its address.

use clap::Args;
use proto::{
    sandbox::v1::{self as wire, ExposeHttpServiceRequest},
    visibility::Visibility,
};
use serde_json::json;

use super::{
    targets::One,
    url::{note_bypass, note_missing},
};
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
  sandboxctl expose ID 3000 --name web          under a name, for `url` and
                                                `hide`
  sandboxctl expose ID 8080 --public            for everybody who has the
                                                address
  sandboxctl expose ID 8080 --visibility token  for programs with a token

Who reaches it: public (everybody), team (browsers that opened a link), token
(requests with a token), private (nobody; a port forward does). Without a word
it stays as it is, or becomes what the controller's configuration says.
`sandboxctl link` makes links and tokens.

What serves it must listen on 0.0.0.0: nothing from outside reaches 127.0.0.1.")]
pub(crate) struct Expose {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// TCP port inside it
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65535))]
    port: u32,
    /// Name of the service [default: port-PORT]
    #[arg(long)]
    name: Option<String>,
    /// Visibility: who reaches it [default: as the controller says]
    #[arg(long, value_name = "public|team|token|private")]
    visibility: Option<Visibility>,
    /// Let everybody in; short for --visibility public
    #[arg(long, conflicts_with = "visibility")]
    public: bool,
}

pub(super) async fn run(
    controller: Controller,
    expose: Expose,
    output: Output,
) -> Result<u8, Failure> {
    let Expose { sandbox: One { id }, port, name, visibility, public } = expose;
    let visibility = if public { Some(Visibility::Public) } else { visibility };
    let request = ExposeHttpServiceRequest {
        id: id.clone(),
        name: name.unwrap_or_default(),
        port,
        visibility: visibility.map(wire::Visibility::from).unwrap_or_default().into(),
    };
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.expose_http_service(request).await }
    };
    let service = promised(patient(call).await?.service)?;
    if output.json {
        output.value(&json!({
            "id": id, "name": service.name, "port": service.port, "url": service.url,
            "visibility": service.visibility().word(),
            "bypasses_access": service.bypasses_access,
        }))?;
    } else {
        if service.no_url.is_empty() {
            output.line(&service.url)?;
        } else {
            note_missing(&service, output);
        }
        note_bypass(std::slice::from_ref(&service), output);
        match service.visibility() {
            wire::Visibility::Unspecified | wire::Visibility::Public => {}
            wire::Visibility::Private => output.note("it is private: a port forward reaches it"),
            wire::Visibility::Team => {
                output.note(format!("it needs a link: `sandboxctl link {id} {port}`"));
            }
            wire::Visibility::Token => {
                output.note(format!("it needs a token: `sandboxctl link {id} {port}`"));
            }
        }
    }
    Ok(0)
}
