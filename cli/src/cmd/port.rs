//! `port ls`: lists the ports that something in a sandbox listens on.

use clap::{Args, Subcommand};
use proto::sandbox::v1::{ListPortsRequest, ListeningPort};
use serde_json::{Value, json};

use super::targets::One;
use crate::{
    client::{Controller, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output,
        layout::Column,
        table::{self, Table},
    },
};

/// Verbs about the ports of a sandbox.
#[derive(Debug, Subcommand)]
pub(crate) enum Port {
    /// List the TCP ports that something in a sandbox listens on
    Ls(PortLs),
}

/// Arguments of `port ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl port ls ID         what listens, and what is open to HTTP
  sandboxctl port ls ID --json  for a script

A server on 127.0.0.1 is reached by `sandboxctl port-forward` alone.
One on 0.0.0.0 or :: is reached by HTTP once `sandboxctl expose` has opened it.")]
pub(crate) struct PortLs {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("PORT").right(),
    Column::new("ADDRESS"),
    Column::new("NAMES"),
    Column::new("VISIBILITY"),
    Column::new("URL").rank(1),
];

pub(super) async fn run(
    controller: Controller,
    Port::Ls(PortLs { sandbox: One { id }, listing }): Port,
    output: Output,
) -> Result<u8, Failure> {
    let call = || {
        let (mut client, request) =
            (controller.sandboxes.clone(), ListPortsRequest { id: id.clone() });
        async move { client.list_ports(request).await }
    };
    let ports = read(call).await?.ports;
    let values: Vec<_> = ports.iter().map(value).collect();
    listing.print(output, table(&ports), &values, "nothing listens in the sandbox")?;
    Ok(0)
}

fn table(ports: &[ListeningPort]) -> Table {
    let mut table = Table::new(COLUMNS);
    for port in ports {
        let names: Vec<_> = port.services.iter().map(|service| service.name.as_str()).collect();
        let url = port.services.first().map(|service| service.url.as_str()).unwrap_or_default();
        table.row(vec![
            table::number(port.port.into()),
            table::cell(&port.address),
            table::cell(names.join(", ")),
            table::cell(visibility(port)),
            table::cell(url),
        ]);
    }
    table
}

/// Returns who reaches a port over HTTP; empty where nobody does.
fn visibility(port: &ListeningPort) -> &'static str {
    port.services.first().map(|service| service.visibility().word()).unwrap_or_default()
}

fn value(port: &ListeningPort) -> Value {
    let service = |service: &proto::sandbox::v1::HttpService| json!({ "name": service.name, "url": service.url });
    json!({
        "port": port.port,
        "address": port.address,
        "open": !port.services.is_empty(),
        "visibility": port.services.first().map(|service| service.visibility().word()),
        "services": port.services.iter().map(service).collect::<Vec<_>>(),
    })
}
