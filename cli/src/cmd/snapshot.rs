//! `snapshot ls`: lists the snapshots, from which sandboxes are created.

use clap::Subcommand;

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
    /// List the snapshots and the nodes that hold them
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
        ]);
    }
    let values: Vec<_> = snapshots.iter().map(json::snapshot).collect();
    let empty = "no snapshots; on a node: `pve-sandbox-agent template init`";
    listing.print(output, table, &values, empty)?;
    Ok(0)
}
