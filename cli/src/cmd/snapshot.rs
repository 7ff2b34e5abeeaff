//! `snapshot ls`: lists the snapshots, from which sandboxes are created.

use clap::Subcommand;
use proto::sandbox::v1::{self as wire, HttpService};

use super::get;
use crate::{
    client::{self, Controller},
    failure::Failure,
    listing::Listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        table::{self, Table},
    },
};

/// Verbs of `snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// List the snapshots, the nodes that hold them, and the services that they expose by default
    #[command(
        visible_alias = "list",
        after_help = "\
Examples:
  sandboxctl snapshot ls
  sandboxctl snapshot ls -o name | head -1"
    )]
    Ls(Listing),
}

const COLUMNS: &[Column] = &[
    Column::new("ID"),
    Column::new("SIZE").rank(1),
    Column::new("NODES").rank(2).fit(Fit::Cut(12)),
    Column::new("SERVICES").rank(3).fit(Fit::Cut(16)),
];

pub(super) async fn ls(
    controller: Controller,
    listing: Listing,
    output: Output,
) -> Result<u8, Failure> {
    let snapshots = client::snapshots(&controller).await?;
    let mut table = Table::new(COLUMNS);
    for snapshot in &snapshots {
        table.row(vec![
            table::cell(&snapshot.id),
            table::cell(get::size(snapshot.size)),
            table::cell(snapshot.nodes.join(", ")),
            table::cell(services(snapshot)),
        ]);
    }
    let values: Vec<_> = snapshots.iter().map(json::snapshot).collect();
    let empty = "no snapshots; on a node: `pve-sandbox-agent template init`";
    listing.print(output, table, &values, empty)?;
    for snapshot in snapshots.iter().filter(|snapshot| !snapshot.differing_nodes.is_empty()) {
        let others = snapshot.differing_nodes.join(", ");
        output.note(format!("{}: its default services differ on {others}", snapshot.id));
    }
    Ok(0)
}

/// Lists what its sandboxes expose by default.
fn services(snapshot: &wire::Snapshot) -> String {
    let one = |service: &HttpService| {
        format!("{}={}:{}", service.name, service.port, service.visibility().word())
    };
    let on_listen = snapshot.expose_on_listen.then(|| "on listen".to_owned());
    snapshot.services.iter().map(one).chain(on_listen).collect::<Vec<_>>().join(", ")
}
