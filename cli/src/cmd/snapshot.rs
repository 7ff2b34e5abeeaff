//! `snapshot ls`: lists the snapshots, from which sandboxes are created.

use proto::sandbox::v1::ListSnapshotsRequest;

use super::get;
use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, table},
};

pub(super) async fn ls(controller: Controller, output: Output) -> Result<u8, Failure> {
    let known =
        answer(controller.sandboxes.clone().list_snapshots(ListSnapshotsRequest {})).await?;
    if output.json {
        output.value(&known.snapshots.iter().map(json::snapshot).collect::<Vec<_>>())?;
    } else if known.snapshots.is_empty() {
        output.note("no snapshots; name a template in `[[template]]` of an agent's configuration");
    } else {
        let mut rows = table::new(output, &["ID", "SIZE", "NODES"]);
        for snapshot in &known.snapshots {
            rows.add_row([
                table::cell(&snapshot.id),
                table::cell(get::size(snapshot.size)),
                table::cell(snapshot.nodes.join(", ")),
            ]);
        }
        output.styled(table::text(&rows))?;
    }
    Ok(0)
}
