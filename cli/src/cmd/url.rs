//! `url`: prints the addresses of open ports.

use clap::Args;
use proto::sandbox::v1::HttpService;

use super::{hide::find, targets::One};
use crate::{
    client::{Controller, fetch},
    exit,
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `url`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl url ID                             all that are open, one a line
  curl $(sandboxctl url ID 8080)

Where the operator prints URLs by name, a sandbox without a name, or whose name
and team make no host name, has its URL by id.")]
pub(crate) struct Url {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Port or name [default: all that are open]
    #[arg(value_name = "PORT|NAME")]
    service: Option<String>,
}

pub(super) async fn run(controller: Controller, url: Url, output: Output) -> Result<u8, Failure> {
    let sandbox = fetch(&controller, url.sandbox.id).await?;
    let Some(wanted) = url.service else {
        if output.json {
            output.value(&sandbox.services.iter().map(json::service).collect::<Vec<_>>())?;
        } else if sandbox.services.is_empty() {
            output.note(format!(
                "no port is open; `sandboxctl expose {} PORT` opens one",
                sandbox.id
            ));
        } else {
            let (with, without): (Vec<_>, Vec<_>) =
                sandbox.services.iter().partition(|service| service.no_url.is_empty());
            with.iter().try_for_each(|service| output.line(&service.url))?;
            without.iter().for_each(|service| note_missing(service, output));
            note_bypass(&sandbox.services, output);
        }
        return Ok(0);
    };
    let service = find(&sandbox.services, &wanted).ok_or_else(|| {
        Failure::local(format!("{} has no open port or service {wanted}", sandbox.id))
            .hint(format!("open it with `sandboxctl expose {} PORT`", sandbox.id))
            .exit(exit::NOT_FOUND)
    })?;
    if output.json {
        output.value(&json::service(service))?;
    } else if !service.no_url.is_empty() {
        return Err(Failure::local(missing(service)));
    } else {
        output.line(&service.url)?;
        note_bypass(std::slice::from_ref(service), output);
    }
    Ok(0)
}

fn missing(service: &HttpService) -> String {
    format!("port {} has no URL: {}", service.port, service.no_url)
}

/// Says on stderr why a port has no URL.
pub(super) fn note_missing(service: &HttpService, output: Output) {
    output.note(missing(service));
}

/// Says on stderr if URLs lead past the ingress.
pub(super) fn note_bypass(services: &[HttpService], output: Output) {
    if services.iter().any(|service| service.bypasses_access) {
        output.note(
            "note: there is no ingress; this URL leads to the container itself, past the rules of \
             access, and only its node reaches that (docs/local.md)",
        );
    }
}
