//! `hide`: closes a port, under all its names, by one of the names or by the port itself.

use clap::Args;
use proto::sandbox::v1::{HideHttpServiceRequest, HttpService};

use super::targets::One;
use crate::{
    client::{Controller, answer, fetch, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `hide`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl hide ID web
  sandboxctl hide ID 8080                       under all its names")]
pub(crate) struct Hide {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Name of the service, or its port
    name: String,
}

pub(super) async fn run(controller: Controller, hide: Hide, output: Output) -> Result<u8, Failure> {
    let Hide { sandbox: One { id }, name } = hide;
    // Only an argument that looks like a port requires reading the sandbox.
    let name = if name.parse::<u16>().is_ok() {
        let sandbox = fetch(&controller, id.clone()).await?;
        find(&sandbox.services, &name).map_or(name, |service| service.name.clone())
    } else {
        name
    };
    let request = HideHttpServiceRequest { id, name: name.clone() };
    let hidden = answer(controller.sandboxes.clone().hide_http_service(request)).await?;
    let (sandbox, closed) = (promised(hidden.sandbox)?, hidden.closed);
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        // A port is closed under all its names.
        let names: Vec<_> = closed.iter().map(|service| service.name.as_str()).collect();
        let names = if names.is_empty() { name } else { names.join(", ") };
        output.line(format!("{} {names} closed", sandbox.id))?;
    }
    Ok(0)
}

/// Finds the service with this name, or else with this port.
pub(super) fn find<'a>(services: &'a [HttpService], wanted: &str) -> Option<&'a HttpService> {
    let by_port = || services.iter().find(|service| service.port.to_string() == wanted);
    services.iter().find(|service| service.name == wanted).or_else(by_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_name_wins_over_its_port() {
        let service =
            |name: &str, port| HttpService { name: name.into(), port, ..HttpService::default() };
        let services = [service("web", 80), service("80", 81)];
        assert_eq!(find(&services, "80").map(|found| found.port), Some(81));
        assert_eq!(find(&services, "81").map(|found| found.name.as_str()), Some("80"));
        assert_eq!(find(&services, "82"), None);
    }
}
